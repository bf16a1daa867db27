"""`seer train --max_steps 0`: everything up to the first optimiser step, with what it found; nothing is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from seer.data import ConceptDataset
from seer.errors import RunStopped
from seer.trainer import SeerTrainer

_MIB = 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device for the largest batch that the data can make. Sums of what must be there at once: a bound
    from below, to which the allocator and the libraries of the device add theirs."""

    weights: int
    """Of the base model and the adapter."""
    gradients_and_optimizer: int
    """Gradients of the adapter and the two moments of AdamW."""
    activations: int
    """What the forward pass kept for the backward pass, counted while it ran; without activation checkpointing."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients_and_optimizer + self.activations


def dry_run(trainer: SeerTrainer, training: ConceptDataset, held_out: ConceptDataset | None) -> MemoryEstimate:
    """Run one forward pass on the largest batch there can be, and print what a run would do.

    Args:
        trainer: of the run.
        training: its training samples.
        held_out: its held-out samples.
    """
    batch = trainer.largest_batch()
    estimate = _measure(trainer, batch)
    console = Console(highlight=False)
    console.print(_facts(trainer, training, held_out, batch, estimate))
    console.print(
        "Nothing was trained or written. The first training text as the model reads it, special tokens included:"
    )
    console.print(trainer.decode(0), markup=False)
    return estimate


def _measure(trainer: SeerTrainer, batch: dict[str, Tensor]) -> MemoryEstimate:
    model = _model(trainer)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()  # alive until the loss is gone, so no address is used twice
        return tensor

    inputs = {name: values.to(trainer.args.device) for name, values in batch.items()}
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs)
    if not torch.isfinite(torch.as_tensor(loss)):
        raise RunStopped(f"the loss of the largest batch is {loss}, before any training. Is the model sound?")
    weights, trained = (
        sum(parameter.numel() * parameter.element_size() for parameter in each)
        for each in (model.parameters(), filter(lambda parameter: parameter.requires_grad, model.parameters()))
    )
    return MemoryEstimate(weights, 3 * trained, sum(kept.values()))


def _model(trainer: SeerTrainer) -> nn.Module:
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    return model


def _facts(
    trainer: SeerTrainer,
    training: ConceptDataset,
    held_out: ConceptDataset | None,
    batch: dict[str, Tensor],
    estimate: MemoryEstimate,
) -> Table:
    args, stack = trainer.args, trainer.stack
    table = Table(title="Dry run", show_header=False)
    counts = dict(zip(training.names, training.memberships.sum(0).tolist(), strict=True))
    lengths = np.array([len(row.ids) for row in trainer.training_rows])
    steps = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    rows, tokens = batch["input_ids"].shape
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in _model(trainer).parameters()]
    table.add_row("training samples", f"{len(training)}; held out: {0 if held_out is None else len(held_out)}")
    table.add_row("of each concept", ", ".join(f"{name} {count}" for name, count in counts.items()))
    table.add_row("tokens per text", f"median {np.median(lengths):.0f}, longest {lengths.max()}")
    table.add_row("chat template", "none" if trainer.tokenizer.chat_template is None else "of the tokenizer")
    table.add_row("layers", f"{len(stack.layers)} in {stack.path}; target {', '.join(map(str, trainer.target_layers))}")
    table.add_row(
        "trained parameters", f"{sum(n for n, trained in sizes if trained):,} of {sum(n for n, _ in sizes):,}"
    )
    table.add_row("optimiser steps", f"{steps} per epoch, {args.num_train_epochs:g} epochs")
    table.add_row("largest batch", f"{rows} rows x {tokens} tokens for {len(batch['concept_ids'])} pairs")
    table.add_row(
        "memory, at least",
        f"{estimate.total / _MIB:,.0f} MiB on {args.device.type}: {estimate.weights / _MIB:,.0f} weights, "
        f"{estimate.gradients_and_optimizer / _MIB:,.0f} gradients and AdamW, {estimate.activations / _MIB:,.0f} "
        "activations without checkpointing",
    )
    return table
