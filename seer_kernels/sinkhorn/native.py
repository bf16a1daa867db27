"""Launches the compiled kernels. On a CPU a core solves a problem, or all cores do where it is large and they are few;
on CUDA a block of threads solves a problem, and one launch all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seer_kernels._checks import can_wait, check_cost_values
from seer_kernels.sinkhorn.problem import (
    ANNEAL_ABOVE,
    ANNEAL_FACTOR,
    ANNEAL_START,
    ANNEAL_TOLERANCE,
    CANCELLED,
    COSTS,
    SCALES,
    Alternation,
    Clouds,
    Cotangents,
    Gradients,
    Problem,
    Solution,
    accumulation_dtype,
)

try:
    from seer_kernels import _native
except ImportError:  # seer_kernels.backends() says why; a call never gets here
    _native = None  # type: ignore[assignment]


POINT_BYTES = 4096
"""On CUDA, the most that the potentials of a cloud may take: 1024 points, 512 in fp64."""

SMALL_ENTRIES = 1 << 18
"""On CUDA, the largest problems that are taken however few they are: a block by itself is fast enough for them."""

MANY_PROBLEMS = 64
"""On CUDA, how many larger ones there must be, so that most of a GPU has work."""


def lacks(device: torch.device, dtype: torch.dtype, B: int, n: int, m: int) -> str:
    """Why there is no kernel for problems of this many points where they live; empty where there is one."""
    if not _is_cuda(device):
        return ""
    most = POINT_BYTES // accumulation_dtype(dtype).itemsize
    if max(n, m) > most:
        return f"on CUDA it solves problems of at most {most} points in {accumulation_dtype(dtype)}; got {n} x {m}"
    if n * m > SMALL_ENTRIES and B < MANY_PROBLEMS:
        return (
            f"on CUDA it gives each problem to one multiprocessor, and {B} of {n} x {m} points leave the others idle: "
            f"it takes more than {SMALL_ENTRIES} entries each from {MANY_PROBLEMS} problems on"
        )
    return ""


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def cost_matrix(clouds: Clouds) -> Tensor:
    """The ground costs [B, n, m] in the accumulation dtype; not written past the lengths."""
    dtype = accumulation_dtype(clouds.x.dtype)
    x, y = clouds.x.to(dtype).contiguous(), clouds.y.to(dtype).contiguous()
    (B, n, D), m = x.shape, y.shape[1]
    cost = x.new_empty(B, n, m)
    getattr(_native, f"sinkhorn_cost_{_suffix(dtype)}")(
        B=B,
        n=n,
        m=m,
        D=D,
        x=x.data_ptr(),
        y=y.data_ptr(),
        x_lengths=_address(clouds.x_lengths),
        y_lengths=_address(clouds.y_lengths),
        ground=COSTS.index(clouds.cost),
        cancelled=CANCELLED,
        cost=cost.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return cost


def solve(problem: Problem) -> Solution:
    """All problems in one call, each until its own stopping test is met."""
    B = problem.cost.shape[0]
    value, transport_cost, scale, error = (torch.empty_like(problem.eps) for _ in range(4))
    f, g = torch.empty_like(problem.a), torch.empty_like(problem.b)
    iterations = torch.empty(B, dtype=torch.int32, device=f.device)
    converged, usable = (torch.empty(B, dtype=torch.bool, device=f.device) for _ in range(2))
    _launch(
        "sinkhorn_solve",
        problem,
        max_iterations=problem.max_iterations,
        tolerance=problem.tolerance,
        above=ANNEAL_ABOVE,
        start=ANNEAL_START,
        factor=ANNEAL_FACTOR,
        until=ANNEAL_TOLERANCE,
        value=value.data_ptr(),
        transport_cost=transport_cost.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        scale=scale.data_ptr(),
        marginal_error=error.data_ptr(),
        iterations=iterations.data_ptr(),
        converged=converged.data_ptr(),
        usable=usable.data_ptr(),
    )
    if can_wait(problem.cost.device):
        check_cost_values(problem.cost_name, usable)
    return Solution(value, transport_cost, f, g, scale, error, iterations, converged)


def gradients(problem: Problem, f: Tensor, g: Tensor, scale: Tensor, arrived: Cotangents) -> Gradients:
    """Gradients by the envelope theorem for the value, by implicit differentiation for all else (README)."""
    results = Gradients(torch.empty_like(problem.cost), torch.empty_like(problem.a), torch.empty_like(problem.b))
    _launch(
        "sinkhorn_gradient",
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        scale=scale.data_ptr(),
        value_gradient=_address(arrived.value),
        transport_cost_gradient=_address(arrived.transport_cost),
        f_gradient=_address(arrived.f),
        g_gradient=_address(arrived.g),
        scale_gradient=_address(arrived.scale),
        cost_gradient=results.cost.data_ptr(),
        a_gradient=results.a.data_ptr(),
        b_gradient=results.b.data_ptr(),
    )
    return results


def alternate(alternation: Alternation) -> tuple[Tensor, Tensor, Tensor]:
    """The last potential [P, M], and the normalisers of rows [iterations, P, N] and of columns [iterations, P, M]."""
    (P, N), M, start = alternation.log_a.shape, alternation.start.shape[1], alternation.start
    potential = start.new_empty(P, M)
    rows, columns = start.new_empty(alternation.iterations, P, N), start.new_empty(alternation.iterations, P, M)
    getattr(_native, f"alternate_{_suffix(start.dtype)}")(
        _alternation(alternation),
        potential=potential.data_ptr(),
        rows=rows.data_ptr(),
        columns=columns.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return potential, rows, columns


def alternate_gradient(alternation: Alternation, rows: Tensor, columns: Tensor, gradient: Tensor) -> Tensor:
    """The gradient to the costs [P, N, M], from the one to the last potential [P, M]."""
    result = torch.empty_like(alternation.cost)
    getattr(_native, f"alternate_gradient_{_suffix(result.dtype)}")(
        _alternation(alternation),
        rows=rows.data_ptr(),
        columns=columns.data_ptr(),
        gradient=gradient.data_ptr(),
        cost_gradient=result.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return result


def _alternation(alternation: Alternation) -> object:
    P, N, M = alternation.cost.shape
    return getattr(_native, f"Alternation_{_suffix(alternation.cost.dtype)}")(
        P=P,
        N=N,
        M=M,
        iterations=alternation.iterations,
        cost=alternation.cost.data_ptr(),
        log_a=alternation.log_a.data_ptr(),
        log_b=alternation.log_b.data_ptr(),
        start=alternation.start.data_ptr(),
        share_a=alternation.share_a,
        share_b=alternation.share_b,
    )


def _launch(kernel: str, problem: Problem, **arguments: Any) -> None:
    """Runs a compiled kernel where the problems live; on a GPU it is queued on the current stream."""
    cost, transport, suffix = problem.cost, _transport(problem), _suffix(problem.cost.dtype)
    if not _is_cuda(cost.device):
        getattr(_native, f"{kernel}_{suffix}")(transport, **arguments, threads=torch.get_num_threads())
        return
    if cost.shape[0] == 0:
        return
    place = _place(cost.device)
    size = getattr(_native, f"sinkhorn_scratch_{suffix}")(
        transport, gradient=kernel == "sinkhorn_gradient", device=place["device"]
    )
    scratch = torch.empty(size, dtype=torch.uint8, device=cost.device)
    getattr(_native, f"{kernel}_cuda_{suffix}")(transport, **arguments, scratch=_address(scratch), **place)


def _place(device: torch.device) -> dict[str, int]:
    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}


def _transport(problem: Problem) -> object:
    B, n, m = problem.cost.shape
    return getattr(_native, f"Transport_{_suffix(problem.cost.dtype)}")(
        B=B,
        n=n,
        m=m,
        cost=problem.cost.data_ptr(),
        a=problem.a.data_ptr(),
        b=problem.b.data_ptr(),
        eps=problem.eps.data_ptr(),
        x_lengths=_address(problem.x_lengths),
        y_lengths=_address(problem.y_lengths),
        tau_a=problem.tau_a,
        tau_b=problem.tau_b,
        scale_cost=0 if problem.scale_cost is None else 1 + SCALES.index(problem.scale_cost),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _suffix(dtype: torch.dtype) -> str:
    return "f64" if dtype == torch.float64 else "f32"
