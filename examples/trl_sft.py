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
        concepts, ends, states = inputs.pop("concept"), inputs["attention_mask"].sum(1) - 1, []
        layer = self.accelerator.unwrap_model(model).model.layers[1]
        hook = layer.register_forward_hook(lambda module, given, output: states.append(output))
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        hook.remove()
        last = states[0][torch.arange(len(ends)), ends]  # of the last token of each text
        # Where the number of tokens is given, the loss of SFT is already divided over the steps of accumulation.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + 0.5 * sup_con(last, concepts, temperature=0.1) / steps


def collate(rows):
    tokens, concepts = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "concept"))
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens), "concept": concepts}


torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
concepts = torch.arange(64) % 4  # every concept has its own tokens
texts = torch.randint(0, 16, (64, 12)) + 16 * concepts[:, None]
data = Dataset.from_dict({"input_ids": texts.tolist(), "concept": concepts.tolist()})
options = {"max_steps": 10, "gradient_accumulation_steps": 2, "bf16": True, "use_cpu": not torch.cuda.is_available()}
quiet = {"remove_unused_columns": False, "save_strategy": "no", "report_to": "none", "logging_steps": 5}
arguments = SFTConfig("run", per_device_train_batch_size=16, learning_rate=5e-3, **options, **quiet)
ConceptTrainer(model, arguments, collate, data, processing_class=tokenizer).train()
