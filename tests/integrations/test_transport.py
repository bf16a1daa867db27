"""Entropic transport with the signatures of POT and geomloss against their own."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seer_kernels.integrations import geomloss as ours_geomloss
from seer_kernels.integrations import pot as ours_pot


def clouds(kind: str = "torch") -> tuple[Any, Any, Any, Any]:
    """Clouds (3, 7, 2) and (3, 5, 2) in the unit square, and weights."""
    random = np.random.default_rng(0)
    x, y = random.random((3, 7, 2)), random.random((3, 5, 2))
    a, b = (w / w.sum(-1, keepdims=True) for w in (random.random((3, 7)) + 0.1, random.random((3, 5)) + 0.1))
    arrays = x, y, a, b
    return arrays if kind == "numpy" else tuple(torch.from_numpy(z) for z in arrays)  # type: ignore[return-value]


def centred(potentials: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    u, v = potentials
    shift = u[:, :1]
    return u - shift, v + shift


class TestPot:
    @pytest.fixture(autouse=True)
    def batch(self) -> Any:
        pytest.importorskip("ot", reason="POT is not installed")
        return pytest.importorskip("ot.batch", reason="POT has no ot.batch: it is older than 0.9.6")

    @pytest.mark.parametrize("reg_type", ["entropy", "kl"])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("grad", ["envelope", "autodiff", "detach"])
    def test_torch(self, batch: Any, reg_type: str, weighted: bool, grad: str) -> None:
        def run(solve: Any) -> dict[str, Tensor]:
            x, y, a, b = clouds()
            cost = torch.cdist(x, y).requires_grad_()
            weights = {"a": a, "b": b} if weighted else {}
            result = solve(cost, 0.1, **weights, tol=1e-13, max_iter=5000, reg_type=reg_type, grad=grad)
            found = {"value": result.value, "linear": result.value_linear, "plan": result.plan}
            gradients = {}
            wanted = {"envelope": ("value", "linear"), "autodiff": ("value", "linear", "plan"), "detach": ()}[grad]
            for name in wanted:
                total = (found[name] * torch.arange(1, found[name].numel() + 1).view(found[name].shape)).sum()
                (gradients[f"gradient of {name}"],) = torch.autograd.grad(total, cost, retain_graph=True)
            for name in found.keys() - wanted:
                assert not found[name].requires_grad, name
            u, v = centred([p.detach() for p in result.potentials])
            return {**{name: value.detach() for name, value in found.items()}, **gradients, "u": u, "v": v}

        want, got = run(batch.solve_batch), run(ours_pot.solve_batch)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)

    def test_numpy(self, batch: Any) -> None:
        x, y, a, b = clouds("numpy")
        cost = batch.dist_batch(x, y)
        cost.flags.writeable = False
        want = batch.solve_batch(cost, 0.1, a, b, tol=1e-13, max_iter=5000)
        got = ours_pot.solve_batch(cost, 0.1, a, b, tol=1e-13, max_iter=5000)
        assert type(got) is type(want)
        for name in ("plan", "value", "value_linear"):
            assert isinstance(getattr(got, name), np.ndarray)
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got.plan.sum(2), a, atol=1e-12)

    @pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
    def test_samples(self, batch: Any, metric: str) -> None:
        def run(solve: Any) -> tuple[Tensor, Tensor, Tensor]:
            x, y, a, b = clouds()
            x.requires_grad_(), y.requires_grad_()
            value = solve(x, y, 0.1, a, b, metric=metric, tol=1e-13, max_iter=5000).value
            return (value.detach(), *torch.autograd.grad(value.sum(), (x, y)))

        torch.testing.assert_close(
            run(ours_pot.solve_sample_batch), run(batch.solve_sample_batch), rtol=1e-8, atol=1e-9
        )
        x, y, *_ = clouds("numpy")
        value = ours_pot.solve_sample_batch(x, y, 0.1, metric=metric).value
        np.testing.assert_allclose(value, batch.solve_sample_batch(x, y, 0.1, metric=metric).value, rtol=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reg": None}, "reg must be positive and method not 'proximal'"),
            ({"reg": 0.1, "method": "proximal"}, "reg must be positive and method not 'proximal'"),
            ({"reg": -0.1}, "reg must be positive; got -0.1"),
            ({"reg": 0.1, "method": "newton"}, "method must be one of"),
            ({"reg": 0.1, "reg_type": "l2"}, "reg_type must be one of"),
            ({"reg": 0.1, "grad": "last_step"}, "grad must be 'envelope' or 'autodiff' or 'detach' here"),
            ({"reg": 0.1, "a": torch.full((3, 7), 1 / 7, requires_grad=True)}, "a must not require grad"),
        ],
    )
    def test_what_is_not_supported_is_refused(self, options: dict[str, Any], message: str) -> None:
        x, y, *_ = clouds()
        with pytest.raises(ValueError, match=message):
            ours_pot.solve_batch(torch.cdist(x, y), **options)

    def test_bad_input_is_refused(self) -> None:
        x, y, a, _ = clouds()
        with pytest.raises(TypeError, match=r"all torch tensors or all numpy arrays; got M \(torch\), a \(numpy\)"):
            ours_pot.solve_batch(torch.cdist(x, y), 0.1, a.numpy())
        with pytest.raises(ValueError, match=r"M must have shape \(B, n, m\)"):
            ours_pot.solve_batch(torch.cdist(x, y)[0], 0.1)
        with pytest.raises(ValueError, match="metric must be 'sqeuclidean' or 'euclidean' here; got 'kl'"):
            ours_pot.solve_sample_batch(x, y, 0.1, metric="kl")


class TestGeomloss:
    """geomloss tends to the solution as `scaling` tends to 1; it is that close, and no closer, with 0.999."""

    @pytest.fixture(autouse=True)
    def package(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip("geomloss", reason="geomloss is not installed")

    @pytest.mark.parametrize("p", [1, 2])
    @pytest.mark.parametrize("debias", [True, False])
    @pytest.mark.parametrize("reach", [None, 0.7])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_torch(self, package: Any, p: int, debias: bool, reach: float | None, weighted: bool) -> None:
        def run(kind: Any, **options: Any) -> dict[str, Tensor]:
            x, y, a, b = clouds()
            a = a * (1 if reach is None else 1.5)  # relaxed marginals allow other sums
            differentiable = [z.requires_grad_() for z in (a, x, b, y)]
            loss = kind("sinkhorn", p=p, blur=0.2, reach=reach, debias=debias, **options)
            value = loss(*differentiable) if weighted else loss(x, y)
            total = (value * torch.tensor([1.0, -2.0, 0.5])).sum()
            total.backward()
            found = {"value": value.detach(), "x": x.grad, "y": y.grad}
            if weighted and reach is None:  # up to a constant
                found |= {name: z.grad - z.grad.mean(-1, keepdim=True) for name, z in (("a", a), ("b", b))}
            return found

        want = run(package.SamplesLoss, scaling=0.999)
        got = run(ours_geomloss.SamplesLoss, tolerance=1e-10, max_iterations=10000)
        if reach is not None:  # geomloss means to correct this factor, in a method that is never called
            for name in "xy":
                want[name] = want[name] * (reach**p + 0.2**p) / (reach**p + 0.2**p / 2)
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-3)

    @pytest.mark.parametrize("p", [1, 2])
    @pytest.mark.parametrize("debias", [True, False])
    def test_gradients_with_reach_are_those_of_the_value(self, p: int, debias: bool) -> None:
        x, y, a, b = (z[:1] for z in clouds())
        loss = ours_geomloss.SamplesLoss(p=p, blur=0.3, reach=0.7, debias=debias, tolerance=1e-13)
        inputs = [z.clone().requires_grad_() for z in (1.5 * a, x, b, y)]
        assert torch.autograd.gradcheck(loss, inputs, rtol=1e-4, atol=1e-6)

    def test_one_problem_and_numpy(self, package: Any) -> None:
        x, y, a, b = clouds("numpy")
        loss = ours_geomloss.SamplesLoss(blur=0.2, tolerance=1e-10, max_iterations=10000)
        got = loss(a[0][:, None], x[0], b[0][:, None], y[0])
        assert isinstance(got, np.ndarray)
        assert got.shape == ()
        want = package.SamplesLoss(blur=0.2, scaling=0.99)(*(torch.from_numpy(z[0]) for z in (a, x, b, y)))
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-3)
        assert loss(x, y).shape == (3,)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss": "energy"}, "loss must be 'sinkhorn' here; got 'energy'"),
            ({"p": 3}, "p must be 1 or 2 here; got 3"),
            ({"cost": torch.cdist}, "cost must be None here"),
            ({"kernel": torch.cdist}, "kernel must be None here"),
            ({"potentials": True}, "potentials must be False here"),
            ({"backend": "online"}, "backend must be 'auto' or 'tensorized' here; got 'online'"),
            ({"blur": 0.0}, "blur must be positive; got 0.0"),
        ],
    )
    def test_what_is_not_supported_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ours_geomloss.SamplesLoss(**options)

    def test_cluster_labels_are_refused(self) -> None:
        x, y, a, b = clouds()
        with pytest.raises(ValueError, match=r"got 6 arguments\. Cluster labels are for the backend 'multiscale'"):
            ours_geomloss.SamplesLoss()(None, a, x, None, b, y)
