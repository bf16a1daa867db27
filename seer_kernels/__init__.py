"""Fused kernels for contrastive losses over hidden states, as autograd functions that any trainer can import."""

from seer_kernels._dispatch import BackendStatus, backends
from seer_kernels.contrastive import ContrastiveStatistics, info_nce, nt_xent, siglip, sup_con
from seer_kernels.modules import InfoNCELoss, NTXentLoss, SigLipLoss, SupConLoss

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "ContrastiveStatistics",
    "InfoNCELoss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "__version__",
    "backends",
    "info_nce",
    "nt_xent",
    "siglip",
    "sup_con",
]
