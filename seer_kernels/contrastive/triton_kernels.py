"""Triton kernels: products of tiles whose epilogue is the loss, so that no N x M matrix is ever in memory.

Every loss takes the same steps. `_statistics` boils the row of each anchor down to nine numbers, a few parts per
anchor; where keys are anchors too it does the same to the columns. `_settle` merges the parts into losses, statistics
and the three numbers that an anchor's gradient needs. Then the gradient:

- Narrow features (a row within NARROW_BYTES): `_statistics` multiplies tiles on the chip, and `_gradient` multiplies
  them again to form the gradient of one side; it serves both, with the roles of queries and keys exchanged.
- Wide features, for which a tile of the gradient does not fit on the chip: `_multiply` writes the products of a block
  to memory, `_slopes` makes d total / d product of them, and `_multiply` takes those to the features. Where the
  products of the block are still there from the statistics, that is three products in all, else four.

Deterministic: every number is written by one program, and sums run in a fixed order. With SEER_KERNELS_ATOMICS=1, and
unless torch is told to be deterministic, `_gradient` may form both sides at once and add up one of them by atomics.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_kernels.contrastive.problem import SAME_LABEL, Gradients, Problem, RowResults, Slopes, Wanted, row_weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on CPU tensors: Triton decides it when they are defined."""

NARROW_BYTES = 512
"""Features of a row up to which gradients are formed on the chip: D = 256 in half precision, 64 in fp32, whose products
take more registers."""

BLOCK_ENTRIES = 1 << 24
"""Products (fp32) and slopes (the features' dtype) of a block in memory: 96 MiB in half precision, 128 in fp32."""

KEPT_ROWS = 768
"""If fewer rows of a one-sided loss fit, adding to the keys' gradient so often costs more than a fourth product."""

BLOCK_SIDE = 4096
"""Rows and keys of a block where products are not kept for the gradient."""

COLUMN_BYTES = 32 << 20
"""Statistics of columns that wait to be merged."""

MAX_PARTS = 16
"""Parts of a row that different programs see. Programs that run at the same time are then a patch of the matrix about
as high as wide (132 on an H100: 8 blocks of rows, 16 parts), which share their features through the L2 cache."""

ADDED_BYTES = 256
"""Features of a row up to which atomics may add up gradients: of more, tiles of both sides do not fit on the chip."""

ADDED_FEATURES = 64
"""Features up to which adding the other side's gradient is cheaper than forming its products again (README)."""

BUSY_ROWS = 8192
"""Rows below which the shorter side is added whatever the features: its own programs would leave processors idle."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_ABSENT = tl.constexpr(-1e30)  # a maximum over nothing: finite, so that 0 * _ABSENT is 0

PLANES = 9
"""What `_statistics` keeps of an anchor for each part of its row: the fields of Anchors (but see `_seen_with`)."""

OUTCOMES = 11
"""What `_settle` writes of an anchor: the fields of RowResults; sum_j (d total / d logit_ij) logit_ij and, for
sigmoids, sum_j (d total / d logit_ij); the fields of Slopes."""


@triton.jit
def _load_features(features, first, count, d, D, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Features d, zeros beyond D, of the rows from `first` on; from `count` on of the last row: [BLOCK, d]."""
    rows = tl.minimum(tl.arange(0, BLOCK), count - 1 - first)
    at = features + tl.cast(first, tl.int64) * D + rows[:, None] * D + d[None, :]
    return tl.load(at) if EVEN else tl.load(at, mask=d[None, :] < D, other=0.0)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. The interpreter would multiply the bits of bf16; widened, they give the same exact products."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _tile_of(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile; programs that follow each other share rows and columns through the L2 cache."""
    group = program // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    within = program % (GROUP * columns)
    return group * GROUP + within % height, within // height


