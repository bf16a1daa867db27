"""The CUDA kernels on the CPU: their own source, compiled with g++ against tests/shim (see device_shim.h)."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

SHIM = Path(__file__).parents[1] / "shim"

H100_SHARED_BYTES = 113 << 10
"""Half of the shared memory of a multiprocessor, less what CUDA keeps for itself."""


class Operands(ctypes.Structure):
    """`seer::Operands` of csrc/contrastive.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("P", "N", "M")),
        *((name, ctypes.c_void_p) for name in ("query_scale", "key_scale", "temperature", "bias")),
        *((name, ctypes.c_void_p) for name in ("query_labels", "key_labels", "weights")),
        ("shared_weights", ctypes.c_bool),
        ("own_shift", ctypes.c_int64),
        ("self_contrast", ctypes.c_bool),
        ("same_label", ctypes.c_int),
    )


class RowBlock(ctypes.Structure):
    """`seer::RowBlock`, whose fields are also the arguments of the compiled kernels."""

    _fields_ = (
        ("operands", Operands),
        ("products", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_problem", "problem_count", "first_row", "row_count")),
        ("row_gradient", ctypes.c_void_p),
        ("write_gradient", ctypes.c_bool),
        ("rows", ctypes.c_void_p),
    )


class CudaShim:
    """Has the CPU kernels' functions of `seer_kernels._native`, and runs the CUDA kernels in them."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.calls = 0
        for suffix in ("f32", "f64"):
            for name in ("contrastive_rows", "project_rows"):
                getattr(self._library, f"{name}_{suffix}").restype = ctypes.c_char_p
        self._library.copied_bytes.restype = ctypes.c_int64
        self.configure()

    def configure(
        self,
        seed: int = 0,
        *,
        barriers: bool = True,
        wait_for_copies: bool = True,
        shared_bytes: int = H100_SHARED_BYTES,
    ) -> None:
        """Starts a sequence of random schedules; without barriers or waits the kernels are broken on purpose."""
        self._library.configure(
            ctypes.c_uint(seed), ctypes.c_bool(barriers), ctypes.c_bool(wait_for_copies), ctypes.c_int(shared_bytes)
        )

    def copied_bytes(self) -> int:
        """Bytes copied to shared memory since configure()."""
        return int(self._library.copied_bytes())

    def _contrastive_rows(self, suffix: str, operands: Operands, *, threads: int = 1, **arguments: int | bool) -> None:
        assert arguments.keys() | {"operands"} == {name for name, *_ in RowBlock._fields_}
        block = RowBlock(operands=operands, **arguments)
        self._check(getattr(self._library, f"contrastive_rows_{suffix}")(ctypes.byref(block)))

    def _project_rows(
        self, suffix: str, *, gradient: int, x: int, inverse_norm: int, rows: int, D: int, threads: int = 1
    ) -> None:
        pointers = (ctypes.c_void_p(address) for address in (gradient, x, inverse_norm))
        sizes = (ctypes.c_int64(rows), ctypes.c_int64(D))
        self._check(getattr(self._library, f"project_rows_{suffix}")(*pointers, *sizes))

    def _check(self, error: bytes | None) -> None:
        self.calls += 1
        if error is not None:
            raise RuntimeError(error.decode())

    Operands_f32 = Operands_f64 = Operands

    def contrastive_rows_f32(self, operands: Operands, **arguments: Any) -> None:
        self._contrastive_rows("f32", operands, **arguments)

    def contrastive_rows_f64(self, operands: Operands, **arguments: Any) -> None:
        self._contrastive_rows("f64", operands, **arguments)

    def project_rows_f32(self, **arguments: Any) -> None:
        self._project_rows("f32", **arguments)

    def project_rows_f64(self, **arguments: Any) -> None:
        self._project_rows("f64", **arguments)


def build(folder: Path) -> CudaShim:
    """Compiles the kernels for the CPU into `folder`."""
    library = folder / "cuda_shim.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = ["g++", *flags, f"-I{SHIM}", str(SHIM / "kernels.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return CudaShim(library)
