"""The definition in plain torch, log-domain, in fp32 or fp64: the oracle, and the backend where there is no other."""

from __future__ import annotations

import math

import torch
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


def solve(problem: Problem) -> Solution:
    """Alternating updates of f and g by logsumexp, each problem until its own stopping test is met."""
    exists = pairs(problem)
    largest = problem.cost.masked_fill(~exists, 0.0).abs().amax((1, 2))
    check_cost_values(problem.cost_name, largest < torch.finfo(largest.dtype).max / 16)
    cost, scale = scaled_cost(problem, exists)
    log_a, log_b = _log(problem.a), _log(problem.b)
    eps = problem.eps.unsqueeze(-1)  # [B, 1]
    with torch.no_grad():
        low = cost.masked_fill(~exists, torch.inf).amin((1, 2))
        spread = cost.amax((1, 2)).sub_(low).unsqueeze(-1)
        # Below the floor exponents overflow: such a problem is solved at the floor, and reported as not converged.
        floor = cost.abs().amax((1, 2)).unsqueeze(-1) / torch.finfo(cost.dtype).max ** 0.5
        target = torch.maximum(eps, floor)
        now = torch.where(spread > ANNEAL_ABOVE * target, spread / ANNEAL_START, target)
        active = torch.ones_like(eps, dtype=torch.bool)
        iterations = torch.zeros_like(problem.eps, dtype=torch.int32)
    f, g = torch.zeros_like(problem.a), torch.zeros_like(problem.b)
    for iteration in range(problem.max_iterations):
        rows = torch.logsumexp(log_b.unsqueeze(1) + (g.unsqueeze(1) - cost) / now.unsqueeze(-1), -1)
        new_f = -_share(problem.tau_a, now) * now * rows
        with torch.no_grad():
            mass = torch.exp(log_a + new_f / now + rows)
            before = torch.exp(log_a + f / now + rows)
            error = (before - mass).abs().sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)
        columns = torch.logsumexp(log_a.unsqueeze(2) + (new_f.unsqueeze(2) - cost) / now.unsqueeze(-1), 1)
        new_g = -_share(problem.tau_b, now) * now * columns
        done = (error < problem.tolerance) & (now == target)
        if iteration + 1 < problem.max_iterations:
            shift = torch.where(done, 0.0, _best_shift(problem, new_f, new_g))
            new_f, new_g = new_f + shift, new_g - shift
        f, g = torch.where(active, new_f, f), torch.where(active, new_g, g)
        with torch.no_grad():
            iterations += active.squeeze(-1)
            active = active & ~done
            now = torch.where(error < ANNEAL_TOLERANCE, torch.maximum(now * ANNEAL_FACTOR, target), now)
            if not bool(active.any()):
                break
    f, g = _without_padding(problem, f, g)
    return _finished(problem, f, g, cost, scale, exists, iterations, (target == eps).squeeze(-1))


def _log(weights: Tensor) -> Tensor:
    """log(weights), whose gradient at a weight of 0 is 0 and not NaN."""
    return torch.where(weights > 0, weights, 1.0).log().masked_fill(weights == 0, -torch.inf)


def _share(tau: float, eps: Tensor) -> Tensor | float:
    """What a relaxed marginal leaves of a step: tau / (tau + eps)."""
    return 1.0 if math.isinf(tau) else tau / (tau + eps)


def _best_shift(problem: Problem, f: Tensor, g: Tensor) -> Tensor | float:
    """The t [B, 1] that maximises the dual objective over (f + t, g - t), which alternating updates find slowly."""
    if problem.balanced:
        return 0.0
    log_mass_a = torch.logsumexp(_log(problem.a) - f / problem.tau_a, -1, keepdim=True)
    log_mass_b = torch.logsumexp(_log(problem.b) - g / problem.tau_b, -1, keepdim=True)
    return (log_mass_a - log_mass_b) / (1 / problem.tau_a + 1 / problem.tau_b)


