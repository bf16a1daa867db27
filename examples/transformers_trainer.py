"""The loss in a subclass of transformers' Trainer: texts of one concept gather in the last hidden layer.

python examples/transformers_trainer.py
"""

import torch
from transformers import LlamaConfig, LlamaModel, Trainer, TrainingArguments

from seer_kernels import SupConLoss


class ContrastiveTrainer(Trainer):
    contrastive = SupConLoss(temperature=0.1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Not called "labels": Trainer would count those as tokens, and no longer divide by the steps of accumulation.
        concepts = inputs.pop("concept")
        outputs = model(**inputs)
        loss = self.contrastive(outputs.last_hidden_state[:, -1], concepts)
        return (loss, outputs) if return_outputs else loss


torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaModel(LlamaConfig(vocab_size=64, **sizes))
concepts = torch.arange(64) % 4
texts = torch.randint(0, 16, (64, 12)) + 16 * concepts[:, None]  # every concept has its own tokens
data = [{"input_ids": text, "concept": concept} for text, concept in zip(texts, concepts, strict=True)]
options = {"max_steps": 10, "gradient_accumulation_steps": 2, "bf16": True, "use_cpu": not torch.cuda.is_available()}
quiet = {"remove_unused_columns": False, "save_strategy": "no", "report_to": "none", "logging_steps": 5}
arguments = TrainingArguments("run", per_device_train_batch_size=16, learning_rate=5e-3, **options, **quiet)
ContrastiveTrainer(model, arguments, train_dataset=data).train()
