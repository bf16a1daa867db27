"""Which pairs an epoch has, what is in a batch, and the loss of texts with several concepts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from seer import ConceptDataset, InputError, SeerTrainer
from seer.data import Text, Tokens
from seer.losses import disentangle_loss
from seer.sampling import PairCollator, PairDataset, PairSampler
from seer_kernels import info_nce

IDS = np.array([0, 0, 1, 1, 1, 0, 2, 2])


def one_hot(ids: np.ndarray) -> np.ndarray:
    return np.eye(ids.max() + 1, dtype=bool)[ids]


LABELS = one_hot(IDS)
SKEWED = np.repeat(np.arange(5), [40, 20, 9, 3, 2])  # 74 samples
SEVERAL = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1]], dtype=bool)


def epochs(sampler: PairSampler, count: int) -> list[list[tuple[int, ...]]]:
    result = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        result.append(list(sampler))
        assert len(result[-1]) == len(sampler)
    return result


def batches_of(pairs: list[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def test_pairs_are_two_samples_of_one_concept_and_every_sample_leads_once() -> None:
    seen = set()
    for pairs in epochs(PairSampler(LABELS, seed=0), 20):
        assert sorted(first for first, _ in pairs) == list(range(8))
        assert all(first != second and IDS[first] == IDS[second] for first, second in pairs)
        seen.update(pairs)
    assert len(seen) == 3 * 2 + 3 * 2 + 2  # every ordered pair that exists


@pytest.mark.parametrize("options", [{}, {"balance": "balanced"}, {"batch_size": 4, "concepts_per_batch": 2}])
def test_pairs_depend_on_seed_and_epoch_alone(options) -> None:
    sampler, other = (PairSampler(LABELS, seed=1, retain_size=3, **options) for _ in range(2))
    first = list(sampler)
    assert list(sampler) == first == list(other)
    other.set_epoch(1)
    assert list(other) != first
    assert list(PairSampler(LABELS, seed=2, retain_size=3, **options)) != first
    assert {retain for _, _, retain in first} == {0, 1, 2}


def test_batches_have_the_chosen_numbers_of_concepts_and_pairs() -> None:
    for balance in ("frequency", "balanced"):
        options = {"batch_size": 6, "processes": 2, "concepts_per_batch": 3, "balance": balance}
        together = set()
        for pairs in epochs(PairSampler(one_hot(SKEWED), seed=3, **options), 10):
            batches = batches_of(pairs, 6)
            assert len(batches) == 14  # 74 samples make 12.3 batches; both processes get 7
            for batch in batches:
                counts = Counter(SKEWED[first] for first, _ in batch)
                assert sorted(counts.values()) == [2, 2, 2]
                assert all(SKEWED[first] == SKEWED[second] and first != second for first, second in batch)
                assert len({first for first, _ in batch}) == 6
                together.add(frozenset(counts))
            assert len({tuple(batch) for batch in batches}) == 14
        # All threes occur; by frequency the two large concepts are due in every batch.
        assert len(together) == (10 if balance == "balanced" else 3)


def concept_counts(pairs: list[tuple[int, ...]]) -> np.ndarray:
    return np.bincount(SKEWED[[first for first, _ in pairs]], minlength=5)


def test_concepts_are_drawn_as_balance_says_in_every_epoch() -> None:
    sizes = np.bincount(SKEWED)
    for pairs in epochs(PairSampler(one_hot(SKEWED), seed=0, balance="balanced"), 8):
        assert set(concept_counts(pairs)) == {14, 15}  # 74 / 5
    for pairs in epochs(PairSampler(one_hot(SKEWED), seed=0), 2):
        assert (concept_counts(pairs) == sizes).all()

    options = {"batch_size": 4, "concepts_per_batch": 2}
    for pairs in epochs(PairSampler(one_hot(SKEWED), seed=0, balance="balanced", **options), 8):
        assert set(concept_counts(pairs)) <= {14, 16}  # 19 batches x 2 concepts / 5 = 7.6 batches of each
    # By frequency concept 0 would need 20.5 of 38 places; more than one in each of 19 batches it cannot have.
    shares = np.append(19, 19 * sizes[1:] / sizes[1:].sum()) * 2
    drawn = [concept_counts(pairs) for pairs in epochs(PairSampler(one_hot(SKEWED), seed=0, **options), 60)]
    assert np.abs(np.array(drawn) - shares).max() < 2  # within one batch in every epoch
    assert np.abs(np.mean(drawn, 0) - shares).max() < 0.4  # and right on average, the rarest concept too


def test_samples_of_a_concept_take_turns() -> None:
    for options in ({"balance": "balanced"}, {"balance": "balanced", "batch_size": 10, "concepts_per_batch": 2}):
        for pairs in epochs(PairSampler(one_hot(SKEWED), seed=0, **options), 5):
            times = np.bincount([first for first, _ in pairs], minlength=74)
            for concept in range(5):
                assert np.ptp(times[concept == SKEWED]) <= 1
        for batch in batches_of(pairs, 10):
            repeated = Counter(first for first, _ in batch).values()
            if "batch_size" in options:  # five pairs of a concept: the concepts with two and three samples repeat
                concepts = {SKEWED[first] for first, _ in batch}
                assert max(repeated) == (3 if 4 in concepts else 2 if 3 in concepts else 1)


def test_texts_of_several_concepts_pair_by_any_shared_one() -> None:
    for options in ({}, {"batch_size": 4, "concepts_per_batch": 2}, {"balance": "balanced"}):
        pairs = {pair for each in epochs(PairSampler(SEVERAL, seed=0, **options), 40) for pair in each}
        share = {(i, j) for i in range(5) for j in range(5) if i != j and (SEVERAL[i] & SEVERAL[j]).any()}
        assert pairs == share
    with pytest.raises(InputError, match=r"sample 2: expected another sample that shares a concept with it, got none"):
        PairSampler(np.array([[1, 0], [1, 0], [0, 1]], dtype=bool), seed=0)


def test_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, size=len(SKEWED))

    def padding(sampler: PairSampler) -> int:
        longest = [lengths[list(pair)] for pairs in epochs(sampler, 3) for pair in pairs]
        return sum(int((np.max(batch) - np.array(batch)).sum()) for batch in batches_of(longest, 4))

    grouped = PairSampler(one_hot(SKEWED), seed=0, batch_size=4, lengths=lengths.tolist())
    for pairs in epochs(grouped, 2):
        assert sorted(first for first, _ in pairs) == list(range(74))
    assert padding(grouped) < 0.8 * padding(PairSampler(one_hot(SKEWED), seed=0, batch_size=4))
    assert list(grouped) == list(grouped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts_per_batch": 4}, r"--concepts_per_batch: expected at most 3, the number of concepts .* got 4"),
        ({"concepts_per_batch": 3}, r"--concepts_per_batch: expected a divisor of .*train_batch_size 4, .* got 3"),
        ({"concepts_per_batch": 2, "train_sampling_strategy": "group_by_length"}, "expected 'random' together with"),
        ({"concepts_per_batch": 1}, r"--concepts_per_batch: expected two concepts or more .* got one"),
        ({"concepts_per_batch": 0}, r"--concepts_per_batch: expected a whole number >= 1, got 0"),
        ({"train_sampling_strategy": "sequential"}, r"--train_sampling_strategy: expected one of .* got 'sequential'"),
        ({"balance": "even"}, r"--balance: expected one of \('frequency', 'balanced'\), got 'even'"),
        ({"per_device_train_batch_size": 1}, r"--per_device_train_batch_size: expected 2 or more: .* got 1"),
    ],
)
def test_numbers_that_do_not_go_together(make_model, make_config, dataset, tokenizer, options, message) -> None:
    with pytest.raises(InputError, match=message):
        SeerTrainer(make_model("llama"), make_config(**options), dataset, tokenizer)


def test_a_single_concept_has_nothing_to_differ_from(make_model, make_config, tokenizer) -> None:
    single = ConceptDataset([Text("a", "cat"), Text("a", "dog")], ["animal", "animal"])
    with pytest.raises(InputError, match=r"--data: expected two concepts or more .*\(--same_label positive\), got one"):
        SeerTrainer(make_model("llama"), make_config(), single, tokenizer)
    SeerTrainer(make_model("llama"), make_config(same_label="negative"), single, tokenizer)
    SeerTrainer(make_model("llama"), make_config(disentangle_weight=0.0), single, tokenizer)


def test_batch_layout() -> None:
    rows, retain = [Tokens([1], 0), Tokens([2, 3], 1), Tokens([4, 5, 6], 2)], [Tokens([7, 8], 1)]
    data = PairDataset(rows, np.ones((3, 1), dtype=bool), retain)
    batch = PairCollator(pad_token_id=9)([data[0, 1, 0], data[2, 0, 0]])
    assert batch["concept_ids"].tolist() == [0, 0]
    assert batch["input_ids"].tolist() == [[1, 9, 9], [4, 5, 6], [2, 3, 9], [1, 9, 9], [7, 8, 9], [7, 8, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [1, 3, 2, 1, 2, 2]
    assert batch["request_lengths"].tolist() == [0, 2, 1, 0, 1, 1]
    several = PairDataset([Tokens([1], 0)] * 5, SEVERAL)
    batch = PairCollator(pad_token_id=9)([several[0, 2], several[3, 4]])
    assert batch["concept_ids"].tolist() == [[[1, 1, 0], [0, 1, 1]], [[0, 0, 1], [1, 1, 1]]]


@pytest.mark.parametrize("same_label", ["negative", "ignore", "positive"])
def test_sets_of_one_concept_give_the_loss_of_labels(same_label) -> None:
    view1, view2 = (torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.tensor([0, 1, 0, 2, 1, 1])
    sets = torch.nn.functional.one_hot(ids).bool()[:, None].expand(6, 2, 3)
    expected, expected_statistics = disentangle_loss(view1, view2, ids, temperature=0.3, same_label=same_label)
    loss, statistics = disentangle_loss(view1, view2, sets, temperature=0.3, same_label=same_label)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(statistics, expected_statistics)
    gradients = [torch.autograd.grad(each, [view1, view2]) for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("same_label", ["ignore", "positive"])
def test_any_shared_concept_counts(same_label) -> None:
    """Each row by itself: its key, the keys that share a concept, the others; a|b shares with a and with b."""
    pairs = [(0, 4), (1, 0), (2, 3), (3, 4)]
    sets = torch.from_numpy(SEVERAL[np.array(pairs)])
    view1, view2 = torch.randn(1, 4, 5, dtype=torch.float64), torch.randn(1, 4, 5, dtype=torch.float64)
    losses = []
    for i, (first, _) in enumerate(pairs):
        shares = [i == j or bool((SEVERAL[first] & SEVERAL[second]).any()) for j, (_, second) in enumerate(pairs)]
        order = [i, *(j for j in range(4) if j != i)]
        labels = torch.tensor([int(shares[j]) for j in order])
        losses.append(
            info_nce(
                view1[0, [i]], view2[0, order], temperature=0.2, query_labels=labels[:1], key_labels=labels,
                same_label=same_label,
            )
        )  # fmt: skip
    loss, _ = disentangle_loss(view1, view2, sets, temperature=0.2, same_label=same_label)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_training_on_texts_of_several_concepts(make_model, make_config, dataset, tokenizer) -> None:
    both = [["metal", "fruit"] if index % 5 == 0 else name for index, name in enumerate(dataset.concepts)]
    several = ConceptDataset(dataset.texts, both)
    config = make_config(max_steps=3, concepts_per_batch=2, balance="balanced")
    trainer = SeerTrainer(make_model("llama"), config, several, tokenizer, eval_dataset=several)
    trainer.train()
    assert next(iter(trainer.get_train_dataloader()))["concept_ids"].shape == (4, 2, 3)
    assert 0 < trainer.evaluate()["eval_nearest_prototype_accuracy"] <= 1


def test_a_composed_epoch_is_continued_in_its_middle(make_model, make_config, dataset, tokenizer, tmp_path) -> None:
    options = {"concepts_per_batch": 2, "balance": "balanced", "save_strategy": "steps", "save_steps": 7}
    options |= {"max_steps": 9, "lora_dropout": 0.1, "learning_rate": 1e-2}
    whole = SeerTrainer(make_model("llama"), make_config(**options), dataset, tokenizer)
    whole.train()
    again = SeerTrainer(make_model("llama"), make_config(**options), dataset, tokenizer)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-7"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name


def test_view_dropout_takes_the_request_or_the_response_in_its_share() -> None:
    plain = PairSampler(np.eye(2, dtype=bool).repeat(500, 0), seed=0, retain_size=7)
    sampler = PairSampler(np.eye(2, dtype=bool).repeat(500, 0), seed=0, retain_size=7, view_dropout=0.25)
    drawn = [index[-2:] for index in sampler]
    assert [index[:-2] for index in sampler] == list(plain)  # nothing else changes
    counts = np.bincount(np.ravel(drawn), minlength=3) / 2000
    np.testing.assert_allclose(counts, [6 / 8, 1 / 8, 1 / 8], atol=0.03)
    assert [index[-2:] for index in sampler] == drawn
    sampler.set_epoch(1)
    assert [index[-2:] for index in sampler] != drawn


def test_parts_of_texts() -> None:
    rows = [Tokens([1, 2, 3, 4, 5], 2), Tokens([6, 7], 0), Tokens([8, 9], 2)]
    data = PairDataset(rows, np.ones((3, 1), dtype=bool), [Tokens([10, 11], 1)])
    assert data[0, 0, 0, 1, 2]["texts"] == [Tokens([1, 2], 2), Tokens([3, 4, 5], 0), Tokens([10, 11], 1)]
    assert data[0, 1, 0, 0, 1]["texts"][:2] == rows[:2]  # plain text has no parts
    assert data[2, 1, 0, 2, 2]["texts"][:2] == [rows[2], rows[1]]
    without_retain = PairDataset(rows, np.ones((3, 1), dtype=bool))
    assert without_retain[0, 0, 2, 1]["texts"] == [Tokens([3, 4, 5], 0), Tokens([1, 2], 2)]
