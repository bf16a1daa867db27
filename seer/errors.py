"""The one error type for what a user gave us and we cannot use."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message names the argument (or file and line), what was expected and what came.

    The command line prints it as one message and exits with code 2; the Python API raises it.
    """
