"""What the processes of tests with several ranks do: every one of them imports this."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import seer_kernels
from seer_kernels import MemoryBank, _ranks, cached_backward, distributed

QUERIES, BANK = (3, 5, 0, 2), (2, 0, 4, 1)
"""Samples and further keys of each rank."""
PROBLEMS, FEATURES = 2, 4


def launch(world: int, function: Callable[..., Any], folder: Path, *arguments: Any, timeout: float = 400) -> list[Any]:
    """What `function(*arguments)` returned in each of `world` processes; None where one died."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once for all
    # Not seer_kernels: the server would find it in the working directory, not where it is installed.
    context.set_forkserver_preload(["pytest", "torch.nn.parallel"])
    processes = [
        context.Process(target=_enter, args=(rank, world, function, str(folder), arguments)) for rank in range(world)
    ]
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # as torchrun sets it
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    results = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in results]


def _enter(rank: int, world: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    os._exit(0)  # no farewell to ranks that may be gone


def run_checks(names: list[str]) -> dict[str, str]:
    """The traceback of each check that failed."""
    failures = {}
    for name in names:
        dist.barrier()
        try:
            globals()[name]()
        except Exception:
            failures[name] = traceback.format_exc()
    return failures


@dataclass(frozen=True)
class Case:
    """One loss on one split of a batch over ranks."""

    loss: str
    mode: str
    dtype: torch.dtype
    same_label: str = "negative"
    weights: str = "none"
    reduction: str = "mean"
    backend: str = "auto"
    normalize: bool = True
    even: bool = False


LOSSES = ("info_nce", "symmetric", "siglip", "nt_xent", "sup_con", "sup_con_keys")


def cases() -> list[Case]:
    """Every loss, mode and rule in fp64, the other options in turn; then fp32."""
    weights, reductions = (
        itertools.cycle(["none", "shared", "ragged", "mask"]),
        itertools.cycle(["mean", "sum", "none"]),
    )
    backends, normalize = itertools.cycle(["native", "reference"]), itertools.cycle([True, True, True, False])
    found = [
        Case(loss, mode, torch.float64, rule, next(weights), next(reductions), next(backends), next(normalize))
        for loss in LOSSES
        for rule in (("positive",) * 3 if loss.startswith("sup_con") else ("negative", "ignore", "positive"))
        for mode in distributed.MODES
    ]
    found += [
        Case(loss, mode, dtype, "ignore" if loss == "info_nce" else "positive", "shared", even=dtype != torch.float32)
        for loss in LOSSES
        for mode in distributed.MODES
        for dtype in (torch.float32, torch.float64)
    ]
    return found


class Encoder(nn.Module):
    """Maps inputs to features of each problem, and holds the loss's scalars."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = nn.Linear(5, 8, dtype=dtype), nn.Linear(8, PROBLEMS * FEATURES, dtype=dtype)
        self.log_temperature = nn.Parameter(torch.tensor(-1.0, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-0.7, dtype=dtype))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features = (self.outer(torch.tanh(self.inner(x))).unflatten(-1, (PROBLEMS, FEATURES)) for x in inputs)
        return *(x.transpose(0, 1) for x in features), self.log_temperature.exp(), self.bias


def batch(case: Case, world: int) -> list[dict[str, Any]]:
    """The samples of each rank."""
    generator = torch.Generator().manual_seed(7)
    queries = (4,) * world if case.even else QUERIES[:world]
    found = []
    for n, extra in zip(queries, BANK, strict=False):
        labels = torch.randint(0, 3, (PROBLEMS, n + extra), generator=generator)
        weight = torch.rand(PROBLEMS, n, generator=generator, dtype=torch.float64) + 0.2
        absent = torch.rand(PROBLEMS, n, generator=generator) < 0.3
        found.append(
            {
                "query": torch.randn(n, 5, generator=generator, dtype=torch.float64),
                "key": torch.randn(n, 5, generator=generator, dtype=torch.float64),
                "bank": torch.randn(extra, 5, generator=generator, dtype=torch.float64),
                "labels": labels[:, :n],
                "bank_labels": labels[:, n:],
                "weights": {
                    "none": None,
                    "shared": (weight * ~absent[0])[0],
                    "ragged": weight * ~absent,
                    "mask": ~absent[0],
                }[case.weights],
                "cotangent": torch.rand(PROBLEMS, 2 * n, generator=generator, dtype=torch.float64),
            }
        )
    return found


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """All samples as those of one rank: pairs in the order of ranks, then all further keys."""
    joined = {}
    for name in ranks[0]:
        values = [r[name] for r in ranks]
        joined[name] = None if values[0] is None else torch.cat(values, -2 if name in ("query", "key", "bank") else -1)
    views = [r["cotangent"].chunk(2, -1) for r in ranks]
    joined["cotangent"] = torch.cat([v[0] for v in views] + [v[1] for v in views], -1)
    return joined


def evaluate(case: Case, functions: Any, encoder: nn.Module, samples: dict[str, Any], **where: Any) -> Any:
    """Loss and statistics of the samples of one rank, or of all."""
    dtype = case.dtype
    inputs = [samples[name].to(dtype) for name in ("query", "key", "bank")]
    query, key, bank, temperature, bias = encoder(*inputs)
    keys, key_labels = torch.cat([key, bank], 1), torch.cat([samples["labels"], samples["bank_labels"]], -1)
    options = {
        "temperature": temperature,
        "weights": samples["weights"],
        "reduction": case.reduction,
        "backend": case.backend,
        "normalize": case.normalize,
        "return_stats": True,
        **where,
    }
    pairs = {"query_labels": samples["labels"], "key_labels": key_labels, "same_label": case.same_label}
    if case.loss in ("info_nce", "symmetric"):
        value = functions.info_nce(query, keys, symmetric=case.loss == "symmetric", **pairs, **options)
    elif case.loss == "siglip":
        value = functions.siglip(query, keys, bias=bias, **pairs, **options)
    elif case.loss == "nt_xent":
        value = functions.nt_xent(query, key, labels=samples["labels"], same_label=case.same_label, **options)
    elif case.loss == "sup_con":
        value = functions.sup_con(query, samples["labels"], **options)
    else:
        value = functions.sup_con(query, samples["labels"], keys=keys, key_labels=key_labels, **options)
    # Every parameter gets a gradient, as DistributedDataParallel asks for.
    return value[0] + 0.0 * sum(x.sum() for x in (key, bank, temperature, bias)), value[1]


def result(case: Case, loss: Tensor, samples: dict[str, Any], encoder: nn.Module, ranks: int) -> list[Tensor]:
    """Gradients of an objective that is the mean over `ranks` of what they make of their losses."""
    if case.reduction == "none":
        objective = (loss * samples["cotangent"][:, : loss.shape[1]]).sum() / ranks
    else:
        objective = (loss * torch.tensor([1.0, 2.0], dtype=loss.dtype)).sum()
    objective.backward()
    return [p.grad for p in encoder.parameters()]


def one_process(case: Case, world: int) -> tuple[list[Tensor], Tensor]:
    encoder = Encoder(case.dtype)
    samples = together(batch(case, world))
    loss, statistics = evaluate(case, seer_kernels, encoder, samples)
    gradients = result(case, loss, samples, encoder, world)
    return [*statistics, *gradients], loss.detach()


def rows_of_rank(case: Case, rows: Tensor, world: int, rank: int) -> Tensor:
    """The part of the rows of all ranks that is this rank's."""
    sizes = [len(r["query"]) for r in batch(case, world)]
    halves = rows.chunk(2, -1) if case.loss == "nt_xent" else [rows]
    return torch.cat([half.split(sizes, -1)[rank] for half in halves], -1)


def check_case(case: Case) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    encoder = DistributedDataParallel(Encoder(case.dtype))
    samples = batch(case, world)[rank]
    loss, statistics = evaluate(case, distributed, encoder, samples, mode=case.mode)
    actual = [*statistics, *result(case, loss, samples, encoder, 1)]

    exact, exact_loss = one_process(replace(case, dtype=torch.float64), world)
    usual, usual_loss = one_process(case, world)
    if case.reduction == "none":
        exact_loss, usual_loss = (rows_of_rank(case, x, world, rank) for x in (exact_loss, usual_loss))
    rounding = torch.finfo(case.dtype).eps
    for i, (got, single, true) in enumerate(
        zip([loss.detach(), *actual], [usual_loss, *usual], [exact_loss, *exact], strict=True)
    ):
        assert got.shape == single.shape, f"result {i}: {got.shape} instead of {single.shape}"
        assert got.dtype == single.dtype
        if got.numel() == 0:
            continue
        error, usual_error = (float((x.double() - true).abs().max()) for x in (got, single))
        allowed = 4 * usual_error + 64 * rounding * (float(true.abs().max()) + 0.1)
        assert error <= allowed, f"result {i}: error {error:.3g} above {allowed:.3g}; {got} instead of {true}"


def losses() -> None:
    failures = []
    for case in cases():
        try:
            check_case(case)
        except Exception:  # noqa: PERF203
            failures.append(f"{case}\n{traceback.format_exc()}")
    assert not failures, f"{len(failures)} of {len(cases())} cases\n" + "\n".join(failures[:3])


def features(rows: int, *, dtype: torch.dtype = torch.float32, width: int = 64) -> list[Tensor]:
    """Queries and keys of this rank, [1, rows, width]."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(1, rows, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def scalars_alone_and_keys_without_gradient() -> None:
    """What needs no gradient does not have to have one; ranks may differ in it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3 * world, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mine = slice(3 * rank, 3 * rank + 3)
    for mode in distributed.MODES:
        for function, more in ((seer_kernels.info_nce, {}), (seer_kernels.siglip, {"bias": -1.0})):
            temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
            across = getattr(distributed, function.__name__)
            across(query[mine], key[mine], temperature=temperature, mode=mode, **more).backward()
            dist.all_reduce(temperature.grad)
            single = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
            function(query, key, temperature=single, **more).backward()
            torch.testing.assert_close(temperature.grad / world, single.grad)

            # Queries on all ranks, keys on rank 0 only.
            q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
            function(q, k, temperature=0.5, **more).backward()
            own_q, own_k = query[mine].clone().requires_grad_(), key[mine].clone().requires_grad_(rank == 0)
            across(own_q, own_k, temperature=0.5, mode=mode, **more).backward()
            torch.testing.assert_close(own_q.grad / world, q.grad[mine])
            if rank == 0:
                torch.testing.assert_close(own_k.grad / world, k.grad[mine])


def nothing_anywhere() -> None:
    """Batches without rows on all ranks, and no problems at all."""
    for mode in distributed.MODES:
        for shape in ((2, 0, 6), (0, 3, 6)):
            query, key = (torch.zeros(shape, requires_grad=True) for _ in range(2))
            loss = distributed.info_nce(query, key, mode=mode, weights=torch.ones(shape[1]))
            assert loss.shape == shape[:1]
            assert loss.eq(0).all()
            loss.sum().backward()
            assert query.grad.shape == shape


def half_precision_under_autocast() -> None:
    """bfloat16 features under autocast: as exact as the local loss, and gradients in bfloat16."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(4 * world, 16, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    local = seer_kernels.info_nce(query, key)
    expected = torch.autograd.grad(local, [query, key])
    mine = slice(4 * rank, 4 * rank + 4)
    for mode in distributed.MODES:
        own = [x.detach()[mine].clone().requires_grad_() for x in (query, key)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = distributed.info_nce(*own, mode=mode)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, local.detach())
        for got, want in zip(torch.autograd.grad(loss, own), expected, strict=True):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float() / world, want[mine].float(), rtol=2**-7, atol=1e-5)


def two_backward_passes() -> None:
    for mode in distributed.MODES:
        query, key = features(3)
        loss = distributed.info_nce(query, key, mode=mode).sum()
        once = torch.autograd.grad(loss, [query, key], retain_graph=True)
        again = torch.autograd.grad(loss, [query, key])
        for a, b in zip(once, again, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def groups() -> None:
    """Losses within the even and within the odd ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    members = [dist.new_group(list(range(first, world, 2))) for first in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(world, 3, 6, generator=generator) for _ in range(2))
    parity = slice(rank % 2, None, 2)
    expected = seer_kernels.info_nce(query[parity].flatten(0, 1), key[parity].flatten(0, 1))
    for mode in distributed.MODES:
        actual = distributed.info_nce(query[rank], key[rank], group=members[rank % 2], mode=mode)
        torch.testing.assert_close(actual, expected)
    if world > 2:
        with pytest.raises((ValueError, TypeError), match="group"):
            distributed.info_nce(query[rank], key[rank], group=members[1 - rank % 2])


@contextmanager
def counted_bytes() -> Iterator[dict[str, float]]:
    """Bytes that this rank sends, by function of torch.distributed, as the best algorithms send them."""
    sent: dict[str, float] = {}
    world = dist.get_world_size()
    share = {
        "all_gather_into_tensor": lambda output, own, **_: (world - 1) * own.nbytes,
        "reduce_scatter_tensor": lambda home, values, **_: (world - 1) * home.nbytes,
        "all_reduce": lambda value, **_: 2 * (world - 1) / world * value.nbytes,
        "batch_isend_irecv": lambda operations: sum(o.tensor.nbytes for o in operations if o.op is dist.isend),
    }
    originals = {name: getattr(dist, name) for name in share}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sent[name] = sent.get(name, 0) + share[name](*arguments, **options)
            return originals[name](*arguments, **options)

        return call

    try:
        for name in share:
            setattr(dist, name, counting(name))
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def bytes_sent() -> None:
    """The counts of the README of the family."""
    world, rows, width = dist.get_world_size(), 6, 64
    for dtype, item in ((torch.float32, 4), (torch.bfloat16, 2)):
        keys = (world - 1) * rows * width * item
        gradients = (world - 1) * rows * width * 4
        for mode, forward, backward in (
            ("gather", {"all_gather_into_tensor": keys}, {"reduce_scatter_tensor": gradients}),
            ("ring", {"batch_isend_irecv": keys}, {"batch_isend_irecv": keys + gradients}),
        ):
            query, key = features(rows, dtype=dtype)
            for labels in (0, world - 1):
                options = {} if labels == 0 else {"query_labels": torch.arange(rows), "same_label": "ignore"}
                with counted_bytes() as sent:
                    loss = distributed.info_nce(query, key, mode=mode, **options)
                sizes = (world - 1) * 8 * (len(distributed._Facts._fields) + 1)
                sums = 2 * (world - 1) / world * 6 * 4
                expected = {"all_gather_into_tensor": sizes, "all_reduce": sums}
                for name, count in forward.items():
                    expected[name] = expected.get(name, 0) + count + labels * rows * 4
                assert sent == expected, f"{mode}, forward: {sent} instead of {expected}"
                with counted_bytes() as sent:
                    loss.sum().backward()
                expected = {**backward, "all_reduce": sums}
                if mode == "ring":
                    expected["batch_isend_irecv"] += labels * rows * 4
                assert sent == expected, f"{mode}, backward: {sent} instead of {expected}"


def refused_arguments() -> None:
    """The rank with the bad argument says what is bad, the others say which rank it was; then all can go on."""
    rank = dist.get_rank()
    query, key = features(3)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"mode": "tree"}, ValueError, "mode must be one of 'gather', 'ring'; got 'tree'"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"weights": -torch.ones(3)}, ValueError, "weights must be finite and not negative"),
        ({"same_label": "ignore"}, ValueError, "same_label='ignore' needs query_labels"),
        ({"query": [1.0]}, TypeError, "query must be a tensor"),
    ]
    for arguments, error, message in bad:
        if rank != 1:
            arguments, error, message = {}, RuntimeError, rf"rank {rank} of \d cannot go on: rank 1 raised an error"
        with pytest.raises(error, match=message):
            distributed.info_nce(**{"query": query, "key": key, **arguments})
    assert torch.isfinite(distributed.info_nce(query, key))


