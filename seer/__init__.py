"""SEER: fine-tune a language model so that its hidden states gather by concept, and read the concepts back.

Method: Chen, Liu, Luo, Shao, "SEER: Self-Explainability Enhancement of Large Language Models' Representations",
arXiv 2502.05242.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seer.calibration import Calibration
    from seer.config import SeerConfig
    from seer.data import ConceptDataset, Text, TextDataset
    from seer.errors import InputError, RunStopped
    from seer.explainer import ConceptExplainer
    from seer.prototypes import Prototypes
    from seer.run import Run
    from seer.train import TrainingResult, check_run, run_training
    from seer.trainer import SeerTrainer

_HOME = {
    "Calibration": "seer.calibration",
    "ConceptDataset": "seer.data",
    "ConceptExplainer": "seer.explainer",
    "InputError": "seer.errors",
    "Prototypes": "seer.prototypes",
    "Run": "seer.run",
    "RunStopped": "seer.errors",
    "SeerConfig": "seer.config",
    "SeerTrainer": "seer.trainer",
    "Text": "seer.data",
    "TextDataset": "seer.data",
    "TrainingResult": "seer.train",
    "check_run": "seer.train",
    "run_training": "seer.train",
}

__all__ = [
    "Calibration",
    "ConceptDataset",
    "ConceptExplainer",
    "InputError",
    "Prototypes",
    "Run",
    "RunStopped",
    "SeerConfig",
    "SeerTrainer",
    "Text",
    "TextDataset",
    "TrainingResult",
    "check_run",
    "run_training",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import seer` does not load torch and transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'seer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
