"""nvcc compiles the CUDA kernels for every GPU target without spills, and the built module stands on its own."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seer_kernels import _dispatch, _native, info_nce, sinkhorn_from_cost
from seer_kernels.contrastive import native
from seer_kernels.contrastive.problem import PairSlopes
from seer_kernels.sinkhorn import native as transport
from seer_kernels.sinkhorn.problem import Cotangents

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is missing")


def of_setup(name: str) -> Any:
    """The value of a constant of setup.py, which cannot be imported."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"setup.py defines no {name}")


@needs_nvcc
@pytest.mark.parametrize("target", of_setup("TARGETS"))
@pytest.mark.parametrize("source", of_setup("CUDA_SOURCES"))
def test_nothing_spills(source: str, target: str, tmp_path: Path) -> None:
    known = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if f"compute_{target}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{target}")
    flags = [*of_setup("NVCC_FLAGS"), f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v"]
    command = [str(NVCC), *flags, "-c", str(ROOT / source), "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    report = re.findall(r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill", result.stderr)
    kernels = set(re.findall(r"SEER_KERNEL\S*\s+(\w+)\(", (ROOT / source).read_text()))
    assert kernels
    # Each for fp32 and fp64, each with packs or in registers and without; or each for four dtypes.
    assert len(report) == 4 * len(kernels), result.stderr
    assert all(any(kernel in name for kernel in kernels) for name, *_ in report)
    spilling = {name: (frame, spilled) for name, frame, spilled in report if (frame, spilled) != ("0", "0")}
    assert not spilling


def build(tmp_path: Path, **environment: str) -> str:
    """What setup.py says on being refused a build, on a PATH without nvcc unless one is given."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(tmp_path),
        "--build-lib",
        str(tmp_path),
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=inherited | {"PATH": os.pathsep.join(folders)} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    return result.stderr


def test_cuda_on_demand_needs_nvcc(tmp_path: Path) -> None:
    assert "nvcc was found neither under CUDA_HOME nor on PATH" in build(tmp_path, SEER_KERNELS_CUDA="1")


def test_unknown_build_option(tmp_path: Path) -> None:
    assert "SEER_KERNELS_CUDA must be auto, 0 or 1; got 'yes'" in build(tmp_path, SEER_KERNELS_CUDA="yes")


@needs_nvcc
def test_unknown_target(tmp_path: Path) -> None:
    message = build(tmp_path, SEER_KERNELS_ARCHS="90,12345", PATH=os.environ["PATH"])
    assert "SEER_KERNELS_ARCHS must name GPU targets such as 80,90,100,120; got '90,12345'" in message


built_with_cuda = pytest.mark.skipif(not _native.cuda_architectures, reason="the native module was built without nvcc")


@built_with_cuda
def test_a_refused_launch_says_why() -> None:
    arguments = {"gradient": 16, "x": 16, "inverse_norm": 16, "rows": 1, "D": 4, "stream": 0}
    with pytest.raises(RuntimeError, match=r"project_rows on cuda:999 failed: .* \(cudaError\w+\)"):
        _native.project_rows_cuda_f32(**arguments, device=999)


@built_with_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_refused_launches_of_small_problems_say_why(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python hands over is what the compiled functions take."""

    def launch(kernel: str, like: Tensor, *operands: Any, **arguments: Any) -> None:
        suffix = "f64" if like.dtype == torch.float64 else "f32"
        getattr(_native, f"{kernel}_cuda_{suffix}")(*operands, **arguments, device=999, stream=0)

    monkeypatch.setattr(native, "_launch", launch)
    monkeypatch.setattr(native, "_is_cuda", lambda device: True)
    x = torch.ones(1, 3, 4, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"fused_loss on cuda:999 failed: .* \(cudaError\w+\)"):
        info_nce(x, x, backend="native")
    slopes = PairSlopes(torch.ones(1, 3, 3), torch.ones(1, 6))
    if dtype == torch.float64:
        slopes = PairSlopes(*(values.double() for values in slopes))
    with pytest.raises(RuntimeError, match=r"fused_gradients on cuda:999 failed: .* \(cudaError\w+\)"):
        native.gradients_from_slopes(x, x, slopes, None, False, (True, True))


@built_with_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_refused_launches_of_optimal_transport_say_why(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python hands over is what the compiled functions take; where there is no such device, the first of them to
    ask for its properties says so, and with what it would answer the launch does."""
    monkeypatch.setattr(transport, "_is_cuda", lambda device: True)
    monkeypatch.setattr(transport, "_place", lambda device: {"device": 999, "stream": 0})
    cost = torch.ones(2, 3, 4, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"sinkhorn_solve on cuda:999 failed: .* \(cudaError\w+\)"):
        sinkhorn_from_cost(cost, backend="native")
    weights = torch.ones(2, 3, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    scale = torch.ones(2, dtype=dtype)
    problem = transport.Problem(cost, *weights, scale, None, None, 1.0, 1.0, None, 10, 1e-3)
    arrived = Cotangents(scale, None, None, None, None)
    with pytest.raises(RuntimeError, match=r"sinkhorn_gradient on cuda:999 failed: .* \(cudaError\w+\)"):
        transport.gradients(problem, *weights, scale, arrived)
    for kernel in ("solve", "gradient"):
        size = f"sinkhorn_scratch_{'f64' if dtype == torch.float64 else 'f32'}"
        monkeypatch.setattr(transport, "_native", WithScratch(size))
        with pytest.raises(RuntimeError, match=rf"sinkhorn_{kernel} on cuda:999 failed: .* \(cudaError\w+\)"):
            transport.solve(problem) if kernel == "solve" else transport.gradients(problem, *weights, scale, arrived)


class WithScratch:
    """The compiled module, but for one function that answers without a device."""

    def __init__(self, name: str) -> None:
        setattr(self, name, lambda *arguments, **options: 64)

    def __getattr__(self, name: str) -> Any:
        return getattr(_native, name)


@built_with_cuda
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is missing")
def test_the_module_needs_no_cuda_libraries() -> None:
    """It imports on machines without CUDA, and beside any torch."""
    dynamic = subprocess.run(["readelf", "-d", _native.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert not [name for name in needed if re.search("cuda|cudart|torch|c10", name)]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80,90,100,120", (7, 5), False),
        ("80,90,100,120", (8, 0), True),
        ("80,90,100,120", (8, 9), True),
        ("80,90,100,120", (10, 3), True),
        ("80,90,100,120", (12, 1), True),
        ("80,90,100,120", (13, 0), True),
        ("86", (8, 0), False),
        ("80,120", (9, 0), False),
        ("90", (10, 0), True),
    ],
)
def test_gpus_that_the_build_covers(
    architectures: str, capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any other GPU `auto` takes the reference, and says why."""
    monkeypatch.setattr(_native, "cuda_architectures", architectures)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    status = _dispatch._native_status.__wrapped__()
    assert ("cuda" in status.devices) == runs
    assert ("cuda:0 is sm_" in status.reason) == (not runs)
