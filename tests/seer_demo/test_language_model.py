"""The demo's own tokenizer and language model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from seer import ConceptDataset
from seer.data import Text, tokenize
from seer.demo.language_model import WINDOW, build_model, build_tokenizer, train_language_model

SENTENCES = {
    "sea": "Waves roll over the sand and gulls cry above the harbour.",
    "wood": "Owls hoot in the oak and moss covers the fallen trunk.",
}


@pytest.fixture(scope="module")
def dataset() -> ConceptDataset:
    texts, concepts = [], []
    for concept, sentence in SENTENCES.items():
        words = sentence.split()
        for start in range(len(words)):
            texts.append(Text("What is there?", " ".join(words[start:] + words[:start]), f"made up {start}"))
            concepts.append(concept)
    return ConceptDataset(texts * 3, concepts * 3)


def test_tokenizer_writes_and_reads_the_chat_template(dataset: ConceptDataset) -> None:
    tokenizer = build_tokenizer(list(SENTENCES.values()))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    ((row, request_length),) = tokenize(tokenizer, [Text("Why?", "Waves, über é!", "")], WINDOW)
    assert tokenizer.decode(row) == "<|user|>Why?<|end|><|assistant|>Waves, über é!<|end|>"
    assert tokenizer.decode(row[:request_length]) == "<|user|>Why?<|end|><|assistant|>"
    special = [tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|end|>", "<|assistant|>")]
    assert [token for token in row if token in special] == [special[0], special[1], special[2], special[1]]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>Why?<|end|><|assistant|>"


def test_model_is_decided_by_the_seed(dataset: ConceptDataset) -> None:
    tokenizer = build_tokenizer(list(SENTENCES.values()))
    first, again, other = (build_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_lowers_the_loss_and_is_decided_by_the_seed(dataset: ConceptDataset) -> None:
    tokenizer = build_tokenizer(list(SENTENCES.values()))

    def trained(seed: int) -> tuple[float, torch.Tensor]:
        model = build_model(tokenizer, 0)
        train_language_model(model, tokenizer, dataset, seed=seed, epochs=4)
        return loss(model), model.lm_head.weight.detach()

    def loss(model: torch.nn.Module) -> float:
        row = torch.tensor([tokenize(tokenizer, dataset.texts[:1], WINDOW)[0].ids])
        model.eval()
        with torch.no_grad():
            return float(model(input_ids=row, labels=row).loss)

    untrained = loss(build_model(tokenizer, 0))
    assert untrained == pytest.approx(math.log(len(tokenizer)), rel=0.1)
    (after, weights), (_, same), (_, different) = trained(0), trained(0), trained(1)
    assert after < 0.9 * untrained
    assert torch.equal(weights, same)
    assert not torch.equal(weights, different)


def test_a_page_is_of_one_concept_and_every_epoch_has_its_own(
    dataset: ConceptDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer(list(SENTENCES.values()))
    read: list[list[int]] = []

    class Reader:
        def __init__(self, model: object, arguments: object, train_dataset: list[dict[str, torch.Tensor]]) -> None:
            assert all(torch.equal(page["input_ids"], page["labels"]) for page in train_dataset)
            read.extend(page["input_ids"].tolist() for page in train_dataset)

        def train(self) -> None:
            pass

    monkeypatch.setattr("seer.demo.language_model.Trainer", Reader)
    train_language_model(build_model(tokenizer, 0), tokenizer, dataset, seed=0, epochs=2)

    rows = [row.ids for row in tokenize(tokenizer, dataset.texts, WINDOW)]
    lengths = [sum(len(rows[index]) for index in np.flatnonzero(dataset.concept_ids == c)) for c in (0, 1)]
    assert len(read) == 2 * sum(length // WINDOW for length in lengths)
    sea, wood = (set(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES.values())
    for page in read:
        assert len(page) == WINDOW
        assert bool((sea - wood) & set(page)) != bool((wood - sea) & set(page))
    assert not set(map(tuple, read[: len(read) // 2])) & set(map(tuple, read[len(read) // 2 :]))
