"""The job and the command: what they write, what they refuse, and how they say it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from seer import ConceptDataset, InputError, Prototypes, SeerConfig, SeerTrainer, check_run, run_training
from seer.arguments import parse_training_arguments
from seer.cli import main
from seer.config import PRESETS, RATE_TIMES_WIDTH
from seer.data import tokenize
from seer.layers import find_layers, forward_states

QUIET = ["--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture
def flags(model_folder: Path, data_file: Path, tmp_path: Path) -> list[str]:
    short = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "4"]
    return [
        "--model",
        str(model_folder),
        "--data",
        str(data_file),
        "--output_dir",
        str(tmp_path / "out"),
        *short,
        *QUIET,
    ]


def test_a_run_writes_adapter_prototypes_config_and_metrics(flags, data_file, tmp_path, capsys) -> None:
    config = parse_training_arguments([*flags, "--target_layers", "-1", "0", "--learning_rate", "1e-2"])
    result = run_training(config)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "prototypes.safetensors",
        "config.yaml",
        "metrics.json",
        "README.md",
        "checkpoint-4",
        "tokenizer.json",
    }
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["samples"] == {"training": 15, "held_out": 3}
    assert metrics["target_layers"] == [0, 2]
    assert metrics["held_out"]["kl_to_base_nats_per_token"]["after"] > 0
    printed = capsys.readouterr().out
    for layer in (0, 2):
        after = metrics["held_out"]["layers"][str(layer)]["after"]
        assert f"{after['different_concept_cosine']:.3f}" in printed
        assert after["same_concept_cosine"] is None  # three samples of three concepts
    assert printed.count("held-out samples") == 1

    # What is on disk gives the representations and prototypes of the run.
    model = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    training, held_out = ConceptDataset.load(str(data_file)).split(0.2, config.seed)
    assert result.concepts == held_out.concepts

    def represent(dataset: ConceptDataset) -> dict[int, torch.Tensor]:
        states = []
        for ids, _ in tokenize(tokenizer, dataset.texts, 64):
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
            with torch.no_grad():
                layers = forward_states(model, inputs, find_layers(model)).layers
            states.append(torch.stack([layers[layer][0, -1] for layer in (0, 2)]))
        return dict(zip((0, 2), torch.stack(states, dim=1), strict=True))

    held_out_states, training_states = represent(held_out), represent(training)
    ids = torch.from_numpy(training.concept_ids)
    prototypes = Prototypes.load(out / "prototypes.safetensors")
    expected = Prototypes.from_representations(training_states, ids, training.names)
    assert prototypes.concepts == ["animal", "fruit", "metal"]
    for layer in (0, 2):
        assert result.representations_after[layer].dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(result.representations_after[layer]), held_out_states[layer])
        torch.testing.assert_close(prototypes.layers[layer], expected.layers[layer])
        assert np.abs(result.representations_before[layer] - result.representations_after[layer]).max() > 1e-3


def test_a_run_ends_with_a_card_and_curves(flags, tmp_path) -> None:
    more = ["--held_out_share", "0.5", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2"]
    metrics = run_training(parse_training_arguments([*flags, *more])).metrics
    out = tmp_path / "out"
    assert (out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == flags[1]
    for row in (
        "| animal | 3 |",
        "| layer | measure | before | after |",
        f"| torch | {metrics['versions']['torch']} |",
    ):
        assert row in card.text
    after = metrics["held_out"]["by_concept"]["2"]["fruit"]
    assert f"| 2 | fruit | {after['same_concept_cosine']:.3f} | {after['different_concept_cosine']:.3f} |" in card.text
    assert "![learning curves](learning_curves.png)" in card.text
    (options,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert options == (out / "config.yaml").read_text()


def test_figures_of_the_evaluations_reach_tensorboard(flags, tmp_path, monkeypatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    more = ["--report_to", "tensorboard", "--held_out_share", "0.5", "--logging_steps", "2"]
    run_training(parse_training_arguments([*flags, *more, "--eval_strategy", "steps", "--eval_steps", "2"]))
    events = event_accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    scalars = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name in ("train/L_d", "train/L_kl", "eval/kl_to_base", "eval/nearest_prototype_accuracy/animal"):
        assert scalars[name] == [2, 4]


def test_a_reporter_that_is_not_there_is_named(flags, tmp_path, monkeypatch, capsys) -> None:
    assert main(["train", *flags, "--report_to", "pigeons"]) == 2
    assert "--report_to: pigeons is not supported, only" in capsys.readouterr().err
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    assert main(["train", *flags, "--report_to", "wandb"]) == 2
    assert "--report_to: WandbCallback requires wandb to be installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_steps_is_a_dry_run(flags, data_file, tmp_path, capsys) -> None:
    dry = [*flags, "--max_steps", "0", "--retain_data", str(data_file)]
    assert main(["train", *dry]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for fact in ("animal 5, fruit 5, metal 5", "3 in model.layers; target 2", "4 per epoch", "12 rows x "):
        assert fact in printed
    assert "<user> name a <unk> <end> <assistant> apple <end>" in printed
    assert not (tmp_path / "out").exists()
    assert main(["train", *dry, "--target_layers", "7"]) == 2
    with pytest.raises(InputError, match=r"--max_steps: expected a number of steps, .* got 0; see seer\.check_run"):
        run_training(parse_training_arguments(dry))


def test_the_memory_estimate_counts_what_is_there(make_model, make_config, tokenizer, data_file) -> None:
    def estimate(**options):
        config = make_config(data=str(data_file), max_steps=0, **options)
        return check_run(config, model=make_model("llama"), tokenizer=tokenizer)

    small, large = estimate(), estimate(per_device_train_batch_size=8)
    base = sum(p.numel() for p in make_model("llama").parameters())
    trained = small.gradients_and_optimizer // 12
    assert small.weights == 4 * (base + trained)
    # Per token at least the input of each of 7 projections in 3 layers.
    assert small.activations > 8 * 15 * 3 * (3 * 32 + 32 + 2 * 32 + 48) * 4
    assert 1.8 < large.activations / small.activations < 2.2
    assert estimate(kl_weight=0.0).activations < small.activations


def test_training_raises_the_accuracy_on_separable_concepts(flags) -> None:
    more = ["--max_steps", "40", "--learning_rate", "1e-2", "--held_out_share", "0.5", "--save_strategy", "no"]
    metrics = run_training(parse_training_arguments([*flags, *more])).metrics["held_out"]["layers"]["2"]
    assert metrics["after"]["nearest_prototype_accuracy"] > metrics["before"]["nearest_prototype_accuracy"]
    gap = {when: values["same_concept_cosine"] - values["different_concept_cosine"] for when, values in metrics.items()}
    assert gap["after"] > gap["before"] + 0.3


def test_a_model_in_memory_and_nothing_held_out(make_model, make_config, tokenizer, data_file, capsys) -> None:
    config = make_config(data=str(data_file), max_steps=1, held_out_share=0.0)
    result = run_training(config, model=make_model("llama"), tokenizer=tokenizer)
    assert result.metrics["held_out"] is None
    assert result.metrics["samples"] == {"training": 18, "held_out": 0}
    assert result.representations_after == {}
    assert "held-out samples" not in capsys.readouterr().out


def test_the_written_config_is_the_run(flags, tmp_path) -> None:
    more = ["--target_layers", "-1", "--concepts", "metal", "fruit", "animal", "--lr_scheduler_type", "cosine"]
    more += ["--adam_beta2", "0.9", "--kl_weight", "0.5", "--lr_scheduler_kwargs", '{"num_cycles": 0.25}']
    config = parse_training_arguments([*flags, *more, "--overwrite_output_dir"])
    config.save(tmp_path / "c.yaml")
    again = parse_training_arguments([str(tmp_path / "c.yaml")])
    assert config.overwrite_output_dir
    assert not again.overwrite_output_dir
    again.overwrite_output_dir = True
    assert again.to_dict() == config.to_dict()
    assert parse_training_arguments([str(tmp_path / "c.yaml"), "--kl_weight", "2"]).kl_weight == 2.0
    (tmp_path / "c.json").write_text(json.dumps({"output_dir": "x", "target_layers": [-1, 0], "bf16": False}))
    assert parse_training_arguments([str(tmp_path / "c.json")]).target_layers == [-1, 0]


def test_the_reference_preset_is_the_recipe_of_the_paper(flags, tmp_path) -> None:
    config = parse_training_arguments([*flags, "--preset", "reference", "--same_label", "ignore", "--max_steps", "1"])
    expected = {
        **PRESETS["reference"],
        "same_label": "ignore",  # given, though it is what it would be without the preset
        "per_device_train_batch_size": 4,
    }
    saved = yaml.safe_load(Path(save(config, tmp_path)).read_text())
    for name, value in expected.items():
        assert saved[name] == value, name
        assert getattr(config, name) == value, name
    again = parse_training_arguments([save(config, tmp_path)])
    assert again.to_dict() == config.to_dict()
    in_python = SeerConfig(output_dir="o", preset="reference", use_cpu=True, same_label="ignore", learning_rate=3e-4)
    assert (in_python.same_label, in_python.learning_rate, in_python.kl_form) == ("ignore", 3e-4, "label")
    plain = SeerConfig(output_dir="o", use_cpu=True)
    assert (plain.kl_form, plain.bf16) == ("full", False)
    recipe = PRESETS["reference"]
    assert (recipe["learning_rate"], recipe["same_label"], recipe["kl_form"]) == (1e-4, "negative", "label")
    assert (recipe["view_dropout"], recipe["lora_r"], recipe["num_train_epochs"]) == (0.25, 16, 2.0)


def save(config: SeerConfig, folder: Path) -> str:
    config.save(folder / "preset.yaml")
    return str(folder / "preset.yaml")


def test_all_weights_are_written(flags, tmp_path) -> None:
    run_training(parse_training_arguments([*flags, "--adapter", "none", "--learning_rate", "1e-2"]))
    written = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = LlamaForCausalLM.from_pretrained(flags[1]).state_dict()
    assert not any(torch.equal(written[name], value) for name, value in before.items())
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_reference_preset_runs(flags) -> None:
    config = parse_training_arguments([*flags, "--preset", "reference", "--max_steps", "2"])
    result = run_training(config)
    assert result.metrics["target_layers"] == [2]


def replaced(flags: list[str], name: str, value: str) -> list[str]:
    return [*flags, f"--{name}", value]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "none.csv"], "none.csv: expected a file, got nothing there"),
        (["--model", "/no/such/model"], "--model: expected a folder or Hub name of a transformers model"),
        (["--target_layers", "3"], "--target_layers: expected layers from -3 to 2 (model.layers has 3 layers), got 3"),
        (["--concepts", "metal", "fruit"], "column concept: expected one of ['metal', 'fruit'], got 'animal'"),
        (["--layers_path", "model.blocks"], "--layers_path: expected the path of a non-empty nn.ModuleList"),
        (["--temperature", "0"], "--temperature: expected a number > 0, got 0.0"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295, got -1"),
        (["--held_out_share", "1"], "--held_out_share: expected a share from 0 up to but not 1, got 1.0"),
        (["--same_label", "both"], "argument --same_label/--same-label: invalid choice: 'both'"),
        (["--adapter", "none", "--quantization", "4bit"], "--quantization: expected none with --adapter none"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--learning_rat", "1"], "expected options, got '--learning_rat'; did you mean --learning_rate?"),
        (["--resume_from_checkpoint", "true"], "--resume_from_checkpoint: expected a checkpoint in --output_dir"),
        (["--resume_from_checkpoint", "/no"], "--resume_from_checkpoint: expected a checkpoint folder, got '/no'"),
        (["--load_best_model_at_end", "true"], "load_best_model_at_end requires the save and eval strategy to match"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(flags, more, message, capsys) -> None:
    assert main(["train", *flags, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("seer: error: ") or "\nseer: error: " in error
    assert message in error
    assert "Traceback" not in error


def test_missing_options_and_unknown_commands(model_folder, data_file, tmp_path, capsys) -> None:
    cases = {
        "--output_dir: expected a folder, got none": ["train", "--data", str(data_file)],
        "--data: expected texts by concept": ["train", "--output_dir", str(tmp_path / "o")],
        "--model: expected a local folder": ["train", "--output_dir", str(tmp_path / "p"), "--data", str(data_file)],
        "expected a command, one of train, demo, explain, faithfulness, evaluate, report, compare, prototypes": [
            "trane"
        ],
        "none.yaml: expected a readable file of options": ["train", str(tmp_path / "none.yaml")],
        "expected options or a .yaml or .json file, got 'data'": ["train", "data"],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    for content, message in {
        "tempratur: 1\n": "bad.yaml: expected names of options, got 'tempratur'; did you mean temperature?",
        "- 1\n": "bad.yaml: expected options as `name: value`, got list",
        "a: [\n": "bad.yaml: expected a readable file of options",
    }.items():
        (tmp_path / "bad.yaml").write_text(content)
        assert main(["train", str(tmp_path / "bad.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_bad_data_names_file_and_line(flags, tmp_path, capsys) -> None:
    file = tmp_path / "bad.csv"
    file.write_text("prompt,response,concept\na,b,x\nc,d,x\ne,f,y\n")
    assert main(["train", *flags, "--data", str(file)]) == 2
    assert f"{file}:4: expected two samples or more of concept 'y', got this one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_needs_its_package(flags, capsys) -> None:
    assert main(["train", *flags, "--quantization", "4bit"]) == 2
    assert "--quantization: expected the package bitsandbytes to be installed" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_bases_are_trained(flags, tokenizer, tmp_path, bits) -> None:
    """Wide enough for a block of four-bit weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    more = ["--model", str(tmp_path / "wide"), "--quantization", bits, "--learning_rate", "1e-2"]
    metrics = run_training(parse_training_arguments([*flags, *more])).metrics
    assert metrics["held_out"]["kl_to_base_nats_per_token"]["after"] > 0


