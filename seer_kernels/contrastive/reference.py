"""The oracle: plain torch, the whole N x M similarity matrix in memory, one line of code per line of the maths.

Runs on every device and dtype that torch runs on. Every other backend is tested against this one in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_kernels.contrastive.problem import (
    ABSENT,
    Anchors,
    Gradients,
    Problem,
    RowResults,
    Slopes,
    Wanted,
    row_weights,
)


def forward(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """Row results, and the gradients of `sum_i weights_i loss_i`."""
    return _evaluate(problem, row_weights(problem), wanted)


def backward(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of `sum_i row_gradient_i loss_i`."""
    return _evaluate(problem, row_gradient, wanted)[1]


def statistics(problem: Problem, anchors: Tensor) -> None:
    """Adds to what is known of the queries of a "softmax" problem (`Anchors`, [9, P, N]) what its keys tell of them."""
    similarity = _Similarity(problem)
    positive, negative = _pair_masks(problem)
    known, logits = Anchors(*anchors.unbind()), similarity.values / problem.temperature

    def best_of(pairs: Tensor) -> Tensor:
        return logits.masked_fill(~pairs, ABSENT).amax(-1)

    best_positive, best_negative = best_of(positive), best_of(negative)
    top = torch.maximum(known.top, torch.maximum(best_positive, best_negative))
    candidates = (positive | negative) & (top > ABSENT).unsqueeze(-1)
    below = (logits - top.unsqueeze(-1)).masked_fill(~candidates, ABSENT)
    exponentials = below.exp()
    shift = known.top - top
    scale = shift.exp()
    seen = Anchors(
        top=top,
        exponentials=scale * known.exponentials + exponentials.sum(-1),
        weighted_below=scale * (known.weighted_below + shift * known.exponentials) + (exponentials * below).sum(-1),
        positive_sum=known.positive_sum + logits.masked_fill(~positive, 0.0).sum(-1),
        positives=known.positives + positive.sum(-1),
        negative_sum=known.negative_sum + logits.masked_fill(~negative, 0.0).sum(-1),
        negatives=known.negatives + negative.sum(-1),
        best_positive=torch.maximum(known.best_positive, best_positive),
        best_negative=torch.maximum(known.best_negative, best_negative),
    )
    anchors.copy_(torch.stack(seen))


def slope_gradients(problem: Problem, slopes: Tensor, wanted: Wanted) -> Gradients:
    """What the keys of a "softmax" problem add to the gradients of the features, given the `Slopes` [3, P, N] of the
    queries as anchors that saw these and other keys."""
    similarity = _Similarity(problem)
    positive, negative = _pair_masks(problem)
    of = Slopes(*slopes.unsqueeze(-1).unbind())  # [P, N, 1] each
    logits = (similarity.values / problem.temperature).masked_fill(~(positive | negative), ABSENT)
    slope = ((logits - of.normalizer).exp() - positive * of.target) * of.slope
    return Gradients(*similarity.feature_gradients(slope, wanted), None, None)


class _Similarity:
    """The similarities of all queries and keys, and the way back from them to the features."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sources = [x for x in (problem.query, problem.key) if x is not None]
        wide = [x.to(problem.dtype) for x in self.sources]
        self.units = [_unit_rows(x) for x in wide] if problem.normalize else wide
        if problem.pairing.self_contrast:
            self.query = self.key = torch.cat(self.units, 1)
        else:
            self.query, self.key = self.units
        self.values = self.query @ self.key.mT  # [P, N, M]

    def feature_gradients(self, slope: Tensor, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of Problem.query and Problem.key; `slope` is d total / d logit, [P, N, M]."""
        problem = self.problem
        unit_gradients = [slope @ self.key / problem.temperature, slope.mT @ self.query / problem.temperature]
        if problem.pairing.self_contrast:
            unit_gradients = list(torch.split(unit_gradients[0] + unit_gradients[1], problem.query.shape[1], 1))
        gradients = [
            _unit_rows_gradient(gradient, unit, source) if problem.normalize else gradient
            for gradient, unit, source in zip(unit_gradients, self.units, self.sources, strict=True)
        ]
        return gradients[0] if wanted.query else None, gradients[1] if wanted.key else None


def _evaluate(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> tuple[RowResults, Gradients]:
    temperature, bias = problem.temperature, problem.bias
    products = _Similarity(problem)
    similarity = products.values
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

    return rows, Gradients(
        *products.feature_gradients(slope, wanted),
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
    taking_part = positive | negative
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
