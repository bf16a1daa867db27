"""Options of a training run: everything of transformers' TrainingArguments, and what SEER adds."""

from __future__ import annotations

import dataclasses
import os
from copy import copy
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

import yaml
from transformers import SchedulerType, TrainingArguments

from seer.errors import InputError
from seer.files import atomic_path

SameLabel = Literal["negative", "ignore", "positive"]
RetainNormalization = Literal["example", "token"]
DisentangleLoss = Literal["info_nce", "nt_xent", "sup_con", "ot_contrastive"]
RetainLoss = Literal["norm", "sinkhorn"]
KLForm = Literal["full", "label"]
Balance = Literal["frequency", "balanced"]
Adapter = Literal["lora", "dora", "none"]
Quantization = Literal["none", "4bit", "8bit"]
Negatives = Literal["local", "gather", "ring"]
Preset = Literal["default", "reference", "encoder"]
Truncation = Literal["end", "middle", "refuse"]
SamplingStrategy = Literal["random", "group_by_length"]


RATE_TIMES_WIDTH = 0.5
"""Learning rate times hidden size, where no rate is given: measured at 256, and about the paper's at 4096."""

POSITIONS = ("last", "last_request", "response_mean", "mean")

_CHOICES = {
    "same_label": get_args(SameLabel),
    "retain_normalization": get_args(RetainNormalization),
    "disentangle_loss": get_args(DisentangleLoss),
    "retain_loss": get_args(RetainLoss),
    "kl_form": get_args(KLForm),
    "balance": get_args(Balance),
    "truncation": get_args(Truncation),
    "train_sampling_strategy": get_args(SamplingStrategy),
    "preset": get_args(Preset),
    "adapter": get_args(Adapter),
    "negatives": get_args(Negatives),
    "quantization": get_args(Quantization),
}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Chen et al., arXiv 2502.05242, as its code runs; on four devices. Spelled out, whatever our defaults are.
    "reference": {
        "max_length": 1024,
        "truncation": "end",
        "view_dropout": 0.25,
        "target_layers": None,  # 25 of 32
        "positions": ["last"],
        "disentangle_loss": "info_nce",
        "temperature": 0.1,
        "same_label": "negative",
        "negatives": "local",
        "memory_bank_size": None,
        "disentangle_weight": 10.0,
        "disentangle_weight_end": None,
        "retain_loss": "norm",
        "retain_layers": None,
        "retain_normalization": "example",
        "retain_weight": 1.0,
        "retain_weight_end": None,
        "kl_form": "label",
        "kl_weight": 1.0,
        "kl_weight_end": None,
        "adapter": "lora",
        "quantization": "none",
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "per_device_train_batch_size": 8,
        "concepts_per_batch": None,
        "balance": "frequency",
        "num_train_epochs": 2.0,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "bf16": True,
        "gradient_checkpointing": True,
    },
    # What docs/encoder.md arrives at. 256 tokens are what sentence-transformers gives to all-MiniLM-L6-v2.
    "encoder": {
        "max_length": 256,
        "positions": ["mean"],
        "target_layers": [-1],
        "adapted_layers": [-1],
        "disentangle_loss": "sup_con",
        "temperature": 0.2,
        "retain_normalization": "token",
        "kl_weight": 0.0,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
        "num_train_epochs": 2.0,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
    },
}
"""Options that `--preset NAME` sets unless they are given."""


class _KnowsWhatWasGiven:
    """Remembers which options were passed, whatever their values: what was given wins over what is derived."""

    _given: set[str]

    def __new__(cls, *values: Any, **options: Any) -> Any:
        config = super().__new__(cls)
        names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]  # of the data class below
        config._given = {*names[: len(values)], *options}
        return config


