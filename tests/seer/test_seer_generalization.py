"""The terms of the bound against closed forms and hand evaluations, and the command against its parts."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from seer import ConceptDataset, InputError
from seer.cli import main
from seer.generalization import (
    Estimate,
    GeneralizationTerms,
    LinearClassifier,
    Settings,
    evaluate_generalization,
    generalization_terms,
    resolve_k,
)
from seer.metrics import directions, linear_probe
from seer.run import Run
from seer.train import run_training

NAMES = ["a", "b", "c"]
FAST = Settings(splits=16, exact=False)


def clouds(spread: float, samples: tuple[int, ...] = (24, 16, 20)) -> tuple[np.ndarray, np.ndarray]:
    """Concepts around three orthogonal centres, not normalised, labels out of order."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(3), samples))
    return np.eye(3, 8)[labels] + spread * generator.normal(size=(len(labels), 8)), labels


def test_concepts_that_are_points() -> None:
    """Nothing is left of the bound's transport term, and every other term is known."""
    labels = np.repeat([0, 1], [8, 4])
    classifier = LinearClassifier(np.array([[2.0, 0.0], [0.0, 2.0]]), np.zeros(2))
    settings = Settings(splits=4, gamma=2.0, delta=0.1)  # every margin is gamma: none is below it
    terms = generalization_terms(np.eye(2)[labels], labels, NAMES[:2], classifier=classifier, settings=settings)
    assert terms.k == 2
    assert terms.exact is not None
    for found in (terms, terms.exact):
        assert found.mean_k_variance == Estimate(0.0, 0.0)
        assert found.k_variance == {"a": Estimate(0.0, 0.0), "b": Estimate(0.0, 0.0)}
    assert terms.lipschitz == pytest.approx({"a": math.sqrt(8), "b": math.sqrt(8)})
    assert (terms.median_margin, terms.error, terms.margin_loss, terms.radius) == (2.0, 0.0, 0.0, 1.0)
    assert terms.transport_term == Estimate(0.0, 0.0)
    slope, log = math.sqrt(8) / 2, math.log(2 * 2 / 0.1)
    estimation = 8 / 12 * slope * 2 * math.sqrt(2 * log / 8) + 4 / 12 * slope * 2 * math.sqrt(2 * log / 4)
    assert terms.estimation_term == pytest.approx(estimation)
    assert terms.sampling_term == pytest.approx(math.sqrt(math.log(20) / 24))
    assert terms.bound.value == pytest.approx(estimation + math.sqrt(math.log(20) / 24))
    for value in (terms.kv_margin.value, terms.kv_gn_margin.value, terms.exact.entropic_bias):
        assert math.isnan(value)  # a quotient by 0


def test_concepts_of_two_points() -> None:
    """W1 between two samples of two points at distance d is d |X - Y| / k, X and Y binomial."""
    k, distance, count = 4, 3.0, 600
    generator = np.random.default_rng(0)
    kinds = generator.permutation(np.repeat([0, 1], count))
    labels = np.repeat([0, 1], count)
    features = np.column_stack([kinds * distance, labels * 50.0])
    # Concept a has its two points with shares that are nearly 1/2, b likewise: the shares are counted.
    terms = generalization_terms(features, labels, NAMES[:2], settings=Settings(k=k, splits=1500))
    assert terms.exact is not None
    for concept, name in enumerate(NAMES[:2]):
        chances = binom.pmf(np.arange(k + 1), k, kinds[labels == concept].mean())
        gaps = np.abs(np.subtract.outer(np.arange(k + 1), np.arange(k + 1)))
        expected = distance / k * float(chances @ gaps @ chances)
        for found in (terms.k_variance[name], terms.exact.k_variance[name]):
            assert found.value == pytest.approx(expected, abs=4 * found.standard_error)
            assert found.standard_error < 0.03 * expected


