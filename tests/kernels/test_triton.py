"""The Triton backend without a GPU: numerics in Triton's interpreter, and compilation for chips that are not here.

By default a few representative compilations run for each chip. SEER_COMPILE_ALL=1 compiles every kernel in every tuning
configuration, dtype and set of switches for every chip, which takes many minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seer_kernels
from seer_kernels import _dispatch

HERE = Path(__file__).parent

try:
    import triton_compiler
except ImportError as error:
    if not (error.name or "").startswith("triton"):
        raise
    pytest.skip(f"needs Triton: {error}", allow_module_level=True)


def test_numerics_in_the_interpreter() -> None:
    """A process of its own: whether kernels are interpreted is settled when they are defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    # NumPy warns of the overflow in lanes that are masked afterwards.
    command += ["-W", "ignore:overflow:RuntimeWarning", "-W", "ignore:invalid value:RuntimeWarning"]
    done = subprocess.run(
        [*command, "interpreted_triton.py"],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


CASES = triton_compiler.every_case() if os.environ.get("SEER_COMPILE_ALL") == "1" else triton_compiler.some_cases()


@pytest.mark.parametrize(("target", "case"), CASES, ids=str)
def test_kernels_compile_for_chips_that_are_not_here(target: str, case: triton_compiler.Case) -> None:
    binary = triton_compiler.compile_case(case, target)
    assert binary.shared <= triton_compiler.SHARED_LIMITS[target]
    if target != "gfx942":  # its configurations are those tuned for NVIDIA's register file
        assert binary.spilled <= triton_compiler.allowed_spills(case)
    if target == "sm_90" and case.multiplies and case.dtype != torch.float32:
        assert "wgmma.mma_async" in binary.assembly


def test_backends_say_why_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    status = seer_kernels.backends()["triton"]
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        assert not status.available
        assert "TRITON_INTERPRET=1" in status.reason
        with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on cpu: torch finds no usable CUDA"):
            seer_kernels.info_nce(torch.ones(1, 1), torch.ones(1, 1), backend="triton")
    _dispatch._triton_status.cache_clear()
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    assert seer_kernels.backends()["triton"].reason == "the package triton is not installed"
    _dispatch._triton_status.cache_clear()


def test_auto_on_cuda_takes_native_then_triton_then_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    status = {name: _dispatch.BackendStatus(name, ("cuda",), "") for name in ("native", "triton")}
    monkeypatch.setattr(_dispatch, "_native_status", lambda: status["native"])
    monkeypatch.setattr(_dispatch, "_triton_status", lambda: status["triton"])
    assert _dispatch.choose("auto", cuda, torch.bfloat16) == "native"
    status["native"] = _dispatch.BackendStatus("native", ("cpu",), "no cuda")
    assert _dispatch.choose("auto", cuda, torch.bfloat16) == "triton"
    assert _dispatch.choose("auto", cuda, torch.float64) == "reference"
    assert _dispatch.choose("triton", cuda, torch.float16) == "triton"


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, seer_kernels; sys.exit('triton' in sys.modules)"
    alone = subprocess.run([sys.executable, "-c", "import sys, torch; sys.exit('triton' in sys.modules)"])
    if alone.returncode:
        pytest.skip("torch itself imports triton here")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
