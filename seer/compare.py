"""The command `seer compare`: runs on the same data, beside each other."""

from __future__ import annotations

import filecmp
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer.command_line import Parser, save_json
from seer.errors import InputError
from seer.run_files import RunFiles

if TYPE_CHECKING:
    from rich.table import Table

_DESCRIPTION = """\
Compare runs on the same data and concepts: accuracy and cosines of the held-out samples before and after, KL to the
base model, and the options in which the runs differ. Runs that differ in nothing but the seed are one line: mean and
standard deviation over them. The seed also decides which samples are held out. Each RUN is an --output_dir of
`seer train`; their models are not loaded.
"""

# These name or pace a run and do not change its outcome, or like the seed they are what a group may differ in.
_NOT_COMPARED = {
    "output_dir",
    "run_name",
    "logging_dir",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
    "seed",
    "data_seed",
    "data",  # checked by itself
}
_MEASURES = ("nearest_prototype_accuracy", "same_concept_cosine", "different_concept_cosine")


@dataclass(frozen=True)
class Spread:
    """One figure of the R runs of a group."""

    mean: float
    deviation: float | None
    """Standard deviation, with R - 1 in the denominator; None for one run."""
    values: list[float]
    """One per run."""


@dataclass(frozen=True)
class LayerFigures:
    """Held-out samples at one target layer. None where a run has no such figure."""

    before: dict[str, Spread | None]
    """Measure -> under the base model."""
    after: dict[str, Spread | None]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    runs: list[str]
    """Their folders."""
    seeds: list[int]
    options: dict[str, Any]
    """Those in which the groups differ."""
    layers: dict[int, LayerFigures]
    kl: Spread | None
    """To the base model, nats per token; None where it was not measured."""


def compare_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Group]:
    """Group the runs, in the order in which they are given.

    Args:
        folders: two or more.

    Raises:
        InputError: fewer; one of them twice; no finished run, one that held nothing out, or runs of different data,
            concepts or held-out shares. The message says what differs.
    """
    if len(folders) < 2:
        raise InputError(f"RUN: expected two runs or more to compare, got {len(folders)}")
    paths = [Path(folder).resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise InputError(f"RUN: expected different runs, got {folders[index]} twice")
    runs = [RunFiles.read(folder) for folder in folders]
    for run in runs:
        if run.metrics.get("held_out") is None:
            raise InputError(f"{run.folder}: expected a run with held-out figures, got one that held no samples out")
        _require_same_data(runs[0], run)

    names = list(dict.fromkeys(name for run in runs for name in run.options if name not in _NOT_COMPARED))
    differing = [name for name in names if len({_key(run.options.get(name)) for run in runs}) > 1]
    groups: dict[tuple[str, ...], list[RunFiles]] = {}
    for run in runs:
        groups.setdefault(tuple(_key(run.options.get(name)) for name in differing), []).append(run)
    return [_group(members, differing) for members in groups.values()]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _require_same_data(first: RunFiles, other: RunFiles) -> None:
    sources = [str(run.options.get("data")) for run in (first, other)]
    same = sources[0] == sources[1] or (
        all(Path(source).is_file() for source in sources) and filecmp.cmp(sources[0], sources[1], shallow=False)
    )
    pairs = {
        "data": [sources[0], sources[0] if same else sources[1]],
        "concepts": [run.metrics["concepts"] for run in (first, other)],
        "number of samples": [sum(run.metrics["samples"].values()) for run in (first, other)],
        "held_out_share": [run.options.get("held_out_share") for run in (first, other)],
    }
    for what, (expected, got) in pairs.items():
        if expected != got:
            raise InputError(
                f"{other.folder}: expected a run on the data of {first.folder}, got another {what}: {expected} there, "
                f"{got} here"
            )


def _group(runs: list[RunFiles], differing: list[str]) -> Group:
    try:
        held_out = [run.metrics["held_out"] for run in runs]
        kls = [each["kl_to_base_nats_per_token"] for each in held_out]
        return Group(
            runs=[str(run.folder) for run in runs],
            seeds=[run.options["seed"] for run in runs],
            options={name: runs[0].options.get(name) for name in differing},
            layers={
                int(layer): LayerFigures(
                    *(
                        {name: _spread([each["layers"][layer][side][name] for each in held_out]) for name in _MEASURES}
                        for side in ("before", "after")
                    )
                )
                for layer in held_out[0]["layers"]
            },
            kl=_spread([None if kl is None else kl["after"] for kl in kls]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        names = ", ".join(str(run.folder) for run in runs)
        raise InputError(f"{names}: expected the metrics that seer train writes; {error!r}") from error


def _spread(values: list[float | None]) -> Spread | None:
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), deviation, found)


def run_compare(argv: Sequence[str]) -> None:
    """Run `seer compare` with the arguments after it.

    Raises:
        InputError: bad arguments or runs.
        SystemExit: after `--help`.
    """
    parser = Parser("seer compare", _DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a finished seer train run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.png"),
        metavar="FILE",
        help="the picture; its ending (.png, .pdf, .svg) decides the format (default: comparison.png)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--output: expected a name that ends in .png, .pdf or .svg, got {arguments.output.name!r}")
    groups = compare_runs(arguments.runs)

    from rich.console import Console

    from seer.plots import plot_comparison

    console = Console(highlight=False)
    console.print(_table(groups))
    if len({tuple(sorted(group.seeds)) for group in groups}) > 1:
        console.print("The seeds differ between the lines, and with them the samples that were held out.")
    plot_comparison(groups, arguments.output)
    if arguments.json is not None:
        save_json([asdict(group) for group in groups], arguments.json)
    for path in filter(None, (arguments.output, arguments.json)):
        console.print(f"Wrote {path}", soft_wrap=True)


def name_of(group: Group) -> str:
    """The folder of a group's run, or of its first one and how many more there are."""
    more = len(group.runs) - 1
    return Path(group.runs[0]).resolve().name + (f" + {more}" if more else "")


def _table(groups: list[Group]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    several = any(len(group.runs) > 1 for group in groups)
    title = "Held-out samples: before training, and below it after"
    table = Table(title=f"{title}; mean ± standard deviation over seeds" if several else title, box=SIMPLE_HEAD)
    table.add_column("run", overflow="fold", min_width=12)
    for column in ("accuracy", "same\nconcept\ncosine", "different\nconcept\ncosine", "KL, nats\nper token"):
        table.add_column(column, justify="right", no_wrap=True)  # names fold, figures do not
    for group in groups:
        seeds = f"seed{'s' * (len(group.seeds) > 1)} {', '.join(map(str, group.seeds))}"
        said = [name_of(group), seeds, *(f"{name} {_plain(value)}" for name, value in group.options.items())]
        for index, (layer, figures) in enumerate(group.layers.items()):
            measures = (f"{_cell(figures.before[name])}\n{_cell(figures.after[name])}" for name in _MEASURES)
            kl = "" if index else f"\n{_cell(group.kl)}"
            name = "\n".join([*([] if index else said), f"layer {layer}"])
            table.add_row(*map(Text, (name, *measures, kl)), end_section=True)
    return table


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")
