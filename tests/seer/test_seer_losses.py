"""The loss terms against their formulas, written out in plain float64 torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seer import losses


def random(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("same_label", ["negative", "ignore", "positive"])
def test_disentangle_loss_is_info_nce_averaged_over_layers(same_label: str) -> None:
    view1, view2, ids = random(2, 5, 7), random(2, 5, 7), torch.tensor([0, 1, 0, 2, 1])
    loss, statistics = losses.disentangle_loss(view1, view2, ids, temperature=0.2, same_label=same_label)

    cosines = torch.nn.functional.cosine_similarity(view1[:, :, None], view2[:, None], dim=-1)  # [L, B, B]
    scores, own = cosines / 0.2, torch.eye(5, dtype=torch.bool)
    same = (ids[:, None] == ids) & ~own
    in_denominator = ~same if same_label == "ignore" else torch.ones_like(own)
    positive = own | same if same_label == "positive" else own
    log_sum = scores.masked_fill(~in_denominator, -torch.inf).logsumexp(-1)  # [L, B]
    expected = (log_sum - (scores * positive).sum(-1) / positive.sum(-1)).mean()
    torch.testing.assert_close(loss, expected)

    torch.testing.assert_close(statistics.positive_similarity, ((cosines * positive).sum(-1) / positive.sum(-1)).mean())


@pytest.mark.parametrize("normalization", ["example", "token"])
def test_retain_loss_is_the_norm_over_real_tokens(normalization: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    adapted = [random(3, 4, 6).requires_grad_() for _ in range(3)]
    reference = [random(3, 4, 6) for _ in range(3)]
    loss = losses.retain_loss(adapted, reference, mask, normalization=normalization, layer_share=0.4)

    difference = torch.stack(adapted, dim=1) - torch.stack(reference, dim=1)  # [B, L + 1, T, D]
    if normalization == "example":
        norms = [difference[i][:, mask[i]].square().sum().sqrt() for i in range(3)]
        expected = sum(norms) / 3 * 0.4 / 100
    else:
        norms = [difference[i][:, t].square().sum().sqrt() for i in range(3) for t in range(4) if mask[i, t]]
        expected = sum(norms) / len(norms)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, adapted)
    theirs = torch.autograd.grad(expected, adapted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalization", ["example", "token"])
def test_retain_loss_has_no_gradient_where_nothing_moved(normalization: str) -> None:
    states = [random(2, 3, 4).requires_grad_() for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    loss = losses.retain_loss(states, [s.detach().clone() for s in states], mask, normalization=normalization)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, states):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def plain_kl(head: Tensor, states: Tensor, reference_head: Tensor, reference_states: Tensor) -> Tensor:
    base = (reference_states @ reference_head.T).softmax(-1)
    return (base * (base.log() - (states @ head.T).softmax(-1).log())).sum(-1)


def plain_label_term(
    head: Tensor, states: Tensor, reference_head: Tensor, reference_states: Tensor, labels: Tensor
) -> Tensor:
    rows = range(len(labels))
    base, adapted = (reference_states @ reference_head.T).softmax(-1), (states @ head.T).softmax(-1)
    return -base[rows, labels] * adapted[rows, labels].log()


@pytest.mark.parametrize("chunk_elements", [1, 40, 2**22])
@pytest.mark.parametrize("labels", [None, torch.arange(9) % 4])
def test_kl_is_the_divergence_from_the_base_over_the_whole_vocabulary(
    chunk_elements: int, labels: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk_elements)
    states, reference = random(9, 5, scale=2.0).requires_grad_(), random(9, 5, scale=2.0)
    weight, reference_weight = random(13, 5).requires_grad_(), random(13, 5)
    values = losses.kl_to_base(lambda h: h @ weight.T, states, lambda h: h @ reference_weight.T, reference, labels)
    operands = (weight, states, reference_weight, reference)
    expected = plain_kl(*operands) if labels is None else plain_label_term(*operands, labels)
    torch.testing.assert_close(values, expected)
    upstream = random(9)
    ours = torch.autograd.grad(values, (states, weight), upstream)
    theirs = torch.autograd.grad(expected, (states, weight), upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kl_in_low_precision_is_that_of_the_rounded_logits(dtype: torch.dtype) -> None:
    logits, reference = random(20, 50, dtype=dtype, scale=3.0).requires_grad_(), random(20, 50, dtype=dtype, scale=3.0)
    identity = torch.nn.Identity()
    values = losses.kl_to_base(identity, logits, identity, reference)
    exact = losses.kl_to_base(identity, logits.detach().double(), identity, reference.double())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert gradient.dtype == dtype


class _LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_kl_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 400)
    weight = random(100, 5, dtype=torch.bfloat16)
    states, reference = random(64, 5, dtype=torch.bfloat16).requires_grad_(), random(64, 5, dtype=torch.bfloat16)
    with _LargestTensor() as largest:
        losses.kl_to_base(lambda h: h @ weight.T, states, lambda h: h @ weight.T, reference).sum().backward()
    assert 0 < largest.elements <= max(400, weight.numel(), states.numel())
