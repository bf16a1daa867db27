"""Optimisation steps of SeerTrainer beside the paper's own step, on the same pairs of texts."""

from __future__ import annotations

import argparse
import itertools
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import command
import harness
import torch
import torch.nn.functional as F
from command import DTYPES, Benchmark
from harness import Case, Check, Figure, Measurement, Outputs, Provider
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from seer import ConceptDataset, SeerConfig, SeerTrainer
from seer.data import Text
from seer.layers import find_layers, lm_head, without_dropout
from seer.sampling import PairSampler

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, DATA = SHARED / "models" / "tiny-llama", SHARED / "data" / "safety_concepts.csv"
DEMO_DATA = Path(__file__).resolve().parents[1] / "seer" / "demo" / "concepts.csv"

HALF = 512
"""Tokens to which the paper's step pads requests and responses each."""
VOCABULARY = 1 << 17
TEMPERATURE = 0.1
WEIGHTS = {"disentangle": 10.0, "retain": 1.0, "kl": 1.0}
LEARNING_RATE = 1e-4
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of the disentangling loss: passes over other paddings round differently, and a logit has 1 / TEMPERATURE of it."""
INSTRUMENTED_STEPS = 2
FASTER = {(1, "data"): 12.0, (3, "data"): 20.0, (1, "full"): 1.4, (3, "full"): 2.5}
"""By target layers and texts: how many times our steps, without --packing, are to be faster than the paper's."""
BATCHES = 4
"""Of pairs, through which the calls rotate."""
PLACE: dict[str, str | None] = {"model": None, "data": None}
"""What --model and --data name; None for what lies in ../shared, or else for what the demo makes."""


@dataclass(frozen=True)
class Size:
    """A step of B pairs at L target layers, on the texts as they are or on texts that fill the window, or on the texts
    as they are with a model of many tokens."""

    L: int
    B: int
    texts: str = "data"

    @classmethod
    def parse(cls, text: str) -> Size:
        """From `LxB`, `LxB:full` or `LxB:vocabulary`."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?::(full|vocabulary))?", text)
        if not match or int(match[2]) < 2:
            raise argparse.ArgumentTypeError(
                f"expected LxB, LxB:full or LxB:vocabulary with two or more pairs, as 1x8; got {text!r}"
            )
        return cls(int(match[1]), int(match[2]), match[3] or "data")

    @property
    def name(self) -> str:
        layers = "1 target layer" if self.L == 1 else f"{self.L} target layers"
        return f"{layers}, {self.B} pairs{SETTINGS[self.texts]}"


SETTINGS = {"data": "", "full": ", texts that fill the window", "vocabulary": f", a vocabulary of {VOCABULARY}"}
SIZES = (Size(1, 8), Size(3, 8), Size(1, 8, "full"), Size(3, 8, "full"), Size(1, 8, "vocabulary"))
SIZES_QUICK = (Size(1, 2), Size(3, 2))


def model_source() -> str:
    """Folder of the model, or "demo"."""
    return PLACE["model"] or (str(MODEL) if MODEL.is_dir() else "demo")


def data_source() -> str:
    return PLACE["data"] or str(DATA if DATA.is_file() else DEMO_DATA)


@lru_cache(maxsize=1)
def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    if source != "demo":
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return tokenizer
    from seer.demo.language_model import build_tokenizer

    texts = ConceptDataset.load(str(DEMO_DATA)).texts
    return build_tokenizer([part for text in texts for part in (text.prompt, text.response) if part])


def load_model(dtype: torch.dtype, device: torch.device, texts: str) -> PreTrainedModel:
    """Fresh weights every time; the demo's model is not trained, which changes no step's cost."""
    source = model_source()
    if source == "demo":
        from seer.demo.language_model import build_model

        model: PreTrainedModel = build_model(load_tokenizer(source), 0).to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    model.config.max_position_embeddings = 2 * HALF  # rotary, so any length will do: both sides get the same texts
    model.config.use_cache = False
    if texts == "vocabulary":
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model.to(device)


@lru_cache(maxsize=2)
def load_data(source: str, texts: str) -> ConceptDataset:
    dataset = ConceptDataset.load(source)
    if texts != "full":
        return dataset
    tokenizer = load_tokenizer(model_source())

    def fill(parts: Iterator[str]) -> str:
        """As many texts as give HALF tokens, less what the chat template puts around them."""
        ids: list[int] = []
        while len(ids) < HALF - 8:
            ids += tokenizer(next(parts), add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids[: HALF - 8]))

    prompts, responses = {}, {}
    for name in dataset.names:
        of_concept = [t for t, concept in zip(dataset.texts, dataset.concepts, strict=True) if concept == name]
        prompts[name] = itertools.cycle(t.prompt for t in of_concept)
        responses[name] = itertools.cycle(t.response or t.prompt for t in of_concept)
    count = 8 * len(dataset.names)
    concepts = [dataset.names[i % len(dataset.names)] for i in range(count)]
    filled = [Text(fill(prompts[c]), fill(responses[c])) for c in concepts]
    return ConceptDataset(filled, concepts, dataset.names)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Indices of the two texts of every pair of a step."""

    indices: tuple[tuple[int, int], ...]


