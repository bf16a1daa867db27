"""Concept prototypes: one direction per concept and layer, the anchor of every explanation."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from seer.errors import InputError
from seer.files import atomic_path


@dataclass(frozen=True)
class Prototypes:
    """`mu_c,l`, the normalised mean of the normalised representations of concept c at layer l."""

    concepts: list[str]
    """C names, in the order of the rows."""
    layers: dict[int, Tensor]
    """Layer -> [C, D] float32, rows of length 1."""
    weights: str | None = None
    """Fingerprint of the weights that they were made with, see `fingerprint`; None if that is not known."""

    @classmethod
    def from_representations(
        cls, representations: dict[int, Tensor], concept_ids: Tensor, concepts: list[str]
    ) -> Prototypes:
        """Average over samples.

        Args:
            representations: layer -> [N, D].
            concept_ids: (N,) int64, index into `concepts`; or (N, C) bool, for samples of several. Every concept must
                occur.
            concepts: C names.
        """
        if concept_ids.ndim == 1:
            concept_ids = one_hot(concept_ids, len(concepts))
        counts = concept_ids.sum(0)
        if (counts == 0).any():
            raise ValueError(f"concept {concepts[int(counts.argmin())]!r} has no sample to make a prototype from")
        layers = {}
        for layer, states in representations.items():
            directions = normalize(states.float(), dim=-1)
            layers[layer] = normalize(concept_ids.T.to(directions) @ directions, dim=-1)  # [C, D]
        return cls(list(concepts), layers)

    def similarity(self, layer: int, states: Tensor) -> Tensor:
        """Cosine of [..., D] representations at `layer` to every prototype, [..., C]."""
        return normalize(states.float(), dim=-1) @ self.layers[layer].to(states.device).T

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: a tensor `layer.<l>` per layer; metadata as JSON."""
        tensors = {f"layer.{layer}": rows.contiguous().cpu() for layer, rows in self.layers.items()}
        metadata = {"concepts": json.dumps(self.concepts, ensure_ascii=False), "layers": json.dumps([*self.layers])}
        metadata["weights"] = json.dumps(self.weights)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prototypes:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                layers = {layer: file.get_tensor(f"layer.{layer}") for layer in json.loads(metadata["layers"])}
                return cls(json.loads(metadata["concepts"]), layers, json.loads(metadata.get("weights", "null")))
        except (OSError, KeyError, json.JSONDecodeError, safetensors.SafetensorError) as error:
            raise InputError(f"{os.fspath(path)}: expected a prototype file written by seer train; {error}") from error


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Tells the weights in `folder`, an adapter's or a model's, from others; cheap for large ones.

    SHA-256 of the names, sizes and last MiB of the files, the first 16 hexadecimal digits.
    """
    found = hashlib.sha256()
    for path in sorted(Path(folder).glob("*model*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - 2**20))
            found.update(file.read())
    return found.hexdigest()[:16]
