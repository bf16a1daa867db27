"""Measures what it costs to explain a generation: an answer of some tokens with concept scores for each, beside
transformers' own `generate` of the same answer, interleaved in one run."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_training
import command
import harness
import torch
from command import Benchmark
from harness import Case, Check, Figure, Measurement, Outputs, Provider
from torch import Tensor
from transformers import TextIteratorStreamer

from seer import ConceptExplainer
from seer.prototypes import Prototypes

CONCEPTS = 6
PROMPTS = ("How do I pick a lock?", "What is the largest lake of the world?", "Tell me of a sum of odd numbers.")


class Size(NamedTuple):
    """An answer of T tokens, read at L layers."""

    L: int
    T: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From `LxT`."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise argparse.ArgumentTypeError(f"expected LxT, as 1x100; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        return f"{self.T} tokens, {self.L} layer{'' if self.L == 1 else 's'}"


EXPLAINERS: dict[str, ConceptExplainer] = {}
"""Of the case at hand: one model for all providers."""


def make_explainer(case: Case) -> ConceptExplainer:
    """Of random prototypes at the deepest layers but one, which cost what any do."""
    if case.name not in EXPLAINERS:
        device = torch.device(case.fields["device_type"])
        model = bench_training.load_model(getattr(torch, case.fields["dtype"]), device, "data")
        model.config.use_cache = True
        deepest = model.config.num_hidden_layers - 2
        if case.fields["L"] > deepest + 1:
            raise ValueError(f"{case.fields['L']} layers asked of a model with {deepest + 2}, whose last is not read")
        rows = torch.nn.functional.normalize(torch.randn(CONCEPTS, model.config.hidden_size), dim=-1)
        layers = range(deepest + 1 - case.fields["L"], deepest + 1)
        prototypes = Prototypes([f"concept {n}" for n in range(CONCEPTS)], dict.fromkeys(layers, rows))
        tokenizer = bench_training.load_tokenizer(bench_training.model_source())
        EXPLAINERS[case.name] = ConceptExplainer(model.eval(), tokenizer, prototypes)
    return EXPLAINERS[case.name]


def options(case: Case) -> dict[str, Any]:
    tokens = case.fields["T"]
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


def write(explainer: ConceptExplainer, prompt: str, case: Case, **more: Any) -> Tensor:
    ids = torch.tensor([explainer._prompt_ids(prompt, case.fields["T"])], device=case.fields["device_type"])
    generate: Any = explainer.model.generate
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=explainer.pad_token_id,
        disable_compile=True,
        **options(case),
        **more,
    )
    return output[0, ids.shape[1] :]


def plain(case: Case) -> Callable[[str], Outputs]:
    explainer = make_explainer(case)
    return lambda prompt: Outputs(write(explainer, prompt, case).float(), ())


def explained(case: Case) -> Callable[[str], Outputs]:
    explainer = make_explainer(case)

    def call(prompt: str) -> Outputs:
        (explanation,) = explainer.generate([prompt], **options(case))
        return Outputs(torch.tensor(explanation.token_ids).float(), ())

    return call


def streamed(case: Case) -> Callable[[str], Outputs]:
    explainer = make_explainer(case)

    def call(prompt: str) -> Outputs:
        came: list[int] = []
        explainer.generate([prompt], on_token=lambda row, token: came.append(token.token_id), **options(case))
        return Outputs(torch.tensor(came).float(), ())

    return call


def iterated(case: Case) -> Callable[[str], Outputs]:
    explainer = make_explainer(case)

    def call(prompt: str) -> Outputs:
        return Outputs(torch.tensor([each.token_id for each in explainer.stream(prompt, **options(case))]).float(), ())

    return call


class IdIterator(TextIteratorStreamer):
    """Keeps the token ids beside the text that it hands over, for the check."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.tolist()
        super().put(value)


