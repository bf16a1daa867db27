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
        self.log_dict({"loss": loss, "accuracy": stats.top1_accuracy})
        return loss

    def on_train_epoch_end(self):
        metrics = self.trainer.callback_metrics
        self.print(f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.3f}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


lightning.seed_everything(0)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(max_epochs=3, precision="bf16-mixed", accumulate_grad_batches=2, **quiet)
trainer.fit(TwoViews(), DataLoader(TensorDataset(torch.randn(256, 32)), batch_size=32, shuffle=True))
