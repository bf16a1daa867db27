"""`seer evaluate RUN --task generalization`: a generalisation bound by optimal transport, and its terms.

Source: Chuang, Mroueh, Greenewald, Torralba and Jegelka, "Measuring Generalization with Optimal Transport", NeurIPS
2021, arXiv 2106.03314. There are m training samples of K concepts, m_c of concept c; phi is the hidden state of a
sample, of norm at most B; f is a classifier on phi with one score per concept. Then

- the margin of a sample is rho(x, c) = f_c(x) - max_{c' != c} f_c'(x), and f errs where it is not positive;
- Lip_c is the Lipschitz constant of rho(., c) in phi;
- Var_k(c) = E[W1(mu_k, mu'_k)], the k-variance: the Wasserstein-1 distance between two independent samples of size k of
  concept c, with Euclidean ground cost;
- the bound: with probability at least 1 - delta the share of errors on new samples is at most

      share of training margins below gamma                                              (margin loss)
      + sum_c m_c/m Lip_c/gamma Var_k(c)                                                 (transport term)
      + sum_c m_c/m Lip_c/gamma 2 B sqrt(2 log(2K/delta) / m_c)                          (estimation term)
      + sqrt(log(2/delta) / (2m))                                                        (sampling term)

- kV-Margin = -median(rho) / sum_c m_c/m Lip_c Var_k(c), and kV-GN-Margin = -median(rho / |gradient of rho|) /
  sum_c m_c/m Var_k(c), both over the training samples: lower is better. Neither changes when f is scaled, nor when phi
  is and the weights of f are divided by the same factor.

Where the constants are from. The theorem has Var_k with k = m_c, which no k <= m_c undercuts: k-variance does not grow
with k. Half of delta goes to the sampling term (McDiarmid's inequality for a loss in [0, 1]), half is shared by the
estimates of the K k-variances. Take the mean distance of n pairs of k-samples, all disjoint, 2nk <= m_c: replacing one
sample moves it by at most 2B / (nk), so by McDiarmid it is off by at most 2B sqrt(log(2K/delta) / (nk)). Here it is the
mean over all splits, which overlap: one sample of m_c lies in a share 2k/m_c of them, moves the mean by at most 4B/m_c,
and the same inequality gives the term above, that of nk = m_c/2. More random splits do not lower this term: they lower
the Monte Carlo error, which is the standard error reported with the figures that splits enter.

What the bound is good for. The theorem takes phi, gamma and the Lipschitz constants as fixed before the samples are
seen. Here f is fitted on the training samples, SEER trained phi on them, and gamma is their median margin unless given.
So it is a measure by which to compare models, not a guarantee, and a value of 1 or more says nothing about errors. The
held-out figures beside it say what came true, and whether concepts are as compact in samples that training has not
seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.distance import cdist

from seer.command_line import Parser, require_at_least, save_json
from seer.errors import InputError
from seer.metrics import directions, linear_probe

if TYPE_CHECKING:
    from rich.table import Table

    from seer.run import Run

_DESCRIPTION = """\
The terms of the optimal-transport bound of Chuang et al. (2021) on the errors of a linear concept classifier, at every
layer, for a run's base model and its SEER model: k-variance of every concept (batched Sinkhorn, and exact, on the same
splits), Lipschitz constants and margins of the classifier, the bound, and kV-Margin and kV-GN-Margin (lower is better).
All are of training samples, as the theory has it, with held-out figures beside them. RUN is the --output_dir of
`seer train`. Definitions, constants and what the bound cannot say: help(seer.generalization).
"""

_LARGEST_K = 100
_ITERATIONS = 10_000  # a small eps takes many; every problem stops by itself


@dataclass(frozen=True)
class Settings:
    """How the terms are measured.

    Raises:
        InputError: a value out of its range.
    """

    k: int | None = None
    """Size of the two samples of a k-variance; default half of the smallest concept, at most 100."""
    splits: int = 64
    """Random splits per concept."""
    seed: int = 0
    """Of the splits, the same for both models."""
    eps: float = 0.05
    """Weight of the entropy in Sinkhorn, relative to the mean cost of each problem."""
    delta: float = 0.05
    """The bound may fail with this probability."""
    gamma: float | None = None
    """Margin of the bound, in units of the classifier's scores; default the median training margin."""
    exact: bool = True
    """Also solve every transport problem exactly, with POT."""

    def __post_init__(self) -> None:
        require_at_least(self, k=1, splits=2, seed=0)
        for name in ("eps", "gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name}: expected a positive number, got {value}")
        if not 0 < self.delta < 1:
            raise InputError(f"--delta: expected a number between 0 and 1, got {self.delta}")
        if self.exact and find_spec("ot") is None:
            raise InputError("exact: expected POT for the exact k-variance, got no module ot: pip install pot")


