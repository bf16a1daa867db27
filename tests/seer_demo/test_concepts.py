"""The demo's data set: enough samples, all different, none made from a template."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files
from itertools import combinations

import pytest

from seer import ConceptDataset


@pytest.fixture(scope="module")
def dataset() -> ConceptDataset:
    return ConceptDataset.load(str(files("seer.demo") / "concepts.csv"))


def test_six_concepts_or_more_with_64_samples_each(dataset: ConceptDataset) -> None:
    counts = Counter(dataset.concepts)
    assert len(counts) >= 6
    assert min(counts.values()) >= 64
    assert len(set(counts.values())) == 1, f"expected concepts of equal size, got {counts}"


def test_no_prompt_and_no_response_occurs_twice(dataset: ConceptDataset) -> None:
    for column in ("prompt", "response"):
        counts = Counter(" ".join(words(getattr(text, column))) for text in dataset.texts)
        assert [text for text, count in counts.items() if count > 1] == []


def test_no_two_samples_share_a_quarter_of_their_word_trigrams(dataset: ConceptDataset) -> None:
    samples = [trigrams(f"{text.prompt} {text.response}") for text in dataset.texts]
    for (first, a), (second, b) in combinations(zip(dataset.texts, samples, strict=True), 2):
        shared = len(a & b) / min(len(a), len(b))
        assert shared < 0.25, f"{shared:.0%} shared by {first.prompt!r} and {second.prompt!r}"


def test_prompts_begin_in_many_ways(dataset: ConceptDataset) -> None:
    openings = Counter(tuple(words(text.prompt)[:2]) for text in dataset.texts)
    assert max(openings.values()) <= 0.1 * len(dataset)
    assert len(openings) >= 0.25 * len(dataset)
    questions = sum(text.prompt.endswith("?") for text in dataset.texts) / len(dataset)
    assert 0.4 < questions < 0.8


def test_lengths(dataset: ConceptDataset) -> None:
    for text in dataset.texts:
        assert text.response is not None
        assert 2 <= len(text.prompt.split()) <= 20, text.prompt
        assert 4 <= len(text.response.split()) <= 50, text.response
        assert 1 <= sentences(text.response) <= 3, text.response
        for part in (text.prompt, text.response):
            assert part == " ".join(part.split()), f"stray white space in {part!r}"
            assert part[0].isupper(), part
            assert part[-1] in ".?!", part
    responses = [len((text.response or "").split()) for text in dataset.texts]
    assert max(responses) >= 4 * min(responses)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def trigrams(text: str) -> set[tuple[str, ...]]:
    sequence = words(text)
    return set(zip(sequence, sequence[1:], sequence[2:], strict=False))


def sentences(text: str) -> int:
    return len(re.findall(r"[.?!](?:\s|$)", text))
