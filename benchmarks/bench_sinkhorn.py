"""Time and memory of batches of entropic transport problems, beside what else solves them."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import command
import harness
import torch
from command import Benchmark
from harness import Case, Check, Figure, Measurement, Outputs, Provider
from torch import Tensor

from seer_kernels import ConvergenceWarning, SinkhornResult, backends, sinkhorn, sinkhorn_from_cost

EPS = 0.05
"""Relative to the mean cost of each problem."""
ITERATIONS = 100
TOLERANCE = 1e-4
"""Marginal error at which the provider that stops by itself stops."""
VALUE_TOLERANCE = 2e-3
"""Largest relative error of the objective that still counts as a solution. The errors are in the result file."""
LOOP_LIMIT = 64
"""Most problems for which is run what solves them one after the other."""
EUCLIDEAN = {"cost": "euclidean", "scale_cost": "mean"}
SQUARED = {"cost": "sqeuclidean"}


@dataclass(frozen=True)
class Batch:
    """B pairs of clouds of n points with D features."""

    kind: str
    """`"equal"`: Gaussian clouds. `"mixed"`: clouds from easy to hard. `"ragged"`: n is the largest size.
    `"squared"`: Gaussian clouds under squared distances."""
    B: int
    n: int
    D: int

    @classmethod
    def parse(cls, text: str) -> Batch:
        """From `KIND:BxNxD`."""
        match = re.fullmatch(r"(equal|mixed|ragged|squared):([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if not match or (match[1] == "ragged" and int(match[3]) < 16):
            raise argparse.ArgumentTypeError(
                f"expected KIND:BxNxD, such as equal:64x100x256, mixed, squared or ragged (N >= 16); got {text!r}"
            )
        return cls(match[1], int(match[2]), int(match[3]), int(match[4]))

    @property
    def name(self) -> str:
        return {
            "equal": f"{self.B} x ({self.n} x {self.n}), D={self.D}",
            "squared": f"{self.B} x ({self.n} x {self.n}), D={self.D}, squared distances",
            "mixed": f"{self.B} x ({self.n} x {self.n}), D={self.D}, easy to hard",
            "ragged": f"{self.B} ragged, 16 to {self.n} points, D={self.D}",
        }[self.kind]


BATCHES = (
    Batch("equal", 64, 100, 256),
    Batch("equal", 1024, 16, 64),
    Batch("equal", 8, 512, 64),
    Batch("mixed", 64, 100, 32),
    Batch("ragged", 1000, 128, 64),
    Batch("squared", 1, 2048, 64),
)
QUICK = (
    Batch("equal", 16, 50, 64),
    Batch("equal", 128, 16, 64),
    Batch("mixed", 16, 50, 32),
    Batch("ragged", 60, 128, 16),
    Batch("squared", 1, 512, 64),
)


@dataclass(frozen=True, eq=False)
class Problems:
    costs: Mapping[str, str]  # of points: options of sinkhorn
    x: Tensor  # [B, n, D]
    y: Tensor  # [B, n, D]
    cost: Tensor  # [B, n, n], over its mean; for those who take costs
    lengths: Tensor | None  # [B], of both clouds
    groups: tuple[tuple[Tensor, Tensor], ...]
    """The same problems as batches of equal sizes, for the ragged ones."""


def make_case(batch: Batch, dtype: torch.dtype, device: torch.device) -> Case:
    fields = {"kind": batch.kind, "B": batch.B, "n": batch.n, "m": batch.n, "D": batch.D, "dtype": "float32"}
    fields |= {"eps": EPS, "iterations": ITERATIONS, "device_type": device.type}
    entries = batch.B * batch.n * batch.n
    # every iteration multiplies by the kernel twice; resident, it is read once in all
    return Case(batch.name, fields | {"flops": 4 * ITERATIONS * entries, "least_bytes": 4 * entries})


def make_problems(batch: Batch, dtype: torch.dtype, device: torch.device, seed: int) -> Problems:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch.B, batch.n, batch.D)
    x, y = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    if batch.kind == "mixed":
        # Two heaps of different weight in both clouds; the further apart they are, the slower mass gets across.
        apart = torch.linspace(0, 2, batch.B, device=device).view(-1, 1, 1)
        side = torch.linspace(0, 1, batch.n, device=device).view(1, -1, 1)
        x, y = x + apart * (side < 0.5), y + apart * (side < 0.4)
        return Problems(EUCLIDEAN, x, y, mean_cost(x, y), None, ())
    y = y + 0.3
    if batch.kind == "equal":
        return Problems(EUCLIDEAN, x, y, mean_cost(x, y), None, ())
    if batch.kind == "squared":
        root = torch.cdist(x, y).square().mean().sqrt()
        return Problems(SQUARED, x / root, y / root, torch.cdist(x / root, y / root).square(), None, ())
    sizes = torch.randint(2, batch.n // 8 + 1, (batch.B,), generator=generator) * 8
    groups = []
    for size in sizes.unique().tolist():
        which = (sizes == size).to(device)
        groups.append((x[which, :size].contiguous(), y[which, :size].contiguous()))
    return Problems(EUCLIDEAN, x, y, x.new_empty(0), sizes.to(device), tuple(groups))


def mean_cost(x: Tensor, y: Tensor) -> Tensor:
    cost = torch.cdist(x, y)
    return cost / cost.mean((1, 2), keepdim=True)


def solve(call: Callable[..., SinkhornResult], *clouds: Tensor, **options: Any) -> Tensor:
    """The objective, by default by the native backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # without a stopping test nothing counts as converged
        return call(*clouds, **{"eps": EPS, "max_iterations": ITERATIONS, "backend": "native", **options}).value