def test_margins_gradients_and_lipschitz_constants_by_hand() -> None:
    classifier = LinearClassifier(np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]), np.array([0.0, 0.5, 1.0]))
    features = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0], [1.0, 0.0]])
    margins, norms = classifier.margins(features, np.array([0, 0, 2, 2]))
    # Scores: (1, 0.5, -2), (1, 2.5, -2), (-1, 2.5, 4), (1, 0.5, -2).
    np.testing.assert_allclose(margins, [0.5, -1.5, 1.5, -3.0])
    np.testing.assert_allclose(norms, [math.sqrt(5), math.sqrt(5), math.sqrt(13), 4.0])
    np.testing.assert_allclose(classifier.lipschitz(), [4.0, math.sqrt(13), 4.0])

    # No pair of far points has a steeper margin, and some pair has nearly that of the constant.
    points = 1e3 * np.random.default_rng(0).normal(size=(20_000, 2))
    steps = 0.1 * directions(np.random.default_rng(1).normal(size=points.shape))
    for concept, constant in enumerate(classifier.lipschitz()):
        labels = np.full(len(points), concept)
        rise = classifier.margins(points + steps, labels)[0] - classifier.margins(points, labels)[0]
        steepest = np.abs(rise).max() / 0.1
        assert 0.999 * constant < steepest < constant * (1 + 1e-6)


@pytest.mark.parametrize("concepts", [2, 3])
def test_the_fitted_classifier_is_the_linear_probe(concepts) -> None:
    features, labels = clouds(0.5)
    features, labels = features[labels < concepts], labels[labels < concepts]
    classifier = LinearClassifier.fit(features, labels)
    assert classifier.weights.shape == (concepts, 8)
    scores = features @ classifier.weights.T + classifier.biases
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(chances, linear_probe(features, labels).predict_proba(features), atol=1e-9)


def test_every_term_by_its_definition() -> None:
    features, labels = clouds(0.6)
    classifier = LinearClassifier.fit(features, labels)
    settings = Settings(k=5, splits=8, gamma=0.7, delta=0.02)
    terms = generalization_terms(features, labels, NAMES, classifier=classifier, settings=settings)
    m, counts = 60, {"a": 24, "b": 16, "c": 20}
    margins, distances = [], []
    for feature, label in zip(features, labels, strict=True):
        scores = [float(w @ feature + b) for w, b in zip(classifier.weights, classifier.biases, strict=True)]
        rival = max((score, other) for other, score in enumerate(scores) if other != label)[1]
        margins.append(scores[label] - scores[rival])
        distances.append(margins[-1] / math.dist(classifier.weights[label], classifier.weights[rival]))
    lipschitz = {
        name: max(math.dist(weights, other) for other in classifier.weights)
        for name, weights in zip(NAMES, classifier.weights, strict=True)
    }
    radius = max(math.hypot(*feature) for feature in features)
    variances = {name: terms.k_variance[name].value for name in NAMES}
    spread = sum(counts[name] / m * lipschitz[name] * variances[name] for name in NAMES)
    mean = sum(counts[name] / m * variances[name] for name in NAMES)
    deviations = {name: 2 * radius * math.sqrt(2 * math.log(2 * 3 / 0.02) / counts[name]) for name in NAMES}

    assert 0 < terms.error < 0.5
    assert terms.error == np.mean([margin <= 0 for margin in margins])
    assert terms.median_margin == pytest.approx(np.median(margins))
    assert terms.radius == pytest.approx(radius)
    assert terms.lipschitz == pytest.approx(lipschitz)
    assert terms.mean_k_variance.value == pytest.approx(mean)
    assert terms.kv_margin.value == pytest.approx(-np.median(margins) / spread)
    assert terms.kv_gn_margin.value == pytest.approx(-np.median(distances) / mean)
    assert terms.margin_loss == np.mean([margin < 0.7 for margin in margins])
    assert terms.transport_term.value == pytest.approx(spread / 0.7)
    estimation = sum(counts[name] / m * lipschitz[name] / 0.7 * deviations[name] for name in NAMES)
    assert terms.estimation_term == pytest.approx(estimation)
    sampling = math.sqrt(math.log(2 / 0.02) / (2 * m))
    assert terms.sampling_term == pytest.approx(sampling)
    assert terms.bound.value == pytest.approx(terms.margin_loss + spread / 0.7 + estimation + sampling)

    # The median margin is the default gamma: then the transport term is the reciprocal of kV-Margin.
    terms = generalization_terms(features, labels, NAMES, classifier=classifier, settings=replace(settings, gamma=None))
    assert terms.transport_term.value == pytest.approx(-1 / terms.kv_margin.value)
    assert terms.margin_loss == 0.5


