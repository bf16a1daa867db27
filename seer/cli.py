"""The `seer` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: seer COMMAND ...

commands:
  train   fine-tune a model so that its hidden states gather by concept (seer train --help)
  demo    the same on a small built-in model and data set, with pictures (seer demo --help)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    from seer.errors import InputError

    try:
        if command == "train":
            from seer.train import main as train_main

            train_main(rest)
        elif command == "demo":
            from seer.demo import run_demo

            run_demo(rest)
        else:
            raise InputError(f"unknown command {command!r}; expected train or demo")
    except InputError as error:
        print(
            f"seer {command}: error: {error}" if command in ("train", "demo") else f"seer: error: {error}",
            file=sys.stderr,
        )
        return 2
    return 0
