"""Fused kernels for contrastive losses over hidden states, as autograd functions that any trainer can import."""

from seer_kernels import distributed
from seer_kernels._dispatch import BackendStatus, backends
from seer_kernels.contrastive import ContrastiveStatistics, info_nce, nt_xent, siglip, sup_con
from seer_kernels.grad_cache import cached_backward
from seer_kernels.memory_bank import MemoryBank
from seer_kernels.modules import InfoNCELoss, NTXentLoss, SigLipLoss, SupConLoss

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "ContrastiveStatistics",
    "InfoNCELoss",
    "MemoryBank",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "__version__",
    "backends",
    "cached_backward",
    "distributed",
    "info_nce",
    "nt_xent",
    "siglip",
    "sup_con",
]