def _without_padding(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced potentials so that f and g share the value equally; both 0 past the lengths."""
    if problem.balanced:
        f_part, g_part = (problem.a * f).sum(-1, keepdim=True), (problem.b * g).sum(-1, keepdim=True)
        shift = (g_part - f_part) / (2 * problem.a.sum(-1, keepdim=True))
        f, g = f + shift, g - shift
    if problem.x_lengths is not None:
        f = f.masked_fill(~existing(problem.x_lengths, len(f), f.shape[1], f.device), 0.0)
    if problem.y_lengths is not None:
        g = g.masked_fill(~existing(problem.y_lengths, len(g), g.shape[1], g.device), 0.0)
    return f, g


def _finished(
    problem: Problem,
    f: Tensor,
    g: Tensor,
    cost: Tensor,
    scale: Tensor,
    exists: Tensor,
    iterations: Tensor,
    resolved: Tensor,
) -> Solution:
    a, b = problem.a, problem.b
    plan = a.unsqueeze(2) * b.unsqueeze(1) * kernel(f, g, cost, problem.eps, exists)
    row_mass = plan.sum(-1)
    surplus = plan.sum((1, 2)) - a.sum(-1) * b.sum(-1)
    value = _marginal_value(a, f, problem.tau_a) + _marginal_value(b, g, problem.tau_b) - problem.eps * surplus
    with torch.no_grad():
        wanted = a if math.isinf(problem.tau_a) else a * torch.exp(-f / problem.tau_a)
        error = (row_mass - wanted).abs().sum(-1) / wanted.sum(-1)
    return Solution(
        value,
        (plan * cost).sum((1, 2)),
        f,
        g,
        scale,
        torch.where(error.isfinite(), error, torch.inf),
        iterations,
        (error <= problem.tolerance) & resolved,
    )


def _marginal_value(weights: Tensor, potential: Tensor, tau: float) -> Tensor:
    """What a marginal adds to the dual objective: [B]."""
    return (weights * _marginal_slope(potential, tau)).sum(-1)


def _marginal_slope(potential: Tensor, tau: float) -> Tensor:
    return potential if math.isinf(tau) else -tau * torch.expm1(-potential / tau)


def pairs(problem: Problem) -> Tensor:
    """Which entries of the cost exist: [B, n, m] bool."""
    B, n, m = problem.cost.shape
    rows = existing(problem.x_lengths, B, n, problem.cost.device)
    return rows.unsqueeze(2) & existing(problem.y_lengths, B, m, problem.cost.device).unsqueeze(1)


def scaled_cost(problem: Problem, exists: Tensor) -> tuple[Tensor, Tensor]:
    """The costs over their scale, 0 past the lengths, and the scale [B]; a scale of 0 counts as 1."""
    cost = problem.cost.masked_fill(~exists, 0.0)
    scale = torch.ones_like(problem.eps)
    if problem.scale_cost == "mean":
        scale = (cost.sum((1, 2), dtype=torch.float64) / exists.sum((1, 2))).to(cost.dtype)
    elif problem.scale_cost == "max":
        scale = cost.masked_fill(~exists, -torch.inf).amax((1, 2))
    scale = torch.where(scale == 0, 1.0, scale)
    return cost / scale.view(-1, 1, 1), scale


def kernel(f: Tensor, g: Tensor, cost: Tensor, eps: Tensor, exists: Tensor) -> Tensor:
    """exp((f_i + g_j - C_ij) / eps), 0 past the lengths: [B, n, m]."""
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps.view(-1, 1, 1)
    return exponent.masked_fill(~exists, -torch.inf).clamp(max=_largest_exponent(cost.dtype)).exp()


def _largest_exponent(dtype: torch.dtype) -> float:
    """Beyond it only a problem that its dtype cannot resolve goes; its marginals then are wrong, but numbers."""
    return math.log(torch.finfo(dtype).max) / 2


def gradients(problem: Problem, f: Tensor, g: Tensor, scale: Tensor, arrived: Cotangents) -> Gradients:
    """Gradients by the envelope theorem for the value, by implicit differentiation for all else (README)."""
    exists = pairs(problem)
    cost, _ = scaled_cost(problem, exists)
    a, b, eps = problem.a, problem.b, problem.eps.unsqueeze(-1)
    E = kernel(f, g, cost, problem.eps, exists)
    plan = a.unsqueeze(2) * b.unsqueeze(1) * E
    cost_gradient, a_gradient, b_gradient = torch.zeros_like(cost), torch.zeros_like(a), torch.zeros_like(b)
    if arrived.value is not None:
        slope = arrived.value.unsqueeze(-1)
        cost_gradient += slope.unsqueeze(-1) * plan
        rows, columns = (E @ b.unsqueeze(-1)).squeeze(-1), (a.unsqueeze(1) @ E).squeeze(1)
        a_gradient += slope * (_marginal_slope(f, problem.tau_a) - eps * (rows - b.sum(-1, keepdim=True)))
        b_gradient += slope * (_marginal_slope(g, problem.tau_b) - eps * (columns - a.sum(-1, keepdim=True)))
    if not (arrived.transport_cost is None and arrived.f is None and arrived.g is None):
        f_cotangent = torch.zeros_like(f) if arrived.f is None else arrived.f
        g_cotangent = torch.zeros_like(g) if arrived.g is None else arrived.g
        f_cotangent, g_cotangent = _zero_past_lengths(problem, f_cotangent, g_cotangent)
        if arrived.transport_cost is not None:
            slope = arrived.transport_cost.view(-1, 1, 1)
            spent = slope * plan * cost
            cost_gradient += slope * plan - spent / eps.unsqueeze(-1)
            f_cotangent, g_cotangent = f_cotangent + spent.sum(2) / eps, g_cotangent + spent.sum(1) / eps
            per_weight = slope * E * cost
            a_gradient += (per_weight @ b.unsqueeze(-1)).squeeze(-1)
            b_gradient += (a.unsqueeze(1) @ per_weight).squeeze(1)
        if problem.balanced:  # through the choice of the constant between f and g
            excess = (f_cotangent.sum(-1, keepdim=True) - g_cotangent.sum(-1, keepdim=True)) / (
                2 * a.sum(-1, keepdim=True)
            )
            f_cotangent, g_cotangent = f_cotangent - a * excess, g_cotangent + b * excess
            a_gradient -= excess * f
            b_gradient += excess * g
        row, column = _adjoint(problem, E, plan, f_cotangent, g_cotangent)
        cost_gradient += E * (row.unsqueeze(2) * b.unsqueeze(1) + a.unsqueeze(2) * column.unsqueeze(1))
        a_gradient -= eps * (E @ column.unsqueeze(-1)).squeeze(-1)
        b_gradient -= eps * (row.unsqueeze(1) @ E).squeeze(1)
    a_gradient, b_gradient = _zero_past_lengths(problem, a_gradient, b_gradient)
    return Gradients(unscaled(problem, arrived, cost, scale, exists, cost_gradient), a_gradient, b_gradient)


def _zero_past_lengths(problem: Problem, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    B, n, m = problem.cost.shape
    rows = rows.masked_fill(~existing(problem.x_lengths, B, n, rows.device), 0.0)
    return rows, columns.masked_fill(~existing(problem.y_lengths, B, m, rows.device), 0.0)


def unscaled(
    problem: Problem, arrived: Cotangents, cost: Tensor, scale: Tensor, exists: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient with respect to the costs themselves, from the one with respect to costs over their scale."""
    if problem.scale_cost is None:
        return gradient
    to_scale = -(gradient * cost).sum((1, 2)) / scale
    if arrived.scale is not None:
        to_scale = to_scale + arrived.scale
    if problem.scale_cost == "max":
        exists = exists & (problem.cost == scale.view(-1, 1, 1))
    share = exists.to(gradient.dtype) / exists.sum((1, 2), keepdim=True).clamp(min=1)
    return gradient / scale.view(-1, 1, 1) + to_scale.view(-1, 1, 1) * share


def _adjoint(
    problem: Problem, E: Tensor, plan: Tensor, f_cotangent: Tensor, g_cotangent: Tensor
) -> tuple[Tensor, Tensor]:
    """Solves the transposed linearised optimality conditions for what the potentials' cotangents put on them.

    Conjugate gradients on the Schur complement of the columns, preconditioned by its diagonal part.
    """
    a, b, eps = problem.a, problem.b, problem.eps.unsqueeze(-1)
    zero_rows, zero_columns = a == 0, b == 0
    rows, columns = (E @ b.unsqueeze(-1)).squeeze(-1), (a.unsqueeze(1) @ E).squeeze(1)
    row_slope, column_slope = rows * (1 + eps / problem.tau_a), columns * (1 + eps / problem.tau_b)
    # Points of weight 0 move no other; what lies on them is solved directly.
    row0 = torch.where(zero_rows & (row_slope > 0), f_cotangent / row_slope, 0.0)
    column0 = torch.where(zero_columns & (column_slope > 0), g_cotangent / column_slope, 0.0)
    f_rest = (f_cotangent - a * (E @ column0.unsqueeze(-1)).squeeze(-1)).masked_fill(zero_rows, 0.0)
    g_rest = (g_cotangent - b * (row0.unsqueeze(1) @ E).squeeze(1)).masked_fill(zero_columns, 0.0)

    row_diagonal = torch.where(zero_rows | (row_slope == 0), 1.0, a * row_slope)
    column_diagonal = torch.where(zero_columns | (column_slope == 0), 1.0, b * column_slope)

    def from_columns(q: Tensor) -> Tensor:
        return (plan @ q.unsqueeze(-1)).squeeze(-1)

    def from_rows(p: Tensor) -> Tensor:
        return (p.unsqueeze(1) @ plan).squeeze(1)

    def without_constant(residual: Tensor) -> Tensor:
        if not problem.balanced:
            return residual
        # A constant is no direction: the residual has none of it but by rounding, which grows unless taken off.
        return residual - b * (residual.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))

    residual = without_constant(g_rest - from_rows(f_rest / row_diagonal))
    q = torch.zeros_like(residual)
    direction = preconditioned = residual / column_diagonal
    size = first = (residual * preconditioned).sum(-1, keepdim=True)
    small = torch.finfo(residual.dtype).eps ** 2
    for _ in range(4 * (residual.shape[-1] + 25)):
        applied = column_diagonal * direction - from_rows(from_columns(direction) / row_diagonal)
        curvature = (direction * applied).sum(-1, keepdim=True)
        going = (size > small * first) & (curvature > 0)
        if not bool(going.any()):
            break
        step = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        q = q + step * direction
        residual = without_constant(residual - step * applied)
        preconditioned = residual / column_diagonal
        new_size = torch.where(going, (residual * preconditioned).sum(-1, keepdim=True), size)
        direction = torch.where(going, preconditioned + new_size / torch.where(going, size, 1.0) * direction, direction)
        size = new_size
    p = (f_rest - from_columns(q)) / row_diagonal
    return a * p + row0, b * q + column0


