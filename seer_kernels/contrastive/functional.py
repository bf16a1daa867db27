"""Public functions of the contrastive family: validation, dispatch, and the one operator that owns the gradient."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from seer_kernels import _checks, _dispatch, _operators
from seer_kernels.contrastive import native, reference
from seer_kernels.contrastive.problem import (
    SAME_LABEL,
    Gradients,
    Pairing,
    PairSlopes,
    Problem,
    RowResults,
    Totals,
    Wanted,
    accumulation_dtype,
)

REDUCTIONS = ("mean", "sum", "none")


class ContrastiveStatistics(NamedTuple):
    """How well positives stand out, weighted over the rows like the mean loss. Detached, one value per problem."""

    positive_similarity: Tensor
    """Mean similarity to the positives (cosine where `normalize`, before temperature and bias)."""
    negative_similarity: Tensor
    """Mean similarity to the negatives, over the rows that have one."""
    top1_accuracy: Tensor
    """Share of rows in which some positive is more similar than every negative (a tie is a miss)."""


class _Tail(TypedDict, total=False):
    """The keyword arguments that all losses share, for the type checker."""

    normalize: bool
    weights: Tensor | None
    reduction: str
    backend: str
    validate: bool


class _LabelledTail(_Tail, total=False):
    same_label: str


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    query_labels: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    symmetric: bool = ...,
    return_stats: Literal[False] = ...,
    **tail: Unpack[_LabelledTail],
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = ...,
    query_labels: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    symmetric: bool = ...,
    return_stats: Literal[True],
    **tail: Unpack[_LabelledTail],
) -> tuple[Tensor, ContrastiveStatistics]: ...


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    same_label: str = "negative",
    symmetric: bool = False,
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
        symmetric: average this loss and the one of every key against all queries (CLIP, Radford et al. 2021, arXiv
            2103.00020). Keys of a bank are no anchors, having no query of their own.
        normalize: compare by cosine; if False by dot product.
        weights: weights (>= 0) or a boolean mask that broadcast to (..., N). A pair of weight 0 does not exist, neither
            as query nor as key: this is how padding is expressed. Its features must still be finite.
        reduction: `"mean"` over rows that have a positive, by weight (0 if there are none), `"sum"` of weight x loss,
            or `"none"` for weight x loss per row.
        return_stats: also return ContrastiveStatistics from the same pass.
        backend: `"auto"`, `"reference"`, `"native"` or `"triton"`; see `seer_kernels.backends()`.
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
    _checks.check_feature_pair("query", query, "key", key)
    _checks.check_pair_shapes(query, key)
    _checks.check_flag("symmetric", symmetric)
    query_labels, key_labels = _pair_labels(query, key, query_labels, key_labels, same_label)
    return _loss(
        query,
        key,
        pairing="rows",
        form="symmetric" if symmetric else "softmax",
        temperature=temperature,
        query_labels=query_labels,
        key_labels=key_labels,
        same_label=same_label,
        normalize=normalize,
        weights=weights,
        reduction=reduction,
        return_stats=return_stats,
        backend=backend,
        validate=validate,
    )


@overload
def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float | Tensor = ...,
    labels: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    **tail: Unpack[_LabelledTail],
) -> Tensor: ...


@overload
def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float | Tensor = ...,
    labels: Tensor | None = ...,
    return_stats: Literal[True],
    **tail: Unpack[_LabelledTail],
) -> tuple[Tensor, ContrastiveStatistics]: ...


def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    labels: Tensor | None = None,
    same_label: str = "negative",
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStatistics]:
    """NT-Xent: each of the 2N rows of two views against the other 2N - 1; the positive is the other view of its sample.

    The loss of a row is that of `info_nce` (Chen et al. 2020, SimCLR, arXiv 2002.05709, equation 1).

    Args:
        view1: (..., N, D) in float64, float32, bfloat16 or float16. Leading dimensions are independent problems.
        view2: like `view1`; row i is the other view of the sample in row i of `view1`.
        labels: integer labels of the samples that broadcast to (..., N).
        same_label: what a row with the same label is, other than the own other view: as in `info_nce`.
        weights: weights (>= 0) or a boolean mask of the samples that broadcast to (..., N); a sample of weight 0 does
            not exist in either view.
        temperature, normalize, reduction, return_stats, backend, validate: as in `info_nce`.

    Returns:
        As `info_nce`; the rows are those of `view1`, then those of `view2`, so `"none"` gives (..., 2N).

    Raises:
        TypeError, ValueError, RuntimeError: as `info_nce`.
    """
    _checks.check_feature_pair("view1", view1, "view2", view2)
    _checks.check_same_shape("view2", view2, "view1", view1)
    leading, n, device = view1.shape[:-2], view1.shape[-2], view1.device
    if labels is not None:
        labels = _checks.check_labels("labels", labels, leading, n, device).repeat(*[1] * len(leading), 2)
    _checks.check_same_label(same_label, SAME_LABEL, "labels", labels)
    if weights is not None:
        weights = _checks.check_weights(weights, leading, n, device).repeat(*[1] * len(leading), 2)
    return _loss(
        view1,
        view2,
        pairing="views",
        temperature=temperature,
        query_labels=labels,
        key_labels=labels,
        same_label=same_label,
        normalize=normalize,
        weights=weights,
        reduction=reduction,
        return_stats=return_stats,
        backend=backend,
        validate=validate,
    )


@overload
def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    keys: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    **tail: Unpack[_Tail],
) -> Tensor: ...


@overload
def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    keys: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    return_stats: Literal[True],
    **tail: Unpack[_Tail],
) -> tuple[Tensor, ContrastiveStatistics]: ...


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStatistics]:
    """Supervised contrastive loss: every row should be more similar to the rows of its label than to all others.

    The loss of a row is that of `info_nce` with all other rows of its label as positives, the mean taken outside the
    logarithm (Khosla et al. 2020, arXiv 2004.11362, equation 2). A row that is alone with its label contributes 0 and
    is left out of the mean.

    Args:
        features: (..., N, D) in float64, float32, bfloat16 or float16. Leading dimensions are independent problems.
        labels: integer labels that broadcast to (..., N).
        keys: (..., M, D), the set to compare with (a memory bank, say); default: the other rows of `features`.
        key_labels: integer labels of `keys` that broadcast to (..., M); given exactly if `keys` is.
        weights: weights (>= 0) or a boolean mask that broadcast to (..., N). A row of weight 0 does not exist; `keys`,
            where given, have no weights.
        temperature, normalize, reduction, return_stats, backend, validate: as in `info_nce`.

    Returns:
        As `info_nce`.

    Raises:
        TypeError, ValueError, RuntimeError: as `info_nce`.
    """
    _checks.check_features("features", features)
    leading, n, device = features.shape[:-2], features.shape[-2], features.device
    labels = _checks.check_labels("labels", labels, leading, n, device)
    if (keys is None) != (key_labels is None):
        missing, given = ("keys", "key_labels") if keys is None else ("key_labels", "keys")
        raise ValueError(f"{missing} must be given together with {given}; got None")
    if keys is not None:
        _checks.check_feature_pair("features", features, "keys", keys)
        _checks.check_key_shapes("keys", keys, "features", features)
        key_labels = _checks.check_labels("key_labels", key_labels, leading, keys.shape[-2], device)
    return _loss(
        features,
        keys,
        pairing="self" if keys is None else "labels",
        temperature=temperature,
        query_labels=labels,
        key_labels=labels if keys is None else key_labels,
        same_label="positive",
        normalize=normalize,
        weights=weights,
        reduction=reduction,
        return_stats=return_stats,
        backend=backend,
        validate=validate,
    )


@overload
def siglip(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
    query_labels: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    **tail: Unpack[_LabelledTail],
) -> Tensor: ...


@overload
def siglip(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
    query_labels: Tensor | None = ...,
    key_labels: Tensor | None = ...,
    return_stats: Literal[True],
    **tail: Unpack[_LabelledTail],
) -> tuple[Tensor, ContrastiveStatistics]: ...


def siglip(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
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
    """Sigmoid loss: every pair by itself is told to be a positive or a negative.

        loss_i = -sum_j log sigmoid(y_ij (s_ij / temperature + bias))

    with y_ij = 1 for positives and -1 for negatives (Zhai et al. 2023, SigLIP, arXiv 2303.15343, equation 1, whose t is
    1 / temperature; they start at temperature 0.1, bias -10).

    Args:
        query: (..., N, D) in float64, float32, bfloat16 or float16. Leading dimensions are independent problems.
        key: (..., M, D) with M >= N, same dtype and device; rows beyond the queries are further negatives.
        temperature: positive float, or 0-d tensor, which may require grad.
        bias: float, or 0-d tensor, which may require grad.
        query_labels, key_labels, same_label, normalize, weights, reduction, return_stats, backend, validate: as in
            `info_nce`.

    Returns:
        As `info_nce`.

    Raises:
        TypeError, ValueError, RuntimeError: as `info_nce`.
    """
    _checks.check_feature_pair("query", query, "key", key)
    _checks.check_pair_shapes(query, key)
    _checks.check_scalar("bias", bias)
    query_labels, key_labels = _pair_labels(query, key, query_labels, key_labels, same_label)
    return _loss(
        query,
        key,
        pairing="rows",
        form="sigmoid",
        temperature=temperature,
        bias=bias,
        query_labels=query_labels,
        key_labels=key_labels,
        same_label=same_label,
        normalize=normalize,
        weights=weights,
        reduction=reduction,
        return_stats=return_stats,
        backend=backend,
        validate=validate,
    )


def _pair_labels(
    query: Tensor, key: Tensor, query_labels: Tensor | None, key_labels: Tensor | None, same_label: str
) -> tuple[Tensor | None, Tensor | None]:
    """Checked labels of queries and keys, expanded to (..., N) and (..., M)."""
    leading, n, m, device = query.shape[:-2], query.shape[-2], key.shape[-2], query.device
    _checks.check_same_label(same_label, SAME_LABEL, "query_labels", query_labels)
    if query_labels is None:
        if key_labels is not None:
            raise ValueError("key_labels were given without query_labels; give both")
        return None, None
    query_labels = _checks.check_labels("query_labels", query_labels, leading, n, device)
    if key_labels is None:
        if m > n:
            raise ValueError(f"key_labels must be given: key has {m} rows and query_labels cover only the first {n}")
        return query_labels, query_labels
    return query_labels, _checks.check_labels("key_labels", key_labels, leading, m, device)


def _loss(
    query: Tensor,
    key: Tensor | None,
    *,
    pairing: str,
    form: str = "softmax",
    temperature: float | Tensor,
    bias: float | Tensor | None = None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    same_label: str,
    normalize: bool,
    weights: Tensor | None,
    reduction: str,
    return_stats: bool,
    backend: str,
    validate: bool,
) -> Tensor | tuple[Tensor, ContrastiveStatistics]:
    """Any loss of the family, from features and labels that are checked; all else is checked here."""
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    _checks.check_choice("backend", backend, ("auto", *_dispatch.BACKENDS))
    for name, flag in (("normalize", normalize), ("return_stats", return_stats), ("validate", validate)):
        _checks.check_flag(name, flag)
    _checks.check_scalar("temperature", temperature)
    leading, accumulate = query.shape[:-2], accumulation_dtype(query.dtype)
    problems = leading.numel()
    rows = query.shape[-2] * (2 if pairing == "views" else 1)
    if weights is not None:
        weights = _checks.check_weights(weights, leading, rows, query.device).reshape(problems, rows)
    if not isinstance(temperature, Tensor):
        _checks.check_temperature_value(temperature)
        temperature = torch.tensor(temperature, dtype=accumulate)
    if bias is not None and not isinstance(bias, Tensor):
        bias = torch.tensor(bias, dtype=accumulate)
    differentiable = (query, key, temperature, bias)
    wanted = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable)
    loss: Tensor
    loss, statistics = _contrastive(
        query.reshape(problems, *query.shape[-2:]),
        None if key is None else key.reshape(problems, *key.shape[-2:]),
        temperature,
        bias,
        None if query_labels is None else query_labels.reshape(problems, query_labels.shape[-1]),
        None if key_labels is None else key_labels.reshape(problems, key_labels.shape[-1]),
        weights,
        form,
        pairing,
        same_label,
        normalize,
        backend,
        reduction,
        validate,
        return_stats,
        *wanted,
    )[:2]
    loss = loss.reshape((*leading, rows) if reduction == "none" else leading)
    if not return_stats:
        return loss
    return loss, ContrastiveStatistics(*(s.reshape(leading) for s in statistics.unbind()))


def _problem(
    query: Tensor,
    key: Tensor | None,
    temperature: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    form: str,
    pairing: str,
    same_label: str,
    normalize: bool,
) -> Problem:
    accumulate = accumulation_dtype(query.dtype)
    # Labels only matter where a shared label changes what a pair is; dropping them elsewhere saves their reads.
    labelled = query_labels is not None and key_labels is not None and same_label != "negative"
    return Problem(
        query=query,
        key=key,
        temperature=temperature.to(accumulate),
        bias=None if bias is None else bias.to(accumulate),
        query_labels=query_labels.int().contiguous() if query_labels is not None and labelled else None,
        key_labels=key_labels.int().contiguous() if key_labels is not None and labelled else None,
        weights=None if weights is None else weights.to(accumulate).contiguous(),
        form=form,
        pairing=Pairing(pairing),
        same_label=same_label,
        normalize=normalize,
    )


def _check_values(
    query: Tensor,
    key: Tensor | None,
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
        if key is not None:
            _checks.check_finite("key", key)


def _backend(requested: str, problem: Problem) -> Any:
    """The module to run on a problem, by the caller's choice of backend."""
    return backend_module(requested, problem.query, native.lacks(problem))


