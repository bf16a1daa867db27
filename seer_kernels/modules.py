"""The losses as `torch.nn.Module`s: they hold options and call the public functions, where the maths lives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from seer_kernels._checks import (
    check_bounds,
    check_choice,
    check_count,
    check_marginal_weight,
    check_marginal_weights,
    check_scalar,
    check_temperature_value,
    check_tolerance,
)
from seer_kernels._dispatch import BACKENDS
from seer_kernels.contrastive import info_nce, nt_xent, siglip, sup_con
from seer_kernels.contrastive.functional import REDUCTIONS
from seer_kernels.contrastive.problem import SAME_LABEL
from seer_kernels.sinkhorn import sinkhorn_divergence
from seer_kernels.sinkhorn.problem import COSTS, SCALES
from seer_kernels.transport_loss import Tau, ot_contrastive


class _ContrastiveLoss(nn.Module):
    """The options that the losses share.

    A learnable temperature is exp(low + (high - low) sigmoid(p)) of an unbounded parameter p, with low and high the
    logarithms of `temperature_bounds`: it cannot leave them, however large the steps.
    """

    def __init__(
        self,
        temperature: float,
        learnable_temperature: bool,
        temperature_bounds: tuple[float, float],
        **options: Any,
    ) -> None:
        super().__init__()
        check_scalar("temperature", temperature)
        check_temperature_value(temperature)
        check_choice("reduction", options["reduction"], REDUCTIONS)
        check_choice("backend", options["backend"], ("auto", *BACKENDS))
        if "same_label" in options:
            check_choice("same_label", options["same_label"], SAME_LABEL)
        self.options = options
        self.temperature_bounds = temperature_bounds
        if learnable_temperature:
            check_bounds("temperature", temperature, "temperature_bounds", temperature_bounds)
            low, high = map(math.log, temperature_bounds)
            share = (math.log(temperature) - low) / (high - low)
            self.raw_temperature = nn.Parameter(torch.tensor(math.log(share / (1 - share))))
        self._temperature = temperature
        self.learnable_temperature = learnable_temperature

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use; a 0-d tensor with a gradient where it is learnable."""
        if not self.learnable_temperature:
            return self._temperature
        low, high = map(math.log, self.temperature_bounds)
        return torch.exp(low + (high - low) * torch.sigmoid(self.raw_temperature))

    def extra_repr(self) -> str:
        shown = {"temperature": float(self.temperature), "learnable_temperature": self.learnable_temperature}
        return ", ".join(f"{name}={value!r}" for name, value in {**shown, **self.options}.items())


class InfoNCELoss(_ContrastiveLoss):
    """`seer_kernels.info_nce` with its options fixed: `loss = InfoNCELoss(temperature=0.07)(query, key)`.

    Args:
        temperature: positive float; where learnable, the one to start from.
        learnable_temperature: train the temperature along.
        temperature_bounds: what a learnable temperature stays between.
        symmetric, same_label, normalize, reduction, backend: as in `info_nce`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        temperature_bounds: tuple[float, float] = (0.01, 1.0),
        symmetric: bool = False,
        same_label: str = "negative",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            temperature_bounds,
            symmetric=symmetric,
            same_label=same_label,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        query_labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of `query` (..., N, D) against `key` (..., M, D); see `info_nce`."""
        loss: Tensor = info_nce(
            query,
            key,
            temperature=self.temperature,
            query_labels=query_labels,
            key_labels=key_labels,
            weights=weights,
            **self.options,
        )
        return loss


class NTXentLoss(_ContrastiveLoss):
    """`seer_kernels.nt_xent` with its options fixed: `loss = NTXentLoss(temperature=0.5)(view1, view2)`.

    Args:
        temperature, learnable_temperature, temperature_bounds: as in `InfoNCELoss`.
        same_label, normalize, reduction, backend: as in `nt_xent`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        temperature_bounds: tuple[float, float] = (0.01, 1.0),
        same_label: str = "negative",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            temperature_bounds,
            same_label=same_label,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self, view1: Tensor, view2: Tensor, *, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of two views (..., N, D); see `nt_xent`."""
        tail = {"labels": labels, "weights": weights, **self.options}
        loss: Tensor = nt_xent(view1, view2, temperature=self.temperature, **tail)
        return loss