@contextmanager
def base_model_of(model: PeftModel) -> Iterator[None]:
    """The model as it was before training, without dropout."""
    with without_dropout(model), model.disable_adapter():
        yield


def make_pairs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Pairs:
    dataset = load_data(data_source(), size.texts)
    order = itertools.cycle(PairSampler(dataset.memberships, seed))
    return Pairs(tuple((first, second) for first, second in itertools.islice(order, size.B)))


def make_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    fields = {"L": size.L, "B": size.B, "texts": size.texts, "dtype": str(dtype)[6:], "device_type": device.type}
    names = {"model": Path(model_source()).name, "data": Path(data_source()).name}
    return Case(size.name, fields | names)


def targets(case: Case, model: nn.Module) -> list[int]:
    """The deepest target is the last layer but one; further ones lie below it."""
    deepest = len(find_layers(model).layers) - 2
    if case.fields["L"] > deepest + 1:
        raise ValueError(f"{case.fields['L']} target layers asked of a model with {deepest + 2} layers")
    return [deepest - i for i in reversed(range(case.fields["L"]))]


class Step:
    """One way to make an optimisation step, with its model and optimiser."""

    model: nn.Module

    def loss(self, pairs: Pairs) -> Tensor:
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        raise NotImplementedError

    def __call__(self, pairs: Pairs) -> Outputs:
        loss = self.loss(pairs)
        self.backward(loss)
        self.update()
        return Outputs(loss.detach(), ())


class SeerStep(Step):
    """What `SeerTrainer.train` does for a batch, the making of the batch included."""

    def __init__(self, case: Case, folder: str, packing: bool = False) -> None:
        device = torch.device(case.fields["device_type"])
        model = load_model(DTYPES[case.fields["dtype"]], device, case.fields["texts"])
        self.layers = targets(case, model)
        config = SeerConfig(
            output_dir=folder,
            target_layers=self.layers,
            same_label="negative",
            temperature=TEMPERATURE,
            disentangle_weight=WEIGHTS["disentangle"],
            retain_weight=WEIGHTS["retain"],
            kl_weight=WEIGHTS["kl"],
            max_length=2 * HALF,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=case.fields["B"],
            max_steps=1_000_000,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            packing=packing,
        )
        dataset = load_data(data_source(), case.fields["texts"])
        self.trainer = SeerTrainer(model, config, dataset, load_tokenizer(model_source()))
        self.trainer.create_optimizer_and_scheduler(config.max_steps)
        wrapped = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.model, self.optimizer = wrapped
        self.model.train()

    def batch(self, pairs: Pairs) -> dict[str, Tensor]:
        items = [self.trainer.train_dataset[pair] for pair in pairs.indices]
        prepared: dict[str, Tensor] = self.trainer._prepare_inputs(self.trainer.data_collator(items))
        return prepared

    def loss(self, pairs: Pairs) -> Tensor:
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, self.batch(pairs))
        assert isinstance(loss, Tensor)
        return loss

    def backward(self, loss: Tensor) -> None:
        self.trainer.accelerator.backward(loss)

    def update(self) -> None:
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self, pairs: Pairs) -> Check:
        with torch.no_grad():
            _, terms = self.trainer.compute_loss(self.model, self.batch(pairs), return_outputs=True)
        rows = self.trainer.train_dataset.rows
        states = [self._alone(rows[i].ids) for i in [pair[view] for view in (0, 1) for pair in pairs.indices]]
        return _check(terms["L_d"], torch.stack(states, 1))  # [L, 2 B, D]

    def _alone(self, row: list[int]) -> Tensor:
        """The last token's states of a text by itself: [L, D]."""
        with torch.no_grad(), base_model_of(self.trainer.accelerator.unwrap_model(self.model)):
            ids = torch.tensor([row], device=self.trainer.args.device)
            hidden = self.model(input_ids=ids, output_hidden_states=True).hidden_states
        return torch.stack([hidden[layer + 1][0, -1] for layer in self.layers])


