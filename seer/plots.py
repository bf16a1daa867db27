"""Pictures of representations before and after training, and of how training went."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from seer.colors import CONCEPT_COLORS
from seer.errors import InputError
from seer.files import atomic_path

Method = Literal["tsne", "pca"]

# Shapes tell the concepts apart in grey too; 8 colours and 7 shapes repeat together only after 56 concepts.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NEIGHBOURS = 10
_LEGEND_CHARACTERS = 100
"""That fit side by side under a picture; the marker and the gap of an entry take six."""


def plot_representations(
    before: np.ndarray,
    after: np.ndarray,
    concepts: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    method: Method = "tsne",
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

    Returns:
        The path.

    Raises:
        InputError: shapes that do not fit, values that are not finite, an unknown method or ending.
    """
    target = Path(path)
    sides = [_directions("before", before, len(concepts)), _directions("after", after, len(concepts))]
    names = sorted(set(concepts))
    labels = np.array([names.index(concept) for concept in concepts])
    if method not in get_args(Method):
        raise InputError(f"method: expected one of {get_args(Method)}, got {method!r}")
    if len(names) > len(CONCEPT_COLORS) * len(_MARKERS):
        raise InputError(
            f"concepts: expected at most {len(CONCEPT_COLORS) * len(_MARKERS)} different names, got {len(names)}"
        )

    figure = Figure(figsize=(10, 5.6), layout="constrained", facecolor="white")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if target.suffix.lstrip(".") not in formats:
        raise InputError(f"path: expected a name that ends in .png, .pdf or .svg, got {target.name!r}")
    panels: list[Axes] = list(figure.subplots(1, 2))
    for panel, heading, directions in zip(
        panels, ("Origin: the base model", "SEER: after training"), sides, strict=True
    ):
        _draw(panel, _project(directions, method), labels, names)
        panel.set_title(heading, fontsize=15, fontweight="bold", pad=26)
        share, count = _neighbour_share(directions, labels)
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
        ncols=max(1, min(len(names), 6, _LEGEND_CHARACTERS // max(len(name) + 6 for name in names))),
        fontsize=12,
        frameon=False,
        markerscale=1.5,
        handletextpad=0.2,
        columnspacing=1.4,
    )
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip("."), dpi=160)
    return target


def plot_learning_curves(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path | None:
    """Draw every quantity that a run logged over its steps, one panel each; those of single concepts share one.

    Args:
        log_history: what `TrainerState.log_history` holds: entries with a `step` and numbers.
        path: file to write; its ending decides the format. An existing file is replaced.

    Returns:
        The path, or None where nothing was logged in more than one step.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {}  # panel -> curve -> step -> value
    for entry in log_history:
        if "train_runtime" in entry:  # the summary at the end
            continue
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                panel, _, curve = name.partition("/")
                title = f"{panel} by concept" if curve else panel
                curves.setdefault(title, {}).setdefault(curve, {})[entry["step"]] = value
    panels = {title: each for title, each in curves.items() if any(len(points) > 1 for points in each.values())}
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


def _neighbour_share(directions: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Mean share of a sample's nearest neighbours that are of its concept, and how many neighbours were counted."""
    count = min(_NEIGHBOURS, len(labels) - 1)
    neighbours = NearestNeighbors(n_neighbors=count).fit(directions).kneighbors(return_distance=False)  # [N, count]
    return float((labels[neighbours] == labels[:, None]).mean()), count


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
