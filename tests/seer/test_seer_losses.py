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


@pytest.mark.parametrize("chunk_elements", [1, 40, 2**22])
def test_kl_is_the_divergence_from_the_base_over_the_whole_vocabulary(
    chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk_elements)
    logits, reference = random(9, 13, scale=4.0).requires_grad_(), random(9, 13, scale=4.0)
    loss = losses.kl_to_base(logits, reference)
    base = reference.softmax(-1)
    expected = (base * (base.log() - logits.softmax(-1).log())).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(3.0 * loss, logits)
    (theirs,) = torch.autograd.grad(3.0 * expected, logits)
    torch.testing.assert_close(ours, theirs)
    torch.autograd.gradcheck(lambda values: losses.kl_to_base(values, reference), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kl_in_low_precision_is_that_of_the_rounded_logits(dtype: torch.dtype) -> None:
    logits, reference = random(20, 50, dtype=dtype, scale=3.0).requires_grad_(), random(20, 50, dtype=dtype, scale=3.0)
    loss = losses.kl_to_base(logits, reference)
    exact = losses.kl_to_base(logits.detach().double(), reference.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == dtype


class _LargestFloat32(TorchDispatchMode):
    """Records the most elements that any float32 tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                self.elements = max(self.elements, leaf.numel())
        return result


def test_kl_never_holds_all_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 400)
    logits = random(64, 100, dtype=torch.bfloat16).requires_grad_()
    with _LargestFloat32() as largest:
        losses.kl_to_base(logits, random(64, 100, dtype=torch.bfloat16)).backward()
    assert 0 < largest.elements <= 400
