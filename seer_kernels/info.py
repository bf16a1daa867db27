"""What to paste into a bug report: `python -m seer_kernels.info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import numpy as np
import torch

import seer_kernels

PACKAGES = (
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "sentence-transformers",
    "pytorch-metric-learning",
    "open_clip_torch",
    "trl",
    "lightning",
    "POT",
    "geomloss",
)
"""Packages that the losses meet, reported where they are installed."""
INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512")
"""As `seer::cpu::InstructionSet` numbers them."""
VARIABLES = (
    "SEER_KERNELS_ATOMICS",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
)
"""Environment variables that change what runs or how."""


def report() -> str:
    """Versions, machine, and what each backend can do here, with the reason where it cannot; a line of text each."""
    lines = [
        f"seer-kernels {seer_kernels.__version__}",
        f"python {platform.python_version()} ({sys.implementation.name}), {platform.platform()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})",
        f"numpy {np.__version__}",
        f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}, {memory}")
    for status in seer_kernels.backends().values():
        devices = ", ".join(status.devices) or "not available"
        lines.append(f"backend {status.name}: {devices}" + (f" ({status.reason})" if status.reason else ""))
    lines.append(f"native module: {_native()}")
    versions = {package: _version(package) for package in PACKAGES}
    lines += [f"{package} {version}" for package, version in versions.items() if version]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> str:
    """The instruction set in use and the best one here, and what GPUs the compiled module was built for."""
    try:
        from seer_kernels import _native
    except ImportError as error:
        return f"missing ({error})"
    levels = INSTRUCTION_SETS[_native.instruction_set()], INSTRUCTION_SETS[_native.best_instruction_set()]
    return f"{levels[0]} of {levels[1]}, CUDA architectures {_native.cuda_architectures or 'none'}"


if __name__ == "__main__":
    print("Paste the lines below into a bug report, with a few lines of code that show the problem and their output:\n")
    print(report())
