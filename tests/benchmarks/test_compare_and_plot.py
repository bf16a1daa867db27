"""compare.py tells changes from noise, and plot.py draws what a result file holds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import compare
import harness
import plot
import pytest


def row(
    provider: str = "ours", low: float = 9.0, median: float = 10.0, high: float = 11.0, **other: Any
) -> dict[str, Any]:
    times = {"quartile_1_ms": low, "median_ms": median, "quartile_3_ms": high}
    place = {"device": "a", "threads": 2, "torch": "2.6", "dtype": "float32"}
    return {"case": "N=8", "provider": provider, "status": "ok", "peak_bytes": 100, **times, **place, **other}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, bool]]:
    tables = ({("N=8", "ours"): {name: str(x) for name, x in r.items()}} for r in (before, after))
    return [(change.what, change.worse) for change in compare.changes(*tables)]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (row(), []),
        (row(low=10.5, median=11.5, high=12.5), []),  # quartiles overlap
        (row(low=11.5, median=12, high=12.5), [("time", True)]),
        (row(low=7, median=8, high=8.5), [("time", False)]),
        (row(peak_bytes=102), []),
        (row(peak_bytes=104), [("memory", True)]),
        (row(peak_bytes=50), [("memory", False)]),
        (row(status="failed"), [("status", True)]),
    ],
)
def test_changes(after: dict[str, Any], expected: list[tuple[str, bool]]) -> None:
    assert changes(row(), after) == expected


def test_a_small_change_of_a_steady_time_is_not_mentioned() -> None:
    assert changes(row(low=10, high=10), row(low=10.2, median=10.2, high=10.2)) == []


def write(path: Path, *rows: dict[str, Any]) -> str:
    harness.write_csv(path, rows)
    return str(path)


def test_the_exit_code_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.csv", row(), row("gone"))
    new = write(tmp_path / "new.csv", row(low=19, median=20, high=21, torch="2.7"), row("come"))
    assert compare.main([old, old]) == 0
    assert compare.main([new, old]) == 0
    assert compare.main([old, new]) == 1
    printed = capsys.readouterr().out
    assert "1 compared: 1 worse, 0 better. Only in OLD: 1, only in NEW: 1." in printed
    assert "The runs differ in torch: 2.6 and 2.7" in printed


def test_files_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write(tmp_path / "old.csv", row("a")), write(tmp_path / "new.csv", row("b"))
    for arguments, message in (([old, new], "nothing|no case and provider in common"), ([old, "no.csv"], "got no.csv")):
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert message.split("|")[-1] in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("bench_*.csv")), ids=lambda path: path.stem)
def test_committed_results_can_be_drawn(path: Path, tmp_path: Path) -> None:
    if path.stem.startswith(("bench_training", "bench_explaining")):
        pytest.skip("has no sizes to draw against")
    assert plot.main([str(path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{path.stem}-by-size.png").read_bytes().startswith(b"\x89PNG")


def test_points_of_the_roofline() -> None:
    rows = [{"provider": "ours", "flops": "2e9", "least_bytes": "1e6", "median_ms": "4.0"}]
    assert plot.roofline(rows) == {"ours": [(2000.0, 5e11)]}
    assert plot.series([{"provider": "ours", "N": "8", "median_ms": ""}], "N", "median_ms") == {}


def test_committed_results_are_the_same_as_themselves() -> None:
    for path in harness.RESULTS.glob("bench_*.csv"):
        with path.open(newline="") as file:
            assert len(compare.read(path)) == len(list(csv.DictReader(file)))
        assert compare.main([str(path), str(path)]) == 0
