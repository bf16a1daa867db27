"""Pictures of representations before and after training, and of how training went."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from seer.colors import CONCEPT_COLORS
from seer.errors import InputError
from seer.files import atomic_path

if TYPE_CHECKING:
    from seer.compare import Group, Spread

Method = Literal["tsne", "pca"]

# Shapes tell the concepts apart in grey too; 8 colours and 7 shapes repeat together only after 56 concepts.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NEIGHBOURS = 10


def plot_representations(
    before: np.ndarray,
    after: np.ndarray,
    concepts: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    method: Method = "tsne",
    names: Sequence[str] | None = None,
    stacked: bool = False,
) -> Path:
    """Draw the same N samples under the base model (left) and the adapted one (right), coloured by concept.

    Each side is projected to the plane by itself, after every row was scaled to length 1. Under each heading stands a
    figure that no projection can flatter: the mean share of a sample's 10 nearest neighbours by cosine, in all D
    dimensions, that are of its concept (of all other samples, if there are fewer than 10).

    Args:
        before: [N, D] representations under the base model, N >= 4.
        after: [N, D'] representations of the same samples, in the same order, under the adapted model.
        concepts: their N concept names.
        path: file to write; its ending (.png, .pdf, .svg) decides the format. An existing file is replaced.
        title: line above both sides.
        method: "tsne" (neighbourhoods; van der Maaten and Hinton, 2008) or "pca" (the two directions of largest
            variance). Both give the same picture for the same input.
        names: all concepts, whose order decides the colours; default: those that occur, sorted.
        stacked: the base model above the adapted one, as in the figure of arXiv 2502.05242.

    Returns:
        The path.

    Raises:
        InputError: shapes that do not fit, values that are not finite, an unknown concept, method or ending.
    """
    target = Path(path)
    sides = [_directions("before", before, len(concepts)), _directions("after", after, len(concepts))]
    names = sorted(set(concepts)) if names is None else list(names)
    unknown = set(concepts) - set(names)
    if unknown:
        raise InputError(f"concepts: expected some of {names}, got {sorted(unknown)}")
    labels = np.array([names.index(concept) for concept in concepts])
    if method not in get_args(Method):
        raise InputError(f"method: expected one of {get_args(Method)}, got {method!r}")
    if len(names) > len(CONCEPT_COLORS) * len(_MARKERS):
        raise InputError(
            f"concepts: expected at most {len(CONCEPT_COLORS) * len(_MARKERS)} different names, got {len(names)}"
        )

    across = max(1, (46 if stacked else 96) // (max(map(len, names)) + 4))  # names in a line of the legend
    legend_lines = math.ceil(len(names) / min(across, 6))
    size = (5.0, 9.2 + 0.24 * legend_lines) if stacked else (10.0, 5.6)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    _require_format(figure, target)
    panels: list[Axes] = list(figure.subplots(2, 1) if stacked else figure.subplots(1, 2))
    for panel, heading, directions in zip(
        panels, ("Origin: the base model", "SEER: after training"), sides, strict=True
    ):
        _draw(panel, _project(directions, method), labels, names)
        panel.set_title(heading, fontsize=15, fontweight="bold", pad=26)
        share, count = neighbour_share(directions, labels)
        panel.text(
            *(0.5, 1.02),
            f"{share:.0%} of the {count} nearest neighbours share the concept",
            transform=panel.transAxes,
            ha="center",
            va="bottom",
            fontsize=11,
        )
    if title is not None:
        figure.suptitle(title, fontsize=12, color="#444444")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(names), across, 6),
        fontsize=12,
        frameon=False,
        markerscale=1.5,
        handletextpad=0.2,
        columnspacing=1.4,
    )
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip("."), dpi=160)
    return target


def neighbour_share(states: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Mean share of a sample's 10 nearest neighbours (of all others, if fewer) by cosine that are of its concept.

    Args:
        states: [N, D].
        labels: (N,) concept of each.

    Returns:
        The share, and how many neighbours were counted.
    """
    count = min(_NEIGHBOURS, len(labels) - 1)
    neighbours = NearestNeighbors(n_neighbors=count).fit(normalize(states)).kneighbors(return_distance=False)
    return float((labels[neighbours] == labels[:, None]).mean()), count


def learning_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Every quantity that a run logged in more than one step.

    Args:
        log_history: what `TrainerState.log_history` holds: entries with a `step` and numbers.

    Returns:
        Quantity -> concept ("" for what is not of a concept) -> step -> value.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for entry in log_history:
        if "train_runtime" in entry:  # the summary at the end
            continue
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                quantity, _, concept = name.partition("/")
                title = f"{quantity} by concept" if concept else quantity
                curves.setdefault(title, {}).setdefault(concept, {})[entry["step"]] = value
    return {title: each for title, each in curves.items() if any(len(points) > 1 for points in each.values())}


def plot_learning_curves(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path | None:
    """Draw every quantity that a run logged over its steps, one panel each; those of single concepts share one.

    Args:
        log_history: what `TrainerState.log_history` holds: entries with a `step` and numbers.
        path: file to write; its ending decides the format. An existing file is replaced.

    Returns:
        The path, or None where nothing was logged in more than one step.
    """
    panels = learning_curves(log_history)
    if not panels:
        return None

    target = Path(path)
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.2 * across, 2.8 * down), layout="constrained", facecolor="white")
    places: list[Axes] = list(figure.subplots(down, across, squeeze=False).flat)
    for place, (title, lines) in zip(places, panels.items(), strict=False):
        for index, (curve, points) in enumerate(lines.items()):
            place.plot(
                list(points),
                list(points.values()),
                label=curve or None,
                color=CONCEPT_COLORS[index % len(CONCEPT_COLORS)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=3,
            )
        place.set_title(title.replace("_", " "), fontsize=10)
        place.set_xlabel("step", fontsize=8)
        place.tick_params(labelsize=8)
        if "" not in lines and len(lines) <= len(CONCEPT_COLORS):
            place.legend(fontsize=7, frameon=False)
    for place in places[len(panels) :]:
        place.set_axis_off()
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip("."), dpi=110)
    return target