class OwnPasses(SeerStep):
    """What the model does without SEER: it predicts the next tokens of both views, by the loss of transformers."""

    def loss(self, pairs: Pairs) -> Tensor:
        batch = self.batch(pairs)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        return loss


class PaperStep(Step):
    """The paper's step, from its description.

    Everything is padded to 1024 tokens; two passes per target layer, one more of the first view for the retaining terms
    and one of the base model; cosines by broadcasting.
    """

    def __init__(self, case: Case, folder: str) -> None:
        device = torch.device(case.fields["device_type"])
        model = load_model(DTYPES[case.fields["dtype"]], device, case.fields["texts"])
        self.layers = targets(case, model)
        self.stack = find_layers(model)
        adapter = LoraConfig(
            r=16,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=self.stack.linear_pattern(range(max(self.layers) + 1)),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, adapter)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        self.tokenizer, self.device = load_tokenizer(model_source()), device
        self.dataset = load_data(data_source(), case.fields["texts"])

    def view(self, pairs: Pairs, which: int) -> dict[str, Tensor]:
        """Requests padded on the left to 512 tokens, responses on the right: [B, 1024]."""
        texts = [self.dataset.texts[pair[which]] for pair in pairs.indices]
        requests = [self._ids(text.prompt).flip(0) for text in texts]
        responses = [self._ids(text.response or "") for text in texts]
        pad = self.tokenizer.pad_token_id or 0
        ids, mask = [], []
        for halves, left in ((requests, True), (responses, False)):
            full = torch.zeros(HALF, dtype=torch.long)  # sets the length
            padded = pad_sequence([*halves, full], batch_first=True, padding_value=pad)[:-1]
            there = pad_sequence([torch.ones_like(row) for row in [*halves, full]], batch_first=True)[:-1]
            ids.append(padded.flip(1) if left else padded)
            mask.append(there.flip(1) if left else there)
        return {
            "input_ids": torch.cat(ids, 1).to(self.device),
            "attention_mask": torch.cat(mask, 1).to(self.device),
        }

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"][:HALF], dtype=torch.long)

    def disentangle(self, views: Sequence[Mapping[str, Tensor]]) -> Tensor:
        losses = []
        for layer in self.layers:
            first, second = (
                self.model(**view, output_hidden_states=True).hidden_states[layer + 1][:, -1].float() for view in views
            )  # [B, D] each; the last position is padding where the response is short
            logits = F.cosine_similarity(first.unsqueeze(1), second.unsqueeze(0), dim=-1) / TEMPERATURE
            losses.append(F.cross_entropy(logits, torch.arange(len(logits), device=self.device)))
        return torch.stack(losses).mean()

    def loss(self, pairs: Pairs) -> Tensor:
        views = [self.view(pairs, which) for which in (0, 1)]
        loss = WEIGHTS["disentangle"] * self.disentangle(views)
        adapted = self.model(**views[0], output_hidden_states=True)
        with torch.no_grad(), base_model_of(self.model):
            base = self.model(**views[0], output_hidden_states=True)
        moved = torch.stack(adapted.hidden_states) - torch.stack(base.hidden_states)  # [layers + 1, B, T, D]
        share = len(self.layers) / (max(self.layers) + 1) / 100
        loss = loss + WEIGHTS["retain"] * share * moved.float().transpose(0, 1).flatten(1).norm(dim=1).mean()
        label = views[0]["input_ids"][:, 1:].unsqueeze(-1)
        likely, log_likely = (
            f(out.logits[:, :-1].float(), -1).gather(-1, label)
            for f, out in ((torch.softmax, base), (torch.log_softmax, adapted))
        )
        return loss - WEIGHTS["kl"] * (likely * log_likely).sum(1).mean()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self, pairs: Pairs) -> Check:
        views = [self.view(pairs, which) for which in (0, 1)]
        with torch.no_grad():
            actual = self.disentangle(views)
            both = {name: torch.cat([view[name] for view in views]) for name in views[0]}
            with base_model_of(self.model):
                hidden = self.model(**both, output_hidden_states=True).hidden_states
        return _check(actual, torch.stack([hidden[layer + 1][:, -1] for layer in self.layers]))