def disagreements() -> None:
    """Ranks that compute different things all say so."""
    query, key = features(3)
    others: list[tuple[dict[str, Any], str]] = [
        ({"mode": "ring"}, "mode must be the same on all ranks; got, by rank: gather, ring"),
        ({"reduction": "sum"}, "reduction must be the same on all ranks; got, by rank: mean, sum"),
        ({"query": query[..., :9], "key": key[..., :9]}, "features must be .*: 64, 9"),
        ({"query": query.double(), "key": key.double()}, "dtype must be .*: torch.float32, torch.float64"),
        ({"query": query.detach(), "key": key.detach()}, "gradients must be .*: 1, 0"),
        ({"query": query.repeat(2, 1, 1), "key": key.repeat(2, 1, 1)}, "problems must be .*: 1, 2"),
    ]
    for arguments, message in others:
        with pytest.raises(ValueError, match=message):
            distributed.info_nce(**{"query": query, "key": key, **(arguments if dist.get_rank() == 1 else {})})


class Text(nn.Module):
    """An encoder with a buffer, which DistributedDataParallel sends from rank 0 when a forward pass begins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inner, self.outer = nn.Linear(5, 8, dtype=torch.float64), nn.Linear(8, 6, dtype=torch.float64)
        self.register_buffer("offset", torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)) + self.offset)


def cached_backward_reduces_once() -> None:
    """Chunks that differ in number between ranks: one reduction, and the gradients of one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [7, 2, 0, 4][:world]
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64) for _ in range(2))
    single = Text()
    expected = seer_kernels.info_nce(single(queries), single(keys))
    expected.backward()

    reductions = []

    def counting(state: Any, bucket: Any) -> Any:
        reductions.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / world)

    counting.__annotations__ = {}  # else they would have to be classes, and here they are strings
    model = DistributedDataParallel(Text())
    model.register_comm_hook(None, counting)
    own = [x.split(sizes)[rank] for x in (queries, keys)]
    for wrapped, no_sync in ((model, None), (lambda x: model(x), model.no_sync)):
        for mode in distributed.MODES:
            model.zero_grad()
            reductions.clear()
            loss = cached_backward(
                wrapped, own, partial(distributed.info_nce, mode=mode), chunk_size=2, no_sync=no_sync
            )
            assert reductions == [0], reductions
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
            for got, want in zip(model.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-12)


