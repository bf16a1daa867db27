"""Prints what is here: device, versions, what serves it, and the rates of a library's matrix product and of a copy."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence

import harness
import torch

PACKAGES = ("numpy", "triton", "transformers", "peft", "pybind11", "pot", "geomloss", "pytorch-metric-learning")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable CUDA device")
    device = torch.device(options.device)
    for name, value in harness.environment(device, PACKAGES).items():
        print(f"{name}: {value or 'not installed'}" if name in PACKAGES else f"{name}: {value}")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        print(f"compute capability: {properties.major}.{properties.minor}")
        print(f"multiprocessors: {properties.multi_processor_count}, L2 cache: {properties.L2_cache_size >> 20} MiB")
        print(f"memory: {properties.total_memory >> 20} MiB, devices: {torch.cuda.device_count()}")
    if nvcc := shutil.which("nvcc"):
        print(f"nvcc: {subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout.splitlines()[-1]}")
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        found = harness.ceilings(device, dtype)
        rates.append(f"{str(dtype)[6:]} product {found.flops_per_second / 1e12:.3g} Tflop/s")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}: {', '.join(rates)}, copy {found.bytes_per_second / 1e9:.4g} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
