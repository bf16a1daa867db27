"""The native backend on a GPU: exactness, streams, graphs, devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracle import BIAS, LOSSES, assert_as_exact_as_plain_torch, call, plain_torch, value_and_gradients
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from seer_kernels import info_nce, sinkhorn, sinkhorn_from_cost
from seer_kernels.contrastive import native
from seer_kernels.contrastive.problem import SAME_LABEL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

DEVICE = "cuda"
SHAPES = [(1, 1, 1, 1), (2, 6, 37, 5), (1, 64, 64, 32), (3, 33, 1030, 16), (1, 4, 40000, 8)]
"""Problems, queries, keys, features: a warp per row, a block per row, more than shared memory holds."""

SMALL = [(1, 1, 1, 1), (2, 6, 11, 5), (3, 32, 32, 4096), (2, 40, 70, 260), (1, 256, 256, 129), (500, 8, 9, 64)]
"""One launch each way: one block, no whole packs, many slices, several tiles, the most of them, many problems."""

EITHER_PATH = pytest.mark.parametrize("shape", [(2, 40, 1500, 16), (2, 40, 70, 260)], ids=["library", "fused"])


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
    inputs, _ = make(1, 8, 300, 4, torch.float32, weighted=False)
    value_and_gradients(on_device, inputs)
    assert called == ["Operands_f32", "contrastive_rows_cuda_f32", "project_rows_cuda_f32", "project_rows_cuda_f32"]
    called.clear()
    value_and_gradients(on_device, [x[:, :8] for x in inputs])
    assert [name for name in called if "cuda" in name] == ["fused_loss_cuda_f32", "fused_gradients_cuda_f32"]


def any_on_device(name: str, *tensors: Tensor, **options: Any) -> Tensor:
    """A loss in LOSSES by the native backend on a GPU, of tensors on the CPU; the result is on the CPU, too."""
    moved = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in options.items()}
    return call(name, *(t.to(DEVICE) for t in tensors), backend="native", **moved).cpu()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_small_problems_of_every_loss(name: str, dtype: torch.dtype) -> None:
    for which, shape in enumerate(SMALL):
        inputs, options = make(*shape, dtype, weighted=which % 2 == 1)
        options["same_label"] = SAME_LABEL[which % 3]
        assert_as_exact_as_plain_torch(partial(any_on_device, name), partial(plain_torch, name), inputs, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_small_problems_against_the_reference(name: str, reduction: str) -> None:
    """All gradients, those of temperature and bias included, in fp64."""
    inputs, options = make(2, 40, 70, 260, torch.float64, weighted=True)
    inputs.append(torch.tensor(0.3, dtype=torch.float64))
    inputs += [torch.tensor(BIAS, dtype=torch.float64)] * (name == "siglip")
    options |= {"reduction": reduction, "same_label": "ignore"}
    actual = value_and_gradients(partial(any_on_device, name), inputs, **options)
    exact = value_and_gradients(partial(call, name, backend="reference"), inputs, **options)
    for got, true in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-11)


def test_small_problems_are_the_same_bit_for_bit() -> None:
    inputs, options = make(3, 64, 64, 2048, torch.float32, weighted=False)
    first, *others = (value_and_gradients(partial(any_on_device, "symmetric"), inputs, **options) for _ in range(20))
    for other in others:
        for got, true in zip(other, first, strict=True):
            torch.testing.assert_close(got, true, rtol=0, atol=0)


def kernels_of(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that `run` launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith(("Mem", "cuda"))]


def test_small_problems_are_one_launch_each_way() -> None:
    torch.use_deterministic_algorithms(False)  # which fills fresh memory
    (query, key), _ = make(3, 32, 32, 4096, torch.float32, weighted=False)
    leaves = [x.to(DEVICE).requires_grad_() for x in (query, key)]
    upstream = torch.ones(3, device=DEVICE)
    losses = [info_nce(*leaves, backend="native")]  # warm
    forward = kernels_of(lambda: losses.append(info_nce(*leaves, backend="native")))
    assert len(forward) == 1, forward
    assert "fused_loss_kernel" in forward[0]
    backward = kernels_of(lambda: torch.autograd.grad(losses[-1], leaves, upstream))
    assert sum("fused_gradients_kernel" in name for name in backward) == 1, backward
    assert len(backward) <= 2, backward  # the other divides what arrives by the rows


def test_small_problems_on_concurrent_streams() -> None:
    """Launches that overlap share no memory: eager ones, and replays of graphs captured on one stream."""
    cases = [make(1, 40, 70, 1000 + seed, torch.float32, weighted=False)[0] for seed in range(4)]
    expected = [info_nce(query.double(), key.double(), backend="reference") for query, key in cases]
    moved = [[x.to(DEVICE) for x in case] for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    info_nce(*moved[0], backend="native")
    graphs, captured = [], []
    for case in moved:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(info_nce(*case, backend="native"))
        graphs.append(graph)
    torch.cuda.synchronize()
    for _ in range(50):
        eager = []
        for stream, case, graph in zip(streams, moved, graphs, strict=True):
            with torch.cuda.stream(stream):
                eager.append(info_nce(*case, backend="native"))
                graph.replay()
        torch.cuda.synchronize()
        for results in (eager, captured):
            for got, true in zip(results, expected, strict=True):
                torch.testing.assert_close(got.cpu().double(), true, rtol=1e-5, atol=1e-6)


def test_nothing_waits_for_the_device() -> None:
    (query, key), options = make(2, 9, 50, 6, torch.float32, weighted=True)
    leaves = [x.to(DEVICE).requires_grad_() for x in (query, key)]
    moved = {name: value.to(DEVICE) for name, value in options.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        info_nce(*leaves, temperature=0.2, same_label="positive", backend="native", **moved).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EITHER_PATH
def test_the_current_stream_orders_the_kernels(shape: tuple[int, int, int, int]) -> None:
    """Inputs that arrive late on a side stream: a kernel on any other stream would read NaN."""
    (query, key), _ = make(*shape, torch.float32, weighted=False)
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


@EITHER_PATH
def test_a_graph_captures_forward_and_backward(shape: tuple[int, int, int, int]) -> None:
    """Replays follow new features, weights and a new temperature: the kernels read them on the device."""
    (query, key), options = make(*shape, torch.float32, weighted=True)
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


@EITHER_PATH
def test_tensors_on_another_device_than_the_current_one(shape: tuple[int, int, int, int]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs, options = make(*shape, torch.float32, weighted=True)
    expected = value_and_gradients(on_device, inputs, same_label="ignore", **options)
    with torch.cuda.device(0):
        actual = value_and_gradients(on_device, inputs, device="cuda:1", same_label="ignore", **options)
        assert torch.cuda.current_device() == 0
    for got, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)


TRANSPORT_SIZES = [(3, 1, 1), (5, 16, 9), (300, 33, 20), (2, 100, 128), (2, 128, 128), (3, 200, 140), (2, 300, 500)]
"""Problems and points: in registers up to 128 x 128 in fp32, then in shared memory, then in scratch memory."""


def transport_inputs(B: int, n: int, m: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Costs between clouds, and weights, some of them 0."""
    generator = torch.Generator().manual_seed(n + m)
    x, y = (torch.randn(B, points, 2, generator=generator, dtype=torch.float64) for points in (n, m))
    a, b = (torch.rand(B, points, generator=generator, dtype=torch.float64) + 0.1 for points in (n, m))
    if n > 2:
        a[:, 1::3] = 0.0
    inputs = [torch.cdist(x, y).square(), a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)]
    return [v.to(dtype) for v in inputs]


