"""Texts: reading and checking them, turning them into tokens, and drawing pairs of one concept."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from seer.errors import InputError

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """One text: a request with its response, or, with response None, plain text that is used as it is."""

    prompt: str
    response: str | None = None
    source: str = ""
    """Where it came from, for messages: `file.csv:12`. A data set fills in what is left out."""


class TextDataset(Dataset[Text]):
    """Texts on which the model's behaviour is kept."""

    def __init__(self, texts: Sequence[Text]) -> None:
        if not texts:
            raise InputError("expected at least one text, got none")
        self.texts = [text._replace(source=text.source or f"sample {index}") for index, text in enumerate(texts)]
        for text in self.texts:
            if not text.prompt.strip() and not (text.response or "").strip():
                raise InputError(f"{text.source}: expected some text, got nothing but white space")

    @classmethod
    def load(cls, data: str) -> TextDataset:
        """Read a .csv or .jsonl file or a data set of the Hub with columns prompt and response, or text.

        Raises:
            InputError: names the file and line.
        """
        rows = _read(data, [("prompt", "response"), ("text",)])
        return cls([Text(row.get("text", row.get("prompt", "")), row.get("response"), source) for source, row in rows])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Text:
        return self.texts[index]


class ConceptDataset(TextDataset):
    """Texts labelled by concept.

    Args:
        texts: N texts.
        concepts: their N concept names.
        names: the names of all concepts, which fixes their order; by default those that occur, sorted.

    Raises:
        InputError: no text, an empty or unknown name; the message names the source.
    """

    def __init__(self, texts: Sequence[Text], concepts: Sequence[str], names: Sequence[str] | None = None) -> None:
        super().__init__(texts)
        if len(concepts) != len(texts):
            raise InputError(f"concepts: expected one per text ({len(texts)}), got {len(concepts)}")
        self.names = sorted(set(concepts)) if names is None else list(names)
        ids = {name: index for index, name in enumerate(self.names)}
        for text, concept in zip(self.texts, concepts, strict=True):
            if not concept.strip():
                raise InputError(f"{text.source}: column concept: expected a name, got nothing")
            if concept not in ids:
                raise InputError(f"{text.source}: column concept: expected one of {self.names}, got {concept!r}")
        self.concepts = list(concepts)
        self.concept_ids = np.array([ids[concept] for concept in concepts])  # (N,) int64

    @classmethod
    def load(cls, data: str, names: Sequence[str] | None = None) -> ConceptDataset:
        """Read a .csv or .jsonl file or a data set of the Hub with columns prompt, response and concept.

        Args:
            data: file or name.
            names: the allowed concepts; by default any. Those that do not occur are left out.

        Raises:
            InputError: the message names the file and line.
        """
        rows = list(_read(data, [("prompt", "response", "concept")]))
        texts = [Text(row["prompt"], row["response"], source) for source, row in rows]
        concepts = [row["concept"] for _, row in rows]
        dataset = cls(texts, concepts, names)
        return cls(texts, concepts, [name for name in dataset.names if name in set(concepts)])

    def require_pairs(self) -> None:
        """Raise InputError unless every concept has two samples, which is what a pair takes."""
        counts = Counter(self.concepts)
        for text, concept in zip(self.texts, self.concepts, strict=True):
            if counts[concept] == 1:
                raise InputError(f"{text.source}: expected two samples or more of concept {concept!r}, got this one")

    def split(self, held_out_share: float, seed: int) -> tuple[ConceptDataset, ConceptDataset | None]:
        """Divide every concept's samples at random into a training and a held-out share, the same for the same seed.

        Every concept keeps two samples for training and, given a third, has one held out. The second result is None
        if the share is 0.

        Raises:
            InputError: a concept with a single sample, or none with three.
        """
        self.require_pairs()
        if held_out_share == 0:
            return self, None
        generator = np.random.default_rng(seed)
        held_out: set[int] = set()
        for concept_id, name in enumerate(self.names):
            members = np.flatnonzero(self.concept_ids == concept_id)
            if len(members) == 2:
                logger.warning("Concept %r has two samples: both are trained on, none is held out.", name)
            count = min(max(1, round(held_out_share * len(members))), len(members) - 2)
            held_out.update(generator.permutation(members)[:count].tolist())
        if not held_out:
            raise InputError(
                f"--held_out_share: expected 0 where no concept has more than two samples, got {held_out_share}"
            )
        return self._subset(set(range(len(self))) - held_out), self._subset(held_out)

    def _subset(self, indices: set[int]) -> ConceptDataset:
        chosen = sorted(indices)
        return ConceptDataset([self.texts[i] for i in chosen], [self.concepts[i] for i in chosen], self.names)


