"""From an empty environment to what a page shows, by following it alone: its commands and code as they stand.

Every page has an environment of its own, some minutes and gigabytes, so this runs on demand only: `SEER_WHEEL_TESTS=1`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from test_docs import BLOCKS, INCLUDED, ROOT, blocks

WITH_COMMANDS = {b.page: b.code for b in reversed(BLOCKS) if b.page.startswith("docs/") and b.language == "bash"}
"""The first commands of every page."""
FIRST_PAGES = sorted(page for page, code in WITH_COMMANDS.items() if "-m venv .venv" in code)
GO_ON_FROM = {"docs/training.md": ["docs/explaining.md", "docs/evaluating.md", "docs/encoder.md"]}
"""Pages that begin in the environment and folder of another, in the order in which they are followed."""
NOT_RUN = {"accelerate launch --config_file": "for several GPUs; tests/seer runs it on two processes of a CPU"}
ACTIVATE = "[ ! -e .venv ] || . .venv/bin/activate"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, as in a fresh clone. One for all pages, so that the compiled module is built once."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: git does not say which files belong to the project")
    folder = tmp_path_factory.mktemp("pages") / "seer-kernels"
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listing.rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def test_no_page_with_commands_is_left_out() -> None:
    assert WITH_COMMANDS.keys() == {*FIRST_PAGES, *(page for pages in GO_ON_FROM.values() for page in pages)}


@pytest.mark.skipif(
    os.environ.get("SEER_WHEEL_TESTS") != "1",
    reason="fetches torch and trainers into environments of their own: SEER_WHEEL_TESTS=1",
)
@pytest.mark.parametrize("first", FIRST_PAGES)
def test_a_page_leads_from_an_empty_environment_to_what_it_shows(first: str, clone: Path) -> None:
    kept = {"build", *os.listdir(clone)}
    if first == "docs/training.md":
        bring_what_training_asks_for(clone)
    try:
        for page in (first, *GO_ON_FROM.get(first, ())):
            for block in blocks(page, "bash"):
                lines = [line for line in block.code.splitlines() if not line.startswith(tuple(NOT_RUN))]
                run(clone, f"{page}:{block.line}", "\n".join([ACTIVATE, *lines]))
            code = "".join(block.code for block in blocks(page, "python") if not INCLUDED.fullmatch(block.code))
            # Isolated: what is installed, not the sources that lie in the folder.
            run(clone, page, f'{ACTIVATE}\npython -I -c "$0"', code)
    finally:
        for path in (path for path in clone.iterdir() if path.name not in kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(folder: Path, where: str, *script: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"SEER_KERNELS_CUDA": "0", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command, output = ["bash", "-exc", *script], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, check=False, **output)
    print(where, done.stdout, sep="\n")
    if done.returncode and "operator torchvision::nms does not exist" in done.stdout:
        pytest.skip(f"{where}: pip found torch and torchvision of different builds here (CPU and CUDA)")
    assert done.returncode == 0, where


def bring_what_training_asks_for(folder: Path) -> None:
    """A language model of 24 layers that knows nothing as MODEL, and texts in the files that pages name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from seer.demo.language_model import build_tokenizer

    things = {"weapons": ("a lock", "a bomb"), "safe": ("a pear", "tin"), "fruit": ("a plum", "a fig")}
    prompts = {c: [f"What of {each} {n}?" for n in range(6) for each in named] for c, named in things.items()}
    rows = [(prompt, f"It is {prompt[8:-1]}.", concept) for concept, asked in prompts.items() for prompt in asked]
    for name in ("concepts.csv", "more.csv"):
        write_csv(folder / name, [("prompt", "response", "concept"), *rows])
    for name, concept in (("unsafe.csv", "weapons"), ("safe.csv", "safe")):
        write_csv(folder / name, [("prompt",), *((prompt,) for prompt in prompts[concept])])
    chats = (json.dumps({"prompt": prompt, "response": response}) for prompt, response, _ in rows)
    (folder / "chat.jsonl").write_text("\n".join(chats), encoding="utf-8")
    (options,) = blocks("docs/training.md", "yaml")
    (folder / "options.yaml").write_text(options.code, encoding="utf-8")
    tokenizer = build_tokenizer([text for row in rows for text in row[:2]])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 24, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")


def write_csv(path: Path, rows: Iterable[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
