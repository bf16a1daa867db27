"""Every measure against a closed form, or against scipy and scikit-learn on the same samples."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, directed_hausdorff
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, silhouette_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from seer import ConceptDataset, TextDataset
from seer.cli import main
from seer.evaluate import evaluate_run, retention_sums
from seer.metrics import (
    between_centroids,
    bootstrap_weights,
    coding_rate,
    compare,
    different_concept_cosine,
    directions,
    effective_rank,
    hausdorff,
    knn_correct,
    layer_metrics,
    linear_probe_correct,
    nearest_prototype_correct,
    rate_reduction,
    same_concept_cosine,
    silhouette,
    within_concept,
)
from seer.run import Run
from seer.train import run_training


def clouds(samples: int = 12, concepts: int = 3, size: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Directions around a centre per concept, and labels out of order."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(concepts), samples))
    centres = np.random.default_rng(99).normal(size=(concepts, size))  # the same for every seed
    return directions(centres[labels] + 0.8 * generator.normal(size=(len(labels), size))), labels


Z, LABELS = clouds()
ONES = np.ones(len(LABELS))


def test_cosines_are_means_over_pairs() -> None:
    cosines = cosine_similarity(Z)
    pairs = [*itertools.combinations(range(len(Z)), 2)]
    same = [cosines[i, j] for i, j in pairs if LABELS[i] == LABELS[j]]
    different = [cosines[i, j] for i, j in pairs if LABELS[i] != LABELS[j]]
    assert same_concept_cosine(Z @ Z.T, LABELS, ONES) == pytest.approx(np.mean(same))
    assert different_concept_cosine(Z @ Z.T, LABELS, ONES) == pytest.approx(np.mean(different))
    assert math.isnan(different_concept_cosine(Z @ Z.T, np.zeros(len(Z)), ONES))
    # A sample drawn twice is no pair with itself: three copies of one and one of another are three equal pairs.
    weights = np.zeros(len(Z))
    first, second = np.flatnonzero(LABELS == 0)[:2]
    weights[[first, second]] = 3, 1
    assert same_concept_cosine(Z @ Z.T, LABELS, weights) == pytest.approx(cosines[first, second])


@pytest.mark.parametrize(("samples", "size"), [(4, 6), (6, 6), (9, 6)])
def test_coding_rate_of_orthogonal_samples(samples, size) -> None:
    """n unit vectors spread evenly over k axes: k factors 1 + D / (n eps^2) n / k."""
    axes = min(samples, size)
    z = np.eye(size)[np.arange(samples) % axes]
    counts = np.bincount(np.arange(samples) % axes)
    expected = 0.5 * sum(math.log(1 + size / (samples * 0.25) * count) for count in counts)
    assert coding_rate(z, np.ones(samples)) == pytest.approx(expected)
    repeated = coding_rate(np.concatenate([z, z]), np.ones(2 * samples))
    assert coding_rate(z, np.full(samples, 2.0)) == pytest.approx(repeated)


def test_coding_rate_and_reduction_by_definition() -> None:
    def rate(z: np.ndarray) -> float:
        columns = z.T
        return 0.5 * np.linalg.slogdet(np.eye(6) + 6 / (len(z) * 0.25) * columns @ columns.T)[1]

    assert coding_rate(Z, ONES) == pytest.approx(rate(Z))
    expected = rate(Z) - sum((c == LABELS).mean() * rate(Z[c == LABELS]) for c in range(3))
    assert rate_reduction(Z, LABELS, ONES) == pytest.approx(expected)
    assert rate_reduction(Z, np.zeros(len(Z)), ONES) == pytest.approx(0)
    # Concepts on axes of their own: R = C/2 log(1 + D / (C eps^2)), R_c = 1/2 log(1 + D / eps^2).
    labels = np.repeat(np.arange(3), 5)
    closed = 1.5 * math.log(1 + 6 / (3 * 0.25)) - 0.5 * math.log(1 + 6 / 0.25)
    assert rate_reduction(np.eye(6)[labels], labels, np.ones(15)) == pytest.approx(closed)


def test_effective_rank() -> None:
    assert effective_rank(np.eye(6)[:4], np.ones(4)) == pytest.approx(4)
    assert effective_rank(np.tile(Z[:1], (7, 1)), np.ones(7)) == pytest.approx(1)
    # Singular values 2 and 1: shares 2/3 and 1/3.
    uneven = np.eye(6)[[0, 0, 0, 0, 1]]
    expected = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert effective_rank(uneven, np.ones(5)) == pytest.approx(expected)
    assert effective_rank(np.eye(6)[:2], np.array([4.0, 1.0])) == pytest.approx(expected)


def test_centroid_distances() -> None:
    centroids = NearestCentroid().fit(Z, LABELS).centroids_
    expected = np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(centroids, 2)])
    assert between_centroids(Z, LABELS, ONES) == pytest.approx(expected)
    assert within_concept(Z, LABELS, ONES) == pytest.approx(np.linalg.norm(Z - centroids[LABELS], axis=1).mean())
    square = np.array([[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0]])
    assert within_concept(square, np.array([0, 0, 1, 1]), np.ones(4)) == pytest.approx(1)
    assert between_centroids(square, np.array([0, 0, 1, 1]), np.ones(4)) == pytest.approx(0)


def test_hausdorff_is_scipys() -> None:
    parts = [Z[c == LABELS] for c in range(3)]
    expected = np.mean(
        [max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]) for a, b in itertools.combinations(parts, 2)]
    )
    assert hausdorff(cdist(Z, Z), LABELS, ONES) == pytest.approx(expected)


def test_silhouette_and_classifiers_are_scikit_learns() -> None:
    assert silhouette(Z, LABELS).mean() == pytest.approx(silhouette_score(Z, LABELS))
    assert np.isnan(silhouette(Z, np.zeros(len(Z)))).all()
    train_z, train_labels = clouds(samples=20, seed=1)
    knn = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(train_z, train_labels)
    assert knn_correct(Z, LABELS, train_z, train_labels).mean() == accuracy_score(LABELS, knn.predict(Z))
    probe = LogisticRegression(max_iter=5000).fit(train_z, train_labels)
    assert linear_probe_correct(Z, LABELS, train_z, train_labels).mean() == accuracy_score(LABELS, probe.predict(Z))
    means = np.stack([train_z[train_labels == c].mean(0) for c in range(3)])
    nearest = cosine_similarity(Z, means).argmax(1)
    correct = nearest_prototype_correct(Z, LABELS, train_z, train_labels)
    assert correct.tolist() == (nearest == LABELS).tolist()
    assert 0 < correct.mean() < 1


def test_a_weight_is_a_number_of_copies() -> None:
    """Every measure but the pairwise ones, whose copies are no pairs, sees weighted samples as repeated ones."""
    generator = np.random.default_rng(2)
    weights = generator.integers(1, 4, len(Z))
    copies = np.repeat(np.arange(len(Z)), weights)
    for name, metric in (("rate", rate_reduction), ("between", between_centroids), ("within", within_concept)):
        repeated = metric(Z[copies], LABELS[copies], np.ones(len(copies)))
        assert metric(Z, LABELS, weights.astype(float)) == pytest.approx(repeated), name
    assert effective_rank(Z, weights.astype(float)) == pytest.approx(effective_rank(Z[copies], np.ones(len(copies))))


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    generator = np.random.default_rng(0)
    base, seer = generator.normal(size=(2, 400))
    seer = 0.9 * base + 0.1 * seer + 0.2
    weights = bootstrap_weights(np.zeros(400), 2000, seed=1)
    assert (weights.sum(1) == 400).all()
    change = compare(lambda w: np.average(base, weights=w), lambda w: np.average(seer, weights=w), weights)
    for interval, values in ((change.base, base), (change.seer, seer), (change.difference, seer - base)):
        half = 1.96 * values.std() / 20
        assert interval.value == pytest.approx(values.mean())
        assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_draws_that_repeat_samples_do_not_pull_the_interval_off_the_value() -> None:
    """Directions all at right angles: every draw has fewer of them than there are, and so a lower rank."""
    z, labels = np.eye(30), np.zeros(30)
    weights = bootstrap_weights(labels, 200, seed=0)
    draws = [effective_rank(z, row) for row in weights]
    assert max(draws) < 25
    interval = compare(lambda w: effective_rank(z, w), lambda w: 0.0, weights).base
    assert interval.value == pytest.approx(30)
    assert interval.low < 30 < interval.high
    assert interval.high - interval.low == pytest.approx(np.subtract(*np.quantile(draws, [0.975, 0.025])))
    # Chance is no bias: one sample of 80 that differs is drawn 0 or more times, never less.
    one = np.eye(80)[0]
    gain = compare(
        lambda w: 0.0, lambda w: np.average(one, weights=w), bootstrap_weights(np.zeros(80), 200, seed=3)
    ).difference
    assert gain.low == 0


def test_draws_keep_the_size_of_every_concept() -> None:
    weights = bootstrap_weights(LABELS, 50, seed=0)
    assert all((weights[:, c == LABELS].sum(1) == 12).all() for c in range(3))
    assert len(np.unique(weights, axis=0)) == 50
    assert (weights == bootstrap_weights(LABELS, 50, seed=0)).all()


def test_all_measures_of_well_separated_clouds_say_so() -> None:
    tight, tight_labels = np.eye(6)[np.repeat(np.arange(3), 8)], np.repeat(np.arange(3), 8)
    tight = tight + 0.05 * np.random.default_rng(0).normal(size=tight.shape)
    loose, labels = clouds(8)
    weights = bootstrap_weights(labels, 30, seed=0)
    base = layer_metrics(loose, labels, loose, labels)
    seer = layer_metrics(tight[np.argsort(np.argsort(labels))], labels, tight, tight_labels)
    changes = {name: compare(base[name], seer[name], weights) for name in base}
    for name in ("same_concept_cosine", "rate_reduction", "between_centroids", "silhouette", "hausdorff"):
        if name != "hausdorff":
            assert changes[name].difference.low > 0, name
    for name in ("different_concept_cosine", "within_concept"):
        assert changes[name].difference.high < 0, name
    for name in ("nearest_prototype_accuracy", "knn_accuracy", "linear_probe_accuracy"):
        assert changes[name].seer.value == 1, name


@pytest.fixture
def run(make_config, model_folder, data_file) -> Run:
    config = make_config(
        model=str(model_folder), data=str(data_file), max_steps=6, learning_rate=1e-2, held_out_share=0.5
    )
    return Run.load(run_training(config).output_dir)


def test_retention_is_what_transformers_computes(run, data_file) -> None:
    texts = TextDataset.load(str(data_file)).texts[:5]
    sums = retention_sums(run, texts, batch_size=2)
    for index, row in enumerate(run.tokens(texts)):
        batch = torch.tensor([row.ids])
        with torch.no_grad():
            adapted = run.model(batch, labels=batch)
            with run.model.disable_adapter():
                base = run.model(batch, labels=batch)
        tokens = len(row.ids) - 1
        assert sums["tokens"][index] == tokens
        assert sums["nll_seer"][index] / tokens == pytest.approx(float(adapted.loss), rel=1e-4)
        assert sums["nll_base"][index] / tokens == pytest.approx(float(base.loss), rel=1e-4)
        p, q = (each.logits[0, :-1].double().softmax(-1) for each in (base, adapted))
        assert sums["kl"][index] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)
        assert sums["kl"][index] > 1e-4


def test_the_command_agrees_with_the_run_and_its_parts(run, tmp_path, capsys) -> None:
    capsys.readouterr()
    folder = str(run.folder)
    assert main(["evaluate", folder, "--resamples", "20"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((run.folder / "evaluation.json").read_text())
    assert results["samples"] == 9
    assert [*results["layers"]] == ["0", "1", "2"]
    trained = json.loads((run.folder / "metrics.json").read_text())["held_out"]
    (layer,) = trained["layers"]
    measured = results["layers"][layer]
    for name, value in trained["layers"][layer]["after"].items():
        assert measured[name]["seer"]["value"] == pytest.approx(value, abs=1e-5)
        assert measured[name]["base"]["value"] == pytest.approx(trained["layers"][layer]["before"][name], abs=1e-5)
    assert results["retention"]["kl"]["seer"]["value"] > 0
    assert results["retention"]["kl"]["base"]["value"] == 0
    assert f"{results['retention']['perplexity']['base']['value']:.3f}" in printed
    for values in (each for layer in results["layers"].values() for each in layer.values()):
        for interval in values.values():
            assert interval["low"] <= interval["value"] + 1e-9
            assert interval["value"] <= interval["high"] + 1e-9

    retain = tmp_path / "retain.jsonl"
    retain.write_text(json.dumps({"text": "name a fruit is one"}) + "\n")
    evaluation = evaluate_run(run, layers=[-1], retain_data=str(retain), resamples=3)
    assert [*evaluation.layers] == [2]
    assert evaluation.retain_texts == str(retain)
    sums = retention_sums(run, TextDataset.load(str(retain)).texts)
    expected = math.exp(sums["nll_seer"][0] / sums["tokens"][0])
    assert evaluation.retention["perplexity"].seer.value == pytest.approx(expected)
    assert main(["evaluate", folder, "--layers", "5"]) == 2
    assert "expected layers from -3 to 2 (model.layers has 3 layers), got 5" in capsys.readouterr().err
    assert main(["evaluate", folder, "--resamples", "1"]) == 2
    assert "--resamples: expected a whole number >= 2, got 1" in capsys.readouterr().err


def test_an_encoder_and_concepts_without_held_out_samples(make_config, make_model, tokenizer, tmp_path, capsys) -> None:
    def write(name: str, rows: list[tuple[str, str]]) -> str:
        lines = [json.dumps({"prompt": text, "response": "one", "concept": concept}) for text, concept in rows]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    words = {"x": ["cat", "dog", "horse", "cow"], "y": ["iron", "tin", "zinc", "gold"]}
    data = write("data.jsonl", [(word, concept) for concept in words for word in words[concept]])
    config = make_config(data=data, max_steps=1, kl_weight=0, output_dir=str(tmp_path / "encoder"))
    out = run_training(config, make_model("bert"), tokenizer).output_dir
    encoder = evaluate_run(Run.load(out, make_model("bert")), resamples=3)
    assert encoder.retention is None
    assert encoder.layers[2]["silhouette"].base.value != encoder.layers[2]["silhouette"].base.value  # two samples

    few = write("few.jsonl", [("cat", "x"), ("dog", "x"), *((word, "y") for word in words["y"])])
    (Run.load(out, make_model("bert")).folder / "evaluation.json").unlink(missing_ok=True)
    assert len(ConceptDataset.load(few)) == 6
    run = Run.load(out, make_model("bert"))
    with pytest.raises(ValueError, match=r"expected held-out samples of every concept, got none of \['x'\]"):
        evaluate_run(run, data=few)
    none = make_config(data=data, max_steps=1, kl_weight=0, held_out_share=0.0, output_dir=str(tmp_path / "none"))
    run = Run.load(run_training(none, make_model("bert"), tokenizer).output_dir, make_model("bert"))
    with pytest.raises(ValueError, match="expected a run with held-out samples, got one with held_out_share 0"):
        evaluate_run(run)
