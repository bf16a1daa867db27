"""Entropic optimal transport against POT, closed forms and finite differences, on every backend."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from seer_kernels.sinkhorn import (
    native,
    sinkhorn,
)

F64 = torch.float64
BACKENDS = ["reference"] if native.lacks(torch.device("cpu")) else ["reference", "native"]
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
    x, y = clouds((8, 2), (7, 2), seed=3)
    result = sinkhorn(x, y, eps=1e-3, scale_cost="mean", backend=backend, max_iterations=50000, tolerance=1e-9)
    C = (x.unsqueeze(1) - y).square().sum(-1)
    plan, _, _ = by_pot(C / C.mean(), result.a, result.b, 1e-3, None, None)
    torch.testing.assert_close(result.plan(), plan, rtol=1e-5, atol=1e-8)
