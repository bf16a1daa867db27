"""Fused kernels for contrastive losses and optimal transport between hidden states, as plain autograd functions."""

from seer_kernels import distributed
from seer_kernels._dispatch import BackendStatus, backends
from seer_kernels.contrastive import ContrastiveStatistics, info_nce, nt_xent, siglip, sup_con
from seer_kernels.grad_cache import cached_backward
from seer_kernels.memory_bank import MemoryBank
from seer_kernels.modules import InfoNCELoss, NTXentLoss, OTContrastiveLoss, SigLipLoss, SinkhornDivergence, SupConLoss
from seer_kernels.sinkhorn import (
    ConvergenceWarning,
    KVariance,
    SinkhornResult,
    k_variance,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_from_cost,
)
from seer_kernels.transport_loss import ot_contrastive

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "ContrastiveStatistics",
    "ConvergenceWarning",
    "InfoNCELoss",
    "KVariance",
    "MemoryBank",
    "NTXentLoss",
    "OTContrastiveLoss",
    "SigLipLoss",
    "SinkhornDivergence",
    "SinkhornResult",
    "SupConLoss",
    "__version__",
    "backends",
    "cached_backward",
    "distributed",
    "info_nce",
    "k_variance",
    "nt_xent",
    "ot_contrastive",
    "siglip",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
    "sup_con",
]