def from_costs(problems: Problems, *, tolerance: float, backend: str = "native") -> Outputs:
    return Outputs(solve(sinkhorn_from_cost, problems.cost, tolerance=tolerance, backend=backend), ())


def from_points(problems: Problems) -> Outputs:
    lengths = {"x_lengths": problems.lengths, "y_lengths": problems.lengths}
    return Outputs(solve(sinkhorn, problems.x, problems.y, tolerance=0.0, **problems.costs, **lengths), ())


def group_by_group(problems: Problems) -> Outputs:
    """Every size by itself: what the ragged batch would cost without padding."""
    values = [solve(sinkhorn, x, y, tolerance=0.0, **problems.costs) for x, y in problems.groups]
    return Outputs(in_order(problems, values), ())


def in_order(problems: Problems, values: Sequence[Tensor]) -> Tensor:
    assert problems.lengths is not None
    result = values[0].new_empty(len(problems.lengths))
    for size, value in zip(problems.lengths.unique().tolist(), values, strict=True):
        result[problems.lengths == size] = value
    return result


def pot(problems: Problems, *, method: str) -> Outputs:
    import ot

    options = {"method": method, "max_iter": ITERATIONS, "tol": 0.0, "reg_type": "kl", "grad": "detach"}
    return Outputs(ot.solve_batch(problems.cost, EPS, **options).value, ())


def geomloss(problems: Problems) -> Outputs:
    """Its own schedule of annealing, at its default ratio."""
    from geomloss import SamplesLoss

    scale = torch.cdist(problems.x, problems.y).mean((1, 2)).view(-1, 1, 1)
    loss = SamplesLoss("sinkhorn", p=1, blur=EPS, debias=False, backend="tensorized")
    return Outputs(loss(problems.x / scale, problems.y / scale), ())


def pot_loop(problems: Problems) -> Outputs:
    """One problem after the other; its objective is that of the plan, which is formed."""
    import ot

    values = []
    for cost in problems.cost:
        weights = torch.full_like(cost[0], 1 / len(cost))
        plan = ot.sinkhorn(
            weights, weights, cost, EPS, method="sinkhorn_log", numItermax=ITERATIONS, stopThr=0.0, warn=False
        )
        values.append((plan * cost).sum() + EPS * torch.special.xlogy(plan, plan * len(cost) ** 2).sum())
    return Outputs(torch.stack(values), ())


def prepare_ott(case: Case) -> Callable[[Problems], Outputs]:
    """OTT's solver for a given cost, batched by vmap and compiled; on the CPU its arrays share torch's memory."""
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    solver = Sinkhorn(threshold=0.0, min_iterations=ITERATIONS, max_iterations=ITERATIONS, inner_iterations=ITERATIONS)

    def one(cost: Any) -> Any:
        result = solver(LinearProblem(Geometry(cost, epsilon=EPS, scale_cost=1.0)))
        of_counting_measure = (result.f * result.a).sum() + (result.g * result.b).sum()
        return of_counting_measure + 2 * EPS * math.log(len(cost))

    batched = jax.jit(jax.vmap(one))

    def run(problems: Problems) -> Outputs:
        values = batched(jax.dlpack.from_dlpack(problems.cost)).block_until_ready()
        return Outputs(torch.from_dlpack(values), ())

    return run


def keops(problems: Problems) -> Outputs:
    """geomloss on KeOps, one problem after the other."""
    from geomloss import SamplesLoss

    scale = torch.cdist(problems.x, problems.y).mean((1, 2)).view(-1, 1, 1)
    loss = SamplesLoss("sinkhorn", p=1, blur=EPS, debias=False, backend="online")
    clouds = zip(problems.x / scale, problems.y / scale, strict=True)
    return Outputs(torch.stack([loss(x.contiguous(), y.contiguous()) for x, y in clouds]), ())


