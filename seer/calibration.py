"""Scores that mean what they say: a temperature and an "unknown" threshold, fitted on held-out samples.

The score of concept c is softmax_c(cos(h, mu_c) / T). T is fitted so that a score of 0.8 is right in 80 % of cases
(temperature scaling; Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017). A state
whose cosine to every prototype is small belongs to none of the concepts: the answer is then "unknown".
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score
from torch import nn

from seer.command_line import save_json
from seer.data import Tokens
from seer.errors import InputError
from seer.layers import LayerStack, forward_states, representations, without_dropout
from seer.prototypes import Prototypes
from seer.sampling import pad_rows

CALIBRATION = "calibration.json"
UNKNOWN = "unknown"
"""The answer where no concept is near."""
Scope = Literal["token", "text"]
"""What is scored: a token's state, or a whole text by the state that stands for it, as in the prototypes."""

_BINS = 10
_FOLDS = 5
_KNOWN_SHARE = 0.95
_TEMPERATURES = (1e-3, 1e2)


@dataclass(frozen=True)
class Fit:
    """What was fitted for one layer and scope, and how good it is. A text's tokens never serve both fit and figures."""

    temperature: float
    """Divides the cosines."""
    unknown_below: float
    """The answer is "unknown" where the cosine to the nearest prototype is less: so it is for 5 % of the samples."""
    texts: int
    """Held-out texts."""
    samples: int
    """Texts or tokens."""
    accuracy: float
    """Share of samples whose nearest prototype is their text's concept."""
    nll_before: float
    """Negative log-likelihood in nats at the temperature of training."""
    nll_after: float
    """The same at the fitted temperature, each sample scored by a fit to other texts."""
    ece_before: float
    """Expected calibration error: mean gap between the top score and its accuracy, over 10 bins of the top score."""
    ece_after: float
    """The same at the fitted temperature, each sample scored by a fit to other texts."""
    unknown_caught: float | None
    """Share of samples that get "unknown" if their own concept has no prototype: mean over concepts, with thresholds
    fitted to the others. None where all samples are of one concept."""
    unknown_auroc: float | None
    """How well the cosine to the nearest prototype tells such samples from those of the other concepts, mean over
    concepts: 0.5 is chance, 1 is perfect."""


