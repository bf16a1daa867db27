"""The command `seer evaluate`: base model against SEER, by default on held-out samples at every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from seer.command_line import Parser, require_at_least, save_json
from seer.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from seer.data import Text
    from seer.metrics import Change
    from seer.run import Run

_DESCRIPTION = """\
Measure a run's base model and its SEER model on held-out samples: at every layer how the hidden states of concepts are
arranged and how well a concept can be told from them, and how far the model's predictions moved on retain texts. Every
figure has a 95 % bootstrap interval over texts; those of the differences compare both models on the same draws. RUN is
the --output_dir of `seer train`. What each measure is: help(seer.metrics).

That is the task "separation". --task NAME chooses another, which has options of its own; to see them:
seer evaluate --task NAME --help
"""

_SEPARATION = "separation"

_TASKS = {
    "classification": ("seer.classification", "how well the concept of a text can be told"),
    "detoxification": ("seer.detoxification", "how safe its answers are, and what it refuses"),
    "generalization": ("seer.generalization", "terms of an optimal-transport bound on the errors of a classifier"),
}
"""Name -> the module with its `run_<name>`, and what it measures."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of N held-out samples."""

    samples: int
    concepts: list[str]
    layers: dict[int, dict[str, Change]]
    """Layer -> measure -> base, SEER and their difference."""
    retention: dict[str, Change] | None
    """`perplexity`, exp of the mean negative log-likelihood of the next token, and `kl`, the mean of KL(base || model)
    in nats, both over all tokens of the retain texts; None for a model without a language-model head."""
    retain_texts: str
    """Which texts those are."""
    resamples: int


