"""The CUDA kernels of optimal transport, run on the CPU under random schedules of threads and blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_shim import CudaShim
from torch import Tensor

from seer_kernels import ConvergenceWarning, SinkhornResult, _native, sinkhorn, sinkhorn_from_cost
from seer_kernels.sinkhorn import costs, native

F64 = torch.float64
LITTLE_SHARED_BYTES = 24 << 10
"""Leaves room for the vectors of a problem of 140 points, and not for its matrix."""

RELAXED = [(None, None), (0.7, 0.2), (None, 0.4)]
QUIET = pytest.mark.filterwarnings("ignore::seer_kernels.ConvergenceWarning")


@pytest.fixture
def cuda(shim: CudaShim, monkeypatch: pytest.MonkeyPatch) -> CudaShim:
    """The shim in place of the compiled module, and tensors on the CPU taken for tensors on a GPU."""
    monkeypatch.setattr(native, "_native", shim)
    monkeypatch.setattr(native, "_is_cuda", lambda device: True)
    monkeypatch.setattr(native, "_place", lambda device: {"device": 0, "stream": 0})
    return shim


def problems(B: int, n: int, m: int, *, zeros: bool = True, seed: int = 0) -> list[Tensor]:
    """Costs and weights in fp64; with `zeros`, one point in three has none."""
    generator = torch.Generator().manual_seed(seed + n * m)
    x, y = (torch.randn(B, points, 2, generator=generator, dtype=F64) for points in (n, m))
    a, b = (torch.rand(B, points, generator=generator, dtype=F64) + 0.05 for points in (n, m))
    if zeros:
        a[:, 1::3], b[:, 2::3] = 0.0, 0.0
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return [(x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1), a, b]


def combined(result: SinkhornResult) -> Tensor:
    """A fixed combination of all that has a gradient."""
    generator = torch.Generator().manual_seed(7)
    outputs = (result.value, result.transport_cost, result.f, result.g, result.scale)
    return torch.stack(
        [(x * torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype)).sum() for x in outputs]
    ).sum()


def solved(inputs: list[Tensor], backend: str, **options: Any) -> tuple[SinkhornResult, list[Tensor]]:
    """The result, and the gradients of `combined` to the costs and weights."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = sinkhorn_from_cost(leaves[0], a=leaves[1], b=leaves[2], gradient="implicit", backend=backend, **options)
    return result, list(torch.autograd.grad(combined(result), leaves))


def by_cpu(inputs: list[Tensor], **options: Any) -> tuple[SinkhornResult, list[Tensor]]:
    """As the CPU's kernels solve it: iteration by iteration the same, converged or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_native", _native)
        patch.setattr(native, "_is_cuda", lambda device: False)
        return solved(inputs, "native", **options)


def assert_same(inputs: list[Tensor], *, rtol: float = 1e-9, atol: float = 1e-11, **options: Any) -> None:
    """Results and gradients are the reference's, for as many iterations as the options say."""
    (result, gradients), (expected, exact) = (solved(inputs, backend, **options) for backend in ("native", "reference"))
    for name in ("value", "transport_cost", "f", "g", "marginal_error", "scale", "converged"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=rtol, atol=atol)
    torch.testing.assert_close(gradients[0], exact[0], rtol=1e4 * rtol, atol=1e4 * atol)
    for got, true, weight in zip(gradients[1:], exact[1:], inputs[1:], strict=True):
        if options.get("tau_a") is None and options.get("tau_b") is None:  # up to a constant
            got, true = (g - (g * weight).sum(-1, keepdim=True) for g in (got, true))
        exists = torch.isfinite(true)
        torch.testing.assert_close(got[exists], true[exists], rtol=1e5 * rtol, atol=1e5 * atol)


SIZES = [(2, 1, 1), (2, 2, 3), (1, 16, 16), (1, 33, 9), (1, 7, 34), (1, 5, 70), (1, 17, 130)]
"""Problems and points: one warp; its lanes over 16, 32 or 64 fp64 columns; several warps side by side."""


