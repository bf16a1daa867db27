"""The command `seer report`: what is known about a run on one page that stands alone."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from seer.command_line import Parser
from seer.errors import InputError
from seer.run_files import RunFiles, read_json

if TYPE_CHECKING:
    from seer.plots import Method
    from seer.run import Run

_DESCRIPTION = """\
Write one page of HTML about a run: figures before and after, pictures of the held-out samples, learning curves, token
heat maps of a few held-out texts, and what `seer evaluate` (with each of its tasks) and `seer faithfulness` found. The
page stands alone: it loads nothing and runs nothing. Where something was not measured it names the command that does.
RUN is the --output_dir of `seer train`.
"""

COMMANDS = {
    "evaluation.json": "seer evaluate",
    "faithfulness.json": "seer faithfulness",
    "generalization.json": "seer evaluate --task generalization",
    "classification.json": "seer evaluate --task classification",
    "detoxification.json": "seer evaluate --task detoxification --harmless CONCEPT",
}
"""Files of a run with results, and the command that writes each, without the run."""

MEANINGS = {
    "same_concept_cosine": "mean cosine over pairs of samples of one concept",
    "different_concept_cosine": "mean cosine over pairs of samples of different concepts",
    "coding_rate": "how much room all samples take, nats (Yu et al. 2020)",
    "rate_reduction": "that room less the room of every concept by itself, nats: higher is compact and apart",
    "effective_rank": "how many directions the samples use (Roy and Vetterli 2007)",
    "between_centroids": "mean distance between the centroids of two concepts",
    "within_concept": "mean distance of a sample to the centroid of its concept",
    "hausdorff": "mean Hausdorff distance between two concepts",
    "silhouette": "from -1 to 1: how much nearer a sample is to its own concept than to the next",
    "nearest_prototype_accuracy": "share of samples whose nearest concept prototype is the right one",
    "knn_accuracy": "share of samples that most of their 10 nearest training samples get right",
    "linear_probe_accuracy": "share of samples that a logistic regression on the training samples gets right",
    "perplexity": "exp of the mean negative log-likelihood of the next token on retain texts",
    "kl": "mean KL divergence of the next-token distribution from the base model's, nats",
    "k_variance": "expected Wasserstein-1 distance between two random sets of k samples of a concept: lower is compact",
    "mean_k_variance": "its mean over concepts",
    "entropic_bias": "the k-variance by Sinkhorn over the exact one, less 1",
    "lipschitz": "how fast the margin of a concept can change with the hidden state",
    "radius": "bound on the norm of the hidden states",
    "error": "share of samples that the linear classifier gets wrong",
    "median_margin": "median of the score of the right concept less the highest other score",
    "kv_margin": "-median margin over Lipschitz constant times k-variance: lower is better",
    "kv_gn_margin": "-median of margin over its gradient's norm, over k-variance: lower is better",
    "gamma": "the margin that the bound is for",
    "margin_loss": "share of training margins below gamma",
    "transport_term": "k-variance times Lipschitz constant over gamma",
    "estimation_term": "what the k-variance may be off by, from finitely many samples",
    "sampling_term": "what the margin loss may be off by, from finitely many samples",
    "bound": "sum of these four terms: a bound on the share of errors, of no meaning from 1 on",
    "balanced_accuracy": "mean over the classes of the share of their texts that are told right",
    "macro_f1": "mean over the classes of the harmonic mean of precision and recall",
    "auroc": "how well the scores order harmful above harmless texts: 0.5 is chance",
    "probe": "logistic regression on the hidden states of the training samples",
    "refusal": "share of answers with a phrase of refusal",
    "explainer_harmless": "share of answers whose concept, to the run's explainer, is a harmless one",
    "explainer_harmful": "share of answers whose concept, to the run's explainer, is another one that it knows",
    "judge_safe": "share of answers that the judge calls safe",
    "safe": "share of answers that refuse or are safe to the judge",
    "empty": "share of answers of nothing but white space",
}
"""Keys of the result files, in words."""

_CAPTIONS = {
    "evaluation.json": "The model as a whole",
    "classification.json": "Ways to tell the concept of a text",
    "detoxification.json": "Shares of answers",
}
"""Of figures that are of no single layer."""
_BY_LAYER = ("nearest_prototype_accuracy", "linear_probe_accuracy", "silhouette", "rate_reduction")
_FEWEST_SAMPLES = 4  # that a picture takes


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    open: bool = True
    """Shown without a click."""


@dataclass(frozen=True)
class Picture:
    """An image in the page."""

    source: str
    """data: URI."""
    alternative: str
    """What it shows, in words."""


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    run: Run | None = None,
    data: str | None = None,
    layers: Sequence[int] | None = None,
    texts: int = 3,
    method: Method = "tsne",
) -> Path:
    """Write the page.

    Args:
        folder: the --output_dir of `seer train`.
        output: file to write; default report.html in the folder.
        run: the same run with its model; None leaves out the pictures of samples and the token heat maps.
        data: where the run's data is now, if not where the run read it.
        layers: of the pictures; default the target layers.
        texts: so many held-out texts have heat maps, evenly from all.
        method: of the projection, see `seer.plots.plot_representations`.

    Returns:
        The file.

    Raises:
        InputError: no finished run, result files that no command wrote, layers or data that are not there.
    """
    from seer.render import template, write_html

    files = RunFiles.read(folder)
    results = {
        name: read_json(files.folder / name, command)
        for name, command in COMMANDS.items()
        if (files.folder / name).is_file()
    }
    evaluation = results.get("evaluation.json", {})
    context: dict[str, Any] = {"curves": _curves(files.folder)}
    for name, command in COMMANDS.items():
        with _as_written_by(files.folder / name, command):
            found = None
            if name in results:
                make = _faithfulness if name == "faithfulness.json" else _comparison
                found = make(files, name, results[name])
            context[name.removesuffix(".json")] = found
    with _as_written_by(files.folder / "evaluation.json", "seer evaluate"):
        context["by_layer"] = _by_layer(evaluation)
    with _as_written_by(files.folder / "metrics.json", "seer train"):
        context |= {
            "facts": _facts(files),
            "tiles": _tiles(files, evaluation),
            "findings": _findings(files, evaluation),
            "held_out": _held_out_tables(files),
            "versions": _pairs_table("Versions", "package", files.metrics["versions"]),
        }
    pictures, shown, left_out = _of_the_model(files, run, data, layers, texts, method)
    page = template("report.html").render(
        title=f"SEER report: {files.folder.resolve().name}",
        commands=_commands(files.folder),
        pictures=pictures,
        shown=shown,
        left_out=left_out,
        method={"tsne": "t-SNE", "pca": "PCA"}[method],
        options=_pairs_table("Options", "option", files.options),
        **context,
    )
    target = files.folder / "report.html" if output is None else Path(output)
    write_html(page, target)
    return target


@contextmanager
def _as_written_by(file: Path, command: str) -> Iterator[None]:
    """A file that lacks what is looked for inside, or holds something else there, is bad input."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: expected what {command} writes; {type(error).__name__}: {error}") from error


