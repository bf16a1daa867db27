"""The picture of representations before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from seer.errors import InputError
from seer.plots import plot_representations

NAMES = ["alpha", "beta", "gamma"]
CONCEPTS = [NAMES[i % 3] for i in range(30)]


def clouds(spread: float, dimensions: int = 8) -> np.ndarray:
    """[30, dimensions]: three concepts around three directions."""
    noise = np.random.default_rng(0).normal(size=(30, dimensions)).astype(np.float32)
    return np.eye(dimensions, dtype=np.float32)[np.arange(30) % 3] + spread * noise


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written."""
    figures: list[Figure] = []
    save: Callable[..., None] = Figure.savefig

    def record(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_every_sample_is_drawn_in_its_concepts_colour(tmp_path: Path, saved: list[Figure], method: Any) -> None:
    path = plot_representations(clouds(2.0), clouds(0.01), CONCEPTS, tmp_path / "a.png", title="Title", method=method)
    assert path == tmp_path / "a.png"
    (figure,) = saved
    assert figure.get_suptitle() == "Title"
    origin, seer = figure.axes
    assert "Origin" in origin.get_title()
    assert "SEER" in seer.get_title()
    assert origin.get_position().x0 < seer.get_position().x0
    for panel in figure.axes:
        assert [points.get_label() for points in panel.collections] == NAMES
        assert [len(points.get_offsets()) for points in panel.collections] == [10, 10, 10]
        assert len({tuple(points.get_facecolor()[0]) for points in panel.collections}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    # Concepts of little spread are apart in the plane: the points stand where their samples belong.
    centres = [np.asarray(points.get_offsets()).mean(0) for points in seer.collections]
    spreads = [np.asarray(points.get_offsets()).std(0).max() for points in seer.collections]
    assert min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 2 * max(spreads)


def test_heading_gives_the_share_of_neighbours_of_the_same_concept(tmp_path: Path, saved: list[Figure]) -> None:
    # Four samples on a quarter circle: a a b b at 0, 10, 20 and 90 degrees. All 3 others count, one of the concept.
    angles = np.radians([0, 10, 20, 90])
    states = np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [5], [2], [3]]
    plot_representations(states, clouds(0.01)[:4], ["a", "a", "b", "b"], tmp_path / "a.png", method="pca")
    separated = np.repeat(np.eye(2), 11, 0) + 0.01 * np.random.default_rng(0).random((22, 2))
    plot_representations(separated, separated, ["a"] * 11 + ["b"] * 11, tmp_path / "b.png", method="pca")
    (origin, _), (perfect, _) = (figure.axes for figure in saved)
    assert origin.texts[0].get_text() == "33% of the 3 nearest neighbours share the concept"
    assert perfect.texts[0].get_text() == "100% of the 10 nearest neighbours share the concept"


def test_same_input_same_file(tmp_path: Path) -> None:
    first = plot_representations(clouds(2.0), clouds(0.1), CONCEPTS, tmp_path / "a.png").read_bytes()
    second = plot_representations(clouds(2.0), clouds(0.1), CONCEPTS, tmp_path / "b.png").read_bytes()
    other = plot_representations(clouds(2.0), clouds(0.2), CONCEPTS, tmp_path / "c.png").read_bytes()
    assert first == second
    assert first != other
    assert first.startswith(b"\x89PNG")


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_other_formats(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = plot_representations(clouds(2.0), clouds(0.1), CONCEPTS, tmp_path / f"a{suffix}", method="pca")
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_leaves_the_state_of_pyplot_alone(tmp_path: Path) -> None:
    from matplotlib import pyplot

    settings, figures = dict(mpl.rcParams), pyplot.get_fignums()
    plot_representations(clouds(2.0), clouds(0.1), CONCEPTS, tmp_path / "a.png", method="pca")
    assert dict(mpl.rcParams) == settings
    assert pyplot.get_fignums() == figures


def test_colours_differ_in_lightness_or_shape(tmp_path: Path, saved: list[Figure]) -> None:
    """In grey, where colour is lost, no two of the first seven concepts share a shape."""
    names = [f"concept {i}" for i in range(7)] * 4
    states = np.random.default_rng(0).normal(size=(28, 5))
    plot_representations(states, states, names, tmp_path / "a.png", method="pca")
    markers = {points.get_paths()[0].vertices.tobytes() for points in saved[0].axes[0].collections}
    colours = {to_rgb(points.get_facecolor()[0]) for points in saved[0].axes[0].collections}
    assert len(markers) == len(colours) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": clouds(1.0)[:29]}, r"before: expected \[30, D\].*\(29, 8\)"),
        ({"after": clouds(1.0).ravel()}, r"after: expected \[30, D\].*\(240,\)"),
        ({"after": np.full((30, 8), np.nan)}, "after: expected finite numbers"),
        ({"before": np.ones((30, 8))}, "before: expected rows of different directions"),
        ({"method": "umap"}, "method: expected one of .*'umap'"),
        ({"path": "picture.txt"}, "path: expected a name that ends in .png.*'picture.txt'"),
        ({"path": "picture"}, "path: expected a name that ends in .png.*'picture'"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {
        "before": clouds(1.0),
        "after": clouds(1.0),
        "concepts": CONCEPTS,
        "path": tmp_path / "a.png",
        "method": "pca",
    }
    with pytest.raises(InputError, match=message):
        plot_representations(**{**arguments, **change})
    assert list(tmp_path.iterdir()) == []


def test_too_few_samples_and_too_many_concepts(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(57, 4))
    with pytest.raises(InputError, match="at least 4 samples, got 3"):
        plot_representations(states[:3], states[:3], ["a", "b", "c"], tmp_path / "a.png")
    with pytest.raises(InputError, match="at most 56 different names, got 57"):
        plot_representations(states, states, [str(i) for i in range(57)], tmp_path / "a.png")


def test_long_names_stay_inside_the_picture(tmp_path: Path, saved: list[Figure]) -> None:
    names = [f"a_concept_with_a_name_of_forty_characters_{i}"[:40] + str(i) for i in range(6)]
    plot_representations(clouds(2.0), clouds(0.01), [names[i % 6] for i in range(30)], tmp_path / "a.png", method="pca")
    (figure,) = saved
    figure.draw_without_rendering()  # places at the figure's own resolution, not the file's
    for text in figure.legends[0].get_texts():
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
