"""Compiles the Triton kernels for chips that are not here, and reads off what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seer_kernels.contrastive import triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a block may use

_INTEGERS = "P N X Y D own_shift first_problem first_row row_count first_key key_count part_count part_keys bucket"
_FLOATS = "x_scale y_scale weights temperature bias row_parts column_parts logits x_anchors y_anchors unit gradient"
_TYPES = {
    **dict.fromkeys(_INTEGERS.split(), "i32"),
    **dict.fromkeys(_FLOATS.split(), "*fp32"),
    **dict.fromkeys(("x_labels", "y_labels"), "*i32"),
    **dict.fromkeys(("slopes_problem", "feature_problem", "gradient_problem"), "i64"),
    **dict.fromkeys(("slopes_row", "slopes_inner", "inner_count"), "i32"),
}
_UNALIGNED = ("P", "own_shift", "part_count", "bucket")
_FEATURES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Case(NamedTuple):
    """One kernel with one tuning configuration and one set of switches."""

    kernel: str
    config: int
    dtype: torch.dtype
    switches: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return "-".join([self.kernel, str(self.config), str(self.dtype)[6:], *(f"{k}={v}" for k, v in self.switches)])


class Binary(NamedTuple):
    shared: int
    spills: int
    assembly: str


def compile_case(case: Case, target: str) -> Binary:
    tuner = getattr(triton_kernels, f"_tuned_{case.kernel}")
    config = tuner.configs[case.config]
    constants = {**dict(case.switches), **config.kwargs}
    signature, attributes = {}, {}
    for position, parameter in enumerate(tuner.fn.params):
        name = parameter.name
        if parameter.is_constexpr or name in constants:
            signature[name] = "constexpr"
            continue
        features = name in ("x", "y", "features", "slopes")
        signature[name] = _FEATURES[case.dtype] if features else _TYPES[name]
        if name not in _UNALIGNED:  # what launches with sizes that are multiples of 16 promise
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(tuner.fn, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=TARGETS[target], options={"num_warps": config.num_warps, "num_stages": config.num_stages}
    )
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", assembly))
        return Binary(compiled.metadata.shared, spills, assembly)
    return Binary(compiled.metadata.shared, _stack_bytes(compiled.asm["cubin"]), compiled.asm["ptx"])


def _stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory: where registers spill to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
