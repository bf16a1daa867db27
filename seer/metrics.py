"""How hidden states are arranged, and what they tell about concepts: one definition per function, one interval for all.

Every function takes directions `z` [N, D], float64 rows of length 1 (hidden states, normalised), and `weights` (N,):
how often each sample counts. Ones give the value itself; the bootstrap draws weights. A value that does not exist, such
as the cosine of pairs where there are none, is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import KNeighborsClassifier

Metric = Callable[[np.ndarray], float]
"""Weights (N,) -> value."""

NEIGHBOURS = 10
_EPSILON = 0.5
_LEVEL = 0.95


def same_concept_cosine(cosines: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean cosine over all pairs of different samples of one concept.

    Args:
        cosines: [N, N], z z^T.
        labels: (N,) concept of each.
        weights: (N,).
    """
    return _pair_mean(cosines, labels[:, None] == labels, weights)


def different_concept_cosine(cosines: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean cosine over all pairs of samples of different concepts; arguments as for `same_concept_cosine`."""
    return _pair_mean(cosines, labels[:, None] != labels, weights)


def coding_rate(z: np.ndarray, weights: np.ndarray) -> float:
    """R(Z) = 1/2 log det(I + D / (n eps^2) Z Z^T) in nats, eps = 0.5: how much room the samples take.

    Yu, Chan, You, Song and Ma, "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding
    Rate Reduction", NeurIPS 2020, equation 1, with the n samples as columns of Z.

    Args:
        z: [N, D].
        weights: (N,); n is their sum.
    """
    n, size = weights.sum(), z.shape[1]
    if n == 0:
        return float("nan")
    rows = z * np.sqrt(weights)[:, None]
    gram = rows @ rows.T if len(rows) < size else rows.T @ rows  # the same determinant
    return 0.5 * float(np.linalg.slogdet(np.eye(len(gram)) + size / (n * _EPSILON**2) * gram)[1])


def rate_reduction(z: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """R(Z) - sum_c n_c / n R(Z_c) in nats: the room of all samples less that of every concept by itself.

    Yu et al. 2020, equation 4. Higher means concepts that are compact and point apart.

    Args:
        z: [N, D].
        labels: (N,).
        weights: (N,).
    """
    shares = _by_concept(labels, weights) / weights.sum()
    parts = [
        share * coding_rate(z[labels == concept], weights[labels == concept])
        for concept, share in zip(np.unique(labels), shares, strict=True)
        if share > 0
    ]
    return coding_rate(z, weights) - float(sum(parts))


def effective_rank(z: np.ndarray, weights: np.ndarray) -> float:
    """exp(-sum_i p_i log p_i) of the singular values over their sum: how many directions the samples use.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1.

    Args:
        z: [N, D]; not centred.
        weights: (N,).
    """
    values = np.linalg.svd(z * np.sqrt(weights)[:, None], compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def between_centroids(z: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean Euclidean distance between the centroids (means) of two different concepts.

    Args:
        z: [N, D].
        labels: (N,).
        weights: (N,).
    """
    centroids = _centroids(z, labels, weights)
    return float(np.mean(cdist(centroids, centroids)[np.triu_indices(len(centroids), 1)]))


def within_concept(z: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean over samples of the Euclidean distance to the centroid of their concept; arguments as above."""
    concepts = np.searchsorted(np.unique(labels), labels)
    distances = np.linalg.norm(z - _centroids(z, labels, weights)[concepts], axis=1)
    return float(np.average(distances, weights=weights))


def hausdorff(distances: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean Hausdorff distance max(max_a min_b |a - b|, max_b min_a |a - b|) between two different concepts.

    The distance hangs on single samples, so its interval is a rough one.

    Args:
        distances: [N, N], Euclidean.
        labels: (N,).
        weights: (N,); only which are 0 counts.
    """
    members = [np.flatnonzero((labels == concept) & (weights > 0)) for concept in np.unique(labels)]
    members = [each for each in members if len(each)]
    found = []
    for index, first in enumerate(members):
        for second in members[index + 1 :]:
            between = distances[np.ix_(first, second)]
            found.append(max(between.min(1).max(), between.min(0).max()))
    return float(np.mean(found)) if found else float("nan")


def silhouette(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) (b - a) / max(a, b) of each sample, Euclidean; scikit-learn's `silhouette_samples`.

    a is the mean distance to the other samples of its concept, b to those of the nearest other concept. NaN where there
    are not at least two concepts, or no concept with two samples.

    Args:
        z: [N, D].
        labels: (N,).
    """
    if not 1 < len(np.unique(labels)) < len(labels):
        return np.full(len(labels), np.nan)
    values: np.ndarray = silhouette_samples(z, labels)
    return values


def prototype_cosines(z: np.ndarray, train_z: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """[N, C] cosine to the prototype (normalised mean of the training directions) of every concept, in sorted order.

    Args:
        z: [N, D] directions.
        train_z: [M, D] training directions.
        train_labels: (M,).
    """
    centroids = _centroids(train_z, train_labels, np.ones(len(train_labels)))
    cosines: np.ndarray = z @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T
    return cosines


def linear_probe(z: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """Logistic regression (L2, C = 1) fitted on samples; scikit-learn.

    Args:
        z: [N, D].
        labels: (N,).
    """
    return LogisticRegression(C=1.0, max_iter=2000).fit(z, labels)


def linear_probe_scores(z: np.ndarray, train_z: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """[N, C] decision values of `linear_probe` on the training directions.

    Arguments as for `prototype_cosines`.
    """
    values: np.ndarray = linear_probe(train_z, train_labels).decision_function(z)
    return values if values.ndim == 2 else np.stack([-values, values], axis=1)  # of two classes it gives one's only


def nearest_prototype_correct(
    z: np.ndarray, labels: np.ndarray, train_z: np.ndarray, train_labels: np.ndarray
) -> np.ndarray:
    """(N,) 1 where the prototype of highest cosine is right, see `prototype_cosines`.

    Args:
        z: [N, D] held-out directions.
        labels: (N,).
        train_z: [M, D] training directions.
        train_labels: (M,).
    """
    return _best_is_right(prototype_cosines(z, train_z, train_labels), labels, train_labels)


def knn_correct(z: np.ndarray, labels: np.ndarray, train_z: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """(N,) 1 where the majority of the 10 nearest training samples (of all, if fewer) is right; scikit-learn.

    Arguments as for `nearest_prototype_correct`. On directions, Euclidean and cosine neighbours are the same.
    """
    model = KNeighborsClassifier(min(NEIGHBOURS, len(train_labels))).fit(train_z, train_labels)
    correct: np.ndarray = model.predict(z) == labels
    return correct.astype(np.float64)


def linear_probe_correct(
    z: np.ndarray, labels: np.ndarray, train_z: np.ndarray, train_labels: np.ndarray
) -> np.ndarray:
    """(N,) 1 where the class of highest value is right, see `linear_probe_scores`.

    Arguments as for `nearest_prototype_correct`.
    """
    return _best_is_right(linear_probe_scores(z, train_z, train_labels), labels, train_labels)


def layer_metrics(
    states: np.ndarray, labels: np.ndarray, train_states: np.ndarray, train_labels: np.ndarray
) -> dict[str, Metric]:
    """All metrics of held-out hidden states at one layer, as functions of the samples' weights.

    Args:
        states: [N, D] of held-out samples.
        labels: (N,).
        train_states: [M, D] of training samples.
        train_labels: (M,).
    """
    z, train_z = directions(states), directions(train_states)
    cosines, distances = z @ z.T, cdist(z, z)
    training = (train_z, train_labels)
    per_sample = {
        "silhouette": silhouette(z, labels),
        "nearest_prototype_accuracy": nearest_prototype_correct(z, labels, *training),
        "knn_accuracy": knn_correct(z, labels, *training),
        "linear_probe_accuracy": linear_probe_correct(z, labels, *training),
    }
    return {
        "same_concept_cosine": lambda w: same_concept_cosine(cosines, labels, w),
        "different_concept_cosine": lambda w: different_concept_cosine(cosines, labels, w),
        "coding_rate": lambda w: coding_rate(z, w),
        "rate_reduction": lambda w: rate_reduction(z, labels, w),
        "effective_rank": lambda w: effective_rank(z, w),
        "between_centroids": lambda w: between_centroids(z, labels, w),
        "within_concept": lambda w: within_concept(z, labels, w),
        "hausdorff": lambda w: hausdorff(distances, labels, w),
        **{name: weighted_mean(values) for name, values in per_sample.items()},
    }


def directions(states: np.ndarray) -> np.ndarray:
    """[N, D] states as float64 rows of length 1."""
    rows = states.astype(np.float64)
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One measure of the base model and of the adapted one."""

    base: Interval
    seer: Interval
    difference: Interval
    """SEER - base, with both measured on the same draws of samples."""


def bootstrap_weights(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[R, N] counts of the samples in R draws with replacement, within every group as many as it has.

    Args:
        groups: (N,) concept of each sample.
        resamples: R.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(groups)))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        weights[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return weights


def compare(base: Metric, seer: Metric, weights: np.ndarray) -> Change:
    """Both values and their difference, with intervals.

    The interval is that of the draws, 2.5 % to 97.5 %. Sampling with replacement repeats samples, which lowers ranks
    and spreads whatever the truth is: where the mean of the draws is off by more than chance, they are moved to the
    value.

    Args:
        base: of the base model.
        seer: of the adapted model, on the same samples.
        weights: [R, N] from `bootstrap_weights`.
    """
    ones = np.ones(weights.shape[1])
    values = base(ones), seer(ones)
    draws = np.array([(base(row), seer(row)) for row in weights])  # [R, 2]
    return Change(
        base=_interval(values[0], draws[:, 0]),
        seer=_interval(values[1], draws[:, 1]),
        difference=_interval(values[1] - values[0], draws[:, 1] - draws[:, 0]),
    )


def _interval(value: float, draws: np.ndarray) -> Interval:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(draws):
        return Interval(value, float("nan"), float("nan"))
    bias = float(draws.mean() - value)
    if abs(bias) < 3 * draws.std() / np.sqrt(len(draws)):
        bias = 0.0
    low, high = np.quantile(draws - bias, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _best_is_right(scores: np.ndarray, labels: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """(N,) 1 where the highest of [N, C] scores, one per concept of the training samples in sorted order, is right."""
    correct: np.ndarray = np.unique(train_labels)[scores.argmax(1)] == labels
    return correct.astype(np.float64)


def weighted_mean(values: np.ndarray) -> Metric:
    """The mean of (N,) values as a metric."""
    return lambda weights: float(np.average(values, weights=weights))


def _pair_mean(cosines: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> float:
    """Mean over ordered pairs of different samples; copies of one sample, which a draw makes, are no pair."""
    pairs = wanted & ~np.eye(len(weights), dtype=bool)
    count = weights @ pairs @ weights
    return float(weights @ (cosines * pairs) @ weights / count) if count else float("nan")


def _by_concept(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C,) sum of the weights of every concept that occurs in `labels`, in sorted order."""
    concepts, numbers = np.unique(labels, return_inverse=True)
    return np.bincount(numbers, weights=weights, minlength=len(concepts))


def _centroids(z: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[C, D] weighted means, in the sorted order of the concepts."""
    members = (labels == np.unique(labels)[:, None]) * weights  # [C, N]
    means: np.ndarray = members @ z / members.sum(1, keepdims=True)
    return means
