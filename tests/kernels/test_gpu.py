"""Every op of the package on a GPU, by every backend that serves it there: numbers, streams, graphs, several processes.

What only native kernels have is in test_cuda.py.

SEER_GPU_TESTS_ON=cpu runs on the CPU what has a meaning there, which is how the tests themselves are tested.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from across_ranks import launch
from oracle import LOSSES, assert_as_exact_as_plain_torch, call, plain_torch
from torch import Tensor

from seer_kernels import distributed, info_nce, ot_contrastive, sinkhorn, sinkhorn_divergence, sinkhorn_from_cost
from seer_kernels.contrastive.problem import SAME_LABEL

DEVICE = os.environ.get("SEER_GPU_TESTS_ON", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="has no meaning on the CPU")

SHAPES = {"small": (2, 33, 40, 48), "narrow": (1, 300, 520, 72), "wide": (2, 150, 170, 1500)}
"""Problems, queries, keys, features: none a multiple of a tile, and features below and above what a tile holds."""
FORMATS = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 3e-2}
"""Of points and costs in transport, with the largest relative error of the objective."""


@contextmanager
def served() -> Iterator[None]:
    """Skips what the backend says that it does not serve."""
    try:
        yield
    except RuntimeError as error:
        if "cannot run on" not in str(error):
            raise
        pytest.skip(str(error))


def features(p: int, n: int, m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + m + d)
    return [torch.randn(p, rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, m)]


def labels_and_weights(p: int, n: int, m: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n + m)
    key_labels = torch.randint(0, 4, (p, m), generator=generator)
    weights = torch.rand(p, n, generator=generator, dtype=torch.float64) + 0.1
    weights[:, 1::3] = 0.0
    return {"query_labels": key_labels[:, :n].clone(), "key_labels": key_labels, "weights": weights}


def on_device(name: str, *tensors: Tensor, **options: Any) -> Tensor:
    """A loss in LOSSES on the device, of tensors on the CPU; the result is on the CPU, too."""
    moved = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in options.items()}
    return call(name, *(t.to(DEVICE) for t in tensors), **moved).cpu()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_error_is_bounded_by_plain_torch(backend: str, loss: str, dtype: torch.dtype, shape: str) -> None:
    p, n, m, d = SHAPES[shape]
    turn = LOSSES.index(loss) + list(SHAPES).index(shape)
    options = {**labels_and_weights(p, n, m), "same_label": SAME_LABEL[turn % 3], "temperature": 0.2}
    with served():
        ours, usual = partial(on_device, loss, backend=backend), partial(plain_torch, loss)
        assert_as_exact_as_plain_torch(ours, usual, features(p, n, m, d, dtype), **options)


@pytest.mark.parametrize("dtype", FORMATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["native", "triton", "auto"])
def test_transport_against_the_reference(backend: str, dtype: torch.dtype) -> None:
    """Ragged clouds, annealed and relaxed ones: objective and gradients."""
    x, y = (points.to(dtype) for points in features(5, 37, 29, 6, torch.float64))
    lengths = {"x_lengths": torch.tensor([37, 5, 1, 20, 36]), "y_lengths": torch.tensor([29, 29, 3, 1, 10])}
    tail = {"eps": 0.1, "scale_cost": "mean", "max_iterations": 3000, "tolerance": 1e-5}
    for relaxed in ({}, {"tau_a": 0.7, "tau_b": 0.7}):
        exact: list[Tensor] = []
        got: list[Tensor] = []
        for device, kind, name, to in (("cpu", torch.float64, "reference", exact), (DEVICE, dtype, backend, got)):
            clouds = [points.to(device, kind).requires_grad_() for points in (x, y)]
            where = {key: value.to(device) for key, value in lengths.items()}
            with served():
                value = sinkhorn(*clouds, **where, **tail, **relaxed, backend=name).value
            to += [value, *torch.autograd.grad(value.sum(), clouds)]
        for result, true in zip(got, exact, strict=True):
            error = (result.detach().cpu().double() - true.detach()).abs().max() / true.detach().abs().max()
            assert error <= (FORMATS[dtype] if dtype != torch.float64 else 1e-4), error


@pytest.mark.parametrize("keys", [60, 9000])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_normalisations_against_the_reference(backend: str, keys: int) -> None:
    """Rows of costs that stay in registers and streamed ones; relaxed marginals, keys without a query."""
    options = {"temperature": 0.1, "iterations": 4, "tau": (0.7, None)}
    results = []
    for device, dtype, name in (("cpu", torch.float64, "reference"), (DEVICE, torch.float32, backend)):
        leaves = [x[0].to(device, dtype).requires_grad_() for x in features(1, 40, keys, 16, torch.float32)]
        labels = {"query_labels": torch.arange(40, device=device), "key_labels": torch.arange(keys, device=device) % 50}
        with served():
            loss = ot_contrastive(*leaves, **options, **labels, backend=name)
        results.append([x.cpu().double() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    for exact, got in zip(*results, strict=True):
        assert (got - exact).abs().max() <= FORMATS[torch.float32] * exact.abs().max()


def of_every_op(backend: str = "auto", rows: int = 40) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The public functions by name, of query [rows, D] and key [rows, D]; the result is 0-d."""
    labels = torch.arange(rows, device=DEVICE) // 3
    tail = {"eps": 0.2, "max_iterations": 20, "tolerance": 0.0, "backend": backend}

    def quietly(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, y: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # without a stopping test nothing counts as converged
                return loss(x, y)

        return run

    ops = {name: partial(call, name, query_labels=labels, key_labels=labels, backend=backend) for name in LOSSES}
    ops["sinkhorn_from_cost"] = quietly(lambda x, y: sinkhorn_from_cost(torch.cdist(x, y), **tail).value)
    ops["sinkhorn_divergence"] = quietly(lambda x, y: sinkhorn_divergence(x, y, **tail))
    ops["ot_contrastive"] = quietly(lambda x, y: ot_contrastive(x, y, backend=backend))
    return ops


def step(loss: Callable[[Tensor, Tensor], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    value = loss(*leaves).sum()
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)]


def leaves_of(rows: int = 40, width: int = 24) -> list[Tensor]:
    return [x[0].to(DEVICE).requires_grad_() for x in features(1, rows, rows, width, torch.float32)]


def assert_alike(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)


OPS = list(of_every_op()) if DEVICE == "cpu" or torch.cuda.is_available() else LOSSES


@pytest.mark.parametrize("op", OPS)
def test_the_current_stream_orders_the_work(op: str) -> None:
    """Inputs that arrive late on a side stream: whatever ran on another one would read NaN."""
    loss, leaves = of_every_op()[op], leaves_of()
    expected = step(loss, leaves)
    late = [torch.full_like(x, torch.nan).requires_grad_() for x in leaves]
    if DEVICE == "cpu":
        for leaf, source in zip(late, leaves, strict=True):
            leaf.data.copy_(source)
        assert_alike(step(loss, late), expected)
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for leaf, source in zip(late, leaves, strict=True):
            leaf.data.copy_(source)
        actual = step(loss, late)
    torch.cuda.synchronize()
    assert_alike(actual, expected)


@needs_cuda
@pytest.mark.parametrize("rows", [40, 700])
@pytest.mark.parametrize("op", LOSSES)
def test_a_graph_captures_forward_and_backward(op: str, rows: int) -> None:
    loss, leaves = of_every_op(rows=rows)[op], leaves_of(rows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(loss, leaves)  # compiles and tunes
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, leaves)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for leaf in leaves:
            leaf.data.copy_(torch.randn(leaf.shape, generator=generator))
        graph.replay()
        assert_alike(captured, step(loss, leaves))


@pytest.mark.parametrize("op", OPS)
def test_compiles(op: str) -> None:
    loss, leaves = of_every_op()[op], leaves_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations while it compiles
        # transport may warn that it did not converge, from Python: a graph break
        compiled = torch.compile(lambda x, y: loss(2 * x, y), fullgraph=op in LOSSES)
        assert_alike(step(compiled, leaves), step(lambda x, y: loss(2 * x, y), leaves))


@needs_cuda
def test_memory_does_not_grow_with_calls() -> None:
    ops, leaves = of_every_op(), leaves_of()
    for loss in ops.values():
        step(loss, leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for loss in ops.values():
        step(loss, leaves)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def of_all_ranks(backend: str, modes: tuple[str, ...]) -> list[list[Tensor]]:
    """Loss and gradients of this rank's samples, by mode; all ranks use the one device unless there are as many."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank % torch.cuda.device_count()}" if DEVICE == "cuda" else DEVICE
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    group = dist.new_group(backend=backend)
    results = []
    for mode in modes:
        query, key = features(1, 20, 20, 16, torch.float32)
        own = [x[0].chunk(world)[rank].to(device).requires_grad_() for x in (query, key)]
        loss = distributed.info_nce(*own, mode=mode, group=group)
        results.append([x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss / world, own))])
    return results


@pytest.mark.parametrize(
    ("backend", "modes"),
    [("gloo", ("gather",)), pytest.param("nccl", distributed.MODES, marks=needs_cuda)],
    ids=["gloo", "nccl"],
)
def test_two_processes(backend: str, modes: tuple[str, ...], tmp_path: Path) -> None:
    """With gloo both on one device; it sends nothing from GPU to GPU, so keys are gathered. NCCL wants two devices."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one process per device, and there is one")
    ranks = launch(2, of_all_ranks, tmp_path, backend, modes, timeout=90)
    assert None not in ranks, "a process died"
    leaves = [x[0].double().requires_grad_() for x in features(1, 20, 20, 16, torch.float32)]
    expected = step(partial(info_nce, backend="reference"), leaves)
    for which in range(len(modes)):
        losses, *gradients = zip(*(rank[which] for rank in ranks), strict=True)
        whole = [losses[0], *(torch.cat(parts) for parts in gradients)]
        for got, want in zip(whole, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
