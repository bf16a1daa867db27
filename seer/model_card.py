"""The model card of a run: the README.md beside its adapter."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from seer.config import SeerConfig


def model_card(config: SeerConfig, metrics: dict[str, Any], *, counts: dict[str, int], pictures: list[str]) -> str:
    """Markdown with the metadata that the Hub reads.

    Args:
        config: options of the run.
        metrics: what metrics.json holds.
        counts: training samples of each concept.
        pictures: file names beside the card.
    """
    data = ModelCardData(base_model=config.model, library_name="peft", tags=["seer", "lora", "concepts"])
    training = metrics["training"]
    sections = [
        f"# SEER adapter{f' for {config.model}' if config.model else ''}",
        "A LoRA adapter that gathers the hidden states of one concept and separates those of different ones "
        "([arXiv 2502.05242](https://arxiv.org/abs/2502.05242)), trained with `seer train`. "
        "`prototypes.safetensors` holds one direction per concept and target layer.",
        "## Data",
        f"{config.data}: {metrics['samples']['training']} training samples, {metrics['samples']['held_out']} held out. "
        f"Retain texts: {config.retain_data or 'the first text of every pair'}.",
        _table(["concept", "training samples"], [[name, str(count)] for name, count in counts.items()]),
        "## Held-out samples, before and after",
        _held_out(metrics["held_out"]),
        "## Training",
        f"{training['steps']} steps in {training['seconds']} s.",
        *(f"![{name.rsplit('.', 1)[0].replace('_', ' ')}]({name})" for name in pictures),
        "## Options",
        "`seer train config.yaml` runs it again.",
        f"```yaml\n{yaml.safe_dump(config.options(), sort_keys=False, allow_unicode=True)}```",
        "## Versions",
        _table(["package", "version"], [[name, each] for name, each in metrics["versions"].items()]),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _held_out(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "None were held out."
    rows = [
        [layer, name.replace("_", " "), _number(value), _number(values["after"][name])]
        for layer, values in figures["layers"].items()
        for name, value in values["before"].items()
    ]
    kl = figures["kl_to_base_nats_per_token"]
    if kl is not None:
        rows.append(["", "KL to the base model, nats per token", _number(kl["before"]), _number(kl["after"])])
    text = _table(["layer", "measure", "before", "after"], rows)
    by_concept = [
        [layer, concept, *(_number(value) for value in values.values())]
        for layer, concepts in figures["by_concept"].items()
        for concept, values in concepts.items()
    ]
    header = [
        "layer",
        "concept, after",
        "same concept cosine",
        "different concept cosine",
        "nearest prototype accuracy",
    ]
    return f"{text}\n\n{_table(header, by_concept)}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{' --- |' * len(header)}", *lines[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
