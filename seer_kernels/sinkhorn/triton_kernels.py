"""Triton kernels for few large problems: the costs are read once for each full iteration, from device memory.

`_iterate` gives some rows of a problem to each program. Of a row it finds the new potential and, while the row's costs
are still in registers, what the row adds to the columns; the programs' shares of the columns are added in their order
by `_columns`, and `_decide` applies the stopping test on the device: the host looks only now and then, and launches for
a problem that is done return at once. The arithmetic is that of the logarithmic domain throughout: two exponentials per
cost take less time than reading it, and neither a kernel matrix nor an absorption is needed.

`_sweep` is the same pass for given potentials, E_ij = exp((f_i + g_j - C_ij) / eps): products with E from both sides,
of which the results and all gradients are made.

`_alternate` and `_alternate_back` are such a pass for a fixed number of normalisations and for its gradient. Nothing
tells in advance how large a column's sum will be, so that each is kept with its largest term.

Deterministic: sums run in a fixed order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_kernels._checks import check_cost_values
from seer_kernels.sinkhorn.problem import (
    ANNEAL_ABOVE,
    ANNEAL_FACTOR,
    ANNEAL_START,
    ANNEAL_TOLERANCE,
    Alternation,
    Cotangents,
    Gradients,
    Problem,
    Solution,
    existing,
)

CHECK_EVERY = 16
"""Iterations between two looks at whether problems are still active: each look waits for the device."""

RESIDENT_COLUMNS = 16384
"""Up to here a row of costs and the sums of all columns fit into the registers of a multiprocessor;"""

RESIDENT_COLUMNS_OF_OTHERS = 8192
"""up to here where marginals are relaxed, sizes differ or columns are kept with their largest terms: it takes more."""

SMALL_COLUMNS = 256
"""Fewer columns are padded to this many."""

STREAMED_TILE = (2, 2048)
"""Rows and columns of a tile where rows are longer: then they are read twice, the second time mostly from L2."""

TILE = 4096
"""Costs of a tile of several rows."""

ELEMENTWISE_COLUMNS = 1024
"""Columns of a tile where nothing is kept from tile to tile."""

_ABSENT = tl.constexpr(-1e30)
_TOP_EXPONENT = tl.constexpr(80.0)  # of an entry in units of what its column added up to before
_LARGEST_EXPONENT = tl.constexpr(44.0)  # half of what fp32 holds: only problems it cannot resolve go beyond
_TINY = tl.constexpr(1e-37)
_IN_RANGE = tl.constexpr(1e30)  # column sums within [1 / this, this] have lost nothing to the range of exponents


@triton.jit
def _extent(x_lengths, y_lengths, p, n, m):
    """Rows and columns that exist of a problem."""
    rows = n
    columns = m
    if x_lengths is not None:
        rows = tl.load(x_lengths + p).to(tl.int32)
    if y_lengths is not None:
        columns = tl.load(y_lengths + p).to(tl.int32)
    return rows, columns


@triton.jit
def _load_costs(cost, i, j, last, width, m, RAGGED: tl.constexpr):
    """Costs [i, j] of a problem; 0 from row `last` and from column `width` on, which is m unless RAGGED."""
    at = cost + i.to(tl.int64)[:, None] * m + j[None, :]
    inside = (i < last)[:, None] & (j < m)[None, :]  # and not `width`: only m may be known to allow wide loads
    c = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")  # the L1 cache is for what every row needs
    return tl.where((j < width)[None, :], c, 0.0) if RAGGED else c


@triton.jit
def _inspect(
    cost, x_lengths, y_lengths, extremes, totals, n, m, count, parts, part_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Smallest, largest and whether there are unusable costs, into extremes [3, count]; totals [count] in fp64."""
    program = tl.program_id(0)
    p = (program // parts).to(tl.int64)
    first = program % parts * part_rows
    rows, width = _extent(x_lengths, y_lengths, p, n, m)
    last = tl.minimum(first + part_rows, rows)
    cost += p * n * m
    low = tl.zeros((ROWS,), tl.float32) + float("inf")
    high = tl.zeros((ROWS,), tl.float32) - float("inf")
    bad = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(first, last, ROWS):
        i = start + tl.arange(0, ROWS)
        for begin in range(0, width, COLUMNS):
            j = begin + tl.arange(0, COLUMNS)
            inside = (i < last)[:, None] & (j < width)[None, :]
            c = _load_costs(cost, i, j, last, width, m, y_lengths is not None)
            low = tl.minimum(low, tl.min(tl.where(inside, c, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(inside, c, -float("inf")), 1))
            usable = (c < 2e37) & (c > -2e37)
            bad = tl.maximum(bad, tl.max(tl.where(usable, 0.0, 1.0), 1))
            total += tl.sum(c, 1).to(tl.float64)
    tl.store(extremes + program, tl.min(low, 0))
    tl.store(extremes + count + program, tl.max(high, 0))
    tl.store(extremes + 2 * count + program, tl.max(bad, 0))
    tl.store(totals + program, tl.sum(total, 0))


@triton.jit
def _new_row(top, total, weight, f_old, now, tau_a, RELAXED: tl.constexpr):
    """The new potential of rows with log sum_j b_j exp((g_j - C_ij) / now) = top + log total; how far their mass was
    off before, and their mass."""
    log_sum = top + tl.log(tl.maximum(total, _TINY))
    if RELAXED:
        f = log_sum * (-now * (tau_a / (tau_a + now)))
        mass = weight * tl.exp(tl.minimum(log_sum + f / now, _TOP_EXPONENT))
    else:
        f = log_sum * -now
        mass = weight
    before = weight * tl.exp(tl.minimum(log_sum + f_old / now, _TOP_EXPONENT))
    return f, tl.abs(before - mass), mass


@triton.jit
def _iterate(
    cost, a, log_b, f, g, ahead, now, shift, inverse_scale, active, x_lengths, y_lengths, columns, row_sums,
    tau_a, n, m, count, parts, part_rows,
    RELAXED: tl.constexpr, RESIDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows' half of an iteration, and the part of these rows in the columns' half.

    Potentials are those stored, moved by `shift`; log_b is about -1e30 for columns without weight. Into columns
    [count, m] goes sum_i a_i exp((f_i + g_j + ahead_j - C_ij) / now), with the new f and the g stored: about 1 once
    g + ahead is -now log sum_i a_i exp((f_i - C_ij) / now). Into row_sums [2, count] go the rows' error and mass.
    """
    program = tl.program_id(0)
    p = (program // parts).to(tl.int64)
    if tl.load(active + p) == 0:
        return
    first = program % parts * part_rows
    rows, width = _extent(x_lengths, y_lengths, p, n, m)
    last = tl.minimum(first + part_rows, rows)
    cost += p * n * m
    a += p * n
    f += p * n
    log_b += p * m
    g += p * m
    if ahead is not None:
        ahead += p * m
    columns += tl.cast(program, tl.int64) * m
    eps = tl.load(now + p)
    inverse = 1.0 / eps
    move = tl.load(shift + p)
    factor = tl.load(inverse_scale + p)

    off = tl.zeros((ROWS,), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    if RESIDENT:
        j = tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            c = _load_costs(cost, i, j, last, width, m, y_lengths is not None)
            potential = tl.load(g + j, mask=j < m, other=0.0) - move
            x = (potential[None, :] - c * factor) * inverse
            log_weight = tl.load(log_b + j, mask=j < m, other=_ABSENT)[None, :]
            top = tl.max(x + log_weight, 1)
            row_total = tl.sum(tl.exp(x + log_weight - top[:, None]), 1)
            row_weight = tl.load(a + i, mask=i < last, other=0.0)
            f_old = tl.load(f + i, mask=i < last, other=0.0) + move
            f_new, row_off, row_mass = _new_row(top, row_total, row_weight, f_old, eps, tau_a, RELAXED)
            off += row_off
            mass += row_mass
            tl.store(f + i, f_new, mask=i < last)
            z = x + ((f_new + move) * inverse)[:, None]
            if ahead is not None:
                z += (tl.load(ahead + j, mask=j < m, other=0.0) * inverse)[None, :]
            total += tl.sum(tl.exp(tl.minimum(z, _TOP_EXPONENT)) * row_weight[:, None], 0)
        tl.store(columns + j, total, mask=j < m)
    else:
        for begin in range(0, width, COLUMNS):
            j = begin + tl.arange(0, COLUMNS)
            tl.store(columns + j, tl.zeros((COLUMNS,), tl.float32), mask=j < m)
        tl.debug_barrier()
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            top = tl.zeros((ROWS,), tl.float32) + _ABSENT
            row_total = tl.zeros((ROWS,), tl.float32)
            for begin in range(0, width, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                c = _load_costs(cost, i, j, last, width, m, y_lengths is not None)
                potential = tl.load(g + j, mask=j < m, other=0.0) - move
                log_weight = tl.load(log_b + j, mask=j < m, other=_ABSENT)
                x = (potential[None, :] - c * factor) * inverse + log_weight[None, :]
                higher = tl.maximum(top, tl.max(x, 1))
                here = tl.sum(tl.exp(x - higher[:, None]), 1)
                row_total = row_total * tl.exp(top - higher) + here
                top = higher
            row_weight = tl.load(a + i, mask=i < last, other=0.0)
            f_old = tl.load(f + i, mask=i < last, other=0.0) + move
            f_new, row_off, row_mass = _new_row(top, row_total, row_weight, f_old, eps, tau_a, RELAXED)
            off += row_off
            mass += row_mass
            tl.store(f + i, f_new, mask=i < last)
            for begin in range(0, width, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                c = _load_costs(cost, i, j, last, width, m, y_lengths is not None)
                potential = tl.load(g + j, mask=j < m, other=0.0)
                if ahead is not None:
                    potential += tl.load(ahead + j, mask=j < m, other=0.0)
                z = (potential[None, :] - c * factor) * inverse + (f_new * inverse)[:, None]
                share = tl.sum(tl.exp(tl.minimum(z, _TOP_EXPONENT)) * row_weight[:, None], 0)
                tl.store(columns + j, tl.load(columns + j, mask=j < m, other=0.0) + share, mask=j < m)
            tl.debug_barrier()  # the next rows' thread for a column may be another one
    tl.store(row_sums + program, tl.sum(off, 0))
    tl.store(row_sums + count + program, tl.sum(mass, 0))


@triton.jit
def _columns(
    b, g, ahead, now, active, y_lengths, columns, column_sums, tau_b, m, count, parts, blocks,
    RELAXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns' half of an iteration; into column_sums [2, count] their mass and whether any sum left the range.

    Where relaxed, `ahead` is what the relaxation keeps g from going further.
    """
    program = tl.program_id(0)
    p = (program // blocks).to(tl.int64)
    if tl.load(active + p) == 0:
        return
    width = m
    if y_lengths is not None:
        width = tl.load(y_lengths + p).to(tl.int32)
    j = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = j < width
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(columns + (p * parts + part) * m + j, mask=inside, other=0.0)
    eps = tl.load(now + p)
    at = p * m + j
    potential = tl.load(g + at, mask=inside, other=0.0) - eps * tl.log(tl.maximum(total, _TINY))
    mass = tl.load(b + at, mask=inside, other=0.0)
    if RELAXED:
        bound = potential + tl.load(ahead + at, mask=inside, other=0.0)
        potential = bound * (tau_b / (tau_b + eps))
        mass = mass * tl.exp(tl.minimum(-potential / tau_b, _TOP_EXPONENT))
        tl.store(ahead + at, bound - potential, mask=inside)
    tl.store(g + at, potential, mask=inside)
    lost = inside & ((total > 1 / _IN_RANGE) & (total < _IN_RANGE) == 0)
    tl.store(column_sums + program, tl.sum(mass, 0))
    tl.store(column_sums + count + program, tl.max(lost.to(tl.float32), 0))


@triton.jit
def _total(values, first, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(values + first + k, mask=k < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _decide(
    now, target, shift, active, clean, iterations, row_sums, column_sums,
    tolerance, anneal_tolerance, anneal_factor, constant_rate, max_iterations, row_count, parts, column_count, blocks,
    RELAXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """After an iteration of a problem: is it done, what is the next eps, by how much do the potentials move."""
    p = tl.program_id(0)
    if tl.load(active + p) == 0:
        return
    mass = _total(row_sums + row_count, p * parts, parts, BLOCK)
    error = _total(row_sums, p * parts, parts, BLOCK) / mass
    lost = _total(column_sums + column_count, p * blocks, blocks, BLOCK)
    eps = tl.load(now + p)
    last = tl.load(target + p)
    done = (error < tolerance) & (eps <= last) & (lost == 0)
    iteration = tl.load(iterations + p) + 1
    going = (done == 0) & (iteration < max_iterations)
    move = 0.0
    if RELAXED:
        column_mass = _total(column_sums, p * blocks, blocks, BLOCK)
        ratio = tl.maximum(mass, _TINY) / tl.maximum(column_mass, _TINY)
        move = tl.where(going, tl.log(ratio) * constant_rate, 0.0)
    tl.store(shift + p, move)
    tl.store(iterations + p, iteration)
    tl.store(clean + p, (lost == 0).to(tl.int32))
    tl.store(now + p, tl.where(going & (error < anneal_tolerance), tl.maximum(eps * anneal_factor, last), eps))
    tl.store(active + p, going.to(tl.int32))


@triton.jit
def _entries(c, f, potential, inverse, COSTS: tl.constexpr):
    """E [i, j] of scaled costs, times the costs themselves where COSTS."""
    e = tl.exp(tl.minimum((f[:, None] + potential[None, :] - c) * inverse, _LARGEST_EXPONENT))
    return e * c if COSTS else e


@triton.jit
def _sweep(
    cost, f, g, eps, inverse_scale, x_lengths, y_lengths, right, offset, slope, dots, columns,
    n, m, parts, part_rows,
    COSTS: tl.constexpr, RESIDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dots_i = sum_j E_ij right_j [B, n] and, with columns [B * parts, m], the parts of sum_i E_ij (offset_i + slope_i
    dots_i); `right` is 0 past the lengths. COSTS takes E o C for E."""
    program = tl.program_id(0)
    p = (program // parts).to(tl.int64)
    first = program % parts * part_rows
    rows, width = _extent(x_lengths, y_lengths, p, n, m)
    last = tl.minimum(first + part_rows, rows)
    cost += p * n * m
    f += p * n
    dots += p * n
    g += p * m
    right += p * m
    if columns is not None:
        columns += tl.cast(program, tl.int64) * m
        offset += p * n
        slope += p * n
    inverse = 1.0 / tl.load(eps + p)
    factor = tl.load(inverse_scale + p)
    if RESIDENT:
        j = tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            c = _load_costs(cost, i, j, last, width, m, y_lengths is not None) * factor
            level = tl.load(f + i, mask=i < last, other=0.0)
            potential = tl.load(g + j, mask=j < m, other=0.0)
            e = _entries(c, level, potential, inverse, COSTS)
            dot = tl.sum(e * tl.load(right + j, mask=j < m, other=0.0)[None, :], 1)
            tl.store(dots + i, dot, mask=i < last)
            if columns is not None:
                scale = tl.load(slope + i, mask=i < last, other=0.0)
                weight = tl.load(offset + i, mask=i < last, other=0.0) + scale * dot
                total += tl.sum(e * tl.where(i < last, weight, 0.0)[:, None], 0)
        if columns is not None:
            tl.store(columns + j, total, mask=j < m)
    else:
        if columns is not None:
            for begin in range(0, width, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                tl.store(columns + j, tl.zeros((COLUMNS,), tl.float32), mask=j < m)
            tl.debug_barrier()
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            level = tl.load(f + i, mask=i < last, other=0.0)
            dot = tl.zeros((ROWS,), tl.float32)
            for begin in range(0, width, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                c = _load_costs(cost, i, j, last, width, m, y_lengths is not None) * factor
                e = _entries(c, level, tl.load(g + j, mask=j < m, other=0.0), inverse, COSTS)
                dot += tl.sum(e * tl.load(right + j, mask=j < m, other=0.0)[None, :], 1)
            tl.store(dots + i, dot, mask=i < last)
            if columns is not None:
                scale = tl.load(slope + i, mask=i < last, other=0.0)
                weight = tl.load(offset + i, mask=i < last, other=0.0) + scale * dot
                weight = tl.where(i < last, weight, 0.0)
                for begin in range(0, width, COLUMNS):
                    j = begin + tl.arange(0, COLUMNS)
                    c = _load_costs(cost, i, j, last, width, m, y_lengths is not None) * factor
                    e = _entries(c, level, tl.load(g + j, mask=j < m, other=0.0), inverse, COSTS)
                    share = tl.sum(e * weight[:, None], 0)
                    tl.store(columns + j, tl.load(columns + j, mask=j < m, other=0.0) + share, mask=j < m)
                tl.debug_barrier()  # the next rows' thread for a column may be another one


@triton.jit
def _add_parts(columns, sums, y_lengths, m, parts, blocks, BLOCK: tl.constexpr):
    """The parts [B * parts, m] of each problem's columns added in their order, 0 past the lengths: sums [B, m]."""
    program = tl.program_id(0)
    p = (program // blocks).to(tl.int64)
    width = m
    if y_lengths is not None:
        width = tl.load(y_lengths + p).to(tl.int32)
    j = program % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(columns + (p * parts + part) * m + j, mask=j < width, other=0.0)
    tl.store(sums + p * m + j, total, mask=j < m)


@triton.jit
def _cost_gradient(
    cost, a, b, f, g, eps, inverse_scale, x_lengths, y_lengths, row_adjoint, column_adjoint, flat, sloped,
    gradient, along, largest, top, n, m, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d / d scaled cost, E_ij (row_i b_j + a_i column_j + a_i b_j (flat - sloped C_ij)), 0 past the lengths.

    With `along` also its products with the scaled costs, summed over each row; with `largest` how many costs of the row
    are the `top` of their problem.
    """
    program = tl.program_id(0)
    p = (program // blocks).to(tl.int64)
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    rows, width = _extent(x_lengths, y_lengths, p, n, m)
    cost += p * n * m
    gradient += p * n * m
    at = p * n + i
    level = tl.load(f + at, mask=i < rows, other=0.0)
    weight = tl.load(a + at, mask=i < rows, other=0.0)
    adjoint = tl.load(row_adjoint + at, mask=i < rows, other=0.0)
    inverse = 1.0 / tl.load(eps + p)
    factor = tl.load(inverse_scale + p)
    constant = tl.load(flat + p)
    rate = tl.load(sloped + p)
    dot = tl.zeros((ROWS,), tl.float32)
    hits = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, m, COLUMNS):
        j = begin + tl.arange(0, COLUMNS)
        inside = (i < rows)[:, None] & (j < width)[None, :]
        raw = _load_costs(cost, i, j, rows, width, m, y_lengths is not None)
        c = raw * factor
        e = _entries(c, level, tl.load(g + p * m + j, mask=j < width, other=0.0), inverse, False)
        other = tl.load(b + p * m + j, mask=j < width, other=0.0)[None, :]
        moved = tl.load(column_adjoint + p * m + j, mask=j < width, other=0.0)[None, :]
        result = e * (adjoint[:, None] * other + weight[:, None] * (moved + other * (constant - rate * c)))
        result = tl.where(inside, result, 0.0)
        if along is not None:
            dot += tl.sum(result * c, 1)
        if largest is not None:
            hits += tl.sum((inside & (raw == tl.load(top + p))).to(tl.float32), 1)
        exists = (i < n)[:, None] & (j < m)[None, :]
        tl.store(gradient + i.to(tl.int64)[:, None] * m + j[None, :], result, mask=exists)
    if along is not None:
        tl.store(along + at, dot, mask=i < n)
    if largest is not None:
        tl.store(largest + at, hits, mask=i < n)


@triton.jit
def _unscale(
    cost, gradient, inverse_scale, share, top, x_lengths, y_lengths, n, m, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From d / d scaled cost to d / d cost, in place: each of those that made the scale (with `top`, those equal to it)
    also takes a share of the scale's gradient."""
    program = tl.program_id(0)
    p = (program // blocks).to(tl.int64)
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    rows, width = _extent(x_lengths, y_lengths, p, n, m)
    factor = tl.load(inverse_scale + p)
    extra = tl.load(share + p)
    for begin in range(0, width, COLUMNS):
        j = begin + tl.arange(0, COLUMNS)
        inside = (i < rows)[:, None] & (j < width)[None, :]
        at = gradient + p * n * m + i.to(tl.int64)[:, None] * m + j[None, :]
        made = inside
        if top is not None:
            made = inside & (
                _load_costs(cost + p * n * m, i, j, rows, width, m, y_lengths is not None) == tl.load(top + p)
            )
        result = tl.load(at, mask=inside, other=0.0) * factor + tl.where(made, extra, 0.0)
        tl.store(at, result, mask=inside)


@triton.jit
def _add_terms(top, total, x, AXIS: tl.constexpr):
    """Adds the exp(x) along AXIS to total exp(top), whose top is the largest exponent so far."""
    higher = tl.maximum(top, tl.max(x, AXIS))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(x - tl.expand_dims(higher, AXIS)), AXIS)


@triton.jit
def _log_sum(top, total):
    """log(total exp(top)): -infinity where nothing has been added."""
    nothing = total == 0
    return tl.where(nothing, -float("inf"), top + tl.log(tl.where(nothing, 1.0, total)))


@triton.jit
def _alternate(
    cost, log_a, potential, rows, tops, sums, share_a, n, m, parts, part_rows,
    RESIDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """rows_i = log sum_j exp(potential_j - C_ij), and the part of these rows in sum_i exp(log_a_i - share_a rows_i -
    C_ij): sums exp(tops), both [P * parts, m]."""
    program = tl.program_id(0)
    p = (program // parts).to(tl.int64)
    first = program % parts * part_rows
    last = tl.minimum(first + part_rows, n)
    cost += p * n * m
    log_a += p * n
    rows += p * n
    potential += p * m
    tops += tl.cast(program, tl.int64) * m
    sums += tl.cast(program, tl.int64) * m
    if RESIDENT:
        j = tl.arange(0, COLUMNS)
        top = tl.zeros((COLUMNS,), tl.float32) + _ABSENT
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            c = _load_costs(cost, i, j, last, m, m, False)
            level = tl.load(potential + j, mask=j < m, other=-float("inf"))
            row_top = tl.zeros((ROWS,), tl.float32) + _ABSENT
            row_top, row_total = _add_terms(row_top, tl.zeros((ROWS,), tl.float32), level[None, :] - c, 1)
            row = _log_sum(row_top, row_total)
            tl.store(rows + i, row, mask=i < last)
            row_level = tl.load(log_a + i, mask=i < last, other=-float("inf")) - share_a * row
            top, total = _add_terms(top, total, row_level[:, None] - c, 0)
        tl.store(tops + j, top, mask=j < m)
        tl.store(sums + j, total, mask=j < m)
    else:
        for begin in range(0, m, COLUMNS):
            j = begin + tl.arange(0, COLUMNS)
            tl.store(tops + j, tl.zeros((COLUMNS,), tl.float32) + _ABSENT, mask=j < m)
            tl.store(sums + j, tl.zeros((COLUMNS,), tl.float32), mask=j < m)
        tl.debug_barrier()
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            row_top = tl.zeros((ROWS,), tl.float32) + _ABSENT
            row_total = tl.zeros((ROWS,), tl.float32)
            for begin in range(0, m, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                c = _load_costs(cost, i, j, last, m, m, False)
                level = tl.load(potential + j, mask=j < m, other=-float("inf"))
                row_top, row_total = _add_terms(row_top, row_total, level[None, :] - c, 1)
            row = _log_sum(row_top, row_total)
            tl.store(rows + i, row, mask=i < last)
            row_level = tl.load(log_a + i, mask=i < last, other=-float("inf")) - share_a * row
            for begin in range(0, m, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                c = _load_costs(cost, i, j, last, m, m, False)
                top = tl.load(tops + j, mask=j < m, other=0.0)
                total = tl.load(sums + j, mask=j < m, other=0.0)
                top, total = _add_terms(top, total, row_level[:, None] - c, 0)
                tl.store(tops + j, top, mask=j < m)
                tl.store(sums + j, total, mask=j < m)
            tl.debug_barrier()  # the next rows' thread for a column may be another one


@triton.jit
def _alternate_columns(log_b, tops, sums, columns, potential, share_b, m, parts, blocks, BLOCK: tl.constexpr):
    """The columns' normalisers [P, m], of which each part of the rows knows its own terms, and potentials."""
    program = tl.program_id(0)
    p = (program // blocks).to(tl.int64)
    j = program % blocks * BLOCK + tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32) + _ABSENT
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        at = (p * parts + part) * m + j
        other = tl.load(tops + at, mask=j < m, other=_ABSENT)
        higher = tl.maximum(top, other)
        total *= tl.exp(top - higher)
        total += tl.load(sums + at, mask=j < m, other=0.0) * tl.exp(other - higher)
        top = higher
    column = _log_sum(top, total)
    tl.store(columns + p * m + j, column, mask=j < m)
    tl.store(potential + p * m + j, tl.load(log_b + p * m + j, mask=j < m, other=0.0) - share_b * column, mask=j < m)


@triton.jit
def _column_flow(c, row_level, columns, gradient, share_b, j, m):
    """What the gradient to the columns' potentials puts on the costs."""
    column = tl.load(columns + j, mask=j < m, other=float("inf"))
    arrived = share_b * tl.load(gradient + j, mask=j < m, other=0.0)
    return tl.exp(row_level[:, None] - c - column[None, :]) * arrived[None, :]


@triton.jit
def _row_flow(c, row, moved, potential, j, m):
    """What the gradient `moved` to the rows' normalisers puts on the costs, but for its sign."""
    level = tl.load(potential + j, mask=j < m, other=-float("inf"))
    return tl.exp(level[None, :] - c - row[:, None]) * moved[:, None]


@triton.jit
def _store_flow(cost_gradient, flow, i, j, last, m, ADD: tl.constexpr):
    at = cost_gradient + i.to(tl.int64)[:, None] * m + j[None, :]
    inside = (i < last)[:, None] & (j < m)[None, :]
    if ADD:
        flow += tl.load(at, mask=inside, other=0.0)
    tl.store(at, flow, mask=inside)


@triton.jit
def _alternate_back(
    cost, log_a, potential, rows, columns, gradient, cost_gradient, parts_before, share_a, share_b,
    n, m, parts, part_rows,
    ADD: tl.constexpr, RESIDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient to the costs from the one to the potentials after an iteration, [P, m], with ADD on top of what
    later iterations gave; parts [P * parts, m] of the gradient to the potentials before it."""
    program = tl.program_id(0)
    p = (program // parts).to(tl.int64)
    first = program % parts * part_rows
    last = tl.minimum(first + part_rows, n)
    cost += p * n * m
    cost_gradient += p * n * m
    log_a += p * n
    rows += p * n
    potential += p * m
    columns += p * m
    gradient += p * m
    parts_before += tl.cast(program, tl.int64) * m
    if RESIDENT:
        j = tl.arange(0, COLUMNS)
        before = tl.zeros((COLUMNS,), tl.float32)
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            c = _load_costs(cost, i, j, last, m, m, False)
            row = tl.load(rows + i, mask=i < last, other=float("inf"))
            row_level = tl.load(log_a + i, mask=i < last, other=-float("inf")) - share_a * row
            flow = _column_flow(c, row_level, columns, gradient, share_b, j, m)
            back = _row_flow(c, row, -share_a * tl.sum(flow, 1), potential, j, m)
            before -= tl.sum(back, 0)
            _store_flow(cost_gradient, flow + back, i, j, last, m, ADD)
        tl.store(parts_before + j, before, mask=j < m)
    else:
        for begin in range(0, m, COLUMNS):
            j = begin + tl.arange(0, COLUMNS)
            tl.store(parts_before + j, tl.zeros((COLUMNS,), tl.float32), mask=j < m)
        tl.debug_barrier()
        for start in range(first, last, ROWS):
            i = start + tl.arange(0, ROWS)
            row = tl.load(rows + i, mask=i < last, other=float("inf"))
            row_level = tl.load(log_a + i, mask=i < last, other=-float("inf")) - share_a * row
            sent = tl.zeros((ROWS,), tl.float32)
            for begin in range(0, m, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                c = _load_costs(cost, i, j, last, m, m, False)
                sent += tl.sum(_column_flow(c, row_level, columns, gradient, share_b, j, m), 1)
            for begin in range(0, m, COLUMNS):
                j = begin + tl.arange(0, COLUMNS)
                c = _load_costs(cost, i, j, last, m, m, False)
                flow = _column_flow(c, row_level, columns, gradient, share_b, j, m)
                back = _row_flow(c, row, -share_a * sent, potential, j, m)
                _store_flow(cost_gradient, flow + back, i, j, last, m, ADD)
                before = tl.load(parts_before + j, mask=j < m, other=0.0) - tl.sum(back, 0)
                tl.store(parts_before + j, before, mask=j < m)
            tl.debug_barrier()  # the next rows' thread for a column may be another one


def solve(problem: Problem) -> Solution:
    """Alternating updates of f and g, each problem until its own stopping test is met."""
    with torch.cuda.device_of(problem.cost):
        return _Run(problem).solve()


def gradients(problem: Problem, f: Tensor, g: Tensor, scale: Tensor, arrived: Cotangents) -> Gradients:
    """Gradients by the envelope theorem for the value, by implicit differentiation for all else (README)."""
    with torch.cuda.device_of(problem.cost):
        return _Run(problem).gradients(f.contiguous(), g.contiguous(), scale, arrived)


def alternate(alternation: Alternation) -> tuple[Tensor, Tensor, Tensor]:
    """The last potential [P, M], and the normalisers of rows [iterations, P, N] and of columns [iterations, P, M]."""
    t, (P, N, M) = alternation, alternation.cost.shape
    partition, tiles = _launch(t.cost, plain=False)
    parts, blocks = partition["parts"], triton.cdiv(M, 128)
    rows, columns = t.cost.new_empty(t.iterations, P, N), t.cost.new_empty(t.iterations, P, M)
    tops, sums = t.cost.new_empty(2, P * parts, M)
    potential = torch.empty_like(t.start)
    with torch.cuda.device_of(t.cost):
        for step in range(t.iterations):
            before = potential if step else t.start
            _alternate[(P * parts,)](t.cost, t.log_a, before, rows[step], tops, sums, t.share_a, **partition, **tiles)
            _alternate_columns[(P * blocks,)](
                t.log_b, tops, sums, columns[step], potential, t.share_b, M, parts, blocks, BLOCK=128
            )
    return potential, rows, columns


def alternate_gradient(alternation: Alternation, rows: Tensor, columns: Tensor, gradient: Tensor) -> Tensor:
    """The gradient to the costs [P, N, M], from the one to the last potential [P, M]: the iterations once more,
    backwards."""
    t, (P, _, M) = alternation, alternation.cost.shape
    partition, tiles = _launch(t.cost, plain=False)
    parts, blocks = partition["parts"], triton.cdiv(M, 128)
    result, parts_before = torch.empty_like(t.cost), t.cost.new_empty(P * parts, M)
    potentials = torch.cat([t.start.unsqueeze(0), t.log_b - t.share_b * columns[:-1]])  # before each iteration
    with torch.cuda.device_of(t.cost):
        for step in reversed(range(t.iterations)):
            _alternate_back[(P * parts,)](
                t.cost,
                t.log_a,
                potentials[step],
                rows[step],
                columns[step],
                gradient,
                result,
                parts_before,
                t.share_a,
                t.share_b,
                **partition,
                ADD=step < t.iterations - 1,
                **tiles,
            )
            if step:
                gradient = torch.empty_like(t.start)
                _add_parts[(P * blocks,)](parts_before, gradient, None, M, parts, blocks, BLOCK=128)
    return result


class Geometry(NamedTuple):
    """How a sweep over rows of `m` costs runs."""

    resident: bool
    """Whether a whole row is in registers."""
    rows: int
    columns: int
    """Of a tile."""
    warps: int

    @staticmethod
    def of(m: int, *, plain: bool) -> Geometry:
        """`plain` problems are balanced and of equal sizes."""
        if m > (RESIDENT_COLUMNS if plain else RESIDENT_COLUMNS_OF_OTHERS):
            return Geometry(False, *STREAMED_TILE, 8)
        columns = max(SMALL_COLUMNS, triton.next_power_of_2(m))
        return Geometry(True, min(8, max(1, TILE // columns)), columns, min(8, max(4, columns // 1024)))


def _launch(cost: Tensor, *, plain: bool) -> tuple[dict[str, int], dict[str, int]]:
    """How rows of costs [B, n, m] are shared by programs, and the tiles in which each sees its own: as kernels take
    them."""
    B, n, m = cost.shape
    shape = Geometry.of(m, plain=plain)
    # Enough programs for all multiprocessors, each of which has room for some.
    cuda = cost.device.type == "cuda"
    processors = torch.cuda.get_device_properties(cost.device).multi_processor_count if cuda else 1
    wanted = max(1, processors * (TILE * 4 // (shape.rows * shape.columns)) // max(1, B))
    part_rows = triton.cdiv(triton.cdiv(n, shape.rows), wanted) * shape.rows
    return (
        {"n": n, "m": m, "parts": triton.cdiv(n, part_rows), "part_rows": part_rows},
        {"RESIDENT": shape.resident, "ROWS": shape.rows, "COLUMNS": shape.columns, "num_warps": shape.warps},
    )


class _Run:
    """The operands as the kernels take them, and the order in which the kernels run."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.B, self.n, self.m = problem.cost.shape
        plain = problem.balanced and problem.x_lengths is None and problem.y_lengths is None
        self.partition, self.tiles = _launch(problem.cost, plain=plain)
        self.parts = self.partition["parts"]
        self.blocks = triton.cdiv(self.m, 128)
        self.row_blocks = triton.cdiv(self.n, 4)
        self.lengths = {"x_lengths": problem.x_lengths, "y_lengths": problem.y_lengths}
        self.sizes = {"n": self.n, "m": self.m}
        self.columns = self._empty(self.B * self.parts, self.m)
        self.log_b = problem.b.log().clamp(min=_ABSENT.value)

    def solve(self) -> Solution:
        problem, B = self.problem, self.B
        scale, low, high = self._inspect()
        eps = problem.eps
        spread = (high - low) / scale
        # Below the floor exponents overflow: such a problem is solved at the floor, and reported as not converged.
        limits = torch.finfo(torch.float32)
        floor = torch.maximum(low.abs(), high.abs()) / scale.abs() / limits.max**0.5
        target = torch.maximum(eps, floor).clamp(min=limits.tiny)
        now = torch.where(spread > ANNEAL_ABOVE * target, spread / ANNEAL_START, target)
        active = (scale > 0).to(torch.int32)
        iterations, clean = torch.zeros_like(active), torch.ones_like(active)
        f, g, shift = torch.zeros_like(problem.a), torch.zeros_like(problem.b), torch.zeros_like(eps)
        ahead = None if math.isinf(problem.tau_b) else torch.zeros_like(g)
        inverse_scale = 1 / scale
        row_sums, column_sums = self._empty(2, B * self.parts), self._empty(2, B * self.blocks)
        for start in range(0, problem.max_iterations, CHECK_EVERY):
            for _ in range(min(CHECK_EVERY, problem.max_iterations - start)):
                self._iterate(f, g, ahead, now, shift, inverse_scale, active, row_sums)
                self._update_columns(g, ahead, now, active, column_sums)
                self._decide(now, target, shift, active, clean, iterations, row_sums, column_sums)
            if not bool(active.any()):
                break
        return self._finished(f, g, scale, iterations, (clean == 1) & (target == eps))

    def _inspect(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, smallest and largest cost of each problem."""
        problem, count = self.problem, self.B * self.parts
        extremes = self._empty(3, count)
        totals = torch.empty(count, dtype=torch.float64, device=extremes.device)
        _inspect[(count,)](
            problem.cost,
            **self.lengths,
            extremes=extremes,
            totals=totals,
            count=count,
            **self.partition,
            ROWS=4,
            COLUMNS=ELEMENTWISE_COLUMNS,
        )
        low, high, bad = extremes.view(3, self.B, self.parts).unbind()
        check_cost_values(problem.cost_name, bad.amax(1) == 0)
        low, high = low.amin(1), high.amax(1)
        scale = torch.ones_like(problem.eps)
        if problem.scale_cost == "mean":
            scale = (totals.view(self.B, self.parts).sum(1) / self._pairs()).float()
        elif problem.scale_cost == "max":
            scale = high
        return torch.where(scale == 0, 1.0, scale), low, high

    def _pairs(self) -> Tensor | int:
        """How many costs of each problem exist."""
        n = self.n if self.problem.x_lengths is None else self.problem.x_lengths
        m = self.m if self.problem.y_lengths is None else self.problem.y_lengths
        return n * m

    def _iterate(
        self,
        f: Tensor,
        g: Tensor,
        ahead: Tensor | None,
        now: Tensor,
        shift: Tensor,
        inverse_scale: Tensor,
        active: Tensor,
        row_sums: Tensor,
    ) -> None:
        problem = self.problem
        _iterate[(self.B * self.parts,)](
            problem.cost,
            problem.a,
            self.log_b,
            f,
            g,
            ahead,
            now,
            shift,
            inverse_scale,
            active,
            **self.lengths,
            columns=self.columns,
            row_sums=row_sums,
            tau_a=_finite(problem.tau_a),
            count=self.B * self.parts,
            **self.partition,
            RELAXED=not math.isinf(problem.tau_a),
            **self.tiles,
        )

    def _update_columns(
        self, g: Tensor, ahead: Tensor | None, now: Tensor, active: Tensor, column_sums: Tensor
    ) -> None:
        problem = self.problem
        _columns[(self.B * self.blocks,)](
            problem.b,
            g,
            ahead,
            now,
            active,
            problem.y_lengths,
            self.columns,
            column_sums,
            _finite(problem.tau_b),
            self.m,
            self.B * self.blocks,
            self.parts,
            self.blocks,
            RELAXED=not math.isinf(problem.tau_b),
            BLOCK=128,
        )

    def _decide(
        self,
        now: Tensor,
        target: Tensor,
        shift: Tensor,
        active: Tensor,
        clean: Tensor,
        iterations: Tensor,
        row_sums: Tensor,
        column_sums: Tensor,
    ) -> None:
        problem = self.problem
        _decide[(self.B,)](
            now,
            target,
            shift,
            active,
            clean,
            iterations,
            row_sums,
            column_sums,
            problem.tolerance,
            ANNEAL_TOLERANCE,
            ANNEAL_FACTOR,
            0.0 if problem.balanced else 1 / (1 / problem.tau_a + 1 / problem.tau_b),
            problem.max_iterations,
            self.B * self.parts,
            self.parts,
            self.B * self.blocks,
            self.blocks,
            RELAXED=not problem.balanced,
            BLOCK=128,
        )

    def _finished(self, f: Tensor, g: Tensor, scale: Tensor, iterations: Tensor, resolved: Tensor) -> Solution:
        problem = self.problem
        a, b, f_wide, g_wide = problem.a.double(), problem.b.double(), f.double(), g.double()
        if problem.balanced:  # the constant for which f and g share the value equally
            constant = ((b * g_wide).sum(-1) - (a * f_wide).sum(-1)) / (2 * a.sum(-1))
            f_wide, g_wide = f_wide + constant.unsqueeze(-1), g_wide - constant.unsqueeze(-1)
        f, g = self._zero_past_lengths(f_wide.float(), g_wide.float())
        inverse_scale = 1 / scale
        row_mass = a * self._sweep(f, g, inverse_scale, problem.b)[0]
        spent = a * self._sweep(f, g, inverse_scale, problem.b, costs=True)[0]
        wanted = a if math.isinf(problem.tau_a) else a * torch.exp(-f.double() / problem.tau_a)
        error = (row_mass - wanted).abs().sum(-1) / wanted.sum(-1)
        error = torch.where(error.isfinite(), error, torch.inf)
        surplus = row_mass.sum(-1) - a.sum(-1) * b.sum(-1)
        value = (a * _marginal_slope(f.double(), problem.tau_a)).sum(-1) - problem.eps * surplus
        value = value + (b * _marginal_slope(g.double(), problem.tau_b)).sum(-1)
        return Solution(
            value.float(),
            spent.sum(-1).float(),
            f,
            g,
            scale,
            error.float(),
            iterations,
            (error <= problem.tolerance) & resolved,
        )

    def _zero_past_lengths(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        problem = self.problem
        if problem.x_lengths is not None:
            rows = rows.masked_fill(~existing(problem.x_lengths, self.B, self.n, rows.device), 0.0)
        if problem.y_lengths is not None:
            columns = columns.masked_fill(~existing(problem.y_lengths, self.B, self.m, rows.device), 0.0)
        return rows.contiguous(), columns.contiguous()

    def _sweep(
        self,
        f: Tensor,
        g: Tensor,
        inverse_scale: Tensor,
        right: Tensor,
        offset: Tensor | None = None,
        slope: Tensor | None = None,
        *,
        costs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """sum_j E_ij right_j [B, n], call it dots, and sum_i E_ij (offset_i + slope_i dots_i) [B, m], an empty tensor
        where neither is given. One read of the costs. 0 past the lengths."""
        dots = torch.zeros_like(f)
        both = offset is not None or slope is not None
        nothing = torch.zeros_like(f) if both else None
        _sweep[(self.B * self.parts,)](
            self.problem.cost,
            f,
            g,
            self.eps,
            inverse_scale,
            **self.lengths,
            right=right.contiguous(),
            offset=nothing if offset is None else offset.contiguous(),
            slope=nothing if slope is None else slope.contiguous(),
            dots=dots,
            columns=self.columns if both else None,
            **self.partition,
            COSTS=costs,
            **self.tiles,
        )
        if not both:
            return dots, dots.new_empty(0)
        sums = torch.empty_like(g)
        _add_parts[(self.B * self.blocks,)](
            self.columns, sums, self.problem.y_lengths, self.m, self.parts, self.blocks, BLOCK=128
        )
        return dots, sums

    @property
    def eps(self) -> Tensor:
        """No reciprocal of it overflows."""
        return self.problem.eps.clamp(min=torch.finfo(torch.float32).tiny)

    def gradients(self, f: Tensor, g: Tensor, scale: Tensor, arrived: Cotangents) -> Gradients:
        problem = self.problem
        a, b, eps, inverse_scale = problem.a, problem.b, problem.eps.unsqueeze(-1), 1 / scale
        rows, columns = self._sweep(f, g, inverse_scale, b, offset=a)
        row_adjoint, column_adjoint = torch.zeros_like(a), torch.zeros_like(b)
        a_gradient, b_gradient = torch.zeros_like(a), torch.zeros_like(b)
        flat = sloped = torch.zeros_like(problem.eps)
        if arrived.value is not None:
            upstream = arrived.value.unsqueeze(-1)
            flat = arrived.value
            a_gradient += upstream * (_marginal_slope(f, problem.tau_a) - eps * (rows - b.sum(-1, keepdim=True)))
            b_gradient += upstream * (_marginal_slope(g, problem.tau_b) - eps * (columns - a.sum(-1, keepdim=True)))
        if not (arrived.transport_cost is None and arrived.f is None and arrived.g is None):
            f_cotangent = torch.zeros_like(f) if arrived.f is None else arrived.f
            g_cotangent = torch.zeros_like(g) if arrived.g is None else arrived.g
            f_cotangent, g_cotangent = self._zero_past_lengths(f_cotangent, g_cotangent)
            if arrived.transport_cost is not None:
                upstream = arrived.transport_cost.unsqueeze(-1)
                flat, sloped = flat + arrived.transport_cost, arrived.transport_cost / problem.eps
                row_spent, column_spent = self._sweep(f, g, inverse_scale, b, offset=a, costs=True)
                f_cotangent = f_cotangent + upstream * a * row_spent / eps
                g_cotangent = g_cotangent + upstream * b * column_spent / eps
                a_gradient += upstream * row_spent
                b_gradient += upstream * column_spent
            if problem.balanced:  # through the choice of the constant between f and g
                excess = _total_of(f_cotangent) - _total_of(g_cotangent)
                excess = excess / (2 * a.sum(-1, keepdim=True))
                f_cotangent, g_cotangent = f_cotangent - a * excess, g_cotangent + b * excess
                a_gradient -= excess * f
                b_gradient += excess * g
            row_adjoint, column_adjoint = self._adjoint(f, g, inverse_scale, rows, columns, f_cotangent, g_cotangent)
            moved, moved_columns = self._sweep(f, g, inverse_scale, column_adjoint, offset=row_adjoint)
            a_gradient -= eps * moved
            b_gradient -= eps * moved_columns
        a_gradient, b_gradient = self._zero_past_lengths(a_gradient, b_gradient)
        gradient = self._cost_gradient(f, g, scale, row_adjoint, column_adjoint, flat, sloped, arrived.scale)
        return Gradients(gradient, a_gradient, b_gradient)

    def _adjoint(
        self,
        f: Tensor,
        g: Tensor,
        inverse_scale: Tensor,
        rows: Tensor,
        columns: Tensor,
        f_cotangent: Tensor,
        g_cotangent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Solves the transposed linearised optimality conditions for what the potentials' cotangents put on them.

        Conjugate gradients on the Schur complement of the columns, preconditioned by its diagonal part; a sweep each.
        """
        problem = self.problem
        a, b, eps = problem.a, problem.b, problem.eps.unsqueeze(-1)
        has_row, has_column = a > 0, b > 0
        row_slope, column_slope = rows * (1 + eps / problem.tau_a), columns * (1 + eps / problem.tau_b)
        # Points of weight 0 move no other; what lies on them is solved directly.
        row0 = torch.where(~has_row & (row_slope > 0), f_cotangent / row_slope, 0.0)
        column0 = torch.where(~has_column & (column_slope > 0), g_cotangent / column_slope, 0.0)
        inverse_row = torch.where(has_row & (row_slope > 0), 1 / row_slope, 0.0)
        diagonal = torch.where(has_column & (column_slope > 0), b * column_slope, 1.0)
        per_weight = torch.where(has_row, f_cotangent / torch.where(has_row, a, 1.0), 0.0)

        through_rows = a * inverse_row
        dots, sums = self._sweep(
            f, g, inverse_scale, column0, offset=row0 + through_rows * per_weight, slope=-through_rows
        )
        rest = torch.where(has_row, per_weight - dots, 0.0)
        residual = torch.where(has_column, g_cotangent - b * sums, 0.0)

        def without_constant(residual: Tensor) -> Tensor:
            if not problem.balanced:
                return residual
            # A constant is no direction: the residual has none of it but by rounding, which grows unless taken off.
            return residual - b * (_total_of(residual) / b.sum(-1, keepdim=True))

        residual = without_constant(residual)
        q = torch.zeros_like(residual)
        direction = residual / diagonal
        size = first = _total_of(residual * direction)
        small = torch.finfo(residual.dtype).eps ** 2
        for step in range(4 * (self.m + 25)):
            going = size > small * first
            if step % CHECK_EVERY == 0 and not bool(going.any()):
                break
            _, sums = self._sweep(f, g, inverse_scale, b * direction, slope=through_rows)
            applied = diagonal * direction - b * sums
            curvature = _total_of(direction * applied)
            going = going & (curvature > 0)
            length = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
            q = q + length * direction
            residual = without_constant(residual - length * applied)
            scaled = residual / diagonal
            new_size = torch.where(going, _total_of(residual * scaled), 0.0)
            direction = torch.where(going, scaled + new_size / torch.where(going, size, 1.0) * direction, direction)
            size = new_size
        dots, _ = self._sweep(f, g, inverse_scale, b * q)
        return row0 + through_rows * (rest - dots), column0 + b * q

    def _cost_gradient(
        self,
        f: Tensor,
        g: Tensor,
        scale: Tensor,
        row_adjoint: Tensor,
        column_adjoint: Tensor,
        flat: Tensor,
        sloped: Tensor,
        scale_gradient: Tensor | None,
    ) -> Tensor:
        problem, inverse_scale = self.problem, 1 / scale
        gradient = torch.empty_like(problem.cost)
        scaled, by_top = problem.scale_cost is not None, problem.scale_cost == "max"
        along = torch.empty_like(f) if scaled else None
        largest = torch.empty_like(f) if by_top else None
        block = {"blocks": self.row_blocks, "ROWS": 4, "COLUMNS": ELEMENTWISE_COLUMNS}
        _cost_gradient[(self.B * self.row_blocks,)](
            problem.cost,
            problem.a,
            problem.b,
            f,
            g,
            self.eps,
            inverse_scale,
            **self.lengths,
            row_adjoint=row_adjoint.contiguous(),
            column_adjoint=column_adjoint.contiguous(),
            flat=flat.contiguous(),
            sloped=sloped.contiguous(),
            gradient=gradient,
            along=along,
            largest=largest,
            top=scale if by_top else None,
            **self.sizes,
            **block,
        )
        if along is None:
            return gradient
        to_scale = -along.double().sum(-1) / scale
        if scale_gradient is not None:
            to_scale = to_scale + scale_gradient
        made = self._pairs() if largest is None else largest.double().sum(-1).clamp(min=1)
        _unscale[(self.B * self.row_blocks,)](
            problem.cost,
            gradient,
            inverse_scale,
            (to_scale / made).float(),
            scale if by_top else None,
            **self.lengths,
            **self.sizes,
            **block,
        )
        return gradient

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.problem.cost.device)


def _finite(tau: float) -> float:
    """What stands for the weight of a marginal that is a constraint, for which no kernel asks."""
    return 1.0 if math.isinf(tau) else tau


def _total_of(x: Tensor) -> Tensor:
    """The sum over points [B, 1], accumulated in fp64."""
    return x.sum(-1, keepdim=True, dtype=torch.float64).float()


def _marginal_slope(potential: Tensor, tau: float) -> Tensor:
    return potential if math.isinf(tau) else -tau * torch.expm1(-potential / tau)
