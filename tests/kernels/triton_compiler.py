"""Compiles the Triton kernels for chips that are not here, and reads off what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import networkx
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seer_kernels.contrastive import triton_kernels
from seer_kernels.sinkhorn import triton_kernels as transport

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a block may use

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
_FEATURES = ("x", "y", "a", "b", "slopes")
_LABELS = ("x_labels", "y_labels")
_INTEGERS = (
    *("P", "N", "X", "Y", "D", "own_shift", "first_problem", "first_row", "row_count", "first_key", "key_count"),
    *("part_count", "part_keys", "bucket", "count", "plane", "rows", "columns", "inner"),
    *("a_row", "a_inner", "b_inner", "b_column", "out_row"),
)
_LONG_INTEGERS = ("a_problem", "b_problem", "out_problem")
_UNALIGNED = ("P", "own_shift", "part_count", "count", "bucket", "share")


class Case(NamedTuple):
    """One kernel with one tuning configuration and one set of switches: values of its constexpr arguments, and None for
    tensors that are left out."""

    kernel: str
    config: int
    dtype: torch.dtype
    switches: tuple[tuple[str, Any], ...]

    @property
    def multiplies(self) -> bool:
        return self.kernel in ("multiply", "gradient", "gradients") or ("products", None) in self.switches

    def __str__(self) -> str:
        return "-".join([self.kernel, str(self.config), str(self.dtype)[6:], *(f"{k}={v}" for k, v in self.switches)])


class Binary(NamedTuple):
    shared: int
    """Bytes of shared memory."""
    spilled: int
    """Bytes of local memory per thread, where registers spill to."""
    spills_in_loops: int
    """Instructions within loops that read or write it; always 0 for AMD's chips, where they are not looked for."""
    assembly: str