def evaluate_run(
    run: Run,
    *,
    layers: Sequence[int] | None = None,
    data: str | None = None,
    retain_data: str | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Evaluation:
    """Measure everything.

    Args:
        run: whose.
        layers: which; default all.
        data: where the run's data is now, if not where the run read it.
        retain_data: texts for the retention; default those of the run, or else its held-out samples.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Raises:
        InputError: nothing held out, or none of some concept; layers or data that are not there.
    """
    import numpy as np

    from seer.data import TextDataset
    from seer.layers import lm_head
    from seer.metrics import bootstrap_weights, compare, layer_metrics

    training, held_out = run.samples_with_held_out(data)
    chosen = run.stack.resolve(range(len(run.stack.layers)) if layers is None else layers)
    training_states, states = run.encode(training.texts, chosen), run.encode(held_out.texts, chosen)
    weights = bootstrap_weights(held_out.concept_ids, resamples, seed)
    by_layer = {}
    for layer in chosen:
        base, seer = (
            layer_metrics(
                of_held_out[layer].numpy(), held_out.concept_ids, of_training[layer].numpy(), training.concept_ids
            )
            for of_held_out, of_training in (
                (states.before, training_states.before),
                (states.after, training_states.after),
            )
        )
        by_layer[layer] = {name: compare(base[name], seer[name], weights) for name in base}

    source = retain_data or run.config.retain_data
    texts = held_out.texts if source is None else TextDataset.load(source).texts
    retention = None
    if lm_head(run.stack) is not None:
        sums = retention_sums(run, texts)
        draws = bootstrap_weights(np.zeros(len(texts)), resamples, seed)
        retention = {
            "perplexity": compare(
                lambda w: math.exp(_per_token(sums, "nll_base", w)),
                lambda w: math.exp(_per_token(sums, "nll_seer", w)),
                draws,
            ),
            "kl": compare(lambda w: 0.0, lambda w: _per_token(sums, "kl", w), draws),
        }
    return Evaluation(
        samples=len(held_out),
        concepts=held_out.names,
        layers=by_layer,
        retention=retention,
        retain_texts="held-out samples" if source is None else source,
        resamples=resamples,
    )


def retention_sums(run: Run, texts: Sequence[Text], batch_size: int = 4) -> dict[str, np.ndarray]:
    """Per text, sums over its next-token predictions.

    Args:
        run: base model and adapted model.
        texts: N texts; one of a single token predicts nothing and counts nothing.
        batch_size: texts per pass.

    Returns:
        `tokens`, `nll_base`, `nll_seer` and `kl` (KL(base || SEER)), each (N,) float64, in nats.

    Raises:
        InputError: no text has two tokens.
    """
    import numpy as np
    import torch
    from torch.nn.functional import kl_div

    from seer.data import pad_token_id
    from seer.layers import without_dropout
    from seer.sampling import pad_rows

    device = next(run.stack.root.parameters()).device
    rows = run.tokens(texts)
    if max(len(row.ids) for row in rows) < 2:
        raise InputError("retain texts: expected one of at least two tokens, got none")
    padding = pad_token_id(run.tokenizer)
    found = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        inputs = {name: values.to(device) for name, values in pad_rows(chosen, padding).items()}
        del inputs["request_lengths"]
        with torch.no_grad(), without_dropout(run.model):
            adapted = run.stack.root(**inputs).logits
            with run.base_layers() as base:
                reference = base.root(**inputs).logits
        for index, row in enumerate(chosen):  # one at a time: float32 copies are large
            before, after = (
                logits[index, : len(row.ids) - 1].float().log_softmax(-1) for logits in (reference, adapted)
            )  # [T - 1, V]
            labels = inputs["input_ids"][index, 1 : len(row.ids)].unsqueeze(1)
            sums = [-before.gather(1, labels).sum(), -after.gather(1, labels).sum()]
            sums.append(kl_div(after, before, reduction="sum", log_target=True))
            found.append([len(row.ids) - 1, *(float(value) for value in sums)])
    return dict(zip(("tokens", "nll_base", "nll_seer", "kl"), np.array(found).T, strict=True))


def _per_token(sums: dict[str, np.ndarray], name: str, weights: np.ndarray) -> float:
    tokens = weights @ sums["tokens"]
    return float(weights @ sums[name] / tokens) if tokens else float("nan")  # only texts of one token were drawn


def run_evaluate(argv: Sequence[str]) -> None:
    """Run `seer evaluate` with the arguments after it.

    Raises:
        InputError: bad arguments or data.
        SystemExit: after `--help`.
    """
    selector = Parser("seer evaluate", "", add_help=False)
    selector.add_argument("--task", default=_SEPARATION)
    selected, rest = selector.parse_known_args(argv)
    if selected.task in _TASKS:
        module, _ = _TASKS[selected.task]
        getattr(import_module(module), f"run_{selected.task}")(rest)
    elif selected.task == _SEPARATION:
        _run_separation(rest)
    else:
        raise InputError(f"--task: expected one of {[_SEPARATION, *_TASKS]}, got {selected.task!r}")


def _run_separation(argv: Sequence[str]) -> None:
    tasks = "".join(f"  {name:<15} {what}\n" for name, (_, what) in _TASKS.items())
    tasks = f"tasks:\n  {_SEPARATION:<15} how hidden states are arranged by concept (the default)\n{tasks}"
    parser = Parser("seer evaluate", _DESCRIPTION, tasks)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument(
        "--task", metavar="NAME", help="what to measure, see below; the other options here are those of separation"
    )
    parser.add_argument("--layers", nargs="+", type=int, metavar="L", help="layers (default: all)")
    parser.add_argument("--data", metavar="FILE", help="where the run's data is now (default: where it was)")
    parser.add_argument(
        "--retain_data", metavar="FILE", help="texts for the retention (default: the run's, or its held-out samples)"
    )
    parser.add_argument("--resamples", type=int, default=200, metavar="R", help="bootstrap draws (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures (default: RUN/evaluation.json)")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, resamples=2, seed=0)

    from rich.console import Console

    from seer.run import Run

    run = Run.load(arguments.run)
    evaluation = evaluate_run(
        run,
        layers=arguments.layers,
        data=arguments.data,
        retain_data=arguments.retain_data,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    file = run.folder / "evaluation.json" if arguments.json is None else arguments.json
    save_json(asdict(evaluation), file)
    console = Console(highlight=False)
    console.print(_table(evaluation))
    console.print(f"Wrote {file}", soft_wrap=True)


def _table(evaluation: Evaluation) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{evaluation.samples} held-out samples; differences with 95 % intervals of {evaluation.resamples} draws"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("layer", "measure", "base", "SEER", "difference"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for layer, measures in evaluation.layers.items():
        for name, change in measures.items():
            table.add_row(
                str(layer), name.replace("_", " "), *change_cells(change), end_section=name == [*measures][-1]
            )
    for name, change in (evaluation.retention or {}).items():
        table.add_row("", {"perplexity": "perplexity", "kl": "KL to the base model, nats"}[name], *change_cells(change))
    if evaluation.retention is not None:
        table.caption = f"perplexity and KL on {evaluation.retain_texts}"
    return table


def change_cells(change: Change) -> list[str]:
    """Base, SEER and difference with its interval, for a table."""
    if change.difference.value != change.difference.value:
        return ["-", "-", "-"]
    difference = change.difference
    return [
        f"{change.base.value:.3f}",
        f"{change.seer.value:.3f}",
        f"{difference.value:.3f} [{difference.low:.3f}, {difference.high:.3f}]",
    ]
