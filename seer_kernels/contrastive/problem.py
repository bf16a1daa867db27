"""What a backend is handed and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SAME_LABEL = ("negative", "ignore", "positive")


@dataclass(frozen=True)
class Problem:
    """P independent contrastive problems of N queries against M keys with D features.

    Row i of `query` and row i of `key` are a pair. A pair whose weight is 0 does not exist: its query has no loss and
    its key is nobody's negative.
    """

    query: Tensor  # [P, N, D]
    key: Tensor  # [P, M, D], M >= N
    temperature: Tensor  # [], accumulation dtype
    query_labels: Tensor | None  # [P, N] int32
    key_labels: Tensor | None  # [P, M] int32
    weights: Tensor | None  # [P, N], accumulation dtype
    same_label: str
    """What a key with the query's label is, other than the query's own pair: one of SAME_LABEL."""
    normalize: bool
    """Compare directions (cosine) rather than raw dot products."""

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: fp64 for fp64 features, else fp32."""
        return accumulation_dtype(self.query.dtype)


class RowResults(NamedTuple):
    """Per query, all [P, N] in the accumulation dtype. Rows without a positive hold zeros."""

    loss: Tensor
    """-log of the probability of the positives (mean over them), not weighted."""
    valid: Tensor
    """1 where the row has a weight and a positive, else 0."""
    positive_similarity: Tensor
    """Mean similarity (before the temperature) to the positives."""
    negative_similarity: Tensor
    """Mean similarity to the negatives; 0 where there are none."""
    has_negative: Tensor
    """1 where the row is valid and has a negative, else 0."""
    top1: Tensor
    """1 where some positive is more similar than every negative, else 0."""


class Gradients(NamedTuple):
    """Gradients of `sum_i row_gradient_i * loss_i` in the accumulation dtype; None where not asked for."""

    query: Tensor | None  # [P, N, D]
    key: Tensor | None  # [P, M, D]
    temperature: Tensor | None  # [P]


class Wanted(NamedTuple):
    """Which gradients to compute."""

    query: bool
    key: bool
    temperature: bool


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_weights(problem: Problem) -> Tensor:
    """The weights of the rows, ones where none were given: [P, N]."""
    if problem.weights is not None:
        return problem.weights
    return problem.query.new_ones(problem.query.shape[:-1], dtype=problem.dtype)
