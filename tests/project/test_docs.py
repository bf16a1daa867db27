"""What the documentation promises: code that runs, commands that parse, links that lead somewhere, real messages."""

from __future__ import annotations

import ast
import csv
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BESIDE_THE_CODE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "seer_kernels/contrastive/README.md",
    "seer_kernels/sinkhorn/README.md",
)
PAGES = [*(ROOT / name for name in BESIDE_THE_CODE), *sorted(DOCS.rglob("*.md"))]
MADE_BY_THE_SITE = {DOCS / "options.md"}
NOT_RUN = {
    ("README.md", "from seer import ConceptDataset"): "the same with a model and data, and run, is in docs/training.md",
}
"""Code that is shown as plain text because it cannot run as it stands, by page and beginning, with the reason."""
PACKAGES_OF_OTHERS = {
    "open_clip_torch": "brings torchvision, of one torch each, and so is in no extra",
}
"""What a page tells to install although no extra of ours does, with the reason."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    needs: list[str]
    """Modules without which it cannot run, from a comment before it."""

    def lacks(self) -> set[str]:
        """Those that are not here."""
        return {name for name in self.needs if importlib.util.find_spec(name) is None}

    language: str
    code: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"(?:<!-- needs: (.*?) -->\n)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(3)) + 1
        needs = match[1].split(", ") if match[1] else []
        yield Block(page.relative_to(ROOT).as_posix(), line, needs, match[2], match[3])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
INCLUDED = re.compile(r"--8<--\n(.*)\n--8<--\n")


def pages_with(*languages: str) -> list[str]:
    return sorted({block.page for block in BLOCKS if block.language in languages})


def blocks(page: str, *languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == page and block.language in languages]


def test_every_block_says_what_it_is() -> None:
    known = {"python", "bash", "sh", "csv", "jsonl", "yaml", "math", "text"}
    strangers = [f"{block.page}:{block.line} {block.language!r}" for block in BLOCKS if block.language not in known]
    assert not strangers
    plain = {(block.page, block.code.splitlines()[0]) for block in BLOCKS if block.language == "text"}
    unexplained = {each for each in plain if not any(each[0] == p and each[1].startswith(c) for p, c in NOT_RUN)}
    assert not unexplained, "not run, and no reason given"
    assert len(plain) == len(NOT_RUN), "NOT_RUN lists what is no longer there"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def make_run() -> None:
    """A folder `run` that `seer train` has written, of a language model that knows nothing."""
    from seer.cli import main
    from seer.demo.language_model import build_model, build_tokenizer

    rows = [
        (f"what is {n} {c}", f"{c} it is", c) for c in ("weapons", "fruit") for n in ("one", "two", "three", "four")
    ]
    with open("concepts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "response", "concept"), *rows])
    tokenizer = build_tokenizer([part for row in rows for part in row[:2]] + ["How do I pick a lock?"])
    build_model(tokenizer, 0).save_pretrained("model")
    tokenizer.save_pretrained("model")
    options = "--max_steps 1 --use_cpu true --save_strategy no --disable_tqdm true"
    assert main(f"train --model model --data concepts.csv --output_dir run {options}".split()) == 0


PREPARED = {"docs/explaining.md": make_run}
"""What must be there before the code of a page can run."""


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page in PREPARED:
        PREPARED[page]()
    names: dict[str, object] = {}
    missing: set[str] = set()
    for block in blocks(page, "python"):
        included = INCLUDED.fullmatch(block.code)
        if included:  # tests/project/test_examples.py runs every example
            assert (ROOT / included[1]).is_file()
            assert Path(included[1]).parent == Path("examples")
            continue
        if not block.lacks():
            exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec"), names)
        missing |= block.lacks()
    if page == "README.md":
        assert re.fullmatch(r"loss \d.*, similarity of pairs -?\d.*, of others -?\d.*\n", capsys.readouterr().out)
    if missing:
        pytest.skip(f"not there: {', '.join(sorted(missing))}; the other blocks ran")


def test_every_public_name_is_in_the_reference() -> None:
    import seer
    import seer_kernels

    shown = set(
        re.findall(r"^::: (\S+)", "".join(path.read_text() for path in (DOCS / "api").glob("*.md")), re.MULTILINE)
    )
    for package in (seer, seer_kernels):
        names = {f"{package.__name__}.{name}" for name in package.__all__} - {"seer_kernels.__version__"}
        assert names <= shown, names - shown


def test_every_integration_and_every_example_is_shown() -> None:
    code = "".join(block.code for block in BLOCKS if block.language == "python")
    for path in (ROOT / "seer_kernels/integrations").glob("[a-z]*.py"):
        assert f"from seer_kernels.integrations.{path.stem} import" in code
    shell = [block.code for block in BLOCKS if block.language == "bash" and "pip install" in block.code]
    for path in (ROOT / "examples").glob("*.py"):
        assert f"--8<--\nexamples/{path.name}\n--8<--" in code
        shown = any(f"python examples/{path.name}\n" in block for block in shell)
        assert shown, f"no page goes from an empty environment to {path.name}"


@pytest.mark.parametrize("page", pages_with("csv", "jsonl", "yaml"))
def test_data_and_options_are_accepted(page: str, folder: Path) -> None:
    from seer import ConceptDataset
    from seer.arguments import parse_training_arguments

    for block in blocks(page, "csv", "jsonl", "yaml"):
        path = folder / f"block.{block.language}"
        path.write_text(block.code, encoding="utf-8")
        if block.language == "yaml":
            parse_training_arguments([str(path), "--use_cpu", "true"])
        else:
            ConceptDataset.load(str(path)).require_pairs()


@pytest.mark.parametrize("page", pages_with("bash", "sh"))
def test_commands_are_accepted(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run/config.yaml", "options.yaml"):  # which pages name as files of the user
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("output_dir: run\n")
    monkeypatch.setattr("seer.demo._run", lambda *_: None)
    missing: set[str] = set()
    for block in blocks(page, "bash", "sh"):
        missing |= block.lacks()
        if block.lacks():
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                value = re.fullmatch(r"\w+=\$\((.*)\)", command)  # of a variable, which a command puts out
                words = shlex.split(value[1] if value else command, comments=True)
                if words:
                    accept(words)
    if missing:
        pytest.skip(f"not there: {', '.join(sorted(missing))}; the other commands were accepted")


def accept(words: list[str]) -> None:
    """Fail unless a command of the documentation is one that works."""
    program, rest = words[0], words[1:]
    if program == "seer":
        accept_seer(rest)
    elif program in ("python", "python3"):
        accept_python(rest)
    elif program == "pip":
        assert rest[0] == "install"
        for requirement in rest[1:]:
            accept_requirement(requirement)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(rest)
        accept_python([found.training_script, *found.training_script_args])
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        found = launch_command_parser().parse_args(rest[1:])
        assert found.config_file is None or (ROOT / found.config_file).is_file()
        accept_python([*(["-m"] if found.module else []), found.training_script, *found.training_script_args])
    elif program in ("pytest", "pre-commit", "mkdocs"):
        assert program in tools_of_the_dev_extra()
    elif "/" in program:
        assert os.access(ROOT / program, os.X_OK)
    else:
        assert words == [".", ".venv/bin/activate"], f"not known to the tests: {shlex.join(words)}"


def accept_python(words: list[str]) -> None:
    if words[:2] == ["-m", "venv"]:
        return
    if words[0] == "-c":
        exec(words[1], {})
    elif words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
    elif words[1] == "seer":
        accept_seer(words[2:])
    else:
        assert importlib.util.find_spec(words[1]) is not None, words[1]


def accept_seer(words: list[str]) -> None:
    """Let the command's own parser see it; what it then does is kept short by giving it nothing to do."""
    from seer import InputError
    from seer.arguments import parse_training_arguments
    from seer.cli import _run

    if words[0] == "train":
        assert parse_training_arguments([*words[1:], "--use_cpu", "true"]).output_dir
    elif words[0] == "demo":
        _run(words[0], words[1:])
    else:
        with pytest.raises(InputError, match=r"^run: expected the folder of a finished seer train run"):
            _run(words[0], words[1:])