@pytest.mark.parametrize("scale", [None, "mean", "max"])
@pytest.mark.parametrize("relaxed", RELAXED)
def test_to_convergence_against_the_reference(cuda: CudaShim, relaxed: tuple[Any, Any], scale: str | None) -> None:
    options = {"tau_a": relaxed[0], "tau_b": relaxed[1], "scale_cost": scale, "tolerance": 1e-12, "eps": 0.5}
    for seed, (B, n, m) in enumerate(SIZES[:5]):
        cuda.configure(seed)
        assert_same(problems(B, n, m), max_iterations=2000, **options)
        assert cuda.launches() == 2


@QUIET
@pytest.mark.parametrize(("B", "n", "m"), [*SIZES[5:], (1, 100, 100), (1, 128, 128)])
def test_a_few_iterations_of_larger_problems(cuda: CudaShim, B: int, n: int, m: int) -> None:
    """In registers up to 128 x 128 points in fp32, else in shared memory."""
    inputs = problems(B, n, m)
    options = {"eps": 0.3, "max_iterations": 4, "scale_cost": "mean"}
    exact = by_cpu(inputs, **options)[0]
    for dtype, rtol in ((torch.float32, 1e-4), (F64, 1e-9)):
        result = solved([x.to(dtype) for x in inputs], "native", **options)[0]
        for name in ("value", "transport_cost", "f", "g", "marginal_error"):
            torch.testing.assert_close(getattr(result, name).double(), getattr(exact, name), rtol=rtol, atol=rtol / 10)
    assert result.iterations.tolist() == [4] * B
    assert not result.converged.any()


@QUIET
@pytest.mark.parametrize("shared_bytes", [LITTLE_SHARED_BYTES, 200 << 10])
def test_matrices_in_memory(cuda: CudaShim, shared_bytes: int) -> None:
    """In scratch memory blocks draw tickets for the five problems, of different sizes; in shared memory there is one
    block each."""
    inputs = problems(5, 140, 70)
    lengths = {"x_lengths": torch.tensor([140, 3, 50, 1, 90]), "y_lengths": torch.tensor([70, 17, 1, 40, 33])}
    for weights, length in zip(inputs[1:], lengths.values(), strict=True):
        weights.fill_(1.0).masked_fill_(torch.arange(weights.shape[1]) >= length.unsqueeze(1), 0.0)
        weights /= weights.sum(-1, keepdim=True)
    cuda.configure(3, shared_bytes=shared_bytes)
    transport = native._transport(
        native.Problem(*inputs, torch.ones(5, dtype=F64), None, None, math.inf, math.inf, None)
    )
    scratch = cuda.sinkhorn_scratch_f64(transport, gradient=False, device=0)
    assert (scratch > 0) == (shared_bytes == LITTLE_SHARED_BYTES)
    options = {"eps": 0.5, "scale_cost": "max", "max_iterations": 3, "tau_a": 2.0, **lengths}
    (result, gradients), (expected, exact) = solved(inputs, "native", **options), by_cpu(inputs, **options)
    for name in ("value", "transport_cost", "f", "g", "marginal_error", "converged", "iterations"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-9, atol=1e-11)
    for got, true in zip(gradients, exact, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-9)


def test_ragged_batches(cuda: CudaShim) -> None:
    """Entries past the lengths may be anything; the gradients there are 0."""
    inputs = problems(4, 20, 37, zeros=False)
    lengths = {"x_lengths": torch.tensor([20, 1, 7, 13]), "y_lengths": torch.tensor([2, 37, 19, 33])}
    rows, columns = (
        torch.arange(size) >= length.unsqueeze(1) for size, length in zip((20, 37), lengths.values(), strict=True)
    )
    inputs[0] = inputs[0].masked_fill(rows.unsqueeze(2) | columns.unsqueeze(1), torch.nan)
    for weights, missing in zip(inputs[1:], (rows, columns), strict=True):
        weights.masked_fill_(missing, 0.0).div_(weights.sum(-1, keepdim=True))
    for relaxed in RELAXED[:2]:
        options = {"tau_a": relaxed[0], "tau_b": relaxed[1], "eps": 0.5, "scale_cost": "max", "tolerance": 1e-12}
        assert_same(inputs, max_iterations=2000, **options, **lengths)
        gradient = solved(inputs, "native", max_iterations=2000, **options, **lengths)[1][0]
        assert (gradient.masked_fill(~(rows.unsqueeze(2) | columns.unsqueeze(1)), 0.0) == 0).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_small_eps(cuda: CudaShim, dtype: torch.dtype) -> None:
    """Annealed from 25 eps and more, and absorbed on the way: as many iterations as on a CPU, each problem its own."""
    inputs = problems(3, 12, 9, zeros=False)
    options = {"eps": torch.tensor([1.0, 0.05, 0.003], dtype=dtype), "scale_cost": "mean", "max_iterations": 4000}
    options |= {"tolerance": 1e-8 if dtype == F64 else 1e-3}
    result = solved([x.to(dtype) for x in inputs], "native", **options)[0]
    exact = solved(inputs, "reference", **{**options, "eps": options["eps"].double(), "tolerance": 1e-9})[0]
    assert result.converged.all()
    assert (result.iterations.diff() > 0).all()
    if dtype == F64:
        assert result.iterations.tolist() == by_cpu(inputs, **options)[0].iterations.tolist()
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if dtype == F64 else {"rtol": 1e-3, "atol": 1e-4}
    for name in ("value", "transport_cost"):
        torch.testing.assert_close(getattr(result, name).double(), getattr(exact, name), **tolerance)


