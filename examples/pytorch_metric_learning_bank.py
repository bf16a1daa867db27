"""A loss of pytorch-metric-learning, without its matrices of pairs, against a bank of keys of past batches.

python examples/pytorch_metric_learning_bank.py
"""

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.regularizers import LpRegularizer

from seer_kernels import MemoryBank
from seer_kernels.integrations.pytorch_metric_learning import SupConLoss

torch.manual_seed(0)
encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
# Distance, reducer and regularizer are those of pytorch-metric-learning.
loss_of = SupConLoss(
    temperature=0.1, distance=CosineSimilarity(), embedding_regularizer=LpRegularizer(), embedding_reg_weight=1e-3
)
bank = MemoryBank(128, features=16)  # in place of CrossBatchMemory, which picks pairs by indices
centres = torch.randn(8, 32)

for step in range(20):
    labels = torch.randint(0, 8, (32,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = encoder(centres[labels] + torch.randn(32, 32))
    keys, key_labels = bank(embeddings, labels)  # the latest 128 of past batches, of which these are next time
    loss = loss_of(embeddings, labels) + loss_of(embeddings, labels, ref_emb=keys, ref_labels=key_labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss:.3f}")
