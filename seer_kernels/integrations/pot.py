"""Batched entropic transport of POT: `solve_batch` and `solve_sample_batch` of `ot.batch`.

    from seer_kernels.integrations.pot import solve_batch

    result = solve_batch(M, reg=0.1)  # an ot.utils.OTResult; numpy arrays in, numpy arrays out

Each problem of the batch stops by itself. Values, plans and gradients are those of POT at convergence, where it is
reached to the tolerance: `tol` bounds the sum of the errors of a marginal, while POT bounds their Euclidean norm.
Potentials are POT's up to a constant that is added to one and taken from the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seer_kernels._checks import check_choice, check_cloud_pair, check_cost_matrix
from seer_kernels.integrations._host import host_module, supported, to_host, to_tensors
from seer_kernels.sinkhorn import sinkhorn_from_cost
from seer_kernels.sinkhorn.costs import cost_matrix

METRICS = ("sqeuclidean", "euclidean")


def solve_batch(
    M: Any,
    reg: float | None = None,
    a: Any = None,
    b: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> Any:
    """`ot.batch.solve_batch`: entropic transport with given costs.

    Args:
        M: costs (B, n, m), torch or numpy.
        reg: weight of the regularisation, positive. Unregularised transport is not computed here.
        a: weights (B, n), default 1 / n each.
        b: weights (B, m), of the same sums.
        max_iter: most iterations.
        tol: a problem stops when its marginal error is below it.
        method: `"auto"`, `"sinkhorn"` or `"log_sinkhorn"`, which are the same here.
        inner_iter, inner_reg: taken for the signature's sake; they are of the method `"proximal"`.
        reg_type: `"entropy"` or `"kl"` (relative to the product of the weights): what `value` counts. The plan is the
            same.
        grad: to M: `"envelope"`: of `value` and, with the plan held, of `value_linear`; `"autodiff"`: of value, linear
            value and plan, by a linear solve; `"detach"`: none.

    Returns:
        `ot.utils.OTResult` with plan (B, n, m), value (B,), value_linear (B,), potentials ((B, n), (B, m)) and log.

    Raises:
        ImportError: POT is not installed.
        TypeError, ValueError: bad input, or an option that is not supported.

    Warns:
        ConvergenceWarning: as `seer_kernels.sinkhorn_from_cost`.
    """
    utils, backend = host_module("ot.utils", "pot"), host_module("ot.backend", "pot")
    if method == "proximal" or (method == "auto" and not reg):
        raise ValueError(
            "reg must be positive and method not 'proximal': transport without regularisation is not computed here; "
            f"got reg={reg}, method={method!r}. Instead: ot.batch.solve_batch"
        )
    check_choice("method", method, ("auto", "sinkhorn", "log_sinkhorn"))
    if reg is None or not reg > 0:
        raise ValueError(f"reg must be positive; got {reg}")
    check_choice("reg_type", reg_type, ("entropy", "kl"))
    supported("grad", grad, ("envelope", "autodiff", "detach"), "ot.batch.solve_batch, or grad='autodiff'")
    tensors, numpy = to_tensors(M=M, a=a, b=b)
    cost = tensors["M"]
    check_cost_matrix(cost)
    if cost.dim() != 3:
        raise ValueError(f"M must have shape (B, n, m); got {tuple(cost.shape)}")
    for name in "ab":
        weights = tensors[name]
        if weights is not None and weights.requires_grad:
            raise ValueError(
                f"{name} must not require grad: solve_batch differentiates with respect to M. Instead: "
                "seer_kernels.sinkhorn_from_cost"
            )

    differentiable = cost if grad == "autodiff" else cost.detach()
    result = sinkhorn_from_cost(
        differentiable,
        a=tensors["a"],
        b=tensors["b"],
        eps=reg,
        max_iterations=max_iter,
        tolerance=tol,
        gradient="implicit" if grad == "autodiff" else "envelope",
    )
    plan, linear, regularisation = result.plan(), result.transport_cost, result.value - result.transport_cost
    if grad == "envelope" and cost.requires_grad:
        linear = (plan * cost).sum((1, 2))
    if reg_type == "entropy":  # relative to 1 instead of the weights
        regularisation = regularisation + reg * (_negative_entropy(result.a) + _negative_entropy(result.b))
    potentials = (result.f / reg + result.a.log(), result.g / reg + result.b.log())
    return utils.OTResult(
        value=to_host(linear + regularisation, numpy),
        value_linear=to_host(linear, numpy),
        potentials=tuple(to_host(p.detach(), numpy) for p in potentials),
        plan=to_host(plan, numpy),
        backend=backend.get_backend(M),
        log={"n_iter": int(result.iterations.max()) if len(result.iterations) else 0},
    )


def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    reg: float | None = None,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> Any:
    """`ot.batch.solve_sample_batch`: entropic transport between clouds `X_a` (B, n, D) and `X_b` (B, m, D).

    Args:
        metric: `"sqeuclidean"` or `"euclidean"`.
        p: taken for the signature's sake; it is of the metric `"minkowski"`.

    All other arguments, the result, errors and warnings are those of `solve_batch`; gradients go to the clouds.
    """
    supported("metric", metric, METRICS, "ot.batch.dist_batch for the costs, and solve_batch")
    tensors, numpy = to_tensors(X_a=X_a, X_b=X_b, a=a, b=b)
    x, y = tensors["X_a"], tensors["X_b"]
    check_cloud_pair(x, y)
    if x.dim() != 3:
        raise ValueError(f"X_a must have shape (B, n, D); got {tuple(x.shape)}")
    costs = to_host(cost_matrix(x, y, None, None, metric, "auto"), numpy)
    return solve_batch(costs, reg, a, b, max_iter, tol, method, inner_iter, inner_reg, reg_type, grad)


def _negative_entropy(weights: Tensor) -> Tensor:
    return torch.xlogy(weights, weights).sum(-1)
