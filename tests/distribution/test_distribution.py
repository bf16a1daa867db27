"""What users get: a source distribution that builds from itself, and a wheel that works where only torch and numpy are.

The last test installs torch into environments of their own, some gigabytes, and runs on demand only:
`SEER_WHEEL_TESTS=1`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
OLDEST_TORCH = "2.6.0"
NEWEST_TORCH = "2.13.0"


def build(what: str, source: Path, folder: Path) -> Path:
    """A distribution built by this project's build backend, with the tools installed here: nothing is fetched."""
    code = f"from setuptools.build_meta import build_{what}; print(build_{what}({str(folder)!r}))"
    # Outside the clone only what the build itself finds counts.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"SEER_KERNELS_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


def tracked(*patterns: str) -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: git does not say which files belong to the project")
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listing.stdout.split())


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a clean copy of the tracked files, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    archive = build("sdist", source, folder)
    with tarfile.open(archive) as file:
        assert all(member.name.startswith("seer_kernels-") for member in file.getmembers())
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel for the CPU, built from the source distribution alone, in a copy: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", shutil.copytree(unpacked, folder / "source"), folder)


def test_the_source_distribution_holds_all_that_a_build_needs(unpacked: Path) -> None:
    wanted = tracked("csrc", "seer", "seer_kernels") | {
        "pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md",
    }  # fmt: skip
    found = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    assert wanted <= found, sorted(wanted - found)


def test_the_source_distribution_holds_nothing_that_was_built(unpacked: Path) -> None:
    built = [p for p in unpacked.rglob("*") if p.suffix in (".so", ".pyd", ".o", ".pyc")]
    assert not built


def test_the_wheel_built_from_it_is_whole_and_runs(wheel: Path, tmp_path: Path) -> None:
    """Unpacked by itself, it is found before any other copy, and runs outside the clone with the torch installed here.
    One test, so that tests in parallel compile it once."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        found = set(file.namelist())
        file.extractall(site)
    wanted = tracked("seer", "seer_kernels")
    assert wanted <= found, sorted(wanted - found)
    assert any(re.fullmatch(r"seer_kernels/_native\.[\w-]+\.(so|pyd)", n) for n in found)
    assert any(n.endswith("/licenses/LICENSE") for n in found)
    assert {n.split("/")[0] for n in found if ".dist-info/" not in n} == {"seer", "seer_kernels"}
    metadata = next(site.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert "Requires-Dist: torch>=2.6" in metadata
    assert "License-Expression: Apache-2.0" in metadata

    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SMOKE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"seer_kernels of {site}")


@pytest.mark.skipif(
    os.environ.get("SEER_WHEEL_TESTS") != "1",
    reason="fetches torch, gigabytes where it is a CUDA build, into environments of their own: SEER_WHEEL_TESTS=1",
)
@pytest.mark.parametrize("torch_version", [OLDEST_TORCH, NEWEST_TORCH])
def test_the_wheel_runs_in_a_clean_environment(wheel: Path, torch_version: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "clean"], cwd=tmp_path, check=True)
    python = tmp_path / "clean" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", f"torch=={torch_version}", wheel]
    subprocess.run(install, cwd=tmp_path, check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, SMOKE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch_version}" in done.stdout
