"""Builds seer_kernels._native: always for the CPU, and for CUDA where nvcc is found.

SEER_KERNELS_CUDA=auto|0|1   auto (default) builds CUDA code if nvcc is found; 1 demands it; 0 leaves it out
SEER_KERNELS_ARCHS=80,90     narrows the GPU targets, which by default are those of TARGETS that nvcc knows
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

TARGETS = ("80", "90", "100", "120")
CPU_SOURCES = ("csrc/module.cpp", "csrc/cpu/contrastive.cpp", "csrc/cpu/instruction_set.cpp")
CUDA_SOURCES: tuple[str, ...] = ()
HEADERS = tuple(str(p) for p in sorted(Path("csrc").rglob("*.h")))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home, "bin", "nvcc") if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def cuda_compiler() -> str | None:
    """The nvcc to use, or None for a build without CUDA."""
    wish = os.environ.get("SEER_KERNELS_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"SEER_KERNELS_CUDA must be auto, 0 or 1; got {wish!r}")
    nvcc = None if wish == "0" else find_nvcc()
    if wish == "1" and nvcc is None:
        raise SystemExit(
            "SEER_KERNELS_CUDA=1 asks for CUDA kernels, but nvcc was found neither under CUDA_HOME nor on PATH. "
            "Install the CUDA toolkit or set CUDA_HOME; SEER_KERNELS_CUDA=auto builds without it."
        )
    return nvcc


def cuda_targets(nvcc: str) -> list[str]:
    """The GPU architectures to build for."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listing)
    wish = os.environ.get("SEER_KERNELS_ARCHS")
    if not wish:
        return [t for t in TARGETS if t in known]
    targets = [t for t in re.split(r"[,; ]+", wish) if t]
    unknown = [t for t in targets if t not in known]
    if unknown or not targets:
        raise SystemExit(f"SEER_KERNELS_ARCHS={wish!r}: {nvcc} does not know {unknown}; it knows {', '.join(known)}")
    return targets


class BuildNative(build_ext):
    """Compiles the CUDA sources with nvcc, if there is one, and links them and the static CUDA runtime."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        nvcc = cuda_compiler()
        built = "CPU"
        if nvcc:
            targets = cuda_targets(nvcc)
            self.build_cuda(extension, nvcc, targets)
            built += f" and CUDA for {', '.join('sm_' + t for t in targets)} ({nvcc})"
        else:
            built += " only (no nvcc)" if find_nvcc() is None else " only (SEER_KERNELS_CUDA=0)"
        super().build_extension(extension)
        print(f"seer-kernels: built the native module for {built}", file=sys.stderr, flush=True)

    def build_cuda(self, extension: Pybind11Extension, nvcc: str, targets: list[str]) -> None:
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        # Machine code for each target, and PTX of the newest for GPUs to come.
        codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
        codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")

        def compile_one(source: str) -> str:
            target = folder / (Path(source).stem + ".o")
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"]
            subprocess.run([nvcc, *flags, *codes, "-c", source, "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            extension.extra_objects += pool.map(compile_one, CUDA_SOURCES)
        library_folders = [p for p in (Path(nvcc).resolve().parent.parent / d for d in ("lib64", "lib")) if p.exists()]
        extension.library_dirs += [str(p) for p in library_folders]
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        extension.define_macros.append(("SEER_CUDA_ARCHITECTURES", f'"{",".join(targets)}"'))


setup(
    ext_modules=[
        Pybind11Extension(
            "seer_kernels._native",
            sources=list(CPU_SOURCES),
            depends=list(HEADERS),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
