"""Every provider of bench_self.py computes NT-Xent and SupCon, a wrong one is caught, and a run leaves its files."""

from __future__ import annotations

import argparse
import csv
import json

import bench_self
import harness
import pytest
import torch
from bench_self import Size

SIZES = (Size("nt_xent", 24, 40), Size("sup_con", 48, 40))
LOSSES = ("native", "idiomatic", "pml")
EVERYONE = ("native", "triton", "idiomatic", "compiled", "pml", "floor")


def setup(name: str, size: Size, dtype: torch.dtype = torch.float32):
    case = bench_self.make_case(size, dtype, torch.device("cpu"))
    provider = bench_self.make_providers()[name]
    if reason := provider.left_out(case):
        pytest.skip(f"{name}: {reason}")
    return case, provider, bench_self.make_rows(size, dtype, torch.device("cpu"), seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.loss)
@pytest.mark.parametrize("name", [*LOSSES, "floor"])
def test_every_provider_passes_its_check(name, size, dtype):
    case, provider, rows = setup(name, size, dtype)
    check = provider.check(case, rows, provider.prepare(case)(rows))
    assert check.passed, check


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.loss)
@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_temperature_is_caught(name, size, monkeypatch):
    case, provider, rows = setup(name, size)
    bench_self.truth(rows)  # at the right temperature; kept
    monkeypatch.setattr(bench_self, "TEMPERATURE", 0.1001)
    assert not provider.check(case, rows, provider.prepare(case)(rows)).passed


@pytest.mark.parametrize("part", ["value", "gradient"])
@pytest.mark.parametrize("name", LOSSES)
def test_one_wrong_entry_is_caught(name, part):
    case, provider, rows = setup(name, SIZES[0])
    outputs = provider.prepare(case)(rows)
    wrong = outputs.value if part == "value" else outputs.gradients[-1]
    with torch.no_grad():
        wrong.view(-1)[0] += wrong.abs().max() * 1e-3
    assert not provider.check(case, rows, outputs).passed


def test_every_row_has_a_positive_and_the_views_share_memory():
    for size in (*SIZES, Size("sup_con", 2, 8), Size("sup_con", 200, 8)):
        rows = bench_self.make_rows(size, torch.float32, torch.device("cpu"), seed=0)
        assert int(torch.bincount(rows.labels)[rows.labels].min()) >= 2
        assert rows.views[1].data_ptr() == rows.features[size.N // 2].data_ptr()


def test_who_stores_similarities_is_left_out_by_size():
    large = bench_self.make_case(Size("sup_con", 32768, 256), torch.float32, torch.device("cpu"))
    reasons = {name: provider.left_out(large) for name, provider in bench_self.make_providers().items()}
    assert reasons["idiomatic"] == "N × N is 4 GiB, limit 256 MiB"
    assert reasons["native"] is None


def test_truth_of_large_sizes_comes_from_the_native_backend(monkeypatch):
    rows = bench_self.make_rows(SIZES[1], torch.float32, torch.device("cpu"), seed=3)
    expected, _ = bench_self.truth(rows)
    bench_self.truth.cache_clear()
    monkeypatch.setattr(bench_self, "STORED_LIMIT", 1 << 10)
    for name, value in bench_self.truth(rows)[0].items():
        torch.testing.assert_close(value, expected[name])
    bench_self.truth.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "64x32", "clip:64x32", "sup_con:0x4", "sup_con:7x4", "nt_xent:8", "sup_con:8x4x2"][:]
)
def test_bad_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        Size.parse(text)


def test_a_run_writes_its_table_figures_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "INPUT_LIMIT", 1 << 16)
    assert bench_self.main(["--sizes", "nt_xent:16x8", "sup_con:64x16", "--out", str(tmp_path)]) == 0
    with (tmp_path / "bench_self-partial.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["provider"]) for r in rows] == [
        (case, name) for case in ("nt_xent, N=16, D=8", "sup_con, N=64, D=16") for name in EVERYONE
    ]
    figures = json.loads((tmp_path / "bench_self-partial.json").read_text())["figures"]
    assert [f["verdict"] for f in figures] == ["not measured"] * 6
    assert (tmp_path / "bench_self-partial.png").read_bytes().startswith(b"\x89PNG")
    assert "fastest other" in capsys.readouterr().out
