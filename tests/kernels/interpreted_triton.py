"""Numerics of the Triton kernels in Triton's interpreter; `test_triton.py` runs this file in a process of its own.

The interpreter has to be chosen before the kernels are defined (TRITON_INTERPRET=1), and it is slow: small shapes, of
which every dimension still takes several tiles of 16 and leaves a part of one.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from oracle import LOSSES, assert_as_exact_as_plain_torch, call, plain_torch, value_and_gradients
from test_distributed import Echo
from torch import Tensor
from triton.runtime import interpreter

import seer_kernels
from seer_kernels import distributed, info_nce
from seer_kernels.contrastive import reference, triton_kernels
from seer_kernels.contrastive.problem import Pairing, Problem, Wanted, no_anchors, settle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE, NARROW = 0, 1 << 30


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, so that a kernel that leaves an element unwritten is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def features(p: int, n: int, m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + m + d)
    return [torch.randn(p, rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, m)]


def labels_and_weights(p: int, n: int, m: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n + m)
    key_labels = torch.randint(0, 4, (p, m), generator=generator)
    weights = torch.rand(p, n, generator=generator, dtype=torch.float64) + 0.1
    weights[:, 1::3] = 0.0
    return {"query_labels": key_labels[:, :n].clone(), "key_labels": key_labels, "weights": weights}


def test_the_interpreter_is_what_runs() -> None:
    assert triton_kernels.INTERPRETED
    assert seer_kernels.backends()["triton"].devices == ("cpu",)


@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("loss", LOSSES)
def test_error_is_bounded_by_plain_torch(monkeypatch: pytest.MonkeyPatch, loss: str, width: int) -> None:
    """Every loss on both paths; dtypes, pair rules and weights take turns."""
    monkeypatch.setattr(triton_kernels, "NARROW_BYTES", width)
    turn = LOSSES.index(loss) + (width == WIDE)
    p, n, m, d = 1 + turn % 2, 18, 21, 19
    rule = ["negative", "ignore", "positive"][turn % 3]
    inputs = features(p, n, m, d, DTYPES[turn // 2 % 3])
    options = {**labels_and_weights(p, n, m), "same_label": rule, "temperature": 0.2}
    ours, usual = partial(call, loss, backend="triton"), partial(plain_torch, loss)
    assert_as_exact_as_plain_torch(ours, usual, inputs, **options)


def problem_of(pairing: str, form: str, rule: str, *, weighted: bool = True, normalize: bool = True) -> Problem:
    query, key = features(1, 9 if pairing == "views" else 18, 21, 19, torch.float32)
    options = labels_and_weights(1, 18, 18 if pairing in ("self", "views") else 21)
    labelled = rule != "negative"
    return Problem(
        query=query,
        key=None if pairing == "self" else key[:, : 9 if pairing == "views" else None],
        temperature=torch.tensor(0.2),
        bias=torch.tensor(-3.0) if form == "sigmoid" else None,
        query_labels=options["query_labels"].int() if labelled else None,
        key_labels=options["key_labels"].int() if labelled else None,
        weights=options["weights"].float() if weighted else None,
        form=form,
        pairing=Pairing(pairing),
        same_label=rule,
        normalize=normalize,
    )


def widened(problem: Problem) -> Problem:
    tensors = ("query", "key", "temperature", "bias", "weights")
    values = {name: getattr(problem, name) for name in tensors}
    return replace(problem, **{name: None if x is None else x.double() for name, x in values.items()})


def assert_like_reference(problem: Problem) -> None:
    """Row results, and the gradients that follow from row gradients of both signs."""
    wanted = Wanted(True, problem.key is not None, True, problem.bias is not None)
    row_gradient = torch.randn(problem.sizes[:2], generator=torch.Generator().manual_seed(0))
    exact = widened(problem)
    rows = triton_kernels.forward(problem, Wanted(False, False, False, False))[0]
    expected_rows = reference.forward(exact, wanted)[0]
    gradients = triton_kernels.backward(problem, row_gradient, wanted)
    expected_gradients = reference.backward(exact, row_gradient.double(), wanted)
    terms = reference.backward(exact, row_gradient.double().abs(), wanted)  # sums of both signs may cancel

    for name, got, true, term in zip(
        (*rows._fields, *gradients._fields),
        (*rows, *gradients),
        (*expected_rows, *expected_gradients),
        (*expected_rows, *terms),
        strict=True,
    ):
        assert (got is None) == (true is None), name
        if got is not None and true is not None and term is not None:
            scale = float(torch.maximum(true.abs(), term.abs()).max())
            assert float((got.double() - true).abs().max()) <= 3e-6 * scale + 1e-12, name


@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    ("pairing", "form", "rule"),
    [
        ("rows", "softmax", "ignore"),
        ("rows", "symmetric", "positive"),
        ("rows", "sigmoid", "negative"),
        ("self", "softmax", "positive"),
        ("views", "softmax", "negative"),
        ("labels", "softmax", "positive"),
    ],
)
def test_many_blocks(monkeypatch: pytest.MonkeyPatch, pairing: str, form: str, rule: str, width: int) -> None:
    """Blocks, panels and parts smaller than the problem, so that products are recomputed and columns are merged."""
    monkeypatch.setattr(triton_kernels, "NARROW_BYTES", width)
    monkeypatch.setattr(triton_kernels, "BLOCK_ENTRIES", 160)
    monkeypatch.setattr(triton_kernels, "BLOCK_SIDE", 10)
    monkeypatch.setattr(triton_kernels, "COLUMN_BYTES", 1)
    assert_like_reference(problem_of(pairing, form, rule))


@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["narrow", "wide"])
def test_raw_products_without_labels_and_weights(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(triton_kernels, "NARROW_BYTES", width)
    assert_like_reference(problem_of("rows", "softmax", "negative", weighted=False, normalize=False))


def test_kept_panels_of_a_one_sided_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "NARROW_BYTES", WIDE)
    monkeypatch.setattr(triton_kernels, "BLOCK_ENTRIES", 160)
    monkeypatch.setattr(triton_kernels, "KEPT_ROWS", 7)
    assert_like_reference(problem_of("rows", "softmax", "negative"))


@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("pairing", ["rows", "self"])
def test_keys_that_come_in_parts(monkeypatch: pytest.MonkeyPatch, pairing: str, width: int) -> None:
    monkeypatch.setattr(triton_kernels, "NARROW_BYTES", width)
    problem = problem_of(pairing, "softmax", "positive")
    wanted = Wanted(True, problem.key is not None, False, False)
    anchors = no_anchors(problem)
    expected = no_anchors(widened(problem))
    for _ in range(2):  # the same keys twice
        triton_kernels.statistics(problem, anchors)
        reference.statistics(widened(problem), expected)
    torch.testing.assert_close(anchors.double(), expected, rtol=1e-5, atol=1e-5)
    slopes = settle(expected, torch.ones(problem.sizes[:2], dtype=torch.float64), torch.tensor(0.2).double())[1]
    gradients = triton_kernels.slope_gradients(problem, slopes.float(), wanted)
    for got, true in zip(gradients, reference.slope_gradients(widened(problem), slopes, wanted), strict=True):
        assert (got is None) == (true is None)
        if got is not None and true is not None:
            torch.testing.assert_close(got.double(), true, rtol=0, atol=3e-6 * float(true.abs().max()))


@pytest.mark.parametrize(("loss", "mode"), [("symmetric", "ring"), ("siglip", "gather"), ("sup_con", "ring")])
def test_keys_of_other_ranks(monkeypatch: pytest.MonkeyPatch, loss: str, mode: str) -> None:
    monkeypatch.setattr(distributed.Team, "of", lambda *_: Echo(None, 1, 3))
    ran = []
    forward = triton_kernels._evaluate if loss == "siglip" else triton_kernels.statistics
    monkeypatch.setattr(triton_kernels, forward.__name__, lambda *operands: (ran.append(1), forward(*operands))[1])
    inputs = features(1, 6, 9, 5, torch.float32)
    labels = labels_and_weights(1, 6, 9)["query_labels"]
    functions: dict[str, Any] = {
        "symmetric": partial(distributed.info_nce, symmetric=True),
        "siglip": partial(distributed.siglip, temperature=0.2, bias=-1.0),
        "sup_con": lambda query, key, **tail: distributed.sup_con(query, labels, **tail),
    }
    results = {}
    for backend in ("triton", "reference"):
        results[backend] = value_and_gradients(functions[loss], inputs, backend=backend, mode=mode)
        assert ran, "Triton did not run"
    for got, expected in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["narrow", "wide"])
def test_work_that_nobody_asked_for_is_not_done(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(triton_kernels, "NARROW_BYTES", width)
    launched: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("_tuned_statistics", "_tuned_gradient", "_tuned_multiply", "_slopes", "_project"):
        monkeypatch.setattr(triton_kernels, name, Recorder(name))
    query, key = features(1, 3, 3, 4, torch.float32)
    expected = {(): (1, 0), ("query",): (2, 1), ("key",): (2, 1), ("query", "key"): (3, 2)}
    for needed, (products, gradients) in expected.items():
        launched.clear()
        leaves = [x.clone().requires_grad_(name in needed) for name, x in (("query", query), ("key", key))]
        info_nce(*leaves, backend="triton")
        assert launched.count("_tuned_multiply") == (products if width == WIDE else 0), needed
        assert launched.count("_tuned_gradient") == (gradients if width == NARROW else 0), needed


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take no memory before they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, dtype.itemsize * math.prod(shape), flags=flags), dtype=dtype).view(shape)


@pytest.fixture
def only_the_last_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every launch the interpreter runs the last 15 programs, and copies nothing back to where it is already."""
    run, skipped = interpreter.GridExecutor.__call__, 0

    def run_last(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal skipped
        programs = (self.grid(options) if callable(self.grid) else self.grid)[0]
        skipped = max(0, programs - 15)
        self.grid = (programs - skipped,)
        run(self, *arguments, **options)

    def number(builder: Any, x: int, y: int, z: int) -> None:
        builder.grid_idx = (skipped + x, y, z)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", number)


@pytest.mark.usefixtures("only_the_last_programs")
@pytest.mark.parametrize(("p", "n"), [(1, (1 << 26) + 37), (1 << 21, 37)], ids=["rows", "problems"])
def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, p: int, n: int) -> None:
    """The last 37 of more than 2^26 queries of 32 features, against 70 keys in five parts: their features, gradients
    and statistics lie more than 2^31 elements from where the tensors begin."""
    monkeypatch.setattr(triton_kernels._Run, "_empty", lambda run, *shape, dtype=torch.float32: untouched(*shape))
    last, d = (slice(p - 1, p), slice(n - 37, n)), 32
    queries, keys = features(1, 37, 70, d, torch.float32)
    labels = labels_and_weights(1, 37, 70)
    small = Problem(
        query=queries,
        key=keys,
        temperature=torch.tensor(0.2),
        bias=None,
        query_labels=labels["query_labels"].int(),
        key_labels=labels["key_labels"].int(),
        weights=None,
        form="softmax",
        pairing=Pairing("labels"),
        same_label="positive",
        normalize=True,
    )
    large = replace(
        small,
        query=untouched(p, n, d),
        key=untouched(p, 70, d),
        query_labels=untouched(p, n, dtype=torch.int32),
        key_labels=untouched(p, 70, dtype=torch.int32),
    )
    row_gradient = untouched(p, n)
    large.query[last], large.query_labels[last], row_gradient[last] = queries, small.query_labels, 1.0
    large.key[-1], large.key_labels[-1] = keys, small.key_labels
    wanted = Wanted(True, False, False, False)
    run = triton_kernels._Run(large, row_gradient, wanted)
    assert run.row_parts.numel() > 1 << 31
    results, *_ = run.results()
    gradient = run.gradients[0]

    expected = reference.forward(widened(small), wanted)
    for got, true in zip(results, expected[0], strict=True):
        torch.testing.assert_close(got[last].double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[last].double(), expected[1].query, rtol=1e-4, atol=1e-5)
    gradient[last] += 3 * queries
    run._project()
    torch.testing.assert_close(gradient[last].double(), expected[1].query, rtol=1e-4, atol=1e-4)

    apart = large.query.as_strided((17, 3, d), (1 << 27, d, 1), large.query.numel() - (1 << 31) - 3 * d)
    products = torch.empty(17, 3, 70)
    run._multiply(products, apart, keys.expand(17, -1, -1).mT, add=False)
    torch.testing.assert_close(products[-1], queries[0, -3:] @ keys[0].T, rtol=1e-5, atol=1e-5)


