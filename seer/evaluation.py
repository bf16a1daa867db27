"""How well hidden states separate concepts, and how far the model moved from its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from seer.data import Tokens
from seer.layers import BaseModel, Head, forward_states, representations, without_dropout
from seer.losses import kl_to_base
from seer.prototypes import Prototypes
from seer.sampling import pad_rows


@dataclass(frozen=True)
class Encoding:
    """Representations of N texts under the base model (before) and the adapted one (after)."""

    before: dict[int, Tensor]
    """Layer -> [N, D] float32 on the CPU."""
    after: dict[int, Tensor]
    """The same of the adapted model."""
    kl: float | None
    """Mean over all real tokens of KL(base || adapted), in nats; None where it was not asked for."""


@dataclass(frozen=True)
class Separation:
    """How well the representations of one layer separate concepts."""

    same_concept_cosine: float | None
    """Mean cosine over all pairs of different samples of one concept; None if there are none."""
    different_concept_cosine: float | None
    """Mean cosine over all pairs of different concepts; None if there are none."""
    nearest_prototype_accuracy: float
    """Share of samples whose nearest prototype is their concept's."""


@torch.no_grad()
def encode(
    model: nn.Module,
    rows: Sequence[Tokens],
    *,
    base: BaseModel,
    layers: Sequence[int],
    position: str,
    pad_token_id: int,
    batch_size: int,
    with_kl: bool = False,
) -> Encoding:
    """Representations of every text, before and after, without dropout.

    Args:
        model: the adapted model.
        rows: tokens of N texts.
        base: the model as it was.
        layers: which layers to read.
        position: where to read them, see `representations`.
        pad_token_id: fills up shorter rows.
        batch_size: texts per forward pass.
        with_kl: also compare the next-token distributions; needs a language-model head.
    """
    device = next(model.parameters()).device
    longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    before: list[Tensor] = []
    after: list[Tensor] = []
    divergence, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = pad_rows([rows[index] for index in longest_first[start : start + batch_size]], pad_token_id)
        inputs = {name: values.to(device) for name, values in batch.items()}
        request_lengths, mask = inputs.pop("request_lengths"), inputs["attention_mask"]
        head_at = mask.bool() if with_kl else None
        reference = base.forward_states(model, inputs, head_at)
        with without_dropout(model):
            adapted = forward_states(model, inputs, base.stack, head_at)
        for states, collected in ((reference, before), (adapted, after)):
            chosen = [states.layers[layer] for layer in layers]
            collected.append(representations(chosen, mask, request_lengths, [position])[0].float().cpu())
        if adapted.head_inputs is not None and reference.head_inputs is not None:
            heads = Head(base.stack), base.head
            divergence += float(kl_to_base(heads[0], adapted.head_inputs, heads[1], reference.head_inputs).sum())
            tokens += len(adapted.head_inputs)

    in_order = torch.tensor(longest_first).argsort()

    def by_layer(batches: list[Tensor]) -> dict[int, Tensor]:
        return dict(zip(layers, torch.cat(batches, dim=1)[:, in_order], strict=True))

    return Encoding(by_layer(before), by_layer(after), divergence / tokens if with_kl else None)


def separation(states: Tensor, concept_ids: Tensor, prototypes: Prototypes, layer: int) -> Separation:
    """Measure one layer.

    Args:
        states: [N, D] representations.
        concept_ids: (N,) int64, index into `prototypes.concepts`.
        prototypes: made from other samples than these.
        layer: which prototypes to compare with.
    """
    directions = normalize(states.double(), dim=-1)
    sizes = torch.bincount(concept_ids)
    sums = directions.new_zeros(len(sizes), states.shape[-1]).index_add_(0, concept_ids, directions)  # [C, D]
    # Sums over ordered pairs follow from sums of vectors: sum_ij z_i . z_j = |sum_i z_i|^2.
    all_cosines, same_cosines = float(sums.sum(0).square().sum()), float(sums.square().sum())
    samples, same_pairs = len(states), int(sizes.square().sum())
    nearest = prototypes.similarity(layer, states).argmax(-1)
    return Separation(
        same_concept_cosine=_mean(same_cosines - samples, same_pairs - samples),
        different_concept_cosine=_mean(all_cosines - same_cosines, samples**2 - same_pairs),
        nearest_prototype_accuracy=float((nearest == concept_ids).double().mean()),
    )


def separation_by_concept(
    states: Tensor, concept_ids: Tensor, prototypes: Prototypes, layer: int
) -> dict[str, Separation]:
    """The same for the samples of each concept that occurs: to each other, to all other samples, to the prototypes."""
    directions = normalize(states.double(), dim=-1)
    everything = directions.sum(0)
    nearest = prototypes.similarity(layer, states).argmax(-1)
    result = {}
    for concept_id, name in enumerate(prototypes.concepts):
        members = concept_ids == concept_id
        count, others = int(members.sum()), int((~members).sum())
        if count == 0:
            continue
        own = directions[members].sum(0)
        result[name] = Separation(
            same_concept_cosine=_mean(float(own @ own) - count, count * (count - 1)),
            different_concept_cosine=_mean(float(own @ (everything - own)), count * others),
            nearest_prototype_accuracy=float((nearest[members] == concept_id).double().mean()),
        )
    return result


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
