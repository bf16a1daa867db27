"""What the site needs beyond its plugins: formulas, pages made of the code or kept beside it, links to other files."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks")  # whose warnings `--strict` counts
ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "kernels/contrastive.md": "seer_kernels/contrastive/README.md",
    "kernels/sinkhorn.md": "seer_kernels/sinkhorn/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages of the site whose one home is elsewhere in the repository."""
OPTIONS, SOURCES = "options.md", ("config", "arguments")

_FORMULA = re.compile(r"(?<![\w`$\\])\$([^$`\n]+)\$(?![\w$])")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A fence `math` holds LaTeX, which becomes MathML here, so that a browser needs no script to show it."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": _formula})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live elsewhere, and that of the options."""
    for name, home in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / home)))
    files.append(File.generated(config, OPTIONS, content=options_page()))
    return files


def options_page() -> str:
    """The options of `seer train`, read out of the sources without importing them."""
    sources = {name: ast.parse((ROOT / f"seer/{name}.py").read_text(encoding="utf-8")) for name in SOURCES}

    constants: dict[str, Any] = {}
    for source in sources.values():
        for node in source.body:
            with contextlib.suppress(ValueError):  # what is no literal
                if isinstance(node, ast.Assign):
                    constants[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    classes = {each.name: each for each in sources["config"].body if isinstance(each, ast.ClassDef)}
    known = {**constants, "field": dict}
    fields = {
        ast.unparse(each.target): eval(ast.unparse(each.value), known)
        for each in classes["SeerConfig"].body
        if isinstance(each, ast.AnnAssign) and each.value is not None
    }
    lines = [
        "# Options",
        "Options of `seer train`, of a file of options and of `seer.SeerConfig`. Every field of "
        "`transformers.TrainingArguments` is an option too. `seer train --help` also says whose defaults these are.",
    ]
    for title, names in constants["_SECTIONS"].items():
        lines += [f"## {title[0].upper()}{title[1:]}", "| option | default | |\n| --- | --- | --- |"]
        for name in names:
            default, text = "", "As in `transformers.TrainingArguments`."
            if name in fields:
                default, text = _default(fields[name]), fields[name]["metadata"]["help"]
            lines[-1] += f"\n| `--{name}` | {default} | {text.replace('|', chr(92) + '|')} |"
    return "\n\n".join(lines) + "\n"


def _default(field: dict[str, Any]) -> str:
    value = field["default"] if "default" in field else field["default_factory"]()
    return "" if value is None else f"`{' '.join(value) if isinstance(value, list) else value}`"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are written for the repository: turn those that leave the folder of pages into links of the site;
    and `$...$` into MathML.

    A page that lives elsewhere is linked as the page that it is; any other file is copied into the site; of a link to a
    folder the text is kept.
    """
    here = ROOT / PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    sites = {ROOT / home: name for name, home in PAGES.items()}

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (here.parent / target).resolve()
        if not path.exists() or (path.is_relative_to(ROOT / "docs") and page.file.src_uri not in PAGES):
            return match[0]  # a page by its own name, or an error for mkdocs to report
        if path.is_dir():
            return text
        if path in sites:
            name = sites[path]
        elif path.is_relative_to(ROOT / "docs"):
            name = path.relative_to(ROOT / "docs").as_posix()
        else:
            name = f"files/{path.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
        return f"{picture}[{text}]({os.path.relpath(name, Path(page.file.src_uri).parent)}{anchor})"

    def prose(text: str) -> str:
        return _FORMULA.sub(lambda match: convert(match[1]), _LINK.sub(link, text))

    parts = []
    end = 0
    for fence in _FENCE.finditer(markdown):
        parts += [prose(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, prose(markdown[end:])])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """`<P, C>` outside of code is taken for a tag, which no browser shows: say so, since Markdown does not."""
    for lost in re.findall(r"<\w+,[^<\n]*", html):
        logger.warning("Doc file '%s' loses what looks like a tag: %s", page.file.src_uri, lost)
    return html


def _formula(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="formula">{convert(source, display="block")}</div>'
