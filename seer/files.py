"""Writing files and folders so that a killed run never leaves half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there takes the place of `path` at the end.

    If the block raises, `path` stays as it was and the temporary file is removed.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def move_whole(folder: Path, target: Path) -> None:
    """Make `folder` appear as `target`, in one step and only once its files are on the disk; replaces a folder there.

    Both must be on one file system.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _to_disk(path)
    if target.exists():
        replaced = folder.with_name(f".{target.name}.replaced")
        os.replace(target, replaced)  # a folder cannot be replaced unless it is empty
        os.replace(folder, target)
        shutil.rmtree(replaced)
    else:
        os.replace(folder, target)


def _to_disk(path: Path) -> None:
    """Wait until the content is on the disk: without it a power cut may leave the new name with nothing in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
