"""Pairwise contrastive losses: one pair rule, one forward and one backward for the whole family."""

from seer_kernels.contrastive.functional import ContrastiveStatistics, info_nce, nt_xent, siglip, sup_con

__all__ = ["ContrastiveStatistics", "info_nce", "nt_xent", "siglip", "sup_con"]
