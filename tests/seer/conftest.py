"""Tiny models, a tiny tokenizer and a tiny data set, all made in process."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from seer import ConceptDataset, SeerConfig
from seer.data import Text

# On problems this small threads mostly wait for each other, busily; in the processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "melon"],
    "metal": ["iron", "copper", "zinc", "tin", "lead", "gold"],
    "animal": ["cat", "dog", "horse", "cow", "sheep", "goat"],
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2),
    "gemma": lambda: GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    # These do something to their logits, or hold experts.
    "gemma2": lambda: Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.1),
    "granite": lambda: GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=3.0),
    "mixtral": lambda: MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2),
}


def random_model(architecture: str) -> PreTrainedModel:
    """A random model with 3 layers of width 32, the same every time."""
    torch.manual_seed(0)
    if architecture == "bert":
        return AutoModel.from_config(BertConfig(**SIZES))
    return AutoModelForCausalLM.from_config(DECODERS[architecture]())


@pytest.fixture
def make_model() -> Callable[[str], PreTrainedModel]:
    return random_model


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>"]
    words = ["name", "a", "one", "is", *(word for group in WORDS.values() for word in group)]
    core.train_from_iterator([" ".join(words)], trainers.WordLevelTrainer(vocab_size=64, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def rows() -> list[tuple[str, str, str]]:
    """Six samples of three concepts, of different lengths."""
    return [
        ("name a " + "one " * (index % 3) + concept, " ".join(words[: index + 1]), concept)
        for concept, words in WORDS.items()
        for index in range(6)
    ]


def make_dataset() -> ConceptDataset:
    texts = [Text(prompt, response, f"row {index}") for index, (prompt, response, _) in enumerate(rows())]
    return ConceptDataset(texts, [concept for _, _, concept in rows()])


@pytest.fixture
def dataset() -> ConceptDataset:
    return make_dataset()


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "concepts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "response", "concept"), *rows()])
    return path


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., SeerConfig]:
    def make(**options: object) -> SeerConfig:
        quiet = {"disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "per_device_train_batch_size": 4}
        return SeerConfig(**{"output_dir": str(tmp_path / "out"), **quiet, **options})

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    random_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
