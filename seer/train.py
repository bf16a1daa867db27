"""The job behind `seer train`: load, measure, train, measure again, write everything down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from seer.config import SeerConfig
from seer.prototypes import Prototypes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    """Folder with the adapter, prototypes.safetensors, config.yaml and metrics.json."""


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
    raise NotImplementedError
