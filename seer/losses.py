"""The three terms of SEER's loss, on hidden states and logits that somebody else computed.

Source: Chen et al., arXiv 2502.05242; where its text and its code differ, the docstrings say which is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, log_softmax

from seer.shared_concepts import info_nce_of_sets
from seer_kernels import ContrastiveStatistics, info_nce

_CHUNK_ELEMENTS = 2**22  # logits held in float32 at a time: 16 MiB


def disentangle_loss(
    view1: Tensor, view2: Tensor, concept_ids: Tensor, *, temperature: float = 0.1, same_label: str = "negative"
) -> tuple[Tensor, ContrastiveStatistics]:
    """L_d: InfoNCE between the two texts of every pair, averaged over target layers.

    Args:
        view1: [L, B, D] representations of the first texts at L target layers.
        view2: [L, B, D] of the second texts; pair i is of one concept.
        concept_ids: (B,) int64; or (B, 2, C) bool, which concepts both texts of every pair have: any shared one counts.
        temperature: divides the cosines.
        same_label: what another pair of the same concept is: "negative" (the paper), "ignore" or "positive".

    Returns:
        The loss, 0-d, and its statistics, each 0-d.
    """
    if concept_ids.ndim == 3:
        losses, statistics = info_nce_of_sets(view1, view2, concept_ids, temperature=temperature, same_label=same_label)
        return losses.mean(), ContrastiveStatistics(*(values.mean() for values in statistics))
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


def kl_to_base(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """L_kl: KL(p_base || p_adapted) over the full vocabulary in nats, mean over tokens.

    The paper's text speaks of a distance of the two distributions; its code takes the label token only. This is the
    distance. Float32 copies of the logits exist for a few tokens at a time only.

    Args:
        logits: [K, V] of the adapted model at K > 0 tokens; gets a gradient.
        reference_logits: [K, V] of the base model; gets none.

    Returns:
        0-d, float32 (float64 for float64 logits).
    """
    loss: Tensor = _ChunkedKL.apply(logits, reference_logits)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference_logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits, reference_logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=dtype)
        for adapted, reference in _chunks(logits, reference_logits):
            total += kl_div(
                log_softmax(adapted, -1, dtype=dtype),
                log_softmax(reference, -1, dtype=dtype),
                reduction="sum",
                log_target=True,
            )
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, reference_logits = ctx.saved_tensors
        result = torch.empty_like(logits)
        for adapted, reference, out in _chunks(logits, reference_logits, result):
            difference = adapted.softmax(-1, dtype=gradient.dtype) - reference.softmax(-1, dtype=gradient.dtype)
            out.copy_(difference.mul_(gradient / len(logits)))
        return result, None


def _chunks(*tensors: Tensor) -> Any:
    """Walk through [K, V] tensors side by side, a few rows at a time."""
    rows = max(1, _CHUNK_ELEMENTS // tensors[0].shape[1])
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