@dataclass(frozen=True)
class Calibration:
    """Fits per layer, for one set of prototypes."""

    concepts: list[str]
    weights: str | None
    """Fingerprint of the model's weights, as in the prototypes."""
    temperature_before: float
    """The temperature of training."""
    layers: dict[int, dict[Scope, Fit]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON."""
        save_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            layers = {
                int(layer): {scope: Fit(**fit) for scope, fit in scopes.items()}
                for layer, scopes in values.pop("layers").items()
            }
            return cls(**values, layers=layers)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{os.fspath(path)}: expected a calibration written by seer; {error}") from error

    def require_same(self, prototypes: Prototypes, source: str) -> None:
        """Raise InputError unless this was fitted for these prototypes.

        Args:
            prototypes: those that are going to be used.
            source: where the calibration is from, for the message.
        """
        if (self.concepts, self.weights) != (prototypes.concepts, prototypes.weights) or not (
            set(self.layers) <= set(prototypes.layers)
        ):
            raise InputError(
                f"{source}: expected a calibration of the prototypes beside it ({prototypes.concepts} at layers "
                f"{[*prototypes.layers]}), got one of others. Fit it anew: seer prototypes RUN"
            )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    stack: LayerStack,
    rows: Sequence[Tokens],
    concept_ids: np.ndarray,
    prototypes: Prototypes,
    *,
    temperature: float,
    position: str,
    pad_token_id: int,
    batch_size: int,
) -> Calibration:
    """Fit temperature and threshold at every layer of the prototypes, for texts and for tokens.

    A token counts as right if the answer is the concept of the text that it stands in.

    Args:
        model: the model of `stack` in whatever wrapping.
        stack: its layers.
        rows: N held-out texts, of which the prototypes know nothing.
        concept_ids: (N,) index into the prototypes' concepts.
        prototypes: what to calibrate.
        temperature: of training, for the figures "before".
        position: where the state is that stands for a text, see `seer.layers.representations`.
        pad_token_id: fills up shorter rows.
        batch_size: texts per pass.

    Raises:
        InputError: fewer than two texts or two concepts.
    """
    if len(rows) < 2 or len(prototypes.concepts) < 2:
        raise InputError(
            f"expected at least two held-out samples and two concepts to calibrate with, got {len(rows)} and "
            f"{len(prototypes.concepts)}"
        )
    device = next(stack.root.parameters()).device
    tokens: dict[int, list[np.ndarray]] = {layer: [] for layer in prototypes.layers}  # per text [T, C]
    wholes: dict[int, list[np.ndarray]] = {layer: [] for layer in prototypes.layers}  # per batch [R, C]
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        inputs = {name: values.to(device) for name, values in pad_rows(chosen, pad_token_id).items()}
        request_lengths = inputs.pop("request_lengths")
        with without_dropout(model):
            outputs = forward_states(model, inputs, stack).layers
        for layer in prototypes.layers:
            similarity = prototypes.similarity(layer, outputs[layer]).cpu().numpy()
            tokens[layer] += [part[: len(row.ids)] for part, row in zip(similarity, chosen, strict=True)]
            whole = representations([outputs[layer]], inputs["attention_mask"], request_lengths, [position])[0, 0]
            wholes[layer].append(prototypes.similarity(layer, whole).cpu().numpy())

    lengths = np.array([len(row.ids) for row in rows])
    texts = np.arange(len(rows))
    fits: dict[int, dict[Scope, Fit]] = {}
    for layer, parts in tokens.items():
        of_tokens = np.repeat(concept_ids, lengths), np.repeat(texts, lengths)
        fits[layer] = {
            "text": fit(np.concatenate(wholes[layer]), concept_ids, texts, temperature),
            "token": fit(np.concatenate(parts), *of_tokens, temperature),
        }
    return Calibration(list(prototypes.concepts), prototypes.weights, temperature, fits)


def fit(cosines: np.ndarray, labels: np.ndarray, groups: np.ndarray, temperature_before: float) -> Fit:
    """Fit one layer and scope.

    Args:
        cosines: [K, C] of K samples to the C prototypes, C >= 2.
        labels: (K,) right concept of each.
        groups: (K,) number of the text that each is from, 0 to N - 1, N >= 2.
        temperature_before: for the figures "before".
    """
    number = int(groups.max()) + 1
    # The same division for the same samples, whatever else the program drew.
    folds = np.random.default_rng(0).permutation(number)[groups] % min(_FOLDS, number)
    after = np.empty_like(cosines, dtype=np.float64)
    for fold in np.unique(folds):
        inside = folds == fold
        after[inside] = cosines[inside] / fit_temperature(cosines[~inside], labels[~inside])
    before = cosines / temperature_before
    caught, auroc = _unknown_figures(cosines, labels)
    return Fit(
        temperature=fit_temperature(cosines, labels),
        unknown_below=_threshold(cosines),
        texts=number,
        samples=len(cosines),
        accuracy=float((cosines.argmax(1) == labels).mean()),
        nll_before=_nll(before, labels),
        nll_after=_nll(after, labels),
        ece_before=expected_calibration_error(_softmax(before), labels),
        ece_after=expected_calibration_error(_softmax(after), labels),
        unknown_caught=caught,
        unknown_auroc=auroc,
    )


def fit_temperature(cosines: np.ndarray, labels: np.ndarray) -> float:
    """The temperature from 0.001 to 100 with the least negative log-likelihood of the labels; it is convex in 1 / T.

    Args:
        cosines: [K, C].
        labels: (K,).
    """
    low, high = np.log(_TEMPERATURES)
    result = minimize_scalar(lambda log: _nll(cosines / np.exp(log), labels), bounds=(low, high), method="bounded")
    return float(np.exp(result.x))


def expected_calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """sum_b n_b / K |accuracy_b - mean top score_b| over 10 bins of equal width (Guo et al. 2017, equation 3).

    Args:
        scores: [K, C] probabilities.
        labels: (K,).
    """
    top = scores.max(1)
    gap = (scores.argmax(1) == labels) - top
    bins = np.clip(np.ceil(top * _BINS).astype(int) - 1, 0, _BINS - 1)  # bin b is (b / 10, (b + 1) / 10]
    return float(np.abs(np.bincount(bins, weights=gap, minlength=_BINS)).sum() / len(labels))


def _softmax(logits: np.ndarray) -> np.ndarray:
    probabilities: np.ndarray = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    return probabilities


def _nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean())


def _threshold(cosines: np.ndarray) -> float:
    return float(np.quantile(cosines.max(1), 1 - _KNOWN_SHARE))


def _unknown_figures(cosines: np.ndarray, labels: np.ndarray) -> tuple[float | None, float | None]:
    """Every concept in turn is taken for one that nobody knows: how well is it told from the rest?"""
    caught, auroc = [], []
    for concept in np.unique(labels):
        strange = labels == concept
        if strange.all():
            continue
        others = np.delete(cosines, concept, axis=1)
        nearest = others.max(1)
        caught.append(float((nearest[strange] < _threshold(others[~strange])).mean()))
        auroc.append(float(roc_auc_score(~strange, nearest)))
    return (float(np.mean(caught)), float(np.mean(auroc))) if caught else (None, None)
