"""Loading a model or a checkpoint runs no code that comes with it; no name in the data becomes the name of a file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seer import ConceptDataset, SeerConfig, SeerTrainer
from seer.errors import InputError
from seer.prototypes import Prototypes
from seer.train import load_model


class Hostile:
    """A pickle that leaves a file behind where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "was-here"


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_hostile_pickles_do_run_where_they_are_trusted(trace: Path, tmp_path: Path) -> None:
    """What the other tests look for does happen without their protection."""
    torch.save(Hostile(trace), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert trace.exists()


def test_pickled_weights_are_refused(folder: Path, trace: Path, make_config: Callable[..., SeerConfig]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Hostile(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"--model: .*safetensors"):
        load_model(make_config(model=str(folder)))
    assert not trace.exists()


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(
    part: str, folder: Path, trace: Path, make_config: Callable[..., SeerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> str:
        raise AssertionError("somebody was asked whether to run the code")

    monkeypatch.setattr("builtins.input", never)
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    values = json.loads((folder / part).read_text())
    values["auto_map"] = {
        "AutoConfig": "own.Config",
        "AutoModel": "own.Model",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Tokenizer", None],
    }
    if part == "config.json":
        values["model_type"] = "own"
    else:
        values["tokenizer_class"] = "OwnTokenizer"
    (folder / part).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"--model: expected .* contains custom code"):
        load_model(make_config(model=str(folder)))
    assert not trace.exists()


def test_a_hostile_checkpoint_is_refused(
    trace: Path,
    make_config: Callable[..., SeerConfig],
    make_model: Callable[[str], PreTrainedModel],
    dataset: ConceptDataset,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = make_config(max_steps=1, save_strategy="steps", save_steps=1)
    SeerTrainer(make_model("llama"), config, dataset, tokenizer).train()
    (checkpoint,) = Path(str(config.output_dir)).glob("checkpoint-*")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Hostile(trace), checkpoint / name)
    config = make_config(max_steps=2, save_strategy="no")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        SeerTrainer(make_model("llama"), config, dataset, tokenizer).train(resume_from_checkpoint=str(checkpoint))
    assert not trace.exists()


def test_names_of_concepts_never_become_names_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    names = ["../../up", "/root/absolute", "nul\0", "a/b", "..", "con", "x" * 5000]
    saved = Prototypes(names, {0: torch.randn(len(names), 4)})
    saved.save(folder / "prototypes.safetensors")
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {
        "inner",
        "inner/prototypes.safetensors",
    }
    assert list(Prototypes.load(folder / "prototypes.safetensors").concepts) == names