def accept_requirement(requirement: str) -> None:
    from packaging.requirements import Requirement

    project = project_table()
    if requirement == "-e":
        return
    found = Requirement(re.sub(r"^\.", project["name"], requirement))
    extras = project["optional-dependencies"]
    if found.name == project["name"]:
        assert found.extras <= extras.keys(), requirement
    else:
        ours = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
        known = {Requirement(each).name for each in ours}
        assert found.name in known | PACKAGES_OF_OTHERS.keys(), requirement


def project_table() -> dict:
    """The `[project]` of pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tools_of_the_dev_extra() -> set[str]:
    from packaging.requirements import Requirement

    extras = project_table()["optional-dependencies"]
    return {Requirement(each).name for name in ("dev", "test", "docs") for each in extras[name]}


def test_options_in_the_text_exist() -> None:
    """`--option` in code within the text is one of `seer`, or of the tool that the page is about."""
    from transformers import HfArgumentParser

    from seer import SeerConfig

    known = {option for action in HfArgumentParser(SeerConfig)._actions for option in action.option_strings}
    for path in (ROOT / "seer").rglob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text(encoding="utf-8")))
    known |= {"--flag", "--stop"}  # made in a loop
    known |= {"--precision", "--accum-freq", "--config_file", "--num_processes"}  # of open_clip and accelerate
    for page in (ROOT / "README.md", *(p for p in PAGES if DOCS in p.parents)):
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^### .*$", "", prose, flags=re.MULTILINE)  # messages may quote what was typed wrong
        for code in re.findall(r"`([^`\n]*)`", prose):
            if code.startswith(("seer ", "--")):
                for option in re.findall(r"(?<!\S)--[\w-]+", code):
                    assert option in known, f"{page.name}: {option}"


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text):
        path = (ROOT / page).parent / target
        assert path.exists() or path.resolve() in MADE_BY_THE_SITE, target


MESSAGES = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def templates() -> list[re.Pattern[str]]:
    """The messages in the sources, each as what it may look like once its values are filled in."""
    sources = [path for package in ("seer", "seer_kernels") for path in (ROOT / package).rglob("*.py")]
    found = set()
    for path in (*sources, ROOT / "setup.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found |= set(map(pattern_of, said_by(node)))
    # What is nearly all values, such as "--...: expected ..., got ...", would fit anything.
    return [re.compile(pattern) for pattern in found if len(words_of(pattern)) >= 20]


SPEAKERS = ("Error", "RunStopped", "SystemExit", "BackendStatus", "logger.warning", "warnings.warn", ".error")


def said_by(node: ast.AST) -> list[ast.expr]:
    """The messages in a statement or call: of errors, warnings and statuses, and what functions return for them."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
        return [node.value]
    if not isinstance(node, ast.Call):
        return []
    name = ast.unparse(node.func)
    if name == "_check":  # of seer.config: condition, option, expected, value
        _, option, expected, value = node.args
        said = [ast.Constant("--"), option, ast.Constant(": expected "), expected, ast.Constant(", got "), value]
        return [ast.JoinedStr(said)]
    return list(node.args) if name.endswith(SPEAKERS) else []


VALUE = ".+"


def pattern_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[dsr]", lambda _: VALUE, re.escape(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern_of, node.values))
    if isinstance(node, ast.BinOp):
        return pattern_of(node.left) + pattern_of(node.right)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, (ast.Constant, ast.JoinedStr)):
        return pattern_of(node.value)
    return VALUE


def words_of(pattern: str) -> str:
    return pattern.replace(VALUE, "").replace("\\", "")


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_a_message_is_one_of_ours(number: int, templates: list[re.Pattern[str]]) -> None:
    quoted = re.fullmatch(r"(`+)(.*)\1", MESSAGES[number])
    assert quoted, "a heading of this level is a message"
    assert any(template.fullmatch(quoted[2]) for template in templates), quoted[2]