def test_standard_errors_are_those_of_drawing_splits_again() -> None:
    features, labels = clouds(0.6)
    classifier = LinearClassifier.fit(features, labels)

    def measured(seed: int) -> GeneralizationTerms:
        settings = replace(FAST, seed=seed, gamma=1.0)
        return generalization_terms(features, labels, NAMES, classifier=classifier, settings=settings)

    draws = [measured(seed) for seed in range(60)]
    assert measured(3) == draws[3]
    assert measured(3) != draws[4]
    for name in ("mean_k_variance", "kv_margin", "kv_gn_margin", "transport_term", "bound"):
        estimates = [getattr(terms, name) for terms in draws]
        found = np.std([each.value for each in estimates], ddof=1)
        said = np.mean([each.standard_error for each in estimates])
        assert found == pytest.approx(said, rel=0.35), name  # of 60 draws: 0.09 is one standard error


def test_scaling_changes_no_normalised_margin() -> None:
    features, labels = clouds(0.6)
    classifier = LinearClassifier.fit(features, labels)

    def margins(features: np.ndarray, classifier: LinearClassifier) -> tuple[float, float]:
        terms = generalization_terms(features, labels, NAMES, classifier=classifier, settings=FAST)
        return terms.kv_margin.value, terms.kv_gn_margin.value

    expected = margins(features, classifier)
    louder = LinearClassifier(7 * classifier.weights, 7 * classifier.biases)
    assert margins(features, louder) == pytest.approx(expected)
    carried = LinearClassifier(classifier.weights / 50, classifier.biases)
    assert margins(50 * features, carried) == pytest.approx(expected, rel=1e-6)
    assert margins(50 * features, classifier) != pytest.approx(expected, rel=0.05)


def test_of_two_concepts_both_normalised_margins_are_one() -> None:
    """All gradients are then the one Lipschitz constant; of three concepts they differ."""
    features, labels = clouds(0.6)
    three = generalization_terms(features, labels, NAMES, settings=FAST)
    assert three.kv_gn_margin.value < three.kv_margin.value * 1.001
    assert three.kv_gn_margin.value != pytest.approx(three.kv_margin.value, rel=1e-3)
    features, labels = features[labels < 2], labels[labels < 2]
    two = generalization_terms(features, labels, NAMES[:2], settings=FAST)
    assert two.kv_gn_margin.value == pytest.approx(two.kv_margin.value)


def test_the_entropic_bias_goes_with_eps() -> None:
    features, labels = clouds(0.6)
    coarse, fine = (
        generalization_terms(features, labels, NAMES, settings=Settings(splits=8, eps=eps)) for eps in (0.1, 0.01)
    )
    assert coarse.exact is not None
    assert fine.exact is not None
    assert coarse.exact.k_variance == fine.exact.k_variance
    assert coarse.exact.entropic_bias == pytest.approx(
        coarse.mean_k_variance.value / coarse.exact.mean_k_variance.value - 1
    )
    assert 0 < fine.exact.entropic_bias < coarse.exact.entropic_bias / 4
    for name in NAMES:
        assert coarse.k_variance[name].value > fine.k_variance[name].value > coarse.exact.k_variance[name].value


