"""Batches larger than memory with the gradient of the whole batch: representations first, then graphs chunk by chunk.

Contrastive losses tie all samples of a batch together, so gradients accumulated over small batches are those of another
loss. But the encoder meets the other samples through their representations only. `cached_backward` therefore encodes
all samples without a graph, differentiates the loss with respect to the representations, then encodes chunk after chunk
once more with a graph and sends its share of that gradient through it (Gao et al. 2021, GradCache, arXiv 2101.06983).
The parameter gradients are those of the whole batch; memory is that of one chunk, time that of one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from seer_kernels import _checks

Encoder: TypeAlias = Callable[..., Tensor]

Samples: TypeAlias = "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"
"""What an encoder is called with: its only argument, all of them, or its keywords. First dimensions count samples."""

NoSync: TypeAlias = Callable[[], AbstractContextManager[Any]]


def cached_backward(
    encoder: Encoder | Sequence[Encoder],
    inputs: Sequence[Samples],
    loss: Callable[..., Tensor],
    *,
    chunk_size: int,
    backward: Callable[[Tensor], object] = Tensor.backward,
    no_sync: NoSync | None = None,
) -> Tensor:
    """Adds to `.grad` the gradients of `loss(*[encoder(x) for x in inputs])` with the memory of `chunk_size` samples.

        loss = cached_backward(model, [queries, documents], InfoNCELoss(temperature=0.05), chunk_size=32)
        optimizer.step()

    Dropout drops in the second pass what it dropped in the first: for each chunk the states of torch's generators are
    kept, those of the CPU, of the devices of inputs and encoders, and of the current CUDA device. Batch norm sees the
    statistics of a chunk, twice.

    Under DistributedDataParallel, gradients are reduced once, with the last chunk of an encoder, however many chunks
    each rank has; `seer_kernels.distributed` has losses over the samples of all ranks. A parameter that only the loss
    uses must not belong to the wrapped module, whose reduction it would miss.

    Args:
        encoder: maps an entry of `inputs` to representations (samples, ...); or one encoder for each entry.
        inputs: such as queries and documents, each a tensor, a sequence of tensors or a mapping of them (what a
            tokenizer returns); see `Samples`.
        loss: maps the representations of all samples, one tensor for each entry of `inputs`, to a scalar.
        chunk_size: samples that are encoded at a time.
        backward: the backward pass from the loss to the representations. With a gradient scaler or accelerate:
            `lambda loss: scaler.scale(loss).backward()`, `accelerator.backward`.
        no_sync: makes a context in which backward passes do not reduce gradients over ranks; default: `no_sync` of the
            encoders that have one. To be given where a function hides the wrapped module.

    Returns:
        The loss, detached.

    Raises:
        TypeError: an argument of the wrong type; an encoder or loss that does not return a tensor.
        ValueError: no inputs, unequal numbers of samples, a chunk size below 1, a loss that is not a scalar, an encoder
            that returns another number of rows, or not one encoder for each entry of `inputs`.
    """
    if not isinstance(inputs, Sequence):
        raise TypeError(f"inputs must be a list of what the encoder takes; got {type(inputs).__name__}")
    if not inputs:
        raise ValueError("inputs must have an entry or more; got none")
    _checks.check_positive_integer("chunk_size", chunk_size)
    encoders = list(encoder) if isinstance(encoder, Sequence) else [encoder] * len(inputs)
    for e in encoders:
        if not callable(e):
            raise TypeError(f"encoder must be callable; got {type(e).__name__}")
    if len(encoders) != len(inputs):
        raise ValueError(f"encoder must be one, or one for each of the {len(inputs)} inputs; got {len(encoders)}")
    chunks = [
        [_Chunk(e, part) for part in _split(f"inputs[{i}]", samples, chunk_size)]
        for i, (e, samples) in enumerate(zip(encoders, inputs, strict=True))
    ]

    devices = _a_tensor_of_each_device(encoders, inputs)
    representations = []
    with torch.no_grad(), _unreduced(encoders, no_sync):
        for of_input in chunks:
            encoded = []
            for chunk in of_input:
                chunk.random = _RandomState(devices)
                encoded.append(chunk.encode())
            representations.append(torch.cat(encoded).requires_grad_())

    with torch.enable_grad():
        value = loss(*representations)
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor; got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(f"loss must return a scalar; got a tensor of shape {tuple(value.shape)}")
    backward(value)

    afterwards = _RandomState(devices)
    last = {id(e): of_input[-1] for e, of_input in zip(encoders, chunks, strict=True)}
    for whole, of_input in zip(representations, chunks, strict=True):
        gradient = torch.zeros_like(whole) if whole.grad is None else whole.grad
        shares = torch.split(gradient, [chunk.size for chunk in of_input])
        for chunk, share in zip(of_input, shares, strict=True):
            reduces = chunk is last[id(chunk.encoder)]
            with torch.enable_grad(), nullcontext() if reduces else _unreduced([chunk.encoder], no_sync):
                assert chunk.random is not None
                chunk.random.restore()
                again = chunk.encode()
                if not again.requires_grad:  # a frozen encoder
                    break
                torch.autograd.backward(again, share)
    afterwards.restore()
    return value.detach()


class _RandomState:
    """The states of the generators of the CPU and of some tensors' devices."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.cpu = torch.get_rng_state()
        self.device_type = next((t.device.type for t in tensors if t.device.type != "cpu"), "cuda")
        self.devices, self.states = get_device_states(*tensors)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device_type)


