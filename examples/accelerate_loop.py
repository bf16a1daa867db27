"""The loss in a loop of accelerate, over the samples of all processes.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import seer_kernels

torch.manual_seed(0)
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
losses = seer_kernels.distributed if accelerator.num_processes > 1 else seer_kernels
samples, labels = torch.randn(8, 32).repeat(32, 1), torch.arange(8).repeat(32)
data = TensorDataset(samples + torch.randn(256, 32), labels)
encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, DataLoader(data, batch_size=32, shuffle=True))

for epoch in range(3):
    for batch, concepts in loader:
        # Each batch of the two is contrasted by itself; cached_backward contrasts all samples of a step instead.
        with accelerator.accumulate(encoder):
            loss = losses.sup_con(encoder(batch), concepts, temperature=0.1)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
accelerator.end_training()
