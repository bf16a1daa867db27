"""gpu.sh, rehearsed on the CPU: it runs its parts, says what it leaves out, and fails when a part fails."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None, reason="needs bash, timeout and env -C as Linux has them"
)


def run(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def summary(out: Path) -> dict[str, str]:
    lines = (out / "summary.txt").read_text().splitlines()
    return {line[:26].strip(): line[27:36].strip() for line in lines}


def test_rehearsal(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = summary(tmp_path)
    left_out = [
        "build",
        "memcheck",
        "racecheck",
        "bench_loss-bfloat16",
        "bench_self",
        "bench_explaining",
        "bench_scaling",
    ]
    assert [name for name, status in parts.items() if status == "left out"] == left_out
    measured = [name for name, status in parts.items() if status == "ok"]
    scripts = [f"bench_{name}" for name in ("loss", "sinkhorn", "memory", "training")]
    assert measured == ["machine", "tests", *scripts]
    for name in measured[2:]:
        assert list(tmp_path.glob(f"{name}-quick*.csv")), name
    assert done.stdout.rstrip().endswith((tmp_path / "summary.txt").read_text().rstrip())


def test_a_part_that_fails_fails_the_whole_and_shows_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho something broke >&2\nexit 3\n")
    broken.chmod(0o755)
    done = run(tmp_path / "out", "--rehearse", PYTHON=str(broken))
    assert done.returncode == 1
    assert summary(tmp_path / "out")["machine"] == "FAILED"
    assert "exit code 3: something broke" in done.stdout
    assert "failed: see NAME.log" in done.stdout


def test_on_a_gpu(tmp_path: Path) -> None:
    """With a Python that does nothing but say what it was asked for, and a sanitizer that runs it."""
    asked, programs = tmp_path / "asked", tmp_path / "programs"
    programs.mkdir()
    stubs = {
        "python": f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $SEER_KERNELS_ARCHS $@" >>"{asked}"\necho 90\n',
        "compute-sanitizer": '#!/bin/sh\nwhile [ "$1" != env ]; do shift; done\nexec "$@"\n',
    }
    for name, text in stubs.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    done = run(tmp_path / "out", PYTHON=str(programs / "python"), PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = summary(tmp_path / "out")
    assert list(parts)[:5] == ["machine", "build", "tests", "memcheck", "racecheck"]
    assert {status for name, status in parts.items() if name != "in all"} == {"ok"}
    calls = asked.read_text().splitlines()
    (build,) = [call for call in calls if "build_ext --inplace" in call]
    assert build.split()[0] == "90"
    watched = [call for call in calls if call.startswith("1 ")]
    assert len(watched) == 2
    assert all("test_gpu.py" in call for call in watched)
    measured = [call for call in calls if "benchmarks/bench_" in call]
    assert len(measured) == 9
    for call in measured:
        script, _, sizes = call.partition(" --sizes ")
        assert "--quick --device cuda --out" in script
        benchmark = importlib.import_module(Path(script.split()[1]).stem).BENCHMARK
        assert [benchmark.parse_size(size) for size in sizes.split()]


def test_what_has_no_time_left_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse", SECONDS_IN_ALL="10")
    assert done.returncode == 0
    assert set(summary(tmp_path).values()) == {"left out", ""}
    assert "no time left" in done.stdout


def test_wrong_arguments(tmp_path: Path) -> None:
    done = run(tmp_path, "--quick")
    assert done.returncode == 2
    assert "expected --rehearse or nothing, got: --quick" in done.stderr
