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


def backends() -> dict[str, BackendStatus]:
    """The backends by name: the devices that each serves on this machine, and why others are missing."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    status = {"reference": BackendStatus("reference", devices, ""), "native": _native_status()}
    return {name: status[name] for name in BACKENDS}


def choose(requested: str, device: torch.device, native_lacks: str = "") -> str:
    """The backend to run on `device`; `native_lacks` says why native kernels do not serve the problem at hand there.

    `"auto"` prefers native code and takes the reference where there is none. Any other name is a demand: it is met, or
    a RuntimeError says why it cannot be and what can.
    """
    if requested == "reference":
        return "reference"
    native = _native_status()
    if device.type in native.devices and not native_lacks:
        return "native"
    if requested == "auto":
        return "reference"
    others = ", ".join(repr(s.name) for s in backends().values() if device.type in s.devices and s.name != requested)
    reason = native.reason or native_lacks or f"it has no kernels for {device.type!r} tensors"
    raise RuntimeError(f"backend={requested!r} cannot run on {device}: {reason}. Available there: 'auto', {others}")
