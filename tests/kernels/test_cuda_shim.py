"""The CUDA kernels' source, run on the CPU under random schedules, against the reference in fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import cuda_shim
import pytest
import torch
from cuda_shim import CudaShim
from oracle import assert_as_exact_as_plain_torch, plain_torch
from torch import Tensor

from seer_kernels import info_nce
from seer_kernels.contrastive import native, reference
from seer_kernels.contrastive.problem import SAME_LABEL, Pairing, Problem, Wanted

PLANES = (
    "loss",
    "valid",
    "positive_similarity",
    "negative_similarity",
    "has_negative",
    "top1",
    "logit_dot",
    "logit_sum",
)
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
CANARY = 12345.0


@dataclass(frozen=True)
class Rows:
    """Arguments of contrastive_rows for P problems of N queries and M keys."""

    products: Tensor  # [P, N, M]
    query_scale: Tensor | None  # [P, N]
    key_scale: Tensor | None  # [P, M]
    query_labels: Tensor | None  # [P, N]
    key_labels: Tensor | None  # [P, M]
    weights: Tensor | None  # [P, N]
    row_gradient: Tensor  # [P, N]
    temperature: Tensor  # []
    same_label: str

    def to(self, dtype: torch.dtype) -> Rows:
        fields = {name: value.to(dtype) for name, value in vars(self).items() if _is_floating(value)}
        return replace(self, **fields)


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def make_rows(
    P: int, N: int, M: int, dtype: torch.dtype, seed: int, *, kind: str = "random", rule: str = "negative", full: bool
) -> Rows:
    """`full` adds scales, weights and, where the rule needs them, labels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)

    products = torch.randn(P, N, M, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "peaked":  # logits of some hundreds, of both signs
        products *= 30.0
    elif kind == "tied":
        products.fill_(0.7)
    elif kind == "low":  # every logit is far below zero, the own one the lowest
        products -= 80.0 + 20.0 * torch.eye(N, M, dtype=dtype)
    labels = torch.randint(0, 5, (P, M), generator=generator, dtype=torch.int32) if rule != "negative" else None
    weights = uniform(P, N)
    weights[:, 1::3] = 0.0
    return Rows(
        products=products,
        query_scale=uniform(P, N) if full else None,
        key_scale=uniform(P, M) if full else None,
        query_labels=None if labels is None else labels[:, :N].contiguous(),
        key_labels=labels,
        weights=weights if full else None,
        row_gradient=uniform(P, N, low=-1.0, high=1.0),
        temperature=torch.tensor(0.25, dtype=dtype),
        same_label=rule,
    )


def scales(rows: Rows) -> Tensor:
    """What turns products into similarities: [P, N, M]."""
    if rows.query_scale is None or rows.key_scale is None:
        return torch.ones_like(rows.products)
    return rows.query_scale.unsqueeze(2) * rows.key_scale.unsqueeze(1)


def similarities(rows: Rows) -> Tensor:
    return rows.products * scales(rows)


def expected(rows: Rows) -> dict[str, Tensor]:
    """The planes [P, N] and the gradient with respect to the products [P, N, M], by the reference in `rows`' dtype.

    Unit vectors as queries make the reference's similarities what the keys hold, and its key gradient that of them.
    """
    P, N, _ = rows.products.shape
    similarity = similarities(rows)
    problem = Problem(
        query=torch.eye(N, dtype=similarity.dtype).expand(P, N, N),
        key=similarity.mT,
        temperature=rows.temperature,
        bias=None,
        query_labels=rows.query_labels,
        key_labels=rows.key_labels,
        weights=rows.weights,
        form="softmax",
        pairing=Pairing("rows"),
        same_label=rows.same_label,
        normalize=False,
    )
    wanted = Wanted(query=False, key=True, temperature=True, bias=False)
    results = reference.forward(problem, wanted)[0]
    slope = reference.backward(problem, rows.row_gradient, wanted).key
    assert slope is not None
    slope = slope.mT
    return {
        **results._asdict(),
        "logit_dot": (slope * similarity).sum(-1),
        "gradient": slope * scales(rows),
    }


def guarded(value: Tensor, offset: int) -> Tensor:
    """A copy of `value` that starts `offset` elements after an aligned address, with canaries on both sides."""
    memory = torch.full((offset + value.numel() + 16,), CANARY if value.is_floating_point() else 7, dtype=value.dtype)
    copy = memory[offset : offset + value.numel()].view(value.shape)
    copy.copy_(value)
    return copy


def check_guards(copy: Tensor) -> None:
    memory = torch.empty(0, dtype=copy.dtype).set_(copy.untyped_storage())
    offset = copy.storage_offset()
    for guard in (memory[:offset], memory[offset + copy.numel() :]):
        assert bool((guard == CANARY).all()), "written outside its array"


def run(
    shim: CudaShim,
    rows: Rows,
    *,
    offset: int = 0,
    misaligned: Collection[str] = (),
    parts: int = 1,
    write_gradient: bool = True,
) -> dict[str, Tensor]:
    """What the kernel makes of `rows`, in one call, or in one call for each problem and each of `parts` of its rows.

    The arrays named in `misaligned` start `offset` elements after an aligned address.
    """
    P, N, M = rows.products.shape
    dtype = rows.products.dtype
    arrays = {name: value for name, value in vars(rows).items() if isinstance(value, Tensor)}
    arrays["rows"] = torch.full((len(PLANES), P, N), torch.nan, dtype=dtype)
    offsets = {name: offset if name in misaligned else 0 for name in arrays}
    arrays = {name: guarded(value, offsets[name]) for name, value in arrays.items()}
    gradient = torch.full((P, N, M), torch.nan, dtype=dtype)
    blocks = [(0, P, 0, N)]
    if parts > 1:
        edges = [N * part // parts for part in range(parts + 1)]
        blocks = [(p, p + 1, first, last) for p in range(P) for first, last in pairwise(edges)]
    for first_problem, last_problem, first_row, last_row in blocks:
        block = slice(first_problem, last_problem), slice(first_row, last_row)
        arrays["products"] = guarded(rows.products[block], offsets["products"])
        pairing = Pairing("rows")
        operands = cuda_shim.Operands(
            P=P,
            N=N,
            M=M,
            shared_weights=pairing.shared_weights,
            own_shift=pairing.own_shift(N),
            self_contrast=pairing.self_contrast,
            same_label=SAME_LABEL.index(rows.same_label),
            **addresses(cuda_shim.Operands, arrays),
        )
        getattr(shim, f"contrastive_rows_{SUFFIX[dtype]}")(
            operands,
            first_problem=first_problem,
            problem_count=last_problem - first_problem,
            first_row=first_row,
            row_count=last_row - first_row,
            write_gradient=write_gradient,
            **addresses(cuda_shim.RowBlock, arrays),
        )
        check_guards(arrays["products"])
        gradient[block] = arrays["products"]
    check_guards(arrays["rows"])
    return {**dict(zip(PLANES, arrays["rows"], strict=True)), "gradient": gradient}


def addresses(structure: type[ctypes.Structure], arrays: dict[str, Tensor]) -> dict[str, int]:
    """Where the arrays are that `structure` points to; 0 for those that are not there."""
    pointers = [name for name, kind, *_ in structure._fields_ if kind is ctypes.c_void_p]
    return {name: arrays[name].data_ptr() if name in arrays else 0 for name in pointers}


def assert_exact(actual: dict[str, Tensor], rows: Rows) -> None:
    """Flags are those of the reference in fp64; other errors are at most twice those that it makes in `rows`' dtype.

    Where it makes none by luck, two roundings of the largest logit are allowed. For fp64, which leaves nothing more
    exact to compare with, the error in fp32 is scaled by the ratio of the two precisions.
    """
    dtype = rows.products.dtype
    exact, narrow = expected(rows.to(torch.float64)), rows.to(torch.float32)
    usual, usual_exact = expected(narrow), expected(narrow.to(torch.float64))
    precision = torch.finfo(dtype).eps
    temperature, steepest = float(rows.temperature), float(rows.row_gradient.abs().max())
    logit = float(similarities(rows).abs().max()) / temperature
    rounding = {
        "loss": logit,
        "positive_similarity": logit * temperature,
        "negative_similarity": logit * temperature,
        "logit_dot": logit * steepest,
        "gradient": logit * float(exact["gradient"].abs().max()),
    }
    for name, true in exact.items():
        error = float((actual[name].double() - true).abs().max())
        if name not in rounding:
            assert error == 0.0, name
            continue
        usual_error = float((usual[name].double() - usual_exact[name]).abs().max())
        allowed = 2 * precision * (usual_error / torch.finfo(torch.float32).eps + rounding[name])
        assert error <= allowed, f"{name}: error {error:.3g} above the allowed {allowed:.3g}"


SHAPES = [(1, 1, 1), (2, 3, 3), (1, 5, 64), (2, 3, 129), (3, 2, 700), (1, 2, 1025), (1, 2, 2052), (1, 1, 5000)]
"""Problems, queries, keys: a warp per row up to 1024 keys, then up to a whole block."""


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rule", SAME_LABEL)
@pytest.mark.parametrize("dtype", SUFFIX)
def test_rows(shim: CudaShim, dtype: torch.dtype, rule: str, full: bool) -> None:
    for seed, (P, N, M) in enumerate(SHAPES):
        rows = make_rows(P, N, M, dtype, seed, rule=rule, full=full)
        for schedule in range(3):
            shim.configure(schedule)
            assert_exact(run(shim, rows), rows)


@pytest.mark.parametrize("kind", ["peaked", "tied", "low"])
@pytest.mark.parametrize("dtype", SUFFIX)
def test_hard_inputs(shim: CudaShim, dtype: torch.dtype, kind: str) -> None:
    for seed, (P, N, M) in enumerate([(1, 4, 65), (2, 2, 1500)]):
        rows = make_rows(P, N, M, dtype, seed, kind=kind, rule="positive", full=kind != "tied")
        shim.configure(seed)
        assert_exact(run(shim, rows), rows)


@pytest.mark.parametrize("misaligned", ["products", "key_scale", "key_labels", "all"])
@pytest.mark.parametrize("dtype", SUFFIX)
def test_any_alignment(shim: CudaShim, dtype: torch.dtype, misaligned: str) -> None:
    """Rows that packs of 16 bytes cannot read, because of where an array starts or how long they are."""
    for offset in range(4):
        for M in (64, 65, 66, 1500, 1501):
            rows = make_rows(1, 2, M, dtype, offset, rule="ignore", full=True)
            names = [*vars(rows), "rows"] if misaligned == "all" else [misaligned]
            shim.configure(offset)
            assert_exact(run(shim, rows, offset=offset, misaligned=names), rows)


@pytest.mark.parametrize("dtype", SUFFIX)
def test_products_are_read_once(shim: CudaShim, dtype: torch.dtype) -> None:
    """Rows that fit in shared memory; of those that do not, all but the last tile are read once more."""
    for M in (8, 700, 4096, 14000):
        rows = make_rows(1, 2, M, dtype, 0, full=False)
        shim.configure()
        run(shim, rows)
        assert shim.copied_bytes() == rows.products.nbytes
    shim.configure(shared_bytes=2048 + 4096 * dtype.itemsize)
    run(shim, rows)
    assert shim.copied_bytes() == (2 * rows.products.nbytes - 2 * (14000 % 4096) * dtype.itemsize)


@pytest.mark.parametrize("dtype", SUFFIX)
def test_rows_longer_than_shared_memory(shim: CudaShim, dtype: torch.dtype) -> None:
    """Tiles of 512 fp32 or 256 fp64 columns: up to eight of them, the last one full or not."""
    for seed, M in enumerate([512, 513, 1300, 2048, 2050]):
        rows = make_rows(2, 2, M, dtype, seed, rule="positive", full=True)
        shim.configure(seed, shared_bytes=2048 + 2048)
        assert_exact(run(shim, rows), rows)


def test_blocks_of_rows_share_their_planes(shim: CudaShim) -> None:
    rows = make_rows(3, 7, 40, torch.float32, 0, rule="ignore", full=True)
    assert_exact(run(shim, rows, parts=3), rows)


def test_many_short_rows_share_blocks(shim: CudaShim) -> None:
    """Four warps to a block, with shared memory of their own, and a last block that is not full."""
    rows = make_rows(1025, 2, 70, torch.float32, 0, full=False)
    assert_exact(run(shim, rows), rows)


def test_planes_without_gradient(shim: CudaShim) -> None:
    rows = make_rows(1, 5, 33, torch.float32, 0, full=True)
    actual = run(shim, rows, write_gradient=False)
    torch.testing.assert_close(actual.pop("gradient"), rows.products, rtol=0, atol=0)  # left alone
    assert_exact({**actual, "gradient": expected(rows)["gradient"]}, rows)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("M", [50, 1500])
def test_nan_stays_in_its_row(shim: CudaShim, M: int, bad: float) -> None:
    rows = make_rows(1, 4, M, torch.float32, 0, rule="ignore", full=True)
    assert rows.query_labels is not None
    assert rows.key_labels is not None
    rows.query_labels.zero_()
    rows.key_labels.fill_(1)
    rows.key_labels[0, :4] = 0  # rows 0, 2 and 3 exist; to each, keys 0 to 3 but its own are ignored
    rows.products[0, 0, 20] = bad
    rows.products[0, 3, 2] = bad  # ignored
    sound = replace(rows, products=rows.products.nan_to_num(0.0, 0.0))
    actual = run(shim, rows)
    assert bool(actual["loss"][0, 0].isnan())
    assert bool(actual["gradient"][0, 0].isnan().any())
    healthy = {name: value.clone() for name, value in actual.items()}
    for name, value in expected(sound).items():
        healthy[name][0, 0] = value[0, 0]
    assert_exact(healthy, sound)


@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (2, 2)])
@pytest.mark.parametrize("dtype", SUFFIX)
def test_projection(shim: CudaShim, dtype: torch.dtype, offsets: tuple[int, int]) -> None:
    """Gradients lose their component along x; rows of any length and alignment, in one tile or in several."""
    sizes = [(1, 1), (5, 7), (3, 64), (2, 1024), (2, 1500), (1, 4096), (1, 4097)]
    for seed, (count, D) in enumerate(sizes):
        for shared_bytes in (cuda_shim.H100_SHARED_BYTES, 4096 + 2048):
            shim.configure(seed, shared_bytes=shared_bytes)
            check_projection(shim, count, D, dtype, offsets)


