"""The commands `seer explain` and `seer prototypes`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer.command_line import Parser
from seer.errors import InputError

if TYPE_CHECKING:
    from seer.explainer import ConceptExplainer, Explanation

_EXPLAIN = """\
Show which concept the model's hidden states are near, token by token, while it reads given texts or writes answers.
RUN is the --output_dir of `seer train`: its base model, adapter, prototypes and calibration are loaded.

  seer explain RUN --prompt "How do I pick a lock?" --html page.html
  seer explain RUN --text "Lock picking is ..." --data more.csv --jsonl scores.jsonl
  seer explain RUN --prompt "..." --stop "weapons=0.8"

The scores of a generated token come from the pass that produced it. A given text is read once, in the
chat template if there is one; besides every token the text as a whole gets an answer, from its last token.
"""

_PROTOTYPES = """\
Make the concept prototypes of a run anew from its training samples, and calibrate them on its held-out samples: for an
adapter that has none, or for other layers than the run trained. RUN is the --output_dir of `seer train`; the samples
are read where the run read them and divided as the run divided them.
"""


def run_explain(argv: Sequence[str]) -> None:
    """Run `seer explain` with the arguments after it.

    Raises:
        InputError: bad arguments or data.
        SystemExit: after `--help`.
    """
    parser = Parser("seer explain", _EXPLAIN)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a request to answer; repeatable")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="a text to read; repeatable")
    parser.add_argument(
        "--data", metavar="FILE", help="texts to read: .csv or .jsonl with columns prompt and response, or text"
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="L", help="layers to read (default: all that have any)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N", help="longest answer (default: 100)")
    parser.add_argument(
        "--sampling_temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw answers at this temperature; 0 takes the likeliest token (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the drawing (default: 0)")
    for action in ("flag", "stop"):
        parser.add_argument(
            f"--{action}",
            action="append",
            default=[],
            metavar="CONCEPT=LEVEL",
            help=f"{action} an answer where the concept's score reaches the level; repeatable",
        )
    parser.add_argument("--stream", action="store_true", help="show every token of an answer as soon as it is there")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="write all scores, one line per text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with heat maps that stands alone")
    arguments = parser.parse_args(argv)
    if bool(arguments.prompt) == bool(arguments.text or arguments.data):
        parser.error("expected either --prompt, or --text and --data, got both or neither")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max_new_tokens: expected a whole number >= 1, got {arguments.max_new_tokens}")
    if arguments.sampling_temperature < 0:
        parser.error(f"--sampling_temperature: expected a number >= 0, got {arguments.sampling_temperature}")
    if not arguments.prompt and (arguments.flag or arguments.stop or arguments.stream):
        parser.error("--flag, --stop and --stream: expected with --prompt, got them without")
    watched = [(*_concept_level(value, "flag"), "flag") for value in arguments.flag]
    watched += [(*_concept_level(value, "stop"), "stop") for value in arguments.stop]

    # Only now, so that --help and a wrong argument are answered at once.
    from rich.console import Console

    from seer.data import Text, TextDataset
    from seer.explainer import ConceptExplainer
    from seer.render import calibration_table, print_explanation, write_jsonl, write_page

    console = Console(highlight=False)
    explainer = ConceptExplainer.from_run(arguments.run, layers=arguments.layers)
    if arguments.prompt:
        explanations = _answer(explainer, arguments, watched, console)
        headings = [f"Answer {number}" for number in range(1, len(explanations) + 1)]
    else:
        texts = [Text(text, source=f"--text {number}") for number, text in enumerate(arguments.text, start=1)]
        texts += TextDataset.load(arguments.data).texts if arguments.data else []
        explanations = explainer.explain(texts)
        headings = [text.source for text in texts]
    for heading, explanation in zip(headings, explanations, strict=True):
        print_explanation(console, explanation, heading)
    overhead = sum(explanation.overhead for explanation in explanations) / len(explanations)
    console.print(f"Reading the scores took {overhead:.1%} of the time of the passes.")
    if explainer.calibration is None:
        console.print(
            f"The scores are not calibrated. To fit them to held-out samples: seer prototypes {arguments.run}"
        )
    else:
        console.print(calibration_table(explainer.calibration))
    if arguments.jsonl is not None:
        write_jsonl(explanations, arguments.jsonl)
    if arguments.html is not None:
        title = f"Concepts in the hidden states of {arguments.run.resolve().name}"
        write_page(explanations, headings, arguments.html, title=title, calibration=explainer.calibration)
    for path in filter(None, (arguments.jsonl, arguments.html)):
        console.print(f"Wrote {path}", soft_wrap=True)


def _answer(explainer: ConceptExplainer, arguments: Any, watched: list[Any], console: Any) -> list[Explanation]:
    from rich.text import Text as Styled
    from transformers import set_seed

    from seer.explainer import TokenScores
    from seer.render import style_of, visible

    monitors = [explainer.monitor(concept, level, action) for concept, level, action in watched]
    options: dict[str, Any] = {"do_sample": arguments.sampling_temperature > 0}
    if options["do_sample"]:
        options["temperature"] = arguments.sampling_temperature
    set_seed(arguments.seed)

    def show(_: int, token: TokenScores) -> None:
        (answer,) = token.layers[explainer.layers[-1]].answers()
        console.print(Styled(visible(token.piece, keep="\n"), style=style_of(answer, explainer.concepts)), end="")

    if not arguments.stream:
        options["max_new_tokens"] = arguments.max_new_tokens
        return explainer.generate(arguments.prompt, stopping_criteria=monitors, **options)
    explanations = []
    for prompt in arguments.prompt:  # one after the other, or the streams would mix
        explanations += explainer.generate(
            [prompt],
            max_new_tokens=arguments.max_new_tokens,
            stopping_criteria=monitors,
            on_token=show,
            **options,
        )
        console.print()
    return explanations


def _concept_level(value: str, option: str) -> tuple[str, float]:
    concept, _, level = value.rpartition("=")
    try:
        return concept, float(level)
    except ValueError as error:
        raise InputError(f"--{option}: expected CONCEPT=LEVEL such as weapons=0.8, got {value!r}") from error


def run_prototypes(argv: Sequence[str]) -> None:
    """Run `seer prototypes` with the arguments after it.

    Raises:
        InputError: bad arguments or data.
        SystemExit: after `--help`.
    """
    parser = Parser("seer prototypes", _PROTOTYPES)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument(
        "--data", metavar="FILE", help="where the data of the run is now (default: where the run read it)"
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="L", help="layers (default: the target layers of the run)"
    )
    arguments = parser.parse_args(argv)

    from rich.console import Console

    from seer.calibration import CALIBRATION, calibrate
    from seer.data import pad_token_id
    from seer.render import calibration_table
    from seer.run import PROTOTYPES, Run, make_prototypes

    run = Run.load(arguments.run)
    layers = run.stack.resolve(run.config.target_layers if arguments.layers is None else arguments.layers)
    training, held_out = run.samples(arguments.data)
    prototypes = make_prototypes(run.encode(training.texts, layers).after, training, run.weights)
    (run.folder / CALIBRATION).unlink(missing_ok=True)  # of the former prototypes
    prototypes.save(run.folder / PROTOTYPES)
    console = Console(highlight=False)
    console.print(f"Wrote {run.folder / PROTOTYPES}", soft_wrap=True)
    if held_out is None:
        console.print("The run held no samples out: there are none to calibrate with.")
        return
    calibration = calibrate(
        run.model,
        run.stack,
        run.tokens(held_out.texts),
        held_out.concept_ids,
        prototypes,
        temperature=run.config.temperature,
        position=run.position,
        pad_token_id=pad_token_id(run.tokenizer),
        batch_size=run.config.per_device_eval_batch_size,
    )
    calibration.save(run.folder / CALIBRATION)
    console.print(f"Wrote {run.folder / CALIBRATION}", soft_wrap=True)
    console.print(calibration_table(calibration))
