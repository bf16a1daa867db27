"""The harness counts every byte, takes turns, times nobody who is wrong, and words verdicts and ratios correctly."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os

import harness
import pytest
import torch
from harness import Case, Check, Figure, Measurement, Outputs, Provider

CPU = torch.device("cpu")
FLOAT = 4  # bytes
CASE = Case("small", {"N": 2})
RIGHT, WRONG = Check("loss", 1e-7, 1e-6), Check("loss", 1e-3, 1e-6)


def outputs(*gradients: torch.Tensor) -> Outputs:
    return Outputs(torch.tensor(0.0), gradients)


def peak(call) -> int:
    return harness.peak_memory(call, CPU)[0]


SCALAR = peak(lambda: outputs())
"""Bytes of the loss itself, which counts."""


def test_a_scalar_loss_is_counted():
    assert SCALAR == FLOAT


def test_one_temporary_of_known_size():
    def call():
        temporary = torch.empty(1000)
        del temporary
        return outputs()

    assert peak(call) == 1000 * FLOAT


def test_temporaries_add_up_only_while_they_live_together():
    def apart():
        for _ in range(3):
            temporary = torch.empty(1000)
            del temporary
        return outputs()

    def together():
        kept = [torch.empty(1000) for _ in range(3)]
        del kept
        return outputs()

    assert peak(apart) == 1000 * FLOAT
    assert peak(together) == 3000 * FLOAT


def test_temporaries_inside_operators_and_backward_are_counted():
    x = torch.ones(1000, requires_grad=True)

    def call():
        loss = (x.exp() * 2).sum()
        return Outputs(loss, torch.autograd.grad(loss, x))

    # at the end of backward: exp(x), the gradient with respect to it, and the returned gradient, which is not counted
    assert 2000 * FLOAT <= peak(call) <= 2000 * FLOAT + 64


def test_returned_gradients_are_not_counted():
    assert peak(lambda: outputs(torch.empty(1000), torch.empty(500))) == SCALAR


def test_gradients_written_into_existing_memory_are_not_deducted():
    gradient = torch.empty(1000)

    def call():
        temporary = torch.empty(700)
        del temporary
        return outputs(gradient)

    # nothing but the scalar outlives the call, so nothing but the scalar can be deducted
    assert 700 * FLOAT - SCALAR <= peak(call) <= 700 * FLOAT


def test_releasing_what_existed_before_does_not_hide_an_allocation():
    held = [torch.empty(5000)]

    def call():
        held.clear()
        temporary = torch.empty(1000)
        del temporary
        return outputs()

    assert peak(call) == 1000 * FLOAT


def provider(name: str, log: list[str] | None = None, check: Check = RIGHT, **options) -> Provider:
    def run(x: int) -> Outputs:
        if log is not None:
            log.append(f"{name}{x}")
        return outputs()

    return Provider(name, name, lambda case: run, lambda case, inputs, outputs: check, **options)


def test_providers_take_turns_and_inputs_rotate(monkeypatch):
    monkeypatch.setattr(harness, "CALLS", (6, 6))
    log: list[str] = []
    results = harness.measure(CASE, [provider("a", log), provider("b", log)], range(3), CPU)
    assert log[:4] == ["a0", "b0", "a2", "b2"]  # checks, then warming up
    assert "".join(entry[0] for entry in log[4:]) == "abba" * 3
    assert "".join(entry[1] for entry in log[4:]) == "012" * 4
    assert [(r.status, len(r.seconds)) for r in results] == [("ok", 6), ("ok", 6)]
    assert all(r.peak_bytes == SCALAR and r.check == RIGHT for r in results)


def test_costly_providers_are_called_less_often_and_evenly_spread(monkeypatch):
    monkeypatch.setattr(harness, "CALLS", (3, 9))
    monkeypatch.setattr(harness, "WARM_CALL", 0.0)
    log: list[str] = []
    calls = {name: (lambda x, name=name: (log.append(name), outputs())[1]) for name in "ab"}
    times, _ = harness._take_turns(calls, {"a": 1e-9, "b": 1e9}, [0], CPU, 1.0, print)
    assert {name: len(t) for name, t in times.items()} == {"a": 9, "b": 3}
    assert [log[:i].count("a") for i, name in enumerate(log) if name == "b"] == [1, 3, 7]


def test_a_very_slow_provider_is_timed_by_its_checked_call(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_CALL", 0.0)
    log: list[str] = []
    (result,) = harness.measure(CASE, [provider("a", log)], range(2), CPU)
    assert (log, len(result.seconds), result.status) == (["a0"], 1, "ok")


def test_a_wrong_provider_is_never_timed():
    log: list[str] = []
    wrong, right = harness.measure(CASE, [provider("a", log, WRONG), provider("b", log)], range(2), CPU, budget=0.0)
    assert (wrong.status, wrong.seconds, wrong.peak_bytes) == ("failed", (), None)
    assert "loss: relative error 1.0e-03" in wrong.reason
    assert log.count("a0") == 1
    assert "a1" not in log
    assert len(right.seconds) >= harness.CALLS[0]


def test_a_wrong_provider_is_never_timed_even_when_slow(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_CALL", 0.0)
    (result,) = harness.measure(CASE, [provider("a", check=WRONG)], range(2), CPU)
    assert (result.status, result.seconds) == ("failed", ())


def test_an_exception_fails_its_provider_only():
    def broken(case: Case):
        raise MemoryError("asked for 34 GB")

    providers = [dataclasses.replace(provider("a"), prepare=broken), provider("b")]
    a, b = harness.measure(CASE, providers, range(2), CPU, budget=0.0)
    assert (a.status, a.reason) == ("failed", "MemoryError: asked for 34 GB")
    assert b.status == "ok"


def test_a_backend_that_does_not_serve_a_problem_is_left_out():
    def refusing(case: Case):
        raise RuntimeError("backend='native' cannot run on cuda: small ones only. Available there: 'auto', 'triton'")

    (result,) = harness.measure(CASE, [dataclasses.replace(provider("a"), prepare=refusing)], range(2), CPU)
    assert (result.status, result.reason) == ("left out", "backend='native' cannot run on cuda: small ones only")


def test_a_provider_may_report_the_peak_of_its_own_processes():
    counted = provider("ours", detail=lambda case, inputs: {"peak_bytes": 12345, "else": 1.0})
    (m,) = harness.measure(CASE, [counted], [torch.ones(2)], CPU, budget=0.0)
    assert (m.peak_bytes, m.detail) == (12345, {"else": 1.0})


def test_processes_that_were_started_are_not_others(monkeypatch):
    class Started:
        pid = os.getpid()

    before = harness._BusyElsewhere._read()
    monkeypatch.setattr(harness.multiprocessing, "active_children", lambda: [Started()])
    after = harness._BusyElsewhere._read()
    if before is None or after is None:
        pytest.skip("no /proc/stat here")
    assert after[1] > 1.5 * before[1] > 0  # this process, counted as its own child too


def test_ceilings_are_rates_of_known_work(monkeypatch):
    monkeypatch.setattr(harness, "_last_level_cache", lambda device: 1 << 20)
    monkeypatch.setattr(harness, "_timed", lambda call, device: (call(), 0.5))
    assert harness.ceilings(CPU, torch.float32) == (2 * 1024**3 / 0.5, 2 * (4 << 20) / 0.5)


def test_a_provider_left_out_says_why_and_never_runs():
    log: list[str] = []
    (result,) = harness.measure(CASE, [provider("a", log, left_out=lambda case: "not installed")], range(2), CPU)
    assert (result.status, result.reason, result.seconds, log) == ("left out", "not installed", (), [])


@pytest.mark.parametrize("error", [math.nan, math.inf, 2e-6])
def test_checks_reject(error):
    assert not Check("loss", error, 1e-6).passed


def test_compare_names_the_output_that_breaks_its_tolerance():
    expected = {"loss": torch.tensor(2.0).double(), "gradient": torch.ones(3).double()}
    tolerances = {"loss": 1e-6, "gradient": 1e-3}
    off = {"loss": torch.tensor(2.002), "gradient": torch.ones(3) * 1.005}
    check = harness.compare(off, expected, tolerances)
    assert (check.output, check.passed) == ("loss", False)
    assert check.error == pytest.approx(1e-3, rel=1e-3)
    assert harness.compare({**off, "loss": torch.tensor(2.0)}, expected, tolerances).output == "gradient"
    nan = harness.compare({**off, "gradient": torch.full((3,), math.nan)}, expected, tolerances)
    assert (nan.output, nan.passed) == ("gradient", False)
    assert not harness.compare({**off, "gradient": torch.ones(4)}, expected, tolerances).passed


def test_tolerance_follows_the_yardstick_and_rejects_a_wrong_one():
    assert harness.tolerance(1e-5, torch.float32) == pytest.approx(4e-5)
    assert harness.tolerance(0.0, torch.float32) == pytest.approx(16 * torch.finfo(torch.float32).eps)
    for wrong in (0.01, math.inf, math.nan):
        with pytest.raises(RuntimeError, match="idiomatic torch differs from the fp64 reference"):
            harness.tolerance(wrong, torch.float32)


def test_quartiles_and_ratios():
    a = Measurement(CASE, provider("a"), "ok", seconds=(1.0, 2.0, 3.0, 4.0, 100.0), peak_bytes=3 << 20)
    b = Measurement(CASE, provider("b"), "ok", seconds=(6.0,), peak_bytes=0)
    c = Measurement(CASE, provider("c"), "left out", "too large")
    assert a.quartiles == (2.0, 3.0, 4.0)
    assert b.quartiles == (6.0, 6.0, 6.0)
    assert all(math.isnan(q) for q in c.quartiles)
    assert harness.time_ratio([a, b, c], "small", "b", "a") == 2.0
    assert harness.time_ratio([a, b, c], "small", "c", "a") is None
    assert harness.time_ratio([a, b, c], "large", "b", "a") is None
    assert harness.peak_mebibytes([a, b, c], "small", "a") == 3.0
    assert harness.peak_mebibytes([a, b, c], "small", "c") is None

    first, second, third = harness.rows("loss", [a, b, c], {"torch": "2.6"}, [a.provider, b.provider, c.provider])
    assert (first["median_ms"], first["quartile_1_ms"], first["quartile_3_ms"], first["runs"]) == (3e3, 2e3, 4e3, 5)
    assert (first["time_vs_a"], first["time_vs_b"], first["time_vs_c"]) == (1.0, 0.5, "")
    assert (second["time_vs_a"], second["peak_bytes"]) == (2.0, 0)
    assert (third["status"], third["reason"], third["median_ms"], third["time_vs_a"]) == (
        "left out",
        "too large",
        "",
        "",
    )
    assert first["N"] == 2
    assert first["torch"] == "2.6"


@pytest.mark.parametrize(
    ("measured", "at_most", "verdict"),
    [(1.0, True, "met"), (1.1, True, "met"), (1.2, True, "missed"), (1.2, False, "met"), (1.0, False, "missed")],
)
def test_verdicts(measured, at_most, verdict):
    assert Figure("ratio", measured, 1.1, at_most).verdict == verdict


def test_a_figure_without_a_measurement_is_neither_met_nor_missed():
    assert Figure("ratio", None, 1.1, True).verdict == "not measured"


def test_result_files(tmp_path):
    measurement = Measurement(CASE, provider("a"), "ok", seconds=(1.0,), peak_bytes=8)
    harness.write_csv(tmp_path / "r.csv", harness.rows("loss", [measurement], {"dirty": True}, [measurement.provider]))
    with (tmp_path / "r.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["case"], row["provider"], row["median_ms"], row["dirty"]) == ("small", "a", "1000.0", "True")
    harness.write_figures(tmp_path / "r.json", [Figure("ratio", 1.0, 1.1, True)], {"torch": "2.6"})
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["environment"] == {"torch": "2.6"}
    assert content["figures"][0]["verdict"] == "met"


def test_environment_names_what_is_needed_to_repeat_a_run():
    environment = harness.environment(CPU, ["torch", "no-such-package"])
    assert environment["torch"] == torch.__version__
    assert environment["no-such-package"] == ""
    assert environment["threads"] == torch.get_num_threads()
    assert environment["device"]
    assert isinstance(environment["dirty"], bool)


def test_input_sets_exceed_the_cache_within_the_limit(monkeypatch):
    monkeypatch.setattr(harness, "_last_level_cache", lambda device: 32 << 20)
    assert harness.input_sets(1 << 20, CPU) == 64
    assert harness.input_sets(1 << 30, CPU) == 2
    monkeypatch.setattr(harness, "_last_level_cache", lambda device: 1 << 40)
    assert harness.input_sets(1 << 28, CPU) == 4


def test_bytes_are_readable():
    assert [harness.format_bytes(n) for n in (0, 1023, 1536, 150 << 20, 6 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "150 MiB",
        "6 GiB",
    ]
