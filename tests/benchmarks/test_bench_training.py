"""Both steps of bench_training.py optimise the same loss over the same pairs, with the passes they are said to make."""

from __future__ import annotations

import argparse
import csv
import logging
from functools import partial

import pytest
import torch

bench_training = pytest.importorskip("bench_training")
from bench_training import Size  # noqa: E402

from seer.layers import find_layers, lm_head  # noqa: E402

CPU = torch.device("cpu")
STEPS = {"seer": bench_training.SeerStep, "reference": bench_training.PaperStep}
PACKED = {"packed": partial(bench_training.SeerStep, packing=True)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The demo's model and texts, which need no file outside of the package, cut short."""
    monkeypatch.setattr(bench_training, "PLACE", {"model": "demo", "data": str(bench_training.DEMO_DATA)})
    monkeypatch.setattr(bench_training, "HALF", 40)
    yield
    logging.getLogger("seer").setLevel(logging.NOTSET)  # the benchmark silences it


def setup(name: str, size: Size, folder):
    case = bench_training.make_case(size, torch.float32, CPU)
    return (STEPS | PACKED)[name](case, str(folder)), bench_training.make_pairs(size, torch.float32, CPU, 1)


@pytest.mark.parametrize("size", [Size(1, 3), Size(2, 3), Size(1, 3, "full")], ids=lambda size: size.name)
@pytest.mark.parametrize("name", [*STEPS, *PACKED])
def test_a_step_disentangles_as_plain_passes_say_and_then_trains(name, size, tmp_path):
    step, pairs = setup(name, size, tmp_path)
    check = step.check(pairs)
    assert check.passed, check
    losses = [float(step(pairs).value) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", STEPS)
def test_a_wrong_loss_is_caught(name, tmp_path, monkeypatch):
    step, pairs = setup(name, Size(1, 3), tmp_path)
    if name == "seer":
        monkeypatch.setattr(bench_training, "TEMPERATURE", 0.02)  # of what it is compared with
    if name == "reference":
        disentangle = step.disentangle
        monkeypatch.setattr(step, "disentangle", lambda views: disentangle(views) * 1.01)
    assert not step.check(pairs).passed


@pytest.mark.parametrize("layers", [1, 3])
def test_passes_and_tokens(layers, tmp_path):
    """Ours: the base model and the adapted one, once each. The paper's: two per target layer, and two more."""
    seen = {}
    for name in STEPS:
        step, pairs = setup(name, Size(layers, 2), tmp_path)
        rows = seen[name] = []
        root = bench_training.find_layers(step.model).root
        root.register_forward_pre_hook(
            lambda _, args, inputs, rows=rows: rows.append(inputs["input_ids"].shape), with_kwargs=True
        )
        step(pairs)
    assert seen["reference"] == [(2, 80)] * (2 * layers + 2)
    assert [rows for rows, _ in seen["seer"]] == [2, 4]
    assert all(tokens <= 80 for _, tokens in seen["seer"])


def test_texts_that_fill_the_window_fill_it(tmp_path):
    step, pairs = setup("seer", Size(1, 3, "full"), tmp_path)
    mask = step.batch(pairs)["attention_mask"]
    assert mask.shape[1] > 0.8 * 80
    assert float(mask.float().mean()) > 0.8


def test_the_share_outside_of_the_model(tmp_path):
    step, pairs = setup("seer", Size(1, 2), tmp_path)
    marks = bench_training.Marks(CPU)
    with marks.watch(step.model):
        seconds = marks.step(step, pairs)
    assert 0.2 * seconds < marks.model < seconds


class TicksOfTheHead(bench_training.Marks):
    """Marks by a clock that only a pass through the projection onto the vocabulary moves."""

    ticks = 0

    def _now(self):
        return float(self.ticks)

    def tick(self, *_):
        self.ticks += 1


@pytest.mark.parametrize("name", STEPS)
def test_the_projection_onto_the_vocabulary_is_part_of_the_model(name, tmp_path):
    step, pairs = setup(name, Size(1, 2), tmp_path)
    marks = TicksOfTheHead(CPU)
    head = lm_head(find_layers(step.model))
    with marks.watch(step.model):
        head.register_forward_hook(marks.tick, prepend=True)
        head.register_full_backward_hook(marks.tick, prepend=True)
        seconds = marks.step(step, pairs)
    assert marks.model == seconds > 2


def test_a_run_leaves_its_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_training.harness, "BUDGET", 0.0)
    arguments = ["--sizes", "1x2", "--out", str(tmp_path), "--model", "demo"]
    assert bench_training.main([*arguments, "--data", str(bench_training.DEMO_DATA)]) == 0
    with (tmp_path / "bench_training-partial.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert rows["own"]["status"] == "left out"
    ours, reference = rows["seer"], rows["reference"]
    assert float(ours["speedup_vs_reference"]) == pytest.approx(
        float(ours["steps_per_second"]) * float(reference["median_ms"]) / 1e3, rel=1e-2
    )
    assert float(reference["speedup_vs_reference"]) == 1
    assert 0 < float(ours["share_outside_model"]) < 1
    assert int(ours["peak_bytes"]) > 0


def test_large_vocabulary(tmp_path):
    """For the model's own passes, which ours are measured beside; the paper's step is left out."""
    case = bench_training.make_case(Size(1, 2, "vocabulary"), torch.float32, CPU)
    step = bench_training.OwnPasses(case, str(tmp_path))
    assert step.model.get_input_embeddings().num_embeddings == bench_training.VOCABULARY
    assert bench_training.make_providers()["reference"].left_out(case)


@pytest.mark.parametrize("text", ["", "8", "1x1", "0x8", "1x8:long"])
def test_bad_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        Size.parse(text)
