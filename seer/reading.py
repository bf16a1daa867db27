"""Reading the hidden states of the very pass that a model makes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from seer.layers import LayerStack


class LayerReader:
    """Inside `with`, holds what chosen layers put out in the newest forward pass of their model, whoever made it.

    Args:
        stack: the layers of the model.
        layers: which of them to read.
    """

    def __init__(self, stack: LayerStack, layers: Sequence[int]) -> None:
        self.stack = stack
        self.layers = list(layers)
        self.states: dict[int, Tensor] = {}
        """Layer -> [R, T, D] of the newest pass; with a cache T counts the new tokens only."""
        self._hooks = ExitStack()

    def __enter__(self) -> LayerReader:
        for index in self.layers:
            self._hooks.callback(self.stack.layers[index].register_forward_hook(self._hook(index)).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self.states = {}

    def _hook(self, index: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.states[index] = output if isinstance(output, Tensor) else output[0]

        return keep


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """R rows of token ids as one batch that a model can write on: `input_ids` and `attention_mask`, both (R, T) int64.

    Args:
        rows: token ids.
        pad_token_id: fills up shorter rows, in front.
        device: of the result.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
