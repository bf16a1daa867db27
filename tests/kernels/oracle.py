"""Independent statements of the contrastive losses, and the bound that kernels are held to.

`by_the_book` is the definition with one Python loop per row, for small sizes. `plain_torch` is what people write, whose
error in a given dtype bounds the error that a kernel may make in it. Both, and `call`, take any loss by its name in
LOSSES, and the same arguments for all of them; a loss leaves out what it has no use for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seer_kernels import info_nce, nt_xent, siglip, sup_con

LOSSES = ["info_nce", "symmetric", "siglip", "nt_xent", "sup_con", "sup_con_keys"]
BIAS = -0.7


def call(
    name: str,
    query: Tensor,
    key: Tensor,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    same_label: str = "negative",
    **tail: Any,
) -> Any:
    """The public function behind a name in LOSSES."""
    if name == "sup_con":
        return sup_con(query, _some_labels(query, query_labels), **tail)
    if name == "sup_con_keys":
        labels = _some_labels(query, query_labels), _some_labels(key, key_labels)
        return sup_con(query, labels[0], keys=key, key_labels=labels[1], **tail)
    if name == "nt_xent":
        return nt_xent(query, key[..., : query.shape[-2], :], labels=query_labels, same_label=same_label, **tail)
    tail = {"query_labels": query_labels, "key_labels": key_labels, "same_label": same_label, **tail}
    if name == "siglip":
        return siglip(query, key, **{"temperature": 0.1, "bias": BIAS, **tail})
    return info_nce(query, key, symmetric=name == "symmetric", **tail)


def _some_labels(x: Tensor, labels: Tensor | None) -> Tensor:
    """Labels for the losses that cannot do without: pairs of neighbours share one."""
    return torch.arange(x.shape[-2]) // 2 if labels is None else labels


def _sets(name: str, query: Tensor, key: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
    """Anchors, candidates, their labels and weights [..., rows], the shift of the own pair (or None), self or not."""
    n, m = query.shape[-2], key.shape[-2]
    labels, key_labels = options.get("query_labels"), options.get("key_labels")
    weights = options.get("weights")
    weights = torch.ones(query.shape[:-1]) if weights is None else weights.expand(query.shape[:-1])
    key_weights = torch.nn.functional.pad(weights, (0, m - n), value=1.0)
    if name == "nt_xent":
        both = torch.cat([query, key[..., :n, :]], -2)
        labels = None if labels is None else torch.cat([labels, labels], -1)
        weights = torch.cat([weights, weights], -1)
        return both, both, labels, labels, weights, weights, n, True
    if name == "sup_con":
        labels = _some_labels(query, labels)
        return query, query, labels, labels, weights, weights, None, True
    if name == "sup_con_keys":
        labels, key_labels = _some_labels(query, labels), _some_labels(key, key_labels)
        return query, key, labels, key_labels, weights, torch.ones_like(key_weights), None, False
    return query, key, labels, key_labels, weights, key_weights, 0, False


def _rule(name: str, options: dict[str, Any]) -> str:
    return "positive" if name.startswith("sup_con") else str(options.get("same_label", "negative"))


def by_the_book(name: str, query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """A loss of one problem, query [N, D] against key [M, D], row by row."""
    if name == "symmetric":
        n = len(query)
        turned = {**options, "query_labels": options.get("key_labels"), "key_labels": options.get("query_labels")}
        if turned["query_labels"] is not None:
            turned["query_labels"] = turned["query_labels"][:n]
        there, back = by_the_book("info_nce", query, key, **options), by_the_book("info_nce", key[:n], query, **turned)
        return (there + back) / 2
    anchors, candidates, labels, key_labels, weights, key_weights, shift, alone = _sets(name, query, key, options)
    rule, temperature = _rule(name, options), options.get("temperature", 0.1)
    losses, total_weight = [], 0.0
    for i in range(len(anchors)):
        positives, negatives = [], []
        for j in range(len(candidates)):
            if (alone and i == j) or not (weights[i] > 0 and key_weights[j] > 0):
                continue
            same = labels is not None and labels[i] == key_labels[j]
            if (shift is not None and j == (i + shift) % len(candidates)) or (same and rule == "positive"):
                positives.append(j)
            elif not (same and rule == "ignore"):
                negatives.append(j)
        if not positives:
            losses.append(anchors.sum() * 0.0)
            continue
        total_weight += float(weights[i])
        rows = candidates[positives + negatives]
        if options.get("normalize", True):
            logits = torch.nn.functional.cosine_similarity(anchors[i], rows, dim=-1) / temperature
        else:
            logits = rows @ anchors[i] / temperature
        if name == "siglip":
            sign = torch.tensor([1.0] * len(positives) + [-1.0] * len(negatives), dtype=logits.dtype)
            loss = torch.log1p(torch.exp(-sign * (logits + options.get("bias", BIAS)))).sum()
        else:
            loss = torch.logsumexp(logits, 0) - logits[: len(positives)].mean()
        losses.append(weights[i] * loss)
    loss = torch.stack(losses)
    if options.get("reduction", "mean") == "none":
        return loss
    return loss.sum() / total_weight if options.get("reduction", "mean") == "mean" and total_weight else loss.sum()


def plain_torch(name: str, query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """Normalise, multiply, mask, logsumexp, as in many training scripts; differentiable, in the dtype of the input."""
    anchors, candidates, labels, key_labels, weights, key_weights, shift, alone = _sets(name, query, key, options)
    if options.get("normalize", True):
        anchors, candidates = (torch.nn.functional.normalize(x, dim=-1) for x in (anchors, candidates))
    logits = anchors @ candidates.mT / options.get("temperature", 0.1)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32))
    n, m = logits.shape[-2:]
    own = torch.zeros(n, m, dtype=torch.bool)
    if shift is not None:
        own = torch.arange(m) == (torch.arange(n).unsqueeze(1) + shift) % m
    positive, candidate = own.expand_as(logits), torch.ones_like(own).expand_as(logits)
    if labels is not None and key_labels is not None and _rule(name, options) != "negative":
        same = labels[..., :, None] == key_labels[..., None, :]
        positive, candidate = (
            (positive | same, candidate) if _rule(name, options) == "positive" else (positive, positive | ~same)
        )
    exists = (weights > 0)[..., :, None] & (key_weights > 0)[..., None, :]
    if alone:
        exists = exists & ~torch.eye(n, dtype=torch.bool)
    positive, candidate = positive & exists, candidate & exists
    weight = weights.to(logits.dtype) * positive.any(-1)

    def cross_entropy(logits: Tensor, positive: Tensor, candidate: Tensor, weight: Tensor) -> Tensor:
        target = logits.masked_fill(~positive, 0.0).sum(-1) / positive.sum(-1).clamp(min=1)
        usable = candidate | (weight == 0)[..., None]  # no row of infinities only
        return weight * (torch.logsumexp(logits.masked_fill(~usable, -torch.inf), -1) - target)

    if name == "siglip":
        sign = positive.to(logits.dtype) * 2 - 1
        loss = -torch.nn.functional.logsigmoid(sign * (logits + options.get("bias", BIAS)))
        loss = weight * loss.masked_fill(~candidate, 0.0).sum(-1)
    else:
        loss = cross_entropy(logits, positive, candidate, weight)
    if name == "symmetric":
        columns = (x[..., :n].mT for x in (logits, positive, candidate))
        loss = (loss + cross_entropy(*columns, weight)) / 2
    if options.get("reduction", "mean") == "none":
        return loss
    total = weight.sum(-1) if options.get("reduction", "mean") == "mean" else torch.ones(())
    return loss.sum(-1) / torch.where(total > 0, total, 1.0)


def value_and_gradients(loss: Callable[..., Tensor], inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """The loss, and the gradients of a fixed random combination of its elements with respect to `inputs`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    scalars = dict(zip(("temperature", "bias"), leaves[2:], strict=False))
    value = loss(*leaves[:2], **scalars, **options)
    generator = torch.Generator().manual_seed(value.numel())
    cotangent = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value) + 0.5
    total = (value * cotangent).sum()
    return [value.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def assert_as_exact_as_plain_torch(
    loss: Callable[..., Tensor], plain: partial[Tensor], inputs: Sequence[Tensor], **options: Any
) -> list[Tensor]:
    """Value and gradients of a mean `loss` of unit rows, whose error is at most twice that of `plain` in that dtype.

    Errors are against `plain` in fp64. The error of `plain` is the largest over some orders of the features, which
    change its roundings only. For fp64 inputs, which leave nothing more exact to compare with, the bound is the error
    in fp32 scaled by the ratio of the two precisions. Where `plain` is exact by luck (unit rows of one feature, say),
    eight roundings of the largest terms are allowed: logits reach 1 / temperature, slopes a row's share of that (of
    the sigmoid loss, a row's share of every pair's). A kernel that scales products by reciprocal norms rounds a logit
    as a whole where `plain` rounds its features one by one; exp makes one such rounding, 1 / temperature roundings of
    one, a relative error of the slope.
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

    weights, name = options.get("weights"), plain.args[0]
    share = 1 / inputs[0].shape[-2] if weights is None else float((weights / weights.sum(-1, keepdim=True)).max())
    slope = (inputs[1].shape[-2] if name == "siglip" else 2) * share / options.get("temperature", 0.1)
    terms = [1 / options.get("temperature", 0.1), *(slope / float(x.double().norm(dim=-1).min()) for x in inputs)]
    roundings = [8.0, *(8.0 + 1 / options.get("temperature", 0.1) for _ in inputs)]

    actual = value_and_gradients(loss, inputs, **options)
    exact = value_and_gradients(plain, [x.double() for x in inputs], **options)
    for which, got in enumerate(actual):
        error = float((got.double() - exact[which]).abs().max())
        rounding = roundings[which] * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * terms[which]
        rounding += 8 * torch.finfo(got.dtype).eps * float(exact[which].abs().max())
        allowed = 2 * ratio * float(usual_error[which]) + rounding
        assert error <= allowed, f"result {which}: error {error:.3g} above the allowed {allowed:.3g}"
    return actual
