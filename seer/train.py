"""The job behind `seer train`: load, train, measure before and after, write everything down."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from copy import copy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from seer.calibration import CALIBRATION, Calibration
from seer.checkpoints import UNFINISHED, StopOnSigterm
from seer.config import SeerConfig
from seer.data import ConceptDataset, TextDataset
from seer.dry_run import MemoryEstimate, dry_run
from seer.errors import InputError, RunStopped
from seer.files import atomic_path
from seer.model_card import model_card
from seer.plots import plot_learning_curves
from seer.prototypes import Prototypes, fingerprint
from seer.trainer import Measurement, SeerTrainer

logger = logging.getLogger(__name__)

_PACKAGES = ("seer-kernels", "torch", "transformers", "peft", "accelerate", "datasets")
_OWN_FILES = (
    "README.md",
    "learning_curves.png",
    "config.yaml",
    "metrics.json",
    TRAINER_STATE_NAME,
    "prototypes.safetensors",
    CALIBRATION,
    # What the other commands make of a run is of no other.
    "evaluation.json",
    "faithfulness.json",
    "generalization.json",
    "classification.json",
    "detoxification.json",
    "detoxification.jsonl",
    "report.html",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
)


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves in memory. N is the number of held-out samples (0 if `held_out_share` is 0)."""

    metrics: dict[str, Any]
    """What `metrics.json` holds."""
    prototypes: Prototypes
    """Of the adapted model, from the training samples."""
    representations_before: dict[int, np.ndarray]
    """Target layer -> [N, D] float32: held-out samples under the base model."""
    representations_after: dict[int, np.ndarray]
    """Target layer -> [N, D] float32: the same samples, in the same order, under the adapted model."""
    concepts: list[str]
    """The N concept names of those samples."""
    output_dir: str
    """Folder with the adapter, prototypes.safetensors, config.yaml, metrics.json, trainer_state.json,
    learning_curves.png and README.md."""


