"""TRL's supervised fine-tuning with a second loss: texts of one concept gather in a middle layer.

python examples/trl_sft.py
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from seer_kernels import sup_con


class ConceptTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        concepts, states, layers = inputs.pop("concept"), [], self.accelerator.unwrap_model(model).model.layers
        hook = layers[1].register_forward_hook(lambda module, given, output: states.append(output))
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        hook.remove()
        # Where the number of tokens is given, TRL leaves it to the loss to share itself among accumulated batches.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + 0.5 * sup_con(states[0][:, -1], concepts, temperature=0.1) / steps


def collate(rows):  # of one length here; with padding on the left, too, the last token is the last
    tokens, concepts = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "concept"))
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens), "concept": concepts}


torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
words = Tokenizer(models.WordLevel({"<end>": 0}))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")
rows = [{"input_ids": [16 * (i % 4) + i * j % 13 for j in range(12)], "concept": i % 4} for i in range(64)]
options = {"max_steps": 10, "gradient_accumulation_steps": 2, "bf16": True, "use_cpu": not torch.cuda.is_available()}
options |= {"remove_unused_columns": False, "save_strategy": "no", "logging_steps": 5, "learning_rate": 5e-3}
model, data = LlamaForCausalLM(config), Dataset.from_list(rows)
ConceptTrainer(model, SFTConfig("run", **options), collate, data, processing_class=tokenizer).train()
