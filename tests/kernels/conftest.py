"""Fixtures for the kernel tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import cuda_shim
import pytest
import torch
from cuda_shim import CudaShim

# Compiled graphs are kept on disk by what calls our operators, not by what our operators call in their backward pass.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, so that a kernel that leaves an element unwritten is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On problems this small torch's threads mostly wait for each other, busily: several times the CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def compiled_shim(tmp_path_factory: pytest.TempPathFactory) -> CudaShim:
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: the CUDA kernels cannot be compiled for the CPU")
    return cuda_shim.build(tmp_path_factory.mktemp("cuda_shim"))


@pytest.fixture
def shim(compiled_shim: CudaShim) -> Iterator[CudaShim]:
    """The CUDA kernels on the CPU."""
    yield compiled_shim
    compiled_shim.configure()
