"""Registers operators with torch: a kernel, its shapes for tracing, and the autograd.Function that owns its gradient.

The same as `torch.library.custom_op` with `register_autograd`, which costs a tenth of a millisecond more a call: as
much as the whole loss over a few pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("seer_kernels", "DEF")  # type: ignore[no-untyped-call]


def register(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    *,
    no_gradient: str = "",
) -> Callable[..., Any]:
    """Defines `seer_kernels::name` with the schema that the annotations of `kernel` state; returns the operator.

    `function.forward` calls the operator again, below autograd (`below_autograd`). Without a `function`, a request for
    a gradient raises a RuntimeError with the text `no_gradient`.
    """
    _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=()))  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"seer_kernels::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.seer_kernels, name).default
    owner = function or _refusal(operator, no_gradient)

    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"seer_kernels::{name} has no gradient under torch.func (grad, vjp, jacrev, ...); "
                    "use torch.autograd, or torch.func.vmap outside of it"
                )
            return owner.apply(*arguments)  # type: ignore[no-untyped-call]
        return below_autograd(operator, *arguments)

    _LIBRARY.impl(name, autograd, "Autograd")  # type: ignore[no-untyped-call]
    return operator


def below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Calls an operator so that nothing of it is recorded for differentiation."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _refusal(operator: Callable[..., Any], message: str) -> type[torch.autograd.Function]:
    class Refusal(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return below_autograd(operator, *arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(message)

    return Refusal