@dataclass(frozen=True)
class LinearClassifier:
    """Scores f_c(phi) = w_c . phi + b_c of K concepts."""

    weights: np.ndarray
    """[K, D]."""
    biases: np.ndarray
    """(K,)."""

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray) -> LinearClassifier:
        """Logistic regression (L2, C = 1; scikit-learn), the linear probe of `seer.metrics`.

        Args:
            features: [N, D].
            labels: (N,) integers 0 to K - 1, each of them present.
        """
        model = linear_probe(features, labels)
        weights, biases = model.coef_, model.intercept_
        if len(weights) == 1:  # two concepts: only the difference of their scores is fitted
            weights, biases = np.concatenate([-weights, weights]) / 2, np.concatenate([-biases, biases]) / 2
        return cls(weights, biases)

    def margins(self, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Margins rho(x, c), (N,), and the norms of their gradients in the features, (N,).

        The gradient is w_c - w_c' with c' the concept of the highest score besides c, so the quotient of the two is the
        signed distance to the plane where c and c' have equal scores.

        Args:
            features: [N, D].
            labels: (N,) the concept c of each.
        """
        scores = features @ self.weights.T + self.biases  # [N, K]
        rows = np.arange(len(labels))
        own = scores[rows, labels]
        scores[rows, labels] = -np.inf
        rival = scores.argmax(1)
        return own - scores[rows, rival], np.linalg.norm(self.weights[labels] - self.weights[rival], axis=1)

    def lipschitz(self) -> np.ndarray:
        """(K,) Lipschitz constants of rho(., c), max_c' |w_c - w_c'|.

        Exact over all of feature space: rho(., c) is piecewise linear with gradients w_c - w_c', and the farthest c' is
        the rival of c far out in the direction w_c' - w_c. On unit-normalised features alone it is an upper bound.
        """
        largest: np.ndarray = cdist(self.weights, self.weights).max(1)
        return largest


@dataclass(frozen=True)
class Estimate:
    """A figure and the standard error that the finite number of splits gives it, for the samples at hand.

    That of a difference between models, which share their splits, is at most the sum of theirs. What other samples
    would give is not in it.
    """

    value: float
    standard_error: float


@dataclass(frozen=True)
class ExactKVariance:
    """k-variances by exact transport, on the splits of the entropic ones."""

    k_variance: dict[str, Estimate]
    mean_k_variance: Estimate
    entropic_bias: float
    """Entropic over exact mean k-variance, less 1."""


@dataclass(frozen=True)
class GeneralizationTerms:
    """What `help(seer.generalization)` defines, for m samples. Means over concepts have the weights m_c / m.

    A figure that does not exist is NaN: the bound and its terms for a gamma that is not positive, and kV-Margins where
    every k-variance is 0.
    """

    k: int
    k_variance: dict[str, Estimate]
    """Concept -> k-variance by Sinkhorn: <P, C> of the entropic plan, not below the exact value."""
    mean_k_variance: Estimate
    exact: ExactKVariance | None
    """None if not asked for."""
    lipschitz: dict[str, float]
    """Concept -> Lip_c."""
    radius: float
    """B: 1 for unit-normalised features, else the largest norm of the samples."""
    error: float
    """Share of margins that are not positive."""
    median_margin: float
    kv_margin: Estimate
    kv_gn_margin: Estimate
    gamma: float
    margin_loss: float
    """Share of margins below gamma; a margin of gamma itself costs nothing."""
    transport_term: Estimate
    estimation_term: float
    sampling_term: float
    bound: Estimate
    """Sum of the last four."""


@dataclass(frozen=True)
class HeldOut:
    """The classifier and the concepts on samples that neither the classifier nor SEER was trained on."""

    error: float
    """Share of margins that are not positive: what the bound is a bound of."""
    median_margin: float
    k: int | None
    """Half of the smallest held-out concept, at most the k of the training samples; None if that is nothing."""
    mean_k_variance: Estimate | None
    """By Sinkhorn, with the weights m_c / m of the training samples."""
    training_mean_k_variance: Estimate | None
    """Of the training samples at the same k."""


@dataclass(frozen=True)
class ModelGeneralization:
    """One model at one layer."""

    training: GeneralizationTerms
    held_out: HeldOut


@dataclass(frozen=True)
class Comparison:
    """Base model and SEER model at one layer."""

    base: ModelGeneralization
    seer: ModelGeneralization


@dataclass(frozen=True)
class Generalization:
    """Figures of a run."""

    training_samples: dict[str, int]
    """Concept -> m_c; a sample of several concepts counts for the first that is named."""
    held_out_samples: dict[str, int]
    features: str
    """"unit-normalised" or "raw" hidden states."""
    settings: Settings
    layers: dict[int, Comparison]


def generalization_terms(
    features: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    classifier: LinearClassifier | None = None,
    radius: float | None = None,
    settings: Settings | None = None,
) -> GeneralizationTerms:
    """All terms, for the samples that a classifier was fitted on.

    Args:
        features: [N, D] hidden states as they enter: normalise them first where that is wanted.
        labels: (N,) concept of each, index into `names`.
        names: K concepts.
        classifier: f; default `LinearClassifier.fit` on the same samples.
        radius: B; default the largest norm of the samples.
        settings: see there.

    Raises:
        InputError: fewer than two concepts; fewer than 2k samples of one; a radius that samples exceed.
    """
    settings = Settings() if settings is None else settings
    if len(names) < 2:
        raise InputError(f"names: expected two concepts or more, which is what a margin takes, got {len(names)}")
    k = resolve_k(labels, names, settings.k)
    norm = float(np.linalg.norm(features, axis=1).max())
    if radius is not None and norm > radius * (1 + 1e-6):
        raise InputError(f"radius: expected features of norm {radius} at most, got one of {norm}")
    radius = norm if radius is None else radius
    classifier = LinearClassifier.fit(features, labels) if classifier is None else classifier
    margins, gradient_norms = classifier.margins(features, labels)
    lipschitz = classifier.lipschitz()
    counts = np.bincount(labels, minlength=len(names))
    shares = counts / len(labels)
    values, errors = _k_variances(features, labels, k, settings)
    median = float(np.median(margins))
    gamma = median if settings.gamma is None else settings.gamma

    mean = _weighted_sum(values, errors, shares)
    spread = _weighted_sum(values, errors, shares * lipschitz)
    with np.errstate(divide="ignore", invalid="ignore"):
        median_distance = float(np.median(margins / gradient_norms))
    slope = 1 / gamma if gamma > 0 else math.nan
    margin_loss = float((margins < gamma).mean()) if gamma > 0 else math.nan
    transport = Estimate(slope * spread.value, slope * spread.standard_error)
    deviations = 2 * radius * np.sqrt(2 * math.log(2 * len(names) / settings.delta) / counts)  # (K,)
    estimation = slope * float(shares * lipschitz @ deviations)
    sampling = math.sqrt(math.log(2 / settings.delta) / (2 * len(labels)))
    exact = None
    if settings.exact:
        exact_values, exact_errors = _k_variances(features, labels, k, settings, method="exact")
        exact_mean = _weighted_sum(exact_values, exact_errors, shares)
        exact = ExactKVariance(
            k_variance=_by_name(names, exact_values, exact_errors),
            mean_k_variance=exact_mean,
            entropic_bias=mean.value / exact_mean.value - 1 if exact_mean.value else math.nan,
        )
    return GeneralizationTerms(
        k=k,
        k_variance=_by_name(names, values, errors),
        mean_k_variance=mean,
        exact=exact,
        lipschitz=dict(zip(names, lipschitz.tolist(), strict=True)),
        radius=radius,
        error=float((margins <= 0).mean()),
        median_margin=median,
        kv_margin=_normalised(median, spread),
        kv_gn_margin=_normalised(median_distance, mean),
        gamma=gamma,
        margin_loss=margin_loss,
        transport_term=transport,
        estimation_term=estimation,
        sampling_term=sampling,
        bound=Estimate(margin_loss + transport.value + estimation + sampling, transport.standard_error),
    )


def resolve_k(labels: np.ndarray, names: Sequence[str], k: int | None) -> int:
    """The k of the k-variances: `k`, or by default half of the smallest concept, at most 100.

    Args:
        labels: (N,) concept of each sample, index into `names`.
        names: of the concepts.
        k: what was asked for.

    Raises:
        InputError: a concept with fewer than 2k samples, or than two.
    """
    counts = np.bincount(labels, minlength=len(names))
    smallest = int(counts.argmin())
    most = int(counts[smallest]) // 2
    if most == 0:
        raise InputError(
            f"concept {names[smallest]!r}: expected two training samples or more whose first concept it is, which is "
            f"what a k-variance takes, got {counts[smallest]}: add samples of it, or leave its samples out of the data"
        )
    if k is not None and k > most:
        raise InputError(
            f"--k: expected 2k training samples of every concept, got k = {k} and {counts[smallest]} of concept "
            f"{names[smallest]!r}, fewer than {2 * k}: give --k {most} or less, or add samples of it"
        )
    return min(_LARGEST_K, most) if k is None else k


def evaluate_generalization(
    run: Run,
    *,
    layers: Sequence[int] | None = None,
    data: str | None = None,
    raw: bool = False,
    settings: Settings | None = None,
) -> Generalization:
    """Measure base model and SEER model, each with a classifier of its own, on the run's samples.

    Args:
        run: whose.
        layers: which; default all.
        data: where the run's data is now, if not where the run read it.
        raw: take hidden states as they are; default directions z = h / |h|, whose radius is 1.
        settings: see there.

    Raises:
        InputError: as `generalization_terms`; nothing held out, or none of some concept; layers or data that are not
            there.
    """
    settings = Settings() if settings is None else settings
    training, held_out = run.samples_with_held_out(data)
    names = training.names
    if len(names) < 2:
        raise InputError(f"{run.folder}: expected a run of two concepts or more, got only {names}")
    resolve_k(training.concept_ids, names, settings.k)  # before the long part
    chosen = run.stack.resolve(range(len(run.stack.layers)) if layers is None else layers)
    training_states, held_out_states = run.encode(training.texts, chosen), run.encode(held_out.texts, chosen)
    compared = {}
    for layer in chosen:
        base, seer = (
            _of_model(
                _features(of_training[layer].numpy(), raw),
                training.concept_ids,
                _features(of_held_out[layer].numpy(), raw),
                held_out.concept_ids,
                names,
                None if raw else 1.0,
                settings,
            )
            for of_training, of_held_out in (
                (training_states.before, held_out_states.before),
                (training_states.after, held_out_states.after),
            )
        )
        compared[layer] = Comparison(base, seer)
    return Generalization(
        training_samples=_counts(training.concept_ids, names),
        held_out_samples=_counts(held_out.concept_ids, names),
        features="raw" if raw else "unit-normalised",
        settings=settings,
        layers=compared,
    )


def _of_model(
    features: np.ndarray,
    labels: np.ndarray,
    held_out_features: np.ndarray,
    held_out_labels: np.ndarray,
    names: Sequence[str],
    radius: float | None,
    settings: Settings,
) -> ModelGeneralization:
    classifier = LinearClassifier.fit(features, labels)
    terms = generalization_terms(features, labels, names, classifier=classifier, radius=radius, settings=settings)
    margins, _ = classifier.margins(held_out_features, held_out_labels)
    shares = np.bincount(labels, minlength=len(names)) / len(labels)
    k = min(terms.k, int(np.bincount(held_out_labels, minlength=len(names)).min()) // 2) or None
    held_out, training = (
        None if k is None else _weighted_sum(*_k_variances(*samples, k, settings), shares)
        for samples in ((held_out_features, held_out_labels), (features, labels))
    )
    return ModelGeneralization(
        training=terms,
        held_out=HeldOut(
            error=float((margins <= 0).mean()),
            median_margin=float(np.median(margins)),
            k=k,
            mean_k_variance=held_out,
            training_mean_k_variance=training,
        ),
    )


def _features(states: np.ndarray, raw: bool) -> np.ndarray:
    return states.astype(np.float64) if raw else directions(states)


def _k_variances(
    features: np.ndarray, labels: np.ndarray, k: int, settings: Settings, method: str = "sinkhorn"
) -> tuple[np.ndarray, np.ndarray]:
    """(K,) k-variances and their standard errors; every call draws the same splits."""
    import torch

    from seer_kernels import k_variance

    found = k_variance(
        torch.from_numpy(features),
        torch.from_numpy(labels),
        k=k,
        splits=settings.splits,
        generator=torch.Generator().manual_seed(settings.seed),
        method=method,
        eps=settings.eps,
        max_iterations=_ITERATIONS,
    )
    return found.values.numpy(), found.standard_errors.numpy()


def _weighted_sum(values: np.ndarray, errors: np.ndarray, weights: np.ndarray) -> Estimate:
    """Of concepts, whose splits are drawn independently."""
    return Estimate(float(weights @ values), float(np.linalg.norm(weights * errors)))


def _normalised(median: float, spread: Estimate) -> Estimate:
    """-median / spread, its error to first order."""
    if spread.value == 0:
        return Estimate(math.nan, math.nan)
    value = -median / spread.value
    return Estimate(value, abs(value) * spread.standard_error / spread.value)


def _by_name(names: Sequence[str], values: np.ndarray, errors: np.ndarray) -> dict[str, Estimate]:
    return {
        name: Estimate(float(value), float(error)) for name, value, error in zip(names, values, errors, strict=True)
    }


def _counts(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    return dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))


def run_generalization(argv: Sequence[str]) -> None:
    """Run `seer evaluate --task generalization` with the other arguments.

    Raises:
        InputError: bad arguments or data.
        SystemExit: after `--help`.
    """
    parser = Parser("seer evaluate --task generalization", _DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument("--layers", nargs="+", type=int, metavar="L", help="layers (default: all)")
    parser.add_argument("--data", metavar="FILE", help="where the run's data is now (default: where it was)")
    parser.add_argument("--raw", action="store_true", help="hidden states as they are (default: unit-normalised)")
    parser.add_argument(
        "--k", type=int, metavar="K", help="samples on each side (default: half of the smallest concept, at most 100)"
    )
    parser.add_argument("--splits", type=int, default=64, metavar="N", help="random splits per concept (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the splits (default: 0)")
    parser.add_argument(
        "--eps", type=float, default=0.05, metavar="E", help="entropy of Sinkhorn over the mean cost (default: 0.05)"
    )
    parser.add_argument(
        "--delta", type=float, default=0.05, metavar="P", help="probability that the bound fails (default: 0.05)"
    )
    parser.add_argument(
        "--gamma", type=float, metavar="G", help="margin of the bound (default: the median training margin)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures (default: RUN/generalization.json)")
    arguments = parser.parse_args(argv)
    settings = Settings(
        k=arguments.k,
        splits=arguments.splits,
        seed=arguments.seed,
        eps=arguments.eps,
        delta=arguments.delta,
        gamma=arguments.gamma,
        exact=find_spec("ot") is not None,
    )

    from rich.console import Console

    from seer.run import Run

    run = Run.load(arguments.run)
    result = evaluate_generalization(
        run, layers=arguments.layers, data=arguments.data, raw=arguments.raw, settings=settings
    )
    file = run.folder / "generalization.json" if arguments.json is None else arguments.json
    save_json(asdict(result), file)
    console = Console(highlight=False)
    console.print(_table(result))
    console.print(f"Wrote {file}", soft_wrap=True)


def _table(result: Generalization) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    samples, held_out = (sum(counts.values()) for counts in (result.training_samples, result.held_out_samples))
    table = Table(
        title=f"{samples} training samples, {held_out} held out; {result.features} hidden states; ± standard errors of "
        f"{result.settings.splits} splits",
        box=SIMPLE_HEAD,
    )
    for column in ("layer", "measure", "base", "SEER", "difference"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for layer, compared in result.layers.items():
        base, seer = _figures(compared.base), _figures(compared.seer)
        for name, figure in base.items():
            table.add_row(str(layer), name, *_cells(figure, seer[name]), end_section=name == [*base][-1])
    table.caption = (
        f"bound at confidence {1 - result.settings.delta:g}, with "
        + ("gamma the median training margin" if result.settings.gamma is None else f"gamma {result.settings.gamma:g}")
        + "; 1 or more says nothing about errors; kV-Margins: lower is better"
    )
    if not result.settings.exact:
        table.caption += "; no exact k-variance and entropic bias without POT: pip install pot"
    return table


def _figures(model: ModelGeneralization) -> dict[str, Estimate | float | None]:
    """What the table says of a model, in its order."""
    terms, held_out = model.training, model.held_out
    figures: dict[str, Estimate | float | None] = {}
    for name, estimate in terms.k_variance.items():
        figures[f"k-variance of {name}, k = {terms.k}"] = estimate
    figures[f"mean k-variance, k = {terms.k}"] = terms.mean_k_variance
    if terms.exact is not None:
        figures["  exact, mean"] = terms.exact.mean_k_variance
        figures["  entropic bias of the mean, relative"] = terms.exact.entropic_bias
    if held_out.k is not None:
        figures[f"mean k-variance, k = {held_out.k}"] = held_out.training_mean_k_variance
        figures[f"  held out, k = {held_out.k}"] = held_out.mean_k_variance
    return figures | {
        "largest Lipschitz constant": max(terms.lipschitz.values()),
        "median margin": terms.median_margin,
        "  held out, median margin": held_out.median_margin,
        "kV-Margin": terms.kv_margin,
        "kV-GN-Margin": terms.kv_gn_margin,
        "margin loss": terms.margin_loss,
        "+ transport term": terms.transport_term,
        "+ estimation term": terms.estimation_term,
        "+ sampling term": terms.sampling_term,
        "= bound of the share of errors": terms.bound,
        "share of errors": terms.error,
        "  held out, share of errors": held_out.error,
    }


def _cells(base: Estimate | float | None, seer: Estimate | float | None) -> list[str]:
    values = [each.value if isinstance(each, Estimate) else each for each in (base, seer)]
    before, after = (math.nan if each is None else each for each in values)
    return [_cell(base), _cell(seer), _cell(after - before)]


def _cell(figure: Estimate | float | None) -> str:
    """Four digits, whatever the size: kV-Margins are small, and a bound may be in the thousands."""
    value = figure.value if isinstance(figure, Estimate) else figure
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g} ± {figure.standard_error:.1g}" if isinstance(figure, Estimate) else f"{value:.4g}"