def memory_bank_of_all_ranks() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    bank = MemoryBank(7, features=2, gather=True)
    counts = [2, 3, 0, 1][:world]
    for step in range(3):
        numbers = 100.0 * step + 10 * rank + torch.arange(counts[rank])
        bank(numbers.unsqueeze(1).expand(-1, 2), numbers.long())
    everything = [100 * step + 10 * r + i for step in range(3) for r in range(world) for i in range(counts[r])]
    keys, labels = bank.content()
    assert labels.tolist() == everything[-7:]
    assert keys[:, 1].tolist() == everything[-7:]
    wrong = torch.zeros(2, 3) if rank == 1 else torch.zeros(2, 2)
    message = "keys must have shape" if rank == 1 else "rank 1 raised an error"
    with pytest.raises((ValueError, RuntimeError), match=message):
        bank.enqueue(wrong, torch.zeros(2, dtype=torch.long))


def lost_contact() -> list[tuple[str, float]]:
    """Rank 1 hangs and then dies in step 2 of the ring, then rank 2 dies while the others gather; what the others say
    of it, and after how long."""
    everyone, survivors = [0, 1, 2, 3], [0, 2, 3]
    scenes = [
        ("ring", "shift", "keys in step 2", everyone, 1, hang),
        ("ring", "shift", "keys in step 2", everyone, 1, die),
        ("gather", "gather", "gathering keys", survivors, 2, die),
    ]
    meetings = [dist.new_group(ranks) for *_, ranks, _, _ in scenes]
    groups = [dist.new_group(ranks, timeout=timedelta(seconds=3)) for *_, ranks, _, _ in scenes]
    query, key = features(3)
    found = []
    for (mode, method, fatal_step, _, lost, end), meeting, group in zip(scenes, meetings, groups, strict=True):
        dist.barrier(meeting)
        start = time.monotonic()
        with ExitStack() as stack:
            if dist.get_rank() == lost:
                stack.enter_context(mock.patch.object(_ranks.Team, method, ending_in(method, fatal_step, end)))
            with pytest.raises(RuntimeError) as error:
                distributed.info_nce(query, key, mode=mode, group=group)
        found.append((str(error.value), time.monotonic() - start))
    return found


def hang() -> None:
    time.sleep(6)


def die() -> None:
    time.sleep(0.5)  # until the others have heard what was said before
    os.kill(os.getpid(), signal.SIGKILL)


def ending_in(method: str, fatal_step: str, end: Callable[[], None]) -> Callable[..., Any]:
    """A method of Team that ends badly in one step."""
    original = getattr(_ranks.Team, method)

    def call(self: _ranks.Team, step: str, *tensors: Any) -> Any:
        if fatal_step in step:
            end()
        return original(self, step, *tensors)

    return call
