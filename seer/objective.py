"""The loss of a batch: which passes it takes, and how its terms come together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seer.config import SeerConfig
from seer.errors import InputError
from seer.layers import BaseModel, Head, HiddenStates, LayerStack, forward_states, has_positions, representations
from seer.losses import disentangle_loss, kl_to_base, retain_norms, retain_transport
from seer.reference_cache import ReferenceCache
from seer_kernels import MemoryBank, cached_backward


class Outcome(NamedTuple):
    """What the loss reads of some rows. P positions, L target layers."""

    targets: Tensor
    """[R, P, L, D] representations of the rows of pairs."""
    distances: Tensor
    """(R,) L_r of every retain row, before it is averaged; empty where L_r is not used."""
    divergences: Tensor
    """(R,) L_kl likewise."""


class Objective:
    """L = disentangle_weight L_d + retain_weight L_r + kl_weight L_kl of a batch that a PairCollator made.

    Args:
        config: the options.
        stack: layers of the model in training.
        target_layers: those that are disentangled, resolved.
        adapted_layers: how many layers are trained.
        base: the model as it was.
        autocast: makes the context of mixed precision in which models run.
        sharded: whether an engine (FSDP, DeepSpeed) puts weights into place for every pass and takes them away after.
    """

    def __init__(
        self,
        config: SeerConfig,
        stack: LayerStack,
        target_layers: list[int],
        adapted_layers: int,
        base: BaseModel,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        sharded: bool = False,
    ) -> None:
        self.config = config
        self.stack = stack
        self.target_layers = target_layers
        self.adapted_layers = adapted_layers
        self.retain_layers = (
            None if config.retain_layers is None else stack.resolve(config.retain_layers, "retain_layers")
        )
        self.base = base
        self.autocast = autocast
        self.sharded = sharded
        self.bank: MemoryBank | None = None
        """Keys of past batches; made at the first batch, whose sizes it has."""
        self.cache: ReferenceCache | None = None
        """Of the retain texts; without it the base model runs in every step."""

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms.

        Args:
            model: the model in training, in whatever wrapping.
            batch: `concept_ids` and `retain_ids` (B,), `request_lengths` and model inputs of 2 B or 3 B rows: first
                texts, second texts, retain texts. Without the last, the first texts serve.
            progress: share of the run that is done, for the schedules.
        """
        pairs = len(batch["concept_ids"])
        rows = {name: values for name, values in batch.items() if name != "concept_ids"}
        outcome = self._run(model, rows, slice(0, 2 * pairs), self._retain_rows(batch))
        return self._combine(outcome, batch, progress)

    def cached_backward(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        progress: float,
        chunk_size: int,
        backward: Callable[[Tensor], object],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradient of the loss to the parameters, with the memory of `chunk_size` rows.

        Args:
            model, batch, progress: as in a call.
            chunk_size: rows that pass the model at a time; every row passes it twice.
            backward: the backward pass from a loss to leaves.

        Returns:
            The loss, detached, and its terms.
        """
        pairs, retain = len(batch["concept_ids"]), self._retain_rows(batch)
        if retain.start == 0:  # the first texts serve for both
            groups = [(slice(0, pairs), True, True), (slice(pairs, 2 * pairs), True, False)]
        else:
            groups = [(slice(0, 2 * pairs), True, False), (retain, False, True)]
        terms: dict[str, Tensor] = {}
        columns = [self.config.uses("retain"), self.config.uses("kl")]

        def encoder(is_target: bool, is_retain: bool) -> Callable[..., Tensor]:
            def encode(**rows: Tensor) -> Tensor:
                """[rows, P x L x D and a column for every retain term], as far as the rows have them."""
                everything, nothing = slice(0, len(rows["attention_mask"])), slice(0, 0)
                outcome = self._run(
                    model, rows, everything if is_target else nothing, everything if is_retain else nothing
                )
                parts = [outcome.targets.flatten(1)] if is_target else []
                if is_retain:
                    retained = (outcome.distances, outcome.divergences)
                    parts += [values.unsqueeze(1) for values, used in zip(retained, columns, strict=True) if used]
                return torch.cat(parts, dim=1)

            return encode

        def loss_of(*encoded: Tensor) -> Tensor:
            targets, retained = [], [encoded[0].new_zeros(0)] * 2
            for (_, is_target, is_retain), values in zip(groups, encoded, strict=True):
                if is_retain:
                    for place in (1, 0):
                        if columns[place]:
                            values, retained[place] = values[:, :-1], values[:, -1]
                if is_target:
                    shape = (len(values), len(self.config.positions), len(self.target_layers), -1)
                    targets.append(values.reshape(shape))
            loss, found = self._combine(Outcome(torch.cat(targets), *retained), batch, progress)
            terms.update(found)
            return loss

        if not any(columns):
            groups = [(rows, is_target, False) for rows, is_target, _ in groups if is_target]
        inputs = []
        for rows, _, is_retain in groups:
            chosen = {name: values[rows] for name, values in batch.items() if name not in ("concept_ids", "retain_ids")}
            inputs.append({**chosen, "retain_ids": batch["retain_ids"]} if is_retain else chosen)
        loss = cached_backward(
            [encoder(is_target, is_retain) for _, is_target, is_retain in groups],
            inputs,
            loss_of,
            chunk_size=chunk_size,
            backward=backward,
            no_sync=getattr(model, "no_sync", None),
        )
        return loss, terms

    def _retain_rows(self, batch: Mapping[str, Tensor]) -> slice:
        pairs, rows = len(batch["concept_ids"]), len(batch["attention_mask"])
        return slice(2 * pairs, rows) if rows > 2 * pairs else slice(0, pairs)

    def _run(self, model: nn.Module, rows: Mapping[str, Tensor], targets: slice, retain: slice) -> Outcome:
        """One pass of the model over all rows, and one of the base model over the retain rows if a term needs it."""
        config = self.config
        inputs = dict(rows)
        request_lengths, retain_ids = inputs.pop("request_lengths"), inputs.pop("retain_ids", None)
        mask = inputs["attention_mask"].bool()  # [R, T]
        has_retain = retain.stop > retain.start
        with_retain, with_kl = has_retain and config.uses("retain"), has_retain and config.uses("kl")
        head_at = torch.zeros_like(mask)
        head_at[retain] = self._predicted(mask[retain])
        distances = divergences = mask.new_zeros(0, dtype=torch.float32)
        with self.autocast():
            before_head = None
            if with_retain or with_kl:  # first, while no graph takes up memory
                before, before_head = self._reference(model, inputs, retain_ids, retain, head_at[retain])
            read_at = head_at if with_kl else None
            states = forward_states(model, inputs, self.stack, read_at, packed=config.packing)
            found = representations(
                [states.layers[layer][targets] for layer in self.target_layers],
                mask[targets],
                request_lengths[targets],
                config.positions,
            )
            if with_retain:
                after = [part[retain] for part in self._compared(states)]
                distances = self._distances(after, before, mask[retain])
            if states.head_inputs is not None and before_head is not None:
                divergences = self._divergences(
                    states.head_inputs, before_head, inputs["input_ids"][retain], head_at[retain]
                )
        return Outcome(found.permute(2, 0, 1, 3), distances, divergences)

    def _predicted(self, mask: Tensor) -> Tensor:
        """The tokens whose predictions L_kl compares: all real ones, or those whose next one is in the text."""
        if self.config.kl_form == "full":
            return mask
        return mask & torch.nn.functional.pad(mask[:, 1:], (0, 1))

    def _reference(
        self, model: nn.Module, inputs: Mapping[str, Tensor], ids: Tensor | None, retain: slice, head_at: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """What L_r compares, and what the head reads at the chosen tokens, of the base model at the retain rows."""
        if self.cache is None or ids is None:
            rows = {name: values[retain] for name, values in inputs.items()}
            read_at = head_at if self.config.uses("kl") else None
            hidden = self.base.forward_states(model, rows, read_at, packed=self.config.packing)
            return self._compared(hidden), hidden.head_inputs
        states = self.cache.read(ids, inputs["attention_mask"][retain].bool())
        return states, states.pop()[head_at] if self.config.uses("kl") else None

    def cached_states(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What a ReferenceCache keeps of some texts: what L_r compares, and the input of the head if L_kl reads it."""
        with_kl = self.config.uses("kl")
        mask = inputs["attention_mask"].bool()
        with self.autocast():
            hidden = self.base.forward_states(model, inputs, mask if with_kl else None)
        states = self._compared(hidden) if self.config.uses("retain") else []
        if hidden.head_inputs is not None:
            head_inputs = hidden.head_inputs.new_zeros(*mask.shape, hidden.head_inputs.shape[-1])
            head_inputs[mask] = hidden.head_inputs
            states = [*states, head_inputs]
        # Mixed precision computes layers in types of their own.
        dtype = functools.reduce(torch.promote_types, [part.dtype for part in states])
        return [part.to(dtype) for part in states]

    def _compared(self, hidden: HiddenStates) -> list[Tensor]:
        """The hidden states that L_r compares."""
        return hidden.all() if self.retain_layers is None else [hidden.layers[i] for i in self.retain_layers]

    def _distances(self, after: list[Tensor], before: list[Tensor], mask: Tensor) -> Tensor:
        if self.config.retain_loss == "sinkhorn":
            return retain_transport(after, before, mask)
        return retain_norms(after, before, mask, normalization=self.config.retain_normalization)

    def _divergences(self, states: Tensor, reference: Tensor, input_ids: Tensor, head_at: Tensor) -> Tensor:
        labels = None
        if self.config.kl_form == "label":
            labels = input_ids.roll(-1, dims=1)[head_at]
        per_token = kl_to_base(
            Head(self.stack), states, self.base.head, reference, labels, recompute=self.sharded
        )  # [K]
        row = head_at.nonzero()[:, 0]
        return per_token.new_zeros(len(head_at)).index_add(0, row, per_token)

    def _combine(
        self, outcome: Outcome, batch: Mapping[str, Tensor], progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        terms: dict[str, Tensor] = {}
        terms["L_d"], similarities = self._disentangle(outcome.targets, batch)
        retain = self._retain_rows(batch)
        tokens = batch["attention_mask"][retain].sum()
        if len(outcome.distances):
            if config.retain_loss == "sinkhorn":
                terms["L_r"] = outcome.distances.mean()
            elif config.retain_normalization == "token":
                terms["L_r"] = outcome.distances.sum() / tokens
            else:
                layer_share = len(self.target_layers) / self.adapted_layers
                terms["L_r"] = outcome.distances.mean() * (layer_share / 100)
        if len(outcome.divergences):
            full = config.kl_form == "full"
            terms["L_kl"] = outcome.divergences.sum() / tokens if full else outcome.divergences.mean()
        weights = {"L_d": "disentangle", "L_r": "retain", "L_kl": "kl"}
        loss = torch.stack([config.weight(weights[name], progress) * value for name, value in terms.items()]).sum()
        return loss, {name: value.detach() for name, value in {**terms, **similarities}.items()}

    def _disentangle(self, targets: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        config, concept_ids = self.config, batch["concept_ids"]
        pairs = len(concept_ids)
        view1, view2 = torch.split(targets.permute(1, 2, 0, 3), pairs, dim=2)  # [P, L, B, D]
        weights = None
        if config.pairs_may_lack_positions():
            has = has_positions(batch["attention_mask"], batch["request_lengths"], config.positions)  # [P, R]
            weights = (has[:, :pairs] & has[:, pairs : 2 * pairs]).unsqueeze(1).float()  # [P, 1, B]
        loss, statistics = disentangle_loss(
            view1,
            view2,
            concept_ids,
            form=config.disentangle_loss,
            temperature=config.temperature,
            same_label=config.same_label,
            weights=weights,
            past=self._past(view2, concept_ids),
            negatives=config.negatives,
        )
        if statistics is None:
            return loss, {}
        return loss, {
            "positive_similarity": statistics.positive_similarity,
            "negative_similarity": statistics.negative_similarity,
        }

    def _past(self, view2: Tensor, concept_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys [P, L, M, D] of past batches and their concepts, of which these [P, L, B, D] will be the latest."""
        if self.config.memory_bank_size is None:
            return None
        rows = view2.detach().permute(2, 0, 1, 3)  # [B, P, L, D]
        if self.bank is None:
            self.bank = self._empty_bank(rows.flatten(1))
        if self.bank.keys.shape[1] != rows[0].numel():
            raise InputError(
                f"--positions: expected those of the checkpoint, whose memory bank has keys of "
                f"{self.bank.keys.shape[1]} numbers; got {self.config.positions}, which make {rows[0].numel()}"
            )
        keys, labels = self.bank(rows.flatten(1), concept_ids)
        assert labels is not None
        return keys.view(-1, *rows.shape[1:]).permute(1, 2, 0, 3), labels

    def fill_bank(self, keys: Tensor, labels: Tensor) -> None:
        """Begin with the keys [M, P x L x D] of another memory bank, oldest first, and their concepts (M,)."""
        self.bank = self._empty_bank(keys)
        self.bank.enqueue(keys, labels)

    def _empty_bank(self, keys: Tensor) -> MemoryBank:
        assert self.config.memory_bank_size is not None
        return MemoryBank(self.config.memory_bank_size, features=keys.shape[1], dtype=keys.dtype).to(keys.device)
