"""Runs `seer train` with the default and the `reference` preset over data sets and seeds, and writes docs/presets.md.

    python benchmarks/presets.py --model PATH --data safety_concepts.csv math_concepts.csv

Every run ends in one line of results/presets.csv, and a run that has its line is not made again, so that it can be
stopped and goes on. Each seed decides what is held out: a fifth of the texts, which training never sees. With --page
only the page is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness
import pandas
import torch
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "presets.md"
PRESETS = ("reference", "default")
MEASURES = {
    "nearest_prototype_accuracy": "nearest-prototype accuracy",
    "same_concept_cosine": "same-concept cosine",
    "different_concept_cosine": "different-concept cosine",
}
KL = "kl_to_base_nats_per_token"


def run(preset: str, model: str, data: Path, limit: int, seed: int) -> dict[str, object]:
    """Trains on the first `limit` texts of every concept, and returns a line of results."""
    from seer import SeerConfig, run_training

    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.csv"
        rows = pandas.read_csv(data)
        rows.groupby("concept", sort=False).head(limit).to_csv(texts, index=False)
        config = SeerConfig(
            preset=preset,  # type: ignore[arg-type]  # one of PRESETS
            output_dir=f"{folder}/run",
            model=model,
            data=str(texts),
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        run_training(config)
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text(encoding="utf-8"))
    held_out = metrics["held_out"]
    ((layer, figures),) = held_out["layers"].items()
    line: dict[str, object] = {
        "preset": preset,
        "data": data.stem,
        "seed": seed,
        "layer": layer,
        "texts_per_concept": limit,
    }
    line |= {"texts": metrics["samples"]["held_out"], "steps": metrics["training"]["steps"]}
    line["seconds"] = metrics["training"]["seconds"]
    for name in MEASURES:
        line |= {f"{name}_before": figures["before"][name], f"{name}_after": figures["after"][name]}
    return line | {KL: held_out[KL]["after"]}


def page(lines: Sequence[dict[str, str]]) -> str:
    """The page of all runs."""
    parts = [
        "# Presets\n\nThis page is written by `python benchmarks/presets.py` from "
        "[`benchmarks/results/presets.csv`](../benchmarks/results/presets.csv). `reference` is the recipe of the "
        "paper's code, `default` ours. A seed decides which fifth of the texts is held out, and how training goes; "
        "figures are of held-out texts at the target layer, mean and standard deviation over the seeds, before and "
        "after training. KL is that to the base model, in nats per token."
    ]
    for data in dict.fromkeys(line["data"] for line in lines):
        of_data = [line for line in lines if line["data"] == data]
        seeds = sorted({int(line["seed"]) for line in of_data})
        first = of_data[0]
        parts.append(
            f"## {data}\n\nThe first {first['texts_per_concept']} texts of every concept, {first['texts']} of them "
            f"held out; layer {first['layer']}; seeds {', '.join(map(str, seeds))}."
        )
        rows = ["| preset | steps | measure | before | after |", "| --- | --- | --- | --- | --- |"]
        for preset in PRESETS:
            chosen = [line for line in of_data if line["preset"] == preset]
            if not chosen:
                continue
            for name, title in MEASURES.items():
                before, after = (_spread(chosen, f"{name}_{when}") for when in ("before", "after"))
                rows.append(f"| {preset} | {chosen[0]['steps']} | {title} | {before} | {after} |")
            rows.append(f"| {preset} | {chosen[0]['steps']} | KL | | {_spread(chosen, KL)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _spread(lines: Sequence[dict[str, str]], column: str) -> str:
    values = [float(line[column]) for line in lines]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


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
            line = run(preset, arguments.model, data, arguments.texts_per_concept, seed) | environment
            new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, line.keys())
                if new:
                    writer.writeheader()
                writer.writerow(line)
    if arguments.out == harness.RESULTS:
        PAGE.write_text(page(_read(path)), encoding="utf-8")
        print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
