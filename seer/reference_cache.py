"""What the base model makes of texts that do not change, computed once and kept in a file that is mapped to memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from seer.data import Tokens
from seer.errors import InputError
from seer.files import atomic_path
from seer.sampling import pad_rows

Encode = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Maps inputs of a model for R texts of T tokens to S tensors [R, T, D], all of one size and type."""


class ReferenceCache:
    """S states of size D for every token of N texts, in the type that the model computes in.

    Args:
        path: file to write, next to which there is room for another of the same size.
        rows: the texts.
        encode: makes the states of a batch of them.
        pad_token_id: fills up shorter rows.
        batch_size: texts per batch.
        device: of the batches.
        write: whether to make the file; otherwise it is there.

    Raises:
        InputError: not enough room on the disk, or states of different sizes.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[Tokens],
        encode: Encode,
        *,
        pad_token_id: int,
        batch_size: int,
        device: torch.device,
        write: bool = True,
    ) -> None:
        self.path = path
        self.lengths = torch.tensor([len(row.ids) for row in rows])
        self.starts = self.lengths.cumsum(0) - self.lengths
        first = _encode_batch(encode, rows[:1], pad_token_id, device)[0]  # [T, S, D]
        self.shape = (int(self.lengths.sum()), *first.shape[1:])  # [tokens, S, D]
        self.dtype = first.dtype
        if write:
            self._write(rows, encode, pad_token_id, batch_size, device)
        self.states = self._map(path)

    def _write(
        self, rows: Sequence[Tokens], encode: Encode, pad_token_id: int, batch_size: int, device: torch.device
    ) -> None:
        needed = self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise InputError(
                f"--cache_reference: expected room for {needed / 2**30:.1f} GiB in {self.path.parent}, got "
                f"{free / 2**30:.1f} GiB; fewer --retain_layers or retain texts take less"
            )
        longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        with atomic_path(self.path) as temporary:
            with temporary.open("wb") as file:
                file.truncate(needed)
            states = self._map(temporary)
            for start in range(0, len(rows), batch_size):
                chosen = longest_first[start : start + batch_size]
                batch = _encode_batch(encode, [rows[index] for index in chosen], pad_token_id, device)
                for index, each in zip(chosen, batch, strict=True):
                    states[self.starts[index] : self.starts[index] + self.lengths[index]] = each.cpu()

    def _map(self, path: Path) -> Tensor:
        size = self.shape[0] * self.shape[1] * self.shape[2]
        return torch.from_file(str(path), shared=True, size=size, dtype=self.dtype).view(self.shape)

    def read(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """S tensors [R, T, D] of the texts `ids` (R,) in a batch whose real tokens `mask` (R, T) tells; 0 elsewhere."""
        tokens = [self.states[self.starts[i] : self.starts[i] + self.lengths[i]] for i in ids.tolist()]
        padded = torch.zeros(*mask.shape, *self.shape[1:], dtype=self.dtype, device=mask.device)
        padded[mask] = torch.cat(tokens).to(mask.device)
        return list(padded.unbind(2))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _encode_batch(encode: Encode, rows: Sequence[Tokens], pad_token_id: int, device: torch.device) -> list[Tensor]:
    """The states of every text, [T, S, D] each, without padding."""
    inputs = {name: values.to(device) for name, values in pad_rows(rows, pad_token_id).items()}
    del inputs["request_lengths"]
    states = encode(inputs)
    sizes = sorted({part.shape[-1] for part in states})
    if len(sizes) > 1:
        raise InputError(f"--cache_reference: expected hidden states of one size, got sizes {sizes}")
    mask = inputs["attention_mask"].bool()
    return [each[real] for each, real in zip(torch.stack(states, dim=2), mask, strict=True)]