def plot_by_layer(
    layers: Mapping[int, Mapping[str, Mapping[str, float | None]]], path: str | os.PathLike[str], *, title: str
) -> Path:
    """Draw one measure of base model and SEER model over the layers, with 95 % intervals.

    Args:
        layers: layer -> "base" and "seer" -> `value`, `low` and `high`; None where there is none.
        path: file to write; its ending decides the format. An existing file is replaced.
        title: name of the measure.

    Returns:
        The path.
    """
    target = Path(path)
    figure = Figure(figsize=(4.2, 2.8), layout="constrained", facecolor="white")
    place = figure.subplots()
    for index, (side, label) in enumerate((("base", "base model"), ("seer", "SEER"))):
        value, low, high = (
            np.array([each[side][part] for each in layers.values()], dtype=float)  # None becomes NaN
            for part in ("value", "low", "high")
        )
        color = CONCEPT_COLORS[index]
        place.plot(list(layers), value, label=label, color=color, marker=_MARKERS[index], markersize=4)
        place.fill_between(list(layers), low, high, color=color, alpha=0.2, linewidth=0)
    place.set_title(title, fontsize=10)
    place.set_xlabel("layer", fontsize=8)
    place.xaxis.set_major_locator(MaxNLocator(integer=True))
    place.tick_params(labelsize=8)
    place.legend(fontsize=7, frameon=False)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip("."), dpi=110)
    return target


