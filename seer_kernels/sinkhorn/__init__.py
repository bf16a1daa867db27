"""Entropic optimal transport between many pairs of clouds at once."""

from seer_kernels.sinkhorn.functional import (
    ConvergenceWarning,
    SinkhornResult,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_from_cost,
)

__all__ = ["ConvergenceWarning", "SinkhornResult", "sinkhorn", "sinkhorn_divergence", "sinkhorn_from_cost"]
