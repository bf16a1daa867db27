"""A language model small enough to be trained on the spot, so that the demo needs no download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from seer.data import ConceptDataset, tokenize

WINDOW = 256
"""Tokens that the model takes at once."""
_VOCABULARY = 2048
_PAD, _USER, _ASSISTANT, _END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, learnt from `texts`: at most 2048 tokens, 4 of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _USER, _ASSISTANT, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        model_max_length=WINDOW,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 4 layers and 128 features, about a million parameters, with random weights."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dataset: ConceptDataset, *, seed: int, epochs: int = 16
) -> None:
    """Train next-token prediction on pages of texts, in place, with a progress bar.

    Args:
        model: from `build_model`.
        tokenizer: from `build_tokenizer`.
        dataset: texts to read; must not hold what is measured later.
        seed: decides the pages and their order.
        epochs: passes over the texts.
    """
    rows = [row.ids for row in tokenize(tokenizer, dataset.texts, WINDOW)]
    generator = np.random.default_rng(seed)
    pages = [page for _ in range(epochs) for page in _pages(rows, dataset.concept_ids, generator)]
    with TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            output_dir=unused,
            num_train_epochs=1,  # every epoch has pages of its own
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.1,
            adam_beta2=0.98,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        Trainer(model, arguments, train_dataset=[{"input_ids": page, "labels": page} for page in pages]).train()


def _pages(rows: Sequence[list[int]], concept_ids: np.ndarray, generator: np.random.Generator) -> Iterator[Tensor]:
    """Yield pages of WINDOW tokens in random order: texts of one subject one after another, as in a magazine.

    What came before then helps to guess what comes next, which is why language models know subjects at all.
    """
    pages: list[Tensor] = []
    for concept_id in np.unique(concept_ids):
        members = generator.permutation(np.flatnonzero(concept_ids == concept_id))
        tokens = torch.tensor([token for index in members for token in rows[index]])
        # A random start makes the cuts, and the rest that fills no page, fall elsewhere in every epoch.
        tokens = tokens.roll(int(generator.integers(len(tokens))))
        pages += tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return (pages[index] for index in generator.permutation(len(pages)))