def plot_comparison(groups: Sequence[Group], path: str | os.PathLike[str]) -> Path:
    """Draw what `seer compare` found: a row per group and target layer, hollow marks before and full ones after.

    Args:
        groups: of runs; standard deviations are drawn as bars.
        path: file to write; its ending decides the format. An existing file is replaced.

    Returns:
        The path.

    Raises:
        InputError: an unknown ending.
    """
    target = Path(path)
    rows = [(group, layer) for group in groups for layer in group.layers]
    figure = Figure(figsize=(12, 1.6 + 0.45 * len(rows)), layout="constrained", facecolor="white")
    _require_format(figure, target)
    panels: list[Axes] = list(figure.subplots(1, 3, sharey=True))
    titles = {
        "nearest prototype accuracy": ["nearest_prototype_accuracy"],
        "mean cosine": ["same_concept_cosine", "different_concept_cosine"],
    }
    for panel, (title, measures) in zip(panels, titles.items(), strict=False):
        for index, measure in enumerate(measures):
            color, marker = CONCEPT_COLORS[index], _MARKERS[index]
            name = "" if len(measures) == 1 else f"{measure.split('_')[0]} concept, "
            for side in ("before", "after"):
                found = [getattr(group.layers[layer], side)[measure] for group, layer in rows]
                _draw_spreads(panel, found, color, marker, filled=side == "after", label=f"{name}{side}")
        panel.set_title(title, fontsize=11)
    _draw_spreads(
        panels[2], [group.kl for group, _ in rows], CONCEPT_COLORS[0], _MARKERS[0], filled=True, label="after"
    )
    panels[2].set_title("KL to the base model, nats", fontsize=11)
    labels = [f"{_short(group)}, layer {layer}" for group, layer in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=9)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    for panel in panels:
        panel.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(axis="x", labelsize=8)
        panel.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35 / len(rows) - 0.12), ncols=2
        )
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip("."), dpi=130)
    return target


def _short(group: Group) -> str:
    """A name for the axis: what sets the group apart, else its run."""
    from seer.compare import name_of

    options = ", ".join(f"{name} {value}" for name, value in group.options.items())
    return f"{name_of(group)} ({options})" if 0 < len(options) <= 40 else name_of(group)


def _draw_spreads(
    panel: Axes, spreads: Sequence[Spread | None], color: str, marker: str, *, filled: bool, label: str
) -> None:
    places = [index for index, spread in enumerate(spreads) if spread is not None]
    found = [spread for spread in spreads if spread is not None]
    panel.errorbar(
        [spread.mean for spread in found],
        places,
        xerr=[spread.deviation or 0.0 for spread in found],
        linestyle="none",
        color=color,
        marker=marker,
        markersize=7,
        markerfacecolor=color if filled else "white",
        label=label,
    )


def _require_format(figure: Figure, target: Path) -> None:
    if target.suffix.lstrip(".") not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise InputError(f"path: expected a name that ends in .png, .pdf or .svg, got {target.name!r}")


def _directions(argument: str, states: np.ndarray, samples: int) -> np.ndarray:
    """The rows at length 1, [N, D] float64."""
    if states.ndim != 2 or len(states) != samples:
        raise InputError(f"{argument}: expected [{samples}, D], one row per concept name, got shape {states.shape}")
    if samples < 4:
        raise InputError(f"{argument}: expected at least 4 samples, got {samples}")
    if not np.isfinite(states).all():
        raise InputError(f"{argument}: expected finite numbers, got NaN or infinity")
    directions: np.ndarray = normalize(states.astype(np.float64))
    if np.ptp(directions, axis=0).max() == 0:
        raise InputError(f"{argument}: expected rows of different directions, got {samples} times the same")
    return directions


def _project(directions: np.ndarray, method: Method) -> np.ndarray:
    """[N, D] -> [N, 2]."""
    if method == "pca":
        projection = PCA(2, svd_solver="full")
    else:
        perplexity = min(30.0, (len(directions) - 1) / 3)
        projection = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    plane: np.ndarray = projection.fit_transform(directions)
    return plane


def _draw(panel: Axes, plane: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    for index, name in enumerate(names):
        across, up = plane[labels == index].T
        panel.scatter(
            across,
            up,
            s=42,
            label=name,
            color=CONCEPT_COLORS[index % len(CONCEPT_COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            alpha=0.9,
            edgecolors="white",
            linewidths=0.5,
        )
    # Neither axis means anything: the box only frames the cloud.
    panel.set(xticks=[], yticks=[])
    panel.margins(0.06)
    panel.spines[:].set_color("#BBBBBB")
