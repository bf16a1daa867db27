"""The CUDA kernels on the CPU: their own source, compiled with g++ against tests/shim (see device_shim.h)."""

from __future__ import annotations

import ctypes
import subprocess
from functools import partialmethod
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


class RowSet(ctypes.Structure):
    """`seer::RowSet`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first", "second")),
        *((name, ctypes.c_int64) for name in ("split", "rows")),
    )


def _fused_loss(number: type[ctypes.c_float] | type[ctypes.c_double]) -> type[ctypes.Structure]:
    """`seer::FusedLoss` for a C type of numbers, whose fields are also the arguments of the compiled kernel."""

    class FusedLoss(ctypes.Structure):
        _fields_ = (
            ("operands", Operands),
            ("query", RowSet),
            ("key", RowSet),
            ("D", ctypes.c_int64),
            ("feature_type", ctypes.c_int),
            ("form", ctypes.c_int),
            ("normalize", ctypes.c_bool),
            ("temperature_value", number),
            ("bias_value", number),
            *((name, ctypes.c_void_p) for name in ("row_gradient", "scratch", "rows", "slopes", "along")),
            *((name, ctypes.c_void_p) for name in ("total_loss", "total_weight", "mean_loss")),
            *((name, ctypes.c_void_p) for name in ("temperature_gradient", "bias_gradient")),
            ("write_slopes", ctypes.c_bool),
        )

    return FusedLoss


FUSED_LOSS = {"f32": _fused_loss(ctypes.c_float), "f64": _fused_loss(ctypes.c_double)}


class FusedGradients(ctypes.Structure):
    """`seer::FusedGradients`, likewise."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("P", "D")),
        *((name, RowSet) for name in ("query", "key", "query_gradient", "key_gradient")),
        ("feature_type", ctypes.c_int),
        ("self_contrast", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("slopes", "along", "scale")),
    )


def _structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _pointers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


TRANSPORT = _structure(
    "Transport",
    *((name, ctypes.c_int64) for name in ("B", "n", "m")),
    *_pointers("cost", "a", "b", "eps", "x_lengths", "y_lengths"),
    *((name, ctypes.c_double) for name in ("tau_a", "tau_b")),
    ("scale_cost", ctypes.c_int),
)
"""`seer::Transport`; likewise the three below, whose fields are the arguments of the compiled functions."""

STOPPING = _structure(
    "Stopping",
    ("max_iterations", ctypes.c_int64),
    *((name, ctypes.c_double) for name in ("tolerance", "above", "start", "factor", "until")),
)
POTENTIALS = _structure(
    "Potentials",
    *_pointers("value", "transport_cost", "f", "g", "scale", "marginal_error", "iterations", "converged", "usable"),
)
TRANSPORT_GRADIENT = _structure(
    "TransportGradient",
    *_pointers("value", "transport_cost", "f", "g", "scale", "cost_gradient", "a_gradient", "b_gradient"),
)


