"""What the README promises."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs(capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    assert re.fullmatch(r"loss \d.*, similarity of pairs -?\d.*, of others -?\d.*\n", capsys.readouterr().out)


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in (
        README,
        README.parent / "CONTRIBUTING.md",
        README.parent / "seer_kernels/contrastive/README.md",
        README.parent / "seer_kernels/sinkhorn/README.md",
    ):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
