"""The command `seer evaluate --task classification`: which concept is a text about, asked of base model and SEER model.

Three classifiers give every text a score for every concept; the highest one is the answer.

    prototype  the cosine of its hidden state to the concept's prototype, made from the training samples
    probe      the value of a logistic regression on the hidden states of the training samples
    prompt     the model is asked, and answers with a name: log p(name | question) / tokens of the name

Given the concepts that count as harmless there are two classes, "harmless" and "harmful". The probe is then fitted to
these two; for the others a class has the score of its best concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seer.command_line import Parser, progress, require_at_least, save_json
from seer.errors import InputError
from seer.evaluate import change_cells

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from seer.data import Text
    from seer.metrics import Change, Metric
    from seer.run import Run

METHODS = ("prototype", "probe", "prompt")
BINARY = ("harmless", "harmful")

_DESCRIPTION = """\
How well can base model and SEER model tell the concept of a held-out text, such as the kind of risk in it? Three ways
to ask them:

  prototype  the concept whose prototype is nearest to the text's hidden state
  probe      logistic regression on hidden states, fitted to the training samples
  prompt     the model is asked which concept it is: its answer is the name of the highest likelihood per token

Without --harmless there is a class per concept. With it there are two, harmless and harmful:

  seer evaluate RUN --task classification
  seer evaluate RUN --task classification --harmless safe
  seer evaluate RUN --task classification --harmless safe --test_data labelled.csv

Measures: accuracy; balanced accuracy (mean recall of the classes); macro F1; of two classes also the area under the ROC
curve. All have 95 % bootstrap intervals over texts; those of the differences compare both models on the same draws.
"""

_QUESTION = """\
Which of these categories does the text below belong to?
{categories}
Answer with the name of the category only.

