"""What a finished `seer train` run left in its folder, loaded again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seer.config import SeerConfig
from seer.data import ConceptDataset, Text, tokenize
from seer.errors import InputError
from seer.layers import LayerStack, base_model_of, find_layers
from seer.prototypes import ADAPTER, Prototypes, fingerprint
from seer.reading import read_texts
from seer.train import load_model

PROTOTYPES = "prototypes.safetensors"


@dataclass(frozen=True)
class Run:
    """A base model with the adapter of a run, and the options of the run."""

    folder: Path
    config: SeerConfig
    """The options that say what the model and the data are; those of the training itself have their defaults."""
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    stack: LayerStack
    adapter: str
    """Fingerprint of the adapter."""

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
        for name in ("config.yaml", "adapter_config.json", ADAPTER):
            if not (path / name).is_file():
                raise InputError(f"{folder}: expected the folder of a finished seer train run, got one without {name}")
        config = _read_config(path)
        try:
            base = load_model(config)[0] if model is None else model
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
            adapted = PeftModel.from_pretrained(base, str(path))
        except InputError as error:
            raise InputError(f"{path / 'config.yaml'}: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:  # peft and transformers word these for a reader
            raise InputError(
                f"{folder}: expected an adapter of {config.model or 'the given model'} and a tokenizer; {error}"
            ) from error
        adapted = adapted.to(config.device).eval()
        return cls(path, config, adapted, tokenizer, find_layers(adapted, config.layers_path), fingerprint(path))

    @property
    def max_length(self) -> int:
        """Longest text in tokens: the run's limit, the tokenizer's and the model's window."""
        window = getattr(self.stack.root.config.get_text_config(), "max_position_embeddings", None)
        limits = (self.config.max_length, self.tokenizer.model_max_length, window)
        return min(limit for limit in limits if limit is not None)

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's, or 0, as padding is masked."""
        pad_token_id = self.tokenizer.pad_token_id
        return 0 if pad_token_id is None else int(pad_token_id)

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

    def token_ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """Texts as the run's training saw them."""
        return tokenize(self.tokenizer, texts, self.max_length)

    def representations(self, texts: Sequence[Text], layers: Sequence[int], *, base: bool = False) -> dict[int, Tensor]:
        """Layer -> [N, D] float32: the last-token states of N texts, under the base model or the adapted one."""
        with self.base_model() if base else nullcontext():
            return read_texts(
                self.stack,
                self.token_ids(texts),
                layers,
                pad_token_id=self.pad_token_id,
                batch_size=self.config.per_device_eval_batch_size,
            )

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Inside, the model is what it was before training."""
        with base_model_of(self.model):
            yield

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
        if prototypes.adapter not in (None, self.adapter):
            raise InputError(
                f"{file}: expected prototypes made with the adapter beside them, got those of another one. Make them "
                f"anew: seer prototypes {self.folder}"
            )
        check_prototypes(prototypes, self.stack, str(file))
        return prototypes

    def make_prototypes(self, training: ConceptDataset, layers: Sequence[int], *, base: bool = False) -> Prototypes:
        """Prototypes from training samples, of the adapted or the base model."""
        states = self.representations(training.texts, layers, base=base)
        made = Prototypes.from_representations(states, torch.from_numpy(training.concept_ids), training.names)
        return Prototypes(made.concepts, made.layers, None if base else self.adapter)


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
        known = {*SeerConfig.__annotations__, "seed", "use_cpu", "per_device_eval_batch_size"}
        return SeerConfig(**{name: value for name, value in values.items() if name in known})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise InputError(f"{file}: expected the options that seer train wrote; {error}") from error
