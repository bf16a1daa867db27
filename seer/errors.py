"""The two error types: for what a user gave us and we cannot use, and for a run that ends before its time."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message names the argument (or file and line), what was expected and what came.

    The command line prints it as one message and exits with code 2; the Python API raises it.
    """


class RunStopped(RuntimeError):
    """A run that cannot or must not go on. The message says why, and from which checkpoint it can be continued.

    The command line prints it as one message and exits with `exit_code`; the Python API raises it.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
