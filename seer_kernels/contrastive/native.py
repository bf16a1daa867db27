"""Launches the compiled kernels: torch multiplies blocks of rows, the epilogue makes losses and gradients of them.

One sweep over blocks of queries. A block against all keys has its whole softmax in hand, so its products are
overwritten by the gradient with respect to them, and two more matrix products give the gradients of queries and keys:
three products in all, and no memory beyond one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seer_kernels.contrastive.problem import SAME_LABEL, Gradients, Problem, RowResults, Wanted, row_weights

try:
    from seer_kernels import _native
except ImportError:  # seer_kernels.backends() says why; a call never gets here
    _native = None  # type: ignore[assignment]

BLOCK_BYTES = 16 << 20
"""Size of the products of a block: large enough for the library products to run at full rate."""

KEY_CHUNK = 1024
"""Keys widened to fp32 at a time, for features in half precision."""


def forward(problem: Problem, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """Row results, and the gradients of `sum_i weights_i loss_i`."""
    return _sweep(problem, row_weights(problem), wanted)


def backward(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of `sum_i row_gradient_i loss_i`."""
    return _sweep(problem, row_gradient, wanted)[1]


def _sweep(problem: Problem, row_gradient: Tensor, wanted: Wanted) -> tuple[RowResults, Gradients]:
    query, key, dtype = problem.query, problem.key, problem.dtype
    (P, N, D), M = query.shape, key.shape[1]
    query_scale = _inverse_norms(query, dtype) if problem.normalize else None
    key_scale = _inverse_norms(key, dtype) if problem.normalize else None
    temperature = problem.temperature
    if temperature.device != query.device:  # a number: filling it in needs no synchronisation, a copy would
        temperature = query.new_full((), temperature.item(), dtype=dtype)
    rows = query.new_empty(7, P, N, dtype=dtype)
    query_gradient = query.new_empty(P, N, D, dtype=dtype) if wanted.query else None
    key_gradient = query.new_empty(P, M, D, dtype=dtype) if wanted.key else None

    blocks = list(_blocks(P, N, max(1, BLOCK_BYTES // (M * rows.element_size()))))
    buffer = query.new_empty(max((p.stop - p.start) * (r.stop - r.start) for p, r in blocks) * M, dtype=dtype)
    chunk = M if query.dtype == dtype else KEY_CHUNK
    keys = [slice(start, min(start + chunk, M)) for start in range(0, M, chunk)]
    for p, r in blocks:
        queries = query[p, r].to(dtype)
        products = buffer[: (p.stop - p.start) * (r.stop - r.start) * M].view(p.stop - p.start, r.stop - r.start, M)
        for k in keys:
            _multiply(products[..., k], queries, key[p, k].to(dtype).mT)
        _launch(
            "contrastive_rows",
            query,
            products=products.data_ptr(),
            first_problem=p.start,
            problem_count=p.stop - p.start,
            first_row=r.start,
            row_count=r.stop - r.start,
            P=P,
            N=N,
            M=M,
            query_scale=_address(query_scale),
            key_scale=_address(key_scale),
            query_labels=_address(problem.query_labels),
            key_labels=_address(problem.key_labels),
            weights=_address(problem.weights),
            row_gradient=row_gradient.data_ptr(),
            temperature=temperature.data_ptr(),
            same_label=SAME_LABEL.index(problem.same_label),
            write_gradient=wanted.query or wanted.key,
            rows=rows.data_ptr(),
        )
        for k in keys:
            if query_gradient is not None:
                _multiply(query_gradient[p, r], products[..., k], key[p, k].to(dtype), accumulate=k.start > 0)
            if key_gradient is not None:
                _multiply(key_gradient[p, k], products[..., k].mT, queries, accumulate=r.start > 0)

    if query_scale is not None and query_gradient is not None:
        _project(query_gradient, query, query_scale)
    if key_scale is not None and key_gradient is not None:
        _project(key_gradient, key, key_scale)
    *results, logit_dot = rows.unbind()
    temperature_gradient = -logit_dot.sum(-1) / problem.temperature if wanted.temperature else None
    return RowResults(*results), Gradients(query_gradient, key_gradient, temperature_gradient)


def _blocks(P: int, N: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most `rows` queries: several whole problems, or a part of one."""
    problems = max(1, rows // N)
    for p in range(0, P, problems):
        for r in range(0, N, rows):
            yield slice(p, min(p + problems, P)), slice(r, min(r + rows, N))


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b; for a single problem without the batch dimension, whose library path is slower."""
    if out.shape[0] == 1:
        torch.addmm(out[0], a[0], b[0], beta=int(accumulate), out=out[0])
    else:
        torch.baddbmm(out, a, b, beta=int(accumulate), out=out)


def _inverse_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |x| per row, 0 for a row of zeros: [P, rows]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norm.masked_fill_(norm == 0, torch.inf).reciprocal_()


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
            x,
            gradient=gradient[part].data_ptr(),
            x=wide.data_ptr(),
            inverse_norm=inverse_norm[part].data_ptr(),
            rows=part.stop - part.start,
            D=D,
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(kernel: str, like: Tensor, **arguments: int | bool) -> None:
    """Runs a compiled kernel where `like` lives; on a GPU it is queued on the current stream."""
    suffix = "f64" if like.dtype == torch.float64 else "f32"
    if like.device.type == "cuda":
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_native, f"{kernel}_cuda_{suffix}")(**arguments, device=like.get_device(), stream=stream)
    else:
        getattr(_native, f"{kernel}_{suffix}")(**arguments, threads=torch.get_num_threads())
