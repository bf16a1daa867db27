"""Builds the compiled module with sanitizers, in a folder of its own, and runs the fuzz tests on it.

    python tests/sanitize.py [pytest arguments]

Address and undefined behaviour by default; SEER_KERNELS_SANITIZE names others. GCC on Linux. Leaks are not looked for:
Python and torch keep memory until the end. SEER_FUZZ_EXAMPLES says how many examples, as in the tests themselves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
TESTS = ("tests/kernels/test_native_fuzz.py",)


def main() -> int:
    sanitizers = os.environ.get("SEER_KERNELS_SANITIZE", "address,undefined")
    runtimes = [_library(RUNTIMES[name]) for name in sanitizers.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "copy")
        for part in ("csrc", "seer_kernels", "tests/kernels", "tests/shim"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
        for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, copy / part)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        settings = {"SEER_KERNELS_CUDA": "0", "SEER_KERNELS_SANITIZE": sanitizers}
        subprocess.run(build, cwd=copy, env=os.environ | settings, check=True)
        options = {
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(copy),
            "PYTHONMALLOC": "malloc",
        }
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *TESTS, *sys.argv[1:]]
        return subprocess.run(command, cwd=copy, env=os.environ | options).returncode


def _library(name: str) -> str:
    """Where the compiler keeps a sanitizer's runtime, which must be loaded before all else."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return found.strip()


if __name__ == "__main__":
    sys.exit(main())
