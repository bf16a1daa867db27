"""What the modules share: importing the host package, refusing what the kernels cannot give, and numpy at the door."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def host_module(name: str, distribution: str) -> ModuleType:
    """The module `name` of a host package; ImportError with what to install where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this integration of seer_kernels needs the package {distribution} (pip install {distribution}): {error}"
        ) from error


def supported(name: str, value: object, choices: tuple[object, ...], instead: str) -> None:
    """`value` must be one of `choices`: the others of the original are not computed here; `instead` says what can."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        shown = " or ".join(map(repr, choices))
        raise ValueError(f"{name} must be {shown} here; got {value!r}. Instead: {instead}")


def to_tensors(**arrays: Any) -> tuple[dict[str, Any], bool]:
    """The arguments as tensors, None left as it is, and whether they were numpy arrays; TypeError where kinds mix."""
    given = {name: array for name, array in arrays.items() if array is not None}
    for name, array in given.items():
        if not isinstance(array, (Tensor, np.ndarray)):
            raise TypeError(f"{name} must be a torch tensor or a numpy array; got {type(array).__name__}")
    of_numpy = {name: isinstance(array, np.ndarray) for name, array in given.items()}
    if len(set(of_numpy.values())) > 1:
        kinds = ", ".join(f"{name} ({'numpy' if numpy else 'torch'})" for name, numpy in of_numpy.items())
        raise TypeError(f"arguments must be all torch tensors or all numpy arrays; got {kinds}")
    numpy = any(of_numpy.values())
    if not numpy:
        return arrays, False
    # Copied where torch could not share it: it knows neither read-only arrays nor negative strides.
    shared = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in given.items()}
    return {name: shared.get(name) for name in arrays}, True


def to_host(tensor: Tensor, numpy: bool) -> Any:
    """A result as the caller's kind of array."""
    return tensor.detach().numpy() if numpy else tensor
