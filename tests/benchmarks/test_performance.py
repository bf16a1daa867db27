"""docs/performance.md is what the committed results say."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import harness
import performance


def test_the_page_is_up_to_date() -> None:
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(), "run python benchmarks/performance.py"


def test_every_time_of_the_page_changes_with_its_file(tmp_path: Path) -> None:
    name = "bench_loss.csv"
    shutil.copy(harness.RESULTS / name, tmp_path / name)
    before = performance.page(tmp_path)
    with (tmp_path / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["median_ms"] = str(1.5 * float(row["median_ms"])) if row["median_ms"] else ""
    harness.write_csv(tmp_path / name, rows)
    after = performance.page(tmp_path)
    times, memory = (
        [line for line in text.split(f"| {head} |")[1].split("\n\n")[0].splitlines() if line.startswith("| N=")]
        for text, head in ((before, "Time"), (before, "Peak memory"))
    )
    assert len(times) == len(memory) > 0
    assert not [line for line in times if line in after]
    assert all(line in after for line in memory)


def test_results_of_a_gpu_and_of_training_get_their_sections(tmp_path: Path) -> None:
    row = {
        "case": "1 target layer, 8 pairs",
        "provider": "seer",
        "status": "ok",
        "median_ms": "250",
        "peak_bytes": str(3 << 20),
        "time_vs_reference": "0.1",
        "steps_per_second": "4.0",
        "speedup_vs_reference": "10.0",
        "share_outside_model": "0.071",
        "device": "A GPU",
        "threads": "2",
        "torch": "2.11",
        "dtype": "bfloat16",
        "date": "2030-01-02T00:00:00",
        "flops_per_second": "8e14",
        "bytes_per_second": "3e12",
    }
    (tmp_path / "gpu").mkdir()
    harness.write_csv(tmp_path / "gpu" / "bench_training-quick-bfloat16-cuda.csv", [row])
    page = performance.page(tmp_path)
    assert "## Training steps, GPU, quick, bfloat16\n" in page
    assert "A GPU, 2 threads, torch 2.11, bfloat16, 2030-01-02; measured there: matrix product 800 Tflop/s" in page
    assert "| 1 target layer, 8 pairs | seer | 4.0 | 10 × | 7.1% |" in page
    assert "| 1 target layer, 8 pairs | 3 MiB |" in page
