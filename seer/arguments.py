"""The command line of `seer train`: flags, a config file, and the help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import shutil
import textwrap
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from seer.config import SeerConfig
from seer.errors import InputError

_DESCRIPTION = """\
Fine-tune a language model with LoRA so that its hidden states gather by concept, while it goes on behaving as before.
Writes the adapter, the concept prototypes, the options and a table of held-out figures to --output_dir.

  seer train --model meta-llama/Llama-3.1-8B-Instruct --data concepts.csv --output_dir out
  seer train --preset reference --model ... --data ...        the recipe of the paper
  seer train out/config.yaml --seed 1 --output_dir out-1      options of a run, and what to change
  seer train out/config.yaml --resume_from_checkpoint true    go on after a kill
  seer train out/config.yaml --max_steps 0                    check data, layers and memory; write nothing

The data has one text per row: a request (prompt), its response, and the concept it belongs to. Training draws pairs of
one concept and pulls their last hidden states together at the target layers (L_d), with two terms that hold the model
where it was: its hidden states (L_r) and its next-token distribution (L_kl).

A switch such as --packing may be followed by true or false; N is a whole number, X any number.
"""

_SECTIONS = {
    "input and output": (
        "model",
        "data",
        "retain_data",
        "concepts",
        "held_out_share",
        "max_length",
        "truncation",
        "preset",
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
    ),
    "batches": (
        "per_device_train_batch_size",
        "concepts_per_batch",
        "balance",
        "view_dropout",
        "train_sampling_strategy",
        "gradient_accumulation_steps",
        "per_device_eval_batch_size",
    ),
    "loss: disentangle_weight L_d + retain_weight L_r + kl_weight L_kl": (
        "target_layers",
        "layers_path",
        "positions",
        "disentangle_loss",
        "temperature",
        "same_label",
        "negatives",
        "memory_bank_size",
        "disentangle_weight",
        "disentangle_weight_end",
        "retain_loss",
        "retain_layers",
        "retain_normalization",
        "retain_weight",
        "retain_weight_end",
        "kl_form",
        "kl_weight",
        "kl_weight_end",
    ),
    "time and memory": (
        "packing",
        "cache_reference",
        "grad_cache_chunk",
        "activation_checkpointing",  # gradient_checkpointing, among the others, before transformers renamed it
        "bf16",
        "torch_compile",
    ),
    "adapter": ("adapter", "adapted_layers", "quantization", "lora_r", "lora_alpha", "lora_dropout"),
    "training": (
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "weight_decay",
        "seed",
    ),
    "progress": (
        "logging_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "eval_strategy",
        "eval_steps",
        "report_to",
    ),
}


_FROM_THE_PAPER = frozenset(
    {"max_length", "weight_decay"}
    | {"disentangle_weight", "retain_weight", "kl_weight", "temperature", "retain_normalization"}
    | {"lora_r", "lora_alpha", "lora_dropout"}
)


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, list):
        return " ".join(value)
    return value.value if isinstance(value, Enum) else value


_DEFAULTS = {field.name: _default(field) for field in dataclasses.fields(SeerConfig)}


class _Parser(HfArgumentParser):
    """One flag per field of SeerConfig; errors are raised, and the help shows the flags by what they are for."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def format_help(self) -> str:
        by_name = {action.dest: action for action in reversed(self._actions)}
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for title, names in _SECTIONS.items():
            formatter.start_section(title)
            formatter.add_arguments([by_name[name] for name in names if name in by_name])
            formatter.end_section()
        others = sorted(set(by_name) - {name for names in _SECTIONS.values() for name in names} - {"help"})
        formatter.start_section("also, as documented for transformers.TrainingArguments")
        formatter.add_text(textwrap.fill(", ".join(others), shutil.get_terminal_size().columns - 4))
        formatter.end_section()
        return formatter.format_help()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the defaults and whose they are, keeps the description's lines, and one spelling of every flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = _DEFAULTS.get(action.dest)
        if default in (None, ""):
            return action.help
        owner = "seer's" if action.dest in SeerConfig.__annotations__ else "transformers'"
        if action.dest in _FROM_THE_PAPER:
            owner = "the paper's"
        return f"{action.help} (default: {default}, {owner})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[0]
        name = "N" if action.type is int else "X" if action.type is float else action.dest.upper().rsplit("_", 1)[-1]
        values = "" if action.nargs == "?" else self._format_args(action, name)
        return f"{flag} {values}".rstrip()


def parse_training_arguments(argv: Sequence[str]) -> SeerConfig:
    """Turn the arguments after `seer train` into a config.

    Args:
        argv: optionally a .yaml, .yml or .json file first, whose options the flags after it override.

    Raises:
        InputError: an unknown flag or key, or a bad value.
        SystemExit: after `--help`.
    """
    parser = _Parser(
        SeerConfig,  # type: ignore[arg-type]  # transformers names a type of its own for data classes
        prog="seer train",
        description=_DESCRIPTION,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    names = [field.name for field in dataclasses.fields(SeerConfig) if field.init]
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments = [*_read_config(arguments[0], names), *arguments[1:]]
    # What is left out stays out, so that the config can tell what was given: a preset fills in the rest.
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise InputError(f"expected options, got {unknown[0]!r}{_suggestion(unknown[0].lstrip('-'), names, '--')}")
    try:
        return SeerConfig(**vars(given))
    except InputError:
        raise
    except ValueError as error:  # what transformers says about a combination of its own options
        raise InputError(str(error)) from error


def _read_config(file: str, names: list[str]) -> list[str]:
    """The options of a config file as flags, so that one parser checks both."""
    path = Path(file).expanduser()
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise InputError(f"expected options or a .yaml or .json file, got {file!r}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: expected a readable file of options; {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected options as `name: value`, got {type(values).__name__}")
    flags: list[str] = []
    for name, value in values.items():
        if name not in names:
            raise InputError(f"{file}: expected names of options, got {name!r}{_suggestion(str(name), names)}")
        if value is not None:
            flags += [f"--{name}", *map(_as_flag, value if isinstance(value, list) else [value])]
    return flags


def _as_flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _suggestion(name: str, names: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
