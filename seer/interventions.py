"""Is an explanation true? Change the hidden state along the explained concept, and see what the model then does.

At layer l the states h of a text whose explanation is concept c, with prototype mu_c (length 1), become

    remove   h - (h . mu_c) mu_c
    swap     h - (h . mu_c) mu_c + (h . mu_c) mu_k    with mu_k another concept's prototype
    control  h + |change| r                           with r a random direction of length 1

where |change| is, token by token, how far the intervention that it controls moved the state. An explanation is faithful
where its own direction matters more than a random one of the same norm. All prototypes of a model may share a part;
removing takes that along, while swapping keeps most of it and so is the test of this concept against another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize

from seer.data import Tokens
from seer.errors import InputError
from seer.layers import LayerStack, lm_head, representations, without_dropout
from seer.prototypes import Prototypes
from seer.reading import LayerReader
from seer.sampling import pad_rows

Change = Callable[[Tensor], Tensor]
"""States [R, T, D] -> what they become, the same shape."""

_RESAMPLES = 2000
_LEVEL = 0.95


def remove_component(states: Tensor, direction: Tensor) -> Tensor:
    """The states without their component along a direction.

    Args:
        states: [..., D].
        direction: [..., D] of length 1, broadcast against the states.
    """
    return states - _component(states, direction) * direction


def swap_component(states: Tensor, direction: Tensor, other: Tensor) -> Tensor:
    """The states with their component along one direction turned into the same along another.

    Args:
        states: [..., D].
        direction: [..., D] of length 1, broadcast against the states.
        other: the same.
    """
    return states + _component(states, direction) * (other - direction)


def move_like(states: Tensor, changed: Tensor, direction: Tensor) -> Tensor:
    """The states moved as far as an intervention moved each of them, but along another direction.

    Args:
        states: [..., D].
        changed: [..., D] what the intervention made of them.
        direction: [..., D] of length 1, broadcast against the states.
    """
    distance: Tensor = torch.linalg.vector_norm(changed - states, dim=-1, keepdim=True)
    return states + distance * direction


def _component(states: Tensor, direction: Tensor) -> Tensor:
    component: Tensor = (states * direction).sum(-1, keepdim=True)
    return component


@contextmanager
def intervention(layer: nn.Module, change: Change) -> Iterator[None]:
    """Inside, every pass goes on with changed outputs of a layer.

    Args:
        layer: a decoder layer.
        change: applied in float32; the result has the layer's dtype.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        changed = change(states.float()).to(states.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Estimate:
    """A mean over texts with its 95 % interval, by bootstrap over texts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """An intervention against its control, both means over N texts of the mean over a text's tokens."""

    intervention: Estimate
    control: Estimate
    """Mean over the random directions of a text."""
    difference: Estimate
    """Intervention - control, text by text."""
    effect_size: Estimate | None
    """Mean difference over the standard deviation of the differences (Cohen's d_z); None where all are equal."""


@dataclass(frozen=True)
class Faithfulness:
    """What interventions at one layer do to one model."""

    layer: int
    later_layers: list[int]
    texts: int
    comparisons: dict[str, Comparison]
    """`remove_kl` and `swap_kl`: KL(p || p') in nats between the next-token distributions without and with the
    intervention. `remove_score`: by how much the score of the explained concept falls, mean over later layers.
    `swap_score`: by how much that of the swapped-in concept rises. Without later layers there are no scores."""


