"""Several texts in one row of a batch, each blind to the others, so that padding costs little or nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Packing:
    """Where the tokens of R padded texts are in P packed rows of W tokens.

    Position ids restart with every text, and no attention mask is given: from that models of transformers tell packed
    texts apart, whatever their kind of attention and each layer's window.
    """

    mask: Tensor
    """[R, T] bool, the real tokens of the padded texts."""
    places: Tensor
    """(K,) int64: of every real token, text by text, its index among the P x W tokens."""
    position_ids: Tensor
    """[P, W] int64. Left-over places are texts of one token."""

    @classmethod
    def of(cls, mask: Tensor, model: PreTrainedModel) -> Packing:
        """Fill rows as wide as the longest text; flash attention, which takes one row only, has no left-over places.

        Args:
            mask: (R, T), nonzero at real tokens, wherever the padding is.
            model: its kind of attention decides the width.
        """
        mask = mask.bool()
        lengths: list[int] = mask.sum(1).tolist()
        width = sum(lengths) if "flash" in str(model.config._attn_implementation) else max(lengths)
        filled: list[int] = []
        starts = [0] * len(lengths)
        for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):  # first fit, longest first
            row = next((row for row, used in enumerate(filled) if used + lengths[text] <= width), len(filled))
            if row == len(filled):
                filled.append(0)
            starts[text] = row * width + filled[row]
            filled[row] += lengths[text]
        rank = mask.cumsum(1) - 1  # [R, T]: the number of a real token in its text
        places = (rank + torch.tensor(starts, device=mask.device).unsqueeze(1))[mask]
        position_ids = rank.new_zeros(len(filled) * width)
        position_ids[places] = rank[mask]
        return cls(mask, places, position_ids.view(-1, width))

    def inputs(self, input_ids: Tensor) -> dict[str, Tensor | bool]:
        """What the model takes in place of `input_ids` [R, T] and their mask."""
        packed = input_ids.new_zeros(self.position_ids.numel())
        packed[self.places] = input_ids[self.mask]
        # A cache would make of each row one text that goes on.
        return {"input_ids": packed.view_as(self.position_ids), "position_ids": self.position_ids, "use_cache": False}

    def unpack(self, states: Tensor) -> Tensor:
        """[P, W, D] states to [R, T, D], 0 at padding."""
        unpacked = states.new_zeros(*self.mask.shape, states.shape[-1])
        unpacked[self.mask] = states.flatten(0, 1)[self.places]
        return unpacked