def flash_sinkhorn(problems: Problems) -> Outputs:
    from flash_sinkhorn import SamplesLoss

    schedule = {"backend": "alternating", "eps": EPS, "n_iters": ITERATIONS, "use_epsilon_scaling": False}
    loss = SamplesLoss(**schedule, allow_tf32=False)
    return Outputs(torch.stack([loss(x, y) for x, y in zip(problems.x, problems.y, strict=True)]), ())


def prepare_floor(case: Case) -> Callable[[Problems], Outputs]:
    """One product of the kernel with a vector per iteration, bare, into preallocated memory."""
    B, n = case.fields["B"], case.fields["n"]
    vector, product = (torch.ones(B, n, 1, device=case.fields["device_type"]) for _ in range(2))

    def run(problems: Problems) -> Outputs:
        for _ in range(ITERATIONS):
            torch.bmm(problems.cost, vector, out=product)
        return Outputs(product, ())

    return run


@lru_cache(maxsize=1)
def truth(problems: Problems) -> Tensor:
    """The objective in fp64 on the CPU, which the tests compare with the reference and with POT."""
    groups = problems.groups or ((problems.x, problems.y),)
    options = {"tolerance": 1e-8, "max_iterations": 1000, **problems.costs}
    values = [solve(sinkhorn, x.cpu().double(), y.cpu().double(), **options).to(x.device) for x, y in groups]
    return in_order(problems, values) if problems.groups else values[0]


def check(case: Case, problems: Problems, outputs: Outputs) -> Check:
    return harness.compare({"value": outputs.value.detach()}, {"value": truth(problems)}, {"value": VALUE_TOLERANCE})


def check_floor(case: Case, problems: Problems, outputs: Outputs) -> Check:
    expected = {"row sums": problems.cost.double().sum(2, keepdim=True)}
    return harness.compare({"row sums": outputs.value}, expected, {"row sums": 16 * torch.finfo(torch.float32).eps})


def make_providers() -> dict[str, Provider]:
    """All providers by name, in the order of the table."""

    def left_out(
        case: Case,
        *,
        kinds: Sequence[str],
        package: str | None = None,
        devices: Sequence[str] = ("cpu", "cuda"),
        one_by_one: bool = False,
    ) -> str | None:
        if case.fields["kind"] not in kinds:
            return "not for this batch"
        if case.fields["device_type"] not in devices:
            return f"runs on {' and '.join(devices)} only" if package else "slow on the CPU: the native one is there"
        if one_by_one and case.fields["B"] > LOOP_LIMIT:
            return f"one problem at a time, limit {LOOP_LIMIT}"
        if package is None:
            return None if backends()["native"].available else backends()["native"].reason
        return None if importlib.util.find_spec(package) else "not installed"

    def provider(name: str, label: str, call: Callable[[Problems], Outputs], note: str, **rule: Any) -> Provider:
        foreign = rule.get("package") is not None
        return Provider(name, label, lambda case: call, check, partial(left_out, **rule), note, foreign=foreign)

    equal = ("equal",)
    providers = (
        provider(
            "native",
            "sinkhorn",
            partial(from_costs, tolerance=0.0),
            f"sinkhorn_from_cost, {ITERATIONS} iterations.",
            kinds=("equal", "mixed", "squared"),
        ),
        provider(
            "stopping",
            "sinkhorn, stopping",
            partial(from_costs, tolerance=TOLERANCE),
            f"Likewise, but each problem stops at a marginal error of {TOLERANCE:g}.",
            kinds=("equal", "mixed", "squared"),
        ),
        provider(
            "points",
            "sinkhorn, points",
            from_points,
            f"sinkhorn from points, {ITERATIONS} iterations, forming the costs included.",
            kinds=("equal", "ragged", "squared"),
        ),
        provider(
            "groups",
            "size by size",
            group_by_group,
            "The ragged problems as one batch per size: their work without any padding.",
            kinds=("ragged",),
        ),
        provider(
            "reference",
            "sinkhorn, reference",
            partial(from_costs, tolerance=0.0, backend="reference"),
            f"sinkhorn_from_cost by plain torch, {ITERATIONS} iterations: what runs where there are no kernels.",
            kinds=("equal", "mixed", "squared"),
            devices=("cuda",),
        ),
        provider(
            "pot-log",
            "POT, log",
            partial(pot, method="log_sinkhorn"),
            f'ot.solve_batch(method="log_sinkhorn"), {ITERATIONS} iterations, on the same costs.',
            kinds=("equal", "squared"),
            package="ot",
        ),
        provider(
            "pot",
            "POT, plain",
            partial(pot, method="sinkhorn"),
            'The same with method="sinkhorn", which underflows where eps is small.',
            kinds=("equal", "squared"),
            package="ot",
        ),
        provider(
            "geomloss",
            "geomloss",
            geomloss,
            "SamplesLoss(backend=tensorized, p=1, debias=False) from points, its own schedule; errors: result file.",
            kinds=equal,
            package="geomloss",
        ),
        provider(
            "pot-loop",
            "POT, loop",
            pot_loop,
            f'ot.sinkhorn(method="sinkhorn_log") for one problem at a time, {ITERATIONS} iterations.',
            kinds=equal,
            package="ot",
            one_by_one=True,
        ),
        provider(
            "keops",
            "geomloss, KeOps",
            keops,
            "SamplesLoss(backend=online), one problem at a time, its own schedule.",
            kinds=equal,
            package="pykeops",
            one_by_one=True,
            devices=("cuda",),
        ),
        provider(
            "flash",
            "flash-sinkhorn",
            flash_sinkhorn,
            f"SamplesLoss(backend=alternating, allow_tf32=False), {ITERATIONS} iterations, one problem at a time.",
            kinds=("squared",),
            package="flash_sinkhorn",
            devices=("cuda",),
        ),
        Provider(
            "ott",
            "OTT",
            prepare_ott,
            check,
            partial(left_out, kinds=equal, package="ott"),
            f"Sinkhorn under vmap and jit, {ITERATIONS} iterations, on the same costs.",
            compiles=True,
            foreign=True,
        ),
        Provider(
            "floor",
            "floor",
            prepare_floor,
            check_floor,
            lambda case: None if case.fields["kind"] != "ragged" else "not for this batch",
            f"{ITERATIONS} bare products of the costs with a vector: one read per iteration, if they are not in cache.",
        ),
    )
    return {p.name: p for p in providers}


