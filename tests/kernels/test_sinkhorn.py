"""Entropic optimal transport against POT, closed forms and finite differences, on every backend."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seer_kernels import (
    ConvergenceWarning,
    KVariance,
    SinkhornDivergence,
    SinkhornResult,
    backends,
    k_variance,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_from_cost,
)
from seer_kernels.sinkhorn import native, reference

F64 = torch.float64
BACKENDS = [name for name, status in backends().items() if "cpu" in status.devices]
NEVER = {"max_iterations": 20000, "tolerance": 1e-10}
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def clouds(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def weights(*shape: int, seed: int = 0, zeros: bool = False, dtype: torch.dtype = F64) -> Tensor:
    """Random weights of sum 1; with `zeros`, the second point of each problem has none."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(shape, generator=generator, dtype=F64) + 0.05
    if zeros:
        w[..., 1] = 0.0
    return (w / w.sum(-1, keepdim=True)).to(dtype)


def lists(*values: int) -> Tensor:
    return torch.tensor(values)


def by_pot(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, tau_a: float | None, tau_b: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and potentials of one problem, in this package's convention, by POT."""
    C, p, q = (np.asarray(x, dtype=np.float64) for x in (cost, a, b))
    with np.errstate(divide="ignore", over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tau_a is None and tau_b is None:
            options = {"method": "sinkhorn_log", "numItermax": 100000, "stopThr": 1e-12, "log": True}
            plan, log = ot.sinkhorn(p, q, C, eps, **options)
            f, g = log["log_u"] * eps, log["log_v"] * eps
            f, g = f - eps * np.log(p), g - eps * np.log(q)
        else:
            taus = tuple(math.inf if t is None else t for t in (tau_a, tau_b))
            options = {"method": "sinkhorn_stabilized", "numItermax": 20000, "stopThr": 1e-13, "log": True}
            plan, log = ot.unbalanced.sinkhorn_unbalanced(p, q, C, eps, taus, reg_type="kl", **options)
            f, g = log["logu"] * eps, log["logv"] * eps
    return tuple(torch.from_numpy(np.asarray(v)) for v in (plan, f, g))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, torch.where(p > 0, p / q, 1.0)) - p + q).sum()


@pytest.mark.parametrize("relaxed", [(None, None), (0.7, 0.2), (None, 0.4), (0.4, None)])
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.02])
def test_plan_potentials_and_values_against_pot(backend: str, relaxed: tuple[Any, Any], eps: float) -> None:
    """Ragged, weighted, with weights of zero, several at a time, each with its own eps."""
    (x, y), (tau_a, tau_b) = clouds((3, 11, 2), (3, 9, 2)), relaxed
    n, m = lists(11, 7, 4), lists(9, 3, 8)
    exists_x, exists_y = torch.arange(11) < n.unsqueeze(1), torch.arange(9) < m.unsqueeze(1)
    a, b = weights(3, 11, zeros=True) * exists_x, weights(3, 9, seed=1) * exists_y
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    if relaxed == (0.7, 0.2):
        a = a * 1.5
    x, y = x.masked_fill(~exists_x.unsqueeze(-1), torch.nan), y.masked_fill(~exists_y.unsqueeze(-1), torch.nan)
    own = torch.tensor([eps, eps / 2, 2 * eps], dtype=F64)
    options = {"eps": own, "x_lengths": n, "y_lengths": m, "tau_a": tau_a, "tau_b": tau_b, **NEVER}
    result = sinkhorn(x, y, a=a, b=b, scale_cost="mean", backend=backend, **options)
    assert bool(result.converged.all())
    assert torch.isfinite(result.plan()).all()
    for p in range(3):
        rows, columns = slice(0, int(n[p])), slice(0, int(m[p]))
        u, v = x[p, rows], y[p, columns]
        C = (u.unsqueeze(1) - v).square().sum(-1)
        C = C / C.mean()
        plan, mass_a, mass_b = result.plan()[p, rows, columns], a[p, rows], b[p, columns]
        primal = (plan * C).sum() + own[p] * kl(plan, mass_a.unsqueeze(1) * mass_b)
        primal += sum(t * kl(s, w) for t, s, w in ((tau_a, plan.sum(1), mass_a), (tau_b, plan.sum(0), mass_b)) if t)
        assert float(result.value[p]) == pytest.approx(float(primal), rel=1e-8)
        assert float(result.transport_cost[p]) == pytest.approx(float((plan * C).sum()), rel=1e-7)
        for tau, got, want in ((tau_a, plan.sum(1), mass_a), (tau_b, plan.sum(0), mass_b)):
            if tau is None:
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        if (tau_a is None) != (tau_b is None) and eps < 0.1:
            continue  # POT does not converge there; no duality gap, as above, proves value and plan
        plan, f, g = by_pot(C, mass_a, mass_b, float(own[p]), tau_a, tau_b)
        torch.testing.assert_close(result.plan()[p, rows, columns], plan, rtol=1e-6, atol=1e-9)
        assert float(result.plan()[p].sum()) == pytest.approx(float(plan.sum()), rel=1e-8)
        ours_f, ours_g = result.f[p, rows], result.g[p, columns]
        assert (result.f[p, int(n[p]) :] == 0).all()
        with_weight = a[p, rows] > 0
        f, ours_f = f[with_weight], ours_f[with_weight]
        if tau_a is None and tau_b is None:  # up to a constant
            f, ours_f, g, ours_g = (v - v[0] for v in (f, ours_f, g, ours_g))
        torch.testing.assert_close(ours_f, f, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours_g, g, rtol=1e-6, atol=1e-7)