def transported(inputs: list[Tensor], device: str, backend: str, **options: Any) -> list[Tensor]:
    """Results, and the gradients of some of them to costs and weights, on the CPU."""
    leaves = [x.to(device).requires_grad_() for x in inputs]
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    result = sinkhorn_from_cost(leaves[0], a=leaves[1], b=leaves[2], gradient="implicit", backend=backend, **moved)
    total = result.value.sum() + 2 * result.transport_cost.sum() + result.f.square().sum()
    gradients = list(torch.autograd.grad(total, leaves))
    if options.get("tau_a") is None and options.get("tau_b") is None:  # to weights up to a constant
        for which in (1, 2):
            weighted = gradients[which] * inputs[which].to(device)
            gradients[which] = gradients[which] - weighted.sum(-1, keepdim=True)
    return [v.detach().cpu() for v in (result.value, result.transport_cost, result.f, result.g, *gradients)]


@pytest.mark.parametrize("scale", [None, "mean", "max"])
@pytest.mark.parametrize("relaxed", [(None, None), (0.7, 0.2)])
def test_transport_against_the_reference(relaxed: tuple[Any, Any], scale: str | None) -> None:
    options = {"tau_a": relaxed[0], "tau_b": relaxed[1], "eps": 0.3, "scale_cost": scale, "tolerance": 1e-11}
    for size in TRANSPORT_SIZES:
        inputs = transport_inputs(*size)
        actual = transported(inputs, DEVICE, "native", max_iterations=5000, **options)
        expected = transported(inputs, "cpu", "reference", max_iterations=5000, **options)
        for got, true in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-7)