@dataclass
class _Chunk:
    """Samples that are encoded at a time."""

    encoder: Encoder
    samples: Samples
    random: _RandomState | None = None
    """Before they were encoded for the first time."""

    @property
    def size(self) -> int:
        return len(_tensors(self.samples)[0])

    def encode(self) -> Tensor:
        if isinstance(self.samples, Tensor):
            found = self.encoder(self.samples)
        elif isinstance(self.samples, Mapping):
            found = self.encoder(**self.samples)
        else:
            found = self.encoder(*self.samples)
        # Weights that autocast has cast without a graph, or with that of another chunk, must not serve the next.
        torch.clear_autocast_cache()
        if not isinstance(found, Tensor):
            raise TypeError(f"encoder must return a tensor of (samples, ...); got {type(found).__name__}")
        if found.dim() == 0 or len(found) != self.size:
            raise ValueError(f"encoder must return a row for each of {self.size} samples; got {tuple(found.shape)}")
        return found


def _a_tensor_of_each_device(encoders: list[Encoder], inputs: Sequence[Samples]) -> list[Tensor]:
    """A tensor on each device whose generator an encoder may use."""
    tensors = [t for samples in inputs for t in _tensors(samples)]
    tensors += [p for e in encoders if isinstance(e, nn.Module) for p in e.parameters()]
    if torch.cuda.is_available():
        tensors.append(torch.empty(0, device="cuda"))
    return list({t.device: t for t in tensors}.values())


def _tensors(samples: Samples) -> list[Tensor]:
    if isinstance(samples, Tensor):
        return [samples]
    return list(samples.values() if isinstance(samples, Mapping) else samples)


def _split(name: str, samples: Samples, size: int) -> Iterator[Samples]:
    """Chunks of `size` samples; a chunk without samples where there are none, for an encoder that others wait for."""
    if not isinstance(samples, (Tensor, Mapping, Sequence)):
        raise TypeError(f"{name} must be a tensor, a sequence of tensors or a mapping; got {type(samples).__name__}")
    _checks.check_samples(name, [*_tensors(samples)])
    count = len(_tensors(samples)[0])
    for start in range(0, max(count, 1), size):
        part = slice(start, start + size)
        if isinstance(samples, Tensor):
            yield samples[part]
        elif isinstance(samples, Mapping):
            yield {key: value[part] for key, value in samples.items()}
        else:
            yield [value[part] for value in samples]


@contextmanager
def _unreduced(encoders: list[Encoder], no_sync: NoSync | None) -> Iterator[None]:
    """Backward passes through the encoders reduce nothing over ranks."""
    own = [e.no_sync for e in {id(e): e for e in encoders}.values() if hasattr(e, "no_sync")]
    with ExitStack() as stack:
        for context in own if no_sync is None else [no_sync]:
            stack.enter_context(context())
        yield
