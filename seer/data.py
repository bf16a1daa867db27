"""Texts: reading and checking them, and turning them into tokens."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakSet

import numpy as np
from jinja2 import TemplateError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from seer.errors import InputError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """One text: a request with its response, or, with response None, plain text that is used as it is."""

    prompt: str
    response: str | None = None
    source: str = ""
    """Where it came from, for messages: `file.csv:12`. A data set fills in what is left out."""


class TextDataset(Dataset[Text]):
    """Texts on which the model's behaviour is kept."""

    _LAYOUTS: ClassVar[list[tuple[str, ...]]] = [("prompt", "response"), ("text",)]
    """Columns that a row may have; the first that fits is read."""

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
        return cls._from_rows(_checked(_read(data), cls._LAYOUTS, data))

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, columns: Mapping[str, str] | None = None) -> TextDataset:
        """The rows of a `datasets.Dataset`.

        Args:
            dataset: with columns prompt and response, or text.
            columns: where they have other names: `{"prompt": "question"}` reads the prompt from the column question.

        Raises:
            InputError: names the row.
        """
        return cls._from_rows(_checked(_rows_of(dataset, "data set", columns), cls._LAYOUTS, "data set"))

    @classmethod
    def _from_rows(cls, rows: Iterable[tuple[str, dict[str, Any]]]) -> TextDataset:
        return cls([Text(row.get("text", row.get("prompt", "")), row.get("response"), source) for source, row in rows])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Text:
        return self.texts[index]


class PromptDataset(TextDataset):
    """Requests for a model to answer: read from a column prompt, or text; other columns do not count."""

    _LAYOUTS: ClassVar[list[tuple[str, ...]]] = [("prompt",), ("text",)]


