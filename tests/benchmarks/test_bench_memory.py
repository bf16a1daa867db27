"""bench_memory.py checks before it counts, leaves out what cannot run, and times nothing."""

from __future__ import annotations

import argparse
import csv

import bench_memory
import pytest
import torch
from bench_memory import Size
from harness import Outputs

WHERE = (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("loss", bench_memory.LOSSES)
@pytest.mark.parametrize("name", bench_memory.NAMES)
def test_every_provider_passes_its_check_and_a_wrong_value_is_caught(name: str, loss: str) -> None:
    case, provider = bench_memory.make_case(Size(loss, 24), *WHERE), bench_memory.make_providers()[name]
    if reason := provider.left_out(case):
        pytest.skip(reason)
    bench_memory.forget()
    inputs = bench_memory.make_inputs(Size(loss, 24), *WHERE, 0)
    outputs = provider.prepare(case)(inputs)
    check = provider.check(case, inputs, outputs)
    assert check.passed, check
    wrong = Outputs(outputs.value.detach() * 1.01, outputs.gradients)
    assert not provider.check(case, inputs, wrong).passed


def test_who_stores_matrices_is_left_out_by_size() -> None:
    case = bench_memory.make_case(Size("clip", 16384), *WHERE)
    reasons = {name: provider.left_out(case) for name, provider in bench_memory.make_providers().items()}
    assert reasons["idiomatic"] == reasons["reference"] == "N × N is 1 GiB, limit 256 MiB"
    assert reasons["native"] is None


def test_a_run_counts_and_times_nothing(tmp_path) -> None:
    arguments = ["--sizes", "info_nce:16", "info_nce:32", "--providers", "native", "idiomatic", "--out", str(tmp_path)]
    assert bench_memory.main(arguments) == 0
    with (tmp_path / "bench_memory-partial.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["N"], row["provider"], row["runs"], row["median_ms"]) for row in rows] == [
        (n, name, "0", "") for n in ("16", "32") for name in ("native", "idiomatic")
    ]
    assert all(int(row["peak_bytes"]) > 0 for row in rows)
    assert (tmp_path / "bench_memory-partial.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "info_nce", "info_nce:7", "triplet:8", "siglip:0"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        Size.parse(text)
