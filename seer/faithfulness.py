"""The command `seer faithfulness`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from seer.command_line import Parser, require_at_least, save_json

if TYPE_CHECKING:
    from rich.table import Table

    from seer.interventions import Estimate, Faithfulness
    from seer.run import Run

_DESCRIPTION = """\
Test the explanations of a run, and of its base model, on held-out samples: remove the explained concept from the hidden
states at one layer, or swap it for another, and compare what that does with random directions of the same norm. What it
does: the change (KL) of the next-token distribution, and of the concept scores at later layers. An explanation is
faithful where its own direction matters more than the random ones. RUN is the --output_dir of `seer train`.
"""

COMPARISONS = {
    "remove_kl": "concept removed: KL of the next-token distribution, nats",
    "remove_score": "concept removed: fall of its score at later layers",
    "swap_kl": "concept swapped: KL of the next-token distribution, nats",
    "swap_score": "concept swapped: rise of the other's score at later layers",
}
"""What `seer.interventions.Faithfulness` compares, in words."""


def faithfulness_of_run(
    run: Run, layer: int, *, data: str | None = None, texts: int = 100, controls: int = 3, seed: int = 0
) -> dict[str, Faithfulness]:
    """Measure "base" and "seer" on held-out samples, each with prototypes of its own from the training samples.

    Args:
        run: whose.
        layer: where to intervene.
        data: where the run's data is now, if not where the run read it.
        texts: at most so many held-out samples, evenly from all.
        controls: random directions per text and intervention.
        seed: of what is drawn.

    Raises:
        InputError: nothing held out, or as `measure_faithfulness`.
    """
    from seer.calibration import fit_temperature
    from seer.data import evenly_spaced, pad_token_id
    from seer.interventions import measure_faithfulness
    from seer.run import make_prototypes

    training, held_out = run.samples_with_held_out(data)
    rows = run.tokens([held_out.texts[index] for index in evenly_spaced(len(held_out), texts)])
    layers = range(layer, len(run.stack.layers))
    training_states, held_out_states = run.encode(training.texts, layers), run.encode(held_out.texts, layers)
    results = {}
    for name, of_training, of_held_out in (
        ("base", training_states.before, held_out_states.before),
        ("seer", training_states.after, held_out_states.after),
    ):
        prototypes = make_prototypes(of_training, training)
        # The same meaning for the scores of both models, however close their cosines are.
        temperatures = {
            index: fit_temperature(prototypes.similarity(index, of_held_out[index]).numpy(), held_out.concept_ids)
            for index in layers
        }
        with run.base_layers() if name == "base" else nullcontext(run.stack) as stack:
            results[name] = measure_faithfulness(
                stack,
                rows,
                prototypes,
                layer,
                temperatures=temperatures,
                pad_token_id=pad_token_id(run.tokenizer),
                position=run.position,
                controls=controls,
                seed=seed,
            )
    return results


def run_faithfulness(argv: Sequence[str]) -> None:
    """Run `seer faithfulness` with the arguments after it.

    Raises:
        InputError: bad arguments or data.
        SystemExit: after `--help`.
    """
    parser = Parser("seer faithfulness", _DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument("--layer", type=int, metavar="L", help="where to intervene (default: the last target layer)")
    parser.add_argument("--data", metavar="FILE", help="where the run's data is now (default: where it was)")
    parser.add_argument("--texts", type=int, default=100, metavar="N", help="at most so many texts (default: 100)")
    parser.add_argument(
        "--controls", type=int, default=3, metavar="K", help="random directions per intervention (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of random directions (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures (default: RUN/faithfulness.json)")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, texts=2, controls=1, seed=0)

    from rich.console import Console

    from seer.run import Run

    run = Run.load(arguments.run)
    wanted = run.config.target_layers if arguments.layer is None else [arguments.layer]
    layer = run.stack.resolve(wanted)[-1]
    results = faithfulness_of_run(
        run,
        layer,
        data=arguments.data,
        texts=arguments.texts,
        controls=arguments.controls,
        seed=arguments.seed,
    )
    file = run.folder / "faithfulness.json" if arguments.json is None else arguments.json
    save_json({name: asdict(result) for name, result in results.items()}, file)
    console = Console(highlight=False)
    found = results["seer"]
    console.print(f"Interventions at layer {found.layer} in {found.texts} held-out texts: means with 95 % intervals.")
    for table in _tables(results):
        console.print(table)
    console.print(f"Wrote {file}", soft_wrap=True)


def _tables(results: dict[str, Faithfulness]) -> Iterator[Table]:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for name in results["seer"].comparisons:
        table = Table(title=COMPARISONS[name], box=SIMPLE_HEAD)
        for column in ("model", "concept", "random", "difference", "effect size d_z"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for model, result in results.items():
            values = result.comparisons[name]
            table.add_row(
                {"base": "base", "seer": "SEER"}[model],
                f"{values.intervention.value:.4f}",
                f"{values.control.value:.4f}",
                _interval(values.difference, 4),
                "-" if values.effect_size is None else _interval(values.effect_size, 2),
            )
        yield table


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