class ConceptDataset(TextDataset):
    """Texts labelled by concept.

    Args:
        texts: N texts.
        concepts: the concept of each, or a list of several.
        names: the names of all concepts, which fixes their order; by default those that occur, sorted.

    Raises:
        InputError: no text, an empty or unknown name; the message names the source.
    """

    _LAYOUTS: ClassVar[list[tuple[str, ...]]] = [("prompt", "response", "concept")]

    names: list[str]
    """C names."""
    memberships: np.ndarray
    """[N, C] bool: which concepts a text has."""
    concept_ids: np.ndarray
    """(N,) int64: the first concept that was named for the text, index into `names`. Held-out figures go by it."""

    def __init__(
        self, texts: Sequence[Text], concepts: Sequence[str | Sequence[str]], names: Sequence[str] | None = None
    ) -> None:
        super().__init__(texts)
        if len(concepts) != len(texts):
            raise InputError(f"concepts: expected one per text ({len(texts)}), got {len(concepts)}")
        self._concepts = [(each,) if isinstance(each, str) else tuple(each) for each in concepts]
        self.names = sorted({name for each in self._concepts for name in each}) if names is None else list(names)
        ids = {name: index for index, name in enumerate(self.names)}
        self.memberships = np.zeros((len(texts), len(ids)), dtype=bool)
        for row, text, each in zip(self.memberships, self.texts, self._concepts, strict=True):
            if not each or not all(name.strip() for name in each):
                raise InputError(f"{text.source}: column concept: expected a name, got nothing")
            for name in each:
                if name not in ids:
                    raise InputError(f"{text.source}: column concept: expected one of {self.names}, got {name!r}")
                row[ids[name]] = True
        self.concept_ids = np.array([ids[each[0]] for each in self._concepts])

    @property
    def concepts(self) -> list[str]:
        """The first concept that was named for each text."""
        return [each[0] for each in self._concepts]

    @classmethod
    def load(cls, data: str, names: Sequence[str] | None = None) -> ConceptDataset:
        """Read a .csv or .jsonl file or a data set of the Hub with columns prompt, response and concept.

        A text may have several concepts: `a|b` in a .csv file, a list of names elsewhere.

        Args:
            data: file or name.
            names: the allowed concepts; by default any. Those that do not occur are left out.

        Raises:
            InputError: the message names the file and line.
        """
        separator = "|" if Path(data).suffix == ".csv" else None
        return cls._from_labelled_rows(_checked(_read(data), cls._LAYOUTS, data), names, separator)

    @classmethod
    def from_dataset(
        cls, dataset: datasets.Dataset, columns: Mapping[str, str] | None = None, names: Sequence[str] | None = None
    ) -> ConceptDataset:
        """The rows of a `datasets.Dataset`.

        Args:
            dataset: with columns prompt, response and concept; a concept is a name, a class label or a list of either.
            columns: where they have other names: `{"concept": "label"}` reads the concept from the column label.
            names: the allowed concepts; by default any. Those that do not occur are left out.

        Raises:
            InputError: names the row.
        """
        rows = _checked(_rows_of(dataset, "data set", columns), cls._LAYOUTS, "data set")
        return cls._from_labelled_rows(rows, names, separator=None)

    @classmethod
    def _from_labelled_rows(
        cls, rows: Iterable[tuple[str, dict[str, Any]]], names: Sequence[str] | None, separator: str | None
    ) -> ConceptDataset:
        rows = list(rows)
        texts = [Text(row["prompt"], row["response"], source) for source, row in rows]
        concepts = [_names(row["concept"], separator) for _, row in rows]
        dataset = cls(texts, concepts, names)
        return cls(texts, concepts, [name for name in dataset.names if any(name in each for each in concepts)])

    def require_pairs(self) -> None:
        """Raise InputError unless every concept has two samples, which is what a pair takes."""
        for column, name in zip(self.memberships.T, self.names, strict=True):
            if column.sum() == 1:
                source = self.texts[int(column.argmax())].source
                raise InputError(f"{source}: expected two samples or more of concept {name!r}, got this one")

    def split(self, held_out_share: float, seed: int) -> tuple[ConceptDataset, ConceptDataset | None]:
        """Divide every concept's samples at random into a training and a held-out share, the same for the same seed.

        A sample of several concepts counts for the first that was named. Every concept keeps two samples for training
        and, given a third, has one held out. The second result is None if the share is 0.

        Raises:
            InputError: a concept with a single sample, or none with three.
        """
        self.require_pairs()
        if held_out_share == 0:
            return self, None
        generator = np.random.default_rng(seed)
        held_out = np.zeros(len(self), dtype=bool)
        for concept_id, name in enumerate(self.names):
            members = np.flatnonzero(self.concept_ids == concept_id)
            if len(members) == 2:
                logger.warning("Concept %r has two samples: both are trained on, none is held out.", name)
            count = max(0, min(max(1, round(held_out_share * len(members))), len(members) - 2))
            held_out[generator.permutation(members)[:count]] = True
        for column in self.memberships.T:  # a concept that is always named second may have lost too many
            missing = 2 - int((column & ~held_out).sum())
            held_out[np.flatnonzero(column & held_out)[: max(0, missing)]] = False
        if not held_out.any():
            raise InputError(
                f"--held_out_share: expected 0 where no concept has more than two samples, got {held_out_share}"
            )
        return self._subset(~held_out), self._subset(held_out)

    def _subset(self, wanted: np.ndarray) -> ConceptDataset:
        chosen = np.flatnonzero(wanted)
        return ConceptDataset([self.texts[i] for i in chosen], [self._concepts[i] for i in chosen], self.names)


def _names(concept: str | list[str], separator: str | None) -> list[str]:
    if isinstance(concept, list):
        return concept
    return [concept] if separator is None else [name.strip() for name in concept.split(separator)]