def _read(data: str, layouts: list[tuple[str, ...]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (source, row) for every row of a file or data set; a row has the columns of the first layout that fits."""
    path = Path(data).expanduser()
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix in readers:
        if not path.is_file():
            raise InputError(f"{data}: expected a file, got {'a folder' if path.is_dir() else 'nothing there'}")
        rows = readers[path.suffix](path)
    elif path.exists():
        raise InputError(f"{data}: expected a name that ends in .csv or .jsonl, got {path.name!r}")
    else:
        rows = _read_hub(data)

    columns: tuple[str, ...] | None = None
    for source, row in rows:
        columns = next((layout for layout in layouts if set(layout) <= set(row)), None)
        if columns is None:
            missing = " (or column ".join(str(sorted(set(layout) - set(row)))[1:-1] for layout in layouts)
            raise InputError(
                f"{source}: missing column {missing}{')' * (len(layouts) - 1)}; got columns {sorted(map(str, row))}"
            )
        for column in columns:
            if not isinstance(row[column], str):
                raise InputError(f"{source}: column {column}: expected text, got {row[column]!r}")
        yield source, {column: row[column] for column in columns}
    if columns is None:
        raise InputError(f"{data}: expected at least one row, got an empty file")


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            while header is not None:
                line = reader.line_num + 1
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise InputError(f"{path}:{line}: expected a row of comma-separated values; {error}") from error
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"{path}:{line}: expected {len(header)} columns as in the header, got {len(fields)}"
                    )
                yield f"{path}:{line}", dict(zip(header, fields, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text; {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, content in enumerate(file, start=1):
                if not content.strip():
                    continue
                try:
                    row = json.loads(content)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{line}: expected a JSON object; {error}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{line}: expected a JSON object, got {content.strip()[:40]!r}")
                yield f"{path}:{line}", row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text; {error}") from error


def _read_hub(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen unrelated types for a name that leads nowhere
        raise InputError(
            f"{name}: expected a .csv or .jsonl file or a data set with a split 'train'; {error}"
        ) from error
    decoders = {column: feature.int2str for column, feature in dataset.features.items() if hasattr(feature, "int2str")}
    for index, row in enumerate(dataset):
        yield f"{name}, row {index}", {key: decoders[key](v) if key in decoders else v for key, v in row.items()}


class Tokens(NamedTuple):
    """One text as a model reads it."""

    ids: list[int]
    request_length: int
    """How many of the ids come before the response: the request with all that the chat template puts in front of a
    response, so that the last of them is where the model would begin to answer. 0 in plain text."""


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int) -> list[Tokens]:
    """Tokens of every text: in the tokenizer's chat template, or else request, empty line, response.

    A text that is too long loses the end of its response, then of its request, but never what the template puts around
    them: the last token, whose state represents the text, means the same in every text.

    Args:
        tokenizer: any tokenizer; it is said once if it has no chat template.
        texts: N texts.
        max_length: tokens that a text may have; how many were cut is said in a warning.

    Raises:
        InputError: the chat template refuses a text, a text has no token, or `max_length` has no room for the template;
            names the source of the text.
    """
    if tokenizer.chat_template is None and any(text.response is not None for text in texts):
        logger.warning("The tokenizer has no chat template: request and response are joined by an empty line.")
    rows: list[Tokens] = []
    cut = 0
    for text in texts:
        ids = _token_ids(tokenizer, text)
        cut += len(ids) > max_length
        while len(ids) > max_length:
            text = _shorten(tokenizer, text, len(ids) - max_length)
            ids = _token_ids(tokenizer, text)
        if not ids:
            raise InputError(f"{text.source}: expected text that the tokenizer knows, got no token at all")
        rows.append(Tokens(ids, _request_length(tokenizer, text, ids)))
    if cut:
        logger.warning("%d of %d texts are longer than %d tokens and were cut.", cut, len(texts), max_length)
    return rows


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: Text, awaits_response: bool = False) -> list[int]:
    """Ids of a text, or of what a response to it follows."""
    if tokenizer.chat_template is None or text.response is None:
        string, complete = "\n\n".join(filter(None, (text.prompt, text.response))), False
        if awaits_response:
            string += "\n\n"
    else:
        turns = (("user", text.prompt), ("assistant", text.response))
        messages = [{"role": role, "content": content} for role, content in turns if content]
        try:
            # A chat template writes the special tokens itself.
            string = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=awaits_response))
        except TemplateError as error:
            raise InputError(f"{text.source}: the tokenizer's chat template refuses this text; {error}") from error
        complete = True
    ids: list[int] = tokenizer(string, add_special_tokens=not complete, verbose=False)["input_ids"]
    return ids


def _request_length(tokenizer: PreTrainedTokenizerBase, text: Text, ids: list[int]) -> int:
    """Tokens of a text before its response: those that the request alone, ready for a response, begins with too.

    What a tokenizer merges across the boundary belongs to the response.
    """
    if text.response is None or not text.prompt:
        return 0
    if not text.response:
        return len(ids)
    request = _token_ids(tokenizer, text._replace(response=""), awaits_response=True)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(request, ids, strict=False))
    return sum(1 for _ in shared)


def _shorten(tokenizer: PreTrainedTokenizerBase, text: Text, excess: int) -> Text:
    """Take some `excess` tokens, at least one, from the end of the response, or once that is empty of the request."""
    content = text.response or text.prompt
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    shorter = str(tokenizer.decode(ids[: max(0, len(ids) - excess)]))
    if len(shorter) >= len(content):  # a round trip through tokens may add characters
        shorter = content[:-1]
    text = text._replace(response=shorter) if text.response else text._replace(prompt=shorter)
    if not text.prompt and not text.response:
        raise InputError("--max_length: expected room for text inside the chat template, got too few tokens")
    return text


class PairDataset(Dataset[dict[str, Any]]):
    """Tokens of the training samples, indexed by what a PairSampler draws."""

    def __init__(self, rows: Sequence[Tokens], concept_ids: np.ndarray, retain_rows: Sequence[Tokens] | None) -> None:
        self.rows = rows
        self.concept_ids = concept_ids
        self.retain_rows = retain_rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, ...]) -> dict[str, Any]:
        first, second, *retain = index
        texts = [self.rows[first], self.rows[second]]
        if self.retain_rows is not None:
            texts.append(self.retain_rows[retain[0]])
        return {"texts": texts, "concept_id": int(self.concept_ids[first])}


class PairSampler(Sampler[tuple[int, ...]]):
    """Every sample once per epoch in random order, with another sample of its concept, and a retain text if there are.

    The order depends on the seed and the epoch alone, so a resumed run sees the pairs it would have seen.
    """

    def __init__(self, concept_ids: np.ndarray, seed: int, retain_size: int = 0) -> None:
        self.concept_ids = concept_ids
        self.seed = seed
        self.retain_size = retain_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.concept_ids)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        partners = np.empty(len(self), dtype=np.int64)
        for concept_id in np.unique(self.concept_ids):
            members = np.flatnonzero(self.concept_ids == concept_id)
            steps = generator.integers(1, len(members), size=len(members))
            partners[members] = members[(np.arange(len(members)) + steps) % len(members)]
        order = generator.permutation(len(self))
        columns = [order, partners[order]]
        if self.retain_size:
            rounds = math.ceil(len(self) / self.retain_size)
            texts = np.concatenate([generator.permutation(self.retain_size) for _ in range(rounds)])
            columns.append(texts[: len(self)])
        return zip(*(column.tolist() for column in columns), strict=True)


def pad_rows(rows: Sequence[Tokens], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest: `input_ids` and `attention_mask`, both (R, T), `request_lengths` (R,); int64."""
    tensors = [torch.tensor(row.ids) for row in rows]
    return {
        "request_lengths": torch.tensor([row.request_length for row in rows]),
        "input_ids": pad_sequence(tensors, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True),
    }


class PairCollator:
    """B pairs as one batch: `concept_ids` (B,), and rows [first texts; second texts; retain texts, if there are]."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        views = zip(*(item["texts"] for item in items), strict=True)
        return {
            **pad_rows([row for view in views for row in view], self.pad_token_id),
            "concept_ids": torch.tensor([item["concept_id"] for item in items]),
        }