def test_same_bits_every_time() -> None:
    query, key = features(1, 18, 21, 19, torch.float32)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (query, key)]
        value = info_nce(*leaves, symmetric=True, backend="triton").sum()
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_edges() -> None:
    query, key = features(1, 4, 4, 3, torch.float32)
    query[0, 1], key[0, 2] = 0.0, 0.0
    leaves = [query.requires_grad_(), key.requires_grad_()]
    value = info_nce(*leaves, backend="triton")
    gradients = torch.autograd.grad(value.sum(), leaves)
    torch.testing.assert_close(value, info_nce(query, key, backend="reference"))
    assert gradients[0][0, 1].eq(0).all()
    assert gradients[1][0, 2].eq(0).all()
    assert info_nce(query, key, weights=torch.zeros(1, 4), backend="triton").eq(0).all()
    assert info_nce(query[:, :1], key[:, :1], backend="triton").eq(0).all()
    broken = key.detach().clone()
    broken[0, 3, 1] = torch.nan
    assert not torch.isfinite(info_nce(query, broken, backend="triton")).any()


def test_double_precision_is_refused_and_auto_goes_on() -> None:
    query, key = features(1, 3, 3, 2, torch.float64)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on cpu: it has no kernels for torch.float64"):
        info_nce(query, key, backend="triton")
    assert torch.isfinite(info_nce(query, key)).all()


