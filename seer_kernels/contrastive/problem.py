"""What a backend is handed and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SAME_LABEL = ("negative", "ignore", "positive")
FORMS = ("softmax", "symmetric", "sigmoid")


@dataclass(frozen=True)
class Pairing:
    """Which sets are compared, and which key a query belongs to whatever the labels say."""

    name: str
    """`"rows"`: queries against keys, query i and key i are a pair, keys beyond the queries are a bank. `"labels"`:
    queries against keys, only labels make pairs. `"self"`: the rows of one set against each other, labels make the
    pairs. `"views"`: likewise for the rows of `query` and `key` together, which are two views of the same samples."""

    @property
    def self_contrast(self) -> bool:
        """Whether the keys are the queries themselves; no row is then compared with itself."""
        return self.name in ("self", "views")

    @property
    def shared_weights(self) -> bool:
        """Whether the weight of query i is also that of key i: with weight 0 it exists neither as query nor as key."""
        return self.name != "labels"

    def own_shift(self, rows: int) -> int:
        """Key (i + own_shift) mod M is query i's own pair, always a positive; -1 where only labels make pairs."""
        return {"rows": 0, "views": rows // 2}.get(self.name, -1)


@dataclass(frozen=True)
class Problem:
    """P independent contrastive problems of N queries against M keys with D features."""

    query: Tensor
    """[P, N, D]; the first half of the N rows where the pairing is "views"."""
    key: Tensor | None
    """[P, M, D]; the second half of the rows where the pairing is "views"; None where it is "self"."""
    temperature: Tensor  # [], accumulation dtype
    bias: Tensor | None  # [], accumulation dtype, for the form "sigmoid"
    query_labels: Tensor | None  # [P, N] int32
    key_labels: Tensor | None  # [P, M] int32
    weights: Tensor | None  # [P, N], accumulation dtype
    form: str
    """One of FORMS. With p_ij the softmax of the logits over the row's positives and negatives: "softmax" is
    -mean_{positives j} log p_ij; "symmetric" the average of it and of the same with queries and keys (the first N) in
    exchanged roles; "sigmoid" is -sum_j log sigmoid(+-(logit_ij + bias)), + for positives, and needs no positive."""
    pairing: Pairing
    same_label: str
    """What a key with the query's label is, other than the query's own pair: one of SAME_LABEL."""
    normalize: bool
    """Compare directions (cosine) rather than raw dot products."""

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: fp64 for fp64 features, else fp32."""
        return accumulation_dtype(self.query.dtype)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """P, N, M, D."""
        p, rows, d = self.query.shape
        if self.pairing.self_contrast:
            rows *= 1 if self.key is None else 2
            return p, rows, rows, d
        assert self.key is not None
        return p, rows, self.key.shape[1], d


class RowResults(NamedTuple):
    """Per query, all [P, N] in the accumulation dtype. Rows without a positive hold zeros, but for a sigmoid loss."""

    loss: Tensor
    """Not weighted."""
    valid: Tensor
    """1 where the row has a weight and a positive, else 0."""
    positive_similarity: Tensor
    """Mean similarity (before temperature and bias) to the positives."""
    negative_similarity: Tensor
    """Mean similarity to the negatives; 0 where there are none."""
    has_negative: Tensor
    """1 where the row is valid and has a negative, else 0."""
    top1: Tensor
    """1 where some positive is more similar than every negative, else 0."""


class Wanted(NamedTuple):
    """Which gradients to compute."""

    query: bool
    key: bool
    temperature: bool
    bias: bool


class PairSlopes(NamedTuple):
    """What the gradients of queries and keys follow from by one matrix product each, in the accumulation dtype."""

    slopes: Tensor
    """d total / d (query . key): [P, N, M]; from both sides where the keys are the queries."""
    along: Tensor
    """Multiple of each row's own features to be taken off: [P, N + M], or [P, N] where the keys are the queries; [P, 0]
    where features are not normalised."""


class Totals(NamedTuple):
    """Over the rows of each problem, all [P] in the accumulation dtype."""

    loss: Tensor
    """Sum of weight times loss."""
    weight: Tensor
    """Sum of the weights of valid rows; 1 where there is none."""
    mean: Tensor
    """loss / weight."""


class Gradients(NamedTuple):
    """Gradients of `sum_i row_gradient_i * loss_i` in the accumulation dtype; None where not asked for."""

    query: Tensor | None  # like Problem.query
    key: Tensor | None  # like Problem.key
    temperature: Tensor | None  # [P]
    bias: Tensor | None  # [P]
    slopes: PairSlopes | None = None
    """Instead of the gradients of queries and keys, where forming them is better left to the backward pass."""
    totals: Totals | None = None
    """The sum itself, from a backend that has it at hand in the forward pass; else it follows from the RowResults."""


class Anchors(NamedTuple):
    """What is kept of each query while keys are seen in parts, [P, N] each. As one tensor: `torch.stack` of them."""

    top: Tensor
    """The largest logit of a positive or negative; ABSENT where there was none."""
    exponentials: Tensor
    """Sum over positives and negatives of e^(logit - top)."""
    weighted_below: Tensor
    """Sum over positives and negatives of e^(logit - top) (logit - top)."""
    positive_sum: Tensor
    """Sum of the positives' logits."""
    positives: Tensor
    """How many there are."""
    negative_sum: Tensor
    negatives: Tensor
    best_positive: Tensor
    """The largest logit of a positive, or ABSENT."""
    best_negative: Tensor


ABSENT = -1e30
"""A logit of nothing: finite, so that 0 * ABSENT is 0."""


class Slopes(NamedTuple):
    """What the gradient needs of each anchor, [P, N] each. As one tensor: `torch.stack` of them."""

    normalizer: Tensor
    """logsumexp of the logits; -ABSENT where the anchor has no loss."""
    target: Tensor
    """1 / number of positives."""
    slope: Tensor
    """d total / d loss; 0 where the anchor has no loss."""


def no_anchors(problem: Problem) -> Tensor:
    """Anchors that have not seen any key, [9, P, N]."""
    p, n = problem.sizes[:2]
    anchors = torch.zeros(len(Anchors._fields), p, n, dtype=problem.dtype, device=problem.query.device)
    for name in ("top", "best_positive", "best_negative"):
        anchors[Anchors._fields.index(name)] = ABSENT
    return anchors


def no_slopes(like: Tensor) -> Tensor:
    """Slopes [3, P, N] of anchors without a loss, shaped like other Slopes."""
    slopes = torch.zeros_like(like)
    slopes[Slopes._fields.index("normalizer")] = -ABSENT
    return slopes


def settle(anchors: Tensor, row_gradient: Tensor, temperature: Tensor) -> tuple[RowResults, Tensor, Tensor]:
    """From anchors that have seen all keys: results, Slopes [3, P, N], and sum_j (d total / d logit) logit [P, N]."""
    of = Anchors(*anchors.unbind())
    valid, has_negative = of.positives > 0, (of.positives > 0) & (of.negatives > 0)
    log_sum = torch.where(valid, of.exponentials, 1.0).log()
    positive_mean = of.positive_sum / of.positives.clamp(min=1)
    above = torch.where(valid, positive_mean - of.top, 0.0)
    slope = torch.where(valid, row_gradient, 0.0)
    results = RowResults(
        loss=log_sum - above,
        valid=valid.to(anchors.dtype),
        positive_similarity=positive_mean * temperature,
        negative_similarity=torch.where(has_negative, of.negative_sum / of.negatives.clamp(min=1) * temperature, 0.0),
        has_negative=has_negative.to(anchors.dtype),
        top1=(of.best_positive > of.best_negative).to(anchors.dtype),
    )
    normalizer = torch.where(valid, of.top + log_sum, -ABSENT)
    mean_below = of.weighted_below / torch.where(valid, of.exponentials, 1.0)
    slopes = torch.stack(Slopes(normalizer, valid / of.positives.clamp(min=1), slope))
    return results, slopes, slope * (mean_below - above)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_weights(problem: Problem) -> Tensor:
    """The weights of the rows, ones where none were given: [P, N]."""
    if problem.weights is not None:
        return problem.weights
    return problem.query.new_ones(problem.sizes[:2], dtype=problem.dtype)
