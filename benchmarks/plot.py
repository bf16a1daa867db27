"""Pictures from result files: time, time over the floor and peak memory against size, and the roofline."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

SIZES = ("N", "n")
"""Columns that hold the size, the first that is there."""
GROUPS = ("along", "loss", "kind", "D", "B", "L", "texts", "dtype")
"""Columns that tell one family of cases from another: a row of panels each."""
NAMED = ("along", "loss", "kind", "texts", "dtype")
"""Of them, those whose values say what they are."""
FLOOR = "floor"

Row = Mapping[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["status"] == "ok"]


def number(row: Row, column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def series(rows: Sequence[Row], size: str, value: str) -> dict[str, list[tuple[float, float]]]:
    """Provider -> points of size and value, in the order of size."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (y := number(row, value)) is not None and y > 0:
            lines.setdefault(row["provider"], []).append((float(row[size]), y))
    return {name: sorted(points) for name, points in lines.items()}


def roofline(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Provider -> points of flop per byte that must move, and flop/s reached."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        flops, least, time = (number(row, name) for name in ("flops", "least_bytes", "median_ms"))
        if flops and least and time:
            lines.setdefault(row["provider"], []).append((flops / least, flops / time * 1e3))
    return {name: sorted(points) for name, points in lines.items()}


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Families of cases by name."""
    varying = [c for c in GROUPS if len({row.get(c) for row in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = ", ".join(
            row[c] if c in ("along", "loss", "kind", "texts", "dtype") else f"{c}={row[c]}" for c in varying
        )
        found.setdefault(name, []).append(row)
    return found


def by_size(results: Path, picture: Path, title: str = "") -> None:
    """A row of panels for every family of cases; panels for what the file does not hold are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(results)
    size = next((name for name in SIZES if rows and name in rows[0]), None)
    if size is None:
        raise ValueError(f"{results} holds no measured row with a column {' or '.join(SIZES)}")
    panels: list[tuple[str, str, Any]] = []
    for label, column in (("time in ms", "median_ms"), ("time over the floor", f"time_vs_{FLOOR}")):
        if any(number(row, column) for row in rows):
            panels.append((label, size, lambda part, column=column: series(part, size, column)))
    mebibytes = [{**row, "MiB": str(int(row["peak_bytes"]) / 2**20)} if row["peak_bytes"] else row for row in rows]
    panels.append(("peak memory in MiB", size, lambda part: series(part, size, "MiB")))
    if roofline(rows):
        panels.append(("flop/s", "flop per byte that must move", roofline))

    families = groups(mebibytes)
    styles = dict(zip(dict.fromkeys(row["provider"] for row in rows), harness.STYLES, strict=False))
    figure, axes = pyplot.subplots(
        len(families), len(panels), figsize=(4 * len(panels), 2.7 * len(families)), squeeze=False, layout="constrained"
    )
    for line, (family, part) in zip(axes, families.items(), strict=True):
        for axis, (label, abscissa, points_of) in zip(line, panels, strict=True):
            for name, points in points_of(part).items():
                colour, marker = styles[name]
                axis.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1, label=name
                )
            if label == "flop/s":
                _ceilings(axis, part)
            if axis.has_data():
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
            axis.set(xlabel=abscissa, ylabel=label, title=family)
            axis.grid(color="#dddddd", linewidth=0.5)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=min(len(handles), 6), frameon=False
    )
    figure.suptitle(title or results.stem, x=0.01, ha="left", fontweight="bold")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def _ceilings(axis: Any, rows: Sequence[Row]) -> None:
    """What the machine's matrix product and copy allow, as measured in the same process."""
    rate, bandwidth = (number(rows[0], name) for name in ("flops_per_second", "bytes_per_second"))
    points = [point for line in roofline(rows).values() for point in line]
    if not (rate and bandwidth and points):
        return
    knee = rate / bandwidth
    left, right = min(knee / 4, *(x for x, _ in points)), max(4 * knee, *(x for x, _ in points))
    axis.plot([left, knee, right], [left * bandwidth, rate, rate], color="#333333", linestyle="--", linewidth=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="result files (.csv) of a benchmark")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: beside each file)")
    options = parser.parse_args(arguments)
    for path in options.results:
        if not path.is_file():
            parser.error(f"expected a result file, got {path}")
        picture = (options.out or path.parent) / f"{path.stem}-by-size.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        try:
            by_size(path, picture)
        except ValueError as error:
            parser.error(str(error))
        print(f"Written: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