@QUIET
def test_what_cannot_be_solved_is_flagged_and_never_nan(cuda: CudaShim) -> None:
    """Costs that overflow any exponent, potentials that fp32 cannot hold, weights of very different sizes."""
    noise = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0))
    cost = noise.abs() * torch.tensor([1.0, 1e10, 1e30, 1e-30, 1.0]).view(5, 1, 1)
    a = torch.full((5, 6), 1 / 6)
    a[4] = torch.tensor([1e-30, 1e-20, 1e-10, 0.0, 0.5, 0.5])
    eps = torch.tensor([1e-12, 1e-3, 1e-30, 1e-38, 0.05])
    result = sinkhorn_from_cost(cost, a=a, eps=eps, max_iterations=60, backend="native")
    for name, x in zip(SinkhornResult._fields, result, strict=True):
        assert x is None or not torch.isnan(x.double()).any(), name
    assert result.converged[4]
    assert not result.converged[2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
def test_costs_that_cannot_be_used(cuda: CudaShim, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are an error; where nothing may wait for the values, the results of that problem are NaN, of no other."""
    cost = problems(3, 4, 5)[0].float()
    cost[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"cost must be finite and not overflow; problem 1 holds"):
        sinkhorn_from_cost(cost, backend="native")
    monkeypatch.setattr("seer_kernels._checks.can_wait", lambda device: False)
    monkeypatch.setattr(native, "can_wait", lambda device: False)
    result = sinkhorn_from_cost(cost, backend="native")
    for field in (result.value, result.transport_cost, result.marginal_error, result.f[:, 0], result.g[:, 0]):
        assert field.isnan().tolist() == [False, True, False]
    assert result.converged.tolist() == [True, False, True]
    below = sinkhorn_from_cost(-cost[:1], scale_cost="mean", backend="native")
    assert below.value.isnan().all()


def test_not_converged_is_reported_once(cuda: CudaShim) -> None:
    cost = problems(3, 20, 20)[0]
    with pytest.warns(ConvergenceWarning, match="3 of 3 transport problems did not converge: after 2 iter") as seen:
        result = sinkhorn_from_cost(cost, max_iterations=2, backend="native")
    assert len(seen) == 1
    assert (result.iterations == 2).all()


def test_no_problems_and_clouds(cuda: CudaShim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs between clouds are formed by torch."""
    monkeypatch.setattr(native, "cost_matrix", costs.by_torch)
    x = torch.randn(0, 3, 2, requires_grad=True)
    result = sinkhorn(x, torch.randn(0, 4, 2), backend="native")
    assert result.value.shape == (0,)
    result.value.sum().backward()
    clouds = [torch.randn(2, points, 3, generator=torch.Generator().manual_seed(0), dtype=F64) for points in (6, 8)]
    values = [sinkhorn(*clouds, tolerance=1e-10, eps=1.0, backend=name).value for name in ("native", "reference")]
    torch.testing.assert_close(values[0], values[1])


def test_the_schedule_changes_no_bit(cuda: CudaShim) -> None:
    inputs = [x.float() for x in problems(3, 20, 40)]
    results = []
    for seed in range(3):
        cuda.configure(seed)
        result, gradients = solved(inputs, "native", eps=0.5, tolerance=1e-3)
        results.append([result.value, result.f, result.g, *gradients])
    for other in results[1:]:
        for got, true in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, true, rtol=0, atol=0)


FAULTY: dict[str, tuple[int, int, dict[str, Any]]] = {
    "relaxed": (20, 70, {"eps": 0.5, "tau_a": 1.0, "tau_b": 0.5, "max_iterations": 3, "scale_cost": "max"}),
    "balanced": (20, 50, {"eps": 0.02, "max_iterations": 4, "scale_cost": "mean"}),
}
"""Points and options: warps side by side and above each other; warps above each other, and eps annealed."""


def faults(shim: CudaShim, kernel: str, case: str, seeds: int, **broken: Any) -> int:
    """In how many schedules a kernel is wrong."""
    n, m, options = FAULTY[case]
    inputs = problems(1, n, m, zeros=False)
    expected, exact = by_cpu(inputs, **options)
    count = 0
    for seed in range(seeds):
        leaves = [x.clone().requires_grad_() for x in inputs]
        shim.configure(seed, **(broken if kernel == "solve" else {}))
        try:
            result = sinkhorn_from_cost(
                leaves[0], a=leaves[1], b=leaves[2], gradient="implicit", backend="native", **options
            )
            for name in ("value", "transport_cost", "f", "g", "marginal_error"):
                torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
            if kernel == "gradient":
                shim.configure(seed, **broken)
                for got, true in zip(torch.autograd.grad(combined(result), leaves), exact, strict=True):
                    torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-9)
        except (AssertionError, RuntimeError, ValueError):
            count += 1
    return count


