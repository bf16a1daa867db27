"""What the sources must never do, read off their syntax; and that what builds and checks them is pinned."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ROOT / "setup.py",
    *(path for part in ("seer", "seer_kernels", "benchmarks", "examples") for path in (ROOT / part).rglob("*.py")),
]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""Modules whose files run code when they are read."""
CALLS = {"eval", "exec", "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` as it is written; empty for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def violations(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"imports {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"imports from {node.module}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS:
                yield f"calls {name}"
            if name == "torch.load" and options.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if options.get("shell", "False") != "False":
                yield f"{name} with shell"
            if options.get("allow_pickle", "False") != "False":
                yield f"{name} with allow_pickle"
            if options.get("trust_remote_code", "False") != "False":
                yield f"{name} with trust_remote_code"
            loads = re.fullmatch(r"(Auto\w+|auto)\.from_pretrained", name)
            if loads and "trust_remote_code" not in options and None not in options:
                yield f"{name} without trust_remote_code=False: transformers would ask whether to run a model's code"
            if re.fullmatch(r"AutoModel\w*\.from_pretrained", name) and options.get("use_safetensors") != "True":
                yield f"{name} without use_safetensors=True"


def test_no_source_runs_what_it_reads() -> None:
    found = [f"{p.relative_to(ROOT)}: {v}" for p in SOURCES for v in violations(p.read_text(encoding="utf-8"))]
    assert len(SOURCES) > 40
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True, use_safetensors=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert list(violations(source))


def test_what_is_allowed_passes() -> None:
    allowed = "model.eval(); torch.load(f, weights_only=True); yaml.safe_load(t); subprocess.run([a], shell=False)"
    assert not list(violations(allowed))


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.name)
def test_actions_are_pinned_by_commit_and_may_only_read(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    used = re.findall(r"uses: (\S+)", text)
    assert used
    assert [u for u in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", u)] == []
    assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["tools", "wheels", "sanitizers"])
def test_tools_are_pinned_by_hash(name: str) -> None:
    wanted = (ROOT / ".ci" / f"{name}.in").read_text().split()
    locked = (ROOT / ".ci" / f"{name}.txt").read_text()
    entries = [e for e in re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n?", "", locked, flags=re.MULTILINE)) if e.strip()]
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.]+", entry), entry
        assert "--hash=sha256:" in entry, entry
    pins = {e.split("==")[0].lower(): e.split("==")[1].split()[0] for e in entries}
    for requirement in wanted:
        package, _, version = requirement.lower().partition("==")
        assert package in pins
        assert not version or pins[package] == version


def test_tools_are_those_that_developers_get() -> None:
    """The versions live in pyproject.toml; the locked file adds their hashes."""
    (developers,) = re.findall(r"^dev = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set((ROOT / ".ci" / "tools.in").read_text().split()) <= set(re.findall(r'"([^"]+)"', developers))


def test_checks_run_with_the_locked_tools() -> None:
    assert "--require-hashes -r .ci/tools.txt" in (ROOT / ".ci" / "run").read_text()
    installs = [line for w in WORKFLOWS for line in w.read_text().splitlines() if "pip install" in line]
    assert installs
    assert [i for i in installs if not re.search(r"--require-hashes -r \.ci/\w+\.txt$", i)] == []
