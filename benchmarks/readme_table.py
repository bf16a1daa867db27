"""Writes the table of the README from the committed results, or with --check says whether it is up to date."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import harness

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TRANSPORT = {"pot-log": "POT, log domain", "pot": "POT, plain", "geomloss": "geomloss"}
OTHERS = {"idiomatic": "idiomatic torch", "pml": "pytorch-metric-learning", "paper": "paper's formula"}


def table(results: Path = harness.RESULTS) -> str:
    """Markdown: one line per case that another implementation can run."""
    place, losses = _losses(results)
    return "\n".join(
        [
            *losses,
            "",
            *_transport(results),
            "",
            f"fp32, {place['device']}, {place['threads']} threads, torch {place['torch']}. `×`: the other's time over "
            "ours in one run; memory: the peak above inputs and gradients. "
            "[How this is measured](benchmarks/README.md).",
        ]
    )


def _losses(results: Path) -> tuple[Mapping[str, str], list[str]]:
    lines = [
        f"| loss, forward and backward | ours | bare products | {' | '.join(OTHERS.values())} | memory: ours | torch |",
        f"| --- | {' | '.join(['---:'] * (len(OTHERS) + 4))} |",
    ]
    place: Mapping[str, str] = {}
    for name in ("bench_loss", "bench_self"):
        for case, of in _cases(results / f"{name}.csv").items():
            if "idiomatic" not in of:
                continue
            place = ours = of["native"]
            ratios = [_times(of[other], ours) if other in of else "" for other in OTHERS]
            memory = [harness.format_bytes(int(of[who]["peak_bytes"])) for who in ("native", "idiomatic")]
            loss = f"info_nce, {case}" if ours.get("loss", "info_nce") == "info_nce" else case
            lines.append(
                f"| {loss} | {_milliseconds(ours)} ms | {_times(of['floor'], ours)} | {' | '.join(ratios)} | "
                f"{' | '.join(memory)} |"
            )
    return place, lines


def _transport(results: Path) -> list[str]:
    lines = [
        f"| transport, 100 iterations | ours | {' | '.join(TRANSPORT.values())} |",
        f"| --- | {' | '.join(['---:'] * (len(TRANSPORT) + 1))} |",
    ]
    for case, of in _cases(results / "bench_sinkhorn.csv").items():
        if TRANSPORT.keys() <= of.keys():
            ours = {name: of["points" if name == "geomloss" else "native"] for name in TRANSPORT}  # points or costs
            ratios = [_times(of[name], ours[name]) for name in TRANSPORT]
            lines.append(f"| {case} | {_milliseconds(of['native'])} ms | {' | '.join(ratios)} |")
    return lines


def _cases(path: Path) -> dict[str, dict[str, Mapping[str, str]]]:
    """Case -> provider -> row, of what was timed."""
    cases: dict[str, dict[str, Mapping[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "ok":
                cases.setdefault(row["case"], {})[row["provider"]] = row
    return cases


def _milliseconds(row: Mapping[str, str]) -> str:
    return f"{float(row['median_ms']):.3g}" if float(row["median_ms"]) < 1000 else f"{float(row['median_ms']):.0f}"


def _times(row: Mapping[str, str], ours: Mapping[str, str]) -> str:
    ratio = float(row["median_ms"]) / float(ours["median_ms"])
    return f"{ratio:.0f} ×" if ratio >= 100 else f"{ratio:.3g} ×" if ratio >= 10 else f"{ratio:.2f} ×"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the table is out of date")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    updated = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if options.check:
        return int(updated != text)
    README.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
