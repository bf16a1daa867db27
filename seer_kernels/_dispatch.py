"""Choice of backend: which ones exist on this machine, which one `"auto"` takes, and why a request cannot be met."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

BACKENDS = ("reference", "native")


@dataclass(frozen=True)
class BackendStatus:
    """What one backend can do on this machine."""

    name: str
    devices: tuple[str, ...]
    """Device types it runs on here; empty where it is not available."""
    reason: str
    """Why a device type is missing; empty where nothing is."""

    @property
    def available(self) -> bool:
        return bool(self.devices)


@cache
def _native_status() -> BackendStatus:
    try:
        from seer_kernels import _native
    except ImportError as error:
        return BackendStatus("native", (), f"the compiled module seer_kernels._native cannot be imported: {error}")
    if not _native.cuda_architectures:
        return BackendStatus("native", ("cpu",), "no cuda: the native module was built without nvcc")
    if not torch.cuda.is_available():
        return BackendStatus("native", ("cpu",), "no cuda: torch finds no usable CUDA device")
    return BackendStatus("native", ("cpu", "cuda"), "")


def backends() -> dict[str, BackendStatus]:
    """The backends by name: the devices that each serves on this machine, and why others are missing."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    status = {"reference": BackendStatus("reference", devices, ""), "native": _native_status()}
    return {name: status[name] for name in BACKENDS}


def choose(requested: str, device: torch.device) -> str:
    """The backend to run on `device`.

    `"auto"` prefers native code and takes the reference where there is none. Any other name is a demand: it is met, or
    a RuntimeError says why it cannot be and what can.
    """
    if requested == "reference":
        return "reference"
    native = _native_status()
    if device.type in native.devices:
        return "native"
    if requested == "auto":
        return "reference"
    others = ", ".join(repr(s.name) for s in backends().values() if device.type in s.devices or s.name == "reference")
    reason = native.reason or f"it has no kernels for {device.type!r} tensors"
    raise RuntimeError(f"backend={requested!r} cannot run on {device}: {reason}. Available there: 'auto', {others}")
