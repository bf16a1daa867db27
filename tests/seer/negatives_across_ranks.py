"""What both processes of the test of `--negatives` run, as torchrun starts them. Argument: a folder to write to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_across_ranks import make_trainer

HALF = 3  # pairs of each rank


def halve(batch: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    pairs = slice(rank * HALF, (rank + 1) * HALF)
    rows = torch.cat([torch.arange(2 * HALF)[pairs], 2 * HALF + torch.arange(2 * HALF)[pairs]])
    return {name: values[pairs if name in ("concept_ids", "retain_ids") else rows] for name, values in batch.items()}


def run(folder: Path) -> None:
    for form in ("info_nce", "nt_xent", "sup_con"):
        for mode in ("gather", "ring"):
            options = {"disentangle_loss": form, "retain_weight": 0.0, "kl_weight": 0.0}
            trainer = make_trainer(folder, negatives=mode, **options)
            trainer.model.double().eval()
            rows = trainer.data_collator([trainer._pairs[index] for index in [(0, 1), (6, 8), (12, 13)] * 2])
            rows["input_ids"][6:9, :2] += 1  # pairs of the second rank are others
            parameters = [p for p in trainer.model.parameters() if p.requires_grad]
            for parameter in parameters:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))

            loss = trainer.compute_loss(trainer.model, halve(rows, dist.get_rank()))
            gradients = torch.autograd.grad(loss, parameters)
            trainer.args.negatives = "local"
            expected = trainer.compute_loss(trainer.model, rows)
            alone = trainer.compute_loss(trainer.model, halve(rows, dist.get_rank()))
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
            assert abs(float(alone - expected)) > 1e-2  # other negatives, another loss
            for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
                dist.all_reduce(ours)
                torch.testing.assert_close(ours / 2, theirs, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