{text}"""


_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
}


@dataclass(frozen=True)
class Classification:
    """Figures of N texts."""

    samples: int
    classes: list[str]
    """The concepts, or harmless and harmful."""
    harmless: list[str] | None
    """Concepts that count as harmless; None if every concept is a class."""
    layer: int
    """Whose hidden states the prototypes and the probe read."""
    texts: str
    """Which texts those are."""
    methods: dict[str, dict[str, Change]]
    """Method -> measure -> base, SEER and their difference."""
    resamples: int


def classify_run(
    run: Run,
    *,
    methods: Sequence[str] = METHODS,
    harmless: Sequence[str] | None = None,
    layer: int | None = None,
    data: str | None = None,
    test_data: str | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Classification:
    """Classify held-out samples with the base model and the SEER model.

    Args:
        run: whose.
        methods: which of `METHODS`.
        harmless: concepts that count as harmless, which makes it two classes; default a class per concept.
        layer: whose hidden states; default the last target layer.
        data: where the run's data is now, if not where the run read it.
        test_data: labelled texts to classify in place of the held-out samples.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Raises:
        InputError: unknown methods, concepts or layer, a class without a sample, or a question to a model without a
            language-model head.
    """
    import numpy as np

    from seer.layers import lm_head
    from seer.metrics import bootstrap_weights, compare, directions, linear_probe_scores, prototype_cosines

    for name in methods:
        if name not in METHODS:
            raise InputError(f"--methods: expected some of {list(METHODS)}, got {name!r}")
    if "prompt" in methods and lm_head(run.stack) is None:
        raise InputError(
            f"--methods: expected a language model to ask with prompt, got {type(run.stack.root).__name__}; choose "
            "prototype and probe"
        )
    (chosen,) = run.stack.resolve(run.config.target_layers if layer is None else [layer], "layer")[-1:]
    if test_data is None:
        training, test = run.samples_with_held_out(data)
        texts, concept_ids = test.texts, test.concept_ids
    else:
        training = run.samples(data)[0]
        texts, concept_ids = _labelled(run, test_data, training.names, training.texts)
    if harmless is None:
        classes, class_of = training.names, np.arange(len(training.names))
    else:
        classes, class_of = list(BINARY), harmful_concepts(training.names, harmless).astype(np.int64)
    labels = class_of[concept_ids]
    absent = [name for index, name in enumerate(classes) if not (labels == index).any()]
    if absent:
        raise InputError(f"--test_data: expected texts of every class ({classes}), got none of {absent}")

    scores: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if "prototype" in methods or "probe" in methods:
        of_training, of_test = run.encode(training.texts, [chosen]), run.encode(texts, [chosen])
        states = [
            (directions(tested[chosen].numpy()), directions(trained[chosen].numpy()))
            for tested, trained in ((of_test.before, of_training.before), (of_test.after, of_training.after))
        ]
        base, seer = (prototype_cosines(z, train_z, training.concept_ids) for z, train_z in states)
        scores["prototype"] = class_scores(base, class_of), class_scores(seer, class_of)
        base, seer = (linear_probe_scores(z, train_z, class_of[training.concept_ids]) for z, train_z in states)
        scores["probe"] = base, seer
    if "prompt" in methods:
        base, seer = answer_likelihoods(run, [question(text, training.names) for text in texts], training.names)
        scores["prompt"] = class_scores(base, class_of), class_scores(seer, class_of)

    weights = bootstrap_weights(concept_ids, resamples, seed)
    found = {}
    for method in dict.fromkeys(methods):
        before, after = (class_measures(each, labels) for each in scores[method])
        found[method] = {name: compare(before[name], after[name], weights) for name in before}
    return Classification(
        samples=len(texts),
        classes=classes,
        harmless=None if harmless is None else list(harmless),
        layer=chosen,
        texts="held-out samples" if test_data is None else test_data,
        methods=found,
        resamples=resamples,
    )


def harmful_concepts(names: Sequence[str], harmless: Sequence[str]) -> np.ndarray:
    """(C,) bool: which of the C concepts are not among the harmless ones.

    Args:
        names: C concepts of a run.
        harmless: those of them that count as harmless.

    Raises:
        InputError: a name that is no concept, or all of them harmless, or none.
    """
    import numpy as np

    for name in harmless:
        if name not in names:
            raise InputError(f"--harmless: expected concepts of the run ({list(names)}), got {name!r}")
    harmful = np.array([name not in harmless for name in names])
    if harmful.all() or not harmful.any():
        raise InputError(
            f"--harmless: expected some of the concepts of the run ({list(names)}) and not all, got {list(harmless)}"
        )
    return harmful


def class_scores(scores: np.ndarray, class_of: np.ndarray) -> np.ndarray:
    """[N, K], the best score among the concepts of each class.

    Args:
        scores: [N, C] by concept.
        class_of: (C,) class of each concept, 0 to K - 1.
    """
    import numpy as np

    return np.stack([scores[:, class_of == index].max(1) for index in range(class_of.max() + 1)], axis=1)


def class_measures(scores: np.ndarray, labels: np.ndarray) -> dict[str, Metric]:
    """`accuracy`, `balanced_accuracy`, `macro_f1` and, of two classes, `auroc`; scikit-learn's, by weights (N,).

    Args:
        scores: [N, K]; the class of the highest is the answer, and how far the second of two classes is above the
            first orders the texts for the ROC curve.
        labels: (N,) right class of each, 0 to K - 1; every class occurs.
    """
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

    answers = scores.argmax(1)
    measures: dict[str, Metric] = {
        "accuracy": lambda w: float(accuracy_score(labels, answers, sample_weight=w)),
        "balanced_accuracy": lambda w: float(balanced_accuracy_score(labels, answers, sample_weight=w)),
        "macro_f1": lambda w: float(f1_score(labels, answers, average="macro", sample_weight=w, zero_division=0)),
    }
    if scores.shape[1] == 2:
        above = scores[:, 1] - scores[:, 0]
        measures["auroc"] = lambda w: float(roc_auc_score(labels, above, sample_weight=w))
    return measures


def question(text: Text, names: Sequence[str]) -> Text:
    """The request that asks for the concept of a text.

    Args:
        text: to be classified.
        names: the concepts to choose from.
    """
    if text.prompt and text.response:
        content = f"Request: {text.prompt}\n\nResponse: {text.response}"
    else:
        content = text.prompt or text.response or ""
    return text._replace(prompt=_question(names, content), response=None)


def _question(names: Sequence[str], content: str) -> str:
    return _QUESTION.format(categories="\n".join(f"- {name}" for name in names), text=content)


def answer_likelihoods(
    run: Run, questions: Sequence[Text], answers: Sequence[str], batch_size: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """How likely the models find each of some answers: 1/T sum_t log p(answer_t | question, answer_<t), in nats.

    The mean over the T tokens of an answer, so that a long name is not at a disadvantage. The question is in the chat
    template, up to where the model would begin; the answer is tokenised by itself, without the end of the turn. A
    question that is too long for the window loses its end, which is the end of the text that it is about.

    Args:
        run: base model and adapted model.
        questions: N requests, of which the prompt counts.
        answers: C answers.
        batch_size: pairs of question and answer per pass.

    Returns:
        [N, C] of the base model and of the adapted model, float64.

    Raises:
        InputError: an answer without a token, or a window without room for the question itself.
    """
    import numpy as np
    import torch

    from seer.data import Text, Tokens, pad_token_id, tokenize_requests
    from seer.layers import without_dropout
    from seer.sampling import pad_rows

    endings = [run.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"] for answer in answers]
    for answer, ids in zip(answers, endings, strict=True):
        if not ids:
            raise InputError(f"concept {answer!r}: expected a name that the tokenizer knows, got no token at all")
    longest = max(len(ids) for ids in endings)
    (bare,) = tokenize_requests(run.tokenizer, [Text(_question(answers, ""))], run.window)
    if len(bare) + longest >= run.window:
        raise InputError(
            f"--methods: expected a window with room for the question of prompt ({len(bare)} tokens), the longest "
            f"answer ({longest}) and a text, got one of {run.window}"
        )
    requests = tokenize_requests(run.tokenizer, questions, run.window - longest)
    rows = [Tokens([*request, *ending], len(request)) for request in requests for ending in endings]
    device, padding = next(run.stack.root.parameters()).device, pad_token_id(run.tokenizer)
    found = []
    for start in progress(range(0, len(rows), batch_size), "asking"):
        chosen = rows[start : start + batch_size]
        inputs = {name: values.to(device) for name, values in pad_rows(chosen, padding).items()}
        del inputs["request_lengths"]
        with torch.no_grad(), without_dropout(run.model):
            adapted = run.stack.root(**inputs).logits
            with run.base_layers() as base:
                reference = base.root(**inputs).logits
        for index, row in enumerate(chosen):
            labels = inputs["input_ids"][index, row.request_length : len(row.ids)].unsqueeze(1)  # [T, 1]
            places = slice(row.request_length - 1, len(row.ids) - 1)  # what predicts them
            found.append(
                [
                    float(logits[index, places].float().log_softmax(-1).gather(1, labels).mean())
                    for logits in (reference, adapted)
                ]
            )
    before, after = np.array(found).reshape(len(questions), len(answers), 2).transpose(2, 0, 1)
    return before, after


def _labelled(
    run: Run, file: str, names: Sequence[str], training_texts: Sequence[Text]
) -> tuple[list[Text], np.ndarray]:
    """Texts of a file, and the (N,) concept of each, index into `names`."""
    import numpy as np

    from seer.data import ConceptDataset, warn_of_shared_texts

    test = ConceptDataset.load(file, names)
    warn_of_shared_texts(
        run.tokens(test.texts), run.tokens(training_texts), "texts to classify", "their figures are too good"
    )
    return test.texts, np.array([names.index(concept) for concept in test.concepts])


def run_classification(argv: Sequence[str]) -> None:
    """Run `seer evaluate --task classification` with the other arguments.

    Raises:
        InputError: bad arguments or data.
        SystemExit: after `--help`.
    """
    parser = Parser("seer evaluate --task classification", _DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument(
        "--harmless", nargs="+", metavar="NAME", help="concepts that count as harmless (default: a class per concept)"
    )
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, metavar="METHOD", help=f"some of {', '.join(METHODS)} (default: all)"
    )
    parser.add_argument(
        "--layer", type=int, metavar="L", help="of the hidden states (default: the last target layer of the run)"
    )
    parser.add_argument("--data", metavar="FILE", help="where the run's data is now (default: where it was)")
    parser.add_argument(
        "--test_data", metavar="FILE", help="other labelled texts to classify (default: the held-out samples)"
    )
    parser.add_argument("--resamples", type=int, default=200, metavar="R", help="bootstrap draws (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures (default: RUN/classification.json)")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, resamples=2, seed=0)

    from rich.console import Console

    from seer.run import Run

    run = Run.load(arguments.run)
    classification = classify_run(
        run,
        methods=arguments.methods,
        harmless=arguments.harmless,
        layer=arguments.layer,
        data=arguments.data,
        test_data=arguments.test_data,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    file = run.folder / "classification.json" if arguments.json is None else arguments.json
    save_json(asdict(classification), file)
    console = Console(highlight=False)
    console.print(_table(classification))
    console.print(f"Wrote {file}", soft_wrap=True)


def _table(classification: Classification) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = (
        f"{classification.samples} texts, {len(classification.classes)} classes; differences with 95 % intervals of "
        f"{classification.resamples} draws"
    )
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("method", "measure", "base", "SEER", "difference"):
        table.add_column(column, justify="left" if column in ("method", "measure") else "right")
    for method, measures in classification.methods.items():
        for name, change in measures.items():
            table.add_row(method, _NAMES[name], *change_cells(change), end_section=name == [*measures][-1])
    table.caption = f"{classification.texts}; prototypes and probe at layer {classification.layer}"
    return table