def backend_module(requested: str, query: Tensor, native_lacks: str) -> Any:
    """The module to run on features like `query`; `native_lacks` says why native kernels do not serve what is asked."""
    chosen = _dispatch.choose(requested, query.device, query.dtype, {"native": native_lacks})
    if chosen == "triton":
        from seer_kernels.contrastive import triton_kernels  # takes long to import, and exists on Linux only

        return triton_kernels
    return {"reference": reference, "native": native}[chosen]


def _contrastive_kernel(
    query: Tensor,
    key: Tensor | None,
    temperature: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    form: str,
    pairing: str,
    same_label: str,
    normalize: bool,
    backend: str,
    reduction: str,
    validate: bool,
    return_stats: bool,
    query_gradient: bool,
    key_gradient: bool,
    temperature_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [P] or [P, N] and statistics [3, P]; then, for the backward pass, the sum of weights that the mean divides
    by [P] and the gradients of the weighted sum, or the slopes instead of those of the features (with
    `reduction="none"` they cannot be formed yet).

    An operator returns tensors only: an empty one stands for what was not asked for.
    """
    _check_values(query, key, temperature, query_labels, key_labels, weights, validate)
    problem = _problem(
        query, key, temperature, bias, query_labels, key_labels, weights, form, pairing, same_label, normalize
    )
    wanted = Wanted(query_gradient, key_gradient, temperature_gradient, bias_gradient)
    if reduction == "none":
        wanted = Wanted(False, False, False, False)
    if 0 in problem.sizes:
        rows, gradients = _no_pairs(problem, wanted)
    else:
        with torch.autocast(query.device.type, enabled=False):
            rows, gradients = _backend(backend, problem).forward(problem, wanted)

    *formed, slopes, totals = gradients
    if totals is None:
        totals = _totals(rows, weights)
    statistics = _statistics(rows, weights, totals.weight) if return_stats else totals.weight.new_empty(0)
    loss = {"mean": totals.mean, "sum": totals.loss}.get(reduction)
    if loss is None:
        loss = _loss_weights(rows, weights) * rows.loss
    scale = totals.weight if reduction == "mean" else torch.ones_like(totals.weight)
    for_backward = (scale.new_empty(0) if g is None else g for g in (*formed, *(slopes or (None, None))))
    return (loss, statistics, scale, *for_backward)  # type: ignore[return-value]  # mypy loses the count


def _loss_weights(rows: RowResults, weights: Tensor | None) -> Tensor:
    """The weight of each row's loss, [P, N]."""
    return rows.valid if weights is None else rows.valid * weights.to(rows.valid.dtype)


def _totals(rows: RowResults, weights: Tensor | None) -> Totals:
    weight = _loss_weights(rows, weights)
    loss, total_weight = (weight * rows.loss).sum(-1), weight.sum(-1)
    scale = torch.where(total_weight > 0, total_weight, 1.0)
    return Totals(loss, scale, loss / scale)


def _statistics(rows: RowResults, weights: Tensor | None, scale: Tensor) -> Tensor:
    """The fields of ContrastiveStatistics, [3, P]; `scale` is the sum of the rows' weights."""
    weight = _loss_weights(rows, weights)
    negative_weight = (weight * rows.has_negative).sum(-1)
    return torch.stack(
        [
            (weight * rows.positive_similarity).sum(-1) / scale,
            (weight * rows.negative_similarity).sum(-1) / torch.where(negative_weight > 0, negative_weight, 1.0),
            (weight * rows.top1).sum(-1) / scale,
        ]
    )


def _no_pairs(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """The results of no problems, no queries or no keys."""
    zeros = torch.zeros(problem.sizes[:2], dtype=problem.dtype, device=problem.query.device)
    inputs = (problem.query, problem.key, zeros.sum(-1), zeros.sum(-1))
    query, key, temperature, bias = (
        torch.zeros_like(x, dtype=problem.dtype) if want and x is not None else None
        for x, want in zip(inputs, wanted, strict=True)
    )
    return RowResults(*(zeros.clone() for _ in RowResults._fields)), Gradients(query, key, temperature, bias)


def _contrastive_fake(
    query: Tensor,
    key: Tensor | None,
    temperature: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    form: str,
    pairing: str,
    same_label: str,
    normalize: bool,
    backend: str,
    reduction: str,
    validate: bool,
    return_stats: bool,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    dtype, ahead = accumulation_dtype(query.dtype), reduction != "none"
    p, n = query.shape[0], query.shape[1] * (2 if pairing == "views" else 1)
    m = n if key is None or pairing == "views" else key.shape[1]
    slopes = ahead and any(wanted[:2]) and _keeps_slopes(query, p, n, m, backend)
    for_backward = (
        (query.shape, wanted[0] and ahead and not slopes),
        (() if key is None else key.shape, wanted[1] and ahead and not slopes),
        ((p,), wanted[2] and ahead),
        ((p,), wanted[3] and ahead),
        ((p, n, m), slopes),
        ((p, 0 if not normalize else n if Pairing(pairing).self_contrast else n + m), slopes),
    )
    return (
        query.new_empty((p,) if ahead else (p, n), dtype=dtype),
        query.new_empty((3, p) if return_stats else 0, dtype=dtype),
        query.new_empty(p, dtype=dtype),
        *(query.new_empty(shape if there else 0, dtype=dtype) for shape, there in for_backward),
    )


def _keeps_slopes(query: Tensor, p: int, n: int, m: int, backend: str) -> bool:
    """Whether the forward pass leaves the gradients of the features to the backward pass."""
    d = query.shape[-1]
    if 0 in (p, n, m, d) or not native.keeps_slopes(query.device, query.dtype, p, n, m, d):
        return False
    return _dispatch.choose(backend, query.device, query.dtype, {}) == "native"


def _scale_kernel(
    query_gradient: Tensor,
    key_gradient: Tensor,
    temperature_gradient: Tensor,
    bias_gradient: Tensor,
    slopes: Tensor,
    along: Tensor,
    scale: Tensor,
    query: Tensor,
    key: Tensor | None,
    pairing: str,
    query_wanted: bool,
    key_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that the forward pass prepared, times what arrived for each problem (`scale` [P])."""
    per_problem = scale.view(-1, 1, 1)
    features: tuple[Tensor | None, Tensor | None]
    if slopes.numel():
        kept, alone = PairSlopes(slopes, along), Pairing(pairing).self_contrast
        features = native.gradients_from_slopes(query, key, kept, scale.contiguous(), alone, (query_wanted, key_wanted))
    else:
        features = (
            query_gradient * per_problem if query_wanted else None,
            key_gradient * per_problem if key_wanted else None,
        )

    def scalar(gradient: Tensor) -> Tensor:  # [P] to [], or [0]
        return (gradient * scale).sum() if gradient.numel() else gradient.clone()

    query_result, key_result = (query.new_empty(0) if g is None else g.to(query.dtype) for g in features)
    return query_result, key_result, scalar(temperature_gradient), scalar(bias_gradient)


def _scale_fake(
    query_gradient: Tensor,
    key_gradient: Tensor,
    temperature_gradient: Tensor,
    bias_gradient: Tensor,
    slopes: Tensor,
    along: Tensor,
    scale: Tensor,
    query: Tensor,
    key: Tensor | None,
    pairing: str,
    query_wanted: bool,
    key_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if query_wanted else 0),
        query.new_empty(() if key is None else key.shape) if key_wanted else query.new_empty(0),
        scale.new_empty(() if temperature_gradient.numel() else 0),
        scale.new_empty(() if bias_gradient.numel() else 0),
    )


def _recompute_kernel(
    row_gradient: Tensor,
    query: Tensor,
    key: Tensor | None,
    temperature: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    form: str,
    pairing: str,
    same_label: str,
    normalize: bool,
    backend: str,
    query_gradient: bool,
    key_gradient: bool,
    temperature_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `sum_i row_gradient_i loss_i` from the inputs alone, where the forward pass could not form them."""
    problem = _problem(
        query, key, temperature, bias, query_labels, key_labels, weights, form, pairing, same_label, normalize
    )
    wanted = Wanted(query_gradient, key_gradient, temperature_gradient, bias_gradient)
    if 0 in problem.sizes:
        gradients = _no_pairs(problem, wanted)[1]
    else:
        with torch.autocast(query.device.type, enabled=False):
            gradients = _backend(backend, problem).backward(problem, row_gradient.contiguous(), wanted)
    return (
        query.new_empty(0) if gradients.query is None else gradients.query.to(query.dtype),
        query.new_empty(0) if gradients.key is None else gradients.key.to(query.dtype),
        row_gradient.new_empty(0) if gradients.temperature is None else gradients.temperature.sum(),
        row_gradient.new_empty(0) if gradients.bias is None else gradients.bias.sum(),
    )


def _recompute_fake(
    row_gradient: Tensor,
    query: Tensor,
    key: Tensor | None,
    temperature: Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    form: str,
    pairing: str,
    same_label: str,
    normalize: bool,
    backend: str,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    shapes = (query.shape, () if key is None else key.shape, (), ())
    likes = (query, query, row_gradient, row_gradient)
    return tuple(like.new_empty(shape if want else 0) for like, shape, want in zip(likes, shapes, wanted, strict=True))


class _Contrastive(torch.autograd.Function):
    """The one owner of the gradient of all losses of the family."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _operators.below_autograd(_contrastive, *inputs)
        tensors, ctx.arguments = inputs[:7], inputs[7:]
        # Not saved but handed over: the first backward pass scales them in place and gives them away.
        loss, statistics, scale, *ctx.features, temperature, bias, slopes, along = output
        ctx.save_for_backward(*tensors, scale, temperature, bias, slopes, along)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        handed_over = (x.new_empty(0) for x in ctx.features)
        return loss, statistics, scale, *handed_over, temperature, bias, slopes, along

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        wanted = Wanted(*ctx.needs_input_grad[:4])
        nothing = (None,) * 15
        if loss_gradient is None or not any(wanted):
            return (None,) * 4 + nothing
        tensors = ctx.saved_tensors  # once: a checkpointed graph recomputes them at this
        inputs, (scale, *scalars, slopes, along) = tensors[:7], tensors[7:]
        query, key, temperature, bias, *_, weights = inputs
        options, reduction, prepared = ctx.arguments[:5], ctx.arguments[5], ctx.arguments[8:]
        features = ctx.features
        if slopes.numel() == 0:
            ctx.features = None
        if reduction != "none" and all(there for there, want in zip(prepared, wanted, strict=True) if want):
            total = loss_gradient / scale
            if features is None:  # given away, and the graph was kept
                features = _operators.below_autograd(_contrastive, *inputs, *ctx.arguments)[3:5]
            if slopes.numel() or torch.is_grad_enabled():
                gradients = _scale(*features, *scalars, slopes, along, total, query, key, options[1], *wanted[:2])
            else:
                gradients = [
                    *(x.mul_(total.view(-1, 1, 1)).to(query.dtype) if x.numel() else x for x in features),
                    *((x * total).sum() if x.numel() else x for x in scalars),
                ]
        else:
            row_gradient = loss_gradient
            if reduction != "none":
                row_gradient = (loss_gradient / scale).unsqueeze(-1)
            if weights is not None:
                row_gradient = row_gradient * weights.to(row_gradient.dtype)
            rows = query.shape[1] * (2 if options[1] == "views" else 1)
            gradients = _recompute(row_gradient.expand(query.shape[0], rows), *inputs, *options, *wanted)
        query_gradient, key_gradient, temperature_gradient, bias_gradient = gradients
        return (
            query_gradient if wanted.query else None,
            key_gradient if wanted.key else None,
            temperature_gradient.to(temperature.device, temperature.dtype) if wanted.temperature else None,
            bias_gradient.to(bias.device, bias.dtype) if wanted.bias else None,
            *nothing,
        )


_TWICE = (
    "the contrastive losses of seer_kernels cannot be differentiated twice: their gradient is a fused kernel. "
    "Compute the loss in plain torch where second derivatives are needed"
)
_contrastive = _operators.register("contrastive", _contrastive_kernel, _contrastive_fake, _Contrastive)
_scale = _operators.register("contrastive_scale", _scale_kernel, _scale_fake, no_gradient=_TWICE)
_recompute = _operators.register("contrastive_recompute", _recompute_kernel, _recompute_fake, no_gradient=_TWICE)
