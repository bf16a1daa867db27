"""How time and peak memory of a loss and of transport grow along one dimension at a time: rows, features, problems per
batch, and processes that share a batch (gloo, one thread each): the shape of it, not the speed of a cluster."""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import bench_loss
import bench_sinkhorn
import command
import harness
import plot
import torch
import torch.distributed as dist
from bench_loss import Pairs
from command import DTYPES, Benchmark
from harness import Case, Check, Figure, Measurement, Outputs, Provider
from torch import multiprocessing

from seer_kernels import distributed

ALONG = {
    "rows": "info_nce over N pairs of 256 features",
    "features": "info_nce over 1024 pairs of D features",
    "problems": "info_nce over P problems of 64 pairs, 512 features",
    "transport": "sinkhorn over B problems of 32 x 32 points, 64 features",
    "ranks": "info_nce over 4096 pairs of 512 features, shared by R processes",
}
MODES = ("gather", "ring")
ANSWER_LIMIT = 120.0
"""Seconds that processes have to start and to answer."""


class Size(NamedTuple):
    """`value` along one dimension, the others fixed."""

    along: str
    value: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From `DIMENSION:VALUE`."""
        match = re.fullmatch(rf"({'|'.join(ALONG)}):([1-9]\d*)", text)
        if not match or (match[1] == "ranks" and 4096 % int(match[2])):
            raise argparse.ArgumentTypeError(
                f"expected DIMENSION:VALUE of {', '.join(ALONG)}, such as rows:4096, ranks dividing 4096; got {text!r}"
            )
        return cls(match[1], int(match[2]))

    @property
    def of(self) -> Any:
        """The same problem as the benchmark knows it whose inputs serve."""
        return {
            "rows": lambda n: bench_loss.Size(1, n, 256),
            "features": lambda n: bench_loss.Size(1, 1024, n),
            "problems": lambda n: bench_loss.Size(n, 64, 512),
            "transport": lambda n: bench_sinkhorn.Batch("equal", n, 32, 64),
            "ranks": lambda n: bench_loss.Size(1, 4096, 512),
        }[self.along](self.value)


SIZES = (
    *(Size("rows", n) for n in (512, 1024, 2048, 4096, 8192)),
    *(Size("features", n) for n in (128, 256, 512, 1024, 2048, 4096)),
    *(Size("problems", n) for n in (1, 4, 16, 64, 256)),
    *(Size("transport", n) for n in (1, 8, 64, 512, 4096)),
    *(Size("ranks", n) for n in (1, 2, 4)),
)
SIZES_QUICK = (*(Size("rows", n) for n in (256, 512)), *(Size("problems", n) for n in (1, 16)), Size("ranks", 2))


def module_of(case: Case) -> Any:
    return bench_sinkhorn if case.fields["along"] == "transport" else bench_loss


def make_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    fields = {"along": size.along, "n": size.value, "dtype": str(dtype)[6:], "device_type": device.type}
    return Case(f"{size.along}: {size.value}", fields)


def inner(case: Case) -> Case:
    """As the benchmark knows it whose providers serve."""
    made: Case = module_of(case).make_case(
        Size(case.fields["along"], case.fields["n"]).of,
        DTYPES[case.fields["dtype"]],
        torch.device(case.fields["device_type"]),
    )
    return made


def make_inputs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    if size.along == "transport":
        return bench_sinkhorn.make_problems(size.of, dtype, device, seed)
    pairs = bench_loss.make_pairs(size.of, dtype, device, seed)
    return Shared.of(pairs) if size.along == "ranks" else pairs


def input_bytes(size: Size, dtype: torch.dtype) -> int:
    module = bench_sinkhorn if size.along == "transport" else bench_loss
    return module.BENCHMARK.input_bytes(size.of, dtype) * (2 if size.along == "ranks" else 1)


@dataclass(frozen=True, eq=False)
class Shared(Pairs):
    """In memory that other processes see, with room for what they return."""

    gradients: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, pairs: Pairs) -> Shared:
        query, key = (x.detach().share_memory_().requires_grad_() for x in (pairs.query, pairs.key))
        room = torch.empty_like(query).share_memory_(), torch.empty_like(key).share_memory_()
        return cls(pairs.loss, query, key, pairs.queries, pairs.keys, room)


class Ranks:
    """Processes that compute one batch together, each its part of the pairs on one thread."""

    def __init__(self, count: int, mode: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            work = (rank, count, mode, f"file://{self._folder.name}/meeting", there)
            process = context.Process(target=serve, args=work, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        self._ask(None)

    def __call__(self, pairs: Shared) -> Outputs:
        loss, _ = self._ask((pairs.query.detach(), pairs.key.detach(), pairs.gradients))
        return Outputs(torch.tensor(loss), pairs.gradients)

    def peak_bytes(self) -> int:
        """Of rank 0, over the call before, its gradients apart."""
        return int(self._ask("peak")[1])

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _ask(self, what: Any) -> tuple[float, int]:
        for pipe in self._pipes:
            pipe.send(what)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(ANSWER_LIMIT):
                raise RuntimeError(f"rank {rank} did not answer within {ANSWER_LIMIT:g} s")
            answers.append(pipe.recv())
        return answers[0]


def serve(rank: int, count: int, mode: str, meeting: str, pipe: Connection) -> None:
    """What each process does until it is killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    pipe.send((0.0, 0))
    pipe.recv()  # of None: all have started

    def compute(query: torch.Tensor, key: torch.Tensor, room: tuple[torch.Tensor, torch.Tensor]) -> Outputs:
        own = slice(rank * query.shape[1] // count, (rank + 1) * query.shape[1] // count)
        parts = [x[:, own].requires_grad_() for x in (query, key)]
        loss = distributed.info_nce(*parts, temperature=bench_loss.TEMPERATURE, mode=mode).mean()
        gradients = torch.autograd.grad(loss, parts)
        for place, gradient in zip(room, gradients, strict=True):
            place[:, own] = gradient / count
        return Outputs(loss.detach(), gradients)

    given: Any = None
    while True:
        asked = pipe.recv()
        if asked == "peak":
            peak, _, _ = harness.peak_memory(partial(compute, *given), torch.device("cpu"))
            pipe.send((0.0, peak))
        else:
            given = asked
            pipe.send((float(compute(*given).value), 0))


RUNNING: dict[tuple[str, str], Ranks] = {}


def ranks_of(mode: str, case: Case) -> Ranks:
    key = case.name, mode
    if key not in RUNNING:
        RUNNING[key] = Ranks(case.fields["n"], mode)
    return RUNNING[key]


def forget() -> None:
    while RUNNING:
        RUNNING.popitem()[1].close()
    bench_loss.truth.cache_clear()


def make_providers() -> dict[str, Provider]:
    losses, transport = bench_loss.make_providers(), bench_sinkhorn.make_providers()
    peers = {"native": ("native", "native"), "idiomatic": ("idiomatic", "pot"), "floor": ("floor", "floor")}

    def original(name: str, case: Case) -> Provider:
        ours = peers[name]
        return transport[ours[1]] if module_of(case) is bench_sinkhorn else losses[ours[0]]

    def check_original(name: str, case: Case, inputs: Any, outputs: Outputs) -> Check:
        return original(name, case).check(inner(case), inputs, outputs)

    def left_out(name: str, case: Case) -> str | None:
        if case.fields["along"] == "ranks" and case.fields["n"] > 1:
            return "of one process"
        return original(name, case).left_out(inner(case))

    def without_ranks(case: Case) -> str | None:
        if case.fields["along"] != "ranks":
            return "of several processes"
        return None if case.fields["device_type"] == "cpu" else "on CPUs"

    labels = {"native": "ours, native", "idiomatic": "idiomatic torch, POT", "floor": "floor"}
    notes = {
        "native": "seer_kernels, all cores.",
        "idiomatic": "As in bench_loss.py; for transport ot.solve_batch.",
        "floor": "As in bench_loss.py and bench_sinkhorn.py.",
    }
    providers = {
        name: Provider(
            name,
            label,
            lambda case, name=name: original(name, case).prepare(inner(case)),
            partial(check_original, name),
            partial(left_out, name),
            notes[name],
        )
        for name, label in labels.items()
    }
    for mode in MODES:
        providers[mode] = Provider(
            mode,
            f"ranks, {mode}",
            partial(ranks_of, mode),
            bench_loss.check_loss,
            without_ranks,
            f"seer_kernels.distributed.info_nce(mode={mode!r}); memory is that of rank 0.",
            detail=lambda case, inputs, mode=mode: {"peak_bytes": ranks_of(mode, case).peak_bytes()},
        )
    return providers


def exponent(measurements: Sequence[Measurement], along: str, value: Callable[[Measurement], float | None]) -> Any:
    """Of the growth of the native backend over the upper half of the range: the slope between logarithms."""
    points = sorted(
        (m.case.fields["n"], value(m))
        for m in measurements
        if (m.case.fields["along"], m.provider.name, m.status) == (along, "native", "ok")
    )
    if len(points) < 3:
        return None
    (first, low), (last, high) = points[len(points) // 2], points[-1]
    return math.log(high / low) / math.log(last / first) if low and high else None


def make_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    def over_floor(m: Measurement) -> float | None:
        return harness.time_ratio(measurements, m.case.name, "native", "floor")

    values = {
        "time": lambda m: m.quartiles[1],
        "time over the floor": over_floor,
        "peak memory": lambda m: m.peak_bytes,
    }
    bounds = (
        ("time over the floor", "rows", 0.1),
        ("time over the floor", "features", 0.1),
        ("time", "problems", 1.1),
        ("time", "transport", 1.1),
        ("peak memory", "rows", 1.1),
        ("peak memory", "features", 0.1),
    )
    return [
        Figure(
            f"{what} grows with {along} as their power of, at most {bound:g}",
            exponent(measurements, along, values[what]),
            bound,
            True,
        )
        for what, along, bound in bounds
    ]


BENCHMARK = Benchmark(
    name="bench_scaling",
    title="Growth along one dimension, forward and backward",
    description=__doc__,
    examples="""\
  python benchmarks/bench_scaling.py                        everything, two minutes
  python benchmarks/bench_scaling.py --sizes ranks:1 ranks:2""",
    sizes=SIZES,
    sizes_quick=SIZES_QUICK,
    parse_size=Size.parse,
    size_help="DIMENSION:VALUE: " + "; ".join(f"{name}, {what}" for name, what in ALONG.items()),
    make_case=make_case,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    make_providers=lambda quick: make_providers(),
    make_figures=make_figures,
    forget=forget,
    measured="forward and backward; for transport the forward pass",
    packages=("seer-kernels", "POT"),
    dtypes=("float32",),
    draw=plot.by_size,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