@pytest.mark.parametrize("refitted", [False, True])
def test_gathered_concepts_have_a_lower_bound(refitted) -> None:
    features, labels = clouds(0.4)
    centres = np.stack([features[labels == concept].mean(0) for concept in range(3)])
    gathered = centres[labels] + 0.2 * (features - centres[labels])
    classifier = None if refitted else LinearClassifier.fit(features, labels)
    before, after = (
        generalization_terms(each, labels, NAMES, classifier=classifier, radius=3.0, settings=FAST)
        for each in (features, gathered)
    )
    if not refitted:
        assert after.mean_k_variance.value == pytest.approx(0.2 * before.mean_k_variance.value, rel=1e-6)
        assert after.lipschitz == before.lipschitz
    for name in NAMES:
        assert after.k_variance[name].value < 0.3 * before.k_variance[name].value
    assert after.kv_margin.value < 2 * before.kv_margin.value
    assert after.kv_gn_margin.value < 2 * before.kv_gn_margin.value
    assert after.transport_term.value < 0.5 * before.transport_term.value
    assert after.bound.value < before.bound.value


def test_a_classifier_that_is_mostly_wrong_has_no_bound() -> None:
    features, labels = clouds(0.2)
    classifier = LinearClassifier.fit(features, labels)
    wrong = LinearClassifier(-classifier.weights, -classifier.biases)
    terms = generalization_terms(features, labels, NAMES, classifier=wrong, settings=FAST)
    assert terms.error > 0.5
    assert terms.kv_margin.value > 0
    for value in (terms.bound.value, terms.transport_term.value, terms.estimation_term, terms.margin_loss):
        assert math.isnan(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "--k: expected a whole number >= 1, got 0"),
        ({"splits": 1}, "--splits: expected a whole number >= 2, got 1"),
        ({"seed": -1}, "--seed: expected a whole number >= 0, got -1"),
        ({"eps": 0.0}, r"--eps: expected a positive number, got 0\.0"),
        ({"eps": math.nan}, "--eps: expected a positive number, got nan"),
        ({"gamma": -1.0}, r"--gamma: expected a positive number, got -1\.0"),
        ({"delta": 1.0}, r"--delta: expected a number between 0 and 1, got 1\.0"),
    ],
)
def test_settings_out_of_range(options, message) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**options)


def test_what_the_samples_must_have(monkeypatch) -> None:
    features, labels = clouds(0.5)
    assert resolve_k(labels, NAMES, None) == 8
    assert resolve_k(np.repeat([0, 1], 500), NAMES[:2], None) == 100
    with pytest.raises(
        InputError,
        match="--k: expected 2k training samples of every concept, got k = 9 and 16 of concept 'b', fewer than 18: "
        "give --k 8 or less",
    ):
        generalization_terms(features, labels, NAMES, settings=replace(FAST, k=9))
    with pytest.raises(InputError, match=r"concept 'd': expected two training samples or more .* got 0"):
        generalization_terms(features, labels, [*NAMES, "d"], settings=FAST)
    with pytest.raises(InputError, match=r"names: expected two concepts or more, .* got 1"):
        generalization_terms(features, np.zeros(len(labels), dtype=int), ["a"], settings=FAST)
    with pytest.raises(InputError, match=r"radius: expected features of norm 1\.0 at most, got one of"):
        generalization_terms(features, labels, NAMES, radius=1.0, settings=FAST)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(InputError, match="exact: expected POT for the exact k-variance, got no module ot: pip install"):
        Settings()


@pytest.fixture
def run(make_config, model_folder, data_file) -> Run:
    config = make_config(
        model=str(model_folder), data=str(data_file), max_steps=6, learning_rate=1e-2, held_out_share=0.34
    )
    return Run.load(run_training(config).output_dir)