def test_projections_of_many_short_rows_share_blocks(shim: CudaShim) -> None:
    check_projection(shim, 2051, 70, torch.float32, (0, 0))


def check_projection(shim: CudaShim, count: int, D: int, dtype: torch.dtype, offsets: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(count)
    gradient, x = (torch.randn(count, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    scale = 1 / x.norm(dim=-1)
    actual, x_memory = guarded(gradient, offsets[0]), guarded(x, offsets[1])
    getattr(shim, f"project_rows_{SUFFIX[dtype]}")(
        gradient=actual.data_ptr(), x=x_memory.data_ptr(), inverse_norm=scale.data_ptr(), rows=count, D=D
    )
    check_guards(actual)
    exact = project(gradient.double(), x.double(), scale.double())
    narrow = gradient.float(), x.float(), scale.float()
    usual_error = (project(*narrow) - project(*(value.double() for value in narrow))).abs().max()
    roundings = usual_error / torch.finfo(torch.float32).eps + gradient.abs().max()
    error = (actual.double() - exact).abs().max()
    assert float(error) <= 2 * torch.finfo(dtype).eps * float(roundings)


def project(gradient: Tensor, x: Tensor, inverse_norm: Tensor) -> Tensor:
    unit = x * inverse_norm.unsqueeze(-1)
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


@pytest.mark.parametrize("rule", SAME_LABEL)
@pytest.mark.parametrize("dtype", SUFFIX)
def test_the_whole_loss(shim: CudaShim, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rule: str) -> None:
    """info_nce with the CUDA kernels in place of the CPU's: what the driver asks of both is the same."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, count, 5, generator=generator, dtype=torch.float64).to(dtype) for count in (6, 37))
    labels = torch.randint(0, 4, (2, 37), generator=generator)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0], dtype=torch.float64).expand(2, 6)
    monkeypatch.setattr(native, "_native", shim)
    monkeypatch.setattr(native, "CACHED_ROWS", 0)  # as on a GPU
    before = shim.calls
    assert_as_exact_as_plain_torch(
        partial(info_nce, backend="native"),
        partial(plain_torch, "info_nce"),
        [query, key],
        query_labels=labels[:, :6],
        key_labels=labels,
        same_label=rule,
        weights=weights,
    )
    assert shim.calls == before + 3  # one block of rows, and a projection for queries and for keys


def faults(shim: CudaShim, rows: Rows, **broken: bool) -> int:
    """In how many of 20 schedules the kernel is wrong."""
    count = 0
    for seed in range(20):
        shim.configure(seed, **broken)
        try:
            assert_exact(run(shim, rows), rows)
        except (AssertionError, RuntimeError):
            count += 1
    return count


def test_the_shim_finds_a_missing_barrier(shim: CudaShim) -> None:
    rows = make_rows(1, 1, 1500, torch.float32, 0, full=False)
    assert faults(shim, rows) == 0
    assert faults(shim, rows, barriers=False) >= 15


def test_the_shim_finds_a_missing_wait_for_copies(shim: CudaShim) -> None:
    rows = make_rows(1, 1, 100, torch.float32, 0, full=False)
    assert faults(shim, rows, wait_for_copies=False) == 20


def test_the_shim_finds_misaligned_accesses(shim: CudaShim) -> None:
    memory = torch.zeros(64, dtype=torch.float32)
    scale = torch.ones(1)
    with pytest.raises(RuntimeError, match="misaligned"):
        shim.project_rows_f32(
            gradient=memory.data_ptr() + 2, x=memory.data_ptr(), inverse_norm=scale.data_ptr(), rows=1, D=8
        )
