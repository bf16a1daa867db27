"""Where the hidden states of a model are, and one forward pass that reads all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from seer.errors import InputError
from seer.packing import Packing

_PAPER_DEPTH = (25, 32)  # the paper's target layer is 25 of 32


@dataclass(frozen=True)
class LayerStack:
    """The repeated blocks of a model. Layer index l means the output of block l, before any final norm."""

    root: PreTrainedModel
    """The model itself, without peft's wrapping."""
    path: str
    """Dotted path from `root` to the list of layers."""
    layers: list[nn.Module]

    def resolve(self, indices: Sequence[int] | None, option: str = "target_layers") -> list[int]:
        """Turn layer indices, negative ones counting from the end, into a sorted list; None means the default layer.

        Args:
            indices: what `option` says.
            option: named in the error.

        Raises:
            InputError: an index out of range.
        """
        depth = len(self.layers)
        if indices is None:
            return [depth * _PAPER_DEPTH[0] // _PAPER_DEPTH[1]]
        for index in indices:
            if not -depth <= index < depth:
                raise InputError(
                    f"--{option}: expected layers from {-depth} to {depth - 1} ({self.path} has {depth} layers), "
                    f"got {index}"
                )
        return sorted({index % depth for index in indices})

    def linear_pattern(self, indices: Sequence[int]) -> str:
        """Regular expression that fully matches the paths of all linear projections in some layers.

        Args:
            indices: the layers, counted from 0.

        Raises:
            InputError: these layers have no linear projection.
        """
        names = {
            name
            for index in indices
            for name, part in self.layers[index].named_modules()
            if isinstance(part, nn.Linear)
        }
        if not names:
            raise InputError(f"no torch.nn.Linear in {self.path}: expected layers with linear projections to adapt")
        numbers = "|".join(map(str, indices))
        return rf"{re.escape(self.path)}\.({numbers})\.({'|'.join(re.escape(name) for name in sorted(names))})"


def find_layers(model: PreTrainedModel | PeftModel, layers_path: str | None = None) -> LayerStack:
    """Find the layers by structure: the one `nn.ModuleList` with as many entries as the config says there are layers.

    Args:
        model: a transformers model, wrapped by peft or not.
        layers_path: dotted path from the (unwrapped) model to the list, where structure does not decide.

    Raises:
        InputError: no list, or more than one, has that length; or `layers_path` leads to something else.
    """
    root = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    name = type(root).__name__
    lists = {path: part for path, part in root.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 0}
    seen = ", ".join(f"{path} ({len(part)})" for path, part in lists.items()) or "none"
    if layers_path is not None:
        if layers_path not in lists:
            raise InputError(
                f"--layers_path: expected the path of a non-empty nn.ModuleList in {name}, got {layers_path!r}; "
                f"it has {seen}"
            )
        return LayerStack(root, layers_path, list(lists[layers_path]))

    depth = getattr(root.config.get_text_config(), "num_hidden_layers", None)
    found = [path for path, part in lists.items() if len(part) == depth]
    # A list inside a layer, such as its experts, may happen to have that length too.
    found = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(found) != 1:
        raise InputError(
            f"{name} has {'no list' if not found else 'more than one list'} of {depth} layers "
            f"(config.num_hidden_layers); expected exactly one. Name it with --layers_path. Its lists: {seen}"
        )
    return LayerStack(root, found[0], list(lists[found[0]]))


def lm_head(stack: LayerStack) -> nn.Module | None:
    """The projection onto the vocabulary, or None where the model predicts no tokens."""
    head: nn.Module | None = stack.root.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


@dataclass
class HiddenStates:
    """What one forward pass of R rows and T tokens leaves behind."""

    embeddings: Tensor
    """[R, T, D] input of the first layer."""
    layers: list[Tensor] = field(default_factory=list)
    """Output of every layer, each [R, T, D]."""
    head_inputs: Tensor | None = None
    """[K, D], what the head reads at the K chosen tokens, in row order; None where none were asked for."""

    def all(self) -> list[Tensor]:
        """Embeddings and every layer."""
        return [self.embeddings, *self.layers]


def compile_layers(stack: LayerStack, **options: Any) -> None:
    """Let torch compile what happens inside of each layer: hidden states are read between them, by hooks.

    Args:
        stack: the layers.
        options: of `torch.compile`.
    """
    for layer in stack.layers:
        # Texts have all lengths: a graph for any saves one for the first.
        layer.forward = torch.compile(layer.forward, dynamic=True, **options)


class Head:
    """The part of a model behind its last layer norm: states [K, D] to next-token logits [K, V].

    It runs the model's own forward with its body left out, so that whatever else the model does to its logits
    (scaling, capping) is done here too.

    Args:
        stack: of a model with a language-model head.
    """

    def __init__(self, stack: LayerStack) -> None:
        self.root = stack.root

    def __call__(self, states: Tensor) -> Tensor:
        body = self.root.base_model
        original = vars(body).get("forward")
        body.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=states.unsqueeze(0))
        try:
            logits: Tensor = self.root.forward().logits.squeeze(0)  # a call would run hooks
        finally:
            del body.forward
            if original is not None:
                body.forward = original
        return logits

    @torch.no_grad()
    def check(self, stack: LayerStack) -> None:
        """Raise InputError unless this gives the logits that the model gives; costs a pass of one token."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=next(self.root.parameters()).device)
        inputs = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        with without_dropout(self.root):
            expected = self.root(**inputs).logits[0]
            states = forward_states(self.root, inputs, stack, head_at=inputs["attention_mask"].bool()).head_inputs
            problem = "its head reads no hidden states"
            try:
                if states is not None and torch.allclose(self(states), expected, rtol=1e-2, atol=1e-2):
                    return
                problem = "they differ"
            except Exception as error:  # a model that does not keep its body in `base_model` may fail anywhere
                problem = f"{type(error).__name__}: {error}"
        raise InputError(
            f"--kl_weight: expected 0 for {type(self.root).__name__}, whose logits cannot be computed from its last "
            f"hidden states alone ({problem})"
        )


def forward_states(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    stack: LayerStack,
    head_at: Tensor | None = None,
    *,
    packed: bool = False,
) -> HiddenStates:
    """Run `model` once and return its hidden states.

    Args:
        model: the model of `stack` in whatever wrapping (peft, DistributedDataParallel).
        inputs: keyword arguments of the model: `input_ids` and `attention_mask` (R, T), and what else it takes.
        stack: its layers.
        head_at: (R, T) bool, the tokens at which the input of the head is wanted. The head itself does not run: at
            128k tokens of vocabulary its output is larger than all states together.
        packed: let short texts share a row; the states are those of padded texts, but 0 at padding. `inputs` are then
            `input_ids` and `attention_mask` alone. For models that `check_packing` lets pass.
    """
    captured: dict[int, Tensor] = {}
    embeddings: list[Tensor] = []
    head_inputs: list[Tensor] = []
    packing = Packing.of(inputs["attention_mask"], stack.root) if packed else None
    expected = inputs["attention_mask"].shape if packing is None else packing.position_ids.shape

    def padded(states: Tensor) -> Tensor:
        return states if packing is None else packing.unpack(states)

    def on_first_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings.append(args[0] if args else kwargs["hidden_states"])

    def on_layer(index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            captured[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    def on_head_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if head_at is not None:
            head_inputs.append(padded(args[0])[head_at])
        return (args[0][:0], *args[1:])

    def on_output(*_: Any) -> Tensor:
        # Wrappers find the graph of the trained parameters in what a model returns.
        return captured[len(stack.layers) - 1]

    with ExitStack() as hooks:
        hooks.callback(stack.layers[0].register_forward_pre_hook(on_first_input, with_kwargs=True).remove)
        for index, layer in enumerate(stack.layers):
            hooks.callback(layer.register_forward_hook(on_layer(index)).remove)
        head = lm_head(stack)
        if head is not None:
            hooks.callback(head.register_forward_pre_hook(on_head_input).remove)
        hooks.callback(stack.root.register_forward_hook(on_output).remove)
        model(**(inputs if packing is None else packing.inputs(inputs["input_ids"])))

    layers = [captured[index] for index in range(len(stack.layers))]
    for index, states in enumerate(layers):
        if states.shape[:2] != expected:
            raise RuntimeError(
                f"layer {index} of {stack.path} gave states of shape {tuple(states.shape)}; expected (rows, tokens, "
                f"features) with rows and tokens {tuple(expected)}"
            )
    return HiddenStates(padded(embeddings[0]), [*map(padded, layers)], head_inputs[0] if head_inputs else None)


@torch.no_grad()
def check_packing(stack: LayerStack) -> None:
    """Raise InputError unless packed texts have the states of padded ones; costs two passes of ten tokens."""
    name = type(stack.root).__name__
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3]])).long().to(next(stack.root.parameters()).device)
    inputs = {"input_ids": (mask.cumsum(1) + mask.cumsum(0)) * mask, "attention_mask": mask}
    attention = stack.root.config._attn_implementation
    problem = "its layers mix the texts of a row"
    with without_dropout(stack.root):
        alone = forward_states(stack.root, inputs, stack).layers
        try:
            together = forward_states(stack.root, inputs, stack, packed=True).layers
            limit = torch.finfo(alone[0].dtype).eps ** 0.5
            for one, other in zip(together, alone, strict=True):
                change = (one - other).norm(dim=-1) / other.norm(dim=-1)
                if not (change[mask.bool()] < limit).all():
                    break
            else:
                return
        except Exception as failure:  # a model that takes no position ids may fail anywhere
            problem = f"{type(failure).__name__}: {failure}"
    raise InputError(
        f"--packing: expected false for {name} with attention {attention!r}, whose packed texts do not have the hidden "
        f"states of padded ones ({problem})"
    )


def representations(
    states: Sequence[Tensor], attention_mask: Tensor, request_lengths: Tensor, positions: Sequence[str]
) -> Tensor:
    """What stands for every text: its states at some positions and layers.

    Args:
        states: output of L layers, each [R, T, D].
        attention_mask: (R, T), nonzero at real tokens, wherever the padding is; every row has one.
        request_lengths: (R,), how many of the real tokens come before the response.
        positions: P of "last" (the last token), "last_request" (the last before the response), "response_mean" (the
            mean over the response, and what the chat template puts behind it) and "mean" (the mean over all real
            tokens, special ones included: the mean pooling of sentence-transformers).

    Returns:
        [P, L, R, D]; finite but of no meaning where a row lacks the position, see `has_positions`.

    Raises:
        InputError: the layers have different sizes.
    """
    sizes = {part.shape[-1] for part in states}
    if len(sizes) > 1:
        raise InputError(f"--target_layers: expected layers of one hidden size, got sizes {sorted(sizes)}")
    mask = attention_mask.bool()
    rank = mask.cumsum(1) - 1  # [R, T]: the number of a real token in its row
    rows = torch.arange(len(mask), device=mask.device)
    found = []
    for position in positions:
        if position in ("response_mean", "mean"):
            start = request_lengths if position == "response_mean" else torch.zeros_like(request_lengths)
            chosen = (mask & (rank >= start.unsqueeze(1))).unsqueeze(2)
            count = chosen.sum(1).clamp(min=1)
            dtype = torch.promote_types(states[0].dtype, torch.float32)
            means = [part.masked_fill(~chosen, 0.0).sum(1, dtype=dtype) / count for part in states]
            found.append(torch.stack(means).to(states[0].dtype))
        else:
            last = mask.sum(1) if position == "last" else request_lengths
            index = (mask & (rank == last.unsqueeze(1) - 1)).int().argmax(1)  # (R,)
            found.append(torch.stack([part[rows, index] for part in states]))
    return torch.stack(found)


def has_positions(attention_mask: Tensor, request_lengths: Tensor, positions: Sequence[str]) -> Tensor:
    """Which rows have which positions: [P, R] bool. Arguments as in `representations`."""
    lengths = attention_mask.bool().sum(1)
    has = {
        "last": lengths > 0,
        "last_request": request_lengths > 0,
        "response_mean": request_lengths < lengths,
        "mean": lengths > 0,
    }
    return torch.stack([has[position] for position in positions])


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, every part of `model` is in evaluation mode; afterwards each is in its own mode again."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@dataclass(frozen=True)
class BaseModel:
    """The model as it was before training: with its adapter disabled, or, where there is none, a frozen copy."""

    stack: LayerStack
    """The layers of the model in training."""
    copy: LayerStack | None = None
    """Those of the copy; None for a model with an adapter."""

    @property
    def head(self) -> Head:
        """The base model's; like `forward_states` for use without gradients."""
        return Head(self.copy or self.stack)

    @torch.no_grad()
    def forward_states(
        self, model: nn.Module, inputs: Mapping[str, Tensor], head_at: Tensor | None = None, *, packed: bool = False
    ) -> HiddenStates:
        """`forward_states` of the base model, without dropout.

        Args:
            model: the model in training, in whatever wrapping.
            inputs, head_at, packed: as in `forward_states`.
        """
        if self.copy is not None:
            copy = self.copy.root.to(inputs["attention_mask"].device)  # type: ignore[arg-type]
            return forward_states(copy, inputs, self.copy, head_at, packed=packed)
        adapter = next(part for part in model.modules() if isinstance(part, PeftModel))
        with without_dropout(model), adapter.disable_adapter():
            return forward_states(model, inputs, self.stack, head_at, packed=packed)


def freeze_copy(stack: LayerStack) -> LayerStack:
    """The same layers in a copy of the model that is never trained."""
    root = deepcopy(stack.root).requires_grad_(False)
    root.train(False)
    return LayerStack(root, stack.path, list(root.get_submodule(stack.path).children()))