@triton.jit
def _side(index, count, scale, labels, weights, N, RULE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Of the rows `index` of one side: whether they exist, their scale, their label."""
    inside = index < count
    exists = inside
    if WEIGHTED:
        exists = inside & (tl.load(weights + index, mask=index < N, other=1.0) > 0)
    factor = inside.to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + index, mask=inside, other=0.0)
    label = index
    if RULE != 0:
        label = tl.load(labels + index, mask=inside, other=0)
    return exists, factor, label


@triton.jit
def _classes(i, j, x_exists, y_exists, x_label, y_label, own_shift, RULE: tl.constexpr, SELF: tl.constexpr):
    """The pair rule, the same from either side: masks [i, j] of the positives and of the negatives."""
    own = tl.abs(i[:, None] - j[None, :]) == own_shift
    exists = x_exists[:, None] & y_exists[None, :]
    if SELF:
        exists = exists & (i[:, None] != j[None, :])
    positive = exists & own
    negative = exists & (own == 0)
    if RULE != 0:
        same = x_label[:, None] == y_label[None, :]
        if RULE == 2:
            positive = exists & (own | same)
        negative = negative & (same == 0)
    return positive, negative


@triton.jit
def _sigmoid_pair(logit, positive):
    """log(1 + e^-margin) and its derivative with respect to the logit; margin = logit for positives, else -logit."""
    margin = tl.where(positive, logit, -logit)
    e = tl.exp(-tl.abs(margin))
    # log(1 + e) = 2 artanh(s), by its series: the logarithm itself would lose small e.
    s = e / (e + 2.0)
    t = s * s
    series = 1.0 / 13 + t * (1.0 / 15)
    series = 1.0 / 11 + t * series
    series = 1.0 / 9 + t * series
    series = 1.0 / 7 + t * series
    series = 1.0 / 5 + t * series
    series = 1.0 / 3 + t * series
    loss = 2.0 * s * (1.0 + t * series) + tl.maximum(-margin, 0.0)
    miss = tl.where(margin < 0, 1.0, e) / (1.0 + e)
    return loss, tl.where(positive, -miss, miss)


@triton.jit
def _seen_with(
    top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative,
    logit, positive, negative, bias, AXIS: tl.constexpr,
):  # fmt: skip
    """What is known of anchors, with the pairs of a tile added over AXIS.

    For a softmax: the top logit, sum e^(logit - top), and sum e^(logit - top) (logit - top). For sigmoids in their
    place: the sums of d loss / d logit, of the losses, and of (d loss / d logit) logit. Then sums and counts of the
    positives and of the negatives, and the best of either.
    """
    best_positive = tl.maximum(best_positive, tl.max(tl.where(positive, logit, _ABSENT), AXIS))
    best_negative = tl.maximum(best_negative, tl.max(tl.where(negative, logit, _ABSENT), AXIS))
    if bias is not None:
        loss, slope = _sigmoid_pair(logit + tl.load(bias), positive)
        slope = tl.where(positive | negative, slope, 0.0)
        top += tl.sum(slope, AXIS)
        total += tl.sum(tl.where(positive | negative, loss, 0.0), AXIS)
        below += tl.sum(slope * logit, AXIS)
    else:
        reference = tl.maximum(best_positive, best_negative)
        shift = top - reference
        factor = tl.exp(shift)
        distance = tl.where(positive | negative, logit - tl.expand_dims(reference, AXIS), _ABSENT)
        e = tl.exp(distance)
        below = factor * (below + total * shift) + tl.sum(e * distance, AXIS)
        total = factor * total + tl.sum(e, AXIS)
        top = reference
    positive_sum += tl.sum(tl.where(positive, logit, 0.0), AXIS)
    positives += tl.sum(positive.to(tl.float32), AXIS)
    negative_sum += tl.sum(tl.where(negative, logit, 0.0), AXIS)
    negatives += tl.sum(negative.to(tl.float32), AXIS)
    return top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative


@triton.jit
def _unseen(COUNT: tl.constexpr, SIGMOID: tl.constexpr):
    """What is known of COUNT anchors before any pair was seen."""
    zero = tl.zeros((COUNT,), tl.float32)
    absent = zero + _ABSENT
    top = absent
    if SIGMOID:
        top = zero
    return top, zero, zero, zero, zero, zero, zero, absent, absent


@triton.jit
def _store_planes(
    at, plane, mask,
    top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative,
):  # fmt: skip
    tl.store(at, top, mask=mask)
    tl.store(at + plane, total, mask=mask)
    tl.store(at + 2 * plane, below, mask=mask)
    tl.store(at + 3 * plane, positive_sum, mask=mask)
    tl.store(at + 4 * plane, positives, mask=mask)
    tl.store(at + 5 * plane, negative_sum, mask=mask)
    tl.store(at + 6 * plane, negatives, mask=mask)
    tl.store(at + 7 * plane, best_positive, mask=mask)
    tl.store(at + 8 * plane, best_negative, mask=mask)


@triton.jit
def _merged(parts, count, plane, index, inside, COUNT: tl.constexpr, SIGMOID: tl.constexpr):
    """What `count` parts, each of 9 planes, know together of the anchors at `index`."""
    top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative = _unseen(
        COUNT, SIGMOID
    )
    for part in range(count):
        at = parts + part * 9 * plane + index
        part_top = tl.load(at, mask=inside, other=0.0)
        part_total = tl.load(at + plane, mask=inside, other=0.0)
        part_below = tl.load(at + 2 * plane, mask=inside, other=0.0)
        if SIGMOID:
            top += part_top
            total += part_total
            below += part_below
        else:
            both = tl.maximum(top, part_top)
            shift = top - both
            part_shift = part_top - both
            factor = tl.exp(shift)
            part_factor = tl.exp(part_shift)
            below = factor * (below + total * shift) + part_factor * (part_below + part_total * part_shift)
            total = factor * total + part_factor * part_total
            top = both
        positive_sum += tl.load(at + 3 * plane, mask=inside, other=0.0)
        positives += tl.load(at + 4 * plane, mask=inside, other=0.0)
        negative_sum += tl.load(at + 5 * plane, mask=inside, other=0.0)
        negatives += tl.load(at + 6 * plane, mask=inside, other=0.0)
        best_positive = tl.maximum(best_positive, tl.load(at + 7 * plane, mask=inside, other=_ABSENT))
        best_negative = tl.maximum(best_negative, tl.load(at + 8 * plane, mask=inside, other=_ABSENT))
    return top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative


@triton.jit
def _share(logit, positive, normalizer, target, slope):
    """d total / d logit, as far as it comes from the softmax of one side's anchors."""
    return tl.exp(logit - normalizer) * slope - tl.where(positive, target * slope, 0.0)


@triton.jit
def _slope(logit, positive, negative, i, j, x_anchors, y_anchors, plane, N, bias):
    """d total / d logit [i, j], from the `Slopes` [3, P, N] of each side's anchors, None where it has none."""
    slope = tl.zeros_like(logit)
    if bias is not None:
        slope = _sigmoid_pair(logit + tl.load(bias), positive)[1]
        if x_anchors is not None:
            slope = slope * tl.load(x_anchors + 2 * plane + i, mask=i < N, other=0.0)[:, None]
        if y_anchors is not None:
            slope = slope * tl.load(y_anchors + 2 * plane + j, mask=j < N, other=0.0)[None, :]
    else:
        if x_anchors is not None:
            slope += _share(
                logit,
                positive,
                tl.load(x_anchors + i, mask=i < N, other=-_ABSENT)[:, None],
                tl.load(x_anchors + plane + i, mask=i < N, other=0.0)[:, None],
                tl.load(x_anchors + 2 * plane + i, mask=i < N, other=0.0)[:, None],
            )
        if y_anchors is not None:
            slope += _share(
                logit,
                positive,
                tl.load(y_anchors + j, mask=j < N, other=-_ABSENT)[None, :],
                tl.load(y_anchors + plane + j, mask=j < N, other=0.0)[None, :],
                tl.load(y_anchors + 2 * plane + j, mask=j < N, other=0.0)[None, :],
            )
    return tl.where(positive | negative, slope, 0.0)


@triton.jit
def _inverse_norms(x, inverse_norms, rows, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / |x| of each row, 0 for a row of zeros."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (i < rows)[:, None] & (d < D)[None, :]
        value = tl.load(x + i[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1))
    tl.store(inverse_norms + i, 1.0 / tl.where(norm == 0, float("inf"), norm), mask=i < rows)


@triton.jit
def _project(gradient, x, inverse_norms, unit, rows, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Divides the gradient by `unit` and removes from each row its component along the row of x, in place."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = 1.0
    if unit is not None:
        factor = 1.0 / tl.load(unit)
    along = tl.zeros((BLOCK,), tl.float32)
    if inverse_norms is not None:
        dots = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (i < rows)[:, None] & (d < D)[None, :]
            at = i[:, None] * D + d[None, :]
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            dots += tl.load(gradient + at, mask=inside, other=0.0) * value
        inverse_norm = tl.load(inverse_norms + i, mask=i < rows, other=0.0)
        along = tl.sum(dots, 1) * inverse_norm * inverse_norm
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (i < rows)[:, None] & (d < D)[None, :]
        at = i[:, None] * D + d[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        here = tl.load(gradient + at, mask=inside, other=0.0)
        tl.store(gradient + at, (here - along[:, None] * value) * factor, mask=inside)


@triton.jit
def _statistics(
    x, y, x_scale, y_scale, x_labels, y_labels, weights, temperature, bias,
    products, row_parts, column_parts,
    P, N, X, Y, D, own_shift,
    first_problem, first_row, row_count, first_key, key_count, part_count, part_keys, bucket,
    RULE: tl.constexpr, SELF: tl.constexpr, X_WEIGHTED: tl.constexpr, Y_WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries x as anchors over parts of a block's keys y, into row_parts [part_count, 9, P, N].

    With column_parts [blocks of rows, 9, P, N] the first N keys are anchors over a block of rows as well. Products are
    those of the block, [problems, row_count, key_count], or None: then D features fit into BLOCK_D.
    """
    program = tl.program_id(0)
    part = program % part_count
    row_blocks = tl.cdiv(row_count, BLOCK_X)
    block = program // part_count % row_blocks
    local_p = (program // part_count // row_blocks).to(tl.int64)
    p = first_problem + local_p

    x += p * X * D
    y += p * Y * D
    if x_scale is not None:
        x_scale += p * X
        y_scale += p * Y
    if RULE != 0:
        x_labels += p * X
        y_labels += p * Y
    if weights is not None:
        weights += p * N

    local_i = block * BLOCK_X + tl.arange(0, BLOCK_X)
    i = first_row + local_i
    row_end = first_row + row_count
    x_exists, x_factor, x_label = _side(i, row_end, x_scale, x_labels, weights, N, RULE, X_WEIGHTED)
    x_factor = x_factor / tl.load(temperature)
    if products is not None:
        products += local_p * row_count * key_count
    else:
        d = tl.arange(0, BLOCK_D)
        left = _load_features(x, first_row + block * BLOCK_X, row_end, d, D, BLOCK_X, EVEN)

    plane = tl.cast(P, tl.int64) * N
    top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative = _unseen(
        BLOCK_X, bias is not None
    )
    last = tl.minimum((part + 1) * part_keys, key_count)
    for start in range(part * part_keys, last, BLOCK_Y):
        local_j = start + tl.arange(0, BLOCK_Y)
        j = first_key + local_j
        if products is not None:
            at = local_i[:, None] * key_count + local_j[None, :]  # a block has fewer than 2^31 products
            product = tl.load(products + at, mask=(local_i < row_count)[:, None] & (local_j < last)[None, :], other=0.0)
        else:
            right = _load_features(y, first_key + start, first_key + last, d, D, BLOCK_Y, EVEN)
            product = _dot(left, tl.trans(right), tl.zeros((BLOCK_X, BLOCK_Y), tl.float32), PRECISION)
        y_exists, y_factor, y_label = _side(j, first_key + last, y_scale, y_labels, weights, N, RULE, Y_WEIGHTED)
        logit = product * x_factor[:, None] * y_factor[None, :]
        positive, negative = _classes(i, j, x_exists, y_exists, x_label, y_label, own_shift, RULE, SELF)
        top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative = _seen_with(
            top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative,
            logit, positive, negative, bias, 1,
        )  # fmt: skip
        if column_parts is not None:
            c_top, c_total, c_below, c_ps, c_p, c_ns, c_n, c_bp, c_bn = _unseen(BLOCK_Y, bias is not None)
            c_top, c_total, c_below, c_ps, c_p, c_ns, c_n, c_bp, c_bn = _seen_with(
                c_top, c_total, c_below, c_ps, c_p, c_ns, c_n, c_bp, c_bn, logit, positive, negative, bias, 0
            )
            at_columns = column_parts + block * 9 * plane + p * N + j
            mask = (local_j < last) & (j < N)
            _store_planes(at_columns, plane, mask, c_top, c_total, c_below, c_ps, c_p, c_ns, c_n, c_bp, c_bn)
    _store_planes(
        row_parts + part * 9 * plane + p * N + i, plane, local_i < row_count,
        top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative,
    )  # fmt: skip


@triton.jit
def _merge(parts, merged, count, plane, BLOCK: tl.constexpr):
    """Merges `count` parts of a softmax's anchors into one; `merged` may be one of them."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.cast(plane, tl.int64)
    inside = index < plane
    top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative = _merged(
        parts, count, plane, index, inside, BLOCK, False
    )
    _store_planes(
        merged + index, plane, inside,
        top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative,
    )  # fmt: skip


@triton.jit
def _settle(
    parts, row_gradient, temperature, outcomes,
    count, P, N, first_problem, first_row, row_count, share,
    SIGMOID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Outcomes [11, P, N] of the anchors that all parts [count, 9, P, N] tell of together.

    `share` is what the anchor's loss counts for in the row's: 1, or 1 / 2 if keys are anchors too.
    """
    blocks = tl.cdiv(row_count, BLOCK)
    program = tl.program_id(0)
    local_i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = local_i < row_count
    index = (first_problem + program // blocks).to(tl.int64) * N + first_row + local_i
    plane = tl.cast(P, tl.int64) * N
    top, total, below, positive_sum, positives, negative_sum, negatives, best_positive, best_negative = _merged(
        parts, count, plane, index, inside, BLOCK, SIGMOID
    )
    valid = positives > 0
    has_negative = valid & (negatives > 0)
    positive_mean = positive_sum / tl.maximum(positives, 1.0)
    negative_mean = negative_sum / tl.maximum(negatives, 1.0)
    gradient = tl.load(row_gradient + index, mask=inside, other=0.0) * share
    if SIGMOID:
        loss = total  # needs no positive
        logit_dot = gradient * below
        logit_sum = gradient * top
        normalizer = top
    else:
        gradient = tl.where(valid, gradient, 0.0)
        total = tl.where(valid, total, 1.0)
        above = tl.where(valid, positive_mean - top, 0.0)
        loss = tl.where(valid, tl.log(total) - above, 0.0)
        logit_dot = gradient * (below / total - above)
        logit_sum = tl.zeros((BLOCK,), tl.float32)
        normalizer = tl.where(valid, top + tl.log(total), -_ABSENT)
    scale = tl.load(temperature)
    at = outcomes + index
    tl.store(at, loss, mask=inside)
    tl.store(at + plane, valid.to(tl.float32), mask=inside)
    tl.store(at + 2 * plane, positive_mean * scale, mask=inside)
    tl.store(at + 3 * plane, tl.where(has_negative, negative_mean * scale, 0.0), mask=inside)
    tl.store(at + 4 * plane, has_negative.to(tl.float32), mask=inside)
    tl.store(at + 5 * plane, (best_positive > best_negative).to(tl.float32), mask=inside)
    tl.store(at + 6 * plane, logit_dot, mask=inside)
    tl.store(at + 7 * plane, logit_sum, mask=inside)
    tl.store(at + 8 * plane, normalizer, mask=inside)
    tl.store(at + 9 * plane, 1.0 / tl.maximum(positives, 1.0), mask=inside)
    tl.store(at + 10 * plane, gradient, mask=inside)


@triton.jit
def _slopes(
    x_scale, y_scale, x_labels, y_labels, weights, temperature, bias,
    x_anchors, y_anchors, unit, products, slopes,
    P, N, X, Y, own_shift, first_problem, first_row, row_count, first_key, key_count,
    RULE: tl.constexpr, SELF: tl.constexpr, X_WEIGHTED: tl.constexpr, Y_WEIGHTED: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """From products to unit * d total / d product, for a block [problems, row_count, key_count]."""
    rows = tl.cdiv(row_count, BLOCK_X)
    columns = tl.cdiv(key_count, BLOCK_Y)
    program = tl.program_id(0)
    local_p = (program // (rows * columns)).to(tl.int64)
    p = first_problem + local_p
    if x_scale is not None:
        x_scale += p * X
        y_scale += p * Y
    if RULE != 0:
        x_labels += p * X
        y_labels += p * Y
    if weights is not None:
        weights += p * N
    if x_anchors is not None:
        x_anchors += p * N
    if y_anchors is not None:
        y_anchors += p * N

    local_i = program // columns % rows * BLOCK_X + tl.arange(0, BLOCK_X)
    local_j = program % columns * BLOCK_Y + tl.arange(0, BLOCK_Y)
    i = first_row + local_i
    j = first_key + local_j
    x_exists, x_factor, x_label = _side(i, first_row + row_count, x_scale, x_labels, weights, N, RULE, X_WEIGHTED)
    y_exists, y_factor, y_label = _side(j, first_key + key_count, y_scale, y_labels, weights, N, RULE, Y_WEIGHTED)
    x_factor = x_factor / tl.load(temperature)
    # A block has fewer than 2^31 products.
    at = local_p * row_count * key_count + (local_i[:, None] * key_count + local_j[None, :])
    inside = (local_i < row_count)[:, None] & (local_j < key_count)[None, :]
    logit = tl.load(products + at, mask=inside, other=0.0) * x_factor[:, None] * y_factor[None, :]
    positive, negative = _classes(i, j, x_exists, y_exists, x_label, y_label, own_shift, RULE, SELF)
    slope = _slope(logit, positive, negative, i, j, x_anchors, y_anchors, tl.cast(P, tl.int64) * N, N, bias)
    slope = slope * x_factor[:, None] * y_factor[None, :]
    if unit is not None:
        slope = slope * tl.load(unit)
    tl.store(slopes + at, slope.to(slopes.dtype.element_ty), mask=inside)


@triton.jit
def _multiply(
    a, b, out,
    a_problem, a_row, a_inner, b_problem, b_inner, b_column, out_problem, out_row,
    rows, columns, inner, bucket,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (+)= a @ b in fp32, for each of some problems: [rows, inner] @ [inner, columns]."""
    tile_rows = tl.cdiv(rows, BLOCK_X)
    tile_columns = tl.cdiv(columns, BLOCK_Y)
    program = tl.program_id(0)
    p = (program // (tile_rows * tile_columns)).to(tl.int64)
    tile_row, tile_column = _tile_of(program % (tile_rows * tile_columns), tile_rows, tile_columns, 8)
    first_row = (tile_row * BLOCK_X).to(tl.int64)
    first_column = (tile_column * BLOCK_Y).to(tl.int64)
    a += p * a_problem + first_row * a_row
    b += p * b_problem + first_column * b_column
    out += p * out_problem + first_row * out_row + first_column

    i = tl.arange(0, BLOCK_X)
    j = tl.arange(0, BLOCK_Y)
    k = tl.arange(0, BLOCK_K)
    inside_i = i < rows - tile_row * BLOCK_X
    inside_j = j < columns - tile_column * BLOCK_Y
    out_at = out + i[:, None] * out_row + j[None, :]
    if ADD:
        total = tl.load(out_at, mask=inside_i[:, None] & inside_j[None, :], other=0.0)
    else:
        total = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    a_at = a + i[:, None] * a_row + k[None, :] * a_inner
    b_at = b + k[:, None] * b_inner + j[None, :] * b_column
    for start in range(0, inner, BLOCK_K):
        inside_k = k < inner - start
        left = tl.load(a_at, mask=inside_i[:, None] & inside_k[None, :], other=0.0)
        right = tl.load(b_at, mask=inside_k[:, None] & inside_j[None, :], other=0.0)
        total = _dot(left, right, total, PRECISION)
        a_at += BLOCK_K * a_inner
        b_at += BLOCK_K * b_inner
    tl.store(out_at, total, mask=inside_i[:, None] & inside_j[None, :])


@triton.jit
def _gradient(
    x, y, x_scale, y_scale, x_labels, y_labels, weights, temperature, bias,
    x_anchors, y_anchors, unit, gradient, y_gradient,
    P, N, X, Y, D, own_shift, bucket,
    RULE: tl.constexpr, SELF: tl.constexpr, X_WEIGHTED: tl.constexpr, Y_WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of all rows of x [P, X, D], whose D features fit into BLOCK_D; either side may be the queries.

    With y_gradient, which begins at 0, that of y is added to it by atomics, not yet projected and times `unit`; then
    `gradient` may be None.
    """
    blocks = tl.cdiv(X, BLOCK_X)
    program = tl.program_id(0)
    p = (program // blocks).to(tl.int64)
    x += p * X * D
    y += p * Y * D
    if x_scale is not None:
        x_scale += p * X
        y_scale += p * Y
    if RULE != 0:
        x_labels += p * X
        y_labels += p * Y
    if weights is not None:
        weights += p * N
    if x_anchors is not None:
        x_anchors += p * N
    if y_anchors is not None:
        y_anchors += p * N

    i = program % blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    d = tl.arange(0, BLOCK_D)
    x_exists, x_factor, x_label = _side(i, X, x_scale, x_labels, weights, N, RULE, X_WEIGHTED)
    left = _load_features(x, program % blocks * BLOCK_X, X, d, D, BLOCK_X, EVEN)
    logit_factor = x_factor / tl.load(temperature)
    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    for start in range(0, Y, BLOCK_Y):
        j = start + tl.arange(0, BLOCK_Y)
        right = _load_features(y, start, Y, d, D, BLOCK_Y, EVEN)
        y_exists, y_factor, y_label = _side(j, Y, y_scale, y_labels, weights, N, RULE, Y_WEIGHTED)
        product = _dot(left, tl.trans(right), tl.zeros((BLOCK_X, BLOCK_Y), tl.float32), PRECISION)
        logit = product * logit_factor[:, None] * y_factor[None, :]
        positive, negative = _classes(i, j, x_exists, y_exists, x_label, y_label, own_shift, RULE, SELF)
        slope = _slope(logit, positive, negative, i, j, x_anchors, y_anchors, tl.cast(P, tl.int64) * N, N, bias)
        slope_factor = y_factor if unit is None else y_factor * tl.load(unit)
        slope = (slope * logit_factor[:, None] * slope_factor[None, :]).to(right.dtype)
        if gradient is not None:
            total = _dot(slope, right, total, PRECISION)
        if y_gradient is not None:
            share = _dot(tl.trans(slope), left, tl.zeros((BLOCK_Y, BLOCK_D), tl.float32), PRECISION)
            at = y_gradient + (p * Y + j)[:, None] * D + d[None, :]
            tl.atomic_add(at, share, mask=(j < Y)[:, None] & (d < D)[None, :], sem="relaxed")
    if gradient is not None:
        if unit is not None:
            total = total / tl.load(unit)
        if x_scale is not None:
            wide = left.to(tl.float32)
            along = tl.sum(total * wide, 1) * x_factor * x_factor
            total = total - along[:, None] * wide
        at = gradient + (p * X + i)[:, None] * D + d[None, :]
        tl.store(at, total, mask=(i < X)[:, None] & (d < D)[None, :])


def _shared_memory() -> int:
    """Bytes of shared memory that a block may use on the current device."""
    device = triton.runtime.driver.active.get_current_device()
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _usable_configs(configs: list[Any], named_arguments: dict[str, Any], **arguments: Any) -> list[Any]:
    """The configurations that fit into a chip's shared memory and registers for the arguments of a launch."""
    arguments = {**named_arguments, **arguments}

    item = arguments["a" if "a" in arguments else "x"].element_size()

    def fits(config: Any) -> bool:
        blocks = config.kwargs
        if "a" in arguments:  # _multiply
            rows, columns = blocks["BLOCK_X"], blocks["BLOCK_Y"]
            if item == 4 and rows * columns > 64 * 128:  # tf32x3 splits its operands in registers
                return False
            return int(config.num_stages * (rows + columns) * arguments["BLOCK_K"] * item) <= _shared_memory()
        row_bytes = arguments["BLOCK_D"] * item
        if "row_parts" in arguments:  # _statistics
            few = arguments["column_parts"] is None and row_bytes <= (64 if item == 4 else 256)
            return bool(blocks["BLOCK_Y"] <= 32 or few)
        # _gradient: matrix units of sm_90 take 64 rows of half precision at a time
        most = 64 if row_bytes > 128 else 128
        return bool(blocks["BLOCK_X"] == 32 if item == 4 else 64 <= blocks["BLOCK_X"] <= most)

    return [config for config in configs if fits(config)]


def _tuned(kernel: Any, key: list[str], *choices: tuple[dict[str, int], int, int], zeroed: tuple[str, ...] = ()) -> Any:
    """The kernel, tuned anew for each value of `key` over (block sizes, warps, stages). The interpreter has one choice.
    Tuning repeats a launch, and sets the tensors `zeroed` to 0 each time.

    Sizes enter the key by their powers of two, so that a last, smaller batch is not tuned for.
    """
    if INTERPRETED:
        configs = [triton.Config(dict.fromkeys(choices[0][0], 16))]
    else:
        configs = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in choices]
    prune = {"early_config_prune": _usable_configs}
    return triton.autotune(configs, key, prune_configs_by=prune, reset_to_zero=list(zeroed))(kernel)


_tuned_statistics = _tuned(
    _statistics,
    ["bucket", "RULE", "BLOCK_D"],
    ({"BLOCK_Y": 32}, 8, 3),
    ({"BLOCK_Y": 64}, 8, 3),
)
_tuned_gradient = _tuned(
    _gradient,
    ["bucket", "RULE", "BLOCK_D"],
    ({"BLOCK_X": 32, "BLOCK_Y": 32}, 8, 2),
    ({"BLOCK_X": 64, "BLOCK_Y": 32}, 8, 2),
    ({"BLOCK_X": 128, "BLOCK_Y": 32}, 8, 2),
)
_tuned_gradients = _tuned(
    _gradient,
    ["bucket", "RULE", "BLOCK_D"],
    ({"BLOCK_X": 32, "BLOCK_Y": 16}, 8, 2),
    ({"BLOCK_X": 64, "BLOCK_Y": 32}, 8, 2),
    ({"BLOCK_X": 128, "BLOCK_Y": 32}, 8, 2),
    zeroed=("y_gradient",),
)
_tuned_multiply = _tuned(
    _multiply,
    ["bucket", "BLOCK_K"],
    ({"BLOCK_X": 64, "BLOCK_Y": 64}, 4, 4),
    ({"BLOCK_X": 128, "BLOCK_Y": 128}, 8, 2),
    ({"BLOCK_X": 128, "BLOCK_Y": 128}, 8, 3),
    ({"BLOCK_X": 128, "BLOCK_Y": 256}, 8, 3),
)


def atomics_allowed() -> bool:
    """Whether float atomics may add up gradients: not by default, and never where torch is told to be deterministic.

    Raises:
        ValueError: SEER_KERNELS_ATOMICS is neither 0 nor 1.
    """
    value = os.environ.get("SEER_KERNELS_ATOMICS", "0")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable SEER_KERNELS_ATOMICS must be 0 or 1; got {value!r}")
    return value == "1" and not torch.are_deterministic_algorithms_enabled()


def forward(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """Row results, and the gradients of `sum_i weights_i loss_i`."""
    return _evaluate(problem, row_weights(problem), wanted)


def backward(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of `sum_i row_gradient_i loss_i`."""
    return _evaluate(problem, row_gradient, wanted)[1]


def statistics(problem: Problem, anchors: Tensor) -> None:
    """Adds to what is known of the queries of a "softmax" problem (`Anchors`, [9, P, N]) what its keys tell of them."""
    with torch.cuda.device_of(problem.query):
        run = _Run(problem, torch.zeros_like(anchors[0]), Wanted(False, False, False, False))
        run.results()
        parts, plane = torch.cat([anchors.unsqueeze(0), run.row_parts]), anchors[0].numel()
        _merge[(triton.cdiv(plane, 128),)](parts, anchors, len(parts), plane, BLOCK=128)


def slope_gradients(problem: Problem, slopes: Tensor, wanted: Wanted) -> Gradients:
    """What the keys of a "softmax" problem add to the gradients of the features, given the `Slopes` [3, P, N] of the
    queries as anchors that saw these and other keys."""
    with torch.cuda.device_of(problem.query):
        run = _Run(problem, Slopes(*slopes.unbind()).slope, wanted)
        run.anchors = (slopes, slopes if run.alone else None)
        run.form_gradients()
        return Gradients(*run.feature_gradients(problem, wanted), None, None)


def _evaluate(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> tuple[RowResults, Gradients]:
    with torch.cuda.device_of(problem.query):
        run = _Run(problem, row_gradient.contiguous(), wanted)
        results, logit_dot, logit_sum = run.results()
        return results, Gradients(
            *run.feature_gradients(problem, wanted),
            -logit_dot.sum(-1) / run.temperature if wanted.temperature else None,
            logit_sum.sum(-1) if wanted.bias else None,
        )


class _Block(NamedTuple):
    """Some queries of some problems against some keys."""

    problems: slice
    rows: slice
    keys: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        p, r, k = self
        return p.stop - p.start, r.stop - r.start, k.stop - k.start


class _Run:
    """One evaluation: the operands as the kernels take them, and the order in which the kernels run."""

    def __init__(self, problem: Problem, row_gradient: Tensor, wanted: Wanted) -> None:
        self.P, self.N, self.M, self.D = problem.sizes
        self.device, self.dtype = problem.query.device, problem.query.dtype
        self.row_gradient = row_gradient
        self.alone = problem.pairing.self_contrast
        self.symmetric = problem.form == "symmetric"
        if problem.pairing.name == "views":
            assert problem.key is not None
            self.query = self.key = torch.cat([problem.query, problem.key], 1)
        else:
            self.query = problem.query.contiguous()
            self.key = self.query if problem.key is None else problem.key.contiguous()
        self.query_scale = self.key_scale = None
        if problem.normalize:
            self.query_scale = self._inverse_norms(self.query)
            self.key_scale = self.query_scale if self.alone else self._inverse_norms(self.key)
        self.temperature = self._scalar(problem.temperature)
        self.bias = None if problem.bias is None else self._scalar(problem.bias)

        wants_query, wants_key = wanted[:2]
        if self.alone:
            wants_query, wants_key = wants_query or wants_key, False
        self.gradients = [
            self._empty(*x.shape) if want else None for x, want in ((self.query, wants_query), (self.key, wants_key))
        ]
        self.wants_features = wants_query or wants_key
        self.outcomes = self._empty(OUTCOMES, self.P, self.N)
        self.column_outcomes = self._empty(OUTCOMES, self.P, self.N) if self.symmetric else None
        slopes, column_slopes = (None if x is None else x[8:] for x in (self.outcomes, self.column_outcomes))
        self.anchors = (slopes, slopes if self.alone else column_slopes)  # Slopes of queries and keys
        self.unit = self._unit() if self.dtype == torch.float16 and self.wants_features else None

        self.narrow = self.D * self.dtype.itemsize <= NARROW_BYTES // (2 if self.dtype == torch.float32 else 1)
        self.block_x = 16 if INTERPRETED else 64
        self.part_keys = triton.cdiv(triton.cdiv(self.M, MAX_PARTS), self.block_x) * self.block_x
        self.bucket = (self.P * self.N).bit_length() * 4096 + self.M.bit_length() * 64 + self.D.bit_length()
        # Three tf32 products are as exact as one in fp32, and several times faster.
        self.precision = "tf32x3" if self.dtype == torch.float32 and torch.version.hip is None else "ieee"
        block_d = max(16, triton.next_power_of_2(self.D)) if self.narrow else 16
        self.chip = {  # for kernels that multiply on the chip
            "D": self.D,
            "bucket": self.bucket,
            "PRECISION": self.precision,
            "BLOCK_D": block_d,
            "EVEN": block_d == self.D,
        }
        self.row_parts = self._empty(triton.cdiv(self.M, self.part_keys), PLANES, self.P, self.N)
        weighted = problem.weights is not None
        self.sides = (
            (self.query, self.query_scale, problem.query_labels, self.N, weighted),
            (self.key, self.key_scale, problem.key_labels, self.M, weighted and problem.pairing.shared_weights),
        )
        self.pairs = {
            "weights": problem.weights,
            "temperature": self.temperature,
            "bias": self.bias,
            "P": self.P,
            "N": self.N,
            "own_shift": problem.pairing.own_shift(self.N),
            "RULE": 0 if problem.query_labels is None else SAME_LABEL.index(problem.same_label),
            "SELF": self.alone,
        }

    def results(self) -> tuple[RowResults, Tensor, Tensor]:
        """Results of the rows, and their parts of the gradients of temperature and bias, [P, N] each; forms the
        gradients of the features on the way."""
        rows = BLOCK_ENTRIES // self.M
        if self.narrow:
            list(self._settled(self.P * self.N, self.M))
            self.form_gradients()
        elif rows >= (self.P * self.N if self.alone or self.symmetric else min(self.N, KEPT_ROWS)):
            products, slopes = self._buffers()
            for block in self._settled(rows, self.M, products):
                if self.wants_features:
                    self._add(block, self._form_slopes(block, products, slopes))
            self._project()
        else:
            keys = max(1, BLOCK_SIDE // self.part_keys) * self.part_keys
            list(self._settled(max(1, BLOCK_ENTRIES // keys), keys, self._buffers()[0]))
            self.form_gradients()
        outcomes = self.outcomes[:8]
        if self.column_outcomes is not None:
            mean = (self.outcomes[:6] + self.column_outcomes[:6]) / 2
            outcomes = torch.cat([mean, self.outcomes[6:8] + self.column_outcomes[6:8]])
        *of_rows, logit_dot, logit_sum = outcomes.unbind()
        return RowResults(*of_rows), logit_dot, logit_sum

    def form_gradients(self) -> None:
        """The gradients of the features, from Slopes that are known of all anchors."""
        if self.wants_features and self.narrow:
            self._form_narrow_gradients()
        elif self.wants_features:
            products, slopes = self._buffers()
            for block in self._blocks():
                self._form_products(block, products)
                self._add(block, self._form_slopes(block, products, slopes))
            self._project()

    def feature_gradients(self, problem: Problem, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
        """Those of Problem.query and Problem.key."""
        query, key = self.gradients
        if problem.pairing.name == "views" and query is not None:
            query, key = query.split(problem.query.shape[1], 1)
        return query if wanted.query else None, key if wanted.key else None

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """For the products of a block, and the slopes made of them."""
        entries = min(BLOCK_ENTRIES, self.P * self.N * self.M)
        return self._empty(entries), self._empty(entries if self.wants_features else 0, dtype=self.dtype)

    def _project(self, sides: tuple[int, ...] = (0, 1)) -> None:
        """From the gradients with respect to unit rows to those with respect to the rows themselves."""
        for side in sides:
            gradient, (x, scale, *_) = self.gradients[side], self.sides[side]
            if gradient is not None and (scale is not None or self.unit is not None):
                self._by_rows(_project, x, gradient, x, scale, self.unit)

    def _settled(self, rows: int, keys: int, products: Tensor | None = None) -> Iterator[_Block]:
        """Sees all pairs, `rows` x `keys` of them at a time, and yields the blocks of rows whose outcomes are known.

        Their products are left in `products`, where given, if `keys` is all of them.
        """
        problems, height = max(1, rows // self.N), min(rows, self.N)
        column_parts = known = None
        if self.symmetric:
            # Every block of rows is a part of the columns. After each panel of them, all that is known goes to part 0.
            height = min(height, self.block_x * max(1, COLUMN_BYTES // (4 * PLANES * self.P * self.N)))
            column_parts = self._empty(1 + triton.cdiv(height, self.block_x), PLANES, self.P, self.N)
        for first in range(0, self.N, height):
            last = min(first + height, self.N)
            if known is not None and column_parts is not None:
                plane = self.P * self.N
                _merge[(triton.cdiv(plane, 128),)](known, column_parts, len(known), plane, BLOCK=128)
            for p in range(0, self.P, problems):
                panel = _Block(slice(p, min(p + problems, self.P)), slice(first, last), slice(0, self.M))
                for first_key in range(0, self.M, keys):
                    block = panel._replace(keys=slice(first_key, min(first_key + keys, self.M)))
                    if products is not None:
                        self._form_products(block, products)
                    self._see(block, products, self.row_parts[first_key // self.part_keys :], column_parts)
                if not self.symmetric:
                    self._settle(panel, self.row_parts, self.outcomes)
                    yield panel
            if column_parts is not None:
                known = column_parts[int(first == 0) : 1 + triton.cdiv(last - first, self.block_x)]
        if known is not None and self.column_outcomes is not None:
            everything = _Block(slice(0, self.P), slice(0, self.N), slice(0, self.M))
            self._settle(everything, self.row_parts, self.outcomes)
            self._settle(everything, known, self.column_outcomes)
            yield everything

    def _see(self, block: _Block, products: Tensor | None, row_parts: Tensor, column_parts: Tensor | None) -> None:
        problems, rows, keys = block.shape
        parts = triton.cdiv(keys, self.part_keys)
        _tuned_statistics[(problems * triton.cdiv(rows, self.block_x) * parts,)](
            **self._operands(),
            **self.chip,
            products=products,
            row_parts=row_parts,
            column_parts=None if column_parts is None else column_parts[1:],
            first_problem=block.problems.start,
            first_row=block.rows.start,
            row_count=rows,
            first_key=block.keys.start,
            key_count=keys,
            part_count=parts,
            part_keys=self.part_keys,
            BLOCK_X=self.block_x,
        )

    def _settle(self, block: _Block, parts: Tensor, outcomes: Tensor) -> None:
        problems, rows, _ = block.shape
        _settle[(problems * triton.cdiv(rows, 128),)](
            parts,
            self.row_gradient,
            self.temperature,
            outcomes,
            len(parts),
            self.P,
            self.N,
            block.problems.start,
            block.rows.start,
            rows,
            0.5 if self.symmetric else 1.0,
            SIGMOID=self.bias is not None,
            BLOCK=128,
        )

    def _form_narrow_gradients(self) -> None:
        added = self._side_to_add()
        if added is None:
            for side, gradient in enumerate(self.gradients):
                if gradient is not None:
                    self._form_narrow_gradient(_tuned_gradient, side, gradient, None)
            return
        total = self.gradients[added]
        assert total is not None
        self._form_narrow_gradient(_tuned_gradients, 1 - added, self.gradients[1 - added], total.zero_())
        self._project((added,))

    def _form_narrow_gradient(self, kernel: Any, side: int, gradient: Tensor | None, other: Tensor | None) -> None:
        """By programs that hold the rows of a side (0: queries), whose gradient is overwritten; other's is added to."""
        rows = (self.N, self.M)[side]
        kernel[lambda blocks: (self.P * triton.cdiv(rows, blocks["BLOCK_X"]),)](
            **self._operands(exchanged=bool(side)),
            **self.chip,
            x_anchors=self.anchors[side],
            y_anchors=self.anchors[1 - side],
            unit=self.unit,
            gradient=gradient,
            y_gradient=other,
        )

    def _side_to_add(self) -> int | None:
        """The side (0: queries) whose gradient atomics add up while programs hold the rows of the other, longer one."""
        shorter = int(self.M < self.N)
        if self.alone or self.gradients[shorter] is None or self.D * self.dtype.itemsize > ADDED_BYTES:
            return None
        few = self.P * min(self.N, self.M) < BUSY_ROWS
        saves_products = self.gradients[1 - shorter] is not None and self.D <= ADDED_FEATURES
        return shorter if (few or saves_products) and atomics_allowed() else None

    def _blocks(self) -> Iterator[_Block]:
        """Blocks of the second sweep; of a set against itself, squares on and above the diagonal."""
        keys = min(self.M, max(BLOCK_SIDE, BLOCK_SIDE**2 // self.N))
        rows = max(1, BLOCK_SIDE**2 // keys)
        problems = max(1, rows * keys // (self.N * self.M)) if rows >= self.N and keys >= self.M else 1
        for p in range(0, self.P, problems):
            for i in range(0, self.N, rows):
                for j in range(i if self.alone else 0, self.M, keys):
                    yield _Block(
                        slice(p, min(p + problems, self.P)),
                        slice(i, min(i + rows, self.N)),
                        slice(j, min(j + keys, self.M)),
                    )

    def _form_products(self, block: _Block, buffer: Tensor) -> None:
        p, rows, keys = block
        products = buffer[: math.prod(block.shape)].view(block.shape)
        self._multiply(products, self.query[p, rows], self.key[p, keys].mT, add=False)

    def _form_slopes(self, block: _Block, products: Tensor, buffer: Tensor) -> Tensor:
        """unit * d total / d product of a block."""
        problems, rows, keys = block.shape
        blocks = {"BLOCK_X": 16, "BLOCK_Y": 16 if INTERPRETED else 128}
        operands = self._operands()
        del operands["x"], operands["y"]
        _slopes[(problems * triton.cdiv(rows, blocks["BLOCK_X"]) * triton.cdiv(keys, blocks["BLOCK_Y"]),)](
            **operands,
            x_anchors=self.anchors[0],
            y_anchors=self.anchors[1],
            unit=self.unit,
            products=products,
            slopes=buffer,
            first_problem=block.problems.start,
            first_row=block.rows.start,
            row_count=rows,
            first_key=block.keys.start,
            key_count=keys,
            **blocks,
        )
        return buffer[: problems * rows * keys].view(block.shape)

    def _add(self, block: _Block, slopes: Tensor) -> None:
        """Adds to the gradients what follows from a block's slopes. The first block of a gradient overwrites it."""
        p, rows, keys = block
        of_queries, of_keys = self.gradients
        if of_queries is not None:
            first = keys.start == 0 and (rows.start == 0 or not self.alone)
            self._multiply(of_queries[p, rows], slopes, self.key[p, keys], add=not first)
        if self.alone and keys.start > rows.start:  # stands for the block on the other side of the diagonal too
            of_keys = of_queries
        if of_keys is not None:
            self._multiply(of_keys[p, keys], slopes.mT, self.query[p, rows], add=rows.start > 0)

    def _multiply(self, out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
        """out = a @ b, or out += a @ b."""
        problems, rows, columns = out.shape
        transposed = 2 * (a.stride(2) != 1) + (b.stride(2) != 1)
        _tuned_multiply[
            lambda blocks: (problems * triton.cdiv(rows, blocks["BLOCK_X"]) * triton.cdiv(columns, blocks["BLOCK_Y"]),)
        ](
            a,
            b,
            out,
            *a.stride(),
            *b.stride(),
            *out.stride()[:2],
            rows,
            columns,
            a.shape[2],
            # Tuning repeats a launch, so it must not meet one that adds: of each orientation the first never does.
            self.bucket * 4 + transposed,
            ADD=add,
            PRECISION=self.precision,
            BLOCK_K=16 if INTERPRETED else 128 // self.dtype.itemsize,
        )

    def _operands(self, *, exchanged: bool = False) -> dict[str, Any]:
        """What kernels over pairs share. x is the side that a program holds, y the one that it walks over: queries and
        keys, or exchanged."""
        operands = dict(self.pairs)
        for side, (features, scale, labels, count, weighted) in zip(
            "yx" if exchanged else "xy", self.sides, strict=True
        ):
            operands[side] = features
            operands[side.upper()] = count
            operands[f"{side}_scale"] = scale
            operands[f"{side}_labels"] = labels
            operands[f"{side.upper()}_WEIGHTED"] = weighted
        return operands

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _scalar(self, value: Tensor) -> Tensor:
        """On the device: a number is filled in, which needs no synchronisation as a copy would."""
        if value.device == self.device:
            return value
        return torch.full((), value.item(), dtype=torch.float32, device=self.device)

    def _inverse_norms(self, x: Tensor) -> Tensor:
        inverse_norms = self._empty(*x.shape[:2])
        self._by_rows(_inverse_norms, x, x, inverse_norms)
        return inverse_norms

    def _by_rows(self, kernel: Any, x: Tensor, *operands: Tensor | None) -> None:
        """Launches a kernel over all rows of x, a few of them (1024 features at a time) to a program."""
        rows = x.shape[0] * x.shape[1]
        block_d = min(1024, triton.next_power_of_2(self.D))
        block = 1024 // block_d
        kernel[(triton.cdiv(rows, block),)](*operands, rows, self.D, BLOCK=block, BLOCK_D=block_d)

    def _unit(self) -> Tensor:
        """A factor that takes the largest slope there can be to 2^14, well inside the range of fp16."""
        bound = self.row_gradient.abs().amax() / self.temperature
        if self.query_scale is not None and self.key_scale is not None:
            bound = bound * self.query_scale.amax() * self.key_scale.amax()
        return 2.0**13 / bound.clamp(min=1e-30)  # both sides of a pair may be anchors
