"""Time and memory of the losses that compare a set with itself, NT-Xent and SupCon, beside what else computes them."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import command
import harness
import torch
import torch.nn.functional as F
from command import DTYPES, Benchmark
from harness import Case, Check, Figure, Measurement, Outputs, Provider
from torch import Tensor

from seer_kernels import backends, nt_xent, sup_con

TEMPERATURE = 0.1
LOSSES = ("nt_xent", "sup_con")
ROWS_PER_LABEL = 16
STORED_LIMIT = 1 << 28
"""Largest N x N matrix in float32, in bytes, for which is run what stores several of them."""


@dataclass(frozen=True)
class Size:
    """A loss over N rows of D features."""

    loss: str
    N: int
    D: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From `LOSS:NxD`."""
        match = re.fullmatch(rf"({'|'.join(LOSSES)}):([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise argparse.ArgumentTypeError(f"expected LOSS:NxD, such as sup_con:4096x1024; got {text!r}")
        size = cls(match[1], int(match[2]), int(match[3]))
        if size.N < 2 or size.N % 2:
            raise argparse.ArgumentTypeError(f"expected an even number of rows, two of each sample; got {text!r}")
        return size

    @property
    def name(self) -> str:
        return f"{self.loss}, N={self.N}, D={self.D}"


TALL = tuple(Size("sup_con", n, 256) for n in (4096, 8192, 16384, 32768))
SIZES = (Size("nt_xent", 4096, 4096), Size("sup_con", 4096, 4096), Size("sup_con", 8192, 1024), *TALL)
SIZES_QUICK = (Size("nt_xent", 256, 4096), Size("sup_con", 1024, 1024))


def make_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    fields = {"loss": size.loss, "N": size.N, "D": size.D, "dtype": str(dtype)[6:], "device_type": device.type}
    # half of S = X Xᵀ, and one product with it
    work = {"flops": 3 * size.N**2 * size.D, "least_bytes": 2 * size.N * size.D * dtype.itemsize}
    return Case(size.name, fields | work)


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of one call, in one tensor and, sharing its memory, as two views of N / 2 samples."""

    loss: str
    features: Tensor  # [N, D]
    views: tuple[Tensor, Tensor]  # [N / 2, D] each
    labels: Tensor  # [N]


def make_rows(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Rows:
    """Random directions around one centre per label, with a cosine of about 0.3 within a label and unequal norms.

    For NT-Xent a label is one sample in two views, for SupCon some 16 rows; no row is alone.
    """
    generator = torch.Generator().manual_seed(seed)
    half = size.N // 2
    samples = torch.arange(half)
    if size.loss == "sup_con":
        samples = samples[torch.randperm(half, generator=generator)] % max(2, size.N // ROWS_PER_LABEL)
    labels = samples.repeat(2)
    centres = torch.randn(half, size.D, generator=generator)
    features = torch.randn(size.N, size.D, generator=generator).add_(centres[labels], alpha=0.65)
    features *= torch.rand(size.N, 1, generator=generator).exp()
    features = features.to(device, dtype)
    first, second = (part.detach().requires_grad_() for part in features.split(half))
    return Rows(size.loss, features.requires_grad_(), (first, second), labels.to(device))


def ours(rows: Rows, backend: str = "native") -> Outputs:
    if rows.loss == "nt_xent":
        loss = nt_xent(*rows.views, temperature=TEMPERATURE, backend=backend)
        return Outputs(loss, torch.autograd.grad(loss, rows.views))
    loss = sup_con(rows.features, rows.labels, temperature=TEMPERATURE, backend=backend)
    return Outputs(loss, torch.autograd.grad(loss, rows.features))


def of_features(loss_of: Callable[[Rows], Tensor], rows: Rows) -> Outputs:
    loss = loss_of(rows)
    return Outputs(loss, torch.autograd.grad(loss, rows.features))


def idiomatic(rows: Rows) -> Tensor:
    directions = F.normalize(rows.features, dim=-1)
    logits = directions @ directions.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), -torch.inf)
    if rows.loss == "nt_xent":
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device).roll(len(logits) // 2))
    positive = rows.labels.unsqueeze(1) == rows.labels
    positive.fill_diagonal_(False)
    of_positives = logits.masked_fill(~positive, 0.0).sum(-1) / positive.sum(-1)
    return (logits.logsumexp(-1) - of_positives).mean()


def prepare_compiled(case: Case) -> Callable[[Rows], Outputs]:
    torch.compiler.reset()  # what was compiled for other sizes would make this one dynamic
    return partial(of_features, torch.compile(idiomatic, dynamic=False))


def prepare_metric_learning(case: Case) -> Callable[[Rows], Outputs]:
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer

    # the default reducer leaves rows with a loss of 0 out of the mean
    module = SupConLoss(temperature=TEMPERATURE, reducer=MeanReducer())

    def loss_of(rows: Rows) -> Tensor:
        loss: Tensor = module(rows.features, rows.labels)
        return loss

    return partial(of_features, loss_of)


def prepare_floor(case: Case) -> Callable[[Rows], Outputs]:
    """Products S = X X^T and S X, by blocks of rows where S exceeds the limit, into preallocated outputs."""
    N, D = case.fields["N"], case.fields["D"]
    dtype, device = DTYPES[case.fields["dtype"]], case.fields["device_type"]
    block = min(N, max(1, STORED_LIMIT // (4 * N * dtype.itemsize)))
    products = torch.ones(block, N, dtype=dtype, device=device)
    gradient = torch.ones(N, D, dtype=dtype, device=device)

    def run(rows: Rows) -> Outputs:
        with torch.no_grad():
            for start in range(0, N, block):
                part = rows.features[start : start + block]
                torch.mm(part, rows.features.T, out=products[: len(part)])
                torch.mm(products[: len(part)], rows.features, out=gradient[start : start + block])
        return Outputs(products, (gradient,))

    return run


def named(outputs: Outputs) -> dict[str, Tensor]:
    return {"loss": outputs.value.detach(), "gradient": torch.cat([g.detach() for g in outputs.gradients])}


@lru_cache(maxsize=1)
def truth(rows: Rows) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Loss and gradients in fp64, and the tolerances that idiomatic torch's own errors give.

    Of the reference; or, where its matrices would exceed the limit, of the native backend on the CPU, which smaller
    sizes check.
    """
    stored = fits(len(rows.features)) is None
    device, dtype = rows.features.device, rows.features.dtype
    wide = rows.features.detach().to(device if stored else "cpu", torch.float64)
    first, second = (part.detach().requires_grad_() for part in wide.chunk(2))
    exact = Rows(rows.loss, wide.requires_grad_(), (first, second), rows.labels.to(wide.device))
    expected = named(ours(exact, "reference" if stored else "native"))
    if not stored:
        return {n: x.to(device) for n, x in expected.items()}, dict.fromkeys(expected, harness.tolerance(0.0, dtype))
    plain = named(of_features(idiomatic, rows))
    return expected, {n: harness.tolerance(harness.relative_error(plain[n], expected[n]), dtype) for n in expected}


def check_loss(case: Case, rows: Rows, outputs: Outputs) -> Check:
    expected, tolerances = truth(rows)
    return harness.compare(named(outputs), expected, tolerances)


def check_floor(case: Case, rows: Rows, outputs: Outputs) -> Check:
    """S X applied to a random vector, against the factors applied one after the other in fp64."""
    X = rows.features.detach().double()
    u = torch.randn(X.shape[1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(X.device)
    actual = {"X X^T X": outputs.gradients[0].double() @ u}
    return harness.compare(
        actual, {"X X^T X": X @ (X.T @ (X @ u))}, {"X X^T X": 16 * torch.finfo(rows.features.dtype).eps}
    )


def fits(N: int) -> str | None:
    """Why similarities of N rows are not stored, or None."""
    size = 4 * N * N
    if size <= STORED_LIMIT:
        return None
    return f"N × N is {harness.format_bytes(size)}, limit {harness.format_bytes(STORED_LIMIT)}"


def make_providers() -> dict[str, Provider]:
    """All providers by name, in the order of the table."""

    def unserved(backend: str) -> Callable[[Case], str | None]:
        status = backends()[backend]
        return lambda case: None if case.fields["device_type"] in status.devices else status.reason

    def too_large(case: Case) -> str | None:
        return fits(case.fields["N"])

    def no_metric_learning(case: Case) -> str | None:
        if not importlib.util.find_spec("pytorch_metric_learning"):
            return "not installed"
        return too_large(case)

    providers = (
        Provider(
            "native",
            "ours, native",
            lambda case: ours,
            check_loss,
            unserved("native"),
            "seer_kernels.nt_xent and sup_con, native backend.",
        ),
        Provider(
            "triton",
            "ours, Triton",
            lambda case: partial(ours, backend="triton"),
            check_loss,
            unserved("triton"),
            "The same, Triton backend.",
        ),
        Provider(
            "idiomatic",
            "idiomatic torch",
            lambda case: partial(of_features, idiomatic),
            check_loss,
            too_large,
            "F.normalize, a matrix product, masks, logsumexp; the similarities are stored.",
        ),
        Provider(
            "compiled",
            "torch.compile",
            prepare_compiled,
            check_loss,
            too_large,
            "The same through torch.compile, for this size.",
            compiles=True,
        ),
        Provider(
            "pml",
            "pytorch-metric-learning",
            prepare_metric_learning,
            check_loss,
            no_metric_learning,
            "SupConLoss with MeanReducer; for NT-Xent with one label per sample, which is the same value (checked).",
            foreign=True,
        ),
        Provider(
            "floor",
            "floor",
            prepare_floor,
            check_floor,
            note="Two bare matrix products, S = X Xᵀ and S X, into preallocated outputs. What uses the symmetry of S "
            "can go below.",
        ),
    )
    return {p.name: p for p in providers}


def make_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    ratio, peak = partial(harness.time_ratio, measurements), partial(harness.peak_mebibytes, measurements)
    figures = []
    for size in SIZES[:2]:
        others = [r for name in ("idiomatic", "pml") if (r := ratio(size.name, name, "native"))]
        peaks = [p for name in ("idiomatic", "pml") if (p := peak(size.name, name))]
        own = peak(size.name, "native")
        share = own / min(peaks) if own and peaks else None
        best = min(others, default=None)
        figures += [
            Figure(f"{size.name}: times faster than the fastest other, at least 1.4", best, 1.4, False),
            Figure(f"{size.name}: peak memory over the least of the others, at most 0.1", share, 0.1, True),
        ]
    many = SIZES[2].name
    over_library = ratio(many, "pml", "native")
    first, last = peak(TALL[0].name, "native"), peak(TALL[-1].name, "native")
    growth = last / first if first and last else None
    rows = TALL[-1].N // TALL[0].N
    return [
        *figures,
        Figure(f"{many}: times faster than pytorch-metric-learning, at least 8", over_library, 8, False),
        Figure(f"sup_con, D=256: growth of peak memory with {rows} x the rows, at most {rows}", growth, rows, True),
    ]


BENCHMARK = Benchmark(
    name="bench_self",
    title="NT-Xent and SupCon, forward and backward",
    description=__doc__,
    examples="""\
  python benchmarks/bench_self.py                                the full table, some minutes on two cores
  python benchmarks/bench_self.py --quick                        small sizes, some seconds
  python benchmarks/bench_self.py --sizes nt_xent:512x4096       other sizes
  python benchmarks/bench_self.py --providers native floor       only these""",
    sizes=SIZES,
    sizes_quick=SIZES_QUICK,
    parse_size=Size.parse,
    size_help="LOSS:NxD: nt_xent or sup_con over N rows (for nt_xent two views of N / 2 samples) of D features",
    make_case=make_case,
    make_inputs=make_rows,
    input_bytes=lambda size, dtype: size.N * size.D * dtype.itemsize,
    make_providers=lambda quick: make_providers(),
    make_figures=make_figures,
    forget=truth.cache_clear,
    measured="forward and backward of the mean loss with respect to the features",
    packages=("seer-kernels", "triton", "pytorch-metric-learning"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
