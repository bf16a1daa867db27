"""Runs `seer train` with the default and the `reference` preset over data sets and seeds, measures what came out with
all that `seer evaluate` has, and writes docs/presets.md.

    python benchmarks/presets.py --model PATH --data safety_concepts.csv math_concepts.csv

Every run ends in lines of results/presets.csv, one for each measure, and a run that has its lines is not made again, so
that it can be stopped and goes on. Each seed decides what is held out: a fifth of the texts, which training never sees.
With --page only the page is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import pandas
import torch
from rich.progress import track

from seer import SeerConfig, run_training
from seer.evaluate import evaluate_run
from seer.generalization import ModelGeneralization, evaluate_generalization
from seer.run import Run

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "presets.md"
PRESETS = ("reference", "default")


class Measure(NamedTuple):
    title: str
    rises: bool | None
    """Whether training should raise it (True) or lower it (False); None where neither is better by itself."""


MEASURES = {
    "nearest_prototype_accuracy": Measure("nearest-prototype accuracy", True),
    "knn_accuracy": Measure("k-NN accuracy", True),
    "linear_probe_accuracy": Measure("linear-probe accuracy", True),
    "same_concept_cosine": Measure("same-concept cosine", None),
    "different_concept_cosine": Measure("different-concept cosine", None),
    "silhouette": Measure("silhouette", True),
    "rate_reduction": Measure("rate reduction", True),
    "coding_rate": Measure("coding rate", None),
    "effective_rank": Measure("effective rank", None),
    "between_centroids": Measure("distance between centroids", True),
    "within_concept": Measure("distance within a concept", None),
    "hausdorff": Measure("Hausdorff distance", None),
    "kl": Measure("KL to the base model, nats per token", None),
    "perplexity": Measure("perplexity", False),
    "k_variance": Measure("k-variance, training texts", False),
    "exact_k_variance": Measure("k-variance, exact", False),
    "held_out_k_variance": Measure("k-variance, held-out texts", False),
    "relative_k_variance": Measure("k-variance, training texts, over distance between centroids", False),
    "margin": Measure("median margin, training texts", True),
    "held_out_margin": Measure("median margin, held-out texts", True),
    "lipschitz": Measure("largest Lipschitz constant", False),
    "kv_margin": Measure("kV-Margin", False),
    "kv_gn_margin": Measure("kV-GN-Margin", False),
    "bound": Measure("bound of the share of errors", False),
    "held_out_error": Measure("share of errors, held-out texts", False),
}


def run(preset: str, model: str, data: Path, limit: int, seed: int) -> list[dict[str, object]]:
    """Trains on the first `limit` texts of every concept, and returns a line of results for every measure."""
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.csv"
        rows = pandas.read_csv(data)
        rows.groupby("concept", sort=False).head(limit).to_csv(texts, index=False)
        output = Path(folder) / "run"
        config = SeerConfig(
            preset=preset,  # type: ignore[arg-type]  # one of PRESETS
            output_dir=str(output),
            model=model,
            data=str(texts),
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        run_training(config)
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        ((layer, _),) = metrics["held_out"]["layers"].items()
        line: dict[str, object] = {
            "preset": preset,
            "data": data.stem,
            "seed": seed,
            "layer": layer,
            "texts_per_concept": limit,
            "texts": metrics["samples"]["held_out"],
            "steps": metrics["training"]["steps"],
        }
        figures = dict(_figures(Run.load(output), int(layer)))
    return [line | {"measure": name, "base": base, "seer": seer} for name, (base, seer) in figures.items()]


def _figures(finished: Run, layer: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """Name of the measure, the base model's figure and the trained model's."""
    evaluation = evaluate_run(finished, layers=[layer], resamples=2)  # the intervals are not used: there are seeds
    for name, change in (evaluation.layers[layer] | (evaluation.retention or {})).items():
        yield name, (change.base.value, change.seer.value)
    apart = evaluation.layers[layer]["between_centroids"]
    compared = evaluate_generalization(finished, layers=[layer]).layers[layer]
    base, seer = _terms(compared.base, apart.base.value), _terms(compared.seer, apart.seer.value)
    for name in base:
        yield name, (base[name], seer[name])


def _terms(model: ModelGeneralization, between_centroids: float) -> dict[str, float]:
    terms, held_out = model.training, model.held_out
    found = {
        "k_variance": terms.mean_k_variance.value,
        "relative_k_variance": terms.mean_k_variance.value / between_centroids,
        "margin": terms.median_margin,
        "bound": terms.bound.value,
        "held_out_margin": held_out.median_margin,
        "held_out_error": held_out.error,
        "lipschitz": max(terms.lipschitz.values()),
        "kv_margin": terms.kv_margin.value,
        "kv_gn_margin": terms.kv_gn_margin.value,
    }
    if terms.exact is not None:
        found["exact_k_variance"] = terms.exact.mean_k_variance.value
    if held_out.mean_k_variance is not None:
        found["held_out_k_variance"] = held_out.mean_k_variance.value
    return found


def page(lines: Sequence[dict[str, str]]) -> str:
    """The page of all runs."""
    parts = [
        "# Presets\n\nThis page is written by `python benchmarks/presets.py` from "
        "[`benchmarks/results/presets.csv`](../benchmarks/results/presets.csv). `reference` is the recipe of the "
        "paper's code, `default` ours. A seed decides which fifth of the texts is held out, and how training goes. "
        "Figures are of held-out texts at the target layer unless they say otherwise, mean and standard deviation over "
        "the seeds, base model and trained model; `better` counts the seeds whose figure moved the right way, where "
        "there is one. What each measure is: `help(seer.metrics)` and `help(seer.generalization)`; seeds of a bound "
        "that does not exist, because half of the training texts or more are told wrongly, are left out. What to make "
        "of it: [The method](method.md#what-to-watch)."
    ]
    for data in dict.fromkeys(line["data"] for line in lines):
        of_data = [line for line in lines if line["data"] == data]
        seeds = sorted({int(line["seed"]) for line in of_data})
        first = of_data[0]
        steps = {line["preset"]: line["steps"] for line in of_data}
        described = ", ".join(f"{steps[preset]} steps with `{preset}`" for preset in PRESETS if preset in steps)
        parts.append(
            f"## {data}\n\nThe first {first['texts_per_concept']} texts of every concept, {first['texts']} of them "
            f"held out; layer {first['layer']}; seeds {', '.join(map(str, seeds))}; {described}."
        )
        rows = ["| measure | base | reference | better | default | better |", "| --- | --- | --- | --- | --- | --- |"]
        for name, measure in MEASURES.items():
            of_measure = [line for line in of_data if line["measure"] == name]
            if not of_measure:
                continue
            cells = [_spread([line["base"] for line in of_measure if line["preset"] == PRESETS[-1]])]
            for preset in PRESETS:
                chosen = [line for line in of_measure if line["preset"] == preset]
                cells += [_spread([line["seer"] for line in chosen]), _better(chosen, measure.rises)]
            rows.append(f"| {measure.title} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _better(lines: Sequence[dict[str, str]], rises: bool | None) -> str:
    changes = _numbers([float(line["seer"]) - float(line["base"]) for line in lines])
    if rises is None or not changes:
        return ""
    return f"{sum(change > 0 if rises else change < 0 for change in changes)} of {len(changes)}"


def _spread(values: Sequence[str]) -> str:
    numbers = _numbers(map(float, values))
    if not numbers:
        return "-" if values else ""
    spread = f" ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.4g}{spread}"


def _numbers(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="a model with a chat template, local or on the Hub")
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="FILE", help="as for seer train")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], metavar="S", help="(default: 42 43 44)")
    parser.add_argument(
        "--texts_per_concept", type=int, default=70, metavar="T", help="the first so many of each concept (default: 70)"
    )
    parser.add_argument("--out", type=Path, default=harness.RESULTS, metavar="FOLDER", help="of presets.csv")
    parser.add_argument("--page", action="store_true", help="only write the page from the results that are there")
    arguments = parser.parse_args(argv)
    path = arguments.out / "presets.csv"
    if not arguments.page:
        if arguments.model is None or not arguments.data:
            parser.error("--model and --data: expected a model and at least one file, unless --page is given")
        there = {(line["preset"], line["data"], int(line["seed"])) for line in _read(path)}
        runs = [
            (p, d, s) for d in arguments.data for s in arguments.seeds for p in PRESETS if (p, d.stem, s) not in there
        ]
        environment = harness.environment(torch.device("cpu"), ("transformers", "peft"))
        path.parent.mkdir(parents=True, exist_ok=True)
        for preset, data, seed in track(runs, "training"):
            lines = run(preset, arguments.model, data, arguments.texts_per_concept, seed)
            new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [*lines[0], *environment])
                if new:
                    writer.writeheader()
                writer.writerows(line | environment for line in lines)
    if arguments.out == harness.RESULTS:
        PAGE.write_text(page(_read(path)), encoding="utf-8")
        print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