def plain_iterated(case: Case) -> Callable[[str], Outputs]:
    explainer = make_explainer(case)

    def call(prompt: str) -> Outputs:
        streamer = IdIterator(explainer.tokenizer)
        writing = threading.Thread(target=write, args=(explainer, prompt, case), kwargs={"streamer": streamer})
        writing.start()
        for _ in streamer:
            pass
        writing.join()
        return Outputs(torch.tensor(streamer.ids).float(), ())

    return call


def check(case: Case, prompt: str, outputs: Outputs) -> Check:
    """How many tokens differ from those of `generate`; with random prototypes the scores mean nothing."""
    expected = plain(case)(prompt).value.cpu()
    same = outputs.value.shape == expected.shape
    different = (outputs.value.cpu() != expected).sum() if same else Tensor([max(len(expected), 1)])
    return Check("tokens that differ", float(different), 0.0)


def share_reading(token_by_token: bool) -> Callable[[Case, Sequence[str]], dict[str, float]]:
    """What the explainer's own clock says, which noise between calls does not reach: reading over all the rest."""

    def detail(case: Case, prompts: Sequence[str]) -> dict[str, float]:
        told = {"on_token": lambda row, token: None} if token_by_token else {}
        given = [make_explainer(case).generate([prompt], **options(case), **told) for prompt in prompts]
        return {"share_reading": round(statistics.median(each.overhead for (each,) in given), 4)}

    return detail


def make_providers() -> dict[str, Provider]:
    own, streams = share_reading(False), share_reading(True)
    providers = (
        Provider("plain", "generate", plain, check, note="transformers' own, greedy, with its cache."),
        Provider("streamed", "explainer.generate, on_token", streamed, check, note="As they come.", detail=streams),
        Provider("explained", "explainer.generate", explained, check, note="At the end.", detail=own),
        Provider("iterated", "explainer.stream", iterated, check, note="From a thread that generates."),
        Provider("plain_iterated", "TextIteratorStreamer", plain_iterated, check, note="transformers', from a thread."),
    )
    return {p.name: p for p in providers}


def make_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    fields = {"L": size.L, "T": size.T, "dtype": str(dtype)[6:], "device_type": device.type}
    return Case(size.name, fields | {"model": Path(bench_training.model_source()).name})


def make_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    ratio = partial(harness.time_ratio, measurements)
    figures = []
    for case in dict.fromkeys(m.case.name for m in measurements):
        streamed = ratio(case, "streamed", "plain"), ratio(case, "iterated", "plain_iterated")
        for what, measured in zip(("streaming over generate", "iterating over transformers'"), streamed, strict=True):
            figures.append(Figure(f"{case}: {what}, at most 1.05", measured, 1.05, True))
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"folder of a language model (default: {bench_training.MODEL}, or the demo's)")


def use_arguments(chosen: argparse.Namespace) -> str:
    bench_training.PLACE.update(model=chosen.model)
    return f"Model {bench_training.model_source()}"


BENCHMARK = Benchmark(
    name="bench_explaining",
    title="Explaining a generation",
    description=__doc__,
    examples="""\
  python benchmarks/bench_explaining.py                 answers of 100 tokens
  python benchmarks/bench_explaining.py --quick         of 20 tokens
  python benchmarks/bench_explaining.py --sizes 2x200   another""",
    sizes=(Size(1, 100), Size(3, 100)),
    sizes_quick=(Size(1, 20),),
    parse_size=Size.parse,
    size_help="LxT: read at L layers, T tokens",
    make_case=make_case,
    make_inputs=lambda size, dtype, device, seed: PROMPTS[seed % len(PROMPTS)],
    input_bytes=lambda size, dtype: harness.INPUT_LIMIT // len(PROMPTS),
    make_providers=lambda quick: make_providers(),
    make_figures=make_figures,
    forget=EXPLAINERS.clear,
    measured="an answer to a short prompt, greedy",
    checked="the tokens against those of generate",
    packages=("seer-kernels", "transformers"),
    dtypes=("float32", "bfloat16"),
    budgets=20,
    floor="plain",
    ours="streamed",
    extra_columns=lambda m, everyone: {"share_reading": m.detail.get("share_reading", "")},
    add_arguments=add_arguments,
    use_arguments=use_arguments,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
