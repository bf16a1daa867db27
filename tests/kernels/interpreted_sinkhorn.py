"""Triton kernels of optimal transport in Triton's interpreter; `test_triton.py` runs this file in a process of its own.

The interpreter is slow: two problems of 5 and 11 points, a few iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from seer_kernels import ConvergenceWarning, backends, ot_contrastive, sinkhorn, sinkhorn_from_cost
from seer_kernels.sinkhorn import reference, triton_kernels
from seer_kernels.sinkhorn.problem import Alternation, Cotangents, Problem

Tensors: TypeAlias = "tuple[Tensor, ...]"
INFINITE = math.inf
N, M = 5, 11
RELAXED = [(INFINITE, INFINITE), (0.7, 0.2), (INFINITE, 0.4), (0.4, INFINITE)]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, so that a kernel that leaves an element unwritten is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "streamed"])
def geometry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tiles of two rows, held as a whole or seen in three pieces; of two programs for a problem one has two tiles, the
    other a tile of which a row exists."""
    monkeypatch.setattr(triton_kernels, "TILE", 32)
    monkeypatch.setattr(triton_kernels, "SMALL_COLUMNS", 16)
    monkeypatch.setattr(triton_kernels, "ELEMENTWISE_COLUMNS", 8)
    monkeypatch.setattr(triton_kernels, "CHECK_EVERY", 3)
    if request.param == "streamed":
        monkeypatch.setattr(triton_kernels, "TILE", 8)
        monkeypatch.setattr(triton_kernels, "RESIDENT_COLUMNS", 8)
        monkeypatch.setattr(triton_kernels, "RESIDENT_COLUMNS_OF_OTHERS", 8)
        monkeypatch.setattr(triton_kernels, "STREAMED_TILE", (2, 4))
    partition, tiles = triton_kernels._launch(torch.empty(2, N, M), plain=True)
    assert (tiles["RESIDENT"], tiles["ROWS"]) == (request.param == "resident", 2)
    assert (partition["parts"], partition["part_rows"]) == (2, 4)
    return str(request.param)


