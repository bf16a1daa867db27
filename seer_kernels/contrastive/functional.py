"""Public functions of the contrastive family: validation, dispatch, and the one operator that owns the gradient."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from seer_kernels import _checks, _dispatch, _operators
from seer_kernels.contrastive import native, reference
from seer_kernels.contrastive.problem import (
    SAME_LABEL,
    Gradients,
    Problem,
    RowResults,
    Wanted,
    accumulation_dtype,
    row_weights,
)

_BACKENDS = {"reference": reference, "native": native}
REDUCTIONS = ("mean", "sum", "none")


class ContrastiveStatistics(NamedTuple):
    """How well positives stand out, weighted over the rows like the mean loss. Detached, one value per problem."""

    positive_similarity: Tensor
    """Mean similarity to the positives (cosine where `normalize`, before the temperature)."""
    negative_similarity: Tensor
    """Mean similarity to the negatives, over the rows that have one."""
    top1_accuracy: Tensor
    """Share of rows in which some positive is more similar than every negative (a tie is a miss)."""


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    query_labels: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    same_label: str = ...,
    normalize: bool = ...,
    weights: Tensor | None = ...,
    reduction: str = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    query_labels: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    same_label: str = ...,
    normalize: bool = ...,
    weights: Tensor | None = ...,
    reduction: str = ...,
    return_stats: Literal[True],
    backend: str = ...,
    validate: bool = ...,
) -> tuple[Tensor, ContrastiveStatistics]: ...


def info_nce(
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
    return_stats: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStatistics]:
    """InfoNCE: every query should be more similar to its own key than to all other keys.

    Row i of `query` pairs with row i of `key`; keys beyond the queries (a memory bank) are further negatives. With
    s_ij the cosine of query i and key j and P_i the positives of row i,

        loss_i = logsumexp_j(s_ij / temperature) - mean_{j in P_i}(s_ij / temperature)

    over all keys j that are a positive or a negative of i (van den Oord et al. 2018, arXiv 1807.03748, equation 4; with
    `same_label="positive"` Khosla et al. 2020, arXiv 2004.11362, equation 2).

    Args:
        query: (..., N, D) in float64, float32, bfloat16 or float16. Leading dimensions are independent problems.
        key: (..., M, D) with M >= N, same dtype and device. A row of zeros has similarity 0 to everything and gets no
            gradient.
        temperature: positive float, or 0-d tensor, which may require grad.
        query_labels: integer labels that broadcast to (..., N), also the keys' labels where M = N and none are given.
        key_labels: integer labels that broadcast to (..., M).
        same_label: what a key with the query's label is, its own pair apart: `"negative"`, `"ignore"` (leaves the
            denominator) or `"positive"`. Without labels only the own pair is positive and all other keys are negatives.
        normalize: compare by cosine; if False by dot product.
        weights: weights (>= 0) or a boolean mask that broadcast to (..., N). A pair of weight 0 does not exist, neither
            as query nor as key: this is how padding is expressed. Its features must still be finite.
        reduction: `"mean"` over rows that have a positive, by weight (0 if there are none), `"sum"` of weight x loss,
            or `"none"` for weight x loss per row.
        return_stats: also return ContrastiveStatistics from the same pass.
        backend: `"auto"`, `"reference"` or `"native"`; see `seer_kernels.backends()`.
        validate: also check values that need a pass over the data (or, on a GPU, a synchronisation): finite features,
            and for tensors on a GPU the ranges of labels, weights and temperature, which are always checked on the CPU.

    Returns:
        The loss, (...) or for `"none"` (..., N), in float32 (float64 for float64 input); with `return_stats` a tuple
        of it and the statistics, each (...).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, choice or value.
        RuntimeError: the requested backend cannot run here.
    """
    _checks.check_features("query", query)
    _checks.check_features("key", key)
    _checks.check_same_kind("key", key, "query", query)
    _checks.check_pair_shapes(query, key)
    _checks.check_scalar("temperature", temperature)
    _checks.check_choice("same_label", same_label, SAME_LABEL)
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    _checks.check_choice("backend", backend, ("auto", *_dispatch.BACKENDS))
    leading, n, m, device = query.shape[:-2], query.shape[-2], key.shape[-2], query.device
    if key_labels is not None and query_labels is None:
        raise ValueError("key_labels were given without query_labels; give both")
    if query_labels is not None:
        query_labels = _checks.check_labels("query_labels", query_labels, leading, n, device)
        if key_labels is None and m > n:
            raise ValueError(f"key_labels must be given: key has {m} rows and query_labels cover only the first {n}")
        key_labels = query_labels if key_labels is None else key_labels
        key_labels = _checks.check_labels("key_labels", key_labels, leading, m, device)
    elif same_label != "negative":
        raise ValueError(f"same_label={same_label!r} needs query_labels (and key_labels); got none")
    if weights is not None:
        weights = _checks.check_weights(weights, leading, n, device)

    problems = leading.numel()
    accumulate = accumulation_dtype(query.dtype)
    if not isinstance(temperature, Tensor):
        _checks.check_temperature_value(temperature)
        temperature = torch.tensor(temperature, dtype=accumulate)
    want_gradients = torch.is_grad_enabled()
    loss: Tensor
    loss, statistics = _contrastive(
        query.reshape(problems, n, query.shape[-1]),
        key.reshape(problems, m, key.shape[-1]),
        temperature,
        None if query_labels is None else query_labels.reshape(problems, n),
        None if key_labels is None else key_labels.reshape(problems, m),
        None if weights is None else weights.reshape(problems, n),
        same_label,
        normalize,
        reduction,
        backend,
        validate,
        want_gradients and query.requires_grad,
        want_gradients and key.requires_grad,
        want_gradients and temperature.requires_grad,
        return_stats,
    )[:2]
    loss = loss.reshape((*leading, n) if reduction == "none" else leading)
    if not return_stats:
        return loss
    return loss, ContrastiveStatistics(*(s.reshape(leading) for s in statistics.unbind()))


def _problem(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    same_label: str,
    normalize: bool,
) -> Problem:
    """Labels only matter where a shared label changes what a pair is; dropping them elsewhere saves their reads."""
    accumulate = accumulation_dtype(query.dtype)
    labelled = query_labels is not None and key_labels is not None and same_label != "negative"
    return Problem(
        query=query,
        key=key,
        temperature=temperature.to(accumulate),
        query_labels=query_labels.int().contiguous() if query_labels is not None and labelled else None,
        key_labels=key_labels.int().contiguous() if key_labels is not None and labelled else None,
        weights=None if weights is None else weights.to(accumulate).contiguous(),
        same_label=same_label,
        normalize=normalize,
    )


def _check_values(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    validate: bool,
) -> None:
    """Checks on values rather than shapes: inside the operator, so that compiled graphs make them too."""
    if validate or temperature.device.type == "cpu":
        _checks.check_temperature_value(float(temperature))
    for name, labels in (("query_labels", query_labels), ("key_labels", key_labels)):
        if labels is not None and (validate or labels.device.type == "cpu"):
            _checks.check_label_values(name, labels)
    if weights is not None and (validate or weights.device.type == "cpu"):
        _checks.check_weight_values(weights.to(torch.float64))
    if validate:
        _checks.check_finite("query", query)
        _checks.check_finite("key", key)


def _contrastive_kernel(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    same_label: str,
    normalize: bool,
    reduction: str,
    backend: str,
    validate: bool,
    query_gradient: bool,
    key_gradient: bool,
    temperature_gradient: bool,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [P] or [P, N] and statistics [3, P]; then, for the backward pass, the sum of weights that the mean divides
    by [P] and the gradients of the weighted sum (with `reduction="none"` they cannot be formed yet).

    An operator returns tensors only: an empty one stands for what was not asked for.
    """
    _check_values(query, key, temperature, query_labels, key_labels, weights, validate)
    problem = _problem(query, key, temperature, query_labels, key_labels, weights, same_label, normalize)
    ahead = reduction != "none"
    wanted = Wanted(query_gradient and ahead, key_gradient and ahead, temperature_gradient and ahead)
    if query.shape[0] * query.shape[1] == 0:
        rows, gradients = _no_rows(problem, wanted)
    else:
        with torch.autocast(query.device.type, enabled=False):
            rows, gradients = _BACKENDS[_dispatch.choose(backend, query.device)].forward(problem, wanted)

    weight = rows.valid if weights is None else rows.valid * row_weights(problem)  # [P, N]
    total_weight = weight.sum(-1)
    scale = torch.where(total_weight > 0, total_weight, 1.0)
    statistics = _statistics(rows, weight, scale) if return_stats else scale.new_empty(0)
    loss = weight * rows.loss
    if reduction != "none":
        loss = loss.sum(-1)
    if reduction == "mean":
        loss = loss / scale
    else:
        scale = torch.ones_like(scale)
    query_gradient_, key_gradient_, temperature_gradient_ = (scale.new_empty(0) if g is None else g for g in gradients)
    return loss, statistics, scale, query_gradient_, key_gradient_, temperature_gradient_


