"""The loss terms against their formulas, written out in plain float64 torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seer_kernels
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


FORMS = [
    ("info_nce", "negative"),
    ("info_nce", "ignore"),
    ("info_nce", "positive"),
    ("nt_xent", "negative"),
    ("nt_xent", "ignore"),
    ("nt_xent", "positive"),
    ("sup_con", "positive"),
    ("ot_contrastive", "negative"),
    ("ot_contrastive", "positive"),
]


@pytest.mark.parametrize(("form", "same_label"), FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_one_call_is_the_mean_over_positions_and_layers(form: str, same_label: str, weighted: bool) -> None:
    view1, view2 = random(2, 3, 5, 7).requires_grad_(), random(2, 3, 5, 7).requires_grad_()
    ids = torch.tensor([0, 1, 0, 2, 1])
    weights = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]).unsqueeze(1).double() if weighted else None
    options = {"form": form, "same_label": same_label, "temperature": 0.3}
    loss, _ = losses.disentangle_loss(view1, view2, ids, weights=weights, **options)
    parts = []
    for p in range(2):
        kept = torch.arange(5) if weights is None else weights[p, 0].nonzero().squeeze(1)
        for layer in range(3):
            part, _ = losses.disentangle_loss(view1[p, layer, kept], view2[p, layer, kept], ids[kept], **options)
            parts.append(part)
    expected = torch.stack(parts).mean()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (view1, view2)), torch.autograd.grad(expected, (view1, view2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("same_label", ["negative", "ignore", "positive"])
def test_nt_xent_and_sup_con_compare_all_texts_with_all_others(same_label: str) -> None:
    view1, view2, ids = random(5, 7), random(5, 7), torch.tensor([0, 1, 0, 2, 1])
    both, labels = torch.nn.functional.normalize(torch.cat([view1, view2]), dim=-1), ids.repeat(2)
    scores, own = both @ both.T / 0.2, torch.eye(10, dtype=torch.bool)
    partner = own.roll(5, dims=0)
    same = (labels[:, None] == labels) & ~own & ~partner
    positive = partner | same if same_label == "positive" else partner
    excluded = own | same if same_label == "ignore" else own
    log_sum = scores.masked_fill(excluded, -torch.inf).logsumexp(-1)
    expected = (log_sum - (scores * positive).sum(-1) / positive.sum(-1)).mean()
    options = {"temperature": 0.2, "same_label": same_label}
    torch.testing.assert_close(losses.disentangle_loss(view1, view2, ids, form="nt_xent", **options)[0], expected)
    if same_label == "positive":
        torch.testing.assert_close(losses.disentangle_loss(view1, view2, ids, form="sup_con", **options)[0], expected)


def test_transport_form_competes_for_keys() -> None:
    view1, view2, ids = random(4, 7), random(4, 7), torch.tensor([0, 1, 2, 3])
    loss, statistics = losses.disentangle_loss(view1, view2, ids, form="ot_contrastive", temperature=0.2)
    z1, z2 = (torch.nn.functional.normalize(view, dim=-1) for view in (view1, view2))
    log_plan = z1 @ z2.T / 0.2
    for _ in range(4):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    torch.testing.assert_close(loss, -log_plan.diagonal().mean())
    assert statistics is None


def test_keys_of_past_batches_are_further_negatives() -> None:
    view1, view2, ids = random(2, 4, 7), random(2, 4, 7), torch.tensor([0, 1, 0, 2])
    past, past_ids = random(2, 3, 7), torch.tensor([1, 3, 0])
    loss, _ = losses.disentangle_loss(view1, view2, ids, temperature=0.2, same_label="ignore", past=(past, past_ids))
    z1, keys = (torch.nn.functional.normalize(x, dim=-1) for x in (view1, torch.cat([view2, past], 1)))
    scores, labels = z1 @ keys.mT / 0.2, torch.cat([ids, past_ids])
    own = torch.eye(4, 7, dtype=torch.bool)
    scores = scores.masked_fill((ids[:, None] == labels) & ~own, -torch.inf)
    expected = (scores.logsumexp(-1) - scores[:, own].view(2, 4)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("normalization", ["example", "token"])
def test_retain_norms_are_over_real_tokens(normalization: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    adapted = [random(3, 4, 6).requires_grad_() for _ in range(3)]
    reference = [random(3, 4, 6) for _ in range(3)]
    norms = losses.retain_norms(adapted, reference, mask, normalization=normalization)

    difference = torch.stack(adapted, dim=1) - torch.stack(reference, dim=1)  # [B, layers, T, D]
    if normalization == "example":
        expected = [difference[i][:, mask[i]].square().sum().sqrt() for i in range(3)]
    else:
        expected = [
            torch.stack([difference[i][:, t].square().sum().sqrt() for t in range(4) if mask[i, t]]).sum()
            for i in range(3)
        ]
    torch.testing.assert_close(norms, torch.stack(expected))
    ours = torch.autograd.grad(norms.sum(), adapted)
    theirs = torch.autograd.grad(torch.stack(expected).sum(), adapted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_retain_transport_is_the_divergence_of_every_text_and_layer() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    adapted, reference = ([random(3, 4, 6) for _ in range(2)] for _ in range(2))
    adapted[0].requires_grad_()
    values = losses.retain_transport(adapted, reference, mask)
    for i in range(3):
        alone = [
            seer_kernels.sinkhorn_divergence(a[i, mask[i]], r[i, mask[i]], scale_cost="mean")
            for a, r in zip(adapted, reference, strict=True)
        ]
        torch.testing.assert_close(values[i], torch.stack(alone).mean())
    (gradient,) = torch.autograd.grad(values.sum(), adapted[0])
    assert not gradient[~mask].any()
    step = 1e-4 * random(3, 4, 6)
    ahead, behind = (losses.retain_transport([adapted[0] + s * step, adapted[1]], reference, mask) for s in (1, -1))
    torch.testing.assert_close((ahead - behind).sum() / 2, (gradient * step).sum(), rtol=1e-2, atol=1e-7)
    # Exchanging tokens moves no cloud.
    torch.testing.assert_close(
        losses.retain_transport([reference[0].flip(1), reference[1]], reference, mask.new_ones(3, 4)),
        torch.zeros(3, dtype=torch.float64),
    )


@pytest.mark.parametrize("normalization", ["example", "token"])
def test_retain_norms_have_no_gradient_where_nothing_moved(normalization: str) -> None:
    states = [random(2, 3, 4).requires_grad_() for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    norms = losses.retain_norms(states, [s.detach().clone() for s in states], mask, normalization=normalization)
    assert not norms.any()
    for gradient in torch.autograd.grad(norms.sum(), states):
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
@pytest.mark.parametrize("head_is_trained", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_kl_is_the_divergence_from_the_base_over_the_whole_vocabulary(
    chunk_elements: int,
    labels: Tensor | None,
    head_is_trained: bool,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk_elements)
    states, reference = random(9, 5, scale=2.0).requires_grad_(), random(9, 5, scale=2.0)
    weight, reference_weight = random(13, 5).requires_grad_(head_is_trained), random(13, 5)
    heads = [lambda h, w=w: h @ w.T for w in (weight, reference_weight)]
    values = losses.kl_to_base(heads[0], states, heads[1], reference, labels, recompute=recompute)
    operands = (weight, states, reference_weight, reference)
    expected = plain_kl(*operands) if labels is None else plain_label_term(*operands, labels)
    torch.testing.assert_close(values, expected)
    upstream = random(9)
    inputs = (states, weight) if head_is_trained else (states,)
    ours = torch.autograd.grad(values, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(ours, theirs)


def test_kl_beside_a_frozen_head_multiplies_by_it_once_and_once_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression guard: no logits are made a second time for the backward pass."""
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 13 * 3)
    weight, states, reference = random(13, 5), random(9, 5).requires_grad_(), random(9, 5)
    with profile() as found:
        losses.kl_to_base(lambda h: h @ weight.T, states, lambda h: h @ weight.T, reference).sum().backward()
    products = sum(event.count for event in found.key_averages() if event.key == "aten::mm")
    assert products == 3 * 3 + 1  # both heads and the way back for 3 chunks; one row tells the vocabulary


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


def test_kl_keeps_small_gradients_of_float16() -> None:
    """Unscaled they would lie among float16's few subnormal numbers; a gradient scaler comes from above."""
    logits = torch.randn(4, 10_000).half()
    reference = (logits + 0.01 * torch.randn(4, 10_000)).half()
    gradients = []
    for dtype in (torch.float16, torch.float64):
        states = logits.to(dtype).requires_grad_()
        values = losses.kl_to_base(torch.nn.Identity(), states, torch.nn.Identity(), reference.to(dtype))
        gradients += torch.autograd.grad(values.sum(), states, torch.tensor(2.0**12))
    ours, exact = gradients
    assert (ours.double() - exact).norm() < 2e-3 * exact.norm()


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