@pytest.fixture
def atomics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SEER_KERNELS_ATOMICS", "1")
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def sides_added(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Grows by what each narrow gradient adds up by atomics."""
    sides: list[int | None] = []
    choose = triton_kernels._Run._side_to_add
    monkeypatch.setattr(triton_kernels._Run, "_side_to_add", lambda run: (sides.append(choose(run)), sides[-1])[1])
    return sides


@pytest.mark.usefixtures("atomics")
@pytest.mark.parametrize("loss", LOSSES)
def test_atomics_are_as_exact(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    sides, turn = sides_added(monkeypatch), LOSSES.index(loss)
    inputs = features(1 + turn % 2, 18, 21, 19, DTYPES[turn % 3])
    rule = ["negative", "ignore", "positive"][turn % 3]
    options = {**labels_and_weights(1 + turn % 2, 18, 21), "same_label": rule, "temperature": 0.2}
    ours, usual = partial(call, loss, backend="triton"), partial(plain_torch, loss)
    assert_as_exact_as_plain_torch(ours, usual, inputs, **options)
    assert sides
    assert set(sides) == {None if loss in ("nt_xent", "sup_con") else 0}


@pytest.mark.usefixtures("atomics")
@pytest.mark.parametrize("wanted", [("query",), ("key",), ("query", "key")], ids=str)
@pytest.mark.parametrize(("n", "m"), [(18, 21), (21, 5)], ids=["more keys", "more queries"])
@pytest.mark.parametrize("busy", [1, 8192])
def test_the_shorter_side_is_added_where_that_pays(
    monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...], n: int, m: int, busy: int
) -> None:
    monkeypatch.setattr(triton_kernels, "BUSY_ROWS", busy)
    sides = sides_added(monkeypatch)
    query, key = features(2, n, m, 19, torch.float32)
    labels = torch.arange(n) % 5, torch.arange(m) % 5
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_(name in wanted) for name, x in (("query", query), ("key", key))]
        loss = call("sup_con_keys", *leaves, query_labels=labels[0], key_labels=labels[1], backend=backend).sum()
        results.append(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    shorter = int(m < n)
    pays = ("query", "key")[shorter] in wanted and (len(wanted) == 2 or busy > 1)
    assert sides == [shorter if pays else None]


@pytest.mark.usefixtures("atomics")
def test_wide_features_and_deterministic_mode_take_no_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = sides_added(monkeypatch)
    leaves = [x.requires_grad_() for x in features(1, 18, 21, 19, torch.float32)]
    info_nce(*leaves, backend="triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    info_nce(*leaves, backend="triton")
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(triton_kernels, "ADDED_BYTES", 64)
    info_nce(*leaves, backend="triton")
    monkeypatch.setenv("SEER_KERNELS_ATOMICS", "0")
    monkeypatch.setattr(triton_kernels, "ADDED_BYTES", 256)
    info_nce(*leaves, backend="triton")
    assert sides == [0, None, None, None]
    monkeypatch.setenv("SEER_KERNELS_ATOMICS", "yes")
    with pytest.raises(ValueError, match="SEER_KERNELS_ATOMICS must be 0 or 1; got 'yes'"):
        info_nce(*leaves, backend="triton")