def _commands(folder: Path) -> dict[str, str]:
    """Section -> the command that makes it."""
    from shlex import quote

    made = {name.removesuffix(".json"): command.split() for name, command in COMMANDS.items()}
    made |= {"prototypes": ["seer", "prototypes"], "report": ["seer", "report"]}
    return {name: " ".join([*words[:2], quote(str(folder)), *words[2:]]) for name, words in made.items()}


def _facts(files: RunFiles) -> dict[str, str]:
    options, metrics = files.options, files.metrics
    samples, training = metrics["samples"], metrics["training"]
    return {
        "Base model": str(options.get("model") or "given in memory"),
        "Data": f"{options.get('data')}: {samples['training']} training samples, {samples['held_out']} held out",
        "Concepts": "; ".join(metrics["concepts"]),
        "Target layers": ", ".join(map(str, metrics["target_layers"])),
        "Loss": f"{options.get('disentangle_loss')}, same label: {options.get('same_label')}",
        "Training": f"{training['steps']} steps in {training['seconds']} s",
    }


def _held_out_layers(files: RunFiles) -> dict[str, dict[str, Any]]:
    held_out = files.metrics["held_out"]
    layers: dict[str, dict[str, Any]] = {} if held_out is None else held_out["layers"]
    return layers


def _tiles(files: RunFiles, evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """The figures to see first: accuracy and separation at every target layer, and the change of the predictions."""
    tiles = []
    for layer, values in _held_out_layers(files).items():
        before, after = values["before"], values["after"]
        difference = _accuracy_difference(evaluation, layer)
        tiles.append(
            {
                "name": f"nearest prototype accuracy, layer {layer}",
                "before": number(before["nearest_prototype_accuracy"]),
                "after": number(after["nearest_prototype_accuracy"]),
                "note": "" if difference is None else f"difference {cell(difference)}",
            }
        )
        tiles.append(
            {
                "name": f"cosine within less between concepts, layer {layer}",
                "before": number(_gap(before)),
                "after": number(_gap(after)),
                "note": "",
            }
        )
    held_out = files.metrics["held_out"]
    kl = None if held_out is None else held_out["kl_to_base_nats_per_token"]
    if kl is not None:
        name = "KL to the base model, nats per token"
        tiles.append({"name": name, "before": number(kl["before"]), "after": number(kl["after"]), "note": ""})
    return tiles


def _accuracy_difference(evaluation: dict[str, Any], layer: str) -> dict[str, float] | None:
    measured = evaluation.get("layers", {}).get(layer, {}).get("nearest_prototype_accuracy")
    return None if measured is None else measured["difference"]


def _gap(values: dict[str, float | None]) -> float | None:
    same, different = values["same_concept_cosine"], values["different_concept_cosine"]
    return None if same is None or different is None else same - different


def _findings(files: RunFiles, evaluation: dict[str, Any]) -> list[str]:
    found = []
    for layer, values in _held_out_layers(files).items():
        before, after = (values[side]["nearest_prototype_accuracy"] for side in ("before", "after"))
        verb = "rose" if after > before else "fell" if after < before else "stayed"
        line = f"Layer {layer}: the share of held-out samples whose nearest prototype is the right one {verb}"
        line += f" at {after:.1%}." if after == before else f" from {before:.1%} to {after:.1%}."
        difference = _accuracy_difference(evaluation, layer)
        if after != before and difference is not None and difference["low"] <= 0 <= difference["high"]:
            line += " The 95 % interval of the difference holds 0: it may be chance."
        gaps = _gap(values["before"]), _gap(values["after"])
        if gaps[0] is not None and gaps[1] is not None and gaps[1] > gaps[0] and after < before:
            line += " The concepts lie further apart, yet fewer samples are told right: separation alone is no gain."
        found.append(line)
    return found


def _held_out_tables(files: RunFiles) -> list[Table]:
    held_out, samples = files.metrics["held_out"], files.metrics["samples"]["held_out"]
    if held_out is None:
        return []
    rows = [
        [measure.replace("_", " "), layer, number(value), number(values["after"][measure])]
        for layer, values in held_out["layers"].items()
        for measure, value in values["before"].items()
    ]
    kl = held_out["kl_to_base_nats_per_token"]
    if kl is not None:
        rows.append(["KL to the base model, nats per token", "", number(kl["before"]), number(kl["after"])])
    tables = [Table(f"{samples} held-out samples", ["measure", "layer", "before", "after"], rows)]
    for layer, concepts in held_out["by_concept"].items():
        measures = [measure.replace("_", " ") for measure in next(iter(concepts.values()), {})]
        by_concept = [[concept, *map(number, values.values())] for concept, values in concepts.items()]
        tables.append(
            Table(f"By concept, after training, layer {layer}", ["concept", *measures], by_concept, open=False)
        )
    return tables


def _comparison(files: RunFiles, name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Every pair of "base" and "seer" in the results as a row, one table per layer; the rest as facts."""
    concepts, targets = files.metrics["concepts"], [str(layer) for layer in files.metrics["target_layers"]]
    layers = results.get("layers", {})
    others = {key: value for key, value in results.items() if key not in ("layers", "concepts")}
    tables = [
        _comparison_table(f"Layer {layer}", list(_pairs(values, concepts)), layer in targets or len(layers) == 1)
        for layer, values in layers.items()
    ]
    pairs = [row for key, child in others.items() for row in _pairs(child, concepts, (key,) if _is_pair(child) else ())]
    if pairs:
        tables.insert(0, _comparison_table(_CAPTIONS.get(name, "All layers"), pairs, True))
    leaves = {key for row in _keys(results) for key in row}
    return {
        "tables": tables,
        "facts": {key.replace("_", " "): _fact(value) for key, value in others.items() if not list(_pairs(value, []))},
        "meanings": {key.replace("_", " "): text for key, text in MEANINGS.items() if key in leaves},
    }


def _comparison_table(caption: str, pairs: list[list[str]], opened: bool) -> Table:
    with_differences = any(row[3] for row in pairs)
    header = ["measure", "base", "SEER", *(["difference"] if with_differences else [])]
    return Table(caption, header, [row[: len(header)] for row in pairs], opened)


def _pairs(node: Any, concepts: list[str], path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Rows name, base, SEER, difference ("" if none is given) for every figure under `node`."""
    if not isinstance(node, dict):
        return
    if not _is_pair(node):
        for name, child in node.items():
            yield from _pairs(child, concepts, (*path, name))
        return
    yield from _sides(node["base"], node["seer"], node.get("difference"), concepts, path)


def _sides(base: Any, seer: Any, difference: Any, concepts: list[str], path: tuple[str, ...]) -> Iterator[list[str]]:
    if _is_figure(base) and _is_figure(seer):
        name = ": ".join(part if part in concepts else part.replace("_", " ") for part in path)
        yield [name, cell(base), cell(seer), "" if difference is None else cell(difference)]
        return
    base, seer, difference = (side if isinstance(side, dict) else {} for side in (base, seer, difference))
    for name in dict.fromkeys(chain(base, seer)):
        yield from _sides(base.get(name), seer.get(name), difference.get(name), concepts, (*path, name))


def _is_pair(node: Any) -> bool:
    return isinstance(node, dict) and {"base", "seer"} <= set(node)


def _fact(value: Any) -> str:
    """A setting or size, or several, in one line."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_fact(each)}" for name, each in value.items()) or "-"
    if isinstance(value, list):
        return "; ".join(map(_fact, value)) or "-"
    return _plain(value)


def _plain(value: Any) -> str:
    """An option or setting in words."""
    if value is None:
        return "-"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _keys(node: Any) -> Iterator[list[str]]:
    if isinstance(node, dict):
        yield list(node)
        for child in node.values():
            yield from _keys(child)


def _is_figure(value: Any) -> bool:
    return value is None or isinstance(value, (int, float)) or (isinstance(value, dict) and "value" in value)


def _faithfulness(files: RunFiles, name: str, results: dict[str, Any]) -> dict[str, Any]:
    from seer.faithfulness import COMPARISONS

    seer = results["seer"]
    tables = [
        Table(
            title,
            ["model", "concept's direction", "random direction", "difference", "effect size d_z"],
            [
                [
                    label,
                    *(cell(result["comparisons"][name][part]) for part in ("intervention", "control", "difference")),
                    cell(result["comparisons"][name]["effect_size"]),
                ]
                for label, result in (("base", results["base"]), ("SEER", seer))
            ],
        )
        for name, title in COMPARISONS.items()
        if name in seer["comparisons"]
    ]
    facts = {"layer": str(seer["layer"]), "held-out texts": str(seer["texts"])}
    return {"tables": tables, "facts": facts, "meanings": {}}


def _by_layer(evaluation: dict[str, Any]) -> list[Picture]:
    from seer.plots import plot_by_layer

    layers = {int(layer): values for layer, values in evaluation.get("layers", {}).items()}
    if len(layers) < 2:
        return []
    pictures = []
    for measure in _BY_LAYER:
        values = {layer: each[measure] for layer, each in layers.items()}
        title = measure.replace("_", " ")

        def draw(path: Path, values: Any = values, title: str = title) -> None:
            plot_by_layer(values, path, title=title)

        said = "; ".join(
            f"layer {layer}: {number(each['base']['value'])} and {number(each['seer']['value'])}"
            for layer, each in values.items()
        )
        pictures.append(_picture(draw, f"{title} by layer, base model and SEER. {said}."))
    return pictures


def _curves(folder: Path) -> list[Picture] | None:
    """One picture per quantity that was logged; None where the run kept no log."""
    from transformers.trainer import TRAINER_STATE_NAME

    from seer.plots import learning_curves, plot_learning_curves

    file = folder / TRAINER_STATE_NAME
    if not file.is_file():
        return None
    with _as_written_by(file, "seer train"):
        history = read_json(file, "seer train")["log_history"]
        pictures = []
        for title, lines in learning_curves(history).items():
            quantity = title.removesuffix(" by concept")
            names = {f"{quantity}/{concept}" if concept else quantity for concept in lines}
            kept = [{key: value for key, value in entry.items() if key in names | {"step"}} for entry in history]

            def draw(path: Path, kept: Any = kept) -> None:
                plot_learning_curves(kept, path)

            ends = "; ".join(_from_to(concept, points) for concept, points in lines.items())
            pictures.append(_picture(draw, f"{title.replace('_', ' ')} over the steps. {ends}."))
    return pictures


def _from_to(name: str, points: dict[int, float]) -> str:
    first, last = min(points), max(points)
    said = f"{number(points[first])} at step {first}, {number(points[last])} at step {last}"
    return f"{name}: {said}" if name else said


def _of_the_model(
    files: RunFiles, run: Run | None, data: str | None, layers: Sequence[int] | None, texts: int, method: Method
) -> tuple[list[tuple[int, Picture]], dict[str, Any] | None, str]:
    """Pictures of the held-out samples by layer, heat maps of a few texts, and else why they are left out."""
    if run is None:
        return [], None, "The model was not loaded (--files_only)."
    training, held_out = run.samples(data)
    if held_out is None:
        return [], None, "The run held no samples out."

    from seer.data import evenly_spaced
    from seer.explainer import ConceptExplainer
    from seer.plots import neighbour_share, plot_representations
    from seer.render import shown
    from seer.run import PROTOTYPES

    pictures = []
    chosen = run.stack.resolve(files.metrics["target_layers"] if layers is None else layers)
    if len(held_out) >= _FEWEST_SAMPLES:
        states = run.encode(held_out.texts, chosen)
        for layer in chosen:
            before, after = states.before[layer].numpy(), states.after[layer].numpy()

            def draw(path: Path, before: Any = before, after: Any = after) -> None:
                plot_representations(
                    before, after, held_out.concepts, path, method=method, names=training.names, stacked=True
                )

            shares = [neighbour_share(side, held_out.concept_ids) for side in (before, after)]
            said = (
                f"Layer {layer}: {len(held_out)} held-out samples in the plane, the base model above SEER, one colour "
                f"and shape per concept. Of the {shares[0][1]} nearest neighbours of a sample, {shares[0][0]:.0%} are "
                f"of its concept before training and {shares[1][0]:.0%} after."
            )
            pictures.append((layer, _picture(draw, said)))

    heat_maps = None
    if texts and (run.folder / PROTOTYPES).is_file():
        explainer = ConceptExplainer.from_run(run)
        last = explainer.layers[-1:]
        explainer = ConceptExplainer.from_run(run, layers=last)
        picked = evenly_spaced(len(held_out), texts)
        heat_maps = shown(
            explainer.explain([held_out.texts[index] for index in picked]),
            [f"Held-out text {index + 1}: {held_out.concepts[index]}" for index in picked],
            explainer.calibration,
            unfold=0,
        )
    return pictures, heat_maps, ""


def _picture(draw: Callable[[Path], Any], alternative: str) -> Picture:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        draw(file)
        return Picture(f"data:image/png;base64,{b64encode(file.read_bytes()).decode()}", alternative)


def _pairs_table(caption: str, name: str, values: dict[str, Any]) -> Table:
    return Table(caption, [name, "value"], [[key, _plain(value)] for key, value in values.items()])


def cell(value: Any) -> str:
    """A figure of a result file: a number, alone or with its interval or standard error; "-" for none."""
    if not isinstance(value, dict):
        return number(value)
    spread = [value.get(name) for name in ("standard_error", "low", "high")]
    digits = min((_digits(part) for part in (value["value"], *spread) if part), default=3)
    shown = number(value["value"], digits)
    error, low, high = (None if part is None else number(part, digits) for part in spread)
    if shown == "-" or (error is None and (low is None or high is None)):
        return shown
    return f"{shown} ± {error}" if error is not None else f"{shown} [{low}, {high}]"


def number(value: float | None, digits: int | None = None) -> str:
    """A number with three digits after the point, or as many as show two that count; "-" for none."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int):
        return str(value)
    shown = f"{value:.{_digits(value) if digits is None else digits}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown


def _digits(value: float) -> int:
    if value == 0 or not math.isfinite(value):
        return 3
    return min(8, max(3, 1 - math.floor(math.log10(abs(value)))))


def run_report(argv: Sequence[str]) -> None:
    """Run `seer report` with the arguments after it.

    Raises:
        InputError: bad arguments, files or data.
        SystemExit: after `--help`.
    """
    parser = Parser("seer report", _DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument("--data", metavar="FILE", help="where the run's data is now (default: where it was)")
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="L", help="layers of the pictures (default: the target layers)"
    )
    parser.add_argument(
        "--method", choices=("tsne", "pca"), default="tsne", help="projection of the pictures (default: tsne)"
    )
    parser.add_argument(
        "--texts", type=int, default=3, metavar="N", help="held-out texts with heat maps; they are quoted (default: 3)"
    )
    parser.add_argument(
        "--run_missing",
        action="store_true",
        help="first run the commands whose results are missing, as they are by default",
    )
    parser.add_argument(
        "--files_only", action="store_true", help="do not load the model: no pictures of samples, no heat maps"
    )
    arguments = parser.parse_args(argv)
    if arguments.texts < 0:
        parser.error(f"--texts: expected a whole number >= 0, got {arguments.texts}")
    if arguments.files_only and arguments.run_missing:
        parser.error("--run_missing: expected without --files_only, got both")

    from rich.console import Console

    console = Console(highlight=False)
    RunFiles.read(arguments.run)
    if arguments.run_missing:
        _run_missing(arguments.run, arguments.data, console)
    run = None
    if not arguments.files_only:
        from seer.run import Run

        run = Run.load(arguments.run)
    file = write_report(
        arguments.run,
        arguments.output,
        run=run,
        data=arguments.data,
        layers=arguments.layers,
        texts=arguments.texts,
        method=arguments.method,
    )
    console.print(f"Wrote {file}", soft_wrap=True)


def _run_missing(folder: Path, data: str | None, console: Any) -> None:
    from seer.evaluate import run_evaluate
    from seer.faithfulness import run_faithfulness

    for name, command in COMMANDS.items():
        if (folder / name).is_file():
            continue
        if command.endswith("CONCEPT"):  # a choice that is not ours
            console.print(f"Left out: {command}", soft_wrap=True)
            continue
        _, verb, *options = command.split()
        arguments = [str(folder), *options, *(["--data", data] if data else [])]
        console.print(f"{command} {folder}", style="bold", soft_wrap=True)
        try:
            {"evaluate": run_evaluate, "faithfulness": run_faithfulness}[verb](arguments)
        except InputError as error:  # such as a task that this model or data is not for
            console.print(f"Left out: {error}", soft_wrap=True)
