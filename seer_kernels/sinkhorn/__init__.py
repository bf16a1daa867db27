"""Entropic optimal transport between many pairs of clouds at once."""

from seer_kernels.sinkhorn.functional import (
    ConvergenceWarning,
    SinkhornResult,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_from_cost,
)
from seer_kernels.sinkhorn.k_variance import KVariance, k_variance

__all__ = [
    "ConvergenceWarning",
    "KVariance",
    "SinkhornResult",
    "k_variance",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
]
