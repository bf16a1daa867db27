"""What a call costs, counted rather than timed: products, operators, bytes.

They are the same on every machine: a change that makes calls slower by design is found where times would be noise.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import bench_loss
import bench_self
import harness
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from seer_kernels import backends, sinkhorn_from_cost

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif("cpu" not in backends()["native"].devices, reason=backends()["native"].reason)

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_FREE = (
    "as_strided select view to alias slice resolve_conj resolve_neg reshape mT transpose expand unsqueeze detach empty "
    "new_empty empty_strided empty_like item _local_scalar_dense is_nonzero lift_fresh"
)
FREE = {f"aten::{name}" for name in re.findall(r"\S+", _FREE)}
"""Operators that touch no elements."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Scratch memory of threads would make the counts those of a machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Costs(NamedTuple):
    products: float
    """Multiply-adds of library products, over rows x rows x features."""
    operators: int
    """Operators of torch that touch elements."""
    matrices: float
    """Peak memory above inputs and gradients, over rows x rows floats."""


LOSSES = (*bench_loss.LOSSES, *bench_self.LOSSES)


def call_of(loss: str, rows: int, width: int, dtype: torch.dtype) -> Callable[[], harness.Outputs]:
    """One call, forward and backward, by the native backend."""
    if loss in bench_loss.LOSSES:
        pairs = bench_loss.make_pairs(bench_loss.Size(1, rows, width, loss), dtype, CPU, 0)
        return lambda: bench_loss.by_backend("native", pairs)
    features = bench_self.make_rows(bench_self.Size(loss, rows, width), dtype, CPU, 0)
    return lambda: bench_self.ours(features)


def costs(loss: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Costs:
    call = call_of(loss, rows, width, dtype)
    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiled:
        call()
    events = profiled.events()
    flops = sum(event.flops or 0 for event in events if event.name in PRODUCTS)
    operators = sum(event.name.startswith("aten::") and event.name not in FREE for event in events)
    peak = harness.peak_memory(call, CPU)[0]
    return Costs(flops / (2 * rows**2 * width), operators, peak / (4 * rows**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("loss", "products", "operators"),
    [
        # the counts of the cost model: S, and a product for each gradient; half of S, and one for both
        ("info_nce", 3.0, 65),
        ("clip", 3.0, 250),
        ("siglip", 3.0, 65),
        ("nt_xent", 1.6, 195),
        ("sup_con", 1.6, 185),
    ],
)
def test_where_a_library_multiplies(loss: str, products: float, operators: int, dtype: torch.dtype) -> None:
    found = costs(loss, 1024, 256, dtype)
    assert 1.5 <= found.products <= products, found
    # half precision is widened block by block
    assert found.operators <= operators * (1 if dtype == torch.float32 else 1.5), found


@pytest.mark.parametrize(("loss", "operators"), list(zip(LOSSES, (45, 230, 47, 120, 140), strict=True)))
def test_small_problems_are_few_operators_and_no_library_products(loss: str, operators: int) -> None:
    found = costs(loss, 64, 512)
    assert found.products == 0, found
    assert found.operators <= operators, found
    # the products and the slopes; nt_xent stacks its views
    assert found.matrices <= 2.2 + (512 / 64 if loss == "nt_xent" else 0), found


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_and_operators_do_not_grow_with_the_square(loss: str) -> None:
    """With more rows than a block holds: less than a fifth of one N x N matrix, where idiomatic torch takes three."""
    found = costs(loss, 6144, 16)
    assert found.matrices <= 0.2, found
    assert found.operators <= 4 * costs(loss, 3072, 16).operators, found


def test_a_gradient_nobody_wants_is_not_formed() -> None:
    pairs = bench_loss.make_pairs(bench_loss.Size(1, 1024, 256), torch.float32, CPU, 0)

    def products(*wanted: str) -> float:
        query, key = (getattr(pairs, n).detach().requires_grad_(n in wanted) for n in ("query", "key"))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiled:
            loss = bench_loss.ours(query, key, "info_nce", "native")
            if wanted:
                loss.backward()
        flops = sum(event.flops or 0 for event in profiled.events() if event.name in PRODUCTS)
        return flops / (2 * 1024**2 * 256)

    assert products() == 1
    assert products("query") == products("key") == 2
    assert products("query", "key") == 3


def solve(batch: int, n: int, **options: Any) -> Callable[[], harness.Outputs]:
    cost = torch.rand(batch, n, n, generator=torch.Generator().manual_seed(0))

    def call() -> harness.Outputs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a stopping test nothing counts as converged
            return harness.Outputs(sinkhorn_from_cost(cost, tolerance=0.0, backend="native", **options).value, ())

    return call


def test_iterations_of_transport_start_no_operators() -> None:
    counts = []
    for iterations in (5, 50):
        call = solve(4, 30, max_iterations=iterations)
        call()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        counts.append(sum(event.name.startswith("aten::") for event in profiled.events()))
    assert counts[0] == counts[1] <= 250, counts


def test_transport_of_given_costs_stores_none_of_their_size() -> None:
    peak = harness.peak_memory(solve(16, 128, max_iterations=5), CPU)[0]
    assert peak <= 0.25 * 16 * 128 * 128 * 4, peak