def _read(data: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (source, row) for every row of a file or data set of the Hub."""
    path = Path(data).expanduser()
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix in readers:
        if not path.is_file():
            raise InputError(f"{data}: expected a file, got {'a folder' if path.is_dir() else 'nothing there'}")
        return readers[path.suffix](path)
    if path.exists():
        raise InputError(f"{data}: expected a name that ends in .csv or .jsonl, got {path.name!r}")
    return _read_hub(data)


def _checked(
    rows: Iterable[tuple[str, dict[str, Any]]], layouts: list[tuple[str, ...]], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same rows, each with the columns of the first layout that fits, of which every value is known to be text."""
    columns: tuple[str, ...] | None = None
    for source, row in rows:
        columns = next((layout for layout in layouts if set(layout) <= set(row)), None)
        if columns is None:
            missing = " (or column ".join(str(sorted(set(layout) - set(row)))[1:-1] for layout in layouts)
            raise InputError(
                f"{source}: missing column {missing}{')' * (len(layouts) - 1)}; got columns {sorted(map(str, row))}"
            )
        for column in columns:
            value = row[column]
            several = column == "concept" and isinstance(value, list)
            if not all(isinstance(each, str) for each in (value if several else [value])):
                raise InputError(f"{source}: column {column}: expected text, got {value!r}")
        yield source, {column: row[column] for column in columns}
    if columns is None:
        raise InputError(f"{name}: expected at least one row, got none")


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
    yield from _rows_of(dataset, name)


def _rows_of(
    dataset: datasets.Dataset, name: str, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows under our names for their columns, and class labels by name."""
    for ours, theirs in (columns or {}).items():
        if theirs not in dataset.column_names:
            raise InputError(f"columns: expected {ours} in one of {dataset.column_names}, got {theirs!r}")
    decoders = {
        column: feature.int2str
        for column, each in dataset.features.items()
        if hasattr(feature := getattr(each, "feature", each), "int2str")  # a class, or a list of classes
    }
    for index, row in enumerate(dataset):
        decoded = {key: decoders[key](value) if key in decoders else value for key, value in row.items()}
        yield f"{name}, row {index}", {**decoded, **{ours: decoded[theirs] for ours, theirs in (columns or {}).items()}}


class Tokens(NamedTuple):
    """One text as a model reads it."""

    ids: list[int]
    request_length: int
    """How many of the ids come before the response: the request with all that the chat template puts in front of a
    response, so that the last of them is where the model would begin to answer. 0 in plain text."""


_REMARKED_UPON: WeakSet[PreTrainedTokenizerBase] = WeakSet()
"""Tokenizers whose lack of a chat template was said: once, however many data sets they read."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int, truncation: str = "end"
) -> list[Tokens]:
    """Tokens of every text: in the tokenizer's chat template, or else request, empty line, response.

    A text that is too long is shortened before the template is applied: the last token, whose state represents the
    text, means the same in every text. What is unusual about the texts is said in one warning each, with a count.

    Args:
        tokenizer: any tokenizer.
        texts: N texts.
        max_length: tokens that a text may have.
        truncation: what a text that is too long loses: "end", the end of its response, then of its request; "middle",
            the middle of its request, then the end of its response; "refuse": it is an error. Plain text loses its end.

    Raises:
        InputError: the chat template refuses a text, a text has no token, or `max_length` has no room for the template;
            names the source of the text. With "refuse", also a text that is too long.
    """
    plain = tokenizer.chat_template is None and any(text.response is not None for text in texts)
    if plain and tokenizer not in _REMARKED_UPON:
        _REMARKED_UPON.add(tokenizer)
        logger.warning("The tokenizer has no chat template: request and response are joined by an empty line.")
    silent = sum(text.response is not None and not text.response.strip() for text in texts)
    if silent:
        logger.warning("%d of %d texts have an empty response: their request stands for them.", silent, len(texts))
    texts, rows = _fitting(tokenizer, texts, max_length, truncation)
    return [Tokens(ids, _request_length(tokenizer, text, ids)) for text, ids in zip(texts, rows, strict=True)]


def tokenize_requests(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Text], max_length: int, truncation: str = "end"
) -> list[list[int]]:
    """Token ids of requests with all that the chat template puts in front of a response: a model answers after them.

    Args:
        tokenizer: any tokenizer.
        requests: N texts, of which the prompt counts.
        max_length: tokens that a request may have.
        truncation: what one that is too long loses, as in `tokenize`.

    Raises:
        InputError: as `tokenize`, and for a request of nothing but white space.
    """
    for request in requests:
        if not request.prompt.strip():
            raise InputError(f"{request.source}: expected a request to answer, got nothing but white space")
    unanswered = [request._replace(response="") for request in requests]
    return _fitting(tokenizer, unanswered, max_length, truncation, awaits_response=True)[1]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up short rows, which no layer gets to see: any will do where the tokenizer has none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    substitute = tokenizer.eos_token_id or 0
    logger.warning("The tokenizer has no pad token: token %d fills up short rows, behind the mask.", substitute)
    return substitute


