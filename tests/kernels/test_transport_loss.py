"""The contrastive loss on transport plans: against InfoNCE, plain Sinkhorn, POT and finite differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from seer_kernels import ConvergenceWarning, OTContrastiveLoss, backends, info_nce, ot_contrastive
from seer_kernels.sinkhorn import native, reference
from seer_kernels.sinkhorn.problem import Alternation

F64 = torch.float64
CONVERGED = {"iterations": 20000, "tolerance": 1e-11}
NATIVE_OR_REFERENCE = [name for name in ("reference", "native") if "cpu" in backends()[name].devices]
RELAXED = [None, 0.7, (0.7, None), (None, 0.4)]


def features(*leading: int, n: int = 6, m: int | None = None, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(*leading, k, d, generator=generator, dtype=F64) for k in (n, n if m is None else m))
    return query.requires_grad_(), key.requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def row_weights(*shape: int) -> Tensor:
    """Random weights; the second row of each problem has none."""
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.1
    weights[..., 1] = 0.0
    return weights


def both(loss: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
    """A loss and its gradients."""
    return (loss.detach(), *torch.autograd.grad(loss.sum(), sources))


def by_scaling(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    iterations: int,
    target: Tensor,
    weights: Tensor,
    tau: tuple[float | None, float | None] = (None, None),
) -> Tensor:
    """The mean loss of one problem whose pairs all exist, written with scalings of exp(-C) and left to autograd."""
    cosine = torch.nn.functional.normalize(query, dim=-1) @ torch.nn.functional.normalize(key, dim=-1).mT
    kernel = torch.exp((cosine - 1) / temperature)
    a = weights / weights.sum()
    b = a @ target
    power_a, power_b = (1.0 if t is None else t / (t + 1) for t in tau)
    v = torch.full_like(b, 1 / len(b))
    for step in range(iterations):
        u = (kernel @ v) ** -power_a
        if step < iterations - 1:
            v = b * ((a * u) @ kernel) ** -power_b
    T, P = a.unsqueeze(1) * target, (a * u).unsqueeze(1) * kernel * v
    on = T > 0
    return (T[on] * (T[on] / P[on]).log()).sum() - T.sum() + P.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_normalisation_is_info_nce(weighted: bool, normalize: bool, reduction: str) -> None:
    """Paired: value and gradients are equal, the constant being 0."""
    sources = (*features(2, 3), scalar(0.2))
    weights = row_weights(2, 3, 6) if weighted else None
    options = {"normalize": normalize, "weights": weights, "reduction": reduction}
    ours = ot_contrastive(*sources[:2], temperature=sources[2], iterations=1, **options)
    theirs = info_nce(*sources[:2], temperature=sources[2], **options)
    torch.testing.assert_close(both(ours, *sources), both(theirs, *sources), rtol=1e-11, atol=1e-12)


def test_one_normalisation_with_labels_is_info_nce_less_a_constant() -> None:
    """With a bank, one key of which has a label of no query: like in InfoNCE it is a negative."""
    sources = features(2, m=9)
    query_labels, key_labels = torch.tensor([0, 1, 0, 2, 1, 0]), torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 7])
    options = {"query_labels": query_labels, "key_labels": key_labels, "weights": row_weights(2, 6)}
    ours = ot_contrastive(*sources, iterations=1, reduction="none", **options)
    theirs = info_nce(*sources, same_label="positive", reduction="none", **options)
    exists = torch.nn.functional.pad(options["weights"] > 0, (0, 3), value=True)
    positives = ((query_labels.unsqueeze(1) == key_labels) & exists.unsqueeze(1)).sum(-1)
    constant = options["weights"] * positives.clamp(min=1).double().log()
    torch.testing.assert_close(both(ours + constant, *sources), both(theirs, *sources), rtol=1e-11, atol=1e-12)
    later = ot_contrastive(*sources, iterations=3, reduction="none", **options)
    assert torch.isfinite(later).all()
    assert torch.isfinite(torch.autograd.grad(later.sum(), sources)[1]).all()


@pytest.mark.parametrize("tau", [(None, None), (0.7, 0.7), (0.7, None), (None, 0.4)])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("backend", NATIVE_OR_REFERENCE)
def test_fixed_iterations_against_scalings(
    tau: tuple[float | None, float | None], labelled: bool, backend: str
) -> None:
    sources = (*features(), scalar(0.3))
    weights = row_weights(6) + 0.3
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    target = (labels.unsqueeze(1) == labels).to(F64) if labelled else torch.eye(6, dtype=F64)
    target = target / target.sum(-1, keepdim=True)
    options = {"weights": weights, "query_labels": labels if labelled else None, "tau": tau, "backend": backend}
    losses = []
    for iterations in (1, 2, 5):
        ours = ot_contrastive(*sources[:2], temperature=sources[2], iterations=iterations, **options)
        theirs = by_scaling(*sources, iterations, target, weights, tau)
        torch.testing.assert_close(both(ours, *sources), both(theirs, *sources), rtol=1e-10, atol=1e-11)
        losses.append(float(ours.detach()))
    assert len({round(loss, 6) for loss in losses}) == 3


@pytest.mark.parametrize("tau", RELAXED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labelled", [False, True])
def test_gradients_against_finite_differences(tau: Any, reduction: str, labelled: bool) -> None:
    """Beyond the first normalisation: two and four, and at convergence on each backend."""
    sources = (*features(2, n=4, m=6 if labelled else 4, d=3), scalar(0.3))
    options: dict[str, Any] = {"tau": tau, "reduction": reduction, "weights": row_weights(2, 4)}
    if labelled:
        options |= {"query_labels": torch.tensor([0, 1, 1, 0]), "key_labels": torch.tensor([0, 1, 1, 0, 1, 0])}
    for backend, how in itertools.product(NATIVE_OR_REFERENCE, ({"iterations": 2}, {"iterations": 4}, CONVERGED)):
        how = how | {"backend": backend}

        def loss(query: Tensor, key: Tensor, temperature: Tensor, how: dict[str, Any] = how) -> Tensor:
            return ot_contrastive(query, key, temperature=temperature, **options, **how)

        assert torch.autograd.gradcheck(loss, sources, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


@pytest.mark.skipif("native" not in NATIVE_OR_REFERENCE, reason="the compiled module is not there")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("shape", "threads"),
    [((3, 1, 1), 1), ((2, 5, 7), 1), ((1, 33, 130), 1), ((5, 16, 16), 2), ((1, 300, 257), 2), ((3, 257, 300), 2)],
)
def test_compiled_alternation_is_the_reference(shape: tuple[int, int, int], threads: int, dtype: torch.dtype) -> None:
    """Peaked costs, absent rows and columns, one core per problem and all on one, within the error of plain torch."""
    P, N, M = shape
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=F64)

    cost, log_a, log_b = 60 * random(P, N, M), random(P, N).log_softmax(1), random(P, M).log_softmax(1)
    if N > 4:
        log_a[:, 1], log_b[:, 2] = -math.inf, -math.inf
    exact = Alternation(cost, log_a, log_b, random(P, M), 0.7, 0.9, 3)
    gradient = random(P, M) - 0.5

    def run(backend: Any, to: torch.dtype) -> tuple[Tensor, ...]:
        tensors = {name: getattr(exact, name).to(to) for name in ("cost", "log_a", "log_b", "start")}
        rounded = dataclasses.replace(exact, **tensors)
        potential, rows, columns = backend.alternate(rounded)
        slope = backend.alternate_gradient(rounded, rows, columns, gradient.to(to))
        return tuple(x.to(F64) for x in (potential, rows, columns, slope))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = run(native, dtype)
    finally:
        torch.set_num_threads(before)
    for name, got, torch_in_dtype, want in zip(
        ("potential", "rows", "columns", "gradient"), ours, run(reference, dtype), run(reference, F64), strict=True
    ):
        assert torch.equal(got.isfinite(), want.isfinite()), name
        finite = want.isfinite()
        allowed = 3 * (torch_in_dtype - want)[finite].abs().max() + 1e-13
        assert (got - want)[finite].abs().max() <= allowed, name


def test_many_iterations_converge_to_the_converged() -> None:
    """The exact gradient of many iterations, the linear solve and the envelope theorem agree."""
    sources, weights = (*features(2), scalar(0.3)), row_weights(2, 6)
    for tau in (None, (0.7, 0.4)):
        options = {"temperature": sources[2], "weights": weights, "tau": tau}
        many = ot_contrastive(*sources[:2], iterations=400, reduction="sum", **options)
        solved = ot_contrastive(*sources[:2], reduction="none", **options, **CONVERGED).sum(-1)
        by_value = ot_contrastive(*sources[:2], reduction="mean", **options, **CONVERGED) * weights.sum(-1)
        want = both(many, *sources)
        for got in (solved, by_value):
            torch.testing.assert_close(both(got, *sources), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", NATIVE_OR_REFERENCE)
@pytest.mark.parametrize("tau", [None, (0.7, 0.4)])
def test_converged_loss_against_pot(backend: str, tau: tuple[float, float] | None) -> None:
    query, key = (x.detach() for x in features())
    weights, labels = row_weights(6) + 0.2, torch.tensor([0, 1, 0, 2, 1, 0])
    target = (labels.unsqueeze(1) == labels).to(F64)
    a = (weights / weights.sum()).numpy()
    T = a[:, None] * (target / target.sum(-1, keepdim=True)).numpy()
    b = T.sum(0)
    cost = 1 - torch.nn.functional.cosine_similarity(query.unsqueeze(1), key, dim=-1).numpy()
    if tau is None:
        plan = ot.sinkhorn(a, b, cost, 0.3, method="sinkhorn_log", numItermax=100000, stopThr=1e-13)
    else:
        taus = tuple(0.3 * t for t in tau)
        plan = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, 0.3, taus, reg_type="kl", numItermax=100000, stopThr=1e-14)
    expected = float(np.where(T > 0, T * np.log(np.where(T > 0, T / plan, 1)), 0).sum() - T.sum() + plan.sum())
    options = {"temperature": 0.3, "weights": weights, "query_labels": labels, "tau": tau, **CONVERGED}
    assert float(ot_contrastive(query, key, backend=backend, **options)) == pytest.approx(expected, rel=1e-7)


def test_invariances() -> None:
    query, key = (x.detach() for x in features())
    weights, order = row_weights(6), torch.tensor([3, 0, 5, 1, 4, 2])
    for how in ({"iterations": 3}, {"iterations": 3, "tau": 0.5}, CONVERGED, {**CONVERGED, "tau": 0.5}):
        base = ot_contrastive(query, key, weights=weights, **how)
        # the order of the pairs, and the lengths of the features
        scales = torch.linspace(0.1, 9.0, 6, dtype=F64).unsqueeze(1)
        mixed = ot_contrastive((scales * query)[order], (3 * key)[order], weights=5 * weights[order], **how)
        torch.testing.assert_close(mixed, base, rtol=1e-7, atol=1e-9)
        # a pair of weight 0 does not exist
        there = weights > 0
        fewer = ot_contrastive(query[there], key[there], weights=weights[there], **how)
        torch.testing.assert_close(fewer, base, rtol=1e-7, atol=1e-9)
    # at convergence queries and keys may swap, and what is added to whole rows and columns cancels: popular keys gain
    # nothing, which one normalisation lets them
    converged = ot_contrastive(query, key, **CONVERGED)
    torch.testing.assert_close(ot_contrastive(key, query, **CONVERGED), converged, rtol=1e-7, atol=1e-9)
    offsets, one = torch.linspace(-0.5, 0.5, 6, dtype=F64).unsqueeze(1), torch.ones(6, 1, dtype=F64)
    popular = torch.cat([query, one, offsets], 1), torch.cat([key, offsets[order], one], 1)
    how = {"normalize": False, "temperature": 1.0}
    plain, shifted = (ot_contrastive(*pair, **how, **CONVERGED) for pair in ((query, key), popular))
    torch.testing.assert_close(shifted, plain, rtol=1e-7, atol=1e-9)
    first = [float(ot_contrastive(*pair, **how, iterations=1)) for pair in ((query, key), popular)]
    assert abs(first[0] - first[1]) > 1e-3


def test_loss_vanishes_only_where_the_plan_is_the_target() -> None:
    apart = torch.eye(5, dtype=F64)
    for how in ({"iterations": 1}, {"iterations": 4}, CONVERGED):
        assert 0 <= float(ot_contrastive(apart, apart, temperature=0.02, **how)) < 1e-12 + 5 * math.exp(-50)
        assert float(ot_contrastive(apart, apart.roll(1, 0), temperature=0.1, **how)) > 5
    labels = torch.tensor([0, 0, 1, 1, 1])
    gathered = apart[labels]
    for how in ({"iterations": 1}, {"iterations": 4}, CONVERGED):
        loss = float(ot_contrastive(gathered, gathered, temperature=0.02, query_labels=labels, **how))
        assert abs(loss) < 1e-12


def test_weakly_relaxed_marginals_are_constraints() -> None:
    query, key = features()
    for how in ({"iterations": 4}, CONVERGED):
        strict = ot_contrastive(query, key, **how)
        torch.testing.assert_close(ot_contrastive(query, key, tau=1e7, **how), strict, rtol=1e-5, atol=0)
        assert not torch.allclose(ot_contrastive(query, key, tau=0.5, **how), strict, rtol=1e-2)


@pytest.mark.parametrize("how", [{"iterations": 3}, {"iterations": 500, "tolerance": 1e-5}])
def test_degenerate_problems(how: dict[str, Any]) -> None:
    """Problems without weight, rows of zeros, a single pair, no pairs, no problems: 0 or a number, never NaN."""
    query, key = features(3)
    for reduction in ("mean", "sum", "none"):
        weights = torch.ones(3, 6, dtype=F64)
        weights[1] = 0
        options = {"weights": weights, "reduction": reduction, "temperature": 0.5, **how}
        value, *gradients = both(ot_contrastive(query, key, **options), query, key)
        assert (value[1] == 0).all()
        assert all((g[1] == 0).all() and g[0].abs().sum() > 0 for g in gradients)
        assert torch.isfinite(value).all()
    blank = query.detach().clone()
    blank[:, 2] = 0
    blank.requires_grad_()
    value, gradient = both(ot_contrastive(blank, key, temperature=0.5, **how), blank)
    assert torch.isfinite(value).all()
    assert (gradient[:, 2] == 0).all()
    torch.testing.assert_close(ot_contrastive(query[:, :1], key[:, :1], **how), torch.zeros(3, dtype=F64))
    for empty in (query[:, :0], query[:0]):
        loss = ot_contrastive(empty, empty, **how)
        assert loss.shape == empty.shape[:-2]
        assert (loss == 0).all()
        assert both(loss, query)[1].eq(0).all()
        assert ot_contrastive(empty, empty, reduction="none", **how).shape == empty.shape[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_lower_precision(dtype: torch.dtype, temperature: float) -> None:
    """Close to fp64 on the same numbers: a few roundings of the logits, whose size is 1 / temperature."""
    narrow = [x.detach().to(dtype).requires_grad_() for x in features(2, n=12, d=16)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    for how in ({"iterations": 1}, {"iterations": 5}, {"iterations": 5, "tau": 0.5}):
        got = both(ot_contrastive(*narrow, temperature=temperature, **how), *narrow)
        want = both(ot_contrastive(*wide, temperature=temperature, **how), *wide)
        assert got[0].dtype == torch.float32
        assert got[1].dtype == dtype
        torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=16 * 2**-24 / temperature)
        for ours, exact in zip(got[1:], want[1:], strict=True):
            bound = exact.abs().max() * (64 * 2**-24 / temperature + torch.finfo(dtype).eps)
            assert (ours.double() - exact).abs().max() <= bound


def test_descent_undoes_a_popular_key() -> None:
    query, key = (x.detach().float() for x in features(n=8, d=6, seed=3))
    key = (key + 2 * key[:1]).requires_grad_()
    loss_of = OTContrastiveLoss(0.2, learnable_temperature=True, iterations=4)
    optimizer = torch.optim.Adam([key, *loss_of.parameters()], lr=0.05)
    before = loss_of(query, key).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(query, key).backward()
        optimizer.step()
    assert loss_of(query, key).item() < before / 10
    assert 0.01 < loss_of.temperature.item() < 0.2


def test_operators_compilation_and_autocast() -> None:
    sources = (*features(2), scalar(0.3))
    cost = torch.rand(2, 5, 6, dtype=F64).requires_grad_()
    ones = torch.ones(2, 5, dtype=F64), torch.ones(2, 6, dtype=F64)
    logs = tuple((x / x.shape[1]).log() for x in (*ones, ones[1]))
    torch.library.opcheck(torch.ops.seer_kernels.ot_contrastive_alternate.default, (cost, *logs, 1.0, 0.5, 3, "auto"))
    labels = torch.arange(6).expand(2, 6)
    pairs = (*(x.detach() for x in sources), labels, labels, row_weights(2, 6))
    torch.library.opcheck(torch.ops.seer_kernels.ot_contrastive_target.default, (*pairs, "auto", True, False))

    def loss(query: Tensor, key: Tensor, temperature: Tensor, weights: Tensor) -> Tensor:
        fixed = ot_contrastive(query, key, temperature=temperature, weights=weights, iterations=3)
        return fixed + ot_contrastive(query, key, temperature=temperature, iterations=2000, tolerance=1e-9)

    compiled, weights = torch.compile(loss, backend="aot_eager", fullgraph=True), row_weights(2, 6)
    want = both(loss(*sources, weights), *sources)
    torch.testing.assert_close(both(compiled(*sources, weights), *sources), want)
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        compiled(*sources, -weights)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(both(loss(*sources, weights), *sources), want, rtol=0, atol=0)
    (first,) = torch.autograd.grad(ot_contrastive(*sources[:2]).sum(), sources[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()


def test_not_converged_is_said() -> None:
    query, key = features()
    with pytest.warns(ConvergenceWarning, match=r"1 of 1 transport problems did not converge: after 2 iterations"):
        ot_contrastive(query, key, temperature=0.05, iterations=2, tolerance=1e-9)


X, LABELS = torch.randn(2, 4, 3), torch.arange(4)
MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [[1.0]]}, TypeError, r"query must be a tensor"),
    ({"key": X.double()}, TypeError, r"key must have the dtype of query"),
    ({"key": X[:, :3]}, ValueError, r"key must have at least as many rows as query"),
    ({"key": torch.randn(2, 6, 3)}, ValueError, r"key must have 4 rows like query unless there are labels.*got 6"),
    ({"key_labels": LABELS}, ValueError, r"key_labels were given without query_labels"),
    ({"query_labels": LABELS.float()}, TypeError, r"query_labels must hold integers"),
    ({"temperature": 0.0}, ValueError, r"temperature must be positive and finite; got 0\.0"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, r"temperature must be positive and finite; got -1\.0"),
    ({"iterations": 0}, ValueError, r"iterations must be at least 1; got 0"),
    ({"iterations": 2.0}, TypeError, r"iterations must be an integer"),
    ({"tolerance": -1.0}, ValueError, r"tolerance must be finite and not negative; got -1\.0"),
    ({"tau": 0.0}, ValueError, r"tau must be positive and finite, or None for a balanced marginal; got 0\.0"),
    ({"tau": (1.0,)}, ValueError, r"tau must be None, a float, or a pair of these for queries and keys; got \(1\.0,\)"),
    ({"tau": (None, "1")}, TypeError, r"tau must be None or a float; got '1'"),
    ({"weights": -torch.ones(4)}, ValueError, r"weights must be finite and not negative"),
    ({"weights": torch.ones(5)}, ValueError, r"weights must have shape \(2, 4\) or \(4,\); got \(5,\)"),
    ({"reduction": "avg"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto'"),
    ({"backend": "triton", "tolerance": 1e-3}, RuntimeError, r"backend='triton' cannot run on cpu"),
    ({"query": X * torch.nan, "validate": True}, ValueError, r"query must be finite; row \(0, 0\)"),
    ({"query": X * torch.nan, "tolerance": 0.1}, ValueError, r"the costs of query and key over the temperature must"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), MISTAKES, ids=lambda v: v[:30] if isinstance(v, str) else ""
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ot_contrastive(**{"query": X, "key": X.clone(), **arguments})


def test_module_checks_its_options_when_it_is_built() -> None:
    for options, message in (
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"tau": -1.0}, "tau must be positive"),
        ({"tolerance": math.nan}, "tolerance must be finite"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            OTContrastiveLoss(**options)
