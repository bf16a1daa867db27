"""Losses over several processes, which gloo connects over the loopback interface, against one process."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from across_ranks import launch, lost_contact, run_checks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seer_kernels
from seer_kernels import _ranks, distributed

CHECKS = {
    2: ["losses", "half_precision_under_autocast", "cached_backward_reduces_once"],
    4: [
        "losses",
        "nothing_anywhere",
        "scalars_alone_and_keys_without_gradient",
        "two_backward_passes",
        "groups",
        "bytes_sent",
        "refused_arguments",
        "disagreements",
        "cached_backward_reduces_once",
        "memory_bank_of_all_ranks",
    ],
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """By number of ranks and check: what went wrong. All checks of a number of ranks share one set of processes."""
    found: dict[int, dict[str, str]] = {}
    for world, checks in CHECKS.items():
        results = launch(world, run_checks, tmp_path_factory.mktemp("ranks"), checks)
        assert None not in results, f"of {world} ranks, {[r for r, x in enumerate(results) if x is None]} died"
        found[world] = {check: text for result in results for check, text in result.items()}
    return found


@pytest.mark.parametrize(("world", "check"), [(world, check) for world, checks in CHECKS.items() for check in checks])
def test_ranks(failures: dict[int, dict[str, str]], world: int, check: str) -> None:
    assert check not in failures[world], failures[world][check]


def test_a_rank_that_hangs_or_dies_ends_in_an_error_that_names_the_step(tmp_path: Path) -> None:
    """The timeout of the groups is 3 seconds."""
    results = launch(4, lost_contact, tmp_path, timeout=100)
    assert results[1] is None, "rank 1 was to die"
    assert results[2] is None, "rank 2 was to die"
    for rank in (0, 3):
        of_ring, of_gather = results[rank][:2], results[rank][2]
        for message, seconds in of_ring:
            step = rf"rank {rank} of 4 lost contact while passing on keys in step \d of 3 of the ring, from rank"
            assert re.match(step, message)
            assert seconds < 20
        assert re.match(rf"rank {0 if rank == 0 else 2} of 3 lost contact while gathering keys", of_gather[0])
        assert of_gather[1] < 20


def test_without_process_groups_the_local_functions_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"seer_kernels\.distributed\.info_nce needs torch\.distributed"):
        distributed.info_nce(torch.randn(2, 3), torch.randn(2, 3))


class Echo(_ranks.Team):
    """One process that stands for `size` ranks with the same samples: what it hears is what it said."""

    def tell(self, numbers: Any, count: int) -> list[list[int]]:
        return [] if numbers is None else [list(numbers)] * self.size

    def gather(self, step: str, own: Tensor) -> Tensor:
        return own.expand(self.size, *own.shape).clone()

    def sum(self, step: str, value: Tensor) -> Tensor:
        return value * self.size

    def sum_home(self, step: str, values: Tensor) -> Tensor:
        return values.sum(0)

    def shift(self, step: str, outgoing: list[Tensor], incoming: list[Tensor]) -> list[Any]:
        for sent, received in zip(outgoing, incoming, strict=True):
            received.copy_(sent)
        return []


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at a time in tensors that were made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}  # by address of the storage: size, tensors
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                address = tensor.untyped_storage().data_ptr()
                self.live.setdefault(address, [tensor.untyped_storage().nbytes(), 0])[1] += 1
                weakref.finalize(tensor, self.release, address)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return output

    def release(self, address: int) -> None:
        self.live[address][1] -= 1
        if self.live[address][1] == 0:
            del self.live[address]


@pytest.mark.parametrize("mode", distributed.MODES)
def test_memory_of_many_ranks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the ring does not grow with the ranks; gathering keeps keys and gradients of all."""
    rows, width = 8, 512
    peaks = []
    for ranks in (5, 10):
        monkeypatch.setattr(distributed.Team, "of", lambda *_, ranks=ranks: Echo(None, 1, ranks))
        query, key = (torch.randn(rows, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
        with LiveBytes() as memory:
            loss = distributed.info_nce(query, key, mode=mode)
            loss.backward()
        peaks.append(memory.peak)
        expected = seer_kernels.info_nce(query.detach().repeat(ranks, 1), key.detach().repeat(ranks, 1))
        torch.testing.assert_close(loss.detach(), expected)
    keys = rows * width * 8
    if mode == "ring":
        assert peaks[1] < peaks[0] + keys / 2
        assert peaks[1] < 14 * keys
    else:
        assert peaks[1] >= peaks[0] + 5 * 2 * keys


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all others run, on the same terms as the local functions."""
    monkeypatch.setattr(distributed.Team, "of", lambda *_: Echo(None, 0, 2))
    x = torch.randn(3, 4)
    for name, status in seer_kernels.backends().items():
        if "cpu" in status.devices:
            assert torch.isfinite(distributed.info_nce(x, x, backend=name))
        else:
            with pytest.raises(RuntimeError, match=rf"backend='{name}' cannot run on cpu: {status.reason}"):
                distributed.info_nce(x, x, backend=name)


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations while it compiles
def test_compiled_callers_break_their_graph_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.Team, "of", lambda *_: Echo(None, 0, 3))
    query, key = (torch.randn(4, 6, requires_grad=True) for _ in range(2))

    def objective(query: Tensor, key: Tensor) -> Tensor:
        return 2 * distributed.info_nce(query + 1, key, mode="ring")

    graphs = []
    actual = torch.compile(objective, backend=lambda graph, _: graphs.append(graph) or graph.forward)(query, key)
    assert len(graphs) == 2  # query + 1, and 2 * loss
    torch.testing.assert_close(actual, objective(query, key))
    for got, want in zip(
        torch.autograd.grad(actual, [query, key]), torch.autograd.grad(objective(query, key), [query, key]), strict=True
    ):
        torch.testing.assert_close(got, want)
