"""What a backend is handed and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

COSTS = ("sqeuclidean", "euclidean", "cosine")
SCALES = ("mean", "max")
GRADIENTS = ("envelope", "implicit", "unrolled")

ANNEAL_ABOVE = 100.0
"""A problem is annealed where its costs spread over more than this many eps."""
ANNEAL_START = 25.0
"""Annealing starts where the costs spread over this many eps,"""
ANNEAL_FACTOR = 0.25
"""goes on to this share of the last eps"""
ANNEAL_TOLERANCE = 0.05
"""once the marginal error is below this, and ends at the eps asked for."""

CANCELLED = 1e-3
"""Squared distances below this share of |x|^2 + |y|^2 are formed from differences: expanded, they have lost digits."""


@dataclass(frozen=True)
class Clouds:
    """B pairs of clouds of n and m points with D features, which a ground cost compares."""

    x: Tensor  # [B, n, D]
    y: Tensor  # [B, m, D]
    x_lengths: Tensor | None  # [B] int64; None where every point exists
    y_lengths: Tensor | None
    cost: str
    """One of COSTS."""


@dataclass(frozen=True)
class Problem:
    """B independent transport problems between n and m points."""

    cost: Tensor
    """[B, n, m], accumulation dtype; undefined past the lengths."""
    a: Tensor  # [B, n], accumulation dtype; 0 past the lengths
    b: Tensor  # [B, m]
    eps: Tensor  # [B], accumulation dtype
    x_lengths: Tensor | None  # [B] int64; None where every point exists
    y_lengths: Tensor | None
    tau_a: float
    """Weight of KL(P 1 | a) in the objective; infinite where the marginal is a constraint."""
    tau_b: float
    scale_cost: str | None
    """One of SCALES: what each problem's costs are divided by; None for 1."""
    max_iterations: int = 0
    tolerance: float = 0.0
    cost_name: str = "cost"
    """How errors call the costs."""

    @property
    def balanced(self) -> bool:
        """Whether both marginals are constraints; potentials are then defined up to a constant."""
        return self.tau_a == self.tau_b == float("inf")


class Solution(NamedTuple):
    """What solves the problems. Costs, potentials and values are in units of `scale`; f, g are 0 past the lengths."""

    value: Tensor  # [B]
    transport_cost: Tensor  # [B]
    f: Tensor  # [B, n]
    g: Tensor  # [B, m]
    scale: Tensor  # [B]
    """What the costs were divided by."""
    marginal_error: Tensor
    """[B]: sum_i |(P 1)_i - r_i| / sum_i r_i, with r = a, or a exp(-f / tau_a) where relaxed; the columns are exact."""
    iterations: Tensor  # [B] int32
    converged: Tensor  # [B] bool


class Cotangents(NamedTuple):
    """Gradients that arrive for the differentiable outputs of a solution, in its dtype; None for zero."""

    value: Tensor | None
    transport_cost: Tensor | None
    f: Tensor | None
    g: Tensor | None
    scale: Tensor | None


class Gradients(NamedTuple):
    """Gradients with respect to what a problem was made of."""

    cost: Tensor  # [B, n, m]; 0 past the lengths
    a: Tensor  # [B, n]
    b: Tensor  # [B, m]


@dataclass(frozen=True)
class Alternation:
    """P problems of `iterations` normalisations of rows and columns in turn, between potentials that include log b.

    With q = `start` at first: row_i = log sum_j exp(q_j - C_ij), column_j = log sum_i exp(log a_i - share_a row_i -
    C_ij), and then q_j = log b_j - share_b column_j. All tensors in the accumulation dtype and contiguous.
    """

    cost: Tensor  # [P, N, M]
    log_a: Tensor  # [P, N]; -inf for a weight of 0
    log_b: Tensor  # [P, M]
    start: Tensor  # [P, M]
    share_a: float
    """1, or below it where the marginal is relaxed."""
    share_b: float
    iterations: int


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def existing(lengths: Tensor | None, batch: int, size: int, device: torch.device) -> Tensor:
    """Which of `size` points exist: [B, size] bool."""
    if lengths is None:
        return torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch, size)
    return torch.arange(size, device=device) < lengths.unsqueeze(-1)