def _switches(kernel: str, target: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The sets of switches that a kernel is compiled with: the one that needs most registers first."""
    precision = {"PRECISION": "tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee"}
    widths = [64, 32, 16] if dtype == torch.float32 else [256, 128, 64, 32, 16]  # features that kernels pad to
    unit = {} if dtype == torch.float16 else {"unit": None}
    pairs = {"bias": None, "RULE": 2, "SELF": False, "X_WEIGHTED": True, "Y_WEIGHTED": True}
    few = {**pairs, "RULE": 0, "X_WEIGHTED": False, "Y_WEIGHTED": False, "weights": None, "x_scale": None}
    few |= {"y_scale": None}
    alone = {**pairs, "RULE": 1, "SELF": True}
    sigmoid = {k: v for k, v in pairs.items() if k != "bias"}
    if kernel == "multiply":
        block = {**precision, "BLOCK_K": 128 // dtype.itemsize}
        return [
            {**block, "ADD": add, **strides}
            for add in (True, False)
            for strides in ({"a_inner": 1, "b_column": 1}, {"a_row": 1, "b_column": 1}, {"a_inner": 1, "b_inner": 1})
        ]
    if kernel == "slopes":
        block = {**unit, "BLOCK_X": 16, "BLOCK_Y": 128}
        return [{**block, **pairs}, {**block, **few, "y_anchors": None}, {**block, **sigmoid, "y_anchors": None}]
    if kernel in ("gradient", "gradients"):
        if kernel == "gradients":
            widths = [block for block in widths if block * dtype.itemsize <= triton_kernels.ADDED_BYTES]
        uses = [pairs, {**few, "y_anchors": None}, {**sigmoid, "x_anchors": None}]
        uses = [*uses, alone] if kernel == "gradient" else [*uses, {**pairs, "gradient": None}]
        return [
            {**precision, **unit, **each, "EVEN": even, "BLOCK_D": block}
            | ({"y_gradient": None} if kernel == "gradient" else {})
            for each in uses
            for even, block in [(True, block) for block in widths] + [(False, widths[0])]
        ]
    if kernel == "statistics":
        alone_rows = {**alone, "column_parts": None}
        return [
            {**precision, **each, **block, "BLOCK_X": 64}
            for each in (pairs, {**few, "column_parts": None}, {**sigmoid, "column_parts": None}, alone_rows)
            for block in (
                *({"products": None, "EVEN": True, "BLOCK_D": features} for features in widths),
                {"products": None, "EVEN": False, "BLOCK_D": widths[0]},
                {"EVEN": False, "BLOCK_D": 16},
            )
        ]
    if kernel == "settle":
        return [{"SIGMOID": sigmoid, "BLOCK": 128} for sigmoid in (False, True)]
    if kernel == "merge":
        return [{"BLOCK": 128}]
    rows = [{"BLOCK": 1, "BLOCK_D": 1024}, {"BLOCK": 64, "BLOCK_D": 16}]
    return rows if kernel == "inverse_norms" else [{**unit, **each} for each in rows]


_KERNELS = ("multiply", "statistics", "gradient", "gradients", "slopes", "settle", "merge", "inverse_norms", "project")


def every_case() -> list[tuple[str, Case]]:
    return [
        (target, Case(kernel, config, dtype, tuple(switches.items())))
        for target in TARGETS
        for kernel in _KERNELS
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for switches in _switches(kernel, target, dtype)
        for config in _usable(kernel, target, switches, dtype)
    ]


def some_cases() -> list[tuple[str, Case]]:
    """The largest usable configuration of each kernel that multiplies, with most switches on; and one of each other."""
    cases = []
    for target in TARGETS:
        for kernel in _KERNELS if target == "sm_90" else _KERNELS[:4]:
            switches = _switches(kernel, target, torch.bfloat16)[0]
            config = _usable(kernel, target, switches, torch.bfloat16)[-1]
            cases.append((target, Case(kernel, config, torch.bfloat16, tuple(switches.items()))))
    return cases


def _usable(kernel: str, target: str, switches: dict[str, Any], dtype: torch.dtype) -> list[int]:
    """Which tuning configurations the launcher would try on a chip."""
    tuner = getattr(triton_kernels, f"_tuned_{kernel}", None)
    if tuner is None:
        return [0]
    known = ("a", "x", "row_parts", "column_parts", "y_gradient")
    arguments = {name: torch.empty(0, dtype=dtype) for name in tuner.arg_names if name in known}
    with mock.patch.object(triton_kernels, "_shared_memory", return_value=SHARED_LIMITS[target]):
        usable = triton_kernels._usable_configs(tuner.configs, arguments, **switches)
    return [tuner.configs.index(config) for config in usable]


def allowed_spills(case: Case) -> int:
    """Bytes that may wait in local memory while a loop runs. A product of 128 x 256 that adds holds all accumulators
    and addresses of them at once before its loop. Elsewhere the compiler puts up to four registers aside."""
    if case.kernel != "multiply" or ("ADD", True) not in case.switches:
        return 16
    return 288 if _kernel_and_config(case)[1].kwargs["BLOCK_Y"] == 256 else 16


def compile_case(case: Case, target: str, **options: int) -> Binary:
    kernel, config = _kernel_and_config(case)
    constants = {**dict(case.switches), **config.kwargs}
    signature, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in constants:
            signature[name] = "constexpr"
            continue
        if name in _INTEGERS:
            signature[name] = "i32"
        elif name in _LONG_INTEGERS:
            signature[name] = "i64"
        elif name == "share":
            signature[name] = "fp32"
        else:
            signature[name] = _TYPES[case.dtype] if name in _FEATURES else "*i32" if name in _LABELS else "*fp32"
        if name not in _UNALIGNED:  # sizes that are multiples of 16: what the launcher promises of such
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **options}
    return _compiled(kernel, signature, constants, attributes, target, options)


def _compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    attributes: dict[Any, Any],
    target: str,
    options: dict[str, int],
) -> Binary:
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        spilled = 4 * sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", assembly))
        return Binary(compiled.metadata.shared, spilled, 0, assembly)
    cubin = compiled.asm["cubin"]
    spilled = _stack_bytes(cubin)
    return Binary(compiled.metadata.shared, spilled, _spills_in_loops(cubin) if spilled else 0, compiled.asm["ptx"])


def _kernel_and_config(case: Case) -> tuple[Any, Any]:
    tuner = getattr(triton_kernels, f"_tuned_{case.kernel}", None)
    if tuner is not None:
        return tuner.fn, tuner.configs[case.config]
    return getattr(triton_kernels, f"_{case.kernel}"), triton.Config({})


def _stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory: where registers spill to."""
    return max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin)))


def _spills_in_loops(cubin: bytes) -> int:
    """Instructions that read or write local memory and from which the program can come back to them."""
    disassembly = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", _cuobjdump("-sass", cubin))
    instructions = [(int(address, 16), text.strip()) for address, text in disassembly]
    following = dict(zip([at for at, _ in instructions], [at for at, _ in instructions[1:]], strict=False))
    returns = [following[at] for at, text in instructions if "CALL" in text]
    flow = networkx.DiGraph()
    for at, text in instructions:
        jump = re.search(r"\b(?:BRA|CALL|BSSY)\b.*?(0x[0-9a-f]+)", text)
        if jump:
            flow.add_edge(at, int(jump[1], 16))
        if re.search(r"\bRET\b", text):
            flow.add_edges_from((at, back) for back in returns)
        if at in following and not re.match(r"(BRA|EXIT|RET|CALL)(\.\w+)*( 0x|$)", text):
            flow.add_edge(at, following[at])
    looping = set().union(*(part for part in networkx.strongly_connected_components(flow) if len(part) > 1))
    spills = [at for at, text in instructions if re.search(r"\b(LDL|STL)\b", text)]
    assert looping, "a kernel that spills: expected a loop in its disassembly"
    assert spills, "a kernel that spills: expected loads and stores of local memory in its disassembly"
    return sum(at in looping for at in spills)


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


