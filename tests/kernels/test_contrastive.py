"""The contrastive losses on every backend: against the definition, plain torch's own error, and at the edges."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LOSSES, assert_as_exact_as_plain_torch, by_the_book, call, plain_torch, value_and_gradients
from torch import Tensor

import seer_kernels
from seer_kernels import _dispatch, info_nce
from seer_kernels.contrastive import native, reference

BACKENDS = [name for name, status in seer_kernels.backends().items() if "cpu" in status.devices]
ENGINES = [*BACKENDS, "native by the library"]
RULES = ["negative", "ignore", "positive"]
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend; "by the library" without the matrix products that it keeps for small problems."""
    backend, _, by_the_library = request.param.partition(" ")
    if by_the_library:
        monkeypatch.setattr(native, "CACHED_ROWS", 0)
    return backend


def features(p: int, n: int, m: int, d: int, dtype: torch.dtype = torch.float64, kind: str = "random") -> list[Tensor]:
    """Queries [p, n, d] and keys [p, m, d] of a kind that is known to break kernels."""
    generator = torch.Generator().manual_seed(1000 * n + 10 * m + d)
    query, key = (torch.randn(p, rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))
    if kind == "peaked":  # the own pair outweighs all else: losses near 0
        key[:, :n] = 3.0 * query + 1e-3 * key[:, :n]
    elif kind == "opposed":  # every query's own key is the least similar one: losses near 2 / temperature
        key[:, :n] = -query
    elif kind == "tied":  # all similarities of a problem are equal
        query, key = query[:, :1].expand_as(query), query[:, :1].expand_as(key)
    elif kind == "offset":  # far from the origin: hidden states with a large common component
        query, key = query + 100.0, key + 100.0
    return [query.to(dtype).contiguous(), key.to(dtype).contiguous()]


def labels_and_weights(p: int, n: int, m: int, *, weighted: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n + m)
    key_labels = torch.randint(0, 4, (p, m), generator=generator)
    options: dict[str, Any] = {"query_labels": key_labels[:, :n].clone(), "key_labels": key_labels}
    if weighted:
        weights = torch.rand(p, n, generator=generator, dtype=torch.float64) + 0.1
        weights[:, 1::3] = 0.0
        options["weights"] = weights
    return options


def test_the_native_backend_is_there() -> None:
    assert "native" in BACKENDS, seer_kernels.backends()["native"].reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 5, 3), (4, 19, 6)])
