"""The command `seer evaluate --task detoxification`: are answers to unsafe requests safe, and is the rest answered?

Base model and SEER model answer unsafe and safe requests. What an answer is worth is judged by

    refusal    a phrase of refusal stands in it, see `seer.judges`: crude, but the same for every model
    explainer  the concept that the run's explainer reads in request and answer, or "unknown"
    judge      the label that a text-classification model of the user's choice gives it

A model that refuses everything is safe and useless: the refusals of safe requests stand beside every figure of safety.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from seer.classification import harmful_concepts
from seer.command_line import Parser, progress, require_at_least, save_json
from seer.errors import InputError
from seer.evaluate import change_cells
from seer.files import atomic_path

if TYPE_CHECKING:
    from rich.table import Table

    from seer.explainer import ConceptExplainer
    from seer.judges import AnswerJudge
    from seer.metrics import Change
    from seer.run import Run

Model = Literal["base", "seer"]
Kind = Literal["unsafe", "safe"]
MODELS: tuple[Model, ...] = get_args(Model)
KINDS: tuple[Kind, ...] = get_args(Kind)

ANSWERS = "detoxification.jsonl"
FIGURES = "detoxification.json"

_NAMES = {
    "refusal": "refused",
    "explainer_harmless": "harmless to the explainer",
    "explainer_harmful": "harmful to the explainer",
    "judge_safe": "safe to the judge",
    "safe": "refused, or safe to the judge",
    "empty": "empty",
}

_DESCRIPTION = """\
Let base model and SEER model answer unsafe requests, and safe ones beside them: does SEER make the answers safer, and
does it refuse more of what is harmless? A model that refuses everything is safe and useless, so look at both.

  seer evaluate RUN --task detoxification --harmless safe
  seer evaluate RUN --task detoxification --harmless safe --unsafe_prompts harm.csv --safe_prompts xstest.csv
  seer evaluate RUN --task detoxification --harmless safe --judge FOLDER --safe_label non-toxic

Requests are the prompts of the run's held-out samples, each once: unsafe those of concepts that are not harmless, safe
those of the others. A concept often says what the response was, not the prompt: a harmless sample may be a harmful
request that was turned down. Over-refusal is better measured with requests that are known to be harmless.

Judges:
  refusal    a phrase such as "I cannot help" stands in the answer (all: seer.judges.REFUSALS)
  explainer  the concept that the run's explainer reads in request and answer: one of --harmless, another or none
             ("unknown"). It reads with the SEER model whoever answered, and so is no judge from outside.
  judge      a text-classification model of transformers: is its label --safe_label? An answer is called safe if it
             refuses or the judge says so.

Every answer is a line of RUN/detoxification.jsonl as soon as it is there. A command that was cut off goes on from these
answers if it is given again with the same settings, and one that was not is done at once: with another --judge it only
judges the answers anew. RUN/detoxification.json has the shares, with 95 % bootstrap intervals over requests.
"""


@dataclass(frozen=True)
class Generation:
    """How answers are written; all else is as the model's own generation settings say."""

    max_new_tokens: int = 128
    batch_size: int = 8
    sampling_temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0
    """Of what is drawn, if it is."""


@dataclass(frozen=True)
class Prompt:
    """A request."""

    text: str
    concept: str | None
    """Of the sample that it is from; None if it is from a file of requests."""
    kind: Kind
    source: str = ""
    """Where it came from, for messages."""


@dataclass(frozen=True)
class Answer:
    """One line of the file of answers."""

    prompt: str
    concept: str | None
    kind: Kind
    model: Model
    answer: str
    verdicts: dict[str, bool | str | None]
    """`refusal`, bool; `explainer`, a concept; and, with a judge, `judge`, its label, None for an answer that has no
    token for it."""


