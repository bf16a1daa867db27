"""bench_scaling.py checks before it times, also what processes return together."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator

import bench_loss
import bench_scaling
import pytest
import torch
from bench_scaling import Shared, Size, make_case
from harness import Measurement

WHERE = (torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    bench_scaling.forget()


def test_processes_return_the_loss_and_gradients_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case, provider = make_case(Size("ranks", 2), *WHERE), bench_scaling.make_providers()["ring"]
    pairs = Shared.of(bench_loss.make_pairs(bench_loss.Size(1, 64, 16), *WHERE, 0))
    outputs = provider.prepare(case)(pairs)
    check = provider.check(case, pairs, outputs)
    assert check.passed, check
    assert not provider.check(case, pairs, outputs._replace(value=outputs.value * 1.01)).passed
    assert provider.detail(case, [pairs])["peak_bytes"] > 0
    monkeypatch.setattr(bench_scaling, "ANSWER_LIMIT", 0.0)
    with pytest.raises(RuntimeError, match="rank 0 did not answer within 0 s"):
        provider.prepare(case)(pairs)


def test_a_run_along_every_dimension(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_scaling.harness, "BUDGET", 0.0)
    sizes = ["rows:16", "features:4", "problems:2", "transport:2"]
    assert bench_scaling.main(["--sizes", *sizes, "--out", str(tmp_path)]) == 0
    with (tmp_path / "bench_scaling-partial.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ran = [(row["along"], row["n"], row["provider"]) for row in rows if row["status"] == "ok"]
    assert {entry[:2] for entry in ran if entry[2] == "native"} == {tuple(size.split(":")) for size in sizes}
    assert not [row for row in rows if row["status"] == "failed"]
    assert (tmp_path / "bench_scaling-partial.png").read_bytes().startswith(b"\x89PNG")


def test_exponents() -> None:
    providers = bench_scaling.make_providers()
    measurements = [
        Measurement(make_case(Size(along, n), *WHERE), providers[name], "ok", peak_bytes=10 * n, seconds=(seconds,))
        for n in (8, 2, 4)
        for along in ("rows", "problems")
        for name, seconds in (("native", n**2.0), ("floor", n**1.5))
    ]
    figures = {figure.text: figure.measured for figure in bench_scaling.make_figures(measurements)}
    assert figures["time over the floor grows with rows as their power of, at most 0.1"] == pytest.approx(0.5)
    assert figures["time grows with problems as their power of, at most 1.1"] == pytest.approx(2)
    assert figures["peak memory grows with rows as their power of, at most 1.1"] == pytest.approx(1)
    assert figures["peak memory grows with features as their power of, at most 0.1"] is None


@pytest.mark.parametrize("text", ["", "rows", "rows:0", "columns:4", "ranks:3"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        Size.parse(text)
