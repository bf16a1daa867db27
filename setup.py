"""Builds seer_kernels._native: always for the CPU, and for CUDA where nvcc is found.

SEER_KERNELS_CUDA=auto|0|1   auto (default) builds CUDA code if nvcc is found; 1 demands it; 0 leaves it out
SEER_KERNELS_ARCHS=80,90     narrows the GPU targets, which by default are those of TARGETS that nvcc knows
SEER_KERNELS_SANITIZE=address,undefined   instruments the CPU code, with GCC or Clang: for tests, never to install
                             (tests/sanitize.py builds and runs with it)

The CPU kernels are written in the vector extensions that GCC and Clang share, which Microsoft's compiler lacks: on
Windows clang-cl compiles them, which comes with LLVM and with Visual Studio ("C++ Clang tools for Windows").
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

TARGETS = ("80", "90", "100", "120")
CPU_SOURCES = (
    "csrc/module.cpp",
    "csrc/cpu/contrastive.cpp",
    "csrc/cpu/fused.cpp",
    "csrc/cpu/sinkhorn.cpp",
    "csrc/cpu/instruction_set.cpp",
)
CUDA_SOURCES = ("csrc/cuda/contrastive.cu", "csrc/cuda/fused.cu", "csrc/cuda/sinkhorn.cu")
CPU_FLAGS = ("-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi", "-pthread")
CLANG_CL_FLAGS = ("/O2", "/clang:-O3", "/clang:-fno-math-errno", "-Wno-psabi")
SANITIZE_FLAGS = ("-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g", "-O1")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
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
    if sys.platform != "linux":
        if wish == "1":
            raise SystemExit(f"SEER_KERNELS_CUDA=1: CUDA kernels are built on Linux only, not on {sys.platform}")
        return None
    nvcc = None if wish == "0" else find_nvcc()
    if wish == "1" and nvcc is None:
        raise SystemExit(
            "SEER_KERNELS_CUDA=1 asks for CUDA kernels, but nvcc was found neither under CUDA_HOME nor on PATH. "
            "Install the CUDA toolkit or set CUDA_HOME; SEER_KERNELS_CUDA=auto builds without it."
        )
    return nvcc


def why_no_cuda() -> str:
    if os.environ.get("SEER_KERNELS_CUDA") == "0":
        return "SEER_KERNELS_CUDA=0"
    return "no nvcc" if sys.platform == "linux" else f"no CUDA on {sys.platform}"


def cuda_targets(nvcc: str) -> list[str]:
    """The GPU architectures to build for."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listing)
    wish = os.environ.get("SEER_KERNELS_ARCHS")
    if not wish:
        targets = [t for t in TARGETS if t in known]
        if not targets:
            raise SystemExit(
                f"{nvcc} knows none of the GPU targets {', '.join(TARGETS)}; it knows {', '.join(known)}. "
                "Install a newer CUDA toolkit, or build without it: SEER_KERNELS_CUDA=0"
            )
        return targets
    targets = [t for t in re.split(r"[,; ]+", wish) if t]
    unknown = [t for t in targets if t not in known]
    if unknown or not targets:
        raise SystemExit(
            f"SEER_KERNELS_ARCHS must name GPU targets such as {','.join(TARGETS)}; got {wish!r}, and {nvcc} "
            f"knows only {', '.join(known)}"
        )
    return sorted(set(targets), key=int)


def cuda_libraries(nvcc: str) -> str:
    """The folder of the static CUDA runtime. nvcc says where its toolkit is: the one on PATH may be a wrapper."""
    trace = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", trace, re.MULTILINE)
    toolkit = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    for pattern in ("lib64", "lib", "targets/*/lib"):
        for folder in sorted(toolkit.glob(pattern)):
            if (folder / "libcudart_static.a").exists():
                return str(folder.resolve())
    raise SystemExit(
        f"no libcudart_static.a in the CUDA toolkit {toolkit} of {nvcc}: install the runtime's development files, "
        "or build without CUDA: SEER_KERNELS_CUDA=0"
    )


class BuildNative(build_ext):
    """Compiles the CUDA sources with nvcc, if there is one, and links them and the static CUDA runtime."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        nvcc = cuda_compiler()
        if nvcc:
            targets = cuda_targets(nvcc)
            self.build_cuda(extension, nvcc, targets)
            built = f"CPU and CUDA for {', '.join('sm_' + t for t in targets)} ({nvcc})"
        else:
            built = f"CPU only ({why_no_cuda()})"
        sanitizers = os.environ.get("SEER_KERNELS_SANITIZE")
        if sanitizers:
            built += f", with sanitizers {sanitizers}"
        if self.compiler.compiler_type == "msvc":
            self.use_clang_cl()
            extension.extra_compile_args += CLANG_CL_FLAGS
        else:
            extension.extra_compile_args += CPU_FLAGS
            extension.extra_link_args.append("-pthread")
        if sanitizers:
            extension.extra_compile_args += [*SANITIZE_FLAGS, f"-fsanitize={sanitizers}"]
            extension.extra_link_args.append(f"-fsanitize={sanitizers}")
        # A module left in the build folder serves only if it was built for the same.
        stamp = Path(self.build_temp, "built")
        self.force = self.force or not stamp.exists() or stamp.read_text() != built
        super().build_extension(extension)
        stamp.write_text(built)
        print(f"seer-kernels: built the native module for {built}", file=sys.stderr, flush=True)

    def use_clang_cl(self) -> None:
        """Compiles with clang-cl where setuptools would run Microsoft's cl; the linker stays Microsoft's."""
        llvm = Path(os.environ.get("PROGRAMFILES", "C:/Program Files"), "LLVM", "bin", "clang-cl.exe")
        clang_cl = shutil.which("clang-cl") or (str(llvm) if llvm.exists() else None)
        if clang_cl is None:
            raise SystemExit(
                "clang-cl was found neither on PATH nor under LLVM, and cl lacks the vector extensions that kernels "
                "are written in. Install LLVM, or Visual Studio's component 'C++ Clang tools for Windows'."
            )
        if not self.compiler.initialized:
            self.compiler.initialize()
        self.compiler.cc = clang_cl

    def build_cuda(self, extension: Pybind11Extension, nvcc: str, targets: list[str]) -> None:
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        # Machine code for each target, and PTX of the newest for GPUs to come.
        codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
        codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
        for source in CUDA_SOURCES:
            built = str(folder / (Path(source).stem + ".o"))
            command = [nvcc, *NVCC_FLAGS, "--threads=0", *codes, "-c", source, "-o", built]
            if subprocess.run(command).returncode:
                raise SystemExit(f"{' '.join(command)} failed; SEER_KERNELS_CUDA=0 builds without CUDA")
            extension.extra_objects.append(built)
        extension.library_dirs.append(cuda_libraries(nvcc))
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        extension.define_macros.append(("SEER_CUDA_ARCHITECTURES", f'"{",".join(targets)}"'))


setup(
    ext_modules=[
        Pybind11Extension(
            "seer_kernels._native",
            sources=list(CPU_SOURCES),
            depends=[*HEADERS, *CUDA_SOURCES],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
