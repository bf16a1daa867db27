"""Writes docs/performance.md from the committed result files, or with --check says whether it is up to date.

Every figure on that page comes from a file in benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import harness

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
GPU = "gpu"
"""Folder in that of the results which holds what gpu.sh wrote."""

TITLES = {
    "bench_loss": "Losses between queries and keys",
    "bench_self": "Losses of a set with itself",
    "bench_sinkhorn": "Optimal transport",
    "bench_memory": "Memory by size",
    "bench_training": "Training steps",
    "bench_explaining": "Explaining a generation",
    "bench_scaling": "Growth along one dimension",
}
INTRODUCTION = """\
# Performance

This page is written by `python benchmarks/performance.py` from the files in
[`benchmarks/results`](../benchmarks/results): every figure below comes from one of them, and a test holds the two
together. How it is measured, what the providers are and how to run it:
[`benchmarks/README.md`](../benchmarks/README.md). How losses over many GPUs scale: [`scaling.md`](scaling.md).

Times are medians in milliseconds, forward and backward. In parentheses: the time over that of the floor, which is what
a library needs for the bare matrix products of the case. Memory is the peak above inputs and gradients."""

Row = Mapping[str, str]


def page(results: Path = harness.RESULTS) -> str:
    sections = [INTRODUCTION]
    for folder, where in ((results, "CPU"), (results / GPU, "GPU")):
        paths = sorted(folder.glob("bench_*.csv"), key=lambda path: (_order(path), path.stem))
        sections += [_section(path, where, results) for path in paths]
    return "\n\n".join(sections) + "\n"


def _order(path: Path) -> int:
    return list(TITLES).index(_script(path))


def _script(path: Path) -> str:
    return path.stem.split("-")[0]


def _section(path: Path, where: str, results: Path) -> str:
    rows = _read(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    place, choices = rows[0], path.stem.split("-")[1:]
    name = ", ".join([TITLES[_script(path)], where, *(c for c in choices if c != "cuda")])
    busy = max(float(row.get("busy_elsewhere") or 0) for row in rows)
    lines = [f"## {name}", "", _where(place, busy), ""]
    lines += _table(rows, "Time", _time) if any(row["median_ms"] for row in rows) else []
    lines += _table(rows, "Peak memory", _memory) if any(row["peak_bytes"] for row in rows) else []
    if "speedup_vs_reference" in place:
        lines += _training(rows)
    lines += _targets(path.with_suffix(".json"))
    if path.with_suffix(".png").is_file():
        lines += [f"![{name}](../benchmarks/results/{path.with_suffix('.png').relative_to(results)})", ""]
    lines.append(f"From [`{path.name}`](../benchmarks/results/{path.relative_to(results)}).")
    return "\n".join(lines)


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _where(row: Row, busy: float) -> str:
    text = f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['dtype']}, {row['date'][:10]}"
    if row.get("flops_per_second"):
        product, copy = float(row["flops_per_second"]) / 1e12, float(row["bytes_per_second"]) / 1e9
        text += f"; measured there: matrix product {product:.3g} Tflop/s, copy {copy:.3g} GB/s"
    return text + (f"; other processes used up to {busy:.0%} of the CPUs" if busy > 0.05 else "") + "."


def _table(rows: Sequence[Row], title: str, cell: Callable[[Row | None], str]) -> list[str]:
    """Cases downwards, providers across, without those that never ran."""
    providers = dict.fromkeys(row["provider"] for row in rows if row["status"] != "left out")
    by_key = {(row["case"], row["provider"]): row for row in rows}
    cases = dict.fromkeys(row["case"] for row in rows)
    return _markdown(
        [title, *providers],
        ([case, *(cell(by_key.get((case, name))) for name in providers)] for case in cases),
    )


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    line = "| {} |".format
    return [
        line(" | ".join(head)),
        line(" | ".join(["---"] + ["---:"] * (len(head) - 1))),
        *(line(" | ".join(cells)) for cells in body),
        "",
    ]


def _time(row: Row | None) -> str:
    if row is None or row["status"] == "left out":
        return ""
    if row["status"] == "failed":
        return "failed its check"
    ratio = row.get("time_vs_floor") if row["provider"] != "floor" else None
    return f"{_short(float(row['median_ms']))}" + (f" ({_short(float(ratio))} ×)" if ratio else "")


def _memory(row: Row | None) -> str:
    return harness.format_bytes(int(row["peak_bytes"])) if row is not None and row["peak_bytes"] else ""


def _training(rows: Sequence[Row]) -> list[str]:
    head = ["Step", "provider", "steps per second", "speed-up over the paper's step", "share outside the model"]
    return _markdown(
        head,
        (
            [
                row["case"],
                row["provider"],
                row["steps_per_second"],
                f"{_short(float(row['speedup_vs_reference']))} ×" if row["speedup_vs_reference"] else "",
                f"{float(row['share_outside_model']):.1%}" if row["share_outside_model"] else "",
            ]
            for row in rows
            if row["status"] == "ok"
        ),
    )


def _targets(path: Path) -> list[str]:
    if not path.is_file():
        return []
    figures = [f for f in json.loads(path.read_text())["figures"] if f["verdict"] != "not measured"]
    if not figures:
        return []
    body = ([f["text"], _short(f["measured"]), f["verdict"]] for f in figures)
    return _markdown(["Target", "measured", ""], body)


def _short(x: float) -> str:
    """Three significant digits, more where they stand before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of date")
    options = parser.parse_args(arguments)
    written = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if options.check:
        return int(written != page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