def problem_of(
    taus: tuple[float, float], scale: str | None, *, ragged: bool, eps: float = 0.3, iterations: int = 3
) -> Problem:
    """Two problems of N and M points, with an eps each, weights, of which one is 0, and perhaps a size each."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, k, 2, generator=generator) for k in (N, M))
    a, b = (torch.rand(2, k, generator=generator) + 0.05 for k in (N, M))
    cost = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    a[0, 1] = b[1, 2] = 0.0
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    if ragged:
        lengths = torch.tensor([N, 3]), torch.tensor([7, M])
        a[1, 3:], b[0, 7:], cost[1, 3:], cost[0, :, 7:] = 0.0, 0.0, torch.nan, torch.nan
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    if math.isfinite(taus[0]):
        a = 1.5 * a
    return Problem(cost, a, b, eps * torch.tensor([1.0, 2.0]), *lengths, *taus, scale, iterations, 0.0)


def widened(problem: Problem) -> Problem:
    return replace(problem, **{name: getattr(problem, name).double() for name in ("cost", "a", "b", "eps")})


def assert_as_exact(got: Any, usual: Any, exact: Any) -> None:
    """Each field's error is at most four times the reference's in fp32, or some roundings of its largest value."""
    for name in exact._fields:
        one, other, true = (getattr(x, name) for x in (got, usual, exact))
        if not true.dtype.is_floating_point:
            torch.testing.assert_close(one, true)
            continue
        allowed = 4 * float((other - true).abs().max()) + 2e-6 * float(true.abs().max()) + 1e-9
        error = float((one.double() - true).abs().max())
        assert error <= allowed, f"{name}: error {error:.3g} above the allowed {allowed:.3g}"


def test_the_interpreter_is_what_runs() -> None:
    assert backends()["triton"].devices == ("cpu",)


@pytest.mark.usefixtures("geometry")
@pytest.mark.parametrize(("taus", "ragged"), list(zip(RELAXED, [False, True, True, False], strict=True)), ids=str)
def test_every_iterate_is_that_of_the_reference(taus: tuple[float, float], ragged: bool) -> None:
    """A number of iterations without a stopping test: f, g and all else then agree to rounding."""
    scale = {0.7: "max", 0.4: None}.get(taus[0], "mean")
    problem = problem_of(taus, scale, ragged=ragged)
    assert_as_exact(*(module.solve(p) for module, p in three(problem)))


def three(problem: Problem) -> list[tuple[Any, Problem]]:
    return [(triton_kernels, problem), (reference, problem), (reference, widened(problem))]


def test_annealing_takes_the_same_steps() -> None:
    problem = problem_of(RELAXED[0], None, ragged=False, eps=0.005, iterations=12)
    assert float((problem.cost.amax((1, 2)) / problem.eps).min()) > 200
    assert_as_exact(*(module.solve(p) for module, p in three(problem)))


def test_each_problem_stops_by_itself(geometry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    run = triton_kernels._Run._iterate
    monkeypatch.setattr(triton_kernels._Run, "_iterate", lambda *operands: (launched.append(1), run(*operands))[1])
    problem = replace(
        problem_of(RELAXED[0], "mean", ragged=geometry == "streamed"),
        eps=torch.tensor([0.8, 3.0]),
        max_iterations=100,
        tolerance=1e-4,
    )
    got, expected = triton_kernels.solve(problem), reference.solve(problem)
    assert got.converged.all()
    assert got.iterations.tolist() == expected.iterations.tolist()
    assert got.iterations[0] > got.iterations[1]
    assert len(launched) == -(-int(got.iterations.max()) // 3) * 3
    torch.testing.assert_close(got.f, expected.f, rtol=1e-5, atol=1e-5)
    assert (got.marginal_error <= 1e-4).all()
    again = triton_kernels.solve(problem)
    for one, two in zip(got, again, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("taus", "scale", "arrives"),
    [
        (RELAXED[0], None, "value"),
        (RELAXED[0], "mean", "all"),
        (RELAXED[1], "max", "all"),
        (RELAXED[2], None, "all"),
    ],
)
def test_gradients(geometry: str, taus: tuple[float, float], scale: str | None, arrives: str) -> None:
    problem = replace(problem_of(taus, scale, ragged=geometry == "streamed"), max_iterations=400, tolerance=1e-12)
    exact = widened(problem)
    at = reference.solve(exact)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in at[:5]]
    upstream[4] = torch.randn(2, generator=generator, dtype=torch.float64)
    if arrives == "value":
        upstream[1:] = [None] * 4
    # The order of a solution's fields is that of what arrives but for the scale, which is last in both.
    results = []
    for module, p in three(problem):
        arrived = Cotangents(*(None if x is None else x.to(p.cost.dtype) for x in upstream))
        f, g, s = (x.to(p.cost.dtype) for x in (at.f, at.g, at.scale))
        results.append(module.gradients(p, f, g, s, arrived))
    assert_as_exact(*results)
    if geometry == "streamed":
        assert (results[0].cost[1, 3:] == 0).all()


def test_backend_asked_for_runs_and_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("solve", "gradients"):
        original = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, lambda *a, f=original, n=name: (ran.append(n), f(*a))[1])
    x, y = torch.randn(2, 3, 2), torch.randn(2, 4, 2)
    results = []
    for backend in ("triton", "reference"):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        result = sinkhorn(*leaves, eps=2.0, gradient="implicit", backend=backend)
        results.append([result.value, *torch.autograd.grad((result.value + result.transport_cost).sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert ran == ["solve", "gradients"]
    sinkhorn(x, y, eps=2.0)
    assert len(ran) == 2
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on cpu: it has no kernels for torch.float64"):
        sinkhorn(x.double(), y.double(), backend="triton")


def assert_as_torch(got: Tensors, usual: Tensors, exact: Tensors) -> None:
    """Each error is at most three times that of plain torch in fp32, and a rounding; infinite where the exact is."""
    for one, other, true in zip(got, usual, exact, strict=True):
        assert torch.equal(torch.where(one.isfinite(), 0.0, one), torch.where(true.isfinite(), 0.0, true).float())
        finite = true.isfinite()
        allowed = 3 * (other - true)[finite].abs().max() + 2**-24 * true[finite].abs().max()
        assert (one - true)[finite].abs().max() <= allowed


@pytest.mark.usefixtures("geometry")
def test_alternation_is_the_reference() -> None:
    """Peaked costs, relaxed marginals, absent rows and columns."""
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    cost, log_a, log_b = 60 * random(2, N, M), random(2, N).log_softmax(1), random(2, M).log_softmax(1)
    log_a[:, 1], log_b[:, 2] = -INFINITE, -INFINITE
    single = Alternation(cost, log_a, log_b, random(2, M), 0.7, 0.9, 3)
    double = replace(single, **{name: getattr(single, name).double() for name in ("cost", "log_a", "log_b", "start")})
    gradient, results = random(2, M) - 0.5, []
    for module, t in ((triton_kernels, single), (reference, single), (reference, double)):
        potential, rows, columns = module.alternate(t)
        slope = module.alternate_gradient(t, rows, columns, gradient.to(cost.dtype if t is single else torch.float64))
        results.append((potential, rows, columns, slope))
    assert_as_torch(*results)


def test_contrastive_loss_on_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank with labels, of which one is that of no query, a query without weight, relaxed marginals."""
    ran = []
    for name in ("alternate", "alternate_gradient"):
        original = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, lambda *a, f=original, n=name: (ran.append(n), f(*a))[1])
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(2, k, 4, generator=generator) for k in (4, 6))
    options = {
        "query_labels": torch.tensor([0, 1, 0, 2]),
        "key_labels": torch.tensor([0, 1, 0, 2, 1, 7]),
        "weights": torch.tensor([1.0, 0.5, 0.0, 2.0]),
        "tau": (0.7, 0.4),
        "iterations": 3,
    }
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = query.to(dtype, copy=True).requires_grad_(), key.to(dtype, copy=True).requires_grad_()
        loss = ot_contrastive(*leaves, temperature=0.2, **options, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
        assert ran == ["alternate", "alternate_gradient"]
    assert_as_torch(*results)


def test_unusable_costs_and_hopeless_problems() -> None:
    cost = torch.rand(3, 4, 5)
    for value in (torch.nan, torch.inf, 1e38):
        broken = cost.clone()
        broken[1, 2, 3] = value
        with pytest.raises(ValueError, match=r"cost must be finite and not overflow; problem 1 holds"):
            sinkhorn_from_cost(broken, backend="triton")
    hopeless = cost * torch.tensor([1.0, 1e30, 1e-30]).view(3, 1, 1)
    eps = torch.tensor([1e-12, 1e-30, 1e-38])
    with pytest.warns(ConvergenceWarning):
        result = sinkhorn_from_cost(hopeless, eps=eps, max_iterations=20, backend="triton")
    for x in result[:8]:
        assert not torch.isnan(x.double()).any()
    assert not torch.isnan(result.plan()).any()
    assert not result.converged[1]
