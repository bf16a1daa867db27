"""What the commands share: a parser whose errors are raised, and files of results."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from seer.errors import InputError
from seer.files import atomic_path

_Item = TypeVar("_Item")


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would exit, keeps the lines of the description, and allows no abbreviations."""

    def __init__(self, prog: str, description: str, epilog: str | None = None, *, add_help: bool = True) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def require_at_least(options: object, **least: int) -> None:
    """Raise InputError for the first of these options of a command that is below its bound; None passes."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise InputError(f"--{name}: expected a whole number >= {bound}, got {value}")


def save_json(values: Any, path: str | os.PathLike[str]) -> None:
    """Write `values` as indented JSON, whole or not at all; with null in the place of NaN, which JSON does not know."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_without_nan(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_nan(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_nan(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and values != values else values


def progress(items: Sequence[_Item], what: str) -> Iterable[_Item]:
    """The items, with a bar in the terminal (on stderr) that says how many are done; without a terminal nothing."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)
