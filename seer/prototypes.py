"""Concept prototypes: one direction per concept and layer, the anchor of every explanation."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from seer.errors import InputError
from seer.files import atomic_path

ADAPTER = "adapter_model.safetensors"
"""The file of peft that holds an adapter's weights."""


@dataclass(frozen=True)
class Prototypes:
    """`mu_c,l`, the normalised mean of the normalised representations of concept c at layer l."""

    concepts: list[str]
    """C names, in the order of the rows."""
    layers: dict[int, Tensor]
    """Layer -> [C, D] float32, rows of length 1."""
    adapter: str | None = None
    """Fingerprint of the adapter that they were made with, see `fingerprint`; None if that is not known."""

    @classmethod
    def from_representations(
        cls, representations: dict[int, Tensor], concept_ids: Tensor, concepts: list[str]
    ) -> Prototypes:
        """Average over samples.

        Args:
            representations: layer -> [N, D].
            concept_ids: (N,) int64, index into `concepts`; every concept must occur.
            concepts: C names.
        """
        counts = torch.bincount(concept_ids, minlength=len(concepts))
        if (counts == 0).any():
            raise ValueError(f"concept {concepts[int(counts.argmin())]!r} has no sample to make a prototype from")
        layers = {}
        for layer, states in representations.items():
            directions = normalize(states.float(), dim=-1)
            sums = directions.new_zeros(len(concepts), states.shape[-1]).index_add_(
                0, concept_ids, directions
            )  # [C, D]
            layers[layer] = normalize(sums, dim=-1)
        return cls(list(concepts), layers)

    def similarity(self, layer: int, states: Tensor) -> Tensor:
        """Cosine of [..., D] representations at `layer` to every prototype, [..., C]."""
        return normalize(states.float(), dim=-1) @ self.layers[layer].to(states.device).T

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: a tensor `layer.<l>` per layer; metadata as JSON."""
        tensors = {f"layer.{layer}": rows.contiguous().cpu() for layer, rows in self.layers.items()}
        metadata = {"concepts": json.dumps(self.concepts, ensure_ascii=False), "layers": json.dumps([*self.layers])}
        metadata["adapter"] = json.dumps(self.adapter)
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
                return cls(json.loads(metadata["concepts"]), layers, json.loads(metadata.get("adapter", "null")))
        except (OSError, KeyError, json.JSONDecodeError, safetensors.SafetensorError) as error:
            raise InputError(f"{os.fspath(path)}: expected a prototype file written by seer train; {error}") from error


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of the adapter's weights in `folder`, the first 16 hexadecimal digits."""
    return hashlib.sha256((Path(folder) / ADAPTER).read_bytes()).hexdigest()[:16]