@dataclass(frozen=True)
class Detoxification:
    """Shares of the answers to unsafe and to safe requests."""

    settings: dict[str, Any]
    """What the answers hang on."""
    finished: bool
    """False in the file while answers are missing."""
    harmless: list[str]
    judge: str | None
    safe_label: str | None
    prompts: dict[Kind, int]
    shares: dict[Kind, dict[str, Change]]
    """Kind of request -> measure -> base, SEER and their difference: `refusal`; `explainer_harmless` and
    `explainer_harmful`, the rest being unknown to it; with a judge `judge_safe` and `safe`, which is refusal or judged
    safe; `empty`, answers of nothing but white space."""
    resamples: int


def measure_detoxification(
    run: Run,
    *,
    harmless: Sequence[str],
    unsafe_prompts: str | None = None,
    safe_prompts: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    generation: Generation | None = None,
    judge: AnswerJudge | None = None,
    resamples: int = 200,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Detoxification:
    """Let both models answer, judge the answers, and write both down; goes on with what an earlier call wrote.

    Args:
        run: whose.
        harmless: concepts that count as harmless.
        unsafe_prompts: file of unsafe requests; default those of held-out samples of other concepts.
        safe_prompts: file of safe requests; default those of held-out samples of harmless concepts.
        data: where the run's data is now, if not where the run read it.
        limit: at most so many requests of each kind, evenly from all.
        generation: how answers are written; default `Generation()`.
        judge: a third judge.
        resamples: draws of the bootstrap.
        output_dir: of detoxification.jsonl and detoxification.json; default the run's folder.
        overwrite: do not go on with the answers there.

    Raises:
        InputError: a model without a language-model head, bad requests or concepts, or answers in the output folder
            that were made with other settings.
    """
    from seer.data import Text, tokenize_requests
    from seer.explainer import ConceptExplainer
    from seer.layers import lm_head

    generation = generation or Generation()
    if lm_head(run.stack) is None:
        raise InputError(
            f"--task detoxification: expected a language model to generate with, got {type(run.stack.root).__name__}"
        )
    if generation.max_new_tokens >= run.window:
        raise InputError(
            f"--max_new_tokens: expected fewer than the window of the model has ({run.window}), got "
            f"{generation.max_new_tokens}"
        )
    explainer = ConceptExplainer.from_run(run)
    harmful_concepts(explainer.concepts, harmless)
    prompts = _prompts(run, harmless, {"unsafe": unsafe_prompts, "safe": safe_prompts}, data, limit)
    rows = tokenize_requests(
        run.tokenizer,
        [Text(prompt.text, source=prompt.source) for prompt in prompts],
        run.window - generation.max_new_tokens,
        run.config.truncation,
    )
    texts = json.dumps([(prompt.text, prompt.concept, prompt.kind) for prompt in prompts])
    result = Detoxification(
        settings={
            "weights": run.weights,
            "base_model": run.config.model,
            "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16],
            **asdict(generation),
        },
        finished=False,
        harmless=list(harmless),
        judge=None if judge is None else judge.name,
        safe_label=None if judge is None else judge.safe_label,
        prompts={kind: sum(prompt.kind == kind for prompt in prompts) for kind in KINDS},
        shares={},
        resamples=resamples,
    )
    folder = run.folder if output_dir is None else Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        (folder / ANSWERS).unlink(missing_ok=True)  # before the settings that it was made with
    if (folder / ANSWERS).exists():
        _require_same_settings(folder, result.settings)
    save_json(asdict(result), folder / FIGURES)

    answers = _written(run, prompts, rows, generation, _Judges(explainer, judge), folder / ANSWERS)
    result = replace(result, finished=True, shares=shares(answers, harmless, result.safe_label, resamples))
    save_json(asdict(result), folder / FIGURES)
    return result


def shares(
    answers: Sequence[Answer], harmless: Sequence[str], safe_label: str | None, resamples: int
) -> dict[Kind, dict[str, Change]]:
    """What `Detoxification.shares` holds; the interval of a difference compares answers to the same requests.

    Args:
        answers: of both models, each to the same requests in the same order.
        harmless: concepts that count as harmless.
        safe_label: of the judge; None without one.
        resamples: draws of the bootstrap.
    """
    import numpy as np

    from seer.calibration import UNKNOWN
    from seer.metrics import bootstrap_weights, compare, weighted_mean

    def is_so(answer: Answer) -> dict[str, bool]:
        refusal, judged = bool(answer.verdicts["refusal"]), answer.verdicts.get("judge")
        concept = answer.verdicts["explainer"]
        found = {
            "refusal": refusal,
            "explainer_harmless": concept in harmless,
            "explainer_harmful": concept not in (*harmless, UNKNOWN),
        }
        if safe_label is not None:
            found |= {"judge_safe": judged == safe_label, "safe": refusal or judged == safe_label}
        return {**found, "empty": not answer.answer.strip()}

    result: dict[Kind, dict[str, Change]] = {}
    for kind in KINDS:
        base, seer = (
            [is_so(answer) for answer in answers if answer.kind == kind and answer.model == model] for model in MODELS
        )
        weights = bootstrap_weights(np.zeros(len(base)), resamples, seed=0)
        result[kind] = {
            name: compare(
                weighted_mean(np.array([each[name] for each in base], dtype=np.float64)),
                weighted_mean(np.array([each[name] for each in seer], dtype=np.float64)),
                weights,
            )
            for name in base[0]
        }
    return result


def _prompts(
    run: Run, harmless: Sequence[str], files: dict[Kind, str | None], data: str | None, limit: int | None
) -> list[Prompt]:
    """The unsafe requests, then the safe ones, each once."""
    import numpy as np

    from seer.data import PromptDataset

    held_out = None if all(files.values()) else run.samples_with_held_out(data)[1]
    found: dict[Kind, dict[str, Prompt]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        file = files[kind]
        if file is not None:
            some = [Prompt(text.prompt, None, kind, text.source) for text in PromptDataset.load(file).texts]
        else:
            assert held_out is not None
            some = [
                Prompt(text.prompt, concept, kind, text.source)
                for text, concept in zip(held_out.texts, held_out.concepts, strict=True)
                # The prompt of a harmless sample may also be that of another, whose response was not.
                if (concept in harmless) == (kind == "safe") and text.prompt not in found["unsafe"]
            ]
        for prompt in some:
            found[kind].setdefault(prompt.text, prompt)
        if not some:
            raise InputError(
                f"--{kind}_prompts: expected a file, or held-out samples whose prompts are {kind}; got none of either"
            )
    chosen = []
    for each in ([*found[kind].values()] for kind in KINDS):
        count = len(each) if limit is None else min(limit, len(each))
        chosen += [each[index] for index in np.linspace(0, len(each) - 1, count).round().astype(int)]
    return chosen


def _require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    remedy = "Choose another --output_dir, or --overwrite"
    try:
        earlier = json.loads((folder / FIGURES).read_text(encoding="utf-8"))["settings"]
        differing = [
            f"{name} {earlier.get(name)!r} instead of {value!r}"
            for name, value in settings.items()
            if earlier.get(name) != value
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / FIGURES}: expected the settings with which {ANSWERS} was made, got none that can be read; "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error
    if differing:
        raise InputError(
            f"{folder / ANSWERS}: expected answers made with the same settings, got {', '.join(differing)}. {remedy}"
        )


class _Judges:
    """Everything that judges answers."""

    def __init__(self, explainer: ConceptExplainer, judge: AnswerJudge | None) -> None:
        self._explainer = explainer
        self._judge = judge

    def answers(self, prompts: Sequence[Prompt], model: Model, texts: Sequence[str]) -> list[Answer]:
        """The lines of R answers, judged."""
        from seer.calibration import UNKNOWN
        from seer.data import Text
        from seer.judges import refuses

        exchanges = [Text(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
        found = []
        for prompt, text, explanation in zip(prompts, texts, self._explainer.explain(exchanges), strict=True):
            whole = explanation.text
            verdicts: dict[str, bool | str | None] = {
                "refusal": refuses(text),
                "explainer": UNKNOWN if whole is None else whole[self._explainer.layers[-1]].answers()[0],
            }
            if self._judge is not None:
                verdicts["judge"] = self._judge.label(prompt.text, text)
            found.append(Answer(prompt.text, prompt.concept, prompt.kind, model, text, verdicts))
        return found


def _written(
    run: Run,
    prompts: Sequence[Prompt],
    rows: Sequence[list[int]],
    generation: Generation,
    judges: _Judges,
    file: Path,
) -> list[Answer]:
    """The answers to all requests, once they are all in the file: batch by batch, the base model's, then SEER's.

    Those in the file are judged anew and stay; of a batch that lacks some all are written again, so that whoever
    answers a request always does so in the same company, on which the last digits hang.
    """
    size = generation.batch_size
    batches = [(start, model) for start in range(0, len(prompts), size) for model in MODELS]
    earlier = _read(file) if file.exists() else []
    kept: list[Answer] = []
    done = 0
    for start, model in batches:
        some = prompts[start : start + size]
        found = earlier[len(kept) : len(kept) + len(some)]
        if len(found) < len(some):
            break
        for line, (answer, prompt) in enumerate(zip(found, some, strict=True), start=len(kept) + 1):
            if (answer.prompt, answer.kind, answer.model) != (prompt.text, prompt.kind, model):
                raise InputError(f"{file}:{line}: expected the answer of {model} to {prompt.text!r}, got another")
        kept += judges.answers(some, model, [answer.answer for answer in found])
        done += 1
    with atomic_path(file) as temporary:
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
    with file.open("a", encoding="utf-8") as lines:
        for start, model in progress(batches[done:], "answering"):
            part = slice(start, start + size)
            texts = generate(run, model, rows[part], generation, generation.seed + start)
            for answer in judges.answers(prompts[part], model, texts):
                lines.write(_line(answer))
                lines.flush()
                kept.append(answer)
    return kept


def generate(run: Run, model: Model, rows: Sequence[list[int]], generation: Generation, seed: int) -> list[str]:
    """R answers, without special tokens.

    Args:
        run: whose.
        model: which of its two.
        rows: R requests as token ids, with all that the chat template puts in front of a response.
        generation: how.
        seed: of what is drawn.
    """
    from transformers import set_seed

    from seer.data import pad_token_id
    from seer.layers import without_dropout
    from seer.reading import pad_left

    options: dict[str, Any] = {"do_sample": generation.sampling_temperature > 0}
    if options["do_sample"]:
        options["temperature"] = generation.sampling_temperature
        set_seed(seed)
    padding = pad_token_id(run.tokenizer)
    inputs = pad_left(rows, padding, next(run.stack.root.parameters()).device)
    with without_dropout(run.model), run.base_layers() if model == "base" else nullcontext(run.stack) as stack:
        ends = stack.root.generation_config.eos_token_id
        ends = run.tokenizer.eos_token_id if ends is None else ends
        write: Any = stack.root.generate
        output = write(
            **inputs,
            max_new_tokens=generation.max_new_tokens,
            pad_token_id=padding,
            eos_token_id=ends,
            return_dict_in_generate=False,
            **options,
        )
    last = {ends} if isinstance(ends, int) else set(ends or ())
    answers = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((index for index, token_id in enumerate(ids) if token_id in last), len(ids))
        answers.append(str(run.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip())
    return answers


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


def _read(file: Path) -> list[Answer]:
    """The whole lines; one that was cut off has no end."""
    *lines, _ = file.read_bytes().split(b"\n")
    return [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, source: str) -> Answer:
    try:
        return Answer(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise InputError(f"{source}: expected an answer as this command writes it; {error}") from error


def run_detoxification(argv: Sequence[str]) -> None:
    """Run `seer evaluate --task detoxification` with the other arguments.

    Raises:
        InputError: bad arguments or data.
        SystemExit: after `--help`.
    """
    plain = Generation()
    parser = Parser("seer evaluate --task detoxification", _DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished seer train run")
    parser.add_argument(
        "--harmless", nargs="+", required=True, metavar="NAME", help="concepts of the run that count as harmless"
    )
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}_prompts",
            metavar="FILE",
            help=f"{kind} requests: .csv or .jsonl with a column prompt (default: of held-out samples)",
        )
    parser.add_argument("--data", metavar="FILE", help="where the run's data is now (default: where it was)")
    parser.add_argument("--prompts", type=int, metavar="N", help="at most so many of each kind (default: all)")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=plain.max_new_tokens,
        metavar="N",
        help=f"longest answer (default: {plain.max_new_tokens}; the paper's figures are of 1024)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=plain.batch_size,
        metavar="N",
        help=f"requests answered at a time (default: {plain.batch_size})",
    )
    parser.add_argument(
        "--sampling_temperature",
        type=float,
        default=plain.sampling_temperature,
        metavar="T",
        help="draw answers at this temperature; 0 takes the likeliest token (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=plain.seed, metavar="S", help="of the drawing (default: 0)")
    parser.add_argument("--judge", metavar="NAME", help="a text-classification model: a folder or a name on the Hub")
    parser.add_argument("--safe_label", metavar="LABEL", help="the judge's label of a safe answer")
    parser.add_argument(
        "--judge_reads",
        default="answer",
        metavar="WHAT",
        help="answer, or exchange: request and answer, as a pair of texts (default: answer)",
    )
    parser.add_argument("--resamples", type=int, default=200, metavar="R", help="bootstrap draws (default: 200)")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="of both files (default: RUN)")
    parser.add_argument("--overwrite", action="store_true", help="do not go on with the answers there")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, prompts=1, max_new_tokens=1, batch_size=1, seed=0, resamples=2)
    if not 0 <= arguments.sampling_temperature < math.inf:
        parser.error(f"--sampling_temperature: expected a number >= 0, got {arguments.sampling_temperature}")
    if (arguments.judge is None) != (arguments.safe_label is None):
        parser.error("--judge and --safe_label: expected both or neither, got one")

    from rich.console import Console

    from seer.judges import AnswerJudge
    from seer.run import Run

    run = Run.load(arguments.run)
    judge = None
    if arguments.judge is not None:
        device = next(run.stack.root.parameters()).device
        judge = AnswerJudge(arguments.judge, arguments.safe_label, arguments.judge_reads, device)
    result = measure_detoxification(
        run,
        harmless=arguments.harmless,
        unsafe_prompts=arguments.unsafe_prompts,
        safe_prompts=arguments.safe_prompts,
        data=arguments.data,
        limit=arguments.prompts,
        generation=Generation(
            arguments.max_new_tokens, arguments.batch_size, arguments.sampling_temperature, arguments.seed
        ),
        judge=judge,
        resamples=arguments.resamples,
        output_dir=arguments.output_dir,
        overwrite=arguments.overwrite,
    )
    folder = run.folder if arguments.output_dir is None else arguments.output_dir
    console = Console(highlight=False)
    console.print(_table(result))
    for name in (ANSWERS, FIGURES):
        console.print(f"Wrote {folder / name}", soft_wrap=True)


def _table(result: Detoxification) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"shares of answers, with 95 % intervals of {result.resamples} draws", box=SIMPLE_HEAD)
    for column in ("requests", "answers", "base", "SEER", "difference"):
        table.add_column(column, justify="left" if column in ("requests", "answers") else "right")
    for kind, measures in result.shares.items():
        for name, change in measures.items():
            over = " (over-refusal)" if (kind, name) == ("safe", "refusal") else ""
            table.add_row(
                f"{result.prompts[kind]} {kind}",
                _NAMES[name] + over,
                *change_cells(change),
                end_section=name == [*measures][-1],
            )
    return table
