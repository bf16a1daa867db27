"""Public functions of entropic optimal transport: validation, dispatch, and the operator that owns the gradient."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seer_kernels import _checks, _dispatch, _operators
from seer_kernels.sinkhorn import reference
from seer_kernels.sinkhorn.costs import TWICE, backend_module, cost_matrix, exact_products
from seer_kernels.sinkhorn.problem import (
    COSTS,
    GRADIENTS,
    SCALES,
    Cotangents,
    Gradients,
    Problem,
    Solution,
    accumulation_dtype,
    existing,
)


class ConvergenceWarning(UserWarning):
    """Some problems stopped at `max_iterations` with a marginal error above the tolerance."""


class SinkhornResult(NamedTuple):
    """The solutions of a batch of transport problems; without the leading B for unbatched input.

    In float32, or float64 for float64 input, and in units of the scaled cost where `scale_cost` is given.
    """

    value: Tensor
    """(B,): the regularised objective `<P, C> + eps KL(P | a x b)`, plus tau KL of each relaxed marginal."""
    transport_cost: Tensor
    """(B,): `<P, C>`."""
    f: Tensor
    """(B, n): potential of x; balanced ones are fixed by sum a f = sum b g. 0 past the lengths."""
    g: Tensor
    """(B, m): potential of y."""
    marginal_error: Tensor
    """(B,): sum_i |(P 1)_i - r_i| / sum_i r_i, where r is a, or a exp(-f / tau_a) if relaxed; columns are exact."""
    iterations: Tensor
    """(B,) int32: how many full iterations were made."""
    converged: Tensor
    """(B,) bool: whether the marginal error is within the tolerance."""
    cost: Tensor
    """(B, n, m): the costs before scaling; undefined past the lengths."""
    scale: Tensor
    """(B,): what the costs were divided by."""
    a: Tensor
    """(B, n): the weights."""
    b: Tensor
    """(B, m)."""
    eps: Tensor
    """(B,)."""
    x_lengths: Tensor | None
    y_lengths: Tensor | None

    def plan(self) -> Tensor:
        """The transport plan (B, n, m), P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), 0 past the lengths.

        Its gradient needs `gradient="implicit"` or `"unrolled"`.
        """
        cost = self.cost
        ragged = self.x_lengths is not None or self.y_lengths is not None
        if ragged:
            B, n, m = cost.shape
            rows = existing(self.x_lengths, B, n, cost.device).unsqueeze(2)
            missing = ~(rows & existing(self.y_lengths, B, m, cost.device).unsqueeze(1))
            cost = cost.masked_fill(missing, 0.0)
        potential = self.f.unsqueeze(-1) + self.g.unsqueeze(-2)
        exponent = (potential - cost / self.scale[..., None, None]) / self.eps[..., None, None]
        if ragged:
            exponent = exponent.masked_fill(missing, -torch.inf)
        return self.a.unsqueeze(-1) * self.b.unsqueeze(-2) * exponent.exp()


def sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float | Tensor = 0.05,
    cost: str = "sqeuclidean",
    scale_cost: str | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    tau_a: float | None = None,
    tau_b: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    gradient: str = "envelope",
    backend: str = "auto",
) -> SinkhornResult:
    """Entropic optimal transport between clouds, a batch of independent problems in one call.

    Minimises, over plans P >= 0,

        <P, C> + eps KL(P | a x b) + tau_a KL(P 1 | a) + tau_b KL(P^T 1 | b)

    with KL(p | q) = sum p log(p / q) - p + q, where a tau of None makes its marginal a constraint (Cuturi 2013, arXiv
    1306.0895; Chizat et al. 2018, arXiv 1607.05816). The solution is P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps).

    Args:
        x: (B, n, D) or (n, D) in float64, float32, bfloat16 or float16; accumulation is in float32 or better.
        y: (B, m, D) or (m, D), same dtype and device.
        a: weights (>= 0) of x that broadcast to (B, n); default 1 / n each. Weight 0 is allowed.
        b: weights of y likewise. Where neither tau is given, a and b must have equal sums.
        eps: weight of the entropy, a positive float or (B,); relative to the scaled cost where `scale_cost` is given.
        cost: `"sqeuclidean"` |x - y|^2, `"euclidean"` |x - y| or `"cosine"` 1 - cos(x, y).
        scale_cost: None, or divide each problem's costs by their `"mean"` or `"max"` (by 1 if that is 0).
        x_lengths: integers (B,): points past the length do not exist, whatever they hold.
        y_lengths: likewise for y.
        tau_a: weight of KL(P 1 | a), or None: the row sums of P are a.
        tau_b: weight of KL(P^T 1 | b), or None: the column sums of P are b.
        max_iterations: most iterations (a row and a column update each), annealing of small eps included.
        tolerance: a problem stops once its marginal error (see `SinkhornResult`) is below it.
        gradient: `"envelope"`: to `value` only, exact at convergence. `"implicit"`: also to `transport_cost`, the
            potentials and `plan()`, by a linear solve. `"unrolled"`: through the iterations (reference only).
        backend: `"auto"`, `"reference"`, `"native"` or `"triton"`; see `seer_kernels.backends()`.

    While a CUDA graph is captured nothing may wait for values: they are not checked, and no warning is given. Of a
    problem whose costs cannot be used the results are NaN then, and `converged` holds as ever. Only `"native"` can be
    captured, and of the costs between clouds only `"cosine"`; given costs always can.

    Returns:
        SinkhornResult, differentiable with respect to x, y, a and b. Balanced problems are defined for equal sums of a
        and b only, so gradients to a and b are up to a constant.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, choice or value; names the problem where one value is wrong.
        RuntimeError: the requested backend cannot run here.

    Warns:
        ConvergenceWarning: some problems did not converge, whatever the reason; `converged` says which.
    """
    _checks.check_cloud_pair(x, y)
    _checks.check_choice("cost", cost, COSTS)
    _checks.check_choice("backend", backend, ("auto", *_dispatch.BACKENDS))
    batched = x.dim() == 3
    if not batched:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    x_lengths = _lengths("x_lengths", x_lengths, x.shape[0], x.shape[1], x.device, batched)
    y_lengths = _lengths("y_lengths", y_lengths, y.shape[0], y.shape[1], y.device, batched)
    return solve_costs(
        cost_matrix(x, y, x_lengths, y_lengths, cost, backend),
        batched,
        f"the {cost} cost of x and y",
        a=a,
        b=b,
        eps=eps,
        scale_cost=scale_cost,
        x_lengths=x_lengths,
        y_lengths=y_lengths,
        tau_a=tau_a,
        tau_b=tau_b,
        max_iterations=max_iterations,
        tolerance=tolerance,
        gradient=gradient,
        backend=backend,
    )


def sinkhorn_from_cost(
    cost: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float | Tensor = 0.05,
    scale_cost: str | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    tau_a: float | None = None,
    tau_b: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    gradient: str = "envelope",
    backend: str = "auto",
) -> SinkhornResult:
    """Entropic optimal transport with given costs.

    Args:
        cost: (B, n, m) or (n, m) in float64, float32, bfloat16 or float16; finite.
        a, b, eps, scale_cost, x_lengths, y_lengths, tau_a, tau_b, max_iterations, tolerance, gradient, backend: as in
            `sinkhorn`.

    Returns, Raises, Warns:
        As `sinkhorn`; differentiable with respect to cost, a and b.
    """
    _checks.check_cost_matrix(cost)
    _checks.check_choice("backend", backend, ("auto", *_dispatch.BACKENDS))
    batched = cost.dim() == 3
    matrix = cost if batched else cost.unsqueeze(0)
    B, n, m = matrix.shape
    x_lengths = _lengths("x_lengths", x_lengths, B, n, matrix.device, batched)
    y_lengths = _lengths("y_lengths", y_lengths, B, m, matrix.device, batched)
    return solve_costs(
        matrix.to(accumulation_dtype(cost.dtype)),
        batched,
        "cost",
        a=a,
        b=b,
        eps=eps,
        scale_cost=scale_cost,
        x_lengths=x_lengths,
        y_lengths=y_lengths,
        tau_a=tau_a,
        tau_b=tau_b,
        max_iterations=max_iterations,
        tolerance=tolerance,
        gradient=gradient,
        backend=backend,
    )


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float | Tensor = 0.05,
    cost: str = "sqeuclidean",
    scale_cost: str | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    tau_a: float | None = None,
    tau_b: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    gradient: str = "envelope",
    backend: str = "auto",
) -> Tensor:
    """The debiased distance S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, 0 for equal clouds and never negative.

    OT is the `value` of `sinkhorn` (Feydy et al. 2019, arXiv 1810.08278, equation 3). With relaxed marginals
    eps / 2 (sum a - sum b)^2 is added, and tau_a must equal tau_b (Sejourne et al. 2019, arXiv 1910.12958, section 3).

    Args:
        x, y, cost, backend and the others: as in `sinkhorn`. With `scale_cost` all three costs are divided by the
            scale of C(x, y). `gradient` is `"envelope"` or `"unrolled"`; `"implicit"` is the same as `"envelope"` here.

    Returns:
        (B,), or () for unbatched clouds; float32, or float64 for float64 input. Differentiable with respect to x, y,
        a and b.

    Raises, Warns:
        As `sinkhorn`.
    """
    if tau_a != tau_b:
        raise ValueError(f"tau_b must equal tau_a ({tau_a}) in a divergence; got {tau_b}")
    options: dict[str, Any] = {
        "tau_a": tau_a,
        "tau_b": tau_b,
        "max_iterations": max_iterations,
        "tolerance": tolerance,
        "gradient": gradient,
        "backend": backend,
    }
    between = sinkhorn(
        x,
        y,
        a=a,
        b=b,
        eps=eps,
        cost=cost,
        scale_cost=scale_cost,
        x_lengths=x_lengths,
        y_lengths=y_lengths,
        **options,
    )
    batched = x.dim() == 3
    value = between.value
    for cloud, weights, lengths in ((x, between.a, between.x_lengths), (y, between.b, between.y_lengths)):
        points = cloud if batched else cloud.unsqueeze(0)
        own = cost_matrix(points, points, lengths, lengths, cost, backend)
        if scale_cost is not None:
            if lengths is not None:  # the gradient to the scale meets all entries, those that do not exist too
                exists = existing(lengths, own.shape[0], own.shape[1], own.device)
                own = own.masked_fill(~(exists.unsqueeze(2) & exists.unsqueeze(1)), 0.0)
            own = own / between.scale.view(-1, 1, 1)
        if not batched:
            own = own.squeeze(0)
        options |= {"a": weights, "b": weights, "x_lengths": lengths, "y_lengths": lengths}
        value = value - sinkhorn_from_cost(own, eps=between.eps, **options).value / 2
    if tau_a is not None:
        value = value + between.eps / 2 * (between.a.sum(-1) - between.b.sum(-1)).square()
    return value


def _lengths(
    name: str, value: Tensor | None, batch: int, points: int, device: torch.device, batched: bool
) -> Tensor | None:
    """Checked lengths as int64."""
    if value is None:
        return None
    if not batched:
        raise ValueError(f"{name} makes a ragged batch; got it with a single problem of {points} points")
    return _checks.check_lengths(name, value, batch, device).to(torch.int64)


def solve_costs(
    cost: Tensor,
    batched: bool,
    cost_name: str,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float | Tensor = 0.05,
    scale_cost: str | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    tau_a: float | None = None,
    tau_b: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    gradient: str = "envelope",
    backend: str = "auto",
) -> SinkhornResult:
    """Any function of the family, from checked costs [B, n, m] and lengths; all else is checked here."""
    B, n, m = cost.shape
    _checks.check_choice("gradient", gradient, GRADIENTS)
    if scale_cost is not None:
        _checks.check_choice("scale_cost", scale_cost, SCALES)
    _checks.check_per_problem("eps", eps, B, cost.device)
    _checks.check_marginal_weight("tau_a", tau_a)
    _checks.check_marginal_weight("tau_b", tau_b)
    _checks.check_count("max_iterations", max_iterations, 1)
    _checks.check_tolerance(tolerance)
    if isinstance(eps, Tensor):
        eps = eps.to(cost.dtype).expand(B)
    else:
        _checks.check_eps_fits(eps, cost.dtype)
        eps = torch.full((B,), float(eps), dtype=cost.dtype, device=cost.device)
    weighted = a is not None or b is not None
    a = _weights("a", a, x_lengths, B, n, cost)
    b = _weights("b", b, y_lengths, B, m, cost)
    tau_a, tau_b = (float("inf") if tau is None else float(tau) for tau in (tau_a, tau_b))
    operands = (cost, a, b, eps, x_lengths, y_lengths, tau_a, tau_b, scale_cost)
    options = (max_iterations, float(tolerance), cost_name, weighted)
    if gradient == "unrolled":
        if backend not in ("auto", "reference"):
            raise ValueError(f'gradient="unrolled" needs backend="reference"; got {backend!r}')
        solution = _run(reference, _problem(*operands, *options))
    else:
        solution = Solution(*_sinkhorn(*operands, *options, gradient, backend))
    value, transport_cost, f, g, scale, marginal_error, iterations, converged = solution
    result = SinkhornResult(
        value,
        transport_cost,
        f,
        g,
        marginal_error,
        iterations,
        converged,
        cost,
        scale,
        a,
        b,
        eps,
        x_lengths,
        y_lengths,
    )
    if batched:
        return result
    return SinkhornResult._make(x if x is None else x.squeeze(0) for x in result)


def _weights(name: str, value: Tensor | None, lengths: Tensor | None, batch: int, points: int, cost: Tensor) -> Tensor:
    """Weights [B, points] in the dtype of `cost`, 0 past the lengths."""
    exists = existing(lengths, batch, points, cost.device)
    if value is None:
        if lengths is None:
            return cost.new_full((batch, points), 1 / points)
        return exists.to(cost.dtype) / lengths.unsqueeze(-1)
    value = _checks.check_masses(name, value, batch, points, cost.device).to(cost.dtype)
    return value if lengths is None else value.masked_fill(~exists, 0.0)


def _problem(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    tau_a: float,
    tau_b: float,
    scale_cost: str | None,
    max_iterations: int,
    tolerance: float,
    cost_name: str,
    weighted: bool,
) -> Problem:
    """A problem whose values are checked: inside the operator, so that compiled graphs check them too."""
    if _checks.can_wait(cost.device):
        _checks.check_eps_values(eps)
        for name, lengths, points in (("x_lengths", x_lengths, cost.shape[1]), ("y_lengths", y_lengths, cost.shape[2])):
            if lengths is not None:
                _checks.check_length_values(name, lengths, points)
        if weighted:
            _checks.check_mass_values("a", a)
            _checks.check_mass_values("b", b)
            if tau_a == tau_b == float("inf"):
                _checks.check_equal_masses(a, b)
    return Problem(
        cost=cost.contiguous(),
        a=a.contiguous(),
        b=b.contiguous(),
        eps=eps.contiguous(),
        x_lengths=x_lengths,
        y_lengths=y_lengths,
        tau_a=tau_a,
        tau_b=tau_b,
        scale_cost=scale_cost,
        max_iterations=max_iterations,
        tolerance=tolerance,
        cost_name=cost_name,
    )


def _run(backend: Any, problem: Problem) -> Solution:
    with exact_products(problem.cost.device):
        solution: Solution = backend.solve(problem)
    if not _checks.can_wait(problem.cost.device):
        return solution
    _checks.check_scale_values(problem.scale_cost, solution.scale)
    left = ~solution.converged
    if bool(left.any()):
        first = int(left.nonzero()[0, 0])
        warnings.warn(
            f"{int(left.sum())} of {len(left)} transport problems did not converge: after "
            f"{int(solution.iterations[first])} iterations problem {first} has a marginal error of "
            f"{float(solution.marginal_error[first]):.2g}, tolerance {problem.tolerance:g}. Allow more "
            "iterations, a larger eps or a larger tolerance, or use float64",
            ConvergenceWarning,
            stacklevel=2,
        )
    return solution


def _sinkhorn_kernel(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    tau_a: float,
    tau_b: float,
    scale_cost: str | None,
    max_iterations: int,
    tolerance: float,
    cost_name: str,
    weighted: bool,
    gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(
        cost, a, b, eps, x_lengths, y_lengths, tau_a, tau_b, scale_cost, max_iterations, tolerance, cost_name, weighted
    )
    return _run(backend_module(backend, cost), problem)


def _sinkhorn_fake(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_problem = (cost.shape[0],)
    return (
        cost.new_empty(per_problem),
        cost.new_empty(per_problem),
        cost.new_empty(a.shape),
        cost.new_empty(b.shape),
        cost.new_empty(per_problem),
        cost.new_empty(per_problem),
        cost.new_empty(per_problem, dtype=torch.int32),
        cost.new_empty(per_problem, dtype=torch.bool),
    )


def _gradient_kernel(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    f: Tensor,
    g: Tensor,
    scale: Tensor,
    value_gradient: Tensor | None,
    transport_cost_gradient: Tensor | None,
    f_gradient: Tensor | None,
    g_gradient: Tensor | None,
    scale_gradient: Tensor | None,
    tau_a: float,
    tau_b: float,
    scale_cost: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(
        cost.contiguous(),
        a.contiguous(),
        b.contiguous(),
        eps.contiguous(),
        x_lengths,
        y_lengths,
        tau_a,
        tau_b,
        scale_cost,
    )
    arrived = (value_gradient, transport_cost_gradient, f_gradient, g_gradient, scale_gradient)
    chosen = backend_module(backend, cost)
    with exact_products(cost.device):
        cotangents = Cotangents(*(None if x is None else x.contiguous() for x in arrived))
        gradients: Gradients = chosen.gradients(problem, f, g, scale, cotangents)
    return gradients


def _gradient_fake(cost: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cost.new_empty(cost.shape), cost.new_empty(a.shape), cost.new_empty(b.shape)


class _Sinkhorn(torch.autograd.Function):
    """The one owner of the gradient of the family."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _operators.below_autograd(_sinkhorn, *inputs)
        solution = Solution(*output)
        ctx.save_for_backward(*inputs[:6], solution.f, solution.g, solution.scale)
        ctx.options, ctx.gradient, ctx.backend = inputs[6:9], inputs[13], inputs[14]
        ctx.mark_non_differentiable(solution.marginal_error, solution.iterations, solution.converged)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *arrived: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 12
        cotangents = Cotangents(*arrived[:5])
        if all(x is None for x in cotangents):
            return (None, None, None, *nothing)
        if ctx.gradient == "envelope" and not all(x is None for x in cotangents[1:4]):
            raise RuntimeError(
                'gradient="envelope" differentiates only the value; transport_cost, f, g and plan() need '
                'gradient="implicit"'
            )
        gradients = _gradient(*ctx.saved_tensors, *cotangents, *ctx.options, ctx.backend)
        wanted = ctx.needs_input_grad[:3]
        return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *nothing)


_sinkhorn = _operators.register("sinkhorn", _sinkhorn_kernel, _sinkhorn_fake, _Sinkhorn)
_gradient = _operators.register("sinkhorn_backward", _gradient_kernel, _gradient_fake, no_gradient=TWICE)
