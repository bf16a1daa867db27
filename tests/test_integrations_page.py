"""What the page on other trainers shows."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
BLOCKS = re.findall(r"(?:<!-- needs: (.*?) -->\n)?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NAMES = [re.search(r"seer_kernels\.integrations\.(\w+)", code)[1] for _, code in BLOCKS]


@pytest.mark.parametrize(("needs", "code"), BLOCKS, ids=NAMES)
def test_a_block_runs(needs: str, code: str) -> None:
    missing = [name for name in needs.split(", ") if name and importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    exec(compile(code, str(PAGE), "exec"), {})


def test_every_integration_has_its_block() -> None:
    modules = PAGE.parents[1].glob("seer_kernels/integrations/[a-z]*.py")
    assert sorted(NAMES) == sorted(path.stem for path in modules)


def test_links_lead_somewhere_and_every_example_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (PAGE.parent / target).exists(), target
    for example in (PAGE.parents[1] / "examples").glob("*.py"):
        assert f"`python examples/{example.name}`" in text, example.name