def test_transport_in_single_precision() -> None:
    """Ragged, each problem with its own eps, the smallest ones annealed and absorbed."""
    for B, n, m in TRANSPORT_SIZES:
        inputs = transport_inputs(B, n, m)
        inputs[1], inputs[2] = torch.full_like(inputs[1], 1 / n), torch.full_like(inputs[2], 1 / m)
        options = {"eps": torch.logspace(0, -2, B, dtype=torch.float64), "scale_cost": "mean", "max_iterations": 5000}
        exact = sinkhorn_from_cost(inputs[0], **options, tolerance=1e-8)
        options["eps"] = options["eps"].float().to(DEVICE)
        result = sinkhorn_from_cost(inputs[0].float().to(DEVICE), **options, tolerance=5e-4, backend="native")
        assert result.converged.all()
        torch.testing.assert_close(result.value.cpu().double(), exact.value, rtol=2e-4, atol=1e-5)


def test_transport_is_one_launch_each_way_and_the_same_bit_for_bit() -> None:
    torch.use_deterministic_algorithms(False)  # which fills fresh memory
    cost = transport_inputs(200, 100, 90, torch.float32)[0].to(DEVICE).requires_grad_()
    results = [sinkhorn_from_cost(cost, gradient="implicit", backend="native")]  # warm
    forward = kernels_of(
        lambda: results.append(sinkhorn_from_cost(cost, gradient="implicit", eps=0.5, backend="native"))
    )
    assert sum("sinkhorn_solve_kernel" in name for name in forward) == 1, forward
    gradients = []
    total = results[-1].transport_cost.sum()
    backward = kernels_of(lambda: gradients.extend(torch.autograd.grad(total, cost, retain_graph=True)))
    assert sum("sinkhorn_gradient_kernel" in name for name in backward) == 1, backward
    for _ in range(5):
        again = sinkhorn_from_cost(cost, gradient="implicit", eps=0.5, backend="native")
        torch.testing.assert_close(again.f, results[-1].f, rtol=0, atol=0)
        gradients.extend(torch.autograd.grad(again.transport_cost.sum(), cost))
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(4, 50, 40), (200, 300, 500)], ids=["registers", "scratch"])
def test_a_graph_captures_transport_and_its_gradient(size: tuple[int, int, int]) -> None:
    """Replays follow new costs; nothing waits, so a problem that cannot be used is NaN and no other is."""
    costs = [transport_inputs(*size, torch.float32)[0] for _ in range(2)]
    costs[1] = costs[1] + torch.rand(size, generator=torch.Generator().manual_seed(0))
    static = costs[0].to(DEVICE).requires_grad_()

    def step() -> list[Tensor]:
        result = sinkhorn_from_cost(static, eps=0.5, max_iterations=30, tolerance=0.5, backend="native")
        return [result.value, *torch.autograd.grad(result.value.sum(), static)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for cost in costs:
        static.data.copy_(cost)
        graph.replay()
        for got, true in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, true, rtol=0, atol=0)
    static.data[1, 0, 0] = torch.nan
    graph.replay()
    assert captured[0].isnan().nonzero().flatten().tolist() == [1]
    with pytest.raises(ValueError, match="problem 1 holds NaN"):
        step()


def test_transport_on_the_current_stream_and_another_device() -> None:
    """Costs that arrive late on a side stream: a kernel on any other stream would read NaN."""
    cost = transport_inputs(4, 40, 30, torch.float32)[0]
    expected = sinkhorn_from_cost(cost.double(), eps=0.5, tolerance=1e-8).value
    late, source = torch.full_like(cost, torch.nan, device=DEVICE), cost.to(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        late.copy_(source)
        value = sinkhorn_from_cost(late, eps=0.5, backend="native").value
    torch.cuda.synchronize()
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    if torch.cuda.device_count() > 1:
        with torch.cuda.device(0):
            value = sinkhorn_from_cost(cost.to("cuda:1"), eps=0.5, backend="native").value
            assert torch.cuda.current_device() == 0
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ground", ["sqeuclidean", "euclidean", "cosine"])
def test_transport_between_clouds(ground: str) -> None:
    """Costs are exact far from the origin and for duplicated points, also where products may be rounded to tf32."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, points, 300, generator=generator) for points in (60, 50))
    y[:, 5] = x[:, 3]
    if ground != "cosine":
        x, y = x + 100, y + 100
    exact = sinkhorn(x.double(), y.double(), cost=ground, eps=0.5, scale_cost="mean", tolerance=1e-8)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        result = sinkhorn(x.to(DEVICE), y.to(DEVICE), cost=ground, eps=0.5, scale_cost="mean", backend="native")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.testing.assert_close(result.cost.cpu().double(), exact.cost, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.value.cpu().double(), exact.value, rtol=1e-3, atol=1e-5)
