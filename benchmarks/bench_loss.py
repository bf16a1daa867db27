"""Time and memory of the losses between queries and keys, forward and backward, beside what else computes them."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import command
import harness
import torch
import torch.nn.functional as F
from command import DTYPES, Benchmark
from harness import Case, Check, Figure, Measurement, Outputs, Provider
from torch import Tensor

from seer_kernels import backends, info_nce, siglip

TEMPERATURE = 0.1
BIAS = -10.0
"""Of the sigmoid loss, as its authors start it."""
LOSSES = ("info_nce", "clip", "siglip")

BROADCAST_LIMIT = 1 << 30
"""Largest N x N x D tensor, in bytes, for which the paper's formula is run: it holds six of them."""
BROADCAST_LIMIT_QUICK = 1 << 26


@dataclass(frozen=True, order=True)
class Size:
    """P independent problems of N pairs with D features."""

    P: int
    N: int
    D: int
    loss: str = "info_nce"

    @classmethod
    def parse(cls, text: str) -> Size:
        """From `NxD` or `PxNxD`, perhaps after `LOSS:`."""
        match = re.fullmatch(rf"(?:({'|'.join(LOSSES)}):)?([1-9]\d*(?:x[1-9]\d*){{1,2}})", text)
        if not match:
            raise argparse.ArgumentTypeError(
                f"expected NxD, PxNxD or LOSS:NxD, such as 1024x4096, 3x32x4096 or clip:512x768; got {text!r}"
            )
        numbers = [int(n) for n in match[2].split("x")]
        size = cls(*([1] * (3 - len(numbers)) + numbers), match[1] or "info_nce")
        if size.N == 1:
            raise argparse.ArgumentTypeError(f"a single pair has no negatives and a loss of 0; got {text!r}")
        return size

    @property
    def name(self) -> str:
        loss = "" if self.loss == "info_nce" else f"{self.loss}, "
        return f"{loss}N={self.N}, D={self.D}" + (f", {self.P} problems" if self.P > 1 else "")

    @property
    def regime(self) -> str:
        if self.D <= 256:
            return "small D"
        return "launch latency" if self.N <= 256 else "products dominate"


SIZES = (
    Size(3, 32, 4096),
    Size(1, 256, 4096),
    Size(1, 4096, 128),
    Size(1, 1024, 1024),
    Size(1, 4096, 1024),
    Size(1, 2048, 4096),
    Size(1, 1024, 1024, "clip"),
    Size(1, 1024, 1024, "siglip"),
)
SIZES_QUICK = (
    Size(3, 32, 4096),
    Size(1, 256, 4096),
    Size(1, 1024, 128),
    Size(1, 1024, 1024),
    Size(1, 512, 512, "clip"),
    Size(1, 512, 512, "siglip"),
)


def make_case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    fields = {"loss": size.loss, "regime": size.regime, "P": size.P, "N": size.N, "M": size.N, "D": size.D}
    fields |= {"dtype": str(dtype)[6:], "device_type": device.type}
    features = size.P * size.N * size.D
    work = {"flops": 3 * 2 * features * size.N, "least_bytes": 4 * features * dtype.itemsize}
    return Case(size.name, fields | work)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Inputs of one call, as one stacked tensor and, sharing its memory, as one tensor per problem.

    Whoever takes stacked problems gets them stacked and whoever does not gets them apart: nobody pays for the other's
    form.
    """

    loss: str
    query: Tensor  # [P, N, D]
    key: Tensor  # [P, N, D]
    queries: tuple[Tensor, ...]  # P times [N, D]
    keys: tuple[Tensor, ...]  # P times [N, D]


def make_pairs(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Pairs:
    """Random directions whose pairs have a cosine of about 0.3, with norms between 1 and e times sqrt(D).

    Positives then neither vanish among the negatives nor settle the softmax.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (size.P, size.N, size.D)
    query = torch.randn(shape, generator=generator)
    key = torch.randn(shape, generator=generator) + 0.3 * query
    query, key = (x * torch.rand(*shape[:2], 1, generator=generator).exp() for x in (query, key))
    query, key = query.to(device, dtype), key.to(device, dtype)
    return Pairs(
        size.loss,
        query.requires_grad_(),
        key.requires_grad_(),
        tuple(q.detach().requires_grad_() for q in query),
        tuple(k.detach().requires_grad_() for k in key),
    )