def run_training(
    config: SeerConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainingResult:
    """Run the whole job that `config` describes and print its table.

    Args:
        config: options; `data` and `output_dir` must be set, and `model` too unless `model` is passed.
        model: a model in memory, used instead of loading `config.model`; it is wrapped with LoRA in place.
        tokenizer: its tokenizer; needed with `model`.

    Raises:
        InputError: bad options or data.
    """
    if config.max_steps == 0:
        raise InputError("--max_steps: expected a number of steps, or -1 for whole epochs, got 0; see seer.check_run")
    data = _load_data(config)
    checkpoint = _checkpoint_to_resume(config)
    if config.should_save:
        _claim_output_dir(config, resuming=checkpoint is not None)
    trainer = _make_trainer(config, data, model, tokenizer)
    training, held_out, _ = data
    output_dir = Path(str(config.output_dir))
    if checkpoint is not None:
        trainer.require_same_run(checkpoint)
    if config.should_save:
        config.save(output_dir / "config.yaml")
    outcome = _train(trainer, checkpoint)

    measurement = None if held_out is None else trainer.measure()
    prototypes = trainer.prototypes() if measurement is None else measurement.prototypes
    calibration = None
    if held_out is not None and len(held_out) > 1 and len(held_out.names) > 1:
        calibration = trainer.calibrate(prototypes, held_out)
    metrics = {
        "samples": {"training": len(training), "held_out": 0 if held_out is None else len(held_out)},
        "concepts": training.names,
        "target_layers": trainer.target_layers,
        "held_out": None if measurement is None else _as_metrics(measurement),
        "training": {"steps": outcome.global_step, "seconds": round(outcome.metrics["train_runtime"], 1)},
        "versions": {name: version(name) for name in _PACKAGES},
    }
    try:
        _save_adapter(trainer, output_dir)
        if config.should_save:
            _write_results(trainer, training, prototypes, calibration, metrics, output_dir)
    except (OSError, SafetensorError) as error:
        raise RunStopped(f"the results cannot be written to {output_dir}: {error}. {trainer.how_to_go_on()}") from error
    if config.should_save:
        if measurement is not None:
            Console().print(_table(measurement, len(held_out or ())))
        Console().print(f"Adapter, prototypes, config and metrics are in {output_dir}", soft_wrap=True)
        Console().print(f"All of it on one page, with pictures: seer report {quote(str(output_dir))}", soft_wrap=True)

    encoding = None if measurement is None else measurement.encoding
    return TrainingResult(
        metrics=metrics,
        prototypes=prototypes,
        representations_before={} if encoding is None else {k: v.numpy() for k, v in encoding.before.items()},
        representations_after={} if encoding is None else {k: v.numpy() for k, v in encoding.after.items()},
        concepts=[] if held_out is None else held_out.concepts,
        output_dir=str(output_dir),
    )


def check_run(
    config: SeerConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> MemoryEstimate:
    """Check data, template, layers and batches of a run and print what it would take; writes nothing.

    Args and errors as `run_training`. `seer train --max_steps 0` does this.
    """
    data = _load_data(config)
    training, held_out, _ = data
    with TemporaryDirectory() as folder:  # a Trainer makes its output folder
        elsewhere = copy(config)
        elsewhere.output_dir = folder
        return dry_run(_make_trainer(elsewhere, data, model, tokenizer), training, held_out)


def _load_data(config: SeerConfig) -> tuple[ConceptDataset, ConceptDataset | None, TextDataset | None]:
    """Training samples, held-out samples, retain texts; once it is known that the figures have somewhere to go."""
    try:
        for reporter in get_reporting_integration_callbacks(config.report_to):  # type: ignore[no-untyped-call]
            reporter()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"--report_to: {error}") from error
    if config.data is None:
        raise InputError("--data: expected texts by concept, a .csv or .jsonl file or the name of a data set; got none")
    dataset = ConceptDataset.load(config.data, config.concepts)
    retain_dataset = None if config.retain_data is None else TextDataset.load(config.retain_data)
    return *dataset.split(config.held_out_share, config.seed), retain_dataset


def _make_trainer(
    config: SeerConfig,
    data: tuple[ConceptDataset, ConceptDataset | None, TextDataset | None],
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> SeerTrainer:
    if model is None:
        model, tokenizer = load_model(config)
    elif tokenizer is None:
        raise InputError("tokenizer: expected the tokenizer of the model that was passed, got none")
    training, held_out, retain = data
    return SeerTrainer(model, config, training, tokenizer, eval_dataset=held_out, retain_dataset=retain)


def load_model(config: SeerConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load `config.model` and its tokenizer: with its language-model head if it was saved as a causal model.

    Under an adapter, which is float32, the weights are bfloat16 where an accelerator supports it or `--bf16` is given;
    otherwise, and where they are trained themselves, float32. With `--quantization` its linear layers have 4 or 8 bits.

    Raises:
        InputError: nothing that transformers can load, or bitsandbytes is missing.
    """
    if config.model is None:
        raise InputError("--model: expected a local folder or a name on the Hub, got none")
    half = config.adapter != "none" and (config.bf16 or _accelerator_has_bfloat16(config.device))
    dtype = torch.bfloat16 if half else torch.float32
    # No code that comes with a model is run: neither its own modules nor what a pickle would call.
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    if config.quantization != "none":
        if find_spec("bitsandbytes") is None:
            raise InputError(
                f"--quantization: expected the package bitsandbytes to be installed (pip install bitsandbytes) for "
                f"{config.quantization!r}, got none"
            )
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=config.quantization == "4bit",
            load_in_8bit=config.quantization == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
        causal_class = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None), "__name__", None)
        saved_as = model_config.architectures or [causal_class]
        auto = AutoModelForCausalLM if causal_class is not None and causal_class in saved_as else AutoModel
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
        return auto.from_pretrained(config.model, **options), tokenizer
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model: expected a folder or Hub name of a transformers model with its tokenizer, got {config.model!r}; "
            f"{error}"
        ) from error


def _accelerator_has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _checkpoint_to_resume(config: SeerConfig) -> str | None:
    """The checkpoint folder that `resume_from_checkpoint` means, once it is known that the run can go on from it."""
    wanted = config.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        folders = sorted(
            Path(str(config.output_dir)).glob("checkpoint-*"),
            key=lambda folder: int(folder.name.split("-")[1]),
            reverse=True,
        )
        expected = f"a checkpoint in --output_dir {config.output_dir}"
    else:
        folders = [Path(wanted)]
        expected = "a checkpoint folder"
    if not folders or not folders[0].is_dir():
        raise InputError(f"--resume_from_checkpoint: expected {expected}, got {wanted!r} and nothing there")
    return str(folders[0])


def _train(trainer: SeerTrainer, checkpoint: str | None) -> TrainOutput:
    """Train until the end, or until SIGTERM, which raises RunStopped after a checkpoint was written."""
    with StopOnSigterm() as stop:
        trainer.add_callback(stop)
        outcome: TrainOutput = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.received:
        raise RunStopped(f"SIGTERM after step {outcome.global_step}. {trainer.how_to_go_on()}", 128 + signal.SIGTERM)
    return outcome


def _claim_output_dir(config: SeerConfig, resuming: bool) -> None:
    """Make the output folder; refuse one that holds another run, or clear it of that run if so told."""
    output_dir = Path(str(config.output_dir))
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir: expected a folder, got the file {output_dir}")
    output_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
    earlier = [output_dir / name for name in _OWN_FILES if (output_dir / name).exists()]
    earlier += output_dir.glob("checkpoint-*")
    if resuming or not earlier:
        return
    if not config.overwrite_output_dir:
        raise InputError(
            f"--output_dir: expected a folder without another run, got {output_dir} with {earlier[0].name}; choose "
            "another one, or --overwrite_output_dir, or --resume_from_checkpoint true"
        )
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _save_adapter(trainer: SeerTrainer, output_dir: Path) -> None:
    """Write the adapter and the tokenizer; each file appears whole or not at all. All processes take part."""
    weights = trainer.accelerator.get_state_dict(trainer.model)  # gathers what is sharded
    if not trainer.args.should_save:
        return
    with TemporaryDirectory(dir=output_dir, prefix=".adapter-") as temporary:
        model = trainer.accelerator.unwrap_model(trainer.model)
        # Under an adapter the embeddings are never trained.
        options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        model.save_pretrained(temporary, state_dict=weights, **options)
        trainer.tokenizer.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            os.replace(path, output_dir / path.name)


def _write_results(
    trainer: SeerTrainer,
    training: ConceptDataset,
    prototypes: Prototypes,
    calibration: Calibration | None,
    metrics: dict[str, Any],
    output_dir: Path,
) -> None:
    weights = fingerprint(output_dir)
    replace(prototypes, weights=weights).save(output_dir / "prototypes.safetensors")
    if calibration is not None:
        replace(calibration, weights=weights).save(output_dir / CALIBRATION)
    with atomic_path(output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_path(output_dir / TRAINER_STATE_NAME) as temporary:
        trainer.state.save_to_json(str(temporary))
    curves = plot_learning_curves(trainer.state.log_history, output_dir / "learning_curves.png")
    counts = dict(zip(training.names, training.memberships.sum(0).tolist(), strict=True))
    pictures = [] if curves is None else [curves.name]
    with atomic_path(output_dir / "README.md") as temporary:
        temporary.write_text(model_card(trainer.args, metrics, counts=counts, pictures=pictures), encoding="utf-8")


def _as_metrics(measurement: Measurement) -> dict[str, Any]:
    kl = measurement.encoding.kl
    return {
        "layers": {
            str(layer): {"before": asdict(measurement.before[layer]), "after": asdict(measurement.after[layer])}
            for layer in measurement.before
        },
        "by_concept": {
            str(layer): {concept: asdict(values) for concept, values in concepts.items()}
            for layer, concepts in measurement.by_concept.items()
        },
        "kl_to_base_nats_per_token": None if kl is None else {"before": 0.0, "after": kl},
    }


def _table(measurement: Measurement, samples: int) -> Table:
    table = Table(title=f"{samples} held-out samples")
    table.add_column("layer")
    table.add_column("measure")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for layer, before in measurement.before.items():
        after = asdict(measurement.after[layer])
        for name, value in asdict(before).items():
            table.add_row(str(layer), name.replace("_", " "), _number(value), _number(after[name]))
    if measurement.encoding.kl is not None:
        table.add_row("", "KL to the base model, nats per token", _number(0.0), _number(measurement.encoding.kl))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
