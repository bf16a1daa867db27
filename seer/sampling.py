"""Drawing pairs of texts that share a concept, and making batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from seer.config import SeerConfig
from seer.data import Tokens
from seer.errors import InputError


def require_contrast(config: SeerConfig, concepts: int) -> None:
    """Raise InputError if no batch can hold a pair together with another that it should differ from."""
    if config.disentangle_weight == 0:
        return
    if config.train_batch_size < 2:
        raise InputError(
            "--per_device_train_batch_size: expected 2 or more: every pair is contrasted with the others of its batch, "
            f"got {config.train_batch_size}"
        )
    if config.same_label != "negative" and 1 in (concepts, config.concepts_per_batch):
        option = "--concepts_per_batch" if concepts > 1 else "--data"
        raise InputError(
            f"{option}: expected two concepts or more where pairs of one concept are no negatives (--same_label "
            f"{config.same_label}), got one: there would be nothing to differ from"
        )


class PairDataset(Dataset[dict[str, Any]]):
    """Tokens of the training samples, indexed by what a PairSampler draws.

    Args:
        rows: tokens of N texts.
        memberships: [N, C] bool, which concepts a text has.
        retain_rows: tokens of the retain texts, if there are any.
    """

    def __init__(
        self, rows: Sequence[Tokens], memberships: np.ndarray, retain_rows: Sequence[Tokens] | None = None
    ) -> None:
        self.rows = rows
        self.memberships = memberships
        self.retain_rows = retain_rows
        self._has_several = bool((memberships.sum(1) > 1).any())
        self._only_concept = memberships.argmax(1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, ...]) -> dict[str, Any]:
        first, second, *retain = index
        texts = [self.rows[first], self.rows[second]]
        if len(retain) > 1:
            *retain, first_part, second_part = retain
            texts = [_part(texts[0], first_part), _part(texts[1], second_part)]
        if self.retain_rows is not None:
            texts.append(self.retain_rows[retain[0]])
        concepts = self.memberships[[first, second]] if self._has_several else self._only_concept[first]
        return {"texts": texts, "concepts": torch.as_tensor(concepts), "retain_id": retain[0] if retain else first}


_WHOLE, _REQUEST, _RESPONSE = range(3)


def _part(text: Tokens, part: int) -> Tokens:
    """A text, or its request or its response alone; a text without both of them stays whole."""
    length = text.request_length
    if part == _WHOLE or length in (0, len(text.ids)):
        return text
    return Tokens(text.ids[:length], length) if part == _REQUEST else Tokens(text.ids[length:], 0)


class PairSampler(Sampler[tuple[int, ...]]):
    """Indices (first text, second text, retain text if there are any) of an epoch's pairs, in the order of training.

    With view dropout two more numbers say what is left of the first and of the second text.

    The two texts of a pair are different samples that share the concept for which they were drawn. Without
    `concepts_per_batch` and with balance "frequency" every sample is the first text of a pair once per epoch. With
    `concepts_per_batch` = C every batch has `batch_size` / C pairs of each of C different concepts, and an epoch has as
    many batches as hold all samples, rounded up to a multiple of `processes`, so that each process gets whole batches
    and equally many.

    How often a concept is drawn in an epoch follows from `balance`: by its number of samples ("frequency"), or the same
    for all ("balanced"); a concept can be in every batch at most, and what it cannot take falls to the others. The
    numbers are exact in every epoch, up to rounding, which is random and right on average. Within a concept samples
    take turns: none leads a pair a second time before all others have led one, and none twice in a batch unless the
    batch needs more samples than the concept has.

    The order depends on the seed and the epoch alone: a resumed run sees the pairs it would have seen.

    Args:
        memberships: [N, C] bool, which concepts a text has. A sample of several concepts leads pairs of any of them.
        seed: decides the order.
        retain_size: number of retain texts to draw from.
        batch_size: pairs per process and step.
        processes: among which the batches are dealt in turn.
        concepts_per_batch: different concepts in a batch; None leaves it to chance.
        balance: "frequency" or "balanced".
        view_dropout: share of the texts of pairs that lose a part: one half their response, the other their request.
        lengths: of the N texts: batches of similar length, for less padding. None leaves it to chance.

    Raises:
        InputError: a sample without a partner, or numbers that do not go together.
    """

    def __init__(
        self,
        memberships: np.ndarray,
        seed: int,
        retain_size: int = 0,
        *,
        batch_size: int = 1,
        processes: int = 1,
        concepts_per_batch: int | None = None,
        balance: str = "frequency",
        view_dropout: float = 0.0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.seed = seed
        self.retain_size = retain_size
        self.batch_size = batch_size
        self.concepts_per_batch = concepts_per_batch
        self.balance = balance
        self.view_dropout = view_dropout
        self.lengths = lengths
        self.epoch = 0
        self.samples = len(memberships)
        # A concept with one sample can only be had by the way, in texts of several concepts.
        members = [np.flatnonzero(column) for column in memberships.T]
        self.members = [each for each in members if len(each) > 1]
        drawable = memberships & (memberships.sum(0) > 1)
        if not drawable.any(1).all():
            lonely = int(drawable.any(1).argmin())
            raise InputError(f"sample {lonely}: expected another sample that shares a concept with it, got none")
        self._owners = [np.flatnonzero(row) for row in drawable[:, memberships.sum(0) > 1]]
        if concepts_per_batch is not None:
            if concepts_per_batch > len(self.members):
                raise InputError(
                    f"--concepts_per_batch: expected at most {len(self.members)}, the number of concepts in the data, "
                    f"got {concepts_per_batch}"
                )
            if batch_size % concepts_per_batch:
                raise InputError(
                    f"--concepts_per_batch: expected a divisor of --per_device_train_batch_size {batch_size}, so that "
                    f"all concepts of a batch have the same number of pairs; got {concepts_per_batch}"
                )
            if lengths is not None:
                raise InputError(
                    "--train_sampling_strategy: expected 'random' together with --concepts_per_batch, which decides "
                    "what is in a batch; got 'group_by_length'"
                )
        self.batches = math.ceil(self.samples / (batch_size * processes)) * processes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples if self.concepts_per_batch is None else self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.concepts_per_batch is not None:
            leads, concepts = self._leads_of_composed_batches(generator)
        elif self.balance == "balanced":
            leads, concepts = self._leads_in_equal_numbers(generator)
        else:
            leads = np.arange(self.samples)
            concepts = np.array([generator.choice(each) if len(each) > 1 else each[0] for each in self._owners])

        partners = np.empty_like(leads)
        for concept, members in enumerate(self.members):
            drawn = np.flatnonzero(concepts == concept)
            steps = generator.integers(1, len(members), size=len(drawn))
            partners[drawn] = members[(np.searchsorted(members, leads[drawn]) + steps) % len(members)]
        pairs = np.stack([leads, partners], axis=1)
        if self.concepts_per_batch is None:
            pairs = pairs[generator.permutation(len(pairs))]
        if self.lengths is not None:
            longer = np.asarray(self.lengths)[pairs].max(1).tolist()
            order = get_length_grouped_indices(  # type: ignore[no-untyped-call]
                longer, self.batch_size, generator=torch.Generator().manual_seed(int(generator.integers(2**63)))
            )
            pairs = pairs[order]
        if self.retain_size:
            rounds = math.ceil(len(self) / self.retain_size)
            texts = np.concatenate([generator.permutation(self.retain_size) for _ in range(rounds)])
            pairs = np.concatenate([pairs, texts[: len(self), None]], axis=1)
        if self.view_dropout:
            shares = [1 - self.view_dropout, self.view_dropout / 2, self.view_dropout / 2]
            parts = generator.choice([_WHOLE, _REQUEST, _RESPONSE], size=(len(pairs), 2), p=shares)
            pairs = np.concatenate([pairs, parts], axis=1)
        return map(tuple, pairs.tolist())

    def _weights(self) -> np.ndarray:
        return np.array([1 if self.balance == "balanced" else len(each) for each in self.members], dtype=np.float64)

    def _leads_in_equal_numbers(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        counts = _quotas(self._weights(), self.samples, self.samples, generator)
        concepts = np.repeat(np.arange(len(counts)), counts)
        leads = np.concatenate(
            [_take_turns(members, count, 1, generator) for members, count in zip(self.members, counts, strict=True)]
        )
        return leads, concepts

    def _leads_of_composed_batches(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        assert self.concepts_per_batch is not None
        share = self.batch_size // self.concepts_per_batch
        counts = _quotas(self._weights(), self.batches * self.concepts_per_batch, self.batches, generator)
        concepts = np.repeat(_compose(counts, self.batches, self.concepts_per_batch, generator), share)
        leads = np.empty_like(concepts)
        for concept, members in enumerate(self.members):
            leads[concepts == concept] = _take_turns(members, int(counts[concept]), share, generator)
        return leads, concepts


def _quotas(weights: np.ndarray, total: int, cap: int, generator: np.random.Generator) -> np.ndarray:
    """Whole numbers in proportion to `weights`, none above `cap`, that add up to `total`.

    Fractions are rounded by systematic sampling: each number is its exact share rounded up or down, and right on
    average, so that a concept too rare for one batch per epoch still has its turn in some.
    """
    shares = np.zeros(len(weights))
    open_ = np.ones(len(weights), dtype=bool)
    while open_.any():
        shares[open_] = (total - cap * (~open_).sum()) * weights[open_] / weights[open_].sum()
        over = open_ & (shares > cap)
        if not over.any():
            break
        shares[over] = cap
        open_ &= ~over
    ends = np.floor(np.append(shares.cumsum()[:-1], total) + generator.random())
    counts: np.ndarray = np.diff(np.minimum(ends, total), prepend=0).astype(np.int64)
    return counts


def _compose(counts: np.ndarray, batches: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """The concepts of every batch, [batches * size]: concept c in `counts[c]` batches, none twice in a batch.

    `counts` adds up to `batches` * `size` and no entry is above `batches`; then a concept that is due in all batches
    that are left is never one of more than `size`.
    """
    remaining = counts.copy()
    chosen = np.empty((batches, size), dtype=np.int64)
    for batch in range(batches):
        left = batches - batch
        due = np.flatnonzero(remaining == left)
        others = np.flatnonzero((remaining > 0) & (remaining < left))
        odds = remaining[others] / max(1, remaining[others].sum())
        drawn = generator.choice(others, size - len(due), replace=False, p=odds) if len(due) < size else due[:0]
        chosen[batch] = generator.permutation(np.concatenate([due, drawn]))
        remaining[chosen[batch]] -= 1
    return chosen.ravel()


def _take_turns(members: np.ndarray, blocks: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """`blocks` times `size` of the `members`: all of them, shuffled, over and over, without repetition in a block."""
    taken: list[int] = []
    while len(taken) < blocks * size:
        fresh = generator.permutation(members).tolist()
        begun = set(taken[len(taken) - len(taken) % size :])  # what the block under way already has goes to the end
        taken += sorted(fresh, key=begun.__contains__)
    return np.array(taken[: blocks * size], dtype=np.int64)


def pad_rows(rows: Sequence[Tokens], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest: `input_ids` and `attention_mask`, both (R, T), `request_lengths` (R,); int64."""
    tensors = [torch.tensor(row.ids) for row in rows]
    return {
        "request_lengths": torch.tensor([row.request_length for row in rows]),
        "input_ids": pad_sequence(tensors, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True),
    }


class PairCollator:
    """B pairs as one batch: rows [first texts; second texts; retain texts, if there are], and what they are.

    `concept_ids` is (B,) int64 where every text of the data set has one concept, else (B, 2, C) bool: which of the C
    concepts the first and the second text of every pair have. `retain_ids` (B,) are the indices of the retain texts, or
    of the first texts where these serve.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        views = zip(*(item["texts"] for item in items), strict=True)
        return {
            **pad_rows([row for view in views for row in view], self.pad_token_id),
            "concept_ids": torch.stack([item["concepts"] for item in items]),
            "retain_ids": torch.tensor([item["retain_id"] for item in items]),
        }
