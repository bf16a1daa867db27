"""The command `seer demo`, on fewer steps than it takes by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import seer.demo
import seer.demo.language_model
from seer import ConceptDataset
from seer.cli import main
from seer.demo import run_demo
from seer.errors import InputError

FILES = {"model", "seer", "before_after.png", "made-by-seer-demo.txt"}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> list[ConceptDataset]:
    """Shorten both trainings. Returns the data sets that the language model reads."""
    read: list[ConceptDataset] = []
    train = seer.demo.language_model.train_language_model

    def short(model: Any, tokenizer: Any, dataset: ConceptDataset, *, seed: int) -> None:
        read.append(dataset)
        kept = [int(i) for c in range(len(dataset.names)) for i in np.flatnonzero(dataset.concept_ids == c)[:7]]
        few = ConceptDataset([dataset.texts[i] for i in kept], [dataset.concepts[i] for i in kept])
        train(model, tokenizer, few, seed=seed, epochs=1)

    monkeypatch.setattr("seer.demo.language_model.train_language_model", short)
    monkeypatch.setitem(seer.demo._OPTIONS, "max_steps", 2)
    return read


def test_leaves_a_model_a_run_and_a_picture(tmp_path, monkeypatch, capsys, few_steps) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    out = tmp_path / "seer-demo"
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "before_after.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "seer-demo/before_after.png" in printed
    metrics = json.loads((out / "seer" / "metrics.json").read_text())
    (layer,) = metrics["held_out"]["layers"].values()
    assert f"{layer['after']['nearest_prototype_accuracy']:.3f}" in printed
    assert metrics["samples"]["held_out"] == pytest.approx(0.2 * 708, abs=6)

    AutoModelForCausalLM.from_pretrained(out / "model").load_adapter(out / "seer")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.decode(tokenizer("Why?")["input_ids"]) == "Why?"


def test_the_language_model_never_reads_what_is_measured(tmp_path, few_steps) -> None:
    run_demo(["--output_dir", str(tmp_path), "--seed", "3"])
    options = yaml.safe_load((tmp_path / "seer" / "config.yaml").read_text())
    every = ConceptDataset.load(options["data"])
    _, held_out = every.split(options["held_out_share"], options["seed"])
    assert held_out is not None
    (read,) = few_steps
    measured, seen = ({text.prompt for text in part.texts} for part in (held_out, read))
    assert options["seed"] == 3
    assert not measured & seen
    assert measured | seen == {text.prompt for text in every.texts}
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
    assert "bassoon" not in vocabulary


def test_the_seed_decides_everything(tmp_path, few_steps) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run_demo(["--output_dir", str(tmp_path / name), "--seed", seed])

    def weights(name: str) -> dict[str, Any]:
        return {
            f"{file.name} {key}": value.numpy().tobytes()
            for file in sorted((tmp_path / name).rglob("*.safetensors"))
            for key, value in load_file(file).items()
        }

    a, b, c = weights("a"), weights("b"), weights("c")
    assert len(a) > 40
    assert a == b
    assert all(a[key] != c[key] for key in a if "norm" not in key)
    pictures = [(tmp_path / name / "before_after.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_second_run_replaces_the_first_and_nothing_else(tmp_path, few_steps) -> None:
    out = tmp_path / "out"
    run_demo(["--output_dir", str(out)])
    first = (out / "before_after.png").read_bytes()
    notes = [out / "notes.txt", out / "model" / "notes.txt", out / "seer" / "notes.txt"]
    for path in notes:
        path.write_text("mine")
    run_demo(["--output_dir", str(out), "--seed", "1"])
    assert (out / "before_after.png").read_bytes() != first
    assert yaml.safe_load((out / "seer" / "config.yaml").read_text())["seed"] == 1
    assert [path.read_text() for path in notes] == ["mine"] * 3


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, capsys, few_steps) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "--output_dir: expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]
    assert (tmp_path / "model" / "config.json").read_text() == "mine"
    assert not few_steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295, got -1"),
        (["--model", "x"], "unrecognized arguments: --model x"),
        (["--output_dir", "file"], "--output_dir: expected a folder"),
        (["--output_dir", "file/below"], "--output_dir: expected a folder"),
    ],
)
def test_bad_arguments_are_named(tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(InputError, match=message):
        run_demo(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for word in ("--output_dir", "--seed", "seer-demo", "before_after.png", "No download"):
        assert word in printed
