"""The contrastive loss whose prediction is a transport plan: where the two families of kernels meet.

The maths is in the README of the optimal transport family.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from seer_kernels import _checks, _dispatch, _operators
from seer_kernels.contrastive.functional import REDUCTIONS, _check_values, _pair_labels
from seer_kernels.contrastive.problem import accumulation_dtype
from seer_kernels.sinkhorn.costs import backend_module, choose_backend, cost_matrix
from seer_kernels.sinkhorn.functional import solve_costs
from seer_kernels.sinkhorn.problem import Alternation

Tau: TypeAlias = "float | tuple[float | None, float | None] | None"
"""How much the marginals of queries and of keys bind: None for a constraint; one value for both, or one each."""


def ot_contrastive(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    iterations: int = 5,
    tolerance: float | None = None,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    tau: Tau = None,
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """KL(target || plan): the plan that the similarities imply should be the one that the positives make.

    With s_ij the cosine of query i and key j, the plan is P_ij = u_i v_j exp(s_ij / temperature), whose u and v are
    found by normalising its rows to a and its columns to b in turn, from v = 1 on (Sinkhorn). The target is
    T_ij = a_i / |P_i| over the positives P_i of query i; a is the weights over their sum, b the columns' sums of T. So

        loss_i = -log |P_i| - 1 / |P_i| sum_{j in P_i} log(P_ij / a_i)

    After one normalisation of the rows this is `info_nce` (with labels: with `same_label="positive"`, less
    log |P_i|). Every further iteration first makes the queries compete for the keys. At convergence it is the loss of
    inverse optimal transport (Shi et al. 2023, ICML; Chen et al. 2025, arXiv 2502.20141). Relaxed marginals (`tau`),
    which the latter proposes for noisy pairs, let a plan give a row or column more or less than its share; the
    divergence is then sum T log(T / P) - T + P.

    Args:
        query: (..., N, D) in float64, float32, bfloat16 or float16. Leading dimensions are independent problems.
        key: (..., M, D), same dtype and device; row i of `query` pairs with row i of `key`. M = N, or with labels
            M >= N. A row of zeros has similarity 0 to everything and gets no gradient.
        temperature: positive float, or 0-d tensor, which may require grad.
        iterations: how many times rows are normalised, with columns normalised in between: 1 for rows alone, 2 for
            rows, columns, rows. The gradient is exact for that number, from stored vectors, not stored plans.
        tolerance: None, or a marginal error (see `SinkhornResult`) below which a problem stops, after at most
            `iterations`. The gradient is then the one at convergence: by the envelope theorem, or by a linear solve
            where marginals are relaxed or `reduction="none"`.
        query_labels: integer labels that broadcast to (..., N): keys of the same label are positives too. Also the
            keys' labels where M = N and none are given.
        key_labels: integer labels that broadcast to (..., M). Keys without a positive are negatives of the first
            normalisation alone: their column of the target is 0.
        tau: None: marginals are constraints. A float: weight of KL(marginal of P | a) and of the one of b, relative to
            the temperature (`tau_a / eps` in `sinkhorn`). A pair: one each for queries and keys, either may be None.
        normalize: compare by cosine, at a cost of 1 - s; if False by dot product, at a cost of -s. What is added to all
            costs matters only where marginals are relaxed.
        weights: weights (>= 0) or a boolean mask that broadcast to (..., N). A pair of weight 0 does not exist, neither
            as query nor as key. Its features must still be finite.
        reduction: `"mean"` over rows, by weight (0 if there are none), `"sum"` of weight x loss, or `"none"` for
            weight x loss per row.
        backend: as in `sinkhorn`; without a tolerance `"native"` is for CPUs.
        validate: as in `info_nce`.

    Returns:
        The loss, (...) or for `"none"` (..., N), in float32 (float64 for float64 input); differentiable once with
        respect to query, key and temperature.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, choice or value.
        RuntimeError: the requested backend cannot run here.

    Warns:
        ConvergenceWarning: with a tolerance, some problems did not reach it.
    """
    _checks.check_feature_pair("query", query, "key", key)
    _checks.check_pair_shapes(query, key)
    given = "negative" if query_labels is None else "positive"
    query_labels, key_labels = _pair_labels(query, key, query_labels, key_labels, given)
    leading, (n, m) = query.shape[:-2], (query.shape[-2], key.shape[-2])
    if query_labels is None and m > n:
        raise ValueError(
            f"key must have {n} rows like query unless there are labels (a key that no query pairs with has no share "
            f"in a plan); got {m}"
        )
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    _checks.check_choice("backend", backend, ("auto", *_dispatch.BACKENDS))
    _checks.check_flag("normalize", normalize)
    _checks.check_flag("validate", validate)
    _checks.check_count("iterations", iterations, 1)
    if tolerance is not None:
        _checks.check_tolerance(tolerance)
    _checks.check_marginal_weights("tau", tau)
    tau_a, tau_b = _taus(tau)
    _checks.check_scalar("temperature", temperature)
    if not isinstance(temperature, Tensor):
        _checks.check_temperature_value(temperature)
        temperature = torch.tensor(temperature, dtype=accumulation_dtype(query.dtype))
    if weights is not None:
        weights = _checks.check_weights(weights, leading, n, query.device).reshape(leading.numel(), n)

    problems = leading.numel()
    query, key = query.reshape(problems, *query.shape[-2:]), key.reshape(problems, *key.shape[-2:])
    with torch.autocast(query.device.type, enabled=False):
        target, weight = _target(
            query.detach(),
            key.detach(),
            temperature.detach(),
            None if query_labels is None else query_labels.reshape(problems, n),
            None if key_labels is None else key_labels.reshape(problems, m),
            weights,
            backend,
            tolerance is None,
            validate,
        )
        cost = _cost(query, key, normalize, backend) / temperature.to(target.dtype)
        if 0 in cost.shape:
            loss: Tensor = cost.sum(-1) * weight
            loss = loss if reduction == "none" else loss.sum(-1)
        else:
            loss = _loss(cost, target, weight, tau_a, tau_b, iterations, tolerance, reduction, backend)
    return loss.reshape((*leading, n) if reduction == "none" else leading)


def _taus(tau: Tau) -> tuple[float, float]:
    """Both weights, infinite where the marginal is a constraint."""
    tau_a, tau_b = tau if isinstance(tau, tuple) else (tau, tau)
    return math.inf if tau_a is None else float(tau_a), math.inf if tau_b is None else float(tau_b)


def _cost(query: Tensor, key: Tensor, normalize: bool, backend: str) -> Tensor:
    """What it costs to bring query i to key j: [P, N, M] in the accumulation dtype."""
    if normalize and query.numel():
        return cost_matrix(query, key, None, None, "cosine", backend)
    dtype = accumulation_dtype(query.dtype)
    similarity: Tensor = query.to(dtype) @ key.to(dtype).mT
    return -similarity


def _loss(
    cost: Tensor,
    target: Tensor,
    weight: Tensor,
    tau_a: float,
    tau_b: float,
    iterations: int,
    tolerance: float | None,
    reduction: str,
    backend: str,
) -> Tensor:
    """The loss [P], or [P, N] for `"none"`, from costs over the temperature and the rows of the target."""
    loss: Tensor
    present = _present(weight)
    a = present / present.sum(-1, keepdim=True)  # [P, N]
    b = (a.unsqueeze(1) @ target).squeeze(1)  # [P, M]
    balanced = tau_a == tau_b == math.inf
    total = weight.sum(-1)
    if tolerance is not None:
        by_value = balanced and reduction != "none"
        solution = solve_costs(
            cost,
            True,
            "the costs of query and key over the temperature",
            a=a,
            b=b,
            eps=1.0,
            tau_a=None if tau_a == math.inf else tau_a,
            tau_b=None if tau_b == math.inf else tau_b,
            max_iterations=iterations,
            tolerance=tolerance,
            gradient="envelope" if by_value else "implicit",
            backend=backend,
        )
        if by_value:
            # T has the marginals of P: sum T log(P / (a x b)) = <a, f> + <b, g> - <T, C> = value - <T, C>.
            plan = a.unsqueeze(2) * target
            divergence = torch.special.xlogy(plan, target).sum((1, 2)) - torch.special.xlogy(b, b).sum(-1)
            loss = divergence + (plan * cost).sum((1, 2)) - solution.value
            return loss * (total if reduction == "sum" else total > 0)
        columns = b.log() + solution.g
    else:
        exists = torch.nn.functional.pad(present, (0, cost.shape[2] - cost.shape[1]), value=1.0) > 0  # [P, M]
        columns = (exists / exists.sum(-1, keepdim=True, dtype=cost.dtype)).log()
        if iterations > 1:
            columns = _alternate(
                cost, a.log(), b.log(), columns, _share(tau_a), _share(tau_b), iterations - 1, backend
            )[0]

    # log(P_ij / a_i) = columns_j - cost_ij - share * normalizer_i
    logits = columns.unsqueeze(1) - cost
    normalizer = logits.logsumexp(-1)
    matched = (target * logits.masked_fill(target == 0, 0.0)).sum(-1)
    rows = torch.special.xlogy(target, target).sum(-1) - matched + _share(tau_a) * normalizer
    if tau_a != math.inf:
        rows = rows + torch.expm1((1 - _share(tau_a)) * normalizer)  # the mass of P beyond that of T
    loss = weight * rows
    if reduction == "none":
        return loss
    return loss.sum(-1) / (torch.where(total > 0, total, 1.0) if reduction == "mean" else 1.0)


def _present(weight: Tensor) -> Tensor:
    """The weights [P, N], but ones where a problem has none: it is solved like the others, and counts for nothing."""
    return torch.where(weight.sum(-1, keepdim=True) > 0, weight, 1.0)


def _share(tau: float) -> float:
    """What a relaxed marginal leaves of a step."""
    return 1.0 if tau == math.inf else tau / (tau + 1)


def _target_kernel(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    backend: str,
    fixed_number: bool,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """T_ij / a_i [P, N, M] and weights [P, N]. Values are checked here, so that compiled graphs check them too."""
    lacks = _no_alternation(query.device) if fixed_number else {}
    choose_backend(backend, query, query.shape[1], key.shape[1], lacks)
    _check_values(query, key, temperature, query_labels, key_labels, weights, validate)
    (p, n, _), m, dtype = query.shape, key.shape[1], accumulation_dtype(query.dtype)
    weight = query.new_ones(p, n, dtype=dtype) if weights is None else weights.to(dtype, copy=True)
    positive = torch.eye(n, m, dtype=torch.bool, device=query.device).expand(p, n, m)
    if query_labels is not None and key_labels is not None:
        positive = positive | (query_labels.unsqueeze(2) == key_labels.unsqueeze(1))
    exists = _present(weight) > 0
    key_exists = torch.nn.functional.pad(exists, (0, m - n), value=True)
    positive = positive & exists.unsqueeze(2) & key_exists.unsqueeze(1)
    return positive / positive.sum(-1, keepdim=True, dtype=dtype).clamp(min=1), weight


def _target_fake(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    backend: str,
    fixed_number: bool,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    return query.new_empty((*query.shape[:2], key.shape[1]), dtype=dtype), query.new_empty(query.shape[:2], dtype=dtype)


def _alternate_kernel(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    start: Tensor,
    share_a: float,
    share_b: float,
    iterations: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The last potential of the columns [P, M], and the normalisers that the gradient needs (see `Alternation`)."""
    alternation = _alternation(cost, log_a, log_b, start, share_a, share_b, iterations)
    module = backend_module(backend, cost, _no_alternation(cost.device))
    result: tuple[Tensor, Tensor, Tensor] = module.alternate(alternation)
    return result