class TransportCase(NamedTuple):
    """One kernel of optimal transport: values of its constexpr arguments, and None for tensors that are left out."""

    kernel: str
    warps: int
    switches: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return "-".join([self.kernel, str(self.warps), *(f"{k}={v}" for k, v in self.switches)])


_TRANSPORT_TYPES = {
    **dict.fromkeys(("n", "m", "count", "parts", "part_rows", "blocks", "row_count", "column_count"), "i32"),
    **dict.fromkeys(("tau_a", "tau_b", "tolerance", "anneal_tolerance", "anneal_factor", "constant_rate"), "fp32"),
    **dict.fromkeys(("share_a", "share_b"), "fp32"),
    **dict.fromkeys(("active", "clean", "iterations"), "*i32"),
    **dict.fromkeys(("x_lengths", "y_lengths"), "*i64"),
    "max_iterations": "i32",
    "totals": "*fp64",
}


def every_transport_case() -> list[tuple[str, TransportCase]]:
    widths = [transport.SMALL_COLUMNS]
    while widths[-1] <= transport.RESIDENT_COLUMNS:
        widths.append(2 * widths[-1])
    equal = {"x_lengths": None, "y_lengths": None}
    one_sided = {"columns": None, "offset": None, "slope": None}
    sweeps: dict[bool, list[tuple[str, dict[str, Any]]]] = {
        True: [
            ("iterate", {"RELAXED": False, "ahead": None, **equal}),
            ("sweep", {"COSTS": True, **equal}),
            ("sweep", {"COSTS": False, **equal}),
            ("sweep", {"COSTS": True, **equal, **one_sided}),
        ],
        False: [
            ("iterate", {"RELAXED": True}),
            ("sweep", {"COSTS": True}),
            ("alternate", {}),
            ("alternate_back", {"ADD": True}),
            ("alternate_back", {"ADD": False}),
        ],
    }
    tile = {"ROWS": 4, "COLUMNS": transport.ELEMENTWISE_COLUMNS}
    others: list[tuple[str, dict[str, Any]]] = [
        ("inspect", tile),
        ("columns", {"RELAXED": True, "BLOCK": 128}),
        ("columns", {"RELAXED": False, "BLOCK": 128, "ahead": None}),
        ("decide", {"RELAXED": True, "BLOCK": 128}),
        ("decide", {"RELAXED": False, "BLOCK": 128}),
        ("add_parts", {"BLOCK": 128}),
        ("alternate_columns", {"BLOCK": 128}),
        ("cost_gradient", tile),
        ("cost_gradient", {**tile, "along": None, "largest": None, "top": None}),
        ("unscale", tile),
        ("unscale", {**tile, "top": None}),
    ]
    cases = [TransportCase(kernel, 4, tuple(switches.items())) for kernel, switches in others]
    for m in widths:
        for plain, launches in sweeps.items():
            shape = transport.Geometry.of(m, plain=plain)
            block = {"RESIDENT": shape.resident, "ROWS": shape.rows, "COLUMNS": shape.columns}
            cases += [
                TransportCase(kernel, shape.warps, tuple({**block, **switches}.items()))
                for kernel, switches in launches
            ]
    return [(target, case) for target in TARGETS for case in dict.fromkeys(cases)]


def some_transport_cases() -> list[tuple[str, TransportCase]]:
    """What keeps sums of columns, with the longest resident rows and with streamed ones, for each chip; on sm_90 each
    other kernel."""
    many_sums = ("iterate", "alternate", "alternate_back")
    seen, some = set(), []
    for target, case in reversed(every_transport_case()):
        switches = dict(case.switches)
        if case.kernel in many_sums:
            if not switches["RESIDENT"] or switches["COLUMNS"] >= transport.RESIDENT_COLUMNS_OF_OTHERS:
                some.append((target, case))
        elif target == "sm_90" and case.kernel not in seen:
            seen.add(case.kernel)
            some.append((target, case))
    return some


def compile_transport_case(case: TransportCase, target: str) -> Binary:
    kernel, constants = getattr(transport, f"_{case.kernel}"), dict(case.switches)
    signature, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _TRANSPORT_TYPES.get(name, "*fp32")
        if name in ("n", "m") or signature[name].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return _compiled(kernel, signature, constants, attributes, target, {"num_warps": case.warps})
