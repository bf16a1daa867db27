"""Triton kernels of optimal transport in Triton's interpreter; `test_triton.py` runs this file in a process of its own.

The interpreter is slow: two problems of 11 and 19 points, a few iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seer_kernels import ConvergenceWarning, backends, sinkhorn, sinkhorn_from_cost
from seer_kernels.sinkhorn import reference, triton_kernels
from seer_kernels.sinkhorn.problem import Cotangents, Problem

INFINITE = math.inf
RELAXED = [(INFINITE, INFINITE), (0.7, 0.2), (INFINITE, 0.4), (0.4, INFINITE)]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, so that a kernel that leaves an element unwritten is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "streamed"])
def geometry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows held as a whole, or seen in three tiles of which the last is not full; several programs share a problem."""
    monkeypatch.setattr(triton_kernels, "TILE", 64)
    monkeypatch.setattr(triton_kernels, "SMALL_COLUMNS", 32)
    monkeypatch.setattr(triton_kernels, "ELEMENTWISE_COLUMNS", 16)
    if request.param == "streamed":
        monkeypatch.setattr(triton_kernels, "RESIDENT_COLUMNS", 8)
        monkeypatch.setattr(triton_kernels, "RESIDENT_COLUMNS_OF_OTHERS", 8)
        monkeypatch.setattr(triton_kernels, "STREAMED_TILE", (2, 8))
    return str(request.param)


def problem_of(
    taus: tuple[float, float], scale: str | None, *, ragged: bool, eps: float = 0.3, iterations: int = 5
) -> Problem:
    """Two problems of 11 and 19 points, with an eps each, weights, of which one is 0, and perhaps a size each."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, k, 2, generator=generator) for k in (11, 19))
    a, b = (torch.rand(2, k, generator=generator) + 0.05 for k in (11, 19))
    cost = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    a[0, 1] = b[1, 2] = 0.0
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    if ragged:
        lengths = torch.tensor([11, 6]), torch.tensor([13, 19])
        a[1, 6:], b[0, 13:], cost[1, 6:], cost[0, :, 13:] = 0.0, 0.0, torch.nan, torch.nan
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
@pytest.mark.parametrize(("taus", "ragged"), zip(RELAXED, [False, True, True, False], strict=True), ids=str)
def test_every_iterate_is_that_of_the_reference(taus: tuple[float, float], ragged: bool) -> None:
    """A number of iterations without a stopping test: f, g and all else then agree to rounding."""
    scale = {0.7: "max", 0.4: None}.get(taus[0], "mean")
    problem = problem_of(taus, scale, ragged=ragged)
    assert_as_exact(*(module.solve(p) for module, p in three(problem)))


def three(problem: Problem) -> list[tuple[Any, Problem]]:
    return [(triton_kernels, problem), (reference, problem), (reference, widened(problem))]


def test_annealing_takes_the_same_steps() -> None:
    problem = problem_of(RELAXED[0], None, ragged=False, eps=0.01, iterations=12)
    assert float((problem.cost.amax((1, 2)) / problem.eps).min()) > 200
    assert_as_exact(*(module.solve(p) for module, p in three(problem)))


def test_each_problem_stops_by_itself(geometry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "CHECK_EVERY", 3)
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
        assert (results[0].cost[1, 6:] == 0).all()


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
