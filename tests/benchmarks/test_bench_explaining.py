"""bench_explaining.py times answers that are the same, token by token."""

from __future__ import annotations

import csv

import pytest
import torch

bench_explaining = pytest.importorskip("bench_explaining")
from bench_explaining import Size  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def the_demo(monkeypatch):
    """The demo's model, which needs no file outside of the package."""
    monkeypatch.setitem(bench_explaining.bench_training.PLACE, "model", "demo")
    yield
    bench_explaining.BENCHMARK.forget()


@pytest.mark.parametrize("name", ["streamed", "iterated", "plain_iterated"])
def test_other_tokens_fail_the_check(name):
    case = bench_explaining.make_case(Size(1, 4), torch.float32, CPU)
    provider = bench_explaining.make_providers()[name]
    outputs = provider.prepare(case)(bench_explaining.PROMPTS[0])
    assert outputs.value.shape == (4,)
    assert provider.check(case, bench_explaining.PROMPTS[0], outputs).passed
    for wrong in (outputs.value[:-1], outputs.value + torch.eye(4)[2], outputs.value[:0]):
        assert not provider.check(case, bench_explaining.PROMPTS[0], outputs._replace(value=wrong)).passed


def test_a_run_compares_with_generate(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_explaining.harness, "BUDGET", 0.0)
    assert bench_explaining.main(["--sizes", "2x3", "--out", str(tmp_path), "--model", "demo"]) == 0
    with (tmp_path / "bench_explaining-partial.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"plain", "streamed", "explained", "iterated", "plain_iterated"}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["plain"]["share_reading"] == ""
    assert all(0 < float(rows[name]["share_reading"]) < 1 for name in ("streamed", "explained"))


def test_layers_that_are_not_there():
    case = bench_explaining.make_case(Size(99, 4), torch.float32, CPU)
    with pytest.raises(ValueError, match="99 layers asked of a model with"):
        bench_explaining.make_explainer(case)