def test_a_model_without_decoder_layers(flags, tmp_path, tokenizer, capsys) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "none")
    tokenizer.save_pretrained(tmp_path / "none")
    assert main(["train", *flags, "--model", str(tmp_path / "none")]) == 2
    assert "LlamaForCausalLM has no list of 0 layers" in capsys.readouterr().err


def test_help_shows_every_option_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in SeerConfig.__annotations__:
        assert name in text
    assert "Temperature of L_d. (default: 0.1, the paper's)" in text
    assert "(default: positive, seer's)" in text
    for line in ("--model MODEL Required.", "--temperature X", "--concepts_per_batch N", "{random,group_by_length}"):
        assert line in text
    assert "(default: 1, transformers')" in text
    assert main([]) == 0
    assert "seer train --help" in capsys.readouterr().out


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_steps_are_smaller_the_wider_the_model(flags, tmp_path) -> None:
    """Where no learning rate is given; the run's options hold the number."""
    run_training(parse_training_arguments([*flags, "--max_steps", "1"]))
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    width = AutoConfig.from_pretrained(config["model"]).hidden_size
    assert config["learning_rate"] == RATE_TIMES_WIDTH / width


def test_an_output_folder_holds_one_run_and_a_killed_one_resumes(flags, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        original = SeerTrainer.__init__
        patch.setattr(SeerTrainer, "__init__", lambda self, *a, **k: original(self, *a, **k, callbacks=[Kill()]))
        with pytest.raises(KeyboardInterrupt):
            main(["train", *flags])
    assert (out / "checkpoint-2").is_dir()
    assert not (out / "metrics.json").exists()

    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert f"--output_dir: expected a folder without another run, got {out} with config.yaml" in error

    assert main(["train", *flags, "--resume_from_checkpoint", "true", "--lora_r", "4"]) == 2
    expected = f"--resume_from_checkpoint: expected the run of {out}/checkpoint-2, which had --lora_r 16, now 4"
    assert expected in capsys.readouterr().err
    assert main(["train", str(out / "config.yaml"), "--resume_from_checkpoint", "true"]) == 0
    assert main(["train", *flags, "--output_dir", str(tmp_path / "whole")]) == 0
    resumed, whole = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    (out / "notes.txt").write_text("mine")
    (out / "evaluation.json").write_text("of the run that is replaced")
    assert main(["train", *flags, "--overwrite_output_dir", "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert not list(out.glob("checkpoint-*"))
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "evaluation.json").exists()


def test_importing_seer_does_not_load_torch() -> None:
    code = "import sys, seer; print(*{'torch', 'transformers', 'peft'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b""


SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}, the folder with a small real model and real texts")
def test_a_real_model_on_real_texts(tmp_path) -> None:
    """A few steps on a quarter of the rows; the held-out figures of a whole run need minutes."""
    whole = ConceptDataset.load(str(SHARED / "data" / "safety_concepts.csv"))
    with (tmp_path / "quarter.jsonl").open("w", encoding="utf-8") as file:
        for text, concept in [*zip(whole.texts, whole.concepts, strict=True)][::4]:
            row = {"prompt": text.prompt, "response": text.response, "concept": concept}
            file.write(json.dumps(row) + "\n")
    metrics = run_training(
        SeerConfig(
            output_dir=str(tmp_path / "out"),
            model=str(SHARED / "models" / "tiny-llama"),
            data=str(tmp_path / "quarter.jsonl"),
            max_length=32,
            held_out_share=0.5,
            max_steps=12,
            learning_rate=1e-3,
            same_label="ignore",
            save_strategy="no",
            disable_tqdm=True,
        )
    ).metrics
    assert metrics["samples"]["training"] + metrics["samples"]["held_out"] == 100
    layer = metrics["held_out"]["layers"]["4"]
    gap = {when: values["same_concept_cosine"] - values["different_concept_cosine"] for when, values in layer.items()}
    assert gap["after"] > gap["before"] > 0
    assert 0 < metrics["held_out"]["kl_to_base_nats_per_token"]["after"] < 0.1
