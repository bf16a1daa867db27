"""The Triton backend without a GPU: numerics in Triton's interpreter, and compilation for chips that are not here.

By default a few representative compilations run for each chip. SEER_COMPILE_ALL=1 compiles every kernel in every tuning
configuration, dtype and set of switches for every chip, which takes many minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import seer_kernels
from seer_kernels import _dispatch
from seer_kernels.contrastive import functional, native, reference
from seer_kernels.contrastive.problem import Pairing, Problem
from seer_kernels.sinkhorn import reference as plain_transport
from seer_kernels.sinkhorn.costs import backend_module
from seer_kernels.transport_loss import _no_alternation

HERE = Path(__file__).parent

try:
    import triton_compiler

    from seer_kernels.contrastive import triton_kernels
    from seer_kernels.sinkhorn import triton_kernels as transport
except ImportError as error:
    if not (error.name or "").startswith("triton"):
        raise
    pytest.skip(f"needs Triton: {error}", allow_module_level=True)


@pytest.mark.parametrize("file", ["interpreted_triton.py", "interpreted_sinkhorn.py"])
def test_numerics_in_the_interpreter(file: str) -> None:
    """A process of its own: whether kernels are interpreted is settled when they are defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    # NumPy warns of the overflow in lanes that are masked afterwards.
    command += ["-W", "ignore:overflow:RuntimeWarning", "-W", "ignore:invalid value:RuntimeWarning"]
    done = subprocess.run(
        [*command, file],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


EVERY = os.environ.get("SEER_COMPILE_ALL") == "1"
CASES = triton_compiler.every_case() if EVERY else triton_compiler.some_cases()
TRANSPORT_CASES = triton_compiler.every_transport_case() if EVERY else triton_compiler.some_transport_cases()


@pytest.mark.parametrize(("target", "case"), CASES, ids=str)
def test_kernels_compile_for_chips_that_are_not_here(target: str, case: triton_compiler.Case) -> None:
    binary = triton_compiler.compile_case(case, target)
    assert binary.shared <= triton_compiler.SHARED_LIMITS[target]
    if target != "gfx942":  # its configurations are those tuned for NVIDIA's register file
        assert binary.spilled <= triton_compiler.allowed_spills(case)
        assert binary.spills_in_loops == 0
    if target == "sm_90" and case.multiplies and case.dtype != torch.float32:
        assert "wgmma.mma_async" in binary.assembly


def test_spills_within_loops_are_seen() -> None:
    (case,) = [case for target, case in CASES if target == "sm_90" and case.kernel == "gradient"][:1]
    binary = triton_compiler.compile_case(case, "sm_90", maxnreg=96)
    assert binary.spilled > 16
    assert binary.spills_in_loops > 0


@pytest.mark.parametrize(("target", "case"), TRANSPORT_CASES, ids=str)
def test_transport_kernels_compile_for_chips_that_are_not_here(
    target: str, case: triton_compiler.TransportCase
) -> None:
    binary = triton_compiler.compile_transport_case(case, target)
    assert binary.shared <= triton_compiler.SHARED_LIMITS[target]
    # Rows of 16384 costs take all registers; on sm_100 six more.
    longest = target == "sm_100" and dict(case.switches).get("COLUMNS") == transport.RESIDENT_COLUMNS
    assert binary.spilled <= (24 if longest else 0)


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
    status = {name: _dispatch.BackendStatus(name, ("cuda",), "") for name in ("native", "triton")}
    monkeypatch.setattr(_dispatch, "_native_status", lambda: status["native"])
    monkeypatch.setattr(_dispatch, "_triton_status", lambda: status["triton"])

    def choose(requested: str, dtype: torch.dtype = torch.bfloat16, native_lacks: str = "") -> str:
        return _dispatch.choose(requested, torch.device("cuda"), dtype, {"native": native_lacks})

    assert choose("auto") == "native"
    assert choose("auto", native_lacks="one-sided only") == "triton"
    assert choose("auto", torch.float64, "one-sided only") == "reference"
    assert choose("triton", torch.float16) == "triton"
    with pytest.raises(RuntimeError, match=r"'native' cannot run on cuda: one-sided only\. .* 'triton'"):
        choose("native", native_lacks="one-sided only")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run on cuda: it has no kernels for torch.float64\. .*"):
        choose("triton", torch.float64)
    status["native"] = _dispatch.BackendStatus("native", ("cpu",), "no cuda")
    assert choose("auto") == "triton"
    status["triton"] = _dispatch.BackendStatus("triton", (), "not installed")
    assert choose("auto") == "reference"


@pytest.mark.parametrize(
    ("form", "pairing", "module"),
    [
        ("softmax", "rows", native),
        ("symmetric", "rows", triton_kernels),
        ("sigmoid", "rows", triton_kernels),
        ("softmax", "views", triton_kernels),
        ("softmax", "self", triton_kernels),
        ("softmax", "labels", triton_kernels),
    ],
)
def test_what_native_cuda_does_not_serve_goes_to_triton(
    monkeypatch: pytest.MonkeyPatch, form: str, pairing: str, module: ModuleType
) -> None:
    """Asked with tensors that only say that they are on a GPU."""
    monkeypatch.setattr(_dispatch, "_native_status", lambda: _dispatch.BackendStatus("native", ("cpu", "cuda"), ""))
    monkeypatch.setattr(_dispatch, "_triton_status", lambda: _dispatch.BackendStatus("triton", ("cuda",), ""))
    with FakeTensorMode():
        x = torch.empty(1, native.CACHED_ROWS + 1, 8, device="cuda")
        temperature = torch.empty((), device="cuda")
    problem = Problem(x, x, temperature, None, None, None, None, form, Pairing(pairing), "negative", True)
    assert functional._backend("auto", problem) is module
    assert functional.backend_module("auto", x, native.lacks_parts(x.device)) is triton_kernels
    if module is not native:
        with pytest.raises(RuntimeError, match=r"'native' cannot run on cuda:0: .* on CUDA it computes .* 'triton'"):
            functional._backend("native", problem)
        with FakeTensorMode():
            problem = replace(problem, query=torch.empty(x.shape, device="cuda", dtype=torch.float64))
        assert functional._backend("auto", problem) is reference


def test_a_fixed_number_of_normalisations_goes_to_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked with tensors that only say that they are on a GPU."""
    monkeypatch.setattr(_dispatch, "_native_status", lambda: _dispatch.BackendStatus("native", ("cpu", "cuda"), ""))
    monkeypatch.setattr(_dispatch, "_triton_status", lambda: _dispatch.BackendStatus("triton", ("cuda",), ""))
    with FakeTensorMode():
        single, double = (torch.empty(2, 8, 8, device="cuda", dtype=to) for to in (torch.float32, torch.float64))
    lacks = _no_alternation(single.device)
    assert backend_module("auto", single, lacks) is backend_module("triton", single, lacks) is transport
    assert backend_module("auto", double, lacks) is plain_transport
    with pytest.raises(
        RuntimeError, match=r"'native' cannot run on cuda:0: it has no kernel for a fixed number .* 'tri"
    ):
        backend_module("native", single, lacks)
    assert not _no_alternation(torch.device("cpu"))


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import seer_kernels; print(*(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "seer_kernels.distributed" in added
    assert not {"triton", "torch._dynamo"} & set(added)  # either takes seconds
