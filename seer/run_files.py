"""What a run wrote about itself, read without its model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seer.errors import InputError


@dataclass(frozen=True)
class RunFiles:
    """Options and figures of a finished `seer train` run."""

    folder: Path
    options: dict[str, Any]
    """What config.yaml holds."""
    metrics: dict[str, Any]
    """What metrics.json holds."""

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunFiles:
        """Read the files.

        Raises:
            InputError: the folder holds no finished run, or files that `seer train` did not write.
        """
        path = Path(folder)
        require_files(path, "config.yaml", "metrics.json")
        file = path / "config.yaml"
        try:
            options = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{file}: expected the options that seer train wrote; {error}") from error
        if not isinstance(options, dict):
            raise InputError(f"{file}: expected the options that seer train wrote, got {options!r}")
        return cls(path, options, read_json(path / "metrics.json", "seer train"))


def require_files(folder: Path, *names: str) -> None:
    """Raise InputError unless the folder has these files of a run."""
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: expected the folder of a finished seer train run, got one without {name}")


def read_json(path: Path, writer: str) -> dict[str, Any]:
    """The object in a file that one of the commands wrote.

    Args:
        path: of the file.
        writer: the command, for the message.

    Raises:
        InputError: something else is in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected what {writer} writes; {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected what {writer} writes, got {type(values).__name__}")
    return values
