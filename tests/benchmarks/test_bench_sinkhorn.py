"""Every provider of bench_sinkhorn.py solves the same problems, a wrong one is caught, and a run leaves its files."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json

import bench_sinkhorn
import pytest
import torch
from bench_sinkhorn import Batch
from harness import Outputs

WHERE = (torch.float32, torch.device("cpu"))
SMALL = (Batch("equal", 3, 20, 64), Batch("mixed", 4, 20, 32), Batch("ragged", 12, 48, 8), Batch("squared", 1, 40, 16))


@pytest.mark.parametrize("batch", SMALL, ids=lambda b: b.kind)
@pytest.mark.parametrize("name", list(bench_sinkhorn.make_providers()))
def test_every_provider_passes_its_check_and_a_wrong_value_is_caught(name: str, batch: Batch) -> None:
    case, provider = bench_sinkhorn.make_case(batch, *WHERE), bench_sinkhorn.make_providers()[name]
    if reason := provider.left_out(case):
        pytest.skip(reason)
    problems = bench_sinkhorn.make_problems(batch, *WHERE, seed=2)
    outputs = provider.prepare(case)(problems)
    check = provider.check(case, problems, outputs)
    assert check.passed, check
    wrong = outputs.value.detach().clone()
    wrong.view(-1)[0] *= 1.01
    assert not provider.check(case, problems, Outputs(wrong, ())).passed


def test_a_run_leaves_its_files(tmp_path, monkeypatch) -> None:
    small = dataclasses.replace(bench_sinkhorn.BENCHMARK, sizes_quick=SMALL)
    monkeypatch.setattr(bench_sinkhorn, "BENCHMARK", small)
    monkeypatch.setattr(bench_sinkhorn.harness, "BUDGET", 0.1)
    providers = ["native", "stopping", "points", "groups", "floor"]
    assert bench_sinkhorn.main(["--quick", "--out", str(tmp_path), "--providers", *providers]) == 0
    rows = list(csv.DictReader((tmp_path / "bench_sinkhorn-quick-partial.csv").open()))
    assert {(row["kind"], row["provider"]) for row in rows if row["status"] == "ok"} == {
        *(("equal", name) for name in ("native", "stopping", "points", "floor")),
        *(("mixed", name) for name in ("native", "stopping", "floor")),
        *(("squared", name) for name in ("native", "stopping", "points", "floor")),
        *(("ragged", name) for name in ("points", "groups")),
    }
    figures = json.loads((tmp_path / "bench_sinkhorn-quick-partial.json").read_text())["figures"]
    assert len(figures) == 11


@pytest.mark.parametrize("text", ["", "64x100x256", "even:2x3x4", "equal:0x3x4", "ragged:8x12x4"])
def test_bad_sizes(text) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        Batch.parse(text)
