"""Compares two result files of a benchmark, case by case and provider by provider.

A time has changed if the quartiles of the two runs do not overlap and the medians differ by more than --least. A run on
a busy machine has wide quartiles, so that less of it counts as changed. Memory is counted, so any difference above
--least counts. Exit code 1 if something became slower or larger, or if something that was measured no longer is.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from rich.console import Console
from rich.table import Table

LEAST = 0.03
"""Relative change of a median below which nothing is said."""
SAME_PLACE = ("device", "threads", "torch", "dtype")
"""Columns in which two runs must agree for their times to be compared without a word of warning."""

Key = tuple[str, str]
Row = Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """Of one provider on one case."""

    key: Key
    what: str
    """`"time"`, `"memory"` or `"status"`."""
    old: str
    new: str
    ratio: float | None
    """New over old."""
    worse: bool


def read(path: Path) -> dict[Key, Row]:
    with path.open(newline="") as file:
        return {(row["case"], row["provider"]): row for row in csv.DictReader(file)}


def changes(old: Mapping[Key, Row], new: Mapping[Key, Row], least: float = LEAST) -> list[Change]:
    """What differs by more than the noise, in the order of `old`."""
    found = []
    for key, before in old.items():
        after = new.get(key)
        if after is None:
            continue
        if before["status"] != after["status"]:
            found.append(Change(key, "status", before["status"], after["status"], None, before["status"] == "ok"))
            continue
        if before["median_ms"] and after["median_ms"]:
            ratio = float(after["median_ms"]) / float(before["median_ms"])
            slower = float(after["quartile_1_ms"]) > float(before["quartile_3_ms"])
            faster = float(after["quartile_3_ms"]) < float(before["quartile_1_ms"])
            if (slower and ratio > 1 + least) or (faster and ratio < 1 - least):
                texts = (f"{row['median_ms']} ms" for row in (before, after))
                found.append(Change(key, "time", *texts, ratio, slower))
        if before["peak_bytes"] and after["peak_bytes"]:
            small, large = int(before["peak_bytes"]), int(after["peak_bytes"])
            if abs(large - small) > least * max(small, 1):
                texts = (harness.format_bytes(size) for size in (small, large))
                found.append(Change(key, "memory", *texts, large / small if small else None, large > small))
    return found


def elsewhere(old: Mapping[Key, Row], new: Mapping[Key, Row]) -> list[str]:
    """In what the two runs differ that no change of the code explains."""
    first, second = (next(iter(rows.values()), {}) for rows in (old, new))
    return [
        f"{name}: {first.get(name)} and {second.get(name)}"
        for name in SAME_PLACE
        if first.get(name) != second.get(name)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="result file (.csv) of a benchmark")
    parser.add_argument("new", type=Path, metavar="NEW", help="another one of the same benchmark")
    parser.add_argument("--least", type=float, default=LEAST, help="relative change to mention (default: %(default)s)")
    options = parser.parse_args(arguments)
    for path in (options.old, options.new):
        if not path.is_file():
            parser.error(f"expected a result file, got {path}")
    old, new = read(options.old), read(options.new)
    if not old.keys() & new.keys():
        parser.error(f"{options.old} and {options.new} have no case and provider in common")

    console = Console()
    for difference in elsewhere(old, new):
        console.print(f"[yellow]The runs differ in {difference}[/yellow]", highlight=False)
    found = changes(old, new, options.least)
    table = Table(title="Changes larger than the noise", title_justify="left", title_style="bold")
    for name in ("case", "provider", "", "old", "new", "new / old"):
        table.add_column(name, justify="right" if name in ("old", "new", "new / old") else "left")
    for c in found:
        ratio = "" if c.ratio is None else f"{c.ratio:.3g}"
        table.add_row(*c.key, c.what, c.old, c.new, ratio, style="red" if c.worse else "green")
    if found:
        console.print(table)
    worse = sum(c.worse for c in found)
    console.print(
        f"{len(old.keys() & new.keys())} compared: {worse} worse, {len(found) - worse} better. "
        f"Only in OLD: {len(old.keys() - new.keys())}, only in NEW: {len(new.keys() - old.keys())}.",
        highlight=False,
    )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
