"""Choice of backend: which ones exist on this machine, which one `"auto"` takes, and why a request cannot be met."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch

BACKENDS = ("reference", "native", "triton")

AUTO = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
"""What `"auto"` tries on a device, best first. The interpreter behind Triton on a CPU is for tests."""

DTYPES = {"triton": (torch.float32, torch.bfloat16, torch.float16)}
"""The dtypes of features of the backends that do not take all of them."""


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


@cache
def _triton_status() -> BackendStatus:
    # Looked for, not imported: that takes a while, and is left to the first call that needs it.
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", (), "the package triton is not installed")
    if torch.cuda.is_available():
        return BackendStatus("triton", ("cuda",), "no cpu: Triton compiles for GPUs")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return BackendStatus("triton", ("cpu",), "no cuda: torch finds no usable CUDA device")
    return BackendStatus("triton", (), "torch finds no usable CUDA device, and TRITON_INTERPRET=1 is not set")


def backends() -> dict[str, BackendStatus]:
    """The backends by name: the devices that each serves on this machine, and why others are missing."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {
        "reference": BackendStatus("reference", devices, ""),
        "native": _native_status(),
        "triton": _triton_status(),
    }


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to run on `device` for features of `dtype`.

    `"auto"` takes the first that can of those in AUTO, and the reference where there is none. Any other name is a
    demand: it is met, or a RuntimeError says why it cannot be and what can.
    """
    if requested == "reference":
        return requested
    candidates = AUTO.get(device.type, ("reference",)) if requested == "auto" else (requested,)
    status = backends()
    for name in candidates:
        if _runs(status[name], device, dtype):
            return name
    missing = status[requested]
    reason = missing.reason or f"it has no kernels for {device.type!r} tensors"
    if device.type in missing.devices:
        reason = f"it has no kernels for {dtype}"
    others = ", ".join(repr(s.name) for s in status.values() if s.name == "reference" or _runs(s, device, dtype))
    raise RuntimeError(f"backend={requested!r} cannot run on {device}: {reason}. Available there: 'auto', {others}")


def _runs(status: BackendStatus, device: torch.device, dtype: torch.dtype) -> bool:
    if status.name == "reference":
        return True
    return device.type in status.devices and dtype in DTYPES.get(status.name, (dtype,))