class CudaShim:
    """Has the CPU kernels' functions of `seer_kernels._native`, and runs the CUDA kernels in them."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.calls = 0
        for suffix in ("f32", "f64"):
            names = ("contrastive_rows", "project_rows", "fused_loss", "fused_gradients")
            for name in (*names, "sinkhorn_scratch", "sinkhorn_solve", "sinkhorn_gradient"):
                getattr(self._library, f"{name}_{suffix}").restype = ctypes.c_char_p
        self._library.fused_scratch.restype = ctypes.c_char_p
        self._library.copied_bytes.restype = ctypes.c_int64
        self._library.launches.restype = ctypes.c_int64
        self.configure()

    def configure(
        self,
        seed: int = 0,
        *,
        barriers: bool = True,
        wait_for_copies: bool = True,
        releases: bool = True,
        acquires: bool = True,
        zeros: bool = True,
        atomics: bool = True,
        missing_barrier: int = 0,
        shared_bytes: int = H100_SHARED_BYTES,
    ) -> None:
        """Starts a sequence of random schedules; what is switched off breaks the kernels on purpose (see `State`)."""
        works = (barriers, wait_for_copies, releases, acquires, zeros, atomics)
        self._library.configure(
            ctypes.c_uint(seed),
            (ctypes.c_bool * len(works))(*works),
            ctypes.c_int(missing_barrier),
            ctypes.c_int(shared_bytes),
        )

    def copied_bytes(self) -> int:
        """Bytes copied to shared memory since configure()."""
        return int(self._library.copied_bytes())

    def launches(self) -> int:
        """Kernels launched since configure()."""
        return int(self._library.launches())

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

    def _fused_loss(self, suffix: str, operands: Operands, *, threads: int = 1, **arguments: Any) -> None:
        structure = FUSED_LOSS[suffix]
        assert arguments.keys() | {"operands"} == {name for name, *_ in structure._fields_}
        self._check(
            getattr(self._library, f"fused_loss_{suffix}")(ctypes.byref(structure(operands=operands, **arguments)))
        )

    def _fused_gradients(self, suffix: str, *, threads: int = 1, **arguments: Any) -> None:
        assert arguments.keys() == {name for name, *_ in FusedGradients._fields_}
        self._check(getattr(self._library, f"fused_gradients_{suffix}")(ctypes.byref(FusedGradients(**arguments))))

    Operands_f32 = Operands_f64 = Operands

    def fused_scratch(self, *, P: int, N: int, M: int, D: int, self_contrast: bool) -> int:
        values = ctypes.c_int64()
        sizes = (ctypes.c_int64(size) for size in (P, N, M, D))
        error = self._library.fused_scratch(*sizes, ctypes.c_bool(self_contrast), ctypes.byref(values))
        if error is not None:
            raise RuntimeError(error.decode())
        return values.value

    def _sinkhorn_scratch(self, suffix: str, transport: ctypes.Structure, *, gradient: bool, device: int) -> int:
        size = ctypes.c_int64()
        function = getattr(self._library, f"sinkhorn_scratch_{suffix}")
        error = function(ctypes.byref(transport), ctypes.c_bool(gradient), ctypes.byref(size))
        if error is not None:
            raise RuntimeError(error.decode())
        return size.value

    def _sinkhorn_solve(
        self, suffix: str, transport: ctypes.Structure, *, scratch: int, device: int, stream: int, **arguments: Any
    ) -> None:
        stopping = STOPPING(**{name: arguments.pop(name) for name, _ in STOPPING._fields_})
        assert arguments.keys() == {name for name, _ in POTENTIALS._fields_}
        parts = (ctypes.byref(part) for part in (transport, stopping, POTENTIALS(**arguments)))
        self._check(getattr(self._library, f"sinkhorn_solve_{suffix}")(*parts, ctypes.c_void_p(scratch)))

    def _sinkhorn_gradient(
        self, suffix: str, transport: ctypes.Structure, *, scratch: int, device: int, stream: int, **arguments: Any
    ) -> None:
        at = POTENTIALS(**{name: arguments.pop(name) for name in ("f", "g", "scale")})
        outputs = ("cost_gradient", "a_gradient", "b_gradient")
        gradient = TRANSPORT_GRADIENT(
            **{name if name in outputs else name.removesuffix("_gradient"): value for name, value in arguments.items()}
        )
        parts = (ctypes.byref(part) for part in (transport, at, gradient))
        self._check(getattr(self._library, f"sinkhorn_gradient_{suffix}")(*parts, ctypes.c_void_p(scratch)))

    Transport_f32 = Transport_f64 = TRANSPORT

    sinkhorn_scratch_f32 = partialmethod(_sinkhorn_scratch, "f32")
    sinkhorn_scratch_f64 = partialmethod(_sinkhorn_scratch, "f64")
    sinkhorn_solve_cuda_f32 = partialmethod(_sinkhorn_solve, "f32")
    sinkhorn_solve_cuda_f64 = partialmethod(_sinkhorn_solve, "f64")
    sinkhorn_gradient_cuda_f32 = partialmethod(_sinkhorn_gradient, "f32")
    sinkhorn_gradient_cuda_f64 = partialmethod(_sinkhorn_gradient, "f64")

    def fused_loss_f32(self, operands: Operands, **arguments: Any) -> None:
        self._fused_loss("f32", operands, **arguments)

    def fused_loss_f64(self, operands: Operands, **arguments: Any) -> None:
        self._fused_loss("f64", operands, **arguments)

    def fused_gradients_f32(self, **arguments: Any) -> None:
        self._fused_gradients("f32", **arguments)

    def fused_gradients_f64(self, **arguments: Any) -> None:
        self._fused_gradients("f64", **arguments)

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
