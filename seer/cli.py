"""The `seer` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_USAGE = """\
usage: seer COMMAND ...

commands:
  train         fine-tune a model so that its hidden states gather by concept (seer train --help)
  demo          the same on a small built-in model and data set, with pictures (seer demo --help)
  explain       show the concepts in a trained model's hidden states, token by token (seer explain --help)
  faithfulness  test these explanations by interventions in the hidden states (seer faithfulness --help)
  evaluate      measure base model and trained model on held-out samples (seer evaluate --help)
  report        write one page about a run, with pictures (seer report --help)
  compare       set runs beside each other (seer compare --help)
  prototypes    make a run's concept prototypes anew, and calibrate them (seer prototypes --help)
"""

_COMMANDS = ("train", "demo", "explain", "faithfulness", "evaluate", "report", "compare", "prototypes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for bad input, or that of a run that was stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command, rest = arguments[0], arguments[1:]
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0

    from seer.errors import InputError, RunStopped

    try:
        _run(command, rest)
    except InputError as error:
        print(f"seer: error: {error}", file=sys.stderr)
        return 2
    except RunStopped as stop:
        print(f"seer: stopped: {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


def _run(command: str, arguments: list[str]) -> None:
    from seer.errors import InputError

    if command == "train":
        from seer.arguments import parse_training_arguments
        from seer.train import check_run, run_training

        config = parse_training_arguments(arguments)
        if config.max_steps == 0:
            check_run(config)
        else:
            run_training(config)
    elif command == "demo":
        from seer.demo import run_demo

        run_demo(arguments)
    elif command == "explain":
        from seer.explain import run_explain

        run_explain(arguments)
    elif command == "faithfulness":
        from seer.faithfulness import run_faithfulness

        run_faithfulness(arguments)
    elif command == "evaluate":
        from seer.evaluate import run_evaluate

        run_evaluate(arguments)
    elif command == "report":
        from seer.report import run_report

        run_report(arguments)
    elif command == "compare":
        from seer.compare import run_compare

        run_compare(arguments)
    elif command == "prototypes":
        from seer.explain import run_prototypes

        run_prototypes(arguments)
    else:
        raise InputError(f"expected a command, one of {', '.join(_COMMANDS)}; got {command!r}")