def evenly_spaced(total: int, count: int) -> list[int]:
    """Indices of at most `count` of `total` samples, from the first to the last and evenly between."""
    return [*dict.fromkeys(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())]


def warn_of_shared_texts(rows: Sequence[Tokens], training_rows: Sequence[Tokens], what: str, why: str) -> None:
    """Say how many texts are also among those that concepts are learned from."""
    training = {tuple(row.ids) for row in training_rows}
    shared = sum(tuple(row.ids) in training for row in rows)
    if shared:
        logger.warning("%d of %d %s are also among the training texts: %s.", shared, len(rows), what, why)


def _fitting(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    max_length: int,
    truncation: str,
    awaits_response: bool = False,
) -> tuple[list[Text], list[list[int]]]:
    """The texts, shortened where they must be, and their ids."""
    texts = list(texts)
    rows = [_token_ids(tokenizer, text, awaits_response) for text in texts]
    for text, ids in zip(texts, rows, strict=True):
        if not ids:
            raise InputError(f"{text.source}: expected text that the tokenizer knows, got no token at all")
    too_long = [index for index, ids in enumerate(rows) if len(ids) > max_length]
    if too_long and truncation == "refuse":
        raise InputError(
            f"{texts[too_long[0]].source}: expected at most {max_length} tokens (--max_length, the window of the model "
            f"or of the tokenizer), got {len(rows[too_long[0]])}; {len(too_long)} of {len(texts)} texts are too long, "
            "and --truncation is refuse"
        )
    for index in too_long:
        while len(rows[index]) > max_length:
            texts[index] = _shorten(tokenizer, texts[index], len(rows[index]) - max_length, truncation)
            rows[index] = _token_ids(tokenizer, texts[index], awaits_response)
    if too_long:
        logger.warning("%d of %d texts are longer than %d tokens and were cut.", len(too_long), len(texts), max_length)
    return texts, rows


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


def _shorten(tokenizer: PreTrainedTokenizerBase, text: Text, excess: int, truncation: str) -> Text:
    """Take some `excess` tokens, at least one, from the part of the text whose turn it is."""

    def tokens(content: str) -> list[int]:
        ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    request = tokens(text.prompt)
    if truncation == "middle" and text.response is not None and len(request) > 2:
        keep = max(2, len(request) - excess)
        head, tail = request[: (keep + 1) // 2], request[len(request) - keep // 2 :]
        shorter = f"{decode(head).rstrip()} {decode(tail).lstrip()}"
        if len(shorter) >= len(text.prompt):  # a round trip through tokens may add characters
            middle = len(text.prompt) // 2
            shorter = text.prompt[:middle] + text.prompt[middle + 1 :]
        return text._replace(prompt=shorter)
    content = text.response or text.prompt
    ids = tokens(content)
    shorter = decode(ids[: max(0, len(ids) - excess)])
    if len(shorter) >= len(content):
        shorter = content[:-1]
    text = text._replace(response=shorter) if text.response else text._replace(prompt=shorter)
    if not text.prompt and not text.response:
        raise InputError("--max_length: expected room for text inside the chat template, got too few tokens")
    return text
