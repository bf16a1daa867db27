"""Temperature, calibration error and the "unknown" threshold on samples whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss
from torch.nn.functional import normalize

from seer import Calibration, InputError, Prototypes
from seer.calibration import calibrate, expected_calibration_error, fit, fit_temperature
from seer.data import tokenize
from seer.layers import find_layers


def drawn(temperature: float, samples: int = 4000, concepts: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines, and labels drawn from softmax(cosines / temperature)."""
    generator = np.random.default_rng(seed)
    cosines = generator.uniform(-0.3, 0.9, (samples, concepts))
    shares = softmax(cosines / temperature, axis=1).cumsum(1)
    return cosines, (generator.random((samples, 1)) < shares).argmax(1)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_the_temperature_that_made_the_labels_is_found(temperature) -> None:
    cosines, labels = drawn(temperature)
    assert fit_temperature(cosines, labels) == pytest.approx(temperature, rel=0.12)


def test_the_fitted_temperature_has_the_least_nll() -> None:
    cosines, labels = drawn(0.2, samples=300)
    found = fit_temperature(cosines, labels)

    def nll(temperature: float) -> float:
        return log_loss(labels, softmax(cosines / temperature, axis=1), labels=range(5))

    assert nll(found) <= min(nll(temperature) for temperature in np.geomspace(0.01, 10, 200)) + 1e-9


def test_calibration_error_by_hand() -> None:
    # Top scores 0.9 and 0.95 (one right), 0.65 (right), and 0.6, the upper end of its bin (wrong).
    top = np.array([0.9, 0.95, 0.65, 0.6])
    scores = np.stack([top, 1 - top], axis=1)
    labels = np.array([0, 1, 0, 1])
    expected = (abs(1 - 0.9) + abs(0 - 0.95) + abs(1 - 0.65) + abs(0 - 0.6)) / 4
    assert expected_calibration_error(scores, labels) == pytest.approx(expected)
    together = np.array([[0.92, 0.08], [0.98, 0.02]])
    assert expected_calibration_error(together, np.array([0, 1])) == pytest.approx(abs(0.5 - 0.95))
    assert expected_calibration_error(np.eye(3), np.arange(3)) == 0


def test_a_fit_repairs_scores_of_a_wrong_temperature() -> None:
    cosines, labels = drawn(0.3)
    found = fit(cosines, labels, np.arange(len(labels)), temperature_before=0.05)
    assert found.ece_before > 0.15
    assert found.ece_after < 0.04
    assert found.nll_after < found.nll_before
    assert found.nll_before == pytest.approx(log_loss(labels, softmax(cosines / 0.05, axis=1)))
    assert found.accuracy == (cosines.argmax(1) == labels).mean()
    assert found.samples == found.texts == len(labels)


def test_figures_after_come_from_fits_to_other_texts() -> None:
    """Two texts that contradict each other: a fit to both would be flat, a fit to the other one is surely wrong."""
    cosines = np.array([[0.9, 0.1]] * 10 + [[0.9, 0.1]] * 10)
    labels = np.array([0] * 10 + [1] * 10)
    found = fit(cosines, labels, np.repeat([0, 1], 10), temperature_before=1.0)
    flat = found.temperature
    assert flat > 50
    assert found.nll_after > 10  # the text of label 1 is scored with the small temperature that label 0 asks for


def test_unknown_threshold_and_how_well_it_catches_strangers() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 200)
    cosines = generator.uniform(0.0, 0.2, (600, 3))
    cosines[np.arange(600), labels] = generator.uniform(0.7, 0.9, 600)
    found = fit(cosines, labels, np.arange(600), temperature_before=0.1)
    assert (cosines.max(1) < found.unknown_below).mean() == pytest.approx(0.05, abs=0.005)
    assert found.unknown_caught == 1.0  # without its own prototype a sample has no cosine above 0.2
    assert found.unknown_auroc == 1.0

    same = np.tile(generator.uniform(0.5, 0.9, (600, 1)), 3)  # all concepts alike: nothing tells a stranger
    blind = fit(same, labels, np.arange(600), temperature_before=0.1)
    assert blind.unknown_caught == pytest.approx(0.05, abs=0.03)
    assert blind.unknown_auroc == pytest.approx(0.5, abs=0.05)
    alone = fit(cosines[:200], labels[:200], np.arange(200), temperature_before=0.1)
    assert alone.unknown_caught is alone.unknown_auroc is None


def test_a_model_is_calibrated_at_its_real_tokens(make_model, tokenizer, dataset, tmp_path) -> None:
    model = make_model("llama")
    stack = find_layers(model)
    rows = tokenize(tokenizer, dataset.texts, 64)
    generator = torch.Generator().manual_seed(0)
    prototypes = Prototypes(dataset.names, {1: normalize(torch.randn(3, 32, generator=generator), dim=-1)}, "abc")
    options = {"temperature": 0.1, "position": "last", "pad_token_id": 0}
    found = calibrate(model, stack, rows, dataset.concept_ids, prototypes, batch_size=5, **options)

    tokens, ends = [], []  # by a plain pass per text
    for row in rows:
        with torch.no_grad():
            states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0]
        tokens.append((normalize(states, dim=-1) @ prototypes.layers[1].T).numpy())
        ends.append(tokens[-1][-1])
    texts, lengths = np.arange(len(rows)), [len(row.ids) for row in rows]
    for scope, expected in (
        ("text", fit(np.stack(ends), dataset.concept_ids, texts, 0.1)),
        (
            "token",
            fit(np.concatenate(tokens), np.repeat(dataset.concept_ids, lengths), np.repeat(texts, lengths), 0.1),
        ),
    ):
        actual = found.layers[1][scope]
        assert actual.samples == expected.samples
        for name in ("unknown_below", "accuracy", "nll_before", "ece_before"):
            assert getattr(actual, name) == pytest.approx(getattr(expected, name), abs=1e-5)

    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found
    with pytest.raises(
        InputError, match="at least two held-out samples and two concepts to calibrate with, got 1 and 3"
    ):
        calibrate(model, stack, rows[:1], dataset.concept_ids[:1], prototypes, batch_size=5, **options)
