"""Independent statements of the contrastive losses, and the bound that kernels are held to.

`by_the_book` is the definition with one Python loop per row, for small sizes. `plain_torch` is what people write, whose
error in a given dtype bounds the error that a kernel may make in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def by_the_book(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    same_label: str = "negative",
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`info_nce` of one problem, query [N, D] against key [M, D], row by row."""
    n, m = len(query), len(key)
    exists = [weights is None or bool(weights[i] > 0) for i in range(n)] + [True] * (m - n)
    losses, total_weight = [], 0.0
    for i in range(n):
        positives, negatives = [], []
        for j in range(m):
            same = query_labels is not None and key_labels is not None and query_labels[i] == key_labels[j]
            if not (exists[i] and exists[j]):
                continue
            if j == i or (same and same_label == "positive"):
                positives.append(j)
            elif not (same and same_label == "ignore"):
                negatives.append(j)
        weight = 0.0 if not positives else 1.0 if weights is None else float(weights[i])
        total_weight += weight
        if not positives:
            losses.append(query.sum() * 0.0)
            continue
        rows = key[positives + negatives]
        if normalize:
            logits = torch.nn.functional.cosine_similarity(query[i], rows, dim=-1) / temperature
        else:
            logits = rows @ query[i] / temperature
        losses.append(weight * (torch.logsumexp(logits, 0) - logits[: len(positives)].mean()))
    loss = torch.stack(losses)
    if reduction == "none":
        return loss
    return loss.sum() / total_weight if reduction == "mean" and total_weight else loss.sum()


def plain_torch(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """Normalise, multiply, mask, logsumexp, as in many training scripts; differentiable, in the dtype of the input."""
    labels, key_labels = options.get("query_labels"), options.get("key_labels")
    weights, rule = options.get("weights"), options.get("same_label", "negative")
    if options.get("normalize", True):
        query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    logits = (query @ key.mT / options.get("temperature", 0.1)).to(torch.promote_types(query.dtype, torch.float32))
    n, m = logits.shape[-2:]
    positive = torch.eye(n, m, dtype=torch.bool).expand_as(logits)
    candidate = torch.ones_like(positive)
    if labels is not None and key_labels is not None and rule != "negative":
        same = labels[..., :, None] == key_labels[..., None, :]
        positive, candidate = (positive | same, candidate) if rule == "positive" else (positive, positive | ~same)
    weight = torch.ones_like(logits[..., 0]) if weights is None else weights.to(logits.dtype)
    if weights is not None:
        exists = torch.nn.functional.pad(weights > 0, (0, m - n), value=True)[..., None, :]
        positive, candidate = positive & exists, candidate & exists
    target = (logits * positive).sum(-1) / positive.sum(-1).clamp(min=1)
    rows = (torch.logsumexp(logits.masked_fill(~candidate, -torch.inf), -1) - target).masked_fill(weight == 0, 0.0)
    loss = rows * weight
    if options.get("reduction", "mean") == "none":
        return loss
    return loss.sum(-1) / weight.sum(-1) if options.get("reduction", "mean") == "mean" else loss.sum(-1)


def value_and_gradients(loss: Callable[..., Tensor], inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """The loss, and the gradients of a fixed random combination of its elements with respect to `inputs`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves[:2], **({"temperature": leaves[2]} if len(leaves) > 2 else {}), **options)
    generator = torch.Generator().manual_seed(value.numel())
    cotangent = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value) + 0.5
    return [value.detach(), *torch.autograd.grad((value * cotangent).sum(), leaves)]


def assert_as_exact_as_plain_torch(
    loss: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], **options: Any
) -> list[Tensor]:
    """Value and gradients of a mean `loss` of unit rows, whose error is at most twice that of `plain` in that dtype.

    Errors are against `plain` in fp64. The error of `plain` is the largest over some orders of the features, which
    change its roundings only. For fp64 inputs, which leave nothing more exact to compare with, the bound is the error
    in fp32 scaled by the ratio of the two precisions. Where `plain` is exact by luck (unit rows of one feature, say),
    eight roundings of the largest terms are allowed: logits reach 1 / temperature, slopes a row's share of that.
    """
    dtype = inputs[0].dtype
    narrow = [x.float() for x in inputs] if dtype == torch.float64 else inputs
    ratio = torch.finfo(dtype).eps / torch.finfo(narrow[0].dtype).eps
    usual_exact = value_and_gradients(plain, [x.double() for x in narrow], **options)
    usual_error = [torch.zeros(())] * len(usual_exact)
    for seed in range(4):
        order = torch.randperm(inputs[0].shape[-1], generator=torch.Generator().manual_seed(seed))
        usual = value_and_gradients(plain, [x[..., order] for x in narrow], **options)
        usual[1:] = [g[..., order.argsort()] for g in usual[1:]]
        usual_error = [
            torch.maximum(worst, (got.double() - true).abs().max())
            for worst, got, true in zip(usual_error, usual, usual_exact, strict=True)
        ]

    weights = options.get("weights")
    share = 1 / inputs[0].shape[-2] if weights is None else float((weights / weights.sum(-1, keepdim=True)).max())
    slope = 2 * share / options.get("temperature", 0.1)
    terms = [1 / options.get("temperature", 0.1), *(slope / float(x.double().norm(dim=-1).min()) for x in inputs)]

    actual = value_and_gradients(loss, inputs, **options)
    exact = value_and_gradients(plain, [x.double() for x in inputs], **options)
    for which, got in enumerate(actual):
        error = float((got.double() - exact[which]).abs().max())
        rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * terms[which]
        rounding += torch.finfo(got.dtype).eps * float(exact[which].abs().max())
        allowed = 2 * ratio * float(usual_error[which]) + 8 * rounding
        assert error <= allowed, f"result {which}: error {error:.3g} above the allowed {allowed:.3g}"
    return actual