@torch.no_grad()
def measure_faithfulness(
    stack: LayerStack,
    rows: Sequence[Tokens],
    prototypes: Prototypes,
    layer: int,
    *,
    temperatures: dict[int, float],
    pad_token_id: int,
    position: str = "last",
    batch_size: int = 4,
    controls: int = 3,
    seed: int = 0,
) -> Faithfulness:
    """Intervene at every token of every text, at one layer, and compare with random directions.

    The explained concept of a text is that of the prototype nearest to the state that stands for it; the other one,
    into which it is swapped, is drawn.

    Args:
        stack: the layers of a language model; its adapter counts if it is enabled.
        rows: N >= 2 texts.
        prototypes: of this model, at `layer` and the later layers to be looked at.
        layer: where to intervene.
        temperatures: of the scores, for each of the later layers.
        pad_token_id: fills up shorter rows.
        position: where the state is that stands for a text, see `seer.layers.representations`.
        batch_size: texts per pass.
        controls: random directions per text and intervention.
        seed: of the random directions and concepts.

    Raises:
        InputError: no language-model head, fewer than two texts or concepts, no prototypes of `layer`.
    """
    if lm_head(stack) is None:
        raise InputError(f"expected a language model to intervene in, got {type(stack.root).__name__}")
    if len(rows) < 2 or len(prototypes.concepts) < 2:
        raise InputError(
            f"expected at least two texts and two concepts, got {len(rows)} and {len(prototypes.concepts)}"
        )
    if layer not in prototypes.layers:
        raise InputError(f"layer: expected one that has prototypes ({[*prototypes.layers]}), got {layer}")
    if controls < 1:
        raise InputError(f"controls: expected at least 1, got {controls}")
    later = sorted(index for index in prototypes.layers if index > layer)
    device = next(stack.root.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    anchors = prototypes.layers[layer].to(device)  # [C, D]
    found: dict[str, list[Tensor]] = {}
    with without_dropout(stack.root):
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            inputs = {name: values.to(device) for name, values in pad_rows(chosen, pad_token_id).items()}
            request_lengths, mask = inputs.pop("request_lengths"), inputs["attention_mask"].bool()
            logits, states = _run(stack, inputs, layer, [layer, *later], None)
            whole = representations([states[layer]], mask, request_lengths, [position])[0, 0]  # [R, D]
            explained = prototypes.similarity(layer, whole).argmax(-1)  # (R,)
            step = torch.randint(1, len(anchors), explained.shape, generator=generator).to(device)
            other = (explained + step) % len(anchors)
            own, others = anchors[explained].unsqueeze(1), anchors[other].unsqueeze(1)  # [R, 1, D]
            changes: tuple[tuple[str, Change, Tensor, int], ...] = (
                ("remove", partial(remove_component, direction=own), explained, -1),
                ("swap", partial(swap_component, direction=own, other=others), other, 1),
            )
            for name, change, concept, sign in changes:
                variants = [(name, change)]
                for _ in range(controls):
                    drawn = torch.randn(len(chosen), 1, anchors.shape[1], generator=generator)
                    variants.append((f"{name}_control", _control(change, normalize(drawn, dim=-1).to(device))))
                collected: dict[str, list[Tensor]] = {}
                for label, variant in variants:
                    new_logits, new_states = _run(stack, inputs, layer, later, variant)
                    collected.setdefault(f"{label}_kl", []).append(_kl_per_text(logits, new_logits, mask))
                    if later:
                        before, after = (
                            _readout({index: part[index] for index in later}, prototypes, temperatures, concept)
                            for part in (states, new_states)
                        )
                        collected.setdefault(f"{label}_score", []).append(_mean_per_text(sign * (after - before), mask))
                for label, parts in collected.items():
                    found.setdefault(label, []).append(torch.stack(parts).mean(0))

    values = {label: torch.cat(parts).double().cpu().numpy() for label, parts in found.items()}
    measures = ("kl", "score") if later else ("kl",)
    return Faithfulness(
        layer=layer,
        later_layers=later,
        texts=len(rows),
        comparisons={
            f"{name}_{measure}": compare(values[f"{name}_{measure}"], values[f"{name}_control_{measure}"])
            for name in ("remove", "swap")
            for measure in measures
        },
    )


def compare(values: np.ndarray, control: np.ndarray) -> Comparison:
    """Paired comparison of N values with their controls, with percentile bootstrap intervals over the N.

    Args:
        values: (N,), N >= 2.
        control: (N,).
    """
    difference = values - control
    return Comparison(
        intervention=_estimate(values, _mean),
        control=_estimate(control, _mean),
        difference=_estimate(difference, _mean),
        effect_size=None if np.ptp(difference) == 0 else _estimate(difference, _effect_size),
    )


def _estimate(values: np.ndarray, statistic: Callable[..., Any]) -> Estimate:
    result = bootstrap(
        (values,),
        statistic,
        n_resamples=_RESAMPLES,
        confidence_level=_LEVEL,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return Estimate(float(statistic(values, axis=-1)), float(low), float(high))


def _mean(values: np.ndarray, axis: int) -> Any:
    return values.mean(axis=axis)


def _effect_size(values: np.ndarray, axis: int) -> Any:
    spread = values.std(axis=axis, ddof=1)
    # A resample of one text over and over has no spread; it says that the effect is sure, not that it is infinite.
    return values.mean(axis=axis) / np.maximum(spread, 1e-12 + 1e-6 * np.abs(values).max())


def _run(
    stack: LayerStack, inputs: dict[str, Tensor], layer: int, read: Sequence[int], change: Change | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [R, T, V], and the states of the layers to be read, of a pass with or without an intervention."""
    with (
        nullcontext() if change is None else intervention(stack.layers[layer], change),
        LayerReader(stack, read) as reader,
    ):
        return stack.root(**inputs).logits, dict(reader.states)


def _control(change: Change, direction: Tensor) -> Change:
    return lambda states: move_like(states, change(states), direction)


def _readout(
    states: dict[int, Tensor], prototypes: Prototypes, temperatures: dict[int, float], concept: Tensor
) -> Tensor:
    """[R, T] score of one concept per row, (R,), mean over layers."""
    scores = []
    for layer, values in states.items():
        every = (prototypes.similarity(layer, values) / temperatures[layer]).softmax(-1)  # [R, T, C]
        picked = concept.view(-1, 1, 1).expand(-1, every.shape[1], 1)
        scores.append(every.gather(-1, picked).squeeze(-1))
    return torch.stack(scores).mean(0)


def _kl_per_text(logits: Tensor, changed: Tensor, mask: Tensor) -> Tensor:
    """(R,) KL(p || p'), mean over real tokens; float32 copies exist for one text at a time."""
    per_text = []
    for row, new, real in zip(logits, changed, mask, strict=True):
        before, after = (values[real].float().log_softmax(-1) for values in (row, new))
        per_text.append(kl_div(after, before, reduction="sum", log_target=True) / real.sum())
    return torch.stack(per_text)


def _mean_per_text(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1)