class SupConLoss(_ContrastiveLoss):
    """`seer_kernels.sup_con` with its options fixed: `loss = SupConLoss(temperature=0.1)(features, labels)`.

    Args:
        temperature, learnable_temperature, temperature_bounds: as in `InfoNCELoss`.
        normalize, reduction, backend: as in `sup_con`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        temperature_bounds: tuple[float, float] = (0.01, 1.0),
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            temperature_bounds,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of `features` (..., N, D) with `labels` (..., N); see `sup_con`."""
        loss: Tensor = sup_con(
            features,
            labels,
            temperature=self.temperature,
            keys=keys,
            key_labels=key_labels,
            weights=weights,
            **self.options,
        )
        return loss


class SigLipLoss(_ContrastiveLoss):
    """`seer_kernels.siglip` with its options fixed: `loss = SigLipLoss()(query, key)`.

    Args:
        temperature, learnable_temperature, temperature_bounds: as in `InfoNCELoss`, but learnable by default.
        bias: the bias; where learnable, the one to start from.
        learnable_bias: train the bias along.
        same_label, normalize, reduction, backend: as in `siglip`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        learnable_temperature: bool = True,
        temperature_bounds: tuple[float, float] = (0.01, 1.0),
        learnable_bias: bool = True,
        same_label: str = "negative",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            temperature_bounds,
            same_label=same_label,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )
        check_scalar("bias", bias)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learnable_bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        query_labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of `query` (..., N, D) against `key` (..., M, D); see `siglip`."""
        loss: Tensor = siglip(
            query,
            key,
            temperature=self.temperature,
            bias=self.bias,
            query_labels=query_labels,
            key_labels=key_labels,
            weights=weights,
            **self.options,
        )
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={float(self.bias):g}, learnable_bias={self.bias.requires_grad}"


class OTContrastiveLoss(_ContrastiveLoss):
    """`seer_kernels.ot_contrastive` with its options fixed: `loss = OTContrastiveLoss(iterations=5)(query, key)`.

    Args:
        temperature, learnable_temperature, temperature_bounds: as in `InfoNCELoss`.
        iterations, tolerance, tau, normalize, reduction, backend: as in `ot_contrastive`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        temperature_bounds: tuple[float, float] = (0.01, 1.0),
        iterations: int = 5,
        tolerance: float | None = None,
        tau: Tau = None,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        check_count("iterations", iterations, 1)
        if tolerance is not None:
            check_tolerance(tolerance)
        check_marginal_weights("tau", tau)
        super().__init__(
            temperature,
            learnable_temperature,
            temperature_bounds,
            iterations=iterations,
            tolerance=tolerance,
            tau=tau,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        query_labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of `query` (..., N, D) against `key` (..., M, D); see `ot_contrastive`."""
        return ot_contrastive(
            query,
            key,
            temperature=self.temperature,
            query_labels=query_labels,
            key_labels=key_labels,
            weights=weights,
            **self.options,
        )


class SinkhornDivergence(nn.Module):
    """`seer_kernels.sinkhorn_divergence` with its options fixed: `loss = SinkhornDivergence(eps=0.1)(x, y).mean()`.

    Args:
        eps: a positive float.
        cost, scale_cost, max_iterations, tolerance, backend: as in `sinkhorn_divergence`.
        tau: `tau_a` and `tau_b`, which a divergence needs to be equal.
    """

    def __init__(
        self,
        eps: float = 0.05,
        *,
        cost: str = "sqeuclidean",
        scale_cost: str | None = None,
        tau: float | None = None,
        max_iterations: int = 1000,
        tolerance: float = 1e-4,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_scalar("eps", eps)
        if not 0.0 < eps < math.inf:
            raise ValueError(f"eps must be positive and finite; got {eps}")
        check_choice("cost", cost, COSTS)
        if scale_cost is not None:
            check_choice("scale_cost", scale_cost, SCALES)
        check_marginal_weight("tau", tau)
        check_count("max_iterations", max_iterations, 1)
        check_tolerance(tolerance)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.eps = eps
        self.tau = tau
        self.options: dict[str, Any] = {
            "cost": cost,
            "scale_cost": scale_cost,
            "max_iterations": max_iterations,
            "tolerance": tolerance,
            "backend": backend,
        }

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
    ) -> Tensor:
        """The divergence (B,) of clouds `x` (B, n, D) and `y` (B, m, D); see `sinkhorn_divergence`."""
        return sinkhorn_divergence(
            x,
            y,
            a=a,
            b=b,
            eps=self.eps,
            x_lengths=x_lengths,
            y_lengths=y_lengths,
            tau_a=self.tau,
            tau_b=self.tau,
            **self.options,
        )

    def extra_repr(self) -> str:
        shown = {"eps": self.eps, "tau": self.tau, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