@dataclass
class SeerConfig(_KnowsWhatWasGiven, TrainingArguments):
    """Options of `seer train` and of `SeerTrainer`.

    Every field of `transformers.TrainingArguments` is accepted; the ones below are added or have another default.
    `model`, `data`, `retain_data`, `concepts`, `held_out_share` and `overwrite_output_dir` are read by the job
    (`seer.run_training`) only: a `SeerTrainer` is given its model and data sets as objects.

    Raises:
        InputError: a value out of its range; the message names the option.
    """

    preset: Preset = field(
        default="default",
        metadata={
            "help": "Values of what is not given: 'default', those shown here, 'reference', the recipe of the paper's "
            "code, or 'encoder', for sentence encoders, which are pooled by the mean and predict no tokens."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Required. Folder for everything that the run writes."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Required. Model to train: a local folder or a name on the Hub."}
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Required. Texts labelled by concept, with columns prompt, response and concept: a .csv or .jsonl "
            "file, or the name of a data set on the Hub (its split 'train' is used). A text of several concepts has "
            "'a|b' in a .csv file, a list elsewhere; any shared one makes a pair."
        },
    )
    retain_data: str | None = field(
        default=None,
        metadata={
            "help": "Texts on which the model must stay as it was, with columns prompt and response, or text. Without "
            "it the first text of every pair serves."
        },
    )
    concepts: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the allowed concepts. Any other name in the data is an error."},
    )
    held_out_share: float = field(
        default=0.2,
        metadata={
            "help": "Share of every concept's samples that is kept out of training and measured before and after. "
            "Which samples: decided by --seed."
        },
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Longest text in tokens. Never more than the window of the model."},
    )
    truncation: Truncation = field(
        default="end",
        metadata={
            "help": "What a text that is too long loses: 'end', the end of its response, then of its request; "
            "'middle', the middle of its request, then the end of its response; 'refuse': it is an error."
        },
    )

    concepts_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Different concepts in every batch, each with the same number of pairs; must divide "
            "--per_device_train_batch_size. Default: as it comes."
        },
    )
    balance: Balance = field(
        default="frequency",
        metadata={
            "help": "How often a concept is drawn: 'frequency', by its number of samples, or 'balanced', as often as "
            "any other."
        },
    )

    train_sampling_strategy: SamplingStrategy = field(
        default="random",
        metadata={
            "help": "Which pairs share a batch: 'random', or 'group_by_length', those of similar length: less padding."
        },
    )

    target_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Decoder layers whose output is disentangled: 0 is the first layer, -1 the last. Default: the one "
            "at 25/32 of the depth, as in the paper."
        },
    )
    layers_path: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path from the model to its list of layers, such as model.layers. Only needed where the "
            "list cannot be told from the structure of the model."
        },
    )
    positions: list[str] = field(
        default_factory=lambda: ["last"],
        metadata={
            "help": f"Token positions that stand for a text, of {', '.join(POSITIONS)}: its last token, the last one "
            "before the response, the mean over the response, the mean over the whole text (as sentence encoders are "
            "pooled). L_d is averaged over them; prototypes and held-out figures are made at the first."
        },
    )
    view_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of the texts of pairs that lose a part: one half of them the response, the other half the "
            "request. A pair is left out of L_d at a position that one of its texts lost."
        },
    )
    disentangle_weight: float = field(
        default=10.0,
        metadata={"help": "Weight of L_d, the contrastive loss that gathers concepts."},
    )
    disentangle_weight_end: float | None = field(
        default=None, metadata={"help": "Weight of L_d in the last step, linear in between. Default: constant."}
    )
    retain_weight: float = field(
        default=1.0, metadata={"help": "Weight of L_r, the distance of hidden states to the base model's."}
    )
    retain_weight_end: float | None = field(
        default=None, metadata={"help": "Weight of L_r in the last step, linear in between. Default: constant."}
    )
    kl_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of L_kl, the change of the next-token distribution. Must be 0 for a model without a "
            "language-model head."
        },
    )
    kl_weight_end: float | None = field(
        default=None, metadata={"help": "Weight of L_kl in the last step, linear in between. Default: constant."}
    )
    disentangle_loss: DisentangleLoss = field(
        default="info_nce",
        metadata={
            "help": "L_d: 'info_nce' (first texts of the pairs against second texts), 'nt_xent' (all texts against all "
            "others), 'sup_con' (the same, with every text of the concept as a positive) or 'ot_contrastive' (the plan "
            "of optimal transport between first and second texts)."
        },
    )
    temperature: float = field(default=0.1, metadata={"help": "Temperature of L_d."})
    same_label: SameLabel = field(
        default="positive",
        metadata={
            "help": "What L_d makes of another pair of the same concept: 'negative' (as in the paper), 'ignore' (left "
            "out of the denominator) or 'positive'. 'sup_con' and 'ot_contrastive' take 'positive' unless told "
            "otherwise."
        },
    )
    retain_loss: RetainLoss = field(
        default="norm",
        metadata={
            "help": "L_r: 'norm' is the Euclidean distance, 'sinkhorn' the Sinkhorn divergence between the clouds of "
            "an example's tokens before and after, per layer and relative to their spread."
        },
    )
    retain_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers that L_r compares. Default: the embeddings and every layer."},
    )
    retain_normalization: RetainNormalization = field(
        default="example",
        metadata={
            "help": "L_r as a norm: 'example' takes one norm over all layers and tokens of an example, times (number "
            "of target layers) / (number of adapted layers) / 100, as the paper's code; 'token' takes one per token."
        },
    )
    kl_form: KLForm = field(
        default="full",
        metadata={
            "help": "L_kl: 'full' is KL(base || adapted) over the whole vocabulary, in nats per token; 'label' is "
            "- sum_t p_base(y_t) log p_adapted(y_t) of the tokens y_t of a text, mean over texts, as the paper's code."
        },
    )
    negatives: Negatives = field(
        default="local",
        metadata={
            "help": "Texts that a pair is told from: those of its process ('local'), or of all processes, brought "
            "together ('gather') or passed around ('ring', less memory)."
        },
    )
    memory_bank_size: int | None = field(
        default=None,
        metadata={
            "help": "Second texts of past batches that L_d keeps as further negatives, for info_nce. Default: none."
        },
    )
    grad_cache_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Texts that pass the model at a time, each twice: the gradient of the whole batch with the memory "
            "of so many. Default: all at once."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Let short texts share a row of a batch, each blind to the others: the same loss, little padding. "
            "Measured on a small Llama, 400 chats and a CPU: steps 1.5 to 2 times as fast (54 of 100 tokens were "
            "padding), 1.07 times with batches of similar length (28)."
        },
    )
    cache_reference: bool = field(
        default=False,
        metadata={
            "help": "Run the base model over the retain texts once and keep its hidden states in a file in "
            "--output_dir during the run, instead of running it in every step. Takes (retain layers + 1) x hidden size "
            "numbers per token."
        },
    )
    adapter: Adapter = field(
        default="lora",
        metadata={
            "help": "What is trained: a 'lora' or 'dora' adapter on the layers up to the last target layer, or with "
            "'none' all weights; the base model is then a frozen copy, which takes its memory once more."
        },
    )
    adapted_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers that get the adapter: 0 is the first layer, -1 the last. Default: all up to the last "
            "target layer."
        },
    )
    quantization: Quantization = field(
        default="none",
        metadata={"help": "Load the base model with weights of '4bit' (NF4) or '8bit', by the package bitsandbytes."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the LoRA adapter: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA adapter."})

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the run that --output_dir holds. Without it such a folder is an error."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Continue a run: 'true' for the last complete checkpoint in --output_dir, or its folder."},
    )

    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs of texts per device and step."})
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the training samples; each is the first text of a pair once."}
    )
    max_steps: int = field(
        default=-1,
        metadata={
            "help": "Optimiser steps, in place of --num_train_epochs. 0: check data, layers and batches, print how "
            "much memory a run takes, and write nothing."
        },
    )
    learning_rate: float | None = field(  # type: ignore[assignment]  # a number as soon as there is a trainer
        default=None,
        metadata={
            "help": f"Learning rate of AdamW. Default: {RATE_TIMES_WIDTH} / hidden size of the model, 1.2e-4 at 4096 "
            "(1e-4 in the paper): the wider a model, the smaller its steps."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "Schedule of the learning rate."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log the loss terms every so many steps."})
    save_steps: float = field(
        default=50, metadata={"help": "Write a checkpoint, from which a killed run continues, every so many steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has no effect here."})
    # Every adapter parameter gets a gradient in every step, so the search for unused ones is wasted.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DistributedDataParallel look for parameters without gradient."}
    )

    def __post_init__(self) -> None:
        _check(self.preset in PRESETS, "preset", f"one of {tuple(PRESETS)}", self.preset)
        for name, value in PRESETS[self.preset].items():
            if name not in self._given:
                setattr(self, name, copy(value))
        if self.output_dir is None:
            raise InputError("--output_dir: expected a folder, got none")
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in (f"{term}_weight{end}" for term in ("disentangle", "retain", "kl") for end in ("", "_end")):
            value = getattr(self, name)
            _check(value is None or value >= 0, name, "a number >= 0", value)
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            known = value is None or 0 <= value < 2**32  # what numpy takes
            _check(known, name, f"a whole number from 0 to {2**32 - 1}", value)
        _check(self.temperature > 0, "temperature", "a number > 0", self.temperature)
        _check(0 <= self.held_out_share < 1, "held_out_share", "a share from 0 up to but not 1", self.held_out_share)
        _check(0 <= self.lora_dropout < 1, "lora_dropout", "a share from 0 up to but not 1", self.lora_dropout)
        for name in ("max_length", "lora_r", "lora_alpha"):
            _check(getattr(self, name) >= 1, name, "a whole number >= 1", getattr(self, name))
        if self.concepts_per_batch is not None:
            _check(self.concepts_per_batch >= 1, "concepts_per_batch", "a whole number >= 1", self.concepts_per_batch)
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, f"one of {choices}", getattr(self, name))
        for name in ("target_layers", "retain_layers", "adapted_layers"):
            layers = getattr(self, name)
            _check(layers is None or len(layers) > 0, name, "at least one layer", layers)
        known = bool(self.positions) and set(self.positions) <= {*POSITIONS}
        _check(
            known and len({*self.positions}) == len(self.positions), "positions", f"some of {POSITIONS}", self.positions
        )
        _check(0 <= self.view_dropout <= 1, "view_dropout", "a share from 0 to 1", self.view_dropout)
        for name in ("memory_bank_size", "grad_cache_chunk"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "a whole number >= 1", value)
        form = self.disentangle_loss
        across = self.negatives == "local" or form != "ot_contrastive"
        _check(across, "negatives", "local with --disentangle_loss ot_contrastive", self.negatives)
        size = self.memory_bank_size
        _check(size is None or form == "info_nce", "memory_bank_size", f"none with --disentangle_loss {form}", size)
        plain = size is None or not self.pairs_may_lack_positions()
        _check(plain, "memory_bank_size", "none where --view_dropout takes away --positions", size)
        trainable = self.adapter != "none" or self.quantization == "none"
        _check(trainable, "quantization", "none with --adapter none, which trains all weights", self.quantization)
        partial = self.adapter != "none" or self.adapted_layers is None
        _check(partial, "adapted_layers", "none with --adapter none, which trains all weights", self.adapted_layers)
        needless = self.cache_reference and not (self.uses("retain") or self.uses("kl"))
        _check(not needless, "cache_reference", "false where neither L_r nor L_kl has a weight", self.cache_reference)
        if self.disentangle_loss in ("sup_con", "ot_contrastive"):
            if "same_label" not in self._given:
                self.same_label = "positive"
            allowed = ("positive",) if self.disentangle_loss == "sup_con" else ("positive", "negative")
            expected = f"one of {allowed} with --disentangle_loss {self.disentangle_loss}"
            _check(self.same_label in allowed, "same_label", expected, self.same_label)

    def pairs_may_lack_positions(self) -> bool:
        """Whether view dropout may take away a token position that L_d reads."""
        return self.view_dropout > 0 and not {*self.positions} <= {"last", "mean"}

    def uses(self, term: str) -> bool:
        """Whether a term of the loss ("disentangle", "retain", "kl") has a weight at any time."""
        return self.weight(term, 0.0) > 0 or self.weight(term, 1.0) > 0

    def weight(self, term: str, progress: float) -> float:
        """The weight of a term when so much of the run (0: first step, 1: last step) is done."""
        start: float = getattr(self, f"{term}_weight")
        end: float | None = getattr(self, f"{term}_weight_end")
        return start if end is None else start + progress * (end - start)

    def options(self) -> dict[str, Any]:
        """The options of this class and what else was given, as YAML and JSON know them.

        What concerns one start only, `overwrite_output_dir` and `resume_from_checkpoint`, is left out.
        """
        wanted = {"output_dir", "seed", *SeerConfig.__annotations__, *PRESETS[self.preset], *self._given}
        wanted -= {"overwrite_output_dir", "resume_from_checkpoint"}
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name in wanted}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the options as YAML that `seer train PATH` accepts."""
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.options(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _check(condition: bool, option: str, expected: str, value: object) -> None:
    if not condition:
        raise InputError(f"--{option}: expected {expected}, got {value!r}")


def _plain(value: Any) -> Any:
    """The value as YAML knows it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value