@QUIET
@pytest.mark.parametrize("case", FAULTY)
@pytest.mark.parametrize("kernel", ["solve", "gradient"])
def test_the_kernels_as_they_are_have_no_faults(cuda: CudaShim, kernel: str, case: str) -> None:
    if (kernel, case) != ("gradient", "balanced"):  # too far from a solution for gradients to weights
        assert faults(cuda, kernel, case, 8) == 0


BARRIERS = {
    ("solve", "relaxed"): (3, *range(6, 14), *range(15, 18), 19, *range(24, 33)),
    ("solve", "balanced"): (2, 3, 4, 6, 7, *range(9, 17), *range(19, 27)),
    ("gradient", "relaxed"): (*range(1, 6), 8, *range(10, 15)),
}
"""By kernel and case, which of a thread's barriers change the results if missing. The others guard what the case does
not need, such as the stopping test of so few iterations, or what a dropped iteration makes good."""


@QUIET
@pytest.mark.parametrize(
    ("kernel", "case", "which"), [(*key, which) for key, numbers in BARRIERS.items() for which in numbers]
)
def test_the_shim_finds_missing_barriers(cuda: CudaShim, kernel: str, case: str, which: int) -> None:
    assert faults(cuda, kernel, case, 2 if kernel == "gradient" else 6, missing_barrier=which) >= 2


def test_larger_problems_take_other_backends() -> None:
    """By their size alone, never after an error."""
    cuda = torch.device("cuda")
    assert native.lacks(torch.device("cpu"), torch.float32, 1, 5000, 5000) == ""
    assert native.lacks(cuda, torch.float32, 1, 512, 512) == ""
    assert native.lacks(cuda, torch.bfloat16, 64, 1024, 1024) == ""
    assert "leave the others idle" in native.lacks(cuda, torch.float32, 63, 1024, 1024)
    assert "at most 1024 points in torch.float32; got 1025 x 3" in native.lacks(cuda, torch.float32, 999, 1025, 3)
    assert "at most 512 points in torch.float64; got 3 x 513" in native.lacks(cuda, F64, 1, 3, 513)


def test_the_kernels_refuse_what_they_cannot_hold(cuda: CudaShim) -> None:
    problem = native.Problem(*problems(1, 3, 600), torch.ones(1, dtype=F64), None, None, math.inf, math.inf, None)
    with pytest.raises(RuntimeError, match=r"sinkhorn_solve: .* of 1 to 512 points; got 1 problems of 3 x 600"):
        cuda.sinkhorn_scratch_f64(native._transport(problem), gradient=False, device=0)
