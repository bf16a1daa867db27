"""Launches the compiled kernels: torch multiplies blocks of rows, the epilogue makes losses and gradients of them.

One-sided losses take one sweep over blocks of queries. A block against all keys has its whole softmax in hand, so its
products are overwritten by the gradient with respect to them, and two more matrix products give the gradients of
queries and keys: three products in all, and no memory beyond one block.

Problems of few rows, such as the hidden states of a training step, are one call from features to slopes and one from
slopes to gradients, on CUDA a launch each: there our own kernels multiply, which need no packing, and take the
normalisation's part of the gradient along.

Where keys are anchors too (self-contrast, symmetric losses), no gradient can be formed before every row and column has
been seen. A first sweep collects what each anchor needs, a second one forms the gradient. A set against itself is
symmetric: only blocks on and above the diagonal are visited, which halves the products of each sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seer_kernels.contrastive.problem import (
    FORMS,
    SAME_LABEL,
    Gradients,
    PairSlopes,
    Problem,
    RowResults,
    Totals,
    Wanted,
    accumulation_dtype,
    no_anchors,
    no_slopes,
    row_weights,
    settle,
)

try:
    from seer_kernels import _native
except ImportError:  # seer_kernels.backends() says why; a call never gets here
    _native = None  # type: ignore[assignment]

BLOCK_BYTES = 16 << 20
"""Size of the products of a block: large enough for the library products to run at full rate."""

KEPT_BYTES = 32 << 20
"""Two sweeps keep the products of the first for the second if all of them take no more than this."""

CACHED_ROWS = 256
"""Problems of at most so many queries and keys are multiplied by our own kernels."""

FUSED_WORK = 1 << 29
"""On CUDA, only up to so many multiply-adds P N M D: beyond them the library's rate counts for more than launches."""

FEATURE_TYPES = {torch.bfloat16: 1, torch.float16: 2}
"""As `seer::FeatureType` numbers what the fused kernels widen as they read it, on CUDA."""

ROW_PLANES = len(RowResults._fields) + 2
"""`seer::RowPlane`: the results and what the gradients of temperature and bias are sums of."""

KEY_CHUNK = 1024
"""Keys widened to fp32 at a time, for features in half precision."""


ONLY_ON_CUDA = "on CUDA it computes one-sided info_nce only, of all keys at once"
SMALL_ON_CUDA = (
    f"of more than {CACHED_ROWS} queries or keys, or of more than {FUSED_WORK} multiply-adds, on CUDA it computes "
    "one-sided info_nce only"
)


def lacks(problem: Problem) -> str:
    """Why there is no kernel for a problem where it lives; empty where there is one."""
    everywhere = problem.query.device.type == "cpu" or (problem.form, problem.pairing.name) == ("softmax", "rows")
    return "" if everywhere or _is_small(problem) else SMALL_ON_CUDA


def lacks_parts(device: torch.device) -> str:
    """Why there are no kernels on a device for keys that come in parts: neither `statistics` and `slope_gradients`, nor
    sigmoid rows without a positive; empty where there are."""
    return ONLY_ON_CUDA if device.type == "cuda" else ""


