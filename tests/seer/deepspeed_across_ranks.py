"""What both processes of the test of DeepSpeed run, as `accelerate launch` starts them.

Arguments: a folder to write to, and that of a model, which ZeRO-3 takes apart as it is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_dataset, make_tokenizer
from training_across_ranks import OPTIONS
from transformers import AutoModelForCausalLM

from seer import SeerConfig, SeerTrainer


def train_from_folder(out: Path, model: Path, **options: Any) -> SeerTrainer:
    config = SeerConfig(output_dir=str(out), **{**OPTIONS, "max_steps": 6, "kl_weight": 30.0, **options})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = SeerTrainer(loaded, config, make_dataset(), make_tokenizer())
    trainer.train()
    trainer.save_model(str(out))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trainer = train_from_folder(folder, Path(sys.argv[2]))
    if trainer.accelerator.is_main_process:
        facts = {
            "engine": type(trainer.model_wrapped).__name__,
            "stage": trainer.model_wrapped.zero_optimization_stage(),
            "history": trainer.state.log_history,
        }
        (folder / "facts.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
