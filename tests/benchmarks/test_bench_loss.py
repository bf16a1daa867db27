"""Every provider of bench_loss.py computes the same loss, a wrong one is caught, and a run leaves its files."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json

import bench_loss
import command
import harness
import pytest
import torch
from bench_loss import Size

from seer_kernels import backends

SIZE = Size(2, 12, 40)
LOSSES = ("native", "idiomatic", "paper", "pml", "st", "open_clip")
EVERYONE = ("native", "triton", "idiomatic", "compiled", "paper", "pml", "st", "open_clip", "inf_cl", "floor")


def setup(name: str, dtype: torch.dtype = torch.float32, loss: str = "info_nce"):
    size = dataclasses.replace(SIZE, loss=loss)
    case = bench_loss.make_case(size, dtype, torch.device("cpu"))
    provider = bench_loss.make_providers()[name]
    if reason := provider.left_out(case):
        pytest.skip(f"{name}: {reason}")
    return case, provider, bench_loss.make_pairs(size, dtype, torch.device("cpu"), seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", bench_loss.LOSSES)
@pytest.mark.parametrize("name", [*LOSSES, "floor"])
def test_every_provider_passes_its_check(name, loss, dtype):
    case, provider, pairs = setup(name, dtype, loss)
    check = provider.check(case, pairs, provider.prepare(case)(pairs))
    assert check.passed, check


def test_the_compiled_one_passes_its_check():
    case, provider, pairs = setup("compiled")
    check = provider.check(case, pairs, provider.prepare(case)(pairs))
    assert check.passed, check


@pytest.mark.parametrize("loss", bench_loss.LOSSES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_temperature_is_caught(name, loss, monkeypatch):
    case, provider, pairs = setup(name, loss=loss)
    bench_loss.truth(pairs)  # at the right temperature; kept
    monkeypatch.setattr(bench_loss, "TEMPERATURE", 0.1001)
    assert not provider.check(case, pairs, provider.prepare(case)(pairs)).passed


@pytest.mark.parametrize("part", ["value", "query gradient", "key gradient"])
@pytest.mark.parametrize("name", [*LOSSES, "floor"])
def test_one_wrong_entry_is_caught(name, part):
    case, provider, pairs = setup(name)
    outputs = provider.prepare(case)(pairs)
    wrong = {"value": outputs.value, "query gradient": outputs.gradients[0], "key gradient": outputs.gradients[-1]}
    with torch.no_grad():
        wrong[part].view(-1)[0] += wrong[part].abs().max() * 1e-3
    assert not provider.check(case, pairs, outputs).passed


def test_rounds_of_inputs_differ_and_are_never_zero():
    a, b = (bench_loss.make_pairs(SIZE, torch.float32, torch.device("cpu"), seed) for seed in range(2))
    assert not torch.equal(a.query, b.query)
    assert all(bool((x != 0).all()) for x in (a.query, a.key))
    assert a.queries[1].data_ptr() == a.query[1].data_ptr()
    cosine = torch.nn.functional.cosine_similarity(a.query, a.key, dim=-1).mean().item()
    assert 0.1 < cosine < 0.5


def test_the_broadcasting_formula_is_left_out_by_size():
    paper = bench_loss.make_providers()["paper"]

    def reason(N: int, D: int) -> str | None:
        return paper.left_out(bench_loss.make_case(Size(1, N, D), torch.float32, torch.device("cpu")))

    assert reason(256, 4096) is None
    assert reason(1024, 1024) == "N × N × D is 4 GiB, limit 1 GiB"


def test_floor_allocates_nothing():
    case, provider, pairs = setup("floor")
    call = provider.prepare(case)
    assert harness.peak_memory(lambda: call(pairs), torch.device("cpu"))[0] == 0


def test_idiomatic_memory_at_least_holds_the_logits_and_the_normalised_copies():
    case, provider, pairs = setup("idiomatic")
    call = provider.prepare(case)
    gradients = 2 * SIZE.P * SIZE.N * SIZE.D
    logits = SIZE.P * SIZE.N**2
    peak = harness.peak_memory(lambda: call(pairs), torch.device("cpu"))[0]
    # at the end of the forward pass: two normalised copies and the log-probabilities of every problem
    assert peak + 4 * gradients >= 4 * (gradients + logits)


@pytest.mark.parametrize(
    "text", ["", "abc", "12", "clip:12", "nt_xent:12x4", "0x4", "4x0", "-2x4", "1x2x3x4", "1x64", "12X4"]
)
def test_bad_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        Size.parse(text)


def test_sizes():
    assert Size.parse("1024x128") == Size(1, 1024, 128)
    assert Size.parse("3x32x4096") == Size(3, 32, 4096)
    assert Size.parse("clip:64x32") == Size(1, 64, 32, "clip")
    assert Size.parse("siglip:2x64x32").name == "siglip, N=64, D=32, 2 problems"
    regimes = [size.regime for size in bench_loss.SIZES if size.loss == "info_nce"]
    assert regimes == ["launch latency"] * 2 + ["small D"] + ["products dominate"] * 3


def test_who_compiles_is_measured_on_a_cpu_only_where_named():
    everyone, case = bench_loss.make_providers(), bench_loss.make_case(SIZE, torch.float32, torch.device("cpu"))
    for names, device, reason in (
        (None, "cpu", "on CPUs only where --providers names it"),
        (None, "cuda", None),
        (["compiled"], "cpu", None),
    ):
        chosen = {p.name: p for p in command.chosen(everyone, names, torch.device(device))}
        assert [*chosen] == (names or [*everyone])
        assert chosen["compiled"].left_out(case) == reason
        assert names or chosen["idiomatic"].left_out(case) is None


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "INPUT_LIMIT", 1 << 16)


def test_a_run_writes_its_table_figures_and_picture(tmp_path, capsys, brief):
    assert bench_loss.main(["--sizes", "8x16", "clip:6x32", "--out", str(tmp_path)]) == 0
    with (tmp_path / "bench_loss-partial.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["provider"]) for r in rows] == [
        (case, name) for case in ("N=8, D=16", "clip, N=6, D=32") for name in EVERYONE
    ]
    for row in rows:
        if row["status"] == "ok":
            assert int(row["runs"]) >= harness.CALLS[0]
            assert float(row["time_vs_floor"]) > 0
            assert float(row["error"]) <= float(row["tolerance"])
    figures = json.loads((tmp_path / "bench_loss-partial.json").read_text())["figures"]
    assert [f["verdict"] for f in figures] == ["not measured"] * 4
    assert (tmp_path / "bench_loss-partial.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "pytorch-metric-learning" in printed
    assert "clip, N=6," in printed  # the rest is on the next line where many packages have columns
    assert "Inf-CL: left out: " in printed


def test_a_failed_check_sets_the_exit_code_and_leaves_no_time(tmp_path, capsys, brief, monkeypatch):
    providers = bench_loss.make_providers()
    idiomatic = providers["idiomatic"]
    wrong = dataclasses.replace(idiomatic, check=lambda case, pairs, outputs: harness.Check("loss", 1.0, 1e-6))
    monkeypatch.setattr(bench_loss, "make_providers", lambda *limit: providers | {"idiomatic": wrong})
    arguments = ["--sizes", "8x16", "--providers", "idiomatic", "floor", "--dtype", "float64", "--out", str(tmp_path)]
    assert bench_loss.main(arguments) == 1
    with (tmp_path / "bench_loss-float64-partial.csv").open(newline="") as file:
        failed, floor = csv.DictReader(file)
    assert (failed["status"], failed["median_ms"], failed["runs"]) == ("failed", "", "0")
    assert floor["status"] == "ok"
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "failed idiomatic on N=8, D=16" in captured.err


def test_the_failure_of_another_package_is_none_of_the_run(tmp_path, brief, monkeypatch):
    providers = bench_loss.make_providers()
    wrong = dataclasses.replace(providers["idiomatic"], check=lambda *_: harness.Check("loss", 1.0, 1e-6), foreign=True)
    monkeypatch.setattr(bench_loss, "make_providers", lambda *limit: providers | {"idiomatic": wrong})
    assert bench_loss.main(["--sizes", "8x16", "--providers", "idiomatic", "floor", "--out", str(tmp_path)]) == 0
    with (tmp_path / "bench_loss-partial.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["status"] == "failed"


@pytest.mark.skipif("cpu" not in backends()["native"].devices, reason=backends()["native"].reason)
def test_native_is_measured_where_it_is_built(tmp_path, brief):
    assert bench_loss.main(["--sizes", "8x16", "--providers", "native", "--out", str(tmp_path)]) == 0
    with (tmp_path / "bench_loss-partial.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["status"], row["time_vs_native"], row["time_vs_floor"]) == ("ok", "1.0", "")


def test_a_missing_peer_is_left_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = bench_loss.make_case(SIZE, torch.float32, torch.device("cpu"))
    for name in ("pml", "st"):
        assert bench_loss.make_providers()[name].left_out(case) == "not installed"