def forward(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """Row results, and the gradients of `sum_i weights_i loss_i`."""
    return _evaluate(problem, problem.weights, wanted)


def backward(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of `sum_i row_gradient_i loss_i`."""
    gradients = _evaluate(problem, row_gradient, wanted)[1]
    if gradients.slopes is None:
        return gradients
    alone = problem.pairing.self_contrast
    query, key = gradients_from_slopes(problem.query, problem.key, gradients.slopes, None, alone, wanted[:2])
    return gradients._replace(query=query, key=key, slopes=None)


def keeps_slopes(device: torch.device, dtype: torch.dtype, P: int, N: int, M: int, D: int) -> bool:
    """Whether `forward` returns slopes: of small problems they take less memory than the gradients of the features."""
    small = 0 < max(N, M) <= CACHED_ROWS and P * N * M * accumulation_dtype(dtype).itemsize <= BLOCK_BYTES
    return small and (not _is_cuda(device) or 0 < P * N * M * D <= FUSED_WORK)


def _is_small(problem: Problem) -> bool:
    return keeps_slopes(problem.query.device, problem.query.dtype, *problem.sizes)


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def statistics(problem: Problem, anchors: Tensor) -> None:
    """Adds to what is known of the queries of a "softmax" problem (`Anchors`, [9, P, N]) what its keys tell of them."""
    sweep = _Sweep(problem, Wanted(False, False, False, False))
    for block, products in _parts(sweep, anchors):
        panel = _panel(sweep, block, products)
        _launch("row_statistics", anchors, panel, anchors=anchors.data_ptr())
        if problem.pairing.self_contrast and block.rows.stop < sweep.N:
            beyond = {"first": block.rows.stop, "last": sweep.N}
            _launch("column_statistics", anchors, panel, anchors=anchors.data_ptr(), **beyond)


def slope_gradients(problem: Problem, slopes: Tensor, wanted: Wanted) -> Gradients:
    """What the keys of a "softmax" problem add to the gradients of the features, given the `Slopes` [3, P, N] of the
    queries as anchors that saw these and other keys."""
    sweep = _Sweep(problem, wanted)
    column_slopes = slopes if problem.pairing.self_contrast else no_slopes(slopes)
    for block, products in _parts(sweep, slopes):
        addresses = {"row_slopes": slopes.data_ptr(), "column_slopes": column_slopes.data_ptr()}
        _launch("panel_gradient", slopes, _panel(sweep, block, products), **addresses)
        sweep.accumulate(block, products)
    return sweep.finished(None, None)


def _parts(sweep: _Sweep, like: Tensor) -> Iterator[tuple[_Block, Tensor]]:
    """Blocks and their products, which the next block overwrites."""
    blocks = list(sweep.blocks(max(1, BLOCK_BYTES // (sweep.M * like.element_size()))))
    buffer = like.new_empty(max(math.prod(sweep.shape(block)) for block in blocks))
    for block in blocks:
        products = buffer[: math.prod(sweep.shape(block))].view(sweep.shape(block))
        sweep.multiply(block, products)
        yield block, products


def _evaluate(problem: Problem, row_gradient: Tensor | None, wanted: Wanted) -> tuple[RowResults, Gradients]:
    if _is_small(problem):
        return _fused_loss(problem, row_gradient, wanted)
    if row_gradient is None:
        row_gradient = row_weights(problem)
    sweep = _Sweep(problem, wanted)
    if problem.pairing.self_contrast or problem.form == "symmetric":
        return _two_sweeps(sweep, row_gradient)
    return _one_sweep(sweep, row_gradient)


_RowSet = tuple[int, int, int, int]
"""`seer::RowSet`."""


class _Block(NamedTuple):
    """Some queries of some problems against the keys from `first_key` on."""

    problems: slice
    rows: slice
    first_key: int


class _Sweep:
    """The operands of a problem, its blocks, and the matrix products over a block."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        self.problem, self.wanted, self.dtype = problem, wanted, problem.dtype
        self.P, self.N, self.M, self.D = problem.sizes
        self.device = problem.query.device
        sets = [x for x in (problem.query, problem.key) if x is not None]
        # Zeros cost nothing until they are touched: every product is added.
        self.gradients = [
            torch.zeros(x.shape, dtype=self.dtype, device=self.device) if want else None
            for x, want in zip(sets, wanted[:2], strict=False)
        ]
        self.inverse_norms = [self._norms(x) for x in sets] if problem.normalize else []
        if problem.pairing.self_contrast:
            self.query_sets = self.key_sets = list(range(len(sets)))
            scales = [torch.cat(self.inverse_norms, 1)] * 2 if problem.normalize else []
        else:
            self.query_sets, self.key_sets = [0], [1]
            scales = self.inverse_norms
        self.sets, self.scales = sets, scales  # scales of queries and keys; none for raw products
        self.temperature, self.bias = self._on_device(problem.temperature), self._on_device(problem.bias)
        self.operands = _operands(problem, self.temperature, self.bias, *scales)

    def _on_device(self, scalar: Tensor | None) -> Tensor | None:
        if scalar is None or scalar.device == self.device:
            return scalar
        # A number: filling it in needs no synchronisation, a copy would.
        return torch.full((), scalar.item(), dtype=self.dtype, device=self.device)

    def _norms(self, features: Tensor) -> Tensor:
        """1 / |x| per row, 0 for a row of zeros: [P, rows]."""
        norm: Tensor = torch.linalg.vector_norm(features, dim=-1, dtype=self.dtype)
        return norm.masked_fill_(norm == 0, torch.inf).reciprocal_()

    @property
    def wants_features(self) -> bool:
        return any(self.wanted[:2])

    def blocks(self, rows: int) -> Iterator[_Block]:
        """Blocks of at most `rows` queries: several whole problems, or a part of one (and of one set)."""
        problems = max(1, rows // self.N)
        for p in range(0, self.P, problems):
            first = 0
            for which in self.query_sets:
                last = first + self.sets[which].shape[1]
                for r in range(first, last, rows):
                    first_key = r if self.problem.pairing.self_contrast else 0
                    yield _Block(slice(p, min(p + problems, self.P)), slice(r, min(r + rows, last)), first_key)
                first = last

    def shape(self, block: _Block) -> tuple[int, int, int]:
        """Shape of the products of a block: problems, rows, keys."""
        p, r, first_key = block
        return p.stop - p.start, r.stop - r.start, self.M - first_key

    def _pieces(self, which_sets: list[int], rows: slice) -> Iterator[tuple[int, slice, slice]]:
        """The rows of the concatenated sets, piece by piece: set, rows in it, and their place among `rows`."""
        first = 0
        for which in which_sets:
            count = self.sets[which].shape[1]
            start, stop = max(rows.start, first), min(rows.stop, first + count)
            step = max(1, stop - start) if self.sets[which].dtype == self.dtype else KEY_CHUNK
            for s in range(start, stop, step):
                e = min(s + step, stop)
                yield which, slice(s - first, e - first), slice(s - rows.start, e - rows.start)
            first += count

    def multiply(self, block: _Block, products: Tensor) -> None:
        """products = queries @ keys.T"""
        keys = slice(block.first_key, self.M)
        for q, query_rows, r in self._pieces(self.query_sets, block.rows):
            queries = self.sets[q][block.problems, query_rows].to(self.dtype)
            for k, key_rows, c in self._pieces(self.key_sets, keys):
                _multiply(products[:, r, c], queries, self.sets[k][block.problems, key_rows].to(self.dtype).mT)

    def accumulate(self, block: _Block, slopes: Tensor) -> None:
        """Adds to the gradients of queries and keys what follows from d total / d products.

        Of a set against itself, a block on the diagonal already holds both triangles: there only its rows gain.
        """
        keys = slice(block.first_key, self.M)
        beyond = slice(block.rows.stop, self.M) if self.problem.pairing.self_contrast else keys
        slopes_beyond = slopes[:, :, beyond.start - keys.start :]
        for q, query_rows, r in self._pieces(self.query_sets, block.rows):
            queries, query_gradient = self.sets[q][block.problems, query_rows].to(self.dtype), self.gradients[q]
            if query_gradient is not None:
                for k, key_rows, c in self._pieces(self.key_sets, keys):
                    piece = self.sets[k][block.problems, key_rows].to(self.dtype)
                    _multiply(query_gradient[block.problems, query_rows], slopes[:, r, c], piece, add=True)
            for k, key_rows, c in self._pieces(self.key_sets, beyond):
                key_gradient = self.gradients[k]
                if key_gradient is not None:
                    _multiply(key_gradient[block.problems, key_rows], slopes_beyond[:, r, c].mT, queries, add=True)

    def finished(self, temperature: Tensor | None, bias: Tensor | None) -> Gradients:
        """The gradients with respect to the features themselves, and to the scalars."""
        for which, gradient in enumerate(self.gradients):
            if gradient is not None and self.problem.normalize:
                _project(gradient, self.sets[which], self.inverse_norms[which])
        query, key = (*self.gradients, None)[:2]
        return Gradients(
            query,
            key,
            temperature if self.wanted.temperature else None,
            bias if self.wanted.bias else None,
        )


def _operands(
    problem: Problem,
    temperature: Tensor | None,
    bias: Tensor | None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
) -> Any:
    P, N, M, _ = problem.sizes
    return getattr(_native, f"Operands_{_suffix(problem.dtype)}")(
        P=P,
        N=N,
        M=M,
        query_scale=_address(query_scale),
        key_scale=_address(key_scale),
        temperature=_address(temperature),
        bias=_address(bias),
        query_labels=_address(problem.query_labels),
        key_labels=_address(problem.key_labels),
        weights=_address(problem.weights),
        shared_weights=problem.pairing.shared_weights,
        own_shift=problem.pairing.own_shift(N),
        self_contrast=problem.pairing.self_contrast,
        same_label=SAME_LABEL.index(problem.same_label),
    )


def _fused_loss(problem: Problem, row_gradient: Tensor | None, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """The whole loss in one call, up to the slopes; `row_gradient` [P, N], or None for ones."""
    P, N, M, D = problem.sizes
    alone, dtype = problem.pairing.self_contrast, problem.dtype
    sets = _readable(problem.query, problem.key)
    numbers = {"temperature": problem.temperature, "bias": problem.bias}
    there = {name: x if x is not None and x.device == sets[0].device else None for name, x in numbers.items()}
    operands = _operands(problem, **there)
    wants_slopes = any(wanted[:2])
    scratch = getattr(_native, f"fused_scratch{'_cuda' * (sets[0].device.type == 'cuda')}")
    sizes = {
        "scratch": (scratch(P=P, N=N, M=M, D=D, self_contrast=alone),),
        "rows": (ROW_PLANES, P, N),
        "slopes": (P, N, M),
        "along": (P, (N if alone else N + M) if problem.normalize and wants_slopes else 0),
        **dict.fromkeys(("total_loss", "total_weight", "mean_loss", "temperature_gradient", "bias_gradient"), (P,)),
    }
    results = {name: torch.empty(shape, dtype=dtype, device=sets[0].device) for name, shape in sizes.items()}
    query_set, key_set = _row_sets(sets, alone)
    _launch(
        "fused_loss",
        results["rows"],
        operands,
        query=query_set,
        key=key_set,
        D=D,
        feature_type=FEATURE_TYPES.get(sets[0].dtype, 0),
        form=FORMS.index(problem.form),
        normalize=problem.normalize,
        row_gradient=_address(row_gradient),
        write_slopes=wants_slopes,
        # A number is handed over as such; copying it to the device would wait.
        **{f"{name}_value": _number(x, there[name]) for name, x in numbers.items()},
        **{name: _address(x if x.numel() else None) for name, x in results.items()},
    )
    return RowResults(*results["rows"].unbind()[: len(RowResults._fields)]), Gradients(
        None,
        None,
        results["temperature_gradient"] if wanted.temperature else None,
        results["bias_gradient"] if wanted.bias else None,
        PairSlopes(results["slopes"], results["along"]) if wants_slopes else None,
        Totals(results["total_loss"], results["total_weight"], results["mean_loss"]),
    )


def _number(scalar: Tensor | None, on_device: Tensor | None) -> float:
    return 0.0 if scalar is None or on_device is not None else float(scalar)


def gradients_from_slopes(
    query: Tensor,
    key: Tensor | None,
    slopes: PairSlopes,
    scale: Tensor | None,
    self_contrast: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of queries and keys in one call, None where not `wanted`, times `scale` [P] if given; in the dtype of
    the features or in the accumulation dtype."""
    sets = _readable(query, key)
    gradients = [torch.empty_like(x) if w else None for x, w in zip(sets, wanted, strict=False)]
    query_set, key_set = _row_sets(sets, self_contrast)
    query_gradient, key_gradient = _row_sets(sets, self_contrast, gradients)
    _launch(
        "fused_gradients",
        slopes.slopes,
        P=query.shape[0],
        D=query.shape[2],
        query=query_set,
        key=key_set,
        query_gradient=query_gradient,
        key_gradient=key_gradient,
        feature_type=FEATURE_TYPES.get(sets[0].dtype, 0),
        self_contrast=self_contrast,
        slopes=slopes.slopes.data_ptr(),
        along=_address(slopes.along if slopes.along.numel() else None),
        scale=_address(scale),
    )
    return gradients[0], gradients[1] if key is not None else None


def _readable(query: Tensor, key: Tensor | None) -> list[Tensor]:
    """Sets of features as the fused kernels read them: contiguous, and on the CPU in the accumulation dtype."""
    dtype = query.dtype if _is_cuda(query.device) else accumulation_dtype(query.dtype)
    return [x.to(dtype).contiguous() for x in (query, key) if x is not None]


def _row_sets(
    sets: list[Tensor], self_contrast: bool, gradients: Sequence[Tensor | None] | None = None
) -> tuple[_RowSet, _RowSet]:
    """The queries and the keys, or the `gradients` of them in their place: of a set against itself all rows as both."""
    addresses = [_address(x) for x in (sets if gradients is None else gradients)]
    rows = [x.shape[1] for x in sets]
    if self_contrast:
        whole = (addresses[0], addresses[-1], rows[0], sum(rows))
        return whole, whole
    return (addresses[0], addresses[0], rows[0], rows[0]), (addresses[1], addresses[1], rows[1], rows[1])


def _one_sweep(sweep: _Sweep, row_gradient: Tensor) -> tuple[RowResults, Gradients]:
    rows = torch.zeros(ROW_PLANES, sweep.P, sweep.N, dtype=sweep.dtype, device=sweep.device)
    for block, products in _parts(sweep, rows):
        _launch(
            "contrastive_rows",
            rows,
            sweep.operands,
            products=products.data_ptr(),
            first_problem=block.problems.start,
            problem_count=products.shape[0],
            first_row=block.rows.start,
            row_count=products.shape[1],
            row_gradient=row_gradient.data_ptr(),
            write_gradient=sweep.wants_features,
            rows=rows.data_ptr(),
        )
        if sweep.wants_features:
            sweep.accumulate(block, products)
    *results, logit_dot, logit_sum = rows.unbind()
    gradients = sweep.finished(-logit_dot.sum(-1) / sweep.problem.temperature, logit_sum.sum(-1))
    return RowResults(*results), gradients


def _two_sweeps(sweep: _Sweep, row_gradient: Tensor) -> tuple[RowResults, Gradients]:
    N, M, temperature = sweep.N, sweep.M, sweep.problem.temperature
    alone = sweep.problem.pairing.self_contrast
    item = row_gradient.element_size()
    rows = max(1, BLOCK_BYTES // (M * item))
    if alone:
        rows = min(rows, max(128, N // 8))  # the fewer rows on the diagonal, the less is multiplied twice
    blocks = list(sweep.blocks(rows))
    sizes = [math.prod(sweep.shape(block)) for block in blocks]
    kept = sum(sizes) * item <= KEPT_BYTES
    buffer = row_gradient.new_empty(sum(sizes) if kept else max(sizes))
    starts = [sum(sizes[:b]) if kept else 0 for b in range(len(sizes))]
    panels = [
        buffer[start : start + size].view(sweep.shape(block))
        for start, size, block in zip(starts, sizes, blocks, strict=True)
    ]

    as_rows = no_anchors(sweep.problem)
    as_columns = as_rows if alone else no_anchors(sweep.problem)
    for block, products in zip(blocks, panels, strict=True):
        sweep.multiply(block, products)
        panel = _panel(sweep, block, products)
        _launch("row_statistics", buffer, panel, anchors=as_rows.data_ptr())
        first = block.rows.stop if alone else 0
        if first < N:
            _launch("column_statistics", buffer, panel, anchors=as_columns.data_ptr(), first=first, last=N)

    results, slopes, logit_dot = settle(as_rows, row_gradient if alone else row_gradient / 2, temperature)
    column_slopes = slopes
    if not alone:
        column_results, column_slopes, column_dot = settle(as_columns, row_gradient / 2, temperature)
        results = RowResults(*((a + b) / 2 for a, b in zip(results, column_results, strict=True)))
        logit_dot = logit_dot + column_dot

    for block, products in zip(blocks, panels, strict=True):
        if not sweep.wants_features:
            break
        if not kept:
            sweep.multiply(block, products)
        panel = _panel(sweep, block, products)
        _launch(
            "panel_gradient",
            buffer,
            panel,
            row_slopes=slopes.data_ptr(),
            column_slopes=column_slopes.data_ptr(),
        )
        sweep.accumulate(block, products)
    return results, sweep.finished(-logit_dot.sum(-1) / sweep.problem.temperature, None)


def _panel(sweep: _Sweep, block: _Block, products: Tensor) -> Any:
    return getattr(_native, f"Panel_{_suffix(sweep.dtype)}")(
        sweep.operands,
        products=products.data_ptr(),
        first_problem=block.problems.start,
        problem_count=products.shape[0],
        first_row=block.rows.start,
        row_count=products.shape[1],
        first_column=block.first_key,
        column_count=products.shape[2],
    )


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; for a single problem without the batch dimension, whose library path is slower."""
    if out.shape[0] == 1:
        torch.addmm(out[0], a[0], b[0], beta=int(add), out=out[0])
    else:
        torch.baddbmm(out, a, b, beta=int(add), out=out)


def _project(gradient: Tensor, x: Tensor, inverse_norm: Tensor) -> None:
    """Removes from each row of `gradient` its component along the row of `x`, in place."""
    rows, D = inverse_norm.numel(), x.shape[-1]
    chunk = rows if x.dtype == gradient.dtype else KEY_CHUNK
    gradient, x, inverse_norm = gradient.view(rows, D), x.reshape(rows, D), inverse_norm.view(rows)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        wide = x[part].to(gradient.dtype).contiguous()
        _launch(
            "project_rows",
            gradient,
            gradient=gradient[part].data_ptr(),
            x=wide.data_ptr(),
            inverse_norm=inverse_norm[part].data_ptr(),
            rows=part.stop - part.start,
            D=D,
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _suffix(dtype: torch.dtype) -> str:
    return "f64" if dtype == torch.float64 else "f32"


def _launch(kernel: str, like: Tensor, *operands: Any, **arguments: Any) -> None:
    """Runs a compiled kernel where `like` lives; on a GPU it is queued on the current stream."""
    suffix = _suffix(like.dtype)
    if like.device.type == "cuda":
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_native, f"{kernel}_cuda_{suffix}")(*operands, **arguments, device=like.get_device(), stream=stream)
    else:
        getattr(_native, f"{kernel}_{suffix}")(*operands, **arguments, threads=torch.get_num_threads())
