"""What a finished `seer train` run left in its folder, loaded again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seer.config import SeerConfig
from seer.data import ConceptDataset, Text, Tokens, pad_token_id, tokenize
from seer.errors import InputError
from seer.evaluation import Encoding, encode
from seer.layers import BaseModel, LayerStack, find_layers, without_dropout
from seer.prototypes import Prototypes, fingerprint
from seer.run_files import require_files
from seer.train import load_model

PROTOTYPES = "prototypes.safetensors"


@dataclass(frozen=True)
class Run:
    """The model that a run trained, its base model, and the options of the run."""

    folder: Path
    config: SeerConfig
    """The options that say what the model and the data are; those of the training itself have their defaults."""
    model: PreTrainedModel | PeftModel
    """The trained model."""
    tokenizer: PreTrainedTokenizerBase
    stack: LayerStack
    """Its layers."""
    base: BaseModel
    """What it was before training."""
    weights: str
    """Fingerprint of what was trained."""

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: PreTrainedModel | None = None) -> Run:
        """Load a run.

        Args:
            folder: the --output_dir of `seer train`.
            model: the base model, for a run that was given one in memory; else it is loaded as the run did.

        Raises:
            InputError: the folder holds no finished run, or its base model is not the adapter's.
        """
        path = Path(folder)
        require_files(path, "config.yaml")
        config = _read_config(path)
        whole = config.adapter == "none"
        require_files(path, "config.json" if whole else "adapter_config.json", "tokenizer_config.json")
        if not whole:
            require_files(path, "adapter_model.safetensors")
        trained: PreTrainedModel | PeftModel
        try:
            base = load_model(config)[0] if model is None else model
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            if whole:
                trained = load_model(replace(config, model=str(path)))[0]
            else:
                trained = PeftModel.from_pretrained(base, str(path))
        except InputError as error:
            raise InputError(f"{path / 'config.yaml'}: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:  # peft and transformers word these for a reader
            raise InputError(
                f"{folder}: expected an adapter of {config.model or 'the given model'} and a tokenizer; {error}"
            ) from error
        if config.quantization == "none":  # else the weights are where they must be
            trained = trained.to(config.device)  # type: ignore[arg-type]
        stack = find_layers(trained, config.layers_path)
        copy = find_layers(base.to(config.device), config.layers_path) if whole else None  # type: ignore[arg-type]
        for part in (trained, base):
            part.train(False)
        return cls(path, config, trained, tokenizer, stack, BaseModel(stack, copy), fingerprint(path))

    @property
    def window(self) -> int:
        """Tokens that the model and its tokenizer can take."""
        window = getattr(self.stack.root.config.get_text_config(), "max_position_embeddings", None)
        limit = int(self.tokenizer.model_max_length)
        return limit if window is None else min(limit, window)

    @property
    def max_length(self) -> int:
        """Longest text in tokens: the run's limit and the window."""
        return self.window if self.config.max_length is None else min(self.config.max_length, self.window)

    @property
    def position(self) -> str:
        """Where the state is that stands for a text."""
        return self.config.positions[0]

    def samples(self, data: str | None = None) -> tuple[ConceptDataset, ConceptDataset | None]:
        """The training and the held-out samples: the same division that the run made.

        Args:
            data: where its data is now, if not where the run read it; it must be the same.

        Raises:
            InputError: no such data.
        """
        source = self.config.data if data is None else data
        if source is None:
            raise InputError(f"{self.folder / 'config.yaml'}: expected the data of the run, got none; name it: --data")
        dataset = ConceptDataset.load(source, self.config.concepts)
        return dataset.split(self.config.held_out_share, self.config.seed)

    def samples_with_held_out(self, data: str | None = None) -> tuple[ConceptDataset, ConceptDataset]:
        """`samples` for what needs held-out samples of every concept.

        Raises:
            InputError: nothing, or nothing of some concept, was held out.
        """
        training, held_out = self.samples(data)
        if held_out is None:
            raise InputError(f"{self.folder}: expected a run with held-out samples, got one with held_out_share 0")
        missing = set(training.names) - set(held_out.concepts)
        if missing:
            raise InputError(
                f"{self.folder}: expected held-out samples of every concept, got none of {sorted(missing)}: it takes "
                "three samples of a concept to hold one out"
            )
        return training, held_out

    def tokens(self, texts: Sequence[Text]) -> list[Tokens]:
        """Texts as the run's training saw them."""
        return tokenize(self.tokenizer, texts, self.max_length, self.config.truncation)

    def encode(self, texts: Sequence[Text], layers: Sequence[int]) -> Encoding:
        """The states that stand for texts, under the base model and the trained one."""
        return encode(
            self.model,
            self.tokens(texts),
            base=self.base,
            layers=layers,
            position=self.position,
            pad_token_id=pad_token_id(self.tokenizer),
            batch_size=self.config.per_device_eval_batch_size,
        )

    @contextmanager
    def base_layers(self) -> Iterator[LayerStack]:
        """Inside, the layers of the base model, whose `root` can be run; an adapter is disabled meanwhile."""
        with without_dropout(self.model):
            if self.base.copy is not None:
                yield self.base.copy
            else:
                with cast(PeftModel, self.model).disable_adapter():
                    yield self.stack

    def prototypes(self) -> Prototypes:
        """The prototypes that the run wrote.

        Raises:
            InputError: there are none, or they are of another model or layer.
        """
        file = self.folder / PROTOTYPES
        if not file.is_file():
            raise InputError(
                f"{self.folder}: expected {PROTOTYPES}, got an adapter without prototypes. Make them from the run's "
                f"data: seer prototypes {self.folder}"
            )
        prototypes = Prototypes.load(file)
        if prototypes.weights not in (None, self.weights):
            raise InputError(
                f"{file}: expected prototypes made with the weights beside them, got those of others. Make them anew: "
                f"seer prototypes {self.folder}"
            )
        check_prototypes(prototypes, self.stack, str(file))
        return prototypes


def make_prototypes(states: dict[int, Tensor], samples: ConceptDataset, weights: str | None = None) -> Prototypes:
    """Prototypes from states of samples.

    Args:
        states: layer -> [N, D].
        samples: N samples.
        weights: fingerprint of the model's weights.
    """
    made = Prototypes.from_representations(states, torch.from_numpy(samples.memberships), samples.names)
    return replace(made, weights=weights)


def check_prototypes(prototypes: Prototypes, stack: LayerStack, source: str) -> None:
    """Raise InputError unless the prototypes fit the layers of this model.

    Args:
        prototypes: to be checked.
        stack: the layers of the model.
        source: where the prototypes are from, for the message.
    """
    depth, size = len(stack.layers), stack.root.config.get_text_config().hidden_size
    for layer, rows in prototypes.layers.items():
        if not 0 <= layer < depth:
            raise InputError(f"{source}: expected prototypes of layers 0 to {depth - 1}, got some of layer {layer}")
        if rows.shape != (len(prototypes.concepts), size):
            raise InputError(
                f"{source}: expected prototypes of {len(prototypes.concepts)} concepts for hidden size {size}, got "
                f"shape {tuple(rows.shape)} at layer {layer}: they are of another model"
            )


def _read_config(folder: Path) -> SeerConfig:
    """What the model and data are. How the run trained need not be possible on this machine."""
    file = folder / "config.yaml"
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        known = {*SeerConfig.__annotations__, "seed", "use_cpu", "per_device_eval_batch_size"} - {"preset"}
        return SeerConfig(**{name: value for name, value in values.items() if name in known})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise InputError(f"{file}: expected the options that seer train wrote; {error}") from error