@pytest.mark.parametrize("loss", LOSSES)
def test_definition(loss: str, backend: str, rule: str, reduction: str, weighted: bool, n: int, m: int, d: int) -> None:
    inputs = [*features(2, n, m, d), torch.tensor(0.3, dtype=torch.float64)]
    if loss == "siglip":
        inputs.append(torch.tensor(-0.2, dtype=torch.float64))
    options = labels_and_weights(2, n, m, weighted=weighted)
    fixed = {"same_label": rule, "reduction": reduction}
    actual = value_and_gradients(partial(call, loss, backend=backend), inputs, **fixed, **options)

    def book(query: Tensor, key: Tensor, **scalars: Tensor) -> Tensor:
        of_problem = [{name: value[p] for name, value in options.items()} for p in range(2)]
        return torch.stack([by_the_book(loss, query[p], key[p], **scalars, **fixed, **of_problem[p]) for p in range(2)])

    for got, expected in zip(actual, value_and_gradients(book, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("kind", ["random", "peaked", "opposed", "tied", "offset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("p", "n", "m", "d"), [(3, 32, 32, 65), (1, 37, 113, 1)])
@pytest.mark.parametrize("loss", LOSSES)
def test_error_is_bounded_by_plain_torch(
    loss: str, engine: str, kind: str, dtype: torch.dtype, p: int, n: int, m: int, d: int
) -> None:
    inputs = features(p, n, m, d, dtype, kind)
    rules = ["positive"] if loss.startswith("sup_con") else RULES
    for rule in rules:
        options = {**labels_and_weights(p, n, m, weighted=rule == "ignore"), "same_label": rule, "temperature": 0.05}
        ours, usual = partial(call, loss, backend=engine), partial(plain_torch, loss)
        actual = assert_as_exact_as_plain_torch(ours, usual, inputs, **options)
        assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert [g.dtype for g in actual[1:]] == [dtype, dtype]


@pytest.mark.parametrize("rule", ["ignore", "positive"])
@pytest.mark.parametrize(("p", "n", "m", "d"), [(1, 200, 900, 40), (130, 9, 17, 8), (2, 157, 159, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [0, 1 << 30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("loss", LOSSES)
def test_many_blocks(
    monkeypatch: pytest.MonkeyPatch, loss: str, kept: int, dtype: torch.dtype, p: int, n: int, m: int, d: int, rule: str
) -> None:
    """Blocks that divide nothing evenly: several problems a block, parts of a problem, chunks of widened keys."""
    monkeypatch.setattr(native, "CACHED_ROWS", 0)
    monkeypatch.setattr(native, "KEPT_BYTES", kept)
    monkeypatch.setattr(native, "BLOCK_BYTES", 4 * 1000 * 41)
    monkeypatch.setattr(native, "KEY_CHUNK", 100)
    inputs = features(p, n, m, d, dtype)
    options = {**labels_and_weights(p, n, m, weighted=True), "same_label": rule}
    assert_as_exact_as_plain_torch(partial(call, loss, backend="native"), partial(plain_torch, loss), inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("p", "n", "m", "d"), [(2, 37, 41, 2077), (1, 256, 256, 65), (40, 2, 3, 130)])
@pytest.mark.parametrize("loss", LOSSES)
def test_few_rows_of_many_features(loss: str, p: int, n: int, m: int, d: int, dtype: torch.dtype) -> None:
    inputs = features(p, n, m, d, dtype)
    options = {**labels_and_weights(p, n, m, weighted=True), "same_label": "positive"}
    assert_as_exact_as_plain_torch(partial(call, loss, backend="native"), partial(plain_torch, loss), inputs, **options)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 3, 15, 16, 17, 31, 33, 100])
@pytest.mark.parametrize("loss", ["info_nce", "symmetric", "siglip", "nt_xent"])
def test_every_instruction_set(loss: str, level: int, dtype: torch.dtype, m: int) -> None:
    from seer_kernels import _native

    if level > _native.best_instruction_set():
        pytest.skip(f"this machine has no instruction set of level {level}")
    n = max(1, m - 2)
    inputs = features(2, n, m, 19, dtype)
    options = {**labels_and_weights(2, n, m, weighted=True), "same_label": "positive"}
    try:
        _native.limit_instruction_set(level)
        assert _native.instruction_set() == level
        assert_as_exact_as_plain_torch(
            partial(call, loss, backend="native"), partial(plain_torch, loss), inputs, **options
        )
    finally:
        _native.limit_instruction_set(_native.best_instruction_set())


@pytest.mark.parametrize("loss", ["info_nce", "symmetric", "siglip", "nt_xent"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_the_result(backend: str, loss: str) -> None:
    """Enough work for five threads to have some."""
    inputs = features(1, 1200, 2300, 8, torch.float32)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(value_and_gradients(partial(call, loss, backend=backend), inputs))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, engine: str, normalize: bool, reduction: str) -> None:
    query, key = (x.requires_grad_() for x in features(2, 4, 7, 3))
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, -0.3)]
    options = {**labels_and_weights(2, 4, 7, weighted=True), "same_label": "positive"}
    options.update(normalize=normalize, reduction=reduction, backend=engine)

    def value(query: Tensor, key: Tensor, temperature: Tensor, bias: Tensor | None = None) -> Tensor:
        bias_option = {} if bias is None else {"bias": bias}
        return call(loss, query, key, temperature=temperature, **bias_option, **options)

    inputs = (query, key, *scalars) if loss == "siglip" else (query, key, scalars[0])
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["query", "key", "temperature"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ["info_nce", "symmetric", "siglip", "nt_xent"])
def test_gradient_of_one_input_alone(loss: str, backend: str, side: str, reduction: str) -> None:
    query, key = features(1, 6, 9, 5)
    inputs = {"query": query, "key": key, "temperature": torch.tensor(0.4, dtype=torch.float64)}
    every = value_and_gradients(partial(call, loss, reduction=reduction, backend=backend), list(inputs.values()))
    inputs[side] = inputs[side].clone().requires_grad_()
    alone = call(loss, **inputs, reduction=reduction, backend=backend)
    generator = torch.Generator().manual_seed(alone.numel())
    cotangent = torch.rand(alone.shape, generator=generator, dtype=torch.float64) + 0.5
    (gradient,) = torch.autograd.grad((alone * cotangent).sum(), inputs[side])
    torch.testing.assert_close(gradient, every[1 + list(inputs).index(side)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["info_nce", "symmetric", "sup_con"])
def test_products_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """The last block of 70000 x 70000 products, as the problem of its rows (and, in their columns, of no others)."""
    n, blocks = 70_000, native._Sweep.blocks
    query, key = features(1, n, n, 2)
    labels = torch.arange(n) % 5
    last = n % (native.BLOCK_BYTES // (8 * n))
    assert last > 1
    tail = slice(n - last, n)
    monkeypatch.setattr(native._Sweep, "blocks", lambda sweep, rows: list(blocks(sweep, rows))[-1:])

    def whole(query: Tensor, key: Tensor) -> Tensor:
        return call(loss, query, key, query_labels=labels, backend="native", reduction="none")[:, tail]

    def alone(query: Tensor, key: Tensor) -> Tensor:
        query, own, others = query[:, tail], key[:, tail], key[:, : n - last]
        if loss == "sup_con":
            return call(loss, query, key, query_labels=labels[tail], backend="reference", reduction="none")
        rows = info_nce(query, torch.cat([own, others], 1), backend="reference", reduction="none")
        columns = info_nce(own, query, backend="reference", reduction="none")
        return rows if loss == "info_nce" else (rows + columns) / 2

    for got, expected in zip(
        value_and_gradients(whole, [query, key]), value_and_gradients(alone, [query, key]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_work_that_nobody_asked_for_is_not_done(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    monkeypatch.setattr(native, "CACHED_ROWS", 0)  # the library's products can be counted
    monkeypatch.setattr(
        native,
        "_multiply",
        lambda *args, wrapped=native._multiply, **kwargs: (products.append(1), wrapped(*args, **kwargs)),
    )
    query, key = features(1, 8, 8, 4)
    expected = {(): 1, ("query",): 2, ("key",): 2, ("query", "key"): 3}
    for needed, count in expected.items():
        products.clear()
        loss = info_nce(
            query.clone().requires_grad_("query" in needed),
            key.clone().requires_grad_("key" in needed),
            backend=backend,
        )
        if needed:
            loss.backward()
        assert len(products) == (count if backend == "native" else 0), needed


def test_the_requested_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for module in (native, reference):
        name = module.__name__.rsplit(".", 1)[1]
        monkeypatch.setattr(
            module, "forward", lambda *a, name=name, wrapped=module.forward: (ran.append(name), wrapped(*a))[1]
        )
    query, key = features(1, 3, 3, 2)
    for backend, expected in (("reference", "reference"), ("native", "native"), ("auto", "native")):
        info_nce(query, key, backend=backend)
        assert ran.pop() == expected
        assert not ran


def test_missing_backend_is_named_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    status = _dispatch.BackendStatus("native", (), "the compiled module cannot be imported: not built")
    monkeypatch.setattr(_dispatch, "_native_status", lambda: status)
    query, key = features(1, 3, 3, 2)
    assert torch.isfinite(info_nce(query, key)).all()
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run on cpu: .*not built.*'reference'"):
        info_nce(query, key, backend="native")


def test_sources_that_hide_what_is_installed_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `python -m seer_kernels.info` finds them in a clone, whose folder comes first on the path."""
    monkeypatch.setitem(sys.modules, "seer_kernels._native", None)
    monkeypatch.delattr(seer_kernels, "_native", raising=False)
    monkeypatch.setattr(_dispatch, "_ROOT", tmp_path)
    assert "cannot be imported" in _dispatch._native_status.__wrapped__().reason
    assert str(tmp_path) not in _dispatch._native_status.__wrapped__().reason
    (tmp_path / "setup.py").touch()
    assert f"{tmp_path} holds the sources: run in another folder" in _dispatch._native_status.__wrapped__().reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["info_nce", "symmetric", "siglip"])
def test_padding_is_as_if_it_did_not_exist(loss: str, backend: str) -> None:
    """A problem with rows of weight 0 equals the problem without them, bank included, and they get no gradient."""
    query, key = features(1, 7, 12, 5)
    weights = torch.tensor([[1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 0.0]], dtype=torch.float64)
    keep = [0, 2, 3, 5]
    ours = partial(call, loss, backend=backend)
    padded = value_and_gradients(ours, [query, key], weights=weights)
    short = value_and_gradients(ours, [query[:, keep], key[:, [*keep, *range(7, 12)]]], weights=weights[:, keep])
    torch.testing.assert_close(padded[0], short[0])
    torch.testing.assert_close(padded[1][:, keep], short[1])
    torch.testing.assert_close(padded[2][:, [*keep, *range(7, 12)]], short[2])
    assert padded[1][:, [1, 4, 6]].eq(0).all()
    assert padded[2][:, [1, 4, 6]].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_degenerate_problems_have_defined_results(backend: str, reduction: str) -> None:
    def run(p: int, n: int, m: int, loss: str = "info_nce", **options: Any) -> list[Tensor]:
        ours = partial(call, loss, reduction=reduction, backend=backend)
        result = value_and_gradients(ours, features(p, n, m, 4), **options)
        assert all(torch.isfinite(x).all() for x in result)
        return result

    assert run(1, 1, 1)[0].eq(0).all()  # one pair and nothing else: certain
    assert run(2, 3, 3, weights=torch.zeros(2, 3))[0].eq(0).all()  # no pair exists
    assert run(2, 3, 3, weights=torch.zeros(2, 3))[1].eq(0).all()
    assert run(1, 0, 0)[0].sum() == 0
    assert run(1, 0, 5)[2].eq(0).all()  # keys without a query
    assert run(0, 3, 3)[0].numel() == 0
    same = torch.zeros(1, 3, dtype=torch.int64)
    assert run(1, 3, 3, query_labels=same, same_label="ignore")[0].eq(0).all()  # no negative is left
    assert run(1, 3, 3, "sup_con", query_labels=torch.arange(3))[0].eq(0).all()  # no row has a positive
    assert run(1, 1, 1, "sup_con")[1].eq(0).all()  # nothing to compare with
    assert run(1, 2, 5, "sup_con_keys", query_labels=same[:, :2], key_labels=torch.ones(1, 5).int())[0].eq(0).all()
    for loss in LOSSES:
        run(0, 3, 3, loss)
        run(2, 0, 0, loss)
        run(2, 1, 1, loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_compare_to_nothing(backend: str) -> None:
    query, key = features(1, 4, 4, 3)
    query[0, 1], key[0, 2] = 0.0, 0.0
    value, query_gradient, key_gradient = value_and_gradients(info_nce, [query, key], backend=backend)
    torch.testing.assert_close(value, value_and_gradients(partial(plain_torch, "info_nce"), [query, key])[0])
    assert query_gradient[0, 1].eq(0).all()
    assert key_gradient[0, 2].eq(0).all()
    assert torch.isfinite(query_gradient).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_are_not_hidden(backend: str, bad: float) -> None:
    query, key = features(1, 40, 40, 3, torch.float32)
    key[0, 33, 1] = bad
    for loss in LOSSES:
        inputs = (key, query) if loss == "sup_con" else (query, key)
        assert not torch.isfinite(call(loss, *inputs, backend=backend)).any(), loss
    with pytest.raises(ValueError, match=r"key must be finite; row \(0, 33\)"):
        info_nce(query, key, backend=backend, validate=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_temperatures(backend: str, temperature: float, dtype: torch.dtype) -> None:
    for kind in ("random", "opposed"):
        inputs = features(1, 20, 20, 8, dtype, kind)
        for loss in LOSSES:
            ours, usual = partial(call, loss, backend=backend), partial(plain_torch, loss)
            assert_as_exact_as_plain_torch(ours, usual, inputs, temperature=temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend: str) -> None:
    key = torch.eye(3, 4, dtype=torch.float64).expand(2, 3, 4)
    query = torch.tensor([[1.0, 0, 0, 0], [0, 0, 2.0, 0], [1.0, 0, 1.0, 0]], dtype=torch.float64).expand(2, 3, 4)
    loss, stats = info_nce(query, key, return_stats=True, backend=backend)
    half = 0.5**0.5
    torch.testing.assert_close(stats.positive_similarity, torch.tensor([(1 + 0 + half) / 3] * 2, dtype=torch.float64))
    torch.testing.assert_close(stats.negative_similarity, torch.tensor([(0 + 0.5 + half / 2) / 3] * 2).double())
    # Row 1 ranks another key first; row 2 ties its own key with key 0, and a tie is a miss.
    torch.testing.assert_close(stats.top1_accuracy, torch.tensor([1 / 3] * 2, dtype=torch.float64))
    torch.testing.assert_close(loss, info_nce(query, key, backend=backend))
    weighted = info_nce(
        query, key, weights=torch.tensor([3.0, 1.0, 0.0]).expand(2, 3), return_stats=True, backend=backend
    )[1]
    torch.testing.assert_close(weighted.top1_accuracy, torch.tensor([3 / 4] * 2, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_broadcast_rows(backend: str) -> None:
    """Any strides, no leading dimension or several, labels and weights shared by all problems."""
    base = torch.randn(5, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key = base.permute(1, 2, 0, 3)[..., ::2], base[:, :1, :1].expand(5, 3, 2, 8).permute(1, 2, 0, 3)[..., 1::2]
    labels, weights = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])
    options: dict[str, Any] = {"query_labels": labels, "weights": weights, "same_label": "ignore", "backend": backend}
    together = info_nce(query, key, **options)
    assert together.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            alone = info_nce(query[i, j].clone(), key[i, j].clone(), **options)
            torch.testing.assert_close(together[i, j], alone)
    strided, dense = base[:, 0, 0, ::2], base[:, 0, 0, ::2].clone()  # one problem whose rows are not contiguous
    for got, want in zip(
        value_and_gradients(lambda q, k: info_nce(q[:, 0], k[:, 0], backend=backend), [strided[:, None]] * 2),
        value_and_gradients(lambda q, k: info_nce(q, k, backend=backend), [dense] * 2),
        strict=True,
    ):
        torch.testing.assert_close(got.reshape(want.shape), want)


@given(
    n=st.integers(1, 9),
    extra=st.integers(0, 6),
    d=st.integers(1, 5),
    seed=st.integers(0, 99),
    scale=st.floats(0.01, 100.0),
)
@settings(max_examples=40, deadline=None)
def test_properties(n: int, extra: int, d: int, seed: int, scale: float) -> None:
    """Scaling a row changes nothing; permuting the pairs permutes the losses; another negative raises every loss."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, n + extra))
    losses = info_nce(query, key, reduction="none")
    torch.testing.assert_close(info_nce(query * scale, key / scale, reduction="none"), losses, rtol=1e-9, atol=1e-9)
    order = torch.randperm(n, generator=generator)
    shuffled = info_nce(query[order], torch.cat([key[:n][order], key[n:]]), reduction="none")
    torch.testing.assert_close(shuffled, losses[order], rtol=1e-9, atol=1e-9)
    more = info_nce(
        query, torch.cat([key, torch.randn(1, d, generator=generator, dtype=torch.float64)]), reduction="none"
    )
    assert (more >= losses - 1e-12).all()
