"""The oracle: plain torch, the whole N x M similarity matrix in memory, one line of code per line of the maths.

Runs on every device and dtype that torch runs on. Every other backend is tested against this one in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_kernels.contrastive.problem import Gradients, Problem, RowResults, Wanted, row_weights


def forward(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """Row results, and the gradients of `sum_i weights_i loss_i`."""
    return _evaluate(problem, row_weights(problem), wanted)


def backward(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of `sum_i row_gradient_i loss_i`."""
    return _evaluate(problem, row_gradient, wanted)[1]


def _evaluate(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> tuple[RowResults, Gradients]:
    temperature, bias = problem.temperature, problem.bias
    sources = [x for x in (problem.query, problem.key) if x is not None]
    units = [_unit_rows(x.to(problem.dtype)) if problem.normalize else x.to(problem.dtype) for x in sources]
    query = key = torch.cat(units, 1)
    if not problem.pairing.self_contrast:
        query, key = units
    similarity = query @ key.mT  # [P, N, M]
    positive, negative = _pair_masks(problem)

    # slope = d total / d logit, [P, N, M]
    logits = similarity / temperature if bias is None else similarity / temperature + bias
    contrast = _sigmoid if problem.form == "sigmoid" else _softmax
    loss, slope = contrast(logits, positive, negative, row_gradient)
    rows = _row_results(loss, similarity, positive, negative)
    if problem.form == "symmetric":
        n = similarity.shape[1]
        transposed = similarity[..., :n].mT, positive[..., :n].mT, negative[..., :n].mT
        loss, column_slope = _softmax(transposed[0] / temperature, *transposed[1:], row_gradient)
        rows = RowResults(*((a + b) / 2 for a, b in zip(rows, _row_results(loss, *transposed), strict=True)))
        slope[..., :n] += column_slope.mT
        slope = slope / 2

    unit_gradients = [slope @ key / temperature, slope.mT @ query / temperature]
    if problem.pairing.self_contrast:
        unit_gradients = list(torch.split(unit_gradients[0] + unit_gradients[1], problem.query.shape[1], 1))
    gradients = [
        _unit_rows_gradient(gradient, unit, source) if problem.normalize else gradient
        for gradient, unit, source in zip(unit_gradients, units, sources, strict=True)
    ]
    return rows, Gradients(
        gradients[0] if wanted.query else None,
        gradients[1] if wanted.key else None,
        -(slope * similarity).sum((1, 2)) / temperature**2 if wanted.temperature else None,
        slope.sum((1, 2)) if wanted.bias else None,
    )


def _pair_masks(problem: Problem) -> tuple[Tensor, Tensor]:
    """Boolean masks [P, N, M] of the positives and the negatives of each query."""
    (p, n, m, _), device = problem.sizes, problem.query.device
    query_index, key_index = torch.arange(n, device=device).unsqueeze(1), torch.arange(m, device=device)
    shift = problem.pairing.own_shift(n)
    own = (key_index == (query_index + shift) % m).expand(p, n, m) & (shift >= 0)
    positive, negative = own, ~own
    if problem.query_labels is not None and problem.key_labels is not None:
        same = problem.query_labels.unsqueeze(2) == problem.key_labels.unsqueeze(1)  # [P, N, M]
        if problem.same_label != "negative":
            negative = negative & ~same
        if problem.same_label == "positive":
            positive = positive | same
    exists = torch.ones(p, n, m, dtype=torch.bool, device=device)
    if problem.pairing.self_contrast:
        exists = exists & (query_index != key_index)
    if problem.weights is not None:
        row_exists = problem.weights > 0  # [P, N]
        exists = exists & row_exists.unsqueeze(2)
        if problem.pairing.shared_weights:
            exists = exists & torch.nn.functional.pad(row_exists, (0, m - n), value=True).unsqueeze(1)
    return positive & exists, negative & exists


def _softmax(logits: Tensor, positive: Tensor, negative: Tensor, row_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row [P, N], and d sum_i row_gradient_i loss_i / d logit_ij [P, N, M]."""
    positives = positive.sum(-1)
    valid = positives > 0
    candidates = (positive | negative) & valid.unsqueeze(-1)
    logits = logits.masked_fill(~candidates, -torch.inf)
    normalizer = logits.logsumexp(-1).masked_fill(~valid, 0.0)
    target = positive.to(logits.dtype) / positives.clamp(min=1).unsqueeze(-1)
    loss = normalizer - (logits.masked_fill(~positive, 0.0) * target).sum(-1)
    probability = (logits - normalizer.unsqueeze(-1)).exp()
    return loss, (probability - target) * row_gradient.unsqueeze(-1)


def _sigmoid(logits: Tensor, positive: Tensor, negative: Tensor, row_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row [P, N], and d sum_i row_gradient_i loss_i / d logit_ij [P, N, M]."""
    taking_part = (positive | negative) & positive.any(-1, keepdim=True)
    sign = positive.to(logits.dtype) * 2 - 1
    loss = -torch.nn.functional.logsigmoid(sign * logits).masked_fill(~taking_part, 0.0).sum(-1)
    slope = (-sign * torch.sigmoid(-sign * logits)).masked_fill(~taking_part, 0.0)
    return loss, slope * row_gradient.unsqueeze(-1)


def _row_results(loss: Tensor, similarity: Tensor, positive: Tensor, negative: Tensor) -> RowResults:
    valid = positive.any(-1)
    has_negative = valid & negative.any(-1)

    def mean_over(pairs: Tensor) -> Tensor:
        return similarity.masked_fill(~pairs, 0.0).sum(-1) / pairs.sum(-1).clamp(min=1)

    def best_of(pairs: Tensor) -> Tensor:
        return similarity.masked_fill(~pairs, -torch.inf).amax(-1)

    dtype = similarity.dtype
    return RowResults(
        loss=loss,
        valid=valid.to(dtype),
        positive_similarity=mean_over(positive),
        negative_similarity=mean_over(negative) * has_negative,
        has_negative=has_negative.to(dtype),
        top1=(best_of(positive) > best_of(negative)).to(dtype),
    )


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.inf)


def _unit_rows_gradient(gradient: Tensor, unit: Tensor, x: Tensor) -> Tensor:
    """From the gradient with respect to the unit rows to the one with respect to the rows themselves."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=unit.dtype)
    tangent = gradient - (gradient * unit).sum(-1, keepdim=True) * unit
    return tangent / torch.where(norm > 0, norm, torch.inf)