def test_small_eps_against_pot(backend: str) -> None:
    x, y = clouds((6, 2), (5, 2), seed=3)
    result = sinkhorn(x, y, eps=1e-3, scale_cost="mean", backend=backend, max_iterations=50000, tolerance=1e-9)
    C = (x.unsqueeze(1) - y).square().sum(-1)
    plan, _, _ = by_pot(C / C.mean(), result.a, result.b, 1e-3, None, None)
    torch.testing.assert_close(result.plan(), plan, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_costs(backend: str, cost: str, dtype: torch.dtype, far: float) -> None:
    """Against their definitions in fp64, also for duplicated points, ragged, and far from the origin."""
    x, y = clouds((3, 21, 7), (3, 18, 7), dtype=dtype)
    y[:, 5] = x[:, 3]
    x, y = x + far, y + far
    n, m = lists(21, 9, 1), lists(2, 18, 17)
    result = sinkhorn(x, y, cost=cost, eps=10.0, x_lengths=n, y_lengths=m, backend=backend)
    assert result.cost.dtype == (F64 if dtype == F64 else torch.float32)
    for p in range(3):
        u, v = x[p, : n[p]].double().unsqueeze(1), y[p, : m[p]].double()
        exact = {
            "sqeuclidean": (u - v).square().sum(-1),
            "euclidean": (u - v).square().sum(-1).sqrt(),
            "cosine": 1 - torch.nn.functional.cosine_similarity(u, v, dim=-1),
        }[cost]
        got = result.cost[p, : n[p], : m[p]].double()
        # Rounding of the centred clouds; a cosine far from the origin is a difference of two numbers close to 1.
        torch.testing.assert_close(got, exact, rtol=(32 + far) * torch.finfo(result.cost.dtype).eps, atol=3e-6)
        if cost != "cosine" and n[p] > 3 and m[p] > 5:
            assert got[3, 5] == 0


def test_dirac_permutation_and_single_points(backend: str) -> None:
    x, y = clouds((4, 1, 3), (4, 6, 3))
    one = sinkhorn(x, y, eps=0.01, backend=backend)
    torch.testing.assert_close(one.value, (x - y).square().sum(-1).mean(-1))
    torch.testing.assert_close(one.plan(), torch.full((4, 1, 6), 1 / 6, dtype=F64))
    pair = sinkhorn(x, y[:, :1], eps=0.01, cost="euclidean", backend=backend)
    torch.testing.assert_close(pair.transport_cost, (x - y[:, :1]).norm(dim=-1).squeeze(-1))

    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    moved = sinkhorn(y, y[:, order] + 1e-3, eps=1e-3, backend=backend)
    expected = torch.eye(6, dtype=F64)[order].T.expand(4, 6, 6) / 6
    torch.testing.assert_close(moved.plan(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_divergence_of_equal_clouds_is_zero_and_of_others_positive(backend: str, cost: str, dtype: torch.dtype) -> None:
    x, y = clouds((3, 12, 4), (3, 9, 4), dtype=dtype)
    options = {"cost": cost, "eps": 0.3, "scale_cost": "mean", "tolerance": 1e-6, "backend": backend}
    same = sinkhorn_divergence(x, x.clone(), **options)
    torch.testing.assert_close(same, torch.zeros(3, dtype=dtype), rtol=0, atol=1e-6)
    shuffled = x[:, torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(sinkhorn_divergence(x, shuffled, **options), same, rtol=0, atol=1e-6)
    assert (sinkhorn_divergence(x, y, **options) > 1e-3).all()
    relaxed = sinkhorn_divergence(x, y, a=2 * weights(3, 12, dtype=dtype), tau_a=0.5, tau_b=0.5, **options)
    assert (relaxed > 1e-3).all()


def test_divergence_of_ragged_scaled_clouds_has_the_gradient_of_each_alone(backend: str) -> None:
    """Costs past the lengths are undefined, whatever the memory held before."""
    x, y = clouds((3, 9, 4), (3, 9, 4))
    x.requires_grad_()
    lengths = torch.tensor([4, 9, 2])
    options: dict[str, Any] = {"scale_cost": "mean", "eps": 0.3, "tolerance": 1e-8, "backend": backend}
    for _ in range(5):
        freed = [torch.full((size,), math.nan, dtype=F64) for size in range(1, 400, 7)]
        del freed
        values = sinkhorn_divergence(x, y, x_lengths=lengths, y_lengths=lengths, **options)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        alone = [sinkhorn_divergence(x[i, :n], y[i, :n], **options) for i, n in enumerate(lengths)]
        torch.testing.assert_close(values, torch.stack(alone))
        torch.testing.assert_close(gradient, torch.autograd.grad(torch.stack(alone).sum(), x)[0], rtol=1e-5, atol=1e-8)


def test_gaussians(backend: str) -> None:
    """Shifted Gaussian clouds: the debiased distance is |shift|^2 exactly, as every plan's cost moves alike."""
    (x,) = clouds((1, 40, 2))
    shift = torch.tensor([3.0, -1.0], dtype=F64)
    value = sinkhorn_divergence(x, x + shift, eps=0.5, tolerance=1e-10, backend=backend)
    torch.testing.assert_close(value, torch.full((1,), 10.0, dtype=F64))


def test_entropic_value_between_gaussians(backend: str) -> None:
    """On a grid fine enough, the closed form of Janati et al. 2020 (arXiv 2006.02572), theorem 1, in one dimension."""
    grid = torch.linspace(-9, 9, 200, dtype=F64).unsqueeze(-1)
    eps, s, t, mean = 0.8, 0.7, 1.1, 0.5

    def density(mean: float, deviation: float) -> Tensor:
        p = torch.exp(-((grid.squeeze(-1) - mean) ** 2) / (2 * deviation**2))
        return p / p.sum()

    result = sinkhorn(
        grid, grid, a=density(0, s), b=density(mean, t), eps=eps, tolerance=1e-11, max_iterations=5000, backend=backend
    )
    sigma2 = eps / 2  # their cost is |x - y|^2 and their entropy weight 2 sigma^2
    D = math.sqrt(4 * s**2 * t**2 + sigma2**2)
    expected = mean**2 + s**2 + t**2 - D + sigma2 * (1 - math.log(2 * sigma2)) + sigma2 * math.log(D + sigma2)
    assert float(result.value) == pytest.approx(expected, rel=1e-6)


def test_small_eps_approaches_the_exact_distance(backend: str) -> None:
    """<P, C> lies above W, and above by less than eps log(n): the entropy of a plan is no larger."""
    x, y = clouds((12, 2), (12, 2), seed=5)
    C = torch.cdist(x, y)
    exact = float(ot.emd2(np.full(12, 1 / 12), np.full(12, 1 / 12), C.numpy()))
    gaps = []
    for eps in (0.4, 0.2, 0.1, 0.05):
        result = sinkhorn(x, y, cost="euclidean", eps=eps, tolerance=1e-6, max_iterations=20000, backend=backend)
        gaps.append(float(result.transport_cost) - exact)
        assert -1e-5 <= gaps[-1] <= eps * math.log(12)
    assert gaps[3] < gaps[2] < gaps[1] < gaps[0]


@settings(deadline=None, max_examples=10)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    seed=st.integers(0, 99),
    factor=st.floats(0.01, 100),
    shift=st.floats(-50, 50),
)
def test_symmetry_scaling_and_translation(backend: str, n: int, m: int, seed: int, factor: float, shift: float) -> None:
    x, y = clouds((n, 3), (m, 3), seed=seed)
    a, b = weights(n, seed=seed), weights(m, seed=seed + 1)
    options = {"eps": 0.4, "tolerance": 1e-10, "max_iterations": 5000, "backend": backend}
    one = sinkhorn(x, y, a=a, b=b, **options)
    turned = sinkhorn(y, x, a=b, b=a, **options)
    torch.testing.assert_close(turned.value, one.value)
    torch.testing.assert_close(turned.f, one.g, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(turned.plan().T, one.plan(), rtol=1e-6, atol=1e-9)
    moved = sinkhorn(x + shift, y + shift, a=a, b=b, **options)
    torch.testing.assert_close(moved.value, one.value)
    larger = sinkhorn(x * factor, y * factor, a=a, b=b, **{**options, "eps": 0.4 * factor**2})
    torch.testing.assert_close(larger.value, one.value * factor**2)
    scaled = sinkhorn(x * factor, y * factor, a=a, b=b, **options, scale_cost="max")
    torch.testing.assert_close(scaled.value, sinkhorn(x, y, a=a, b=b, **options, scale_cost="max").value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1.0, 0.05, 0.005])
@pytest.mark.parametrize("far", [0.0, 1000.0])
@pytest.mark.parametrize("relaxed", [(None, None), (2.0, 0.5)])
def test_half_and_single_precision(
    backend: str, dtype: torch.dtype, eps: float, far: float, relaxed: tuple[float | None, float | None]
) -> None:
    """The same inputs in fp64 tell how far fp32 arithmetic is off; a thousand deviations from the origin changes it
    by nothing but the rounding of the coordinates themselves."""
    x, y = (v + far for v in clouds((2, 40, 5), (2, 33, 5), dtype=dtype))
    if far and dtype != torch.float32:
        pytest.skip("there is nothing left of the clouds in half precision")
    options = {"eps": eps, "scale_cost": "mean", "tau_a": relaxed[0], "tau_b": relaxed[1], "max_iterations": 3000}
    got = sinkhorn(x, y, tolerance=5e-4, backend=backend, **options)
    want = sinkhorn(x.double(), y.double(), tolerance=1e-6, backend=backend, **options)
    assert got.value.dtype == torch.float32
    assert bool(got.converged.all())
    torch.testing.assert_close(got.value.double(), want.value, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(got.transport_cost.double(), want.transport_cost, rtol=1e-3, atol=1e-4)
    apart = (got.plan().sum(2).double() - want.plan().sum(2)).abs().sum(1)
    assert (apart <= 1.1 * (got.marginal_error + want.marginal_error) * want.plan().sum((1, 2)) + 1e-4).all()


def test_what_cannot_be_solved_is_flagged_and_never_nan(backend: str) -> None:
    """Costs that overflow any exponent, potentials that fp32 cannot hold, weights of very different sizes."""
    (noise,) = clouds((5, 6, 6), dtype=torch.float32)
    cost = noise.abs() * torch.tensor([1.0, 1e10, 1e30, 1e-30, 1.0]).view(5, 1, 1)
    eps = torch.tensor([1e-12, 1e-3, 1e-30, 1e-38, 0.05])
    a = torch.full((5, 6), 1 / 6)
    a[4] = torch.tensor([1e-30, 1e-20, 1e-10, 0.0, 0.5, 0.5])
    with pytest.warns(ConvergenceWarning, match=r"of 5 transport problems did not converge.*problem \d has a marginal"):
        result = sinkhorn_from_cost(cost, a=a, eps=eps, max_iterations=300, backend=backend)
    for name, x in zip(SinkhornResult._fields, result, strict=True):
        assert x is None or not torch.isnan(x.double()).any(), name
    assert not torch.isnan(result.plan()).any()
    assert result.converged[4]
    assert not result.converged[2]
    sums = result.plan()[4].sum(1)
    torch.testing.assert_close(sums, a[4], rtol=1e-2, atol=2e-4)


def test_each_problem_stops_by_itself(backend: str) -> None:
    x, y = (v.expand(6, -1, -1) for v in clouds((15, 2), (15, 2)))
    eps = torch.tensor([20.0, 5.0, 2.0, 1.0, 0.7, 0.5], dtype=F64)
    together = sinkhorn(x, y, eps=eps, max_iterations=5000, tolerance=1e-6, backend=backend)
    assert (together.iterations.diff() > 0).all()
    for p in range(6):
        alone = sinkhorn(x[p], y[p], eps=float(eps[p]), max_iterations=5000, tolerance=1e-6, backend=backend)
        assert alone.iterations == together.iterations[p]
        torch.testing.assert_close(alone.f, together.f[p])
        marginal = (together.plan()[p].sum(1) - 1 / 15).abs().sum()
        assert float(marginal) == pytest.approx(float(together.marginal_error[p]), abs=1e-12)
        assert float(marginal) <= 1e-6


def leaves(seed: int, n: int, m: int) -> list[Tensor]:
    """Costs and weights of two problems, one point of which has no weight."""
    x, y = clouds((2, n, 2), (2, m, 2), seed=seed)
    cost = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    return [cost, weights(2, n, seed=seed, zeros=True), weights(2, m, seed=seed + 1)]


def combined(result: SinkhornResult, *, value_only: bool = False) -> Tensor:
    """A fixed random combination of all that has a gradient."""
    outputs = [result.value]
    if not value_only:
        outputs += [result.transport_cost, result.f, result.g, result.plan()]
    generator = torch.Generator().manual_seed(7)
    return torch.stack([(x * torch.randn(x.shape, generator=generator, dtype=F64)).sum() for x in outputs]).sum()


@pytest.mark.parametrize("relaxed", [(None, None), (0.7, 0.2), (None, 0.4)])
@pytest.mark.parametrize("scale", [None, "mean", "max"])
@pytest.mark.parametrize("gradient", ["envelope", "implicit"])
def test_gradients_against_finite_differences(
    backend: str, relaxed: tuple[Any, Any], scale: str | None, gradient: str
) -> None:
    """Along random directions; those of balanced weights keep the sums equal, and those from 0 go up."""
    inputs = leaves(3, 5, 4)
    options = {"eps": 0.4, "tau_a": relaxed[0], "tau_b": relaxed[1], "scale_cost": scale, "backend": backend}
    options |= {"tolerance": 1e-13, "max_iterations": 20000, "x_lengths": lists(5, 4), "y_lengths": lists(3, 4)}
    inputs[1][1, 4], inputs[2][0, 3] = 0.0, 0.0
    inputs[1], inputs[2] = (w / w.sum(-1, keepdim=True) for w in inputs[1:])

    def total(*values: Tensor) -> Tensor:
        result = sinkhorn_from_cost(values[0], a=values[1], b=values[2], gradient=gradient, **options)
        return combined(result, value_only=gradient == "envelope")

    required = [v.clone().requires_grad_() for v in inputs]
    gradients = torch.autograd.grad(total(*required), required)
    generator = torch.Generator().manual_seed(0)
    for which, (value, got) in enumerate(zip(inputs, gradients, strict=True)):
        direction = torch.randn(value.shape, generator=generator, dtype=F64)
        if which > 0:
            length = (lists(5, 4), lists(3, 4))[which - 1].unsqueeze(1)
            exists = torch.arange(value.shape[1]) < length
            direction = direction.masked_fill(~exists, 0.0)
            if relaxed == (None, None):
                mean = direction.masked_fill(value == 0, 0.0).sum(1, keepdim=True) + direction[:, 1:2] * (which == 1)
                direction = direction - torch.where(value > 0, mean / (value > 0).sum(1, keepdim=True), 0.0)
            assert (got.masked_fill(exists, 0.0) == 0).all()
        step = 1e-5
        moved = [[v + s * step * direction if i == which else v for i, v in enumerate(inputs)] for s in (1, 2, -1, -2)]
        if which == 1:  # weight 0 has only one side: a second-order formula on that side
            direction[:, 1] = direction[:, 1].abs()
            if relaxed == (None, None):
                direction[:, 0] -= direction.sum(1)
            ahead = [[*inputs[:1], inputs[1] + k * step * direction, inputs[2]] for k in (1, 2)]
            numeric = (4 * total(*ahead[0]) - total(*ahead[1]) - 3 * total(*inputs)) / (2 * step)
        else:
            numeric = (8 * (total(*moved[0]) - total(*moved[2])) - total(*moved[1]) + total(*moved[3])) / (12 * step)
        assert float((got * direction).sum()) == pytest.approx(float(numeric), rel=2e-5, abs=2e-6), which


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_gradients_to_points(backend: str, cost: str) -> None:
    x, y = clouds((2, 5, 3), (2, 4, 3))
    options = {"eps": 0.3, "cost": cost, "x_lengths": lists(5, 3), "tolerance": 1e-12, "max_iterations": 20000}

    def value(x: Tensor, y: Tensor) -> Tensor:
        result = sinkhorn(x, y, gradient="implicit", scale_cost="mean", backend=backend, **options)
        return torch.cat([result.value, result.transport_cost])

    assert torch.autograd.gradcheck(value, [v.requires_grad_() for v in (x, y)], eps=1e-5, atol=1e-5)
    grown = torch.autograd.grad(value(x, y).sum(), x)[0]
    assert (grown[1, 3:] == 0).all()


def test_gradients_against_unrolling_and_pot(backend: str) -> None:
    cost, a, b = leaves(4, 6, 5)
    options = {"eps": 0.3, "tolerance": 1e-13, "max_iterations": 5000}
    required = [cost.requires_grad_(), a]
    implicit = sinkhorn_from_cost(cost, a=a, b=b, gradient="implicit", backend=backend, **options)
    unrolled = sinkhorn_from_cost(cost, a=a, b=b, gradient="unrolled", **options)
    torch.testing.assert_close(implicit.value, unrolled.value)
    (one,), (other,) = (torch.autograd.grad(combined(r), required[:1]) for r in (implicit, unrolled))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)

    C = cost.detach()[1].clone().requires_grad_()
    mine = sinkhorn_from_cost(C, a=a[1], b=b[1], backend=backend, **options)
    (ours,) = torch.autograd.grad(mine.value, C)
    theirs, _, _ = by_pot(C.detach(), a[1], b[1], 0.3, None, None)  # by the envelope theorem, the plan itself
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    if backend == "native":
        with pytest.raises(ValueError, match='gradient="unrolled" needs backend="reference"'):
            sinkhorn_from_cost(cost, gradient="unrolled", backend="native")


def test_gradients_that_are_refused(backend: str) -> None:
    cost, a, b = leaves(5, 4, 4)
    cost.requires_grad_()
    result = sinkhorn_from_cost(cost, a=a, b=b, backend=backend)
    for output in (result.transport_cost, result.f, result.plan()):
        with pytest.raises(RuntimeError, match=r"gradient=.envelope. differentiates only the value"):
            torch.autograd.grad(output.sum(), cost, retain_graph=True)
    (first,) = torch.autograd.grad(result.value.sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()
    x, y = (v.requires_grad_() for v in clouds((3, 2), (3, 2)))
    (first,) = torch.autograd.grad(sinkhorn(x, y, backend=backend).value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()


def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"reference": reference, "native": native}[backend]
    ran = []
    for name in ("solve", "gradients"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: (ran.append(n), f(*a))[1])
    x, y = (v.requires_grad_() for v in clouds((3, 2), (4, 2)))
    sinkhorn(x, y, backend=backend).value.backward()
    assert ran == ["solve", "gradients"]


def test_more_iterations_than_allowed_are_reported_once(backend: str) -> None:
    x, y = clouds((3, 20, 2), (3, 20, 2))
    with pytest.warns(
        ConvergenceWarning, match="3 of 3 transport problems did not converge: after 2 iterations"
    ) as seen:
        result = sinkhorn(x, y, max_iterations=2, backend=backend)
    assert len(seen) == 1
    assert not result.converged.any()
    assert (result.iterations == 2).all()
    assert (result.marginal_error > 1e-4).all()


def test_large_problems_shared_by_threads(backend: str) -> None:
    """Three problems on two threads: the rows of each are divided."""
    if backend == "reference":
        pytest.skip("torch divides the work there")
    x, y = clouds((3, 301, 3), (3, 260, 3))
    a = weights(3, 301, zeros=True)
    options = {"eps": 0.2, "tolerance": 1e-7, "scale_cost": "max", "backend": backend}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([sinkhorn(x, y, a=a, **options), sinkhorn(x, y, a=a, tau_a=1.0, tau_b=0.3, **options)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert one.converged.all()
        torch.testing.assert_close(two.iterations, one.iterations)
        for field in ("value", "transport_cost", "f", "g", "marginal_error", "scale"):
            torch.testing.assert_close(getattr(two, field), getattr(one, field), rtol=1e-9, atol=1e-12)


def test_no_problems(backend: str) -> None:
    x = torch.randn(0, 3, 2, requires_grad=True)
    result = sinkhorn(x, torch.randn(0, 4, 2), backend=backend)
    assert result.value.shape == (0,)
    assert result.plan().shape == (0, 3, 4)
    result.value.sum().backward()
    assert x.grad is not None


def test_ragged_batch_is_its_problems_one_by_one(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n, m = (torch.randint(1, 40, (12,), generator=generator) for _ in range(2))
    x, y = clouds((12, 40, 3), (12, 40, 3), dtype=torch.float32)
    for p in range(12):
        x[p, n[p] :], y[p, m[p] :] = torch.nan, torch.inf
    required = x.requires_grad_(), y.requires_grad_()
    batch = sinkhorn(*required, x_lengths=n, y_lengths=m, cost="euclidean", scale_cost="mean", backend=backend)
    batch_gradient = torch.autograd.grad(batch.value.sum(), required)
    assert all(torch.isfinite(g).all() for g in batch_gradient)
    for p in range(12):
        u, v = (z.detach()[p, : k[p]].requires_grad_() for z, k in ((x, n), (y, m)))
        alone = sinkhorn(u, v, cost="euclidean", scale_cost="mean", backend=backend)
        torch.testing.assert_close(batch.value[p], alone.value, rtol=1e-5, atol=1e-6)
        assert (batch.plan()[p, n[p] :] == 0).all()
        for whole, part, k in zip(batch_gradient, torch.autograd.grad(alone.value, (u, v)), (n, m), strict=True):
            torch.testing.assert_close(whole[p, : k[p]], part, rtol=1e-3, atol=1e-5)


def test_opcheck(backend: str) -> None:
    cost, a, b = (v.float().requires_grad_() for v in leaves(6, 5, 4))
    x, y = (v.requires_grad_() for v in clouds((2, 5, 3), (2, 4, 3), dtype=torch.float32))
    eps, lengths = torch.tensor([0.5, 1.0]), (lists(5, 3), None)
    options = (math.inf, 0.5, "mean")
    family = torch.ops.seer_kernels
    check = torch.library.opcheck
    check(family.sinkhorn_cost.default, (x, y, None, None, "euclidean", backend))  # past the lengths: undefined
    check(family.sinkhorn.default, (cost, a, b, eps, *lengths, *options, 500, 1e-5, "cost", True, "implicit", backend))
    saved = [v.detach() for v in (cost, a, b)]
    solved = family.sinkhorn.default(*saved, eps, *lengths, *options, 500, 1e-5, "cost", True, "implicit", backend)
    arrived = (torch.rand(2), torch.rand(2), torch.rand(2, 5), None, None)
    check(family.sinkhorn_backward.default, (*saved, eps, *lengths, *solved[2:5], *arrived, *options, backend))
    points = (x.detach(), y.detach())
    check(
        family.sinkhorn_cost_backward.default,
        (torch.rand(2, 5, 4), saved[0], *points, *lengths, "cosine", True, False),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend: str, compiler: str) -> None:
    if compiler == "inductor" and backend == "reference" and len(BACKENDS) > 1:
        pytest.skip("the operators around it are the same")

    def loss(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
        result = sinkhorn(2 * x, y, x_lengths=n, gradient="implicit", eps=1.0, backend=backend)
        divergence = sinkhorn_divergence(x, y, eps=1.0, scale_cost="mean", backend=backend)
        return result.value.sum() + result.plan().square().sum() + divergence.sum()

    x, y = (v.requires_grad_() for v in clouds((2, 6, 3), (2, 5, 3), dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations while it compiles
        value = torch.compile(loss, backend=compiler, fullgraph=True)(x, y, lists(6, 4))
        compiled = torch.autograd.grad(value, (x, y))
    expected = loss(x, y, lists(6, 4))
    torch.testing.assert_close(value, expected)
    for got, want in zip(compiled, torch.autograd.grad(expected, (x, y)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_into_the_kernels(backend: str) -> None:
    x, y = (v.requires_grad_() for v in clouds((2, 6, 3), (2, 5, 3), dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        inside = sinkhorn(x, y, eps=1.0, gradient="implicit", backend=backend)
        inside_gradient = torch.autograd.grad(inside.transport_cost.sum(), x)
    outside = sinkhorn(x, y, eps=1.0, gradient="implicit", backend=backend)
    torch.testing.assert_close(inside.transport_cost, outside.transport_cost, rtol=0, atol=0)
    torch.testing.assert_close(inside_gradient, torch.autograd.grad(outside.transport_cost.sum(), x), rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_divergence_brings_two_clouds_together(backend: str, compiled: bool) -> None:
    """Gradient descent on the points of one cloud until it lies on the other one."""
    x, y = clouds((1, 30, 2), (1, 25, 2), dtype=torch.float32)
    y = y * 0.5 + torch.tensor([4.0, -2.0])
    divergence = SinkhornDivergence(eps=0.5, backend=backend)
    assert "eps=0.5" in repr(divergence)
    if compiled:
        divergence = torch.compile(divergence, backend="aot_eager", fullgraph=True)
    moving = torch.nn.Parameter(x.clone())
    optimiser = torch.optim.SGD([moving], lr=6.0)  # a step of 30 points, each with a 30th of the gradient
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = divergence(moving, y).mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 15
    assert losses[-1] < 0.02
    torch.testing.assert_close(moving.detach().mean(1), y.mean(1), rtol=0, atol=0.05)
    torch.testing.assert_close(moving.detach().std(1), y.std(1), rtol=0, atol=0.15)


def concepts(per_concept: tuple[int, ...], spread: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    parts = clouds(*[(n, 6) for n in per_concept], dtype=torch.float32)
    features = torch.cat([s * part + 10 * c for c, (part, s) in enumerate(zip(parts, spread, strict=True))])
    labels = torch.arange(len(per_concept)).repeat_interleave(torch.tensor(per_concept)) * 3 - 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    return features[order], labels[order]


def test_k_variance(backend: str) -> None:
    """Ragged concepts, against POT on the same splits; linear in the spread; the entropic bias goes with eps."""
    features, labels = concepts((40, 24, 9), (1.0, 2.0, 0.5))

    def measured(**options: Any) -> KVariance:
        generator = torch.Generator().manual_seed(3)
        return k_variance(features, labels, splits=16, generator=generator, backend=backend, **options)

    exact, entropic = measured(method="exact"), measured()
    assert exact.labels.tolist() == entropic.labels.tolist() == [-1, 2, 5]
    torch.testing.assert_close(measured().values, entropic.values, rtol=0, atol=0)
    bias = entropic.values / exact.values - 1
    assert ((bias > 0) & (bias < 0.2)).all()
    sharper = measured(eps=0.01, max_iterations=20000).values / exact.values - 1
    assert ((sharper > -1e-3) & (sharper < bias / 2)).all()
    assert (entropic.standard_errors > 0).all()
    generator = torch.Generator().manual_seed(4)
    again = k_variance(features, labels, splits=64, generator=generator, method="exact", backend=backend)
    assert ((again.values - exact.values).abs() < 4 * exact.standard_errors).all()
    assert (again.standard_errors < exact.standard_errors).all()

    wide = k_variance(7 * features, labels, splits=16, generator=torch.Generator().manual_seed(3), backend=backend)
    torch.testing.assert_close(wide.values, 7 * entropic.values, rtol=1e-3, atol=0)
    few = measured(k=4, method="exact")
    assert (few.values[:2] > exact.values[:2]).all()  # smaller samples lie further apart
    torch.testing.assert_close(few.values[2], exact.values[2])


def test_k_variance_says_what_it_needs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = concepts((6, 1), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"labels must give every concept at least two samples; concept 2 has 1"):
        k_variance(features, labels, backend=backend)
    with pytest.raises(ValueError, match="splits must be at least 2; got 1"):
        k_variance(features, labels, splits=1)
    with pytest.raises(ValueError, match="method must be one of 'sinkhorn', 'exact'; got 'emd'"):
        k_variance(features, labels, method="emd")
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pot"):
        k_variance(features[labels < 0], labels[labels < 0], method="exact", backend=backend)


X, COST = torch.randn(2, 4, 3), torch.rand(2, 4, 5)
MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [[1.0]]}, TypeError, r"x must be a tensor"),
    ({"x": X.int()}, TypeError, r"x must be float64, float32, bfloat16 or float16; got torch.int32"),
    ({"y": X.double()}, TypeError, r"y must have the dtype of x"),
    ({"y": X.to("meta")}, ValueError, r"y must be on the device of x \(cpu\); got meta"),
    ({"y": X[..., :2]}, ValueError, r"y must have shape \(2, M, 3\) to match x \(2, 4, 3\); got \(2, 4, 2\)"),
    ({"y": X[:, :0]}, ValueError, r"y must have at least one point; got shape \(2, 0, 3\)"),
    ({"x": X[None], "y": X[None]}, ValueError, r"x must have shape \(B, n, D\) or \(n, D\); got \(1, 2, 4, 3\)"),
    ({"x": X.clone().fill_(torch.nan)}, ValueError, r"the sqeuclidean cost of x and y must be finite.*problem 0"),
    ({"cost": "cityblock"}, ValueError, r"cost must be one of 'sqeuclidean', 'euclidean', 'cosine'; got 'cityblock'"),
    ({"scale_cost": "median"}, ValueError, r"scale_cost must be one of 'mean', 'max'; got 'median'"),
    ({"gradient": "autodiff"}, ValueError, r"gradient must be one of 'envelope', 'implicit', 'unrolled'"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto'"),
    ({"eps": 0.0}, ValueError, r"eps must be positive and finite; problem 0 has 0\.0"),
    ({"eps": torch.tensor([0.1, -1.0])}, ValueError, r"eps must be positive and finite; problem 1 has -1\.0"),
    ({"eps": torch.ones(3)}, ValueError, r"eps must be a float or a floating tensor of shape \(2,\)"),
    ({"eps": torch.ones(2, requires_grad=True)}, ValueError, r"eps must not require grad"),
    ({"eps": "0.1"}, TypeError, r"eps must be a float"),
    ({"a": -torch.ones(4)}, ValueError, r"a must be finite and not negative; problem 0 holds -1\.0"),
    ({"b": torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])}, ValueError, r"b must have a positive sum; problem 1"),
    ({"b": torch.ones(2, 4)}, ValueError, r"a and b must have equal sums unless tau.*problem 0 has 1 and 4"),
    ({"a": torch.ones(5)}, ValueError, r"a must have shape \(2, 4\) or \(4,\); got \(5,\)"),
    ({"a": torch.ones(4).int()}, TypeError, r"a must be floating; got dtype torch.int32"),
    ({"a": torch.ones(4, device="meta")}, ValueError, r"a must be on cpu like the costs; got meta"),
    ({"x_lengths": lists(3, 5)}, ValueError, r"x_lengths must lie between 1 and 4, the padded size; problem 1 has 5"),
    ({"y_lengths": lists(0, 4)}, ValueError, r"y_lengths must lie between 1 and 4, the padded size; problem 0 has 0"),
    ({"x_lengths": lists(3)}, ValueError, r"x_lengths must have shape \(2,\), one length per problem; got \(1,\)"),
    ({"x_lengths": torch.ones(2)}, TypeError, r"x_lengths must hold integers; got dtype torch.float32"),
    (
        {"x": X[0], "y": X[1], "x_lengths": lists(3)},
        ValueError,
        r"x_lengths makes a ragged batch; got it with a single",
    ),
    ({"tau_a": 0.0}, ValueError, r"tau_a must be positive and finite, or None for a balanced marginal; got 0\.0"),
    ({"tau_b": "1"}, TypeError, r"tau_b must be None or a float"),
    ({"max_iterations": 0}, ValueError, r"max_iterations must be at least 1; got 0"),
    ({"tolerance": -1.0}, ValueError, r"tolerance must be finite and not negative; got -1\.0"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), MISTAKES, ids=lambda v: v[:30] if isinstance(v, str) else ""
)
def test_errors_name_the_argument(
    backend: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sinkhorn(**{"x": X, "y": X.clone(), "backend": backend, **arguments})


def test_errors_of_given_costs_and_modules(backend: str) -> None:
    for value in (torch.nan, torch.inf, 1e38):
        cost = COST.clone()
        cost[1, 2, 3] = value
        with pytest.raises(ValueError, match=r"cost must be finite and not overflow; problem 1 holds"):
            sinkhorn_from_cost(cost, backend=backend)
        shorter = sinkhorn_from_cost(cost, y_lengths=lists(5, 3), eps=1.0, backend=backend)
        assert torch.isfinite(shorter.plan()).all()
    with pytest.raises(ValueError, match=r"scale_cost='mean' needs costs whose mean is positive; problem 0 has -"):
        sinkhorn_from_cost(-COST, scale_cost="mean", backend=backend)
    with pytest.raises(ValueError, match=r"cost must have shape \(B, n, m\) or \(n, m\) with n, m >= 1; got \(0, 3\)"):
        sinkhorn_from_cost(torch.zeros(0, 3), backend=backend)
    with pytest.raises(ValueError, match=r"tau_b must equal tau_a \(1\.0\) in a divergence; got None"):
        sinkhorn_divergence(X, X, tau_a=1.0, backend=backend)
    with pytest.raises(ValueError, match="eps must be positive and finite; got 0"):
        SinkhornDivergence(eps=0, backend=backend)
    compiled = torch.compile(lambda c: sinkhorn_from_cost(c, eps=1.0, backend=backend), backend="aot_eager")
    with pytest.raises(ValueError, match=r"cost must be finite and not overflow; problem 0 holds"):
        compiled(COST * torch.nan)
