"""Reading the hidden states of the very pass that a model makes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from seer.layers import LayerStack, without_dropout


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


def pad(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, *, side: str = "right"
) -> dict[str, Tensor]:
    """R rows of token ids as one batch: `input_ids` and `attention_mask`, both (R, T) int64.

    Args:
        rows: token ids.
        pad_token_id: fills up shorter rows.
        device: of the result.
        side: "right", or "left" where a model writes on.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def read_texts(
    stack: LayerStack, rows: Sequence[list[int]], layers: Sequence[int], *, pad_token_id: int, batch_size: int
) -> dict[int, Tensor]:
    """States at the last token of N texts, without dropout and without the language-model head.

    Args:
        stack: the layers of the model; its adapter counts if it is enabled.
        rows: token ids of the texts.
        layers: which layers to read.
        pad_token_id: fills up shorter rows.
        batch_size: texts per pass.

    Returns:
        Layer -> [N, D] float32 on the CPU.
    """
    device = next(stack.root.parameters()).device
    longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    collected: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with LayerReader(stack, layers) as reader, without_dropout(stack.root):
        for start in range(0, len(rows), batch_size):
            chosen = [rows[index] for index in longest_first[start : start + batch_size]]
            stack.root.base_model(**pad(chosen, pad_token_id, device))
            ends = [len(row) - 1 for row in chosen]
            for layer, states in reader.states.items():
                collected[layer].append(states[range(len(chosen)), ends].float().cpu())
    in_order = torch.tensor(longest_first).argsort()
    return {layer: torch.cat(parts)[in_order] for layer, parts in collected.items()}