def errors(measurements: Sequence[Measurement], case: str, *names: str) -> list[float]:
    return [
        m.check.error for n in names for m in measurements if (m.case.name, m.provider.name) == (case, n) and m.check
    ]


def make_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    ratio = partial(harness.time_ratio, measurements)
    figures = []
    for batch in BATCHES:
        if batch.kind != "equal":
            continue
        for other, bound in (("pot-log", 30), ("pot", 6)):
            label = make_providers()[other].label
            text = f"{batch.name}: times faster than {label}, at least {bound}"
            figures.append(Figure(text, ratio(batch.name, other, "native"), bound, False))
        accuracy = errors(measurements, batch.name, "points", "geomloss")
        # 100 iterations are compared only where they are at least as exact
        faster = ratio(batch.name, "geomloss", "points") if len(accuracy) == 2 and accuracy[0] <= accuracy[1] else None
        text = f"{batch.name}: times faster than geomloss, and at least as exact, at least 5"
        figures.append(Figure(text, faster, 5, False))
    mixed, ragged = BATCHES[3].name, BATCHES[4].name
    stopped = f"{mixed}: times faster with the stopping test, at least 2"
    figures.append(Figure(stopped, ratio(mixed, "native", "stopping"), 2, False))
    text = f"{ragged}: time over that of the sizes by themselves, at most 1.15"
    return [*figures, Figure(text, ratio(ragged, "points", "groups"), 1.15, True)]


BENCHMARK = Benchmark(
    name="bench_sinkhorn",
    title=f"Entropic optimal transport, {ITERATIONS} iterations",
    description=__doc__,
    examples="""\
  python benchmarks/bench_sinkhorn.py                            all batches, under two minutes on two cores
  python benchmarks/bench_sinkhorn.py --quick                    small batches, some seconds
  python benchmarks/bench_sinkhorn.py --sizes equal:256x64x128   another batch""",
    sizes=BATCHES,
    sizes_quick=QUICK,
    parse_size=Batch.parse,
    size_help="KIND:BxNxD: B problems (equal, mixed, ragged or squared) of N points with D features",
    make_case=make_case,
    make_inputs=make_problems,
    input_bytes=lambda batch, dtype: 2 * batch.B * batch.n * (batch.n + batch.D) * dtype.itemsize,
    make_providers=lambda quick: make_providers(),
    make_figures=make_figures,
    forget=truth.cache_clear,
    measured=f"forward, Euclidean costs over their mean, eps {EPS}; whoever takes costs is given them",
    checked="the objective against the same in fp64 at convergence",
    packages=("seer-kernels", "pot", "geomloss", "pykeops", "flash-sinkhorn", "ott-jax", "jax"),
    dtypes=("float32",),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