def _statistics(rows: RowResults, weight: Tensor, scale: Tensor) -> Tensor:
    """The fields of ContrastiveStatistics, [3, P]; `scale` is the sum of `weight` over the rows."""
    negative_weight = (weight * rows.has_negative).sum(-1)
    return torch.stack(
        [
            (weight * rows.positive_similarity).sum(-1) / scale,
            (weight * rows.negative_similarity).sum(-1) / torch.where(negative_weight > 0, negative_weight, 1.0),
            (weight * rows.top1).sum(-1) / scale,
        ]
    )


def _no_rows(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    zeros = torch.zeros(problem.query.shape[:-1], dtype=problem.dtype, device=problem.query.device)
    inputs = (problem.query, problem.key, zeros.sum(-1))
    gradients = (
        torch.zeros_like(x, dtype=problem.dtype) if want else None for x, want in zip(inputs, wanted, strict=True)
    )
    return RowResults(*(zeros.clone() for _ in RowResults._fields)), Gradients(*gradients)


def _contrastive_fake(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    same_label: str,
    normalize: bool,
    reduction: str,
    backend: str,
    validate: bool,
    query_gradient: bool,
    key_gradient: bool,
    temperature_gradient: bool,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    p, n, d = query.shape
    ahead = reduction != "none"

    def empty(*shape: Any) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    return (
        empty(p, n) if reduction == "none" else empty(p),
        empty(3, p) if return_stats else empty(0),
        empty(p),
        empty(p, n, d) if query_gradient and ahead else empty(0),
        empty(p, key.shape[1], d) if key_gradient and ahead else empty(0),
        empty(p) if temperature_gradient and ahead else empty(0),
    )


def _scale_kernel(
    query_gradient: Tensor, key_gradient: Tensor, temperature_gradient: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that the forward pass formed, times what arrived for each problem (`scale` [P]), in `dtype`."""

    def scaled(gradient: Tensor) -> Tensor:  # [P, rows, D], or [0] where it was not formed
        return (gradient * scale.view(-1, 1, 1) if gradient.numel() else gradient.clone()).to(dtype)

    temperature_gradient = (temperature_gradient * scale).sum() if temperature_gradient.numel() else scale.new_empty(0)
    return scaled(query_gradient), scaled(key_gradient), temperature_gradient


def _scale_fake(
    query_gradient: Tensor, key_gradient: Tensor, temperature_gradient: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query_gradient, dtype=dtype),
        torch.empty_like(key_gradient, dtype=dtype),
        scale.new_empty(()) if temperature_gradient.numel() else scale.new_empty(0),
    )


def _recompute_kernel(
    row_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    same_label: str,
    normalize: bool,
    backend: str,
    query_gradient: bool,
    key_gradient: bool,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sum_i row_gradient_i loss_i` from the inputs alone, where the forward pass could not form them."""
    problem = _problem(query, key, temperature, query_labels, key_labels, weights, same_label, normalize)
    wanted = Wanted(query_gradient, key_gradient, temperature_gradient)
    if row_gradient.numel() == 0:
        gradients = _no_rows(problem, wanted)[1]
    else:
        with torch.autocast(query.device.type, enabled=False):
            chosen = _BACKENDS[_dispatch.choose(backend, query.device)]
            gradients = chosen.backward(problem, row_gradient.contiguous(), wanted)
    return (
        query.new_empty(0) if gradients.query is None else gradients.query.to(query.dtype),
        query.new_empty(0) if gradients.key is None else gradients.key.to(query.dtype),
        row_gradient.new_empty(0) if gradients.temperature is None else gradients.temperature.sum(),
    )


def _recompute_fake(
    row_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    same_label: str,
    normalize: bool,
    backend: str,
    query_gradient: bool,
    key_gradient: bool,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if query_gradient else 0),
        query.new_empty(key.shape if key_gradient else 0),
        row_gradient.new_empty(() if temperature_gradient else 0),
    )


class _Contrastive(torch.autograd.Function):
    """The one owner of the gradient of all losses of the family."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _operators.below_autograd(_contrastive, *arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, (same_label, normalize, ctx.reduction, backend, _), formed = inputs[:6], inputs[6:11], inputs[11:14]
        ctx.options = (same_label, normalize, backend)
        ctx.formed = Wanted(*formed) if ctx.reduction != "none" else Wanted(False, False, False)
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        wanted = Wanted(*ctx.needs_input_grad[:3])
        nothing = (None,) * 12
        if loss_gradient is None or not any(wanted):
            return (None,) * 3 + nothing
        *inputs, scale, query_gradient, key_gradient, temperature_gradient = ctx.saved_tensors
        query, _, temperature, *_, weights = inputs
        if all(formed for formed, want in zip(ctx.formed, wanted, strict=True) if want):
            gradients = _scale(query_gradient, key_gradient, temperature_gradient, loss_gradient / scale, query.dtype)
        else:
            row_gradient = loss_gradient
            if ctx.reduction != "none":
                row_gradient = (loss_gradient / scale).unsqueeze(-1).expand(query.shape[:2])
            if weights is not None:
                row_gradient = row_gradient * weights.to(row_gradient.dtype)
            gradients = _recompute(row_gradient, *inputs, *ctx.options, *wanted)
        query_gradient, key_gradient, temperature_gradient = gradients
        return (
            query_gradient if wanted.query else None,
            key_gradient if wanted.key else None,
            temperature_gradient.to(temperature.device, temperature.dtype) if wanted.temperature else None,
            *nothing,
        )


_TWICE = (
    "the contrastive losses of seer_kernels cannot be differentiated twice: their gradient is a fused kernel. "
    "Compute the loss in plain torch where second derivatives are needed"
)
_contrastive = _operators.register("contrastive", _contrastive_kernel, _contrastive_fake, _Contrastive)
_scale = _operators.register("contrastive_scale", _scale_kernel, _scale_fake, no_gradient=_TWICE)
_recompute = _operators.register("contrastive_recompute", _recompute_kernel, _recompute_fake, no_gradient=_TWICE)
