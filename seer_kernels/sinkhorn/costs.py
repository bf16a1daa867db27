"""Ground costs between clouds, formed once per problem: an operator with a gradient to both clouds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seer_kernels import _checks, _dispatch, _operators
from seer_kernels.sinkhorn import native, reference
from seer_kernels.sinkhorn.problem import CANCELLED, Clouds, accumulation_dtype, existing

CLOSE_ELEMENTS = 1 << 22
"""Features gathered at a time where squared distances are formed from differences."""
TWICE = (
    "the Sinkhorn family of seer_kernels cannot be differentiated twice: its gradient is a fused kernel. "
    'With backend="reference" and gradient="unrolled" the solution of given costs can'
)


def cost_matrix(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, cost: str, backend: str
) -> Tensor:
    """Costs [B, n, m] in the accumulation dtype between x [B, n, D] and y [B, m, D]; undefined past the lengths."""
    result: Tensor = _cost(x, y, x_lengths, y_lengths, cost, backend)
    return result


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Autocast off, and fp32 products of fp32 numbers, whatever the user allows elsewhere."""
    products = torch.backends.cuda.matmul
    # torch 2.9 brought the first of these, and does not like both to be used.
    setting, exact = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
    before = getattr(products, setting)
    setattr(products, setting, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(products, setting, before)


def by_torch(clouds: Clouds) -> Tensor:
    """The ground costs [B, n, m] in the accumulation dtype; finite, but without meaning, past the lengths."""
    x, y = _prepared(clouds)
    if clouds.cost == "cosine":
        return 1 - _unit(x)[0] @ _unit(y)[0].mT
    x_squared, y_squared = x.square().sum(-1), y.square().sum(-1)
    bound = x_squared.unsqueeze(-1) + y_squared.unsqueeze(-2)
    squared = torch.baddbmm(bound, x, y.mT, alpha=-2)
    close = (squared < CANCELLED * bound).nonzero()
    for some in torch.split(close, max(1, CLOSE_ELEMENTS // x.shape[-1])):
        p, i, j = some.unbind(-1)
        squared[p, i, j] = (x[p, i] - y[p, j]).square().sum(-1)
    return squared if clouds.cost == "sqeuclidean" else squared.sqrt()


def _prepared(clouds: Clouds) -> tuple[Tensor, Tensor]:
    """Both clouds in the accumulation dtype, 0 past the lengths, and about their common centre if costs are distances.

    Far from the origin |x|^2 + |y|^2 - 2 x.y has lost the digits in which distances differ.
    """
    dtype = accumulation_dtype(clouds.x.dtype)
    x, y = clouds.x.to(dtype), clouds.y.to(dtype)
    if clouds.cost == "cosine":
        return _masked(x, clouds.x_lengths), _masked(y, clouds.y_lengths)
    # A point to subtract first keeps the digits of the mean, which a sum of large coordinates would lose.
    origin = x[:, :1]
    x, y = _masked(x - origin, clouds.x_lengths), _masked(y - origin, clouds.y_lengths)
    count = sum(
        cloud.shape[1] if lengths is None else lengths.view(-1, 1, 1)
        for cloud, lengths in ((x, clouds.x_lengths), (y, clouds.y_lengths))
    )
    centre = (x.sum(1, keepdim=True) + y.sum(1, keepdim=True)) / count
    return _masked(x - centre, clouds.x_lengths), _masked(y - centre, clouds.y_lengths)


def _masked(cloud: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return cloud
    exists = existing(lengths, cloud.shape[0], cloud.shape[1], cloud.device)
    return cloud.masked_fill(~exists.unsqueeze(-1), 0.0)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| and 1 / |x|, both 0 for a row of zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return x * inverse, inverse


def choose_backend(requested: str, like: Tensor, n: int, m: int, lacks: Mapping[str, str] | None = None) -> str:
    """The backend that solves problems of n x m points of tensors like this one, a problem in each of its rows.

    `lacks` says why a backend cannot although it solves such problems.
    """
    obstacles = {"native": native.lacks(like.device, like.dtype, like.shape[0], n, m), **(lacks or {})}
    return _dispatch.choose(requested, like.device, like.dtype, obstacles)


def backend_module(requested: str, cost: Tensor, lacks: Mapping[str, str] | None = None) -> Any:
    """The module to run on costs [B, n, m] like these, by the caller's choice of backend; `lacks` as above."""
    chosen = choose_backend(requested, cost, cost.shape[1], cost.shape[2], lacks)
    if chosen == "triton":
        from seer_kernels.sinkhorn import triton_kernels  # takes long to import, and exists on Linux only

        return triton_kernels
    return {"reference": reference, "native": native}[chosen]


def _cost_kernel(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, cost: str, backend: str
) -> Tensor:
    for name, lengths, points in (("x_lengths", x_lengths, x.shape[1]), ("y_lengths", y_lengths, y.shape[1])):
        if lengths is not None and _checks.can_wait(x.device):
            _checks.check_length_values(name, lengths, points)
    clouds = Clouds(x, y, x_lengths, y_lengths, cost)
    chosen = choose_backend(backend, x, x.shape[1], y.shape[1])
    with exact_products(x.device):
        return native.cost_matrix(clouds) if chosen == "native" and x.device.type == "cpu" else by_torch(clouds)


def _cost_fake(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, cost: str, backend: str
) -> Tensor:
    return x.new_empty((*x.shape[:2], y.shape[1]), dtype=accumulation_dtype(x.dtype))


def _slope_kernel(
    gradient: Tensor,
    matrix: Tensor,
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    cost: str,
    x_wanted: bool,
    y_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x and y from `gradient` [B, n, m] (0 past the lengths) to the costs `matrix`; [0] if not wanted."""
    with exact_products(x.device):
        points, others = _prepared(Clouds(x, y, x_lengths, y_lengths, cost))
        if cost == "cosine":
            (points, x_inverse), (others, y_inverse) = _unit(points), _unit(others)
        elif cost == "euclidean":
            gradient = torch.where(matrix > 0, gradient / matrix, 0.0)
        else:
            gradient = 2 * gradient
        gradients = []
        for wanted, slope, one, other in (
            (x_wanted, gradient, points, others),
            (y_wanted, gradient.mT, others, points),
        ):
            if not wanted:
                gradients.append(x.new_empty(0))
                continue
            towards = slope @ other
            if cost == "cosine":  # along the unit vector nothing changes
                inverse = x_inverse if one is points else y_inverse
                result = ((towards * one).sum(-1, keepdim=True) * one - towards) * inverse
            else:
                result = torch.addcmul(-towards, slope.sum(-1, keepdim=True), one)
            gradients.append(result.to(x.dtype))
    return gradients[0], gradients[1]


def _slope_fake(
    gradient: Tensor,
    matrix: Tensor,
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    cost: str,
    x_wanted: bool,
    y_wanted: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if x_wanted else 0), y.new_empty(y.shape if y_wanted else 0)


class _Cost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        matrix: Tensor = _operators.below_autograd(_cost, *inputs)
        ctx.save_for_backward(matrix, *inputs[:4])
        ctx.cost = inputs[4]
        ctx.set_materialize_grads(False)
        return matrix

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        nothing = (None,) * 4
        if gradient is None or not any(wanted):
            return (None, None, *nothing)
        x_gradient, y_gradient = _slope(gradient, *ctx.saved_tensors, ctx.cost, *wanted)
        return (x_gradient if wanted[0] else None, y_gradient if wanted[1] else None, *nothing)


_cost = _operators.register("sinkhorn_cost", _cost_kernel, _cost_fake, _Cost)
_slope = _operators.register("sinkhorn_cost_backward", _slope_kernel, _slope_fake, no_gradient=TWICE)
