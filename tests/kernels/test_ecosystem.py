"""The losses inside torch's machinery: operators, compilation, autocast, checkpointing, pickling."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seer_kernels import (
    InfoNCELoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
    backends,
    info_nce,
    nt_xent,
    siglip,
    sup_con,
)

BACKENDS = [name for name, status in backends().items() if "cpu" in status.devices]


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, rows, 8, generator=generator, dtype=dtype) for rows in (5, 9))
    return query.requires_grad_(), key.requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("form", "pairing", "labelled"),
    [
        ("softmax", "rows", True),
        ("symmetric", "rows", False),
        ("sigmoid", "rows", True),
        ("softmax", "views", False),
        ("softmax", "self", True),
    ],
)
def test_opcheck(backend: str, reduction: str, form: str, pairing: str, labelled: bool) -> None:
    query, key = pair()
    rows, keys = 5, 9
    if pairing == "views":
        key, rows, keys = key[:, :5].detach().requires_grad_(), 10, 10
    other = key if pairing != "self" else None
    if pairing == "self":
        keys = rows
    labels = (None, None, None)
    if labelled:
        labels = (torch.arange(rows).expand(2, rows), torch.arange(keys).expand(2, keys), torch.ones(2, rows))
    temperature = torch.tensor(0.1, requires_grad=True)
    bias = torch.tensor(-1.0, requires_grad=True) if form == "sigmoid" else None
    operands = (query, other, temperature, bias, *labels)
    options = (form, pairing, "ignore" if labelled else "negative", True, backend)
    wanted = (True, other is not None, True, bias is not None)
    torch.library.opcheck(
        torch.ops.seer_kernels.contrastive.default, (*operands, *options, reduction, False, True, *wanted)
    )
    detached = (None if x is None else x.detach() for x in operands)
    torch.library.opcheck(
        torch.ops.seer_kernels.contrastive_recompute.default, (torch.rand(2, rows), *detached, *options, *wanted)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [8, 300])
def test_a_graph_that_is_kept_gives_its_gradient_again(backend: str, rows: int) -> None:
    query, key = torch.randn(2, rows, 16, generator=torch.Generator().manual_seed(0)).unbind()
    inputs = [query.requires_grad_(), key.requires_grad_(), torch.tensor(0.2, requires_grad=True)]
    loss = info_nce(query, key, temperature=inputs[2], backend=backend)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)  # may be given away: the next ones are formed again
    kept = [gradient.clone() for gradient in first]
    tripled = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    (of_keys,) = torch.autograd.grad(loss, key, create_graph=True)
    for gradient, before, three_times in zip(first, kept, tripled, strict=True):
        assert torch.equal(gradient, before)
        torch.testing.assert_close(three_times, 3 * before, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(of_keys, kept[1])
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(of_keys.sum(), query)


@pytest.mark.parametrize("pairing", ["rows", "views"])
@pytest.mark.parametrize("from_slopes", [False, True])
def test_opcheck_of_the_scaling(from_slopes: bool, pairing: str) -> None:
    query, key = torch.randn(2, 2, 5, 8, dtype=torch.bfloat16)
    rows = 5 if pairing == "rows" else 10
    nothing, temperature, scale = torch.empty(0), torch.randn(2), torch.rand(2)
    prepared = (torch.randn(2, 5, 8), torch.randn(2, 5, 8), temperature, nothing, nothing, nothing)
    if from_slopes:
        prepared = (nothing, nothing, temperature, nothing, torch.randn(2, rows, rows), torch.randn(2, 10))
    operator = torch.ops.seer_kernels.contrastive_scale.default
    torch.library.opcheck(operator, (*prepared, scale, query, key, pairing, True, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend: str, compiler: str, dynamic: bool) -> None:
    temperature = torch.tensor(0.2, requires_grad=True)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        value, stats = info_nce(
            query * 2.0, key, temperature=temperature.exp(), weights=torch.ones(5), return_stats=True, backend=backend
        )
        return value.sum() + 0.0 * stats.top1_accuracy.sum()

    query, key = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations while it compiles
        value = torch.compile(loss, backend=compiler, fullgraph=True, dynamic=dynamic)(query, key)
        compiled = torch.autograd.grad(value, [query, key, temperature])
    expected = loss(query, key)
    torch.testing.assert_close(value, expected)
    for got, want in zip(compiled, torch.autograd.grad(expected, [query, key, temperature]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_into_the_kernels(backend: str) -> None:
    query, key = pair()
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(query, key, backend=backend)
        inside.sum().backward()
    grown = query.grad
    query.grad = None
    outside = info_nce(query, key, backend=backend)
    outside.sum().backward()
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    torch.testing.assert_close(grown, query.grad, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend: str, use_reentrant: bool) -> None:
    query, key = pair()
    value = checkpoint(lambda q, k: info_nce(q, k, backend=backend).sum(), query, key, use_reentrant=use_reentrant)
    gradients = torch.autograd.grad(value, [query, key]) if not use_reentrant else None
    if gradients is None:
        value.backward()
        gradients = (query.grad, key.grad)
    expected = torch.autograd.grad(info_nce(query, key, backend=backend).sum(), [query, key])
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backward_passes_and_no_second_derivative(backend: str, reduction: str) -> None:
    query, key = pair()
    value = info_nce(query, key, backend=backend, reduction=reduction).sum()
    (first,) = torch.autograd.grad(value, query, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, query, create_graph=True)
    torch.testing.assert_close(3 * first, second)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        second.sum().backward()


def test_vmap_is_a_loop_over_problems_and_functional_gradients_are_refused() -> None:
    query, key = (x.detach() for x in pair())
    torch.testing.assert_close(torch.vmap(info_nce)(query, key), info_nce(query, key))
    with pytest.raises(RuntimeError, match=r"no gradient under torch\.func"):
        torch.func.grad(lambda q: info_nce(q, key).sum())(query)


@pytest.mark.parametrize("symmetric", [False, True])
def test_modules_are_the_functions_and_survive_pickling(symmetric: bool) -> None:
    query, key = pair()
    labels = torch.arange(9) % 3
    same = {"temperature": 0.3, "normalize": False, "reduction": "sum", "backend": "reference"}
    two = {"query_labels": labels[:5], "key_labels": labels}
    loss = InfoNCELoss(symmetric=symmetric, same_label="ignore", **same)
    expected = info_nce(query, key, symmetric=symmetric, same_label="ignore", **two, **same)
    torch.testing.assert_close(reloaded(loss)(query, key, **two), expected)
    views = query, key[:, :5]
    torch.testing.assert_close(
        reloaded(NTXentLoss(same_label="positive", **same))(*views, labels=labels[:5]),
        nt_xent(*views, labels=labels[:5], same_label="positive", **same),
    )
    torch.testing.assert_close(
        reloaded(SupConLoss(**same))(query, labels[:5], keys=key, key_labels=labels),
        sup_con(query, labels[:5], keys=key, key_labels=labels, **same),
    )
    torch.testing.assert_close(
        reloaded(SigLipLoss(bias=-2.0, learnable_temperature=False, **same))(query, key),
        siglip(query, key, bias=-2.0, **same),
    )


def reloaded(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert repr(again) == repr(module)
    return again


def test_learnable_temperature_learns_and_cannot_run_away() -> None:
    query = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    loss = InfoNCELoss(0.07, learnable_temperature=True, temperature_bounds=(0.02, 0.5))
    assert float(loss.temperature) == pytest.approx(0.07)
    assert [name for name, _ in loss.named_parameters()] == ["raw_temperature"]
    optimiser = torch.optim.SGD(loss.parameters(), lr=1e6)
    for key in (query, -query) * 3:  # pushes the temperature far down, then far up
        optimiser.zero_grad()
        loss(query, key).backward()
        optimiser.step()
        assert 0.02 * (1 - 1e-6) <= float(loss.temperature) <= 0.5 * (1 + 1e-6)
    moved = SigLipLoss()
    moved(query, query).backward()
    assert all(p.grad is not None and p.grad != 0 for p in moved.parameters())
    with pytest.raises(ValueError, match=r"temperature must lie between temperature_bounds \(0\.1, 1\.0\); got 0\.07"):
        InfoNCELoss(0.07, learnable_temperature=True, temperature_bounds=(0.1, 1.0))
