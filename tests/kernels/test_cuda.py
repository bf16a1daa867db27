"""The native backend on a GPU: exactness, streams, graphs, devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from oracle import assert_as_exact_as_plain_torch, plain_torch, value_and_gradients
from torch import Tensor

from seer_kernels import info_nce
from seer_kernels.contrastive import native
from seer_kernels.contrastive.problem import SAME_LABEL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

DEVICE = "cuda"
SHAPES = [(1, 1, 1, 1), (2, 6, 37, 5), (1, 64, 64, 32), (3, 33, 1030, 16), (1, 4, 40000, 8)]
"""Problems, queries, keys, features: a warp per row, a block per row, more than shared memory holds."""


def on_device(*tensors: Tensor, device: str = DEVICE, **options: Any) -> Tensor:
    """info_nce by the native backend on a GPU, of tensors on the CPU; the result is on the CPU, too."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    return info_nce(*(t.to(device) for t in tensors), backend="native", **moved).cpu()


def make(p: int, n: int, m: int, d: int, dtype: torch.dtype, *, weighted: bool) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(m)
    query, key = (torch.randn(p, rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, m))
    labels = torch.randint(0, 4, (p, m), generator=generator)
    options: dict[str, Any] = {"query_labels": labels[:, :n].clone(), "key_labels": labels}
    if weighted:
        options["weights"] = torch.rand(p, n, generator=generator, dtype=torch.float64) + 0.1
        options["weights"][:, 1::3] = 0.0
    return [query, key], options


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", SAME_LABEL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_plain_torch(dtype: torch.dtype, rule: str, weighted: bool) -> None:
    for shape in SHAPES:
        inputs, options = make(*shape, dtype, weighted=weighted)
        assert_as_exact_as_plain_torch(on_device, partial(plain_torch, "info_nce"), inputs, same_label=rule, **options)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_the_reference(reduction: str, normalize: bool) -> None:
    """All gradients, that of the temperature included, in fp64."""
    inputs, options = make(2, 9, 50, 6, torch.float64, weighted=True)
    inputs.append(torch.tensor(0.3, dtype=torch.float64))
    options |= {"reduction": reduction, "normalize": normalize, "same_label": "positive"}
    actual = value_and_gradients(on_device, inputs, **options)
    exact = value_and_gradients(lambda q, k, **o: info_nce(q, k, backend="reference", **o), inputs, **options)
    for got, true in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


def test_cuda_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(original, name)

    original = native._native
    monkeypatch.setattr(native, "_native", Spy())
    inputs, _ = make(1, 8, 8, 4, torch.float32, weighted=False)
    value_and_gradients(on_device, inputs)
    assert called == ["Operands_f32", "contrastive_rows_cuda_f32", "project_rows_cuda_f32", "project_rows_cuda_f32"]


def test_nothing_waits_for_the_device() -> None:
    (query, key), options = make(2, 9, 50, 6, torch.float32, weighted=True)
    leaves = [x.to(DEVICE).requires_grad_() for x in (query, key)]
    moved = {name: value.to(DEVICE) for name, value in options.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        info_nce(*leaves, temperature=0.2, same_label="positive", backend="native", **moved).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_orders_the_kernels() -> None:
    """Inputs that arrive late on a side stream: a kernel on any other stream would read NaN."""
    (query, key), _ = make(1, 64, 3000, 16, torch.float32, weighted=False)
    expected = value_and_gradients(on_device, [query, key])
    late = [torch.full_like(x, torch.nan, device=DEVICE).requires_grad_() for x in (query, key)]
    sources = [x.to(DEVICE) for x in (query, key)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for leaf, source in zip(late, sources, strict=True):
            leaf.data.copy_(source)
        actual = value_and_gradients(lambda q, k: info_nce(q, k, backend="native"), late)
    torch.cuda.synchronize()
    for got, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.cpu(), true, rtol=1e-5, atol=1e-7)


def test_a_graph_captures_forward_and_backward() -> None:
    """Replays follow new features, weights and a new temperature: the kernels read them on the device."""
    (query, key), options = make(2, 40, 1500, 16, torch.float32, weighted=True)
    inputs = [query, key, torch.tensor(0.3)]
    static = [x.to(DEVICE).requires_grad_() for x in inputs]
    static_options = {name: value.to(DEVICE) for name, value in options.items()}

    def step() -> list[Tensor]:
        loss = info_nce(
            *static[:2], temperature=static[2], same_label="ignore", backend="native", **static_options
        ).sum()
        return [loss, *torch.autograd.grad(loss, static)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    generator = torch.Generator().manual_seed(1)
    for temperature in (0.3, 0.7):
        for leaf in static[:2]:
            leaf.data.copy_(torch.randn(leaf.shape, generator=generator))
        static[2].data.fill_(temperature)
        static_options["weights"].copy_(static_options["weights"].roll(1, dims=-1))
        graph.replay()
        for got, true in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-7)


def test_tensors_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs, options = make(2, 9, 2000, 16, torch.float32, weighted=True)
    expected = value_and_gradients(on_device, inputs, same_label="ignore", **options)
    with torch.cuda.device(0):
        actual = value_and_gradients(on_device, inputs, device="cuda:1", same_label="ignore", **options)
        assert torch.cuda.current_device() == 0
    for got, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)