def ours(query: Tensor, key: Tensor, loss: str, backend: str) -> Tensor:
    """The mean over problems, of [P, N, D] each."""
    if loss == "siglip":
        return siglip(query, key, temperature=TEMPERATURE, bias=BIAS, backend=backend).mean()
    return info_nce(query, key, temperature=TEMPERATURE, symmetric=loss == "clip", backend=backend).mean()


def by_backend(backend: str, pairs: Pairs) -> Outputs:
    loss = ours(pairs.query, pairs.key, pairs.loss, backend)
    return Outputs(loss, torch.autograd.grad(loss, (pairs.query, pairs.key)))


def one_by_one(loss_of: Callable[[Tensor, Tensor], Tensor], pairs: Pairs) -> Outputs:
    """For losses that take one problem at a time: one call per problem, averaged."""
    loss = torch.stack([loss_of(q, k) for q, k in zip(pairs.queries, pairs.keys, strict=True)]).mean()
    return Outputs(loss, torch.autograd.grad(loss, (*pairs.queries, *pairs.keys)))


def idiomatic(loss: str, query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / TEMPERATURE
    if loss == "siglip":
        sign = 2 * torch.eye(len(query), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(sign * (logits + BIAS)).sum() / len(query)
    pairs = torch.arange(len(query), device=query.device)
    if loss == "clip":
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    return F.cross_entropy(logits, pairs)


def prepare_compiled(case: Case) -> Callable[[Pairs], Outputs]:
    torch.compiler.reset()  # what was compiled for other sizes would make this one dynamic
    return partial(one_by_one, torch.compile(partial(idiomatic, case.fields["loss"]), dynamic=False))


def paper(query: Tensor, key: Tensor) -> Tensor:
    logits = F.cosine_similarity(query.unsqueeze(1), key.unsqueeze(0), dim=-1) / TEMPERATURE  # through [N, N, D]
    return (logits.logsumexp(-1) - logits.diagonal()).mean()


def prepare_metric_learning(case: Case) -> Callable[[Pairs], Outputs]:
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer

    # the default reducer leaves rows with a loss of 0 out of the mean
    module = SupConLoss(temperature=TEMPERATURE, reducer=MeanReducer())

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        labels = torch.arange(len(query), device=query.device)
        # a second tensor: given the same one twice, the library takes the diagonal for self-pairs and drops it
        loss: Tensor = module(query, labels, ref_emb=key, ref_labels=labels.clone())
        return loss

    return partial(one_by_one, loss_of)


def prepare_sentence_transformers(case: Case) -> Callable[[Pairs], Outputs]:
    from sentence_transformers.sentence_transformer import losses

    clip = case.fields["loss"] == "clip"
    kind = losses.MultipleNegativesSymmetricRankingLoss if clip else losses.MultipleNegativesRankingLoss
    module = kind(model=None, scale=1 / TEMPERATURE)

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        loss: Tensor = module.compute_loss_from_embeddings([query, key], torch.empty(0))
        return loss

    return partial(one_by_one, loss_of)


def prepare_open_clip(case: Case) -> Callable[[Pairs], Outputs]:
    package = importlib.util.find_spec("open_clip")
    folder = package.submodule_search_locations[0] if package and package.submodule_search_locations else ""
    losses = runpy.run_path(f"{folder}/loss.py")  # the whole package wants torchvision

    clip = case.fields["loss"] == "clip"
    module = losses["ClipLoss"]() if clip else losses["SigLipLoss"]()
    bias = () if clip else (BIAS,)

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        unit = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        loss: Tensor = module(*unit, 1 / TEMPERATURE, *bias)
        return loss

    return partial(one_by_one, loss_of)


def prepare_inf_cl(case: Case) -> Callable[[Pairs], Outputs]:
    from inf_cl import cal_flash_loss

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        unit = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        rows: Tensor = cal_flash_loss(*unit, scale=1 / TEMPERATURE)
        return rows.mean()

    return partial(one_by_one, loss_of)


def prepare_floor(case: Case) -> Callable[[Pairs], Outputs]:
    """Products S = Q K^T, S K and S^T Q into preallocated outputs."""
    P, N, D = (case.fields[name] for name in "PND")
    like = {"dtype": DTYPES[case.fields["dtype"]], "device": case.fields["device_type"]}
    products = torch.ones(P, N, N, **like)
    query_gradient, key_gradient = torch.ones(P, N, D, **like), torch.ones(P, N, D, **like)

    def run(pairs: Pairs) -> Outputs:
        with torch.no_grad():
            if P > 1:
                torch.bmm(pairs.query, pairs.key.mT, out=products)
                torch.bmm(products, pairs.key, out=query_gradient)
                torch.bmm(products.mT, pairs.query, out=key_gradient)
            else:
                torch.mm(pairs.query[0], pairs.key[0].T, out=products[0])
                torch.mm(products[0], pairs.key[0], out=query_gradient[0])
                torch.mm(products[0].T, pairs.query[0], out=key_gradient[0])
        return Outputs(products, (query_gradient, key_gradient))

    return run


def named(outputs: Outputs) -> dict[str, Tensor]:
    """Outputs by name, the problems of the gradients one below the other: [P * N, D]."""
    parts = [g.detach().flatten(0, -2) for g in outputs.gradients]
    half = len(parts) // 2
    return {
        "loss": outputs.value.detach(),
        "query gradient": torch.cat(parts[:half]),
        "key gradient": torch.cat(parts[half:]),
    }


@lru_cache(maxsize=1)
def truth(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Loss and gradients of the reference in fp64, and the tolerances that idiomatic torch's own errors give."""
    query, key = (x.detach().double().requires_grad_() for x in (pairs.query, pairs.key))
    loss = ours(query, key, pairs.loss, "reference")
    expected = named(Outputs(loss, torch.autograd.grad(loss, (query, key))))
    plain = named(one_by_one(partial(idiomatic, pairs.loss), pairs))
    dtype = pairs.query.dtype
    return expected, {n: harness.tolerance(harness.relative_error(plain[n], expected[n]), dtype) for n in expected}


def check_loss(case: Case, pairs: Pairs, outputs: Outputs) -> Check:
    expected, tolerances = truth(pairs)
    return harness.compare(named(outputs), expected, tolerances)


def check_floor(case: Case, pairs: Pairs, outputs: Outputs) -> Check:
    """The products applied to a random vector, against the factors applied one after the other in fp64."""
    Q, K = pairs.query.detach().double(), pairs.key.detach().double()
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, 1, generator=generator, dtype=torch.float64).to(Q.device) for n in (Q.shape[2], Q.shape[1]))
    expected = {"Q K^T": Q @ (K.mT @ v), "Q K^T K": Q @ (K.mT @ (K @ u)), "K Q^T Q": K @ (Q.mT @ (Q @ u))}
    products, (query_gradient, key_gradient) = outputs
    actual = {
        "Q K^T": products.double() @ v,
        "Q K^T K": query_gradient.double() @ u,
        "K Q^T Q": key_gradient.double() @ u,
    }
    rounding = torch.finfo(pairs.query.dtype).eps
    return harness.compare(actual, expected, dict.fromkeys(expected, 16 * rounding))


def make_providers(broadcast_limit: int = BROADCAST_LIMIT) -> dict[str, Provider]:
    """All providers by name, in the order of the table."""

    def unserved(backend: str) -> Callable[[Case], str | None]:
        status = backends()[backend]
        return lambda case: None if case.fields["device_type"] in status.devices else status.reason

    def without(package: str, *losses: str, needs: Callable[[Case], str | None] = lambda case: None) -> Any:
        """Why another package is not run: not installed, without the loss, or what `needs` says."""

        def reason(case: Case) -> str | None:
            if case.fields["loss"] not in losses:
                return "does not have this loss"
            return needs(case) if importlib.util.find_spec(package) else "not installed"

        return reason

    def too_broad(case: Case) -> str | None:
        if case.fields["loss"] != "info_nce":
            return "does not have this loss"
        N, D, dtype = (case.fields[name] for name in ("N", "D", "dtype"))
        size = N * N * D * DTYPES[dtype].itemsize
        if size <= broadcast_limit:
            return None
        return f"N × N × D is {harness.format_bytes(size)}, limit {harness.format_bytes(broadcast_limit)}"

    def inf_cl_needs(case: Case) -> str | None:
        if case.fields["device_type"] != "cuda" or case.fields["dtype"] != "float32":
            return "runs on CUDA in float32 only"
        return None if case.fields["D"] % 256 == 0 else "needs a multiple of 256 features"

    providers = (
        Provider(
            "native",
            "ours, native",
            lambda case: partial(by_backend, "native"),
            check_loss,
            unserved("native"),
            "seer_kernels.info_nce (symmetric for clip) and siglip, native backend, all problems in one call.",
        ),
        Provider(
            "triton",
            "ours, Triton",
            lambda case: partial(by_backend, "triton"),
            check_loss,
            unserved("triton"),
            "The same, Triton backend.",
        ),
        Provider(
            "idiomatic",
            "idiomatic torch",
            lambda case: partial(one_by_one, partial(idiomatic, case.fields["loss"])),
            check_loss,
            note="F.normalize, a matrix product and F.cross_entropy (F.logsigmoid), called once per problem.",
        ),
        Provider(
            "compiled",
            "torch.compile",
            prepare_compiled,
            check_loss,
            note="The same through torch.compile, for this size.",
            compiles=True,
        ),
        Provider(
            "paper",
            "paper's formula",
            lambda case: partial(one_by_one, paper),
            check_loss,
            too_broad,
            "Cosine similarity by broadcasting to N × N × D, then logsumexp (SEER, arXiv 2502.05242), called once per "
            f"problem; left out where one N × N × D tensor exceeds {harness.format_bytes(broadcast_limit)}.",
        ),
        Provider(
            "pml",
            "pytorch-metric-learning",
            prepare_metric_learning,
            check_loss,
            without("pytorch_metric_learning", "info_nce"),
            "SupConLoss with ref_emb=key, one label per pair and MeanReducer: one positive among N keys, which is "
            "exactly one-sided InfoNCE (checked, as for all). Its NTXentLoss is left out: the same value from a matrix "
            "of N × N(N-1) entries, 4 GiB at N = 1024.",
            foreign=True,
        ),
        Provider(
            "st",
            "sentence-transformers",
            prepare_sentence_transformers,
            check_loss,
            without("sentence_transformers", "info_nce", "clip"),
            "MultipleNegativesRankingLoss (for clip the symmetric one) of given embeddings.",
            foreign=True,
        ),
        Provider(
            "open_clip",
            "open_clip",
            prepare_open_clip,
            check_loss,
            without("open_clip", "clip", "siglip"),
            "F.normalize, then ClipLoss or SigLipLoss.",
            foreign=True,
        ),
        Provider(
            "inf_cl",
            "Inf-CL",
            prepare_inf_cl,
            check_loss,
            without("inf_cl", "info_nce", needs=inf_cl_needs),
            "F.normalize, then cal_flash_loss, whose products are TF32.",
            foreign=True,
        ),
        Provider(
            "floor",
            "floor",
            prepare_floor,
            check_floor,
            note="The three matrix products that loss and gradients need, bare, into preallocated outputs.",
        ),
    )
    return {p.name: p for p in providers}


def make_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    ratio, peak = partial(harness.time_ratio, measurements), partial(harness.peak_mebibytes, measurements)
    large, seer, wide = Size(1, 4096, 1024).name, Size(3, 32, 4096).name, Size(1, 256, 4096).name
    over_paper = ratio(wide, "paper", "native")
    return [
        Figure(f"{large}: time of info_nce over the floor, at most 1.10", ratio(large, "native", "floor"), 1.10, True),
        Figure(f"{large}: peak memory of info_nce in MiB, at most 96", peak(large, "native"), 96, True),
        Figure(f"{seer}: times faster than idiomatic torch, at least 2", ratio(seer, "idiomatic", "native"), 2, False),
        Figure(f"{wide}: times faster than the paper's formula, at least 100", over_paper, 100, False),
    ]


BENCHMARK = Benchmark(
    name="bench_loss",
    title="InfoNCE, CLIP and SigLIP, forward and backward",
    description=__doc__,
    examples="""\
  python benchmarks/bench_loss.py                                the full table, under two minutes on two cores
  python benchmarks/bench_loss.py --quick                        small sizes, some seconds
  python benchmarks/bench_loss.py --sizes 512x4096 3x64x2048     other sizes
  python benchmarks/bench_loss.py --providers native floor       only these
  OMP_NUM_THREADS=1 python benchmarks/bench_loss.py              one thread""",
    sizes=SIZES,
    sizes_quick=SIZES_QUICK,
    parse_size=Size.parse,
    size_help="[LOSS:][Px]NxD: info_nce (default), clip or siglip of P problems (default 1) of N pairs with D features",
    make_case=make_case,
    make_inputs=make_pairs,
    input_bytes=lambda size, dtype: 2 * size.P * size.N * size.D * dtype.itemsize,
    make_providers=lambda quick: make_providers(BROADCAST_LIMIT_QUICK if quick else BROADCAST_LIMIT),
    make_figures=make_figures,
    forget=truth.cache_clear,
    measured="forward and backward of the mean loss with respect to queries and keys",
    packages=(
        "seer-kernels",
        "triton",
        "pytorch-metric-learning",
        "sentence-transformers",
        "open_clip_torch",
        "inf_cl",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
