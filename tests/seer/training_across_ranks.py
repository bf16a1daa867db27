"""What every process of a test with several ranks runs, as `torchrun` or `accelerate launch` start it.

Arguments: a folder to write to, that of a model, and a data file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import make_dataset, make_tokenizer, random_model
from transformers import TrainerCallback

from seer import SeerConfig, SeerTrainer
from seer.checkpoints import StopOnSigterm
from seer.cli import main

STEPS, SIGTERM_AT = 10, 5
OPTIONS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 3,
    "concepts_per_batch": 3,
    "balance": "balanced",
    "lora_dropout": 0.0,  # ranks draw their own masks
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def shard_on_the_cpu() -> None:
    """accelerate shards (FSDP) on accelerators only, though torch can do it over gloo; this tells it that it may."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def make_trainer(folder: Path, callbacks: list[TrainerCallback] | None = None, **options: Any) -> SeerTrainer:
    config = SeerConfig(output_dir=str(folder), **{**OPTIONS, **options})
    shard_on_the_cpu()
    model = random_model("llama").to(torch.bfloat16 if config.bf16 else torch.float32)
    return SeerTrainer(model, config, make_dataset(), make_tokenizer(), callbacks=callbacks)


class SigtermOnOneRank(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == SIGTERM_AT and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(out: Path, model: str, data: str) -> None:
    stateful = {"lora_dropout": 0.1, "memory_bank_size": 8}
    trainer = make_trainer(out / "whole", **stateful)
    trainer.train()
    trainer.save_model(str(out / "whole" / "adapter"))

    with StopOnSigterm() as stop:
        trainer = make_trainer(out / "stopped", [SigtermOnOneRank(), stop], **stateful)
        outcome = trainer.train()
    stopped_after = outcome.global_step
    trainer = make_trainer(out / "stopped", **stateful)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(out / "stopped" / "adapter"))

    trainer = make_trainer(out / "exact")
    trainer.train()
    trainer.save_model(str(out / "exact" / "adapter"))
    if not trainer.is_fsdp_enabled:
        in_chunks = make_trainer(out / "chunks", grad_cache_chunk=2)
        in_chunks.train()
        in_chunks.save_model(str(out / "chunks" / "adapter"))
    AcceleratorState._reset_state()  # which holds one precision per process
    in_bfloat16 = make_trainer(out / "bfloat16", bf16=True, max_steps=4)
    in_bfloat16.train()
    if trainer.accelerator.is_main_process:
        facts = {
            "bfloat16": in_bfloat16.state.log_history,
            "dtypes": sorted({str(p.dtype) for p in in_bfloat16.model.parameters() if p.requires_grad}),
            "stopped_after": stopped_after,
            "processes": trainer.args.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
            "history": trainer.state.log_history,
        }
        (out / "facts.json").write_text(json.dumps(facts))

    AcceleratorState._reset_state()
    files = ["--model", model, "--data", data, "--output_dir", str(out / "command")]
    code = main(["train", *files, *(word for name, value in OPTIONS.items() for word in (f"--{name}", str(value)))])
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    assert code == (2 if sharded else 0)  # it does not go on where accelerate leaves FSDP out


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Older versions of transformers want the optimiser of a rank on "cpu:0", of which torch has not heard.
    torch.serialization.register_package(
        0, lambda _: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )
    run(Path(sys.argv[1]), *sys.argv[2:])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
