"""An exception on any thread reaches the caller, with and without an OpenMP runtime in the process."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from seer_kernels import _native

PARALLEL = Path(__file__).resolve().parents[2] / "csrc" / "cpu" / "parallel.h"
PROGRAM = """
#include "parallel.h"

#include <cstdio>
#include <stdexcept>

int main() {
  if (seer::cpu::OpenMp::of_process()) return 2;
  std::atomic<int> ranks{0}, sizes{0};
  seer::cpu::run_together(4, [&](int rank, int size) { ranks += 1 << rank, sizes += size; });
  if (ranks != 15 || sizes != 16) return 3;
  for (int thrower = 0; thrower < 4; ++thrower) {
    std::atomic<int> ended{0};
    try {
      seer::cpu::run_together(4, [&](int rank, int) {
        if (rank == thrower) throw std::runtime_error("from a thread");
        ++ended;
      });
      return 4;
    } catch (const std::runtime_error& error) {
      if (ended != 3) return 5;
    }
  }
  std::puts("caught");
}
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer ends a process out of memory")
@pytest.mark.parametrize("threads", [1, 3])
def test_running_out_of_memory_is_an_error(threads: int) -> None:
    """Each thread asks for more room than there are addresses."""
    places = dict.fromkeys(("x", "y", "x_lengths", "y_lengths", "cost"), 0)
    with pytest.raises(MemoryError):
        _native.sinkhorn_cost_f32(B=6, n=1, m=1, D=2**50, ground=0, cancelled=0.0, threads=threads, **places)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
def test_threads_of_our_own_pass_exceptions_on(tmp_path: Path) -> None:
    """What runs where torch brings no GNU or Intel OpenMP."""
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-pthread", f"-I{PARALLEL.parent}", "main.cpp", "-o", "main", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "caught\n")
