"""The three terms of SEER's loss, on hidden states and logits that somebody else computed.

Source: Chen et al., arXiv 2502.05242; where its text and its code differ, the docstrings say which is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

import seer_kernels
from seer.errors import InputError
from seer.shared_concepts import info_nce_of_sets
from seer_kernels import ContrastiveStatistics, ot_contrastive, sinkhorn_divergence

Head: TypeAlias = Callable[[Tensor], Tensor]
"""The part of a model that turns states [k, D] into logits [k, V]."""

_CHUNK_ELEMENTS = 2**22  # logits held in float32 at a time: 16 MiB


def disentangle_loss(
    view1: Tensor,
    view2: Tensor,
    concept_ids: Tensor,
    *,
    form: str = "info_nce",
    temperature: float = 0.1,
    same_label: str = "negative",
    weights: Tensor | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    negatives: str = "local",
) -> tuple[Tensor, ContrastiveStatistics | None]:
    """L_d: a contrastive loss between the two texts of every pair, averaged over token positions and layers.

    Args:
        view1: [..., B, D] representations of the first texts; leading dimensions (positions, layers) are problems of
            their own.
        view2: [..., B, D] of the second texts; pair i is of one concept.
        concept_ids: (B,) int64; or (B, 2, C) bool, which concepts both texts of every pair have: any shared one counts.
            The latter is for "info_nce" with local negatives, without weights or keys of the past.
        form: "info_nce" (first texts against second texts; the paper's), "nt_xent" (all 2 B texts against all others;
            the paper's variant), "sup_con" (the same, every text of the concept a positive) or "ot_contrastive" (the
            plan of optimal transport from first to second texts should be the one that the positives make).
        temperature: divides the cosines.
        same_label: what another pair of the same concept is: "negative" (the paper), "ignore" or "positive". "sup_con"
            knows "positive" only, "ot_contrastive" has no "ignore".
        weights: broadcasts to (..., B); pairs of weight 0 do not exist.
        past: keys [..., M, D] of past batches and their concept ids (M,), further negatives of "info_nce".
        negatives: "local": the texts of this process. "gather", "ring": those of all processes, see
            `seer_kernels.distributed`; not for "ot_contrastive".

    Returns:
        The loss, 0-d, and its statistics, each 0-d; "ot_contrastive" has none.
    """
    if concept_ids.ndim == 3:
        losses, statistics = info_nce_of_sets(view1, view2, concept_ids, temperature=temperature, same_label=same_label)
        return losses.mean(), ContrastiveStatistics(*(values.mean() for values in statistics))
    options: dict[str, Any] = {"temperature": temperature}
    if form == "ot_contrastive":
        labels = concept_ids if same_label == "positive" else None
        return ot_contrastive(view1, view2, query_labels=labels, weights=weights, **options).mean(), None
    family: Any = seer_kernels
    if negatives != "local":
        family, options["mode"] = seer_kernels.distributed, negatives
    options["return_stats"] = True
    if form == "info_nce":
        keys, key_ids = view2, concept_ids
        if past is not None:
            keys, key_ids = torch.cat([view2, past[0]], dim=-2), torch.cat([concept_ids, past[1]])
        losses, statistics = family.info_nce(
            view1,
            keys,
            query_labels=concept_ids,
            key_labels=key_ids,
            same_label=same_label,
            weights=weights,
            **options,
        )
    elif form == "nt_xent":
        losses, statistics = family.nt_xent(
            view1, view2, labels=concept_ids, same_label=same_label, weights=weights, **options
        )
    else:
        both = None if weights is None else torch.cat([weights, weights], dim=-1)
        losses, statistics = family.sup_con(
            torch.cat([view1, view2], dim=-2), concept_ids.repeat(2), weights=both, **options
        )
    return losses.mean(), ContrastiveStatistics(*(values.mean() for values in statistics))


def retain_norms(
    adapted: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor, *, normalization: str = "example"
) -> Tensor:
    """L_r as norms: how far the hidden states of every text moved from the base model's, on real tokens.

    Args:
        adapted: hidden states of the adapted model, some or all layers, each [B, T, D].
        reference: those of the base model.
        mask: (B, T) bool, True at real tokens.
        normalization: "example": the Euclidean norm over layers, tokens and features, as in the paper. "token": the sum
            over tokens of the norms over layers and features.

    Returns:
        (B,), float32 (float64 for float64 states).
    """
    dtype = torch.promote_types(adapted[0].dtype, torch.float32)
    # A norm of norms: never holds more than one layer's difference, and its gradient at no difference is 0, not NaN.
    per_layer = torch.stack(
        [torch.linalg.vector_norm(a - r, dim=-1, dtype=dtype) for a, r in zip(adapted, reference, strict=True)]
    )  # [layers, B, T]
    per_token = torch.linalg.vector_norm(per_layer.masked_fill(~mask, 0.0), dim=0)  # [B, T]
    norms: Tensor = per_token.sum(-1) if normalization == "token" else torch.linalg.vector_norm(per_token, dim=-1)
    return norms


def retain_transport(adapted: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor) -> Tensor:
    """L_r as transport: the Sinkhorn divergence between a text's cloud of token states after and before.

    It is blind to which token is where, and in units of the mean squared distance between the two clouds, so that
    layers of any scale count alike.

    Args:
        adapted, reference, mask: as in `retain_norms`.

    Returns:
        (B,), the mean over layers; float32 (float64 for float64 states).

    Raises:
        InputError: the layers have different sizes.
    """
    sizes = sorted({part.shape[-1] for part in adapted})
    if len(sizes) > 1:
        raise InputError(
            f"--retain_layers: expected layers of one hidden size for --retain_loss sinkhorn, got sizes {sizes}"
        )
    lengths = mask.sum(-1)
    front = (~mask).int().argsort(dim=-1, stable=True)  # [B, T]: real tokens first, in their order
    row = torch.arange(len(mask), device=mask.device).unsqueeze(1)
    after, before = (torch.cat([part[row, front] for part in states]) for states in (adapted, reference))
    lengths = lengths.repeat(len(adapted))  # of [layers x B, T, D]
    divergences = sinkhorn_divergence(after, before, x_lengths=lengths, y_lengths=lengths, scale_cost="mean")
    return divergences.view(-1, len(mask)).mean(0)


def kl_to_base(
    head: Head,
    states: Tensor,
    reference_head: Head,
    reference_states: Tensor,
    labels: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """How far the next-token distribution moved from the base model's, token by token.

    By default KL(p_base || p_adapted) over the full vocabulary, in nats: the paper's text speaks of a distance of the
    two distributions. With labels, the form of the paper's code: -p_base(y) log p_adapted(y) of the label y alone.

    Logits exist for a few tokens at a time only. The gradient is formed while they do, and the backward pass scales it;
    a head in training computes them once more there.

    Args:
        head: maps states [k, D] to logits [k, V].
        states: [K, D], what the head of the adapted model reads at K tokens; get a gradient, and so does the head.
        reference_head: that of the base model; gets no gradient.
        reference_states: [K, D] of the base model.
        labels: (K,) int64, the tokens that follow.
        recompute: compute logits once more in the backward pass whether or not the head is trained: no backward pass
            through the head within the forward pass, which engines that shard weights (FSDP, ZeRO-3) do not survive.

    Returns:
        (K,), float32 (float64 for float64 logits).
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not recompute):
        some_logits = head(states[:1].detach())
    rows = max(1, _CHUNK_ELEMENTS // some_logits.shape[-1])

    def divergence(states: Tensor, start: int) -> Tensor:
        chunk = slice(start, start + rows)
        return _divergence(
            head, states, reference_head, reference_states[chunk], None if labels is None else labels[chunk]
        )

    if not (recompute or some_logits.requires_grad):
        values: Tensor = _TokenwiseValues.apply(states, divergence, rows)  # type: ignore[no-untyped-call]
        return values
    return torch.cat(
        [
            checkpoint(
                divergence,
                part,
                start,
                use_reentrant=False,
                preserve_rng_state=False,
                determinism_check="none",  # ZeRO-3 puts weights into place and takes them away again in between
            )
            for start, part in zip(range(0, len(states), rows), torch.split(states, rows), strict=True)
        ]
    )


class _TokenwiseValues(torch.autograd.Function):
    """(K,) values of states [K, D], chunk by chunk of `rows`, each of its own token's state alone: one gradient [K, D],
    formed with the values, serves any gradient from above."""

    SCALE = 2.0**10
    """Of the stored gradient: keeps small ones in the range of float16."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, values_of: Callable[[Tensor, int], Tensor], rows: int) -> Tensor:
        """`values_of` takes some states and the number of the first."""
        with_gradient = ctx.needs_input_grad[0]
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, len(states), rows):
            with torch.set_grad_enabled(with_gradient):
                part = states[start : start + rows].detach().requires_grad_(with_gradient)
                found = values_of(part, start)
                if with_gradient:
                    gradients += torch.autograd.grad(found.sum() * _TokenwiseValues.SCALE, part)
            values.append(found.detach())
        if with_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * (upstream / _TokenwiseValues.SCALE).unsqueeze(-1)).to(gradient.dtype), None, None


def _divergence(
    head: Head, states: Tensor, reference_head: Head, reference_states: Tensor, labels: Tensor | None
) -> Tensor:
    """`kl_to_base` of so few tokens that their logits may be held in float32."""
    with torch.no_grad():
        base = _log_probabilities(reference_head(reference_states))  # [k, V]
    adapted = _log_probabilities(head(states))
    if labels is None:
        return kl_div(adapted, base, reduction="none", log_target=True).sum(-1)
    own = labels.unsqueeze(-1)
    return -(base.gather(-1, own).exp() * adapted.gather(-1, own)).squeeze(-1)


def _log_probabilities(logits: Tensor) -> Tensor:
    return log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