def test_the_command_agrees_with_its_parts(run, tmp_path, capsys, monkeypatch) -> None:
    capsys.readouterr()
    command = ["evaluate", str(run.folder), "--task", "generalization", "--splits", "8"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    results = json.loads((run.folder / "generalization.json").read_text())
    assert results["training_samples"] == {"animal": 4, "fruit": 4, "metal": 4}
    assert results["held_out_samples"] == {"animal": 2, "fruit": 2, "metal": 2}
    assert results["features"] == "unit-normalised"
    assert [*results["layers"]] == ["0", "1", "2"]

    training, held_out = run.samples()
    encoded, encoded_held_out = run.encode(training.texts, [1]), run.encode(held_out.texts, [1])
    states = {"base": (encoded.before, encoded_held_out.before), "seer": (encoded.after, encoded_held_out.after)}
    for model, (of_training, of_held_out) in states.items():
        z = directions(of_training[1].numpy())
        terms = generalization_terms(z, training.concept_ids, training.names, settings=Settings(splits=8))
        found = results["layers"]["1"][model]
        assert found["training"]["radius"] == 1
        for name in ("mean_k_variance", "kv_margin", "kv_gn_margin", "bound"):
            expected = getattr(terms, name)
            assert found["training"][name]["value"] == pytest.approx(expected.value, rel=1e-4)
            assert f"{expected.value:.4g} ± {expected.standard_error:.1g}" in printed
        classifier = LinearClassifier.fit(z, training.concept_ids)
        margins, _ = classifier.margins(directions(of_held_out[1].numpy()), held_out.concept_ids)
        assert found["held_out"]["error"] == np.mean(margins <= 0)
        assert found["held_out"]["k"] == 1
        # With one sample on each side W1 is the distance of the two held-out samples.
        distances = []
        for concept in range(3):
            first, second = directions(of_held_out[1].numpy())[held_out.concept_ids == concept]
            distances.append(np.linalg.norm(first - second))
        assert found["held_out"]["mean_k_variance"]["value"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert results["layers"]["1"]["base"] != results["layers"]["1"]["seer"]

    raw = evaluate_generalization(run, layers=[-1], raw=True, settings=Settings(splits=2, exact=False))
    assert [*raw.layers] == [2]
    assert raw.layers[2].base.training.radius == pytest.approx(
        float(run.encode(training.texts, [2]).before[2].double().norm(dim=1).max())
    )

    monkeypatch.setitem(sys.modules, "ot", None)
    assert main([*command, "--layers", "0", "--json", str(tmp_path / "other.json")]) == 0
    assert "no exact k-variance and entropic bias without POT: pip install pot" in " ".join(
        capsys.readouterr().out.split()
    )
    assert json.loads((tmp_path / "other.json").read_text())["layers"]["0"]["base"]["training"]["exact"] is None


def test_the_command_says_what_is_wrong(run, tmp_path, capsys) -> None:
    command = ["evaluate", str(run.folder), "--task", "generalization"]
    for options, message in (
        (["--k", "3"], "--k: expected 2k training samples of every concept, got k = 3 and 4 of concept 'animal'"),
        (["--delta", "0"], "--delta: expected a number between 0 and 1, got 0.0"),
        (["--layers", "5"], "expected layers from -3 to 2"),
        (["--data", "nowhere.csv"], "nowhere.csv: expected a file, got nothing there"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    rows = [("cat", "x"), ("dog", "x"), ("iron", "y"), ("tin", "y"), ("zinc", "y"), ("gold", "y")]
    few.write_text("\n".join(json.dumps({"prompt": text, "response": "one", "concept": name}) for text, name in rows))
    assert len(ConceptDataset.load(str(few))) == 6
    run.config.concepts = None
    with pytest.raises(InputError, match=r"expected held-out samples of every concept, got none of \['x'\]"):
        evaluate_generalization(run, data=str(few), settings=FAST)
