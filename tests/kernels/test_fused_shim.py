"""The CUDA kernels of small problems, run on the CPU under random schedules of threads and blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cuda_shim import CudaShim
from oracle import BIAS, LOSSES, assert_as_exact_as_plain_torch, call, plain_torch, value_and_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seer_kernels import info_nce, nt_xent, sup_con
from seer_kernels.contrastive import native
from seer_kernels.contrastive.problem import SAME_LABEL, Pairing, Problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1, 1), (2, 6, 11, 5), (1, 5, 5, 260), (2, 34, 37, 140)]
"""Problems, queries, keys, features: one block; no whole packs; three slices; several tiles and slices."""


@pytest.fixture
def fused(shim: CudaShim, monkeypatch: pytest.MonkeyPatch) -> CudaShim:
    """The shim in place of the compiled module, and tensors on the CPU taken for tensors on a GPU."""
    monkeypatch.setattr(native, "_native", shim)
    monkeypatch.setattr(native, "_is_cuda", lambda device: True)
    return shim


def make(
    p: int, n: int, m: int, d: int, dtype: torch.dtype, *, labelled: bool = True, weighted: bool = True
) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(m)
    query, key = (torch.randn(p, rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, m))
    options: dict[str, Any] = {}
    if labelled:
        labels = torch.randint(0, 4, (p, m), generator=generator)
        options |= {"query_labels": labels[:, :n].clone(), "key_labels": labels}
    if weighted:
        options["weights"] = torch.rand(p, n, generator=generator, dtype=torch.float64) + 0.1
        options["weights"][:, 1::3] = 0.0
    return [query, key], options


def check(name: str, inputs: list[Tensor], **options: Any) -> None:
    kernel = partial(call, name, backend="native")
    assert_as_exact_as_plain_torch(kernel, partial(plain_torch, name), inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_as_exact_as_plain_torch(fused: CudaShim, name: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        inputs, options = make(*shape, dtype, weighted=seed % 2 == 1)
        fused.configure(seed)
        check(name, inputs, same_label=SAME_LABEL[seed % 3], **options)
        assert fused.launches() == 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", SAME_LABEL)
@pytest.mark.parametrize("name", LOSSES)
def test_every_rule(fused: CudaShim, name: str, rule: str, weighted: bool) -> None:
    inputs, options = make(2, 5, 7, 12, torch.float32, weighted=weighted)
    check(name, inputs, same_label=rule, **options)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_against_the_reference(fused: CudaShim, name: str, reduction: str, normalize: bool) -> None:
    """All gradients, those of temperature and bias included, and the statistics, in fp64."""
    inputs, options = make(2, 6, 9, 6, torch.float64)
    inputs[0][0, 0] = 0.0  # a row without a direction
    inputs.append(torch.tensor(0.3, dtype=torch.float64))
    inputs += [torch.tensor(BIAS, dtype=torch.float64)] * (name == "siglip")
    options |= {"reduction": reduction, "normalize": normalize, "same_label": "ignore"}

    def loss(backend: str) -> partial[Tensor]:
        return partial(call, name, backend=backend)

    actual, exact = (value_and_gradients(loss(backend), inputs, **options) for backend in ("native", "reference"))
    for got, true in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)
    if name != "sup_con":
        statistics = [
            call(name, *inputs[:2], return_stats=True, backend=b, **options)[1] for b in ("native", "reference")
        ]
        for got, true in zip(*statistics, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


def test_the_most_rows(fused: CudaShim) -> None:
    """256 queries and keys: 64 tiles, columns as anchors, more shared memory than a launch gets unasked."""
    inputs, options = make(1, 256, 256, 3, torch.float64)
    check("symmetric", inputs, same_label="ignore", **options)


def test_many_problems(fused: CudaShim) -> None:
    inputs, options = make(150, 3, 4, 8, torch.float32)
    check("info_nce", inputs, same_label="ignore", **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment(fused: CudaShim, dtype: torch.dtype) -> None:
    """Features that packs cannot read, because of where they start."""
    inputs, options = make(1, 4, 5, 16, dtype)
    moved = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in inputs]
    assert all(x.data_ptr() % 8 for x in moved) or dtype == torch.float64
    results = []
    for leaves in (inputs, moved):
        loss = info_nce(*(x.requires_grad_() for x in leaves), same_label="ignore", backend="native", **options)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    tolerance = {"rtol": 0.01, "atol": 0.01} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
    for got, true in zip(*results, strict=True):
        torch.testing.assert_close(got, true, **tolerance)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_gradient_on_one_side(fused: CudaShim, wanted: tuple[bool, bool]) -> None:
    """No memory is touched for the other side, of two views neither."""
    inputs, _ = make(2, 5, 5, 9, torch.float32)
    for loss in (info_nce, nt_xent):
        gradients = []
        for flags in (wanted, (True, True)):
            leaves = [x.clone().requires_grad_(flag) for x, flag in zip(inputs, flags, strict=True)]
            loss(*leaves, backend="native").sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        for got, both, flag in zip(*gradients, wanted, strict=True):
            assert (got is not None) == flag
            if flag:
                torch.testing.assert_close(got, both, rtol=0, atol=0)


def test_the_schedule_changes_no_bit(fused: CudaShim) -> None:
    inputs, options = make(1, 34, 40, 300, torch.float32)
    kernel = partial(call, "symmetric", backend="native", same_label="positive")
    results = []
    for seed in range(3):
        fused.configure(seed)
        results.append(value_and_gradients(kernel, inputs, **options))
    for other in results[1:]:
        for got, true in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, true, rtol=0, atol=0)


def faults(shim: CudaShim, **broken: Any) -> int:
    """In how many of 10 schedules the kernels are wrong: two tiles of five slices each."""
    inputs, _ = make(1, 3, 35, 640, torch.float32, labelled=False, weighted=False)
    loss = partial(info_nce, symmetric=True)
    exact = value_and_gradients(partial(loss, backend="reference"), [x.double() for x in inputs])
    count = 0
    for seed in range(10):
        shim.configure(seed, **broken)
        try:
            actual = value_and_gradients(partial(loss, backend="native"), inputs)
            for got, true in zip(actual, exact, strict=True):
                torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-5)
        except (AssertionError, RuntimeError):
            count += 1
    return count


def test_the_kernels_as_they_are_have_no_faults(fused: CudaShim) -> None:
    assert faults(fused) == 0


@pytest.mark.parametrize("broken", ["releases", "acquires", "zeros", "atomics"])
def test_the_shim_finds_broken_cooperation_of_blocks(fused: CudaShim, broken: str) -> None:
    assert faults(fused, **{broken: False}) >= 3


@pytest.mark.parametrize("which", range(1, 8))
def test_the_shim_finds_every_missing_barrier(fused: CudaShim, which: int) -> None:
    """Two at each of two tickets, after the norms, after the anchors, and after the sums over columns."""
    assert faults(fused, missing_barrier=which) >= 3


def test_the_kernels_refuse_what_they_cannot_hold(fused: CudaShim) -> None:
    with pytest.raises(RuntimeError, match=r"1 to 256 queries and keys.*got 1 problems of 257 queries, 3 keys"):
        fused.fused_scratch(P=1, N=257, M=3, D=4, self_contrast=False)


def test_larger_problems_take_other_paths(fused: CudaShim) -> None:
    x = torch.zeros(1, 2, 3)
    sizes = {"device": x.device, "dtype": x.dtype, "N": 256, "M": 256}
    assert native.keeps_slopes(**sizes, P=2, D=4096)
    assert not native.keeps_slopes(**sizes, P=2, D=4097)
    assert not native.keeps_slopes(**{**sizes, "M": 257}, P=1, D=1)


def test_what_cuda_has_kernels_for() -> None:
    """Every loss of small problems, of larger ones only one."""

    def problem(rows: int, form: str, pairing: str) -> Problem:
        scalar = torch.ones((), device="cuda")
        query = key = torch.empty(1, rows, 64, device="cuda")
        return Problem(query, key, scalar, None, None, None, None, form, Pairing(pairing), "negative", True)

    with FakeTensorMode(allow_non_fake_inputs=True):
        for form, pairing in (("softmax", "rows"), ("symmetric", "rows"), ("sigmoid", "rows"), ("softmax", "labels")):
            assert native.lacks(problem(256, form, pairing)) == ""
            larger = native.lacks(problem(257, form, pairing))
            if (form, pairing) == ("softmax", "rows"):
                assert larger == ""
            else:
                assert larger == (
                    "of more than 256 queries or keys, or of more than 536870912 multiply-adds, on CUDA it computes "
                    "one-sided info_nce only"
                )


def test_a_set_against_itself_reads_its_labels(fused: CudaShim) -> None:
    inputs, _ = make(1, 70, 70, 6, torch.float32)
    labels = torch.arange(70) % 5
    value = sup_con(inputs[0], labels, backend="native")
    exact = sup_con(inputs[0].double(), labels, backend="reference")
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
