"""Fixtures for the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

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
