"""The oracle: plain torch, the whole N x M similarity matrix in memory, one line of code per line of the maths.

Runs on every device and dtype that torch runs on. Every other backend is tested against this one in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_kernels.contrastive.problem import Gradients, Problem, RowResults, Wanted, row_weights


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.inf)


def _pair_masks(problem: Problem) -> tuple[Tensor, Tensor]:
    """Boolean masks [P, N, M] of the positives and the negatives of each query."""
    (p, n, _), m = problem.query.shape, problem.key.shape[1]
    device = problem.query.device
    own = torch.eye(n, m, dtype=torch.bool, device=device).expand(p, n, m)
    positive, negative = own, ~own
    if problem.query_labels is not None and problem.key_labels is not None:
        same = problem.query_labels.unsqueeze(2) == problem.key_labels.unsqueeze(1)  # [P, N, M]
        if problem.same_label != "negative":
            negative = negative & ~same
        if problem.same_label == "positive":
            positive = positive | same
    if problem.weights is not None:
        row_exists = problem.weights > 0  # [P, N]
        key_exists = torch.nn.functional.pad(row_exists, (0, m - n), value=True)  # [P, M]
        exists = row_exists.unsqueeze(2) & key_exists.unsqueeze(1)
        positive, negative = positive & exists, negative & exists
    return positive, negative


def forward(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """Row results, and the gradients of `sum_i weights_i loss_i`."""
    return _evaluate(problem, row_weights(problem), wanted)


def backward(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of `sum_i row_gradient_i loss_i`."""
    return _evaluate(problem, row_gradient, wanted)[1]


def _evaluate(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> tuple[RowResults, Gradients]:
    query, key, temperature = problem.query.to(problem.dtype), problem.key.to(problem.dtype), problem.temperature
    if problem.normalize:
        query, key = _unit_rows(query), _unit_rows(key)
    similarity = query @ key.mT  # [P, N, M]
    positive, negative = _pair_masks(problem)
    rows, probability = _rows(similarity, positive, negative, temperature)

    target = positive.to(problem.dtype) / positive.sum(-1, keepdim=True).clamp(min=1)
    slope = (probability - target) * (row_gradient / temperature).unsqueeze(-1)  # d total / d similarity, [P, N, M]
    query_gradient = _unit_rows_gradient(slope @ key, query, problem.query, problem) if wanted.query else None
    key_gradient = _unit_rows_gradient(slope.mT @ query, key, problem.key, problem) if wanted.key else None
    temperature_gradient = -(slope * similarity).sum((1, 2)) / temperature if wanted.temperature else None
    return rows, Gradients(query_gradient, key_gradient, temperature_gradient)


def _rows(similarity: Tensor, positive: Tensor, negative: Tensor, temperature: Tensor) -> tuple[RowResults, Tensor]:
    """The row results, and the softmax of each row over its positives and negatives; zeros without a positive."""
    positives, negatives = positive.sum(-1), negative.sum(-1)
    valid = positives > 0
    has_negative = valid & (negatives > 0)
    dtype = similarity.dtype

    def mean_over(pairs: Tensor) -> Tensor:
        return similarity.masked_fill(~pairs, 0.0).sum(-1) / pairs.sum(-1).clamp(min=1)

    candidates = (positive | negative) & valid.unsqueeze(-1)
    logits = (similarity / temperature).masked_fill(~candidates, -torch.inf)
    normalizer = logits.logsumexp(-1).masked_fill(~valid, 0.0)
    positive_similarity = mean_over(positive)
    rows = RowResults(
        loss=normalizer - positive_similarity / temperature,
        valid=valid.to(dtype),
        positive_similarity=positive_similarity,
        negative_similarity=mean_over(negative) * has_negative,
        has_negative=has_negative.to(dtype),
        top1=(
            similarity.masked_fill(~positive, -torch.inf).amax(-1)
            > similarity.masked_fill(~negative, -torch.inf).amax(-1)
        ).to(dtype),
    )
    return rows, (logits - normalizer.unsqueeze(-1)).exp()


def _unit_rows_gradient(gradient: Tensor, unit: Tensor, x: Tensor, problem: Problem) -> Tensor:
    """From the gradient with respect to the unit rows to the one with respect to the rows themselves."""
    if not problem.normalize:
        return gradient
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=problem.dtype)
    tangent = gradient - (gradient * unit).sum(-1, keepdim=True) * unit
    return tangent / torch.where(norm > 0, norm, torch.inf)
