"""The loss in a LightningModule.

python examples/lightning_module.py
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import seer_kernels


class TwoViews(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))

    def training_step(self, batch, index):
        losses = seer_kernels.distributed if self.trainer.world_size > 1 else seer_kernels
        first, second = (self.encoder(batch[0] + 0.3 * torch.randn_like(batch[0])) for _ in range(2))
        loss, stats = losses.nt_xent(first, second, temperature=0.2, return_stats=True)
        self.log_dict({"loss": loss, "accuracy": stats.top1_accuracy}, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


lightning.seed_everything(0)
trainer = lightning.Trainer(
    max_epochs=3,
    accelerator="auto",
    precision="bf16-mixed",
    accumulate_grad_batches=2,
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(TwoViews(), DataLoader(TensorDataset(torch.randn(256, 32)), batch_size=32, shuffle=True))
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
