"""The three terms of SEER's loss, on hidden states and logits that somebody else computed.

Source: Chen et al., arXiv 2502.05242; where its text and its code differ, the docstrings say which is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from seer_kernels import ContrastiveStatistics, info_nce

Head: TypeAlias = Callable[[Tensor], Tensor]
"""The part of a model that turns states [k, D] into logits [k, V]."""

_CHUNK_ELEMENTS = 2**22  # logits held in float32 at a time: 16 MiB


def disentangle_loss(
    view1: Tensor, view2: Tensor, concept_ids: Tensor, *, temperature: float = 0.1, same_label: str = "negative"
) -> tuple[Tensor, ContrastiveStatistics]:
    """L_d: InfoNCE between the two texts of every pair, averaged over target layers.

    Args:
        view1: [L, B, D] representations of the first texts at L target layers.
        view2: [L, B, D] of the second texts; pair i is of one concept.
        concept_ids: (B,) int64.
        temperature: divides the cosines.
        same_label: what another pair of the same concept is: "negative" (the paper), "ignore" or "positive".

    Returns:
        The loss, 0-d, and its statistics, each 0-d.
    """
    losses, statistics = info_nce(
        view1,
        view2,
        temperature=temperature,
        query_labels=concept_ids,
        key_labels=concept_ids,
        same_label=same_label,
        return_stats=True,
    )
    return losses.mean(), ContrastiveStatistics(*(values.mean() for values in statistics))


def retain_loss(
    adapted: Sequence[Tensor],
    reference: Sequence[Tensor],
    mask: Tensor,
    *,
    normalization: str = "example",
    layer_share: float = 1.0,
) -> Tensor:
    """L_r: how far the hidden states moved from the base model's, on real tokens.

    Args:
        adapted: hidden states of the adapted model, embeddings and every layer, each [B, T, D].
        reference: those of the base model.
        mask: (B, T) bool, True at real tokens.
        normalization: "example": the Euclidean norm over layers, tokens and features, mean over examples, times
            `layer_share` / 100, as the paper's code has it (but padding never counts). "token": the norm over layers
            and features, mean over all real tokens.
        layer_share: number of target layers / number of adapted layers.

    Returns:
        0-d, float32 (float64 for float64 states).
    """
    dtype = torch.promote_types(adapted[0].dtype, torch.float32)
    # A norm of norms: never holds more than one layer's difference, and its gradient at no difference is 0, not NaN.
    per_layer = torch.stack(
        [torch.linalg.vector_norm(a - r, dim=-1, dtype=dtype) for a, r in zip(adapted, reference, strict=True)]
    )  # [L + 1, B, T]
    per_token = torch.linalg.vector_norm(per_layer.masked_fill(~mask, 0.0), dim=0)  # [B, T]
    if normalization == "token":
        mean: Tensor = per_token.sum() / mask.sum()
        return mean
    per_example: Tensor = torch.linalg.vector_norm(per_token, dim=-1)  # [B]
    return per_example.mean() * (layer_share / 100)


def kl_to_base(
    head: Head, states: Tensor, reference_head: Head, reference_states: Tensor, labels: Tensor | None = None
) -> Tensor:
    """How far the next-token distribution moved from the base model's, token by token.

    By default KL(p_base || p_adapted) over the full vocabulary, in nats: the paper's text speaks of a distance of the
    two distributions. With labels, the form of the paper's code: -p_base(y) log p_adapted(y) of the label y alone.

    Logits exist for a few tokens at a time only; the backward pass computes them once more.

    Args:
        head: maps states [k, D] to logits [k, V].
        states: [K, D], what the head of the adapted model reads at K tokens; get a gradient, and so does the head.
        reference_head: that of the base model; gets no gradient.
        reference_states: [K, D] of the base model.
        labels: (K,) int64, the tokens that follow.

    Returns:
        (K,), float32 (float64 for float64 logits).
    """
    with torch.no_grad():
        vocabulary = head(states[:1]).shape[-1]
    rows = max(1, _CHUNK_ELEMENTS // vocabulary)
    starts = range(0, len(states), rows)
    divergences = [
        checkpoint(
            _divergence,
            head,
            states[start : start + rows],
            reference_head,
            reference_states[start : start + rows],
            None if labels is None else labels[start : start + rows],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in starts
    ]
    return torch.cat(divergences)


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
