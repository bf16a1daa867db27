"""The losses inside torch's machinery: operators, compilation, autocast, checkpointing, pickling."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seer_kernels import InfoNCELoss, backends, info_nce

BACKENDS = [name for name, status in backends().items() if "cpu" in status.devices]


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, rows, 8, generator=generator, dtype=dtype) for rows in (5, 9))
    return query.requires_grad_(), key.requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labelled", [False, True])
def test_opcheck(backend: str, reduction: str, labelled: bool) -> None:
    query, key = pair()
    labels = (torch.arange(5).expand(2, 5), torch.arange(9).expand(2, 9), torch.ones(2, 5)) if labelled else (None,) * 3
    rule = "ignore" if labelled else "negative"
    temperature = torch.tensor(0.1, requires_grad=True)
    torch.library.opcheck(
        torch.ops.seer_kernels.contrastive.default,
        (query, key, temperature, *labels, rule, True, reduction, backend, False, True, True, True, True),
    )
    torch.library.opcheck(
        torch.ops.seer_kernels.contrastive_recompute.default,
        (
            torch.rand(2, 5),
            *(x.detach() for x in (query, key, temperature)),
            *labels,
            rule,
            True,
            backend,
            True,
            False,
            True,
        ),
    )
    torch.library.opcheck(
        torch.ops.seer_kernels.contrastive_scale.default,
        (torch.randn(2, 5, 8), torch.empty(0), torch.randn(2), torch.rand(2), torch.bfloat16),
    )


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


def test_module_is_the_function_and_survives_pickling() -> None:
    query, key = pair()
    labels = torch.arange(9) % 3
    module = InfoNCELoss(0.3, same_label="ignore", normalize=False, reduction="sum", backend="reference")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    options = {"query_labels": labels[:5], "key_labels": labels}
    expected = info_nce(
        query,
        key,
        temperature=0.3,
        same_label="ignore",
        normalize=False,
        reduction="sum",
        backend="reference",
        **options,
    )
    torch.testing.assert_close(again(query, key, **options), expected)
    assert repr(again) == repr(module)
    assert "same_label='ignore'" in repr(module)
