"""Choice of backend: which ones exist on this machine, which one `"auto"` takes, and why a request cannot be met."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

BACKENDS = ("reference", "native", "triton")

AUTO = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
"""What `"auto"` tries on a device, best first. Triton on a CPU is its interpreter, which is for tests."""

DTYPES = {"triton": (torch.float32, torch.bfloat16, torch.float16)}
"""The dtypes of features of the backends that do not take all of them."""

_ROOT = Path(__file__).parents[1]


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
        why = str(error)
        if (_ROOT / "setup.py").exists():
            why += f"; {_ROOT} holds the sources: run in another folder what is installed, or pip install -e {_ROOT}"
        return BackendStatus("native", (), f"the compiled module seer_kernels._native cannot be imported: {why}")
    if not _native.cuda_architectures:
        return BackendStatus("native", ("cpu",), "no cuda: the native module was built without nvcc")
    if not torch.cuda.is_available():
        return BackendStatus("native", ("cpu",), "no cuda: torch finds no usable CUDA device")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not _runs_on(_native.cuda_architectures, capability):
            built = ", ".join(f"sm_{target}" for target in _native.cuda_architectures.split(","))
            found = f"cuda:{index} is sm_{capability[0]}{capability[1]}"
            return BackendStatus("native", ("cpu",), f"no cuda: the native module was built for {built}, and {found}")
    return BackendStatus("native", ("cpu", "cuda"), "")


def _runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures` ("80,90") runs on a GPU of this compute capability.

    Machine code runs on the major version it was built for, from its minor version on; the PTX of the newest target on
    all GPUs that came later.
    """
    targets = [divmod(int(target), 10) for target in architectures.split(",")]
    return capability >= max(targets) or any(
        major == capability[0] and minor <= capability[1] for major, minor in targets
    )


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


def choose(requested: str, device: torch.device, dtype: torch.dtype, lacks: Mapping[str, str]) -> str:
    """The backend to run on `device` for features of `dtype`.

    `lacks` says, by backend, why it does not serve the problem at hand there (an empty text where it does). `"auto"`
    takes the first of those in AUTO that can run, and the reference where there is none. Any other name is a demand: it
    is met, or a RuntimeError says why it cannot be and what can.
    """
    status = backends()
    obstacles = {name: _obstacle(status[name], device, dtype) or lacks.get(name, "") for name in BACKENDS}
    for name in AUTO.get(device.type, ("reference",)) if requested == "auto" else (requested,):
        if not obstacles[name]:
            return name
    others = ", ".join(repr(name) for name, obstacle in obstacles.items() if not obstacle)
    raise RuntimeError(
        f"backend={requested!r} cannot run on {device}: {obstacles[requested]}. Available there: 'auto', {others}"
    )


def _obstacle(status: BackendStatus, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run at all on a device for a dtype; the reference runs wherever torch does."""
    if status.name == "reference":
        return ""
    if device.type not in status.devices:
        return status.reason or f"it has no kernels for {device.type!r} tensors"
    return "" if dtype in DTYPES.get(status.name, (dtype,)) else f"it has no kernels for {dtype}"