def alternate(alternation: Alternation) -> tuple[Tensor, Tensor, Tensor]:
    """The last potential [P, M], and the normalisers of rows [iterations, P, N] and of columns [iterations, P, M]."""
    rows, columns, potential, cost = [], [], alternation.start, alternation.cost
    for _ in range(alternation.iterations):
        rows.append((potential.unsqueeze(1) - cost).logsumexp(2))
        columns.append(((alternation.log_a - alternation.share_a * rows[-1]).unsqueeze(2) - cost).logsumexp(1))
        potential = alternation.log_b - alternation.share_b * columns[-1]
    return potential, torch.stack(rows), torch.stack(columns)


def alternate_gradient(alternation: Alternation, rows: Tensor, columns: Tensor, gradient: Tensor) -> Tensor:
    """The gradient to the costs [P, N, M], from the one to the last potential: the iterations once more, backwards."""
    t, cost = alternation, alternation.cost
    result = torch.zeros_like(cost)
    for step in reversed(range(t.iterations)):
        of_rows = (t.log_a - t.share_a * rows[step]).unsqueeze(2)
        flow = (of_rows - cost - columns[step].unsqueeze(1)).exp_().mul_(t.share_b * gradient.unsqueeze(1))
        result += flow
        row_gradient = -flow.sum(2, keepdim=True)
        before = t.start if step == 0 else t.log_b - t.share_b * columns[step - 1]
        flow = (before.unsqueeze(1) - cost - rows[step].unsqueeze(2)).exp_().mul_(t.share_a * row_gradient)
        result += flow
        gradient = -flow.sum(1)
    return result
