"""Peak memory above inputs and gradients of every loss, by size, beside what else computes it. Nothing is timed."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_loss
import bench_self
import command
import harness
import plot
import torch
from command import DTYPES, Benchmark
from harness import Case, Check, Figure, Measurement, Outputs, Provider
from torch import Tensor

from seer_kernels import ConvergenceWarning, backends, sinkhorn

FEATURES = 256
TRANSPORT = "sinkhorn"
TRANSPORT_LIMIT = 4096
"""Most points of a transport problem, whose costs are stored by all."""
LINEAR_FROM = 4096
"""Rows from which memory is held to grow no faster than they do."""
LOSSES = (*bench_loss.LOSSES, *bench_self.LOSSES, TRANSPORT)
NAMES = ("native", "triton", "reference", "idiomatic", "pml", "open_clip")
STORED_LIMIT = bench_self.STORED_LIMIT
"""Largest N x N matrix in float32, in bytes, for which is run what stores several of them."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-6}
"""Of transport, between the backends."""


@dataclass(frozen=True)
class Size:
    """One family over N rows; for transport, one problem of N x N points."""

    loss: str
    N: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From `LOSS:N`."""
        match = re.fullmatch(rf"({'|'.join(LOSSES)}):([1-9]\d*)", text)
        if not match or int(match[2]) < 2 or int(match[2]) % 2:
            raise argparse.ArgumentTypeError(
                f"expected LOSS:N with an even N, such as info_nce:4096, of {', '.join(LOSSES)}; got {text!r}"
            )
        return cls(match[1], int(match[2]))

    @property
    def of(self) -> Any:
        """The same size as the benchmark knows it whose inputs and providers serve, and that benchmark."""
        if self.loss in bench_loss.LOSSES:
            return bench_loss.Size(1, self.N, FEATURES, self.loss), bench_loss
        return bench_self.Size(self.loss, self.N, FEATURES), bench_self


def ladder(sizes: Sequence[int]) -> tuple[Size, ...]:
    return tuple(Size(loss, n) for loss in LOSSES for n in sizes if loss != TRANSPORT or n <= TRANSPORT_LIMIT)


SIZES = ladder((512, 1024, 2048, 4096, 8192, 16384))
SIZES_QUICK = ladder((256, 512, 1024))


def make_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    fields = {"loss": size.loss, "P": 1, "N": size.N, "M": size.N, "D": FEATURES}
    return Case(f"{size.loss}, N={size.N}", fields | {"dtype": str(dtype)[6:], "device_type": device.type})


@dataclass(frozen=True, eq=False)
class Clouds:
    x: Tensor  # [N, D]
    y: Tensor  # [N, D]


def make_inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    if size.loss != TRANSPORT:
        inner, module = size.of
        make = module.make_pairs if module is bench_loss else module.make_rows
        return make(inner, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size.N, FEATURES, generator=generator).to(device, dtype) for _ in range(2))
    return Clouds(x.requires_grad_(), y.requires_grad_())


def transport(backend: str, clouds: Clouds) -> Outputs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # without a stopping test nothing counts as converged
        schedule = {"scale_cost": "mean", "eps": 0.1, "max_iterations": 20, "tolerance": 0.0}
        result = sinkhorn(clouds.x, clouds.y, **schedule, backend=backend)
    return Outputs(result.value.detach(), torch.autograd.grad(result.value, (clouds.x, clouds.y)))


def by_reference(inputs: Any) -> Outputs:
    if isinstance(inputs, bench_self.Rows):
        return bench_self.ours(inputs, "reference")
    return bench_loss.by_backend("reference", inputs)


def inner(case: Case) -> tuple[Case, Any]:
    """The case as the benchmark knows it whose providers serve, and that benchmark."""
    size, module = Size(case.fields["loss"], case.fields["N"]).of
    return module.make_case(size, DTYPES[case.fields["dtype"]], torch.device(case.fields["device_type"])), module


def prepare(name: str, case: Case) -> Callable[[Any], Outputs]:
    if case.fields["loss"] == TRANSPORT:
        return partial(transport, name)
    if name == "reference":
        return by_reference
    inside, module = inner(case)
    call: Callable[[Any], Outputs] = module.make_providers()[name].prepare(inside)
    return call


def check(case: Case, inputs: Any, outputs: Outputs) -> Check:
    if case.fields["loss"] != TRANSPORT:
        inside, module = inner(case)
        checked: Check = module.check_loss(inside, inputs, outputs)
        return checked
    on_cpu = (x.detach().cpu() for x in (inputs.x, inputs.y))
    expected = transport("native", Clouds(*(x.double().requires_grad_() for x in on_cpu)))
    names = ("value", "x gradient", "y gradient")
    actual = dict(zip(names, (outputs.value, *outputs.gradients), strict=True))
    truth = {n: x.to(outputs.value.device) for n, x in zip(names, (expected.value, *expected.gradients), strict=True)}
    return harness.compare(actual, truth, dict.fromkeys(names, TOLERANCES[DTYPES[case.fields["dtype"]]]))


def left_out(name: str, case: Case) -> str | None:
    loss, N, device = (case.fields[field] for field in ("loss", "N", "device_type"))
    if name in ("native", "triton") and device not in backends()[name].devices:
        return backends()[name].reason
    if name not in ("native", "triton") and 4 * N * N > STORED_LIMIT:
        return f"N × N is {harness.format_bytes(4 * N * N)}, limit {harness.format_bytes(STORED_LIMIT)}"
    if loss == TRANSPORT:
        return None if name in ("native", "triton", "reference") else "has no optimal transport"
    if name == "reference":
        return None
    inside, module = inner(case)
    provider = module.make_providers().get(name)
    return provider.left_out(inside) if provider else "does not have this loss"


def make_providers() -> dict[str, Provider]:
    known = {**bench_self.make_providers(), **bench_loss.make_providers()}
    labels = {"reference": ("ours, reference", "seer_kernels, backend='reference', which stores N × N matrices.")}
    providers = {}
    for name in NAMES:
        label, note = labels.get(name) or (known[name].label, known[name].note)
        foreign = name in known and known[name].foreign
        providers[name] = Provider(
            name, label, partial(prepare, name), check, partial(left_out, name), note, foreign=foreign
        )
    return providers


def growth(measurements: Sequence[Measurement], loss: str, name: str) -> float | None:
    """Peak at the largest size over that at half of it."""
    peaks = {
        m.case.fields["N"]: m.peak_bytes
        for m in measurements
        if (m.case.fields["loss"], m.provider.name) == (loss, name)
    }
    measured = {n: peak for n, peak in peaks.items() if peak}
    largest = max(measured, default=0)
    return measured[largest] / measured[largest // 2] if largest >= LINEAR_FROM and largest // 2 in measured else None


def make_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    text = "{}: peak memory when N doubles at the largest size, times, at most 2.2"
    return [
        Figure(text.format(loss), growth(measurements, loss, "native"), 2.2, True)
        for loss in LOSSES
        if loss != TRANSPORT
    ]


def forget() -> None:
    bench_loss.truth.cache_clear()
    bench_self.truth.cache_clear()


BENCHMARK = Benchmark(
    name="bench_memory",
    title="Peak memory above inputs and gradients, forward and backward",
    description=__doc__,
    examples="""\
  python benchmarks/bench_memory.py                          all losses up to 16384 rows, some minutes
  python benchmarks/bench_memory.py --quick                  up to 1024 rows
  python benchmarks/bench_memory.py --sizes sup_con:8192     one point""",
    sizes=SIZES,
    sizes_quick=SIZES_QUICK,
    parse_size=Size.parse,
    size_help=f"LOSS:N: one of {', '.join(LOSSES)} over N rows of {FEATURES} features",
    make_case=make_case,
    make_inputs=make_inputs,
    input_bytes=lambda size, dtype: harness.INPUT_LIMIT,
    make_providers=lambda quick: make_providers(),
    make_figures=make_figures,
    forget=forget,
    measured="forward and backward with respect to the features",
    packages=("seer-kernels", "triton", "pytorch-metric-learning", "open_clip_torch"),
    timed=False,
    draw=plot.by_size,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
