"""Ground costs between clouds, formed once per problem: an operator with a gradient to both clouds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seer_kernels import _dispatch, _operators
from seer_kernels.sinkhorn import native, reference
from seer_kernels.sinkhorn.problem import Clouds, accumulation_dtype

_BACKENDS = {"reference": reference, "native": native}
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


def _cost_kernel(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, cost: str, backend: str
) -> Tensor:
    clouds = Clouds(x, y, x_lengths, y_lengths, cost)
    chosen = _BACKENDS[_dispatch.choose(backend, x.device, native.lacks(x.device))]
    with torch.autocast(x.device.type, enabled=False):
        matrix: Tensor = chosen.cost_matrix(clouds)
    return matrix


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
    with torch.autocast(x.device.type, enabled=False):
        points, others = reference.prepared(Clouds(x, y, x_lengths, y_lengths, cost))
        if cost == "cosine":
            (points, x_inverse), (others, y_inverse) = reference.unit(points), reference.unit(others)
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