def _alternate_fake(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    start: Tensor,
    share_a: float,
    share_b: float,
    iterations: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        start.new_empty(start.shape),
        cost.new_empty(iterations, *log_a.shape),
        cost.new_empty(iterations, *log_b.shape),
    )


def _alternate_back_kernel(
    gradient: Tensor,
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    start: Tensor,
    rows: Tensor,
    columns: Tensor,
    share_a: float,
    share_b: float,
    backend: str,
) -> Tensor:
    """The gradient to the costs, from the one to the last potential [P, M]."""
    alternation = _alternation(cost, log_a, log_b, start, share_a, share_b, len(rows))
    module = backend_module(backend, cost, _no_alternation(cost.device))
    result: Tensor = module.alternate_gradient(alternation, rows, columns, gradient.contiguous())
    return result


def _alternate_back_fake(gradient: Tensor, cost: Tensor, *_: Any) -> Tensor:
    return cost.new_empty(cost.shape)


def _alternation(
    cost: Tensor, log_a: Tensor, log_b: Tensor, start: Tensor, share_a: float, share_b: float, iterations: int
) -> Alternation:
    return Alternation(
        cost.contiguous(), log_a.contiguous(), log_b.contiguous(), start.contiguous(), share_a, share_b, iterations
    )


def _no_alternation(device: torch.device) -> dict[str, str]:
    """Why backends do not alternate there: compiled code does so on CPUs only."""
    reason = "it has no kernel for a fixed number of iterations there, only for a tolerance"
    return {} if device.type == "cpu" else {"native": reason}


class _Alternate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        potential, rows, columns = _operators.below_autograd(_alternate, *inputs)
        ctx.save_for_backward(*inputs[:4], rows, columns)
        ctx.options = (*inputs[4:6], inputs[7])
        ctx.mark_non_differentiable(rows, columns)
        return potential, rows, columns

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (_alternate_back(gradient, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


TWICE = "ot_contrastive cannot be differentiated twice: its gradient is formed by hand"
_target = _operators.register("ot_contrastive_target", _target_kernel, _target_fake, no_gradient=TWICE)
_alternate = _operators.register("ot_contrastive_alternate", _alternate_kernel, _alternate_fake, _Alternate)
_alternate_back = _operators.register(
    "ot_contrastive_alternate_backward", _alternate_back_kernel, _alternate_back_fake, no_gradient=TWICE
)
