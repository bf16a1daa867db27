"""Checkpoints that are whole or not there, and runs that stop where they can be continued from.

A run that is killed at any moment and continued ends with the adapter of a run that was left alone, bit for bit: the
Trainer stores weights, optimiser, schedule and random states, the order of the batches follows from seed and step, and
what is here sees to it that a checkpoint never lacks one of them, and is only continued by the run it belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from seer.config import SeerConfig
from seer.errors import InputError, RunStopped
from seer.files import move_whole

logger = logging.getLogger(__name__)

_IDENTITY = "run.json"
UNFINISHED = ".checkpoint-in-the-making"
# Options that decide which rows make which batch, and what the adapter is: with another value it is another run.
_SAME_ON_RESUME = frozenset(
    {
        "model",
        "concepts",
        "held_out_share",
        "max_length",
        "truncation",
        "target_layers",
        "layers_path",
        "adapter",
        "quantization",
        "lora_r",
        "lora_alpha",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "concepts_per_batch",
        "balance",
        "train_sampling_strategy",
        "dataloader_drop_last",
        "seed",
        "data_seed",
    }
)
# Options that a continued run may change without a word: they do not touch what is learned.
_FREE_ON_RESUME = frozenset(
    {"data", "retain_data", "output_dir", "save_steps", "save_strategy", "save_total_limit", "logging_steps"}
    | {"report_to", "disable_tqdm", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "run_name"}
    | {"max_steps", "num_train_epochs", "remove_unused_columns", "ddp_find_unused_parameters"}
)


def digest(rows: Sequence[list[int]]) -> str:
    """A short name for token ids: other texts, another order or another tokenizer have another one."""
    content = sha256()
    for row in rows:
        content.update(np.array([len(row), *row], dtype=np.int64).tobytes())
    return content.hexdigest()[:16]


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are whole, which continues no other run, and stops before weights turn to NaN."""

    args: SeerConfig
    last_checkpoint: str | None = None
    """The newest checkpoint that this run wrote or was continued from."""
    _unfinished: Path | None = None

    def data_digests(self) -> dict[str, str]:
        """A name for each set of rows that batches are made of."""
        raise NotImplementedError

    def save_own_state(self, checkpoint: Path) -> None:
        """Write what this process must know to go on, beside what the Trainer writes."""

    def load_own_state(self, checkpoint: Path) -> None:
        """Read it again."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Raises:
            InputError: the checkpoint belongs to a run of other options or data; all that differs is named.
            RunStopped: the loss or its gradient is not finite, or a checkpoint cannot be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        if resume_from_checkpoint:
            self.require_same_run(str(resume_from_checkpoint))
            self.load_own_state(Path(str(resume_from_checkpoint)))
            self.last_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *arguments, **options)

    def require_same_run(self, checkpoint: str) -> None:
        """Raise InputError that names what differs if `checkpoint` is not one of this run.

        Options that change how training goes on, but neither the batches nor the adapter's shape, may differ (a lower
        learning rate, say); a warning names them.
        """
        try:
            earlier = json.loads((Path(checkpoint) / _IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"--resume_from_checkpoint: expected a whole checkpoint of a SEER run, got {checkpoint}; {error}"
            ) from error
        now = self._identity()
        defaults = {f.name: f.default for f in dataclasses.fields(SeerConfig)}
        refused: list[str] = []
        changed: list[str] = []
        for name in sorted({*earlier["options"], *now["options"]} - _FREE_ON_RESUME):
            was, is_ = (facts["options"].get(name, defaults.get(name)) for facts in (earlier, now))
            if was != is_:
                (refused if name in _SAME_ON_RESUME else changed).append(f"--{name} {was!r}, now {is_!r}")
        refused += [
            f"{name.replace('_', ' ')} {earlier[name]!r}, now {now[name]!r}"
            for name in now
            if name != "options" and earlier[name] != now[name]
        ]
        if refused:
            raise InputError(
                f"--resume_from_checkpoint: expected the run of {checkpoint}, which had " + "; ".join(refused)
            )
        if changed:
            logger.warning("The run of %s goes on with other options: it had %s.", checkpoint, "; ".join(changed))

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            RunStopped: the loss is not finite. The weights are still those of the step before.
        """
        loss = self._forward_and_backward(*arguments, **options)
        if not torch.isfinite(loss):
            raise RunStopped(self._not_finite(f"the loss is {loss.item()}"))
        return loss

    def _forward_and_backward(self, *arguments: Any, **options: Any) -> Tensor:
        return super().training_step(*arguments, **options)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer asks for this once per step, before the optimiser moves anything."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        # float16 training scales the loss, finds infinities by itself and skips such steps.
        if norm is not None and self.accelerator.scaler is None and not np.isfinite(value := float(norm)):
            raise RunStopped(self._not_finite(f"the norm of the gradient is {value}"))
        return norm

    def _not_finite(self, what: str) -> str:
        return (
            f"step {self.state.global_step + 1}: {what}. {self.how_to_go_on()} The same options would end there "
            "again: lower --learning_rate, raise --temperature, or use --bf16 in place of --fp16."
        )

    def how_to_go_on(self) -> str:
        """The sentence that names the last good checkpoint."""
        if self.last_checkpoint is None:
            return "No checkpoint had been written."
        return (
            f"The last good checkpoint is {self.last_checkpoint}: continue with --resume_from_checkpoint "
            f"{self.last_checkpoint}."
        )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside, and move it to its place once every process has written its part."""
        output_dir = Path(super()._get_output_dir(trial))
        target = output_dir / f"checkpoint-{self.state.global_step}"
        unfinished = output_dir / UNFINISHED
        try:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._unfinished = unfinished
            super()._save_checkpoint(model, trial)
            self.save_own_state(unfinished / target.name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish(unfinished / target.name, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)  # room for others on a full disk
            raise RunStopped(f"{target} cannot be written: {error}. {self.how_to_go_on()}") from error
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = str(target)

    def _finish(self, written: Path, target: Path) -> None:
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(written / "trainer_state.json"))
        (written / _IDENTITY).write_text(json.dumps(self._identity(), indent=2) + "\n", encoding="utf-8")
        move_whole(written, target)
        written.parent.rmdir()
        rotate_checkpoints(
            output_dir=str(target.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _identity(self) -> dict[str, Any]:
        """What makes a run the one it is, as JSON knows it."""
        facts = {"options": self.args.options(), "processes": self.args.world_size, **self.data_digests()}
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain


class StopOnSigterm(TrainerCallback):
    """Inside `with`, SIGTERM ends training after the step that is under way, with a checkpoint.

    Schedulers of shared machines send SIGTERM some seconds before they kill. A process with several ranks stops all of
    them after the same step.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> StopOnSigterm:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.received = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            received = torch.tensor(float(self.received), device=args.device)
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
            self.received = bool(received)
        if self.received:
            control.should_save = control.should_training_stop = True