def _check(actual: Tensor, states: Tensor) -> Check:
    """A disentangling loss before training against that of states [L, 2 B, D] from the base model's plain passes."""
    first, second = F.normalize(states.double(), dim=-1).chunk(2, 1)
    logits = first @ second.mT / TEMPERATURE
    expected = (logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)).mean()
    return harness.compare({"L_d": actual.double()}, {"L_d": expected}, {"L_d": TOLERANCES[states.dtype]})


class Marks:
    """Seconds that the model itself takes, forward and backward, in the steps made under `watch`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = 0.0
        self._inside = 0
        self._entered = 0.0
        self._reached: float | None = None
        self._backward = False

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _enter(self, *_: Any) -> None:
        if self._inside == 0:
            self._entered = self._now()
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1
        if self._inside == 0 and not self._backward:
            self.model += self._now() - self._entered

    def _watch_gradient(self, _: nn.Module, __: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        if tensor.requires_grad:
            tensor.register_hook(self._reach)

    def _reach(self, _: Tensor) -> None:
        """The gradient reaches the end of the model: what came before belonged to the losses."""
        if self._reached is None:
            self._reached = self._now()

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        stack = find_layers(model)
        head = lm_head(stack)
        heads = [] if head is None else [head]
        hooks = []
        for part in [stack.root, *heads]:  # the loss may call the head by itself
            hooks += [part.register_forward_pre_hook(self._enter), part.register_forward_hook(self._leave)]
        for part in heads:  # and go back through it while the logits are there
            hooks += [part.register_full_backward_pre_hook(self._enter), part.register_full_backward_hook(self._leave)]
        hooks += [end.register_forward_hook(self._watch_gradient) for end in [stack.layers[-1], *heads]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, step: Step, pairs: Pairs) -> float:
        """Seconds of one step."""
        begin = self._now()
        loss = step.loss(pairs)
        self._reached, self._backward = None, True
        step.backward(loss)
        self._backward = False
        if self._reached is not None:
            self.model += self._now() - self._reached
        step.update()
        return self._now() - begin


STEPS: dict[str, tuple[Any, Check]] = {}
"""The step of every provider on the case at hand, and its check before training."""


def make_provider(
    name: str, label: str, kind: Callable[[Case, str], Any], note: str, left_out: Callable[[Case], str | None]
) -> Provider:
    def make(case: Case) -> Callable[[Pairs], Outputs]:
        torch.manual_seed(0)
        logging.getLogger("seer").setLevel(logging.ERROR)  # that retaining texts are those of the pairs is on purpose
        disable_progress_bar()
        step = kind(case, tempfile.gettempdir())  # where nothing is written
        size = Size(case.fields["L"], case.fields["B"], case.fields["texts"])
        STEPS[name] = step, step.check(make_pairs(size, torch.float32, torch.device("cpu"), 0))
        return step  # type: ignore[no-any-return]

    def check(case: Case, pairs: Pairs, outputs: Outputs) -> Check:
        if not bool(torch.isfinite(outputs.value)):
            return Check("loss of a step", float("nan"), 0.0)
        return STEPS[name][1]

    def detail(case: Case, pairs: Sequence[Pairs]) -> dict[str, float]:
        step, marks = STEPS[name][0], Marks(torch.device(case.fields["device_type"]))
        with marks.watch(step.model):
            seconds = sum(marks.step(step, pairs[i % len(pairs)]) for i in range(INSTRUMENTED_STEPS))
        return {"share_outside_model": round(1 - marks.model / seconds, 4)}

    return Provider(name, label, make, check, left_out, note=note, detail=detail)


def make_providers() -> dict[str, Provider]:
    providers = (
        make_provider(
            "seer",
            "SeerTrainer",
            SeerStep,
            "One pass of both views, padded to the longest text, and one of the base model over the first view.",
            lambda case: None,
        ),
        make_provider(
            "packed",
            "SeerTrainer, --packing",
            partial(SeerStep, packing=True),
            "The same with short texts side by side in one row.",
            lambda case: None,
        ),
        make_provider(
            "own",
            "next-token loss",
            OwnPasses,
            "The model's own forward and backward pass over both views with the loss of transformers, and no SEER.",
            lambda case: None if case.fields["texts"] == "vocabulary" else "measured beside a large vocabulary only",
        ),
        make_provider(
            "reference",
            "paper's step",
            PaperStep,
            f"As the paper's code is described: {2 * HALF} tokens a text, two passes per target layer, one more of the "
            "first view, one of the base model; cosines by broadcasting.",
            lambda case: "its logits would take gigabytes" if case.fields["texts"] == "vocabulary" else None,
        ),
    )
    return {p.name: p for p in providers}


def extra_columns(m: Measurement, everyone: Sequence[Measurement]) -> dict[str, Any]:
    speedup = harness.time_ratio(everyone, m.case.name, "reference", m.provider.name)
    return {
        "steps_per_second": float(f"{1 / m.median:.4g}") if m.seconds else "",
        "speedup_vs_reference": "" if speedup is None else float(f"{speedup:.4g}"),
        "share_outside_model": m.detail.get("share_outside_model", ""),
    }


def make_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    ratio, peak = partial(harness.time_ratio, measurements), partial(harness.peak_mebibytes, measurements)
    figures = []
    for case in dict.fromkeys(m.case.name for m in measurements):
        of_case = [m for m in measurements if m.case.name == case]
        ours, theirs, own = (peak(case, name) for name in ("seer", "reference", "own"))
        layers, texts = of_case[0].case.fields["L"], of_case[0].case.fields["texts"]
        if texts == "vocabulary":
            more = ours / own if ours and own else None
            figures.append(
                Figure(f"{case}: our peak memory over that of the model's own passes, at most 1.1", more, 1.1, True)
            )
            continue
        bound = FASTER.get((layers, texts), 1.0)
        faster = ratio(case, "reference", "seer")
        share = next((m.detail.get("share_outside_model") for m in of_case if m.provider.name == "seer"), None)
        figures += [
            Figure(f"{case}: steps per second over the paper's, at least {bound:g}", faster, bound, False),
            Figure(f"{case}: share of our step outside the model, at most 0.05", share, 0.05, True),
        ]
        if texts == "data":
            leaner = theirs / ours if theirs and ours else None
            figures.append(Figure(f"{case}: its peak memory over ours, at least 5", leaner, 5.0, False))
    return figures


def forget() -> None:
    STEPS.clear()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"folder of a Llama-like model (default: {MODEL}, or else the demo's)")
    parser.add_argument("--data", help=f"texts by concept (default: {DATA}, or else the demo's)")


def use_arguments(options: argparse.Namespace) -> str:
    PLACE.update(model=options.model, data=options.data)
    absent = "" if MODEL.is_dir() and DATA.is_file() else f" ({SHARED} is absent: the demo's serve)"
    given = all(PLACE.values())
    return f"Model {model_source()}, data {data_source()}{'' if given else absent}"


BENCHMARK = Benchmark(
    name="bench_training",
    title="An optimisation step of SEER",
    description=__doc__,
    examples="""\
  python benchmarks/bench_training.py                        8 pairs a step: ten minutes on two cores, and 17 GB
  python benchmarks/bench_training.py --quick                2 pairs a step
  python benchmarks/bench_training.py --sizes 1x4 2x4:full   other steps""",
    sizes=SIZES,
    sizes_quick=SIZES_QUICK,
    parse_size=Size.parse,
    size_help="LxB: L target layers, B pairs; LxB:full: of texts that fill the window",
    make_case=make_case,
    make_inputs=make_pairs,
    input_bytes=lambda size, dtype: harness.INPUT_LIMIT // BATCHES,
    make_providers=lambda quick: make_providers(),
    make_figures=make_figures,
    forget=forget,
    measured="forward, backward and update, LoRA of rank 16, the making of the batch included",
    checked="the disentangling loss before training against one from plain passes of the base model",
    packages=("seer-kernels", "transformers", "peft", "accelerate"),
    dtypes=("float32", "bfloat16"),
    floor="reference",
    ours="seer",
    extra_columns=extra_columns,
    add_arguments=add_arguments,
    use_arguments=use_arguments,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
