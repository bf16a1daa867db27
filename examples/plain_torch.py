"""The loss in a loop of plain torch: mixed precision, gradients of large batches, several processes.

python examples/plain_torch.py
torchrun --nproc_per_node 2 examples/plain_torch.py
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import seer_kernels
from seer_kernels import cached_backward

torch.manual_seed(0)
encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
losses = seer_kernels
if "WORLD_SIZE" in os.environ:
    dist.init_process_group()
    torch.manual_seed(dist.get_rank())  # other samples on every rank
    encoder = DistributedDataParallel(encoder)
    losses = seer_kernels.distributed  # the same functions, over the samples of all ranks
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)

for step in range(20):
    views = torch.randn(64, 32).repeat(2, 1, 1) + 0.3 * torch.randn(2, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # features in bfloat16, the loss in float32
        # In chunks of 16 samples, with the gradient of all 64: losses of small batches would have fewer negatives.
        loss = cached_backward(encoder, [*views], lambda q, k: losses.info_nce(q, k, temperature=0.1), chunk_size=16)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss:.3f}")
if dist.is_initialized():
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()
