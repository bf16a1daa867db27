"""What ranks say to each other: numbers, sums, and the two ways in which keys and their gradients travel.

No maths of losses here. Every error of communication names this rank and what it was doing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Team:
    """The ranks that take part, seen from one of them."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, caller: str) -> Team:
        """The ranks of `group`, by default all."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{caller} needs torch.distributed: start the processes with torchrun and call init_process_group first"
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"group must contain this process; got one without rank {dist.get_rank()}")
        return cls(group, rank, dist.get_world_size(group))

    def call(self, step: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls a function that communicates."""
        try:
            return function(*arguments, **options)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} lost contact while {step}: another rank died, hangs or did not make "
                f"the same call ({error})"
            ) from error

    def tell(self, numbers: Sequence[int] | None, count: int) -> list[list[int]]:
        """The `count` integers of every rank. A rank about to raise over its arguments tells None: then all raise."""
        if self.size == 1:
            return [] if numbers is None else [list(numbers)]
        known = [0, *[0] * count] if numbers is None else [1, *numbers]
        own = torch.tensor(known, device=self._device())
        everyone = self.gather("comparing sizes", own)
        refusing = [rank for rank, row in enumerate(everyone.tolist()) if row[0] == 0]
        if refusing and numbers is not None:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} cannot go on: rank {', '.join(map(str, refusing))} raised an error "
                "over its arguments; see its message"
            )
        return [row[1:] for row in everyone.tolist()]

    def _device(self) -> torch.device:
        """Where the group exchanges numbers: on the CPU if it can."""
        backends = dist.get_backend_config(self.group)  # such as "cpu:gloo,cuda:nccl"
        if "cpu:" in backends:
            return torch.device("cpu")
        kind = backends.partition(":")[0]
        return torch.device(kind, torch.get_device_module(kind).current_device())

    def gather(self, step: str, own: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape: [ranks, ...]."""
        if self.size == 1:
            return own.unsqueeze(0)
        everyone = own.new_empty(self.size, *own.shape)
        if own.numel():
            flat = everyone.view(-1), own.contiguous().view(-1)
            self.call(step, dist.all_gather_into_tensor, *flat, group=self.group)
        return everyone

    def sum(self, step: str, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        value = value.contiguous().clone()
        if self.size > 1 and value.numel():
            self.call(step, dist.all_reduce, value, group=self.group)
        return value

    def sum_home(self, step: str, values: Tensor) -> Tensor:
        """This rank's part of the sum over the ranks of [ranks, ...]."""
        if self.size == 1:
            return values[0]
        home = torch.empty_like(values[0])
        if home.numel():
            self.call(step, dist.reduce_scatter_tensor, home.view(-1), values.view(-1), group=self.group)
        return home

    def shift(self, step: str, outgoing: list[Tensor], incoming: list[Tensor]) -> list[dist.Work]:
        """Starts to send tensors to the next rank and to receive others from the previous one; skips empty ones."""

        def peer(offset: int) -> int:
            rank = (self.rank + offset) % self.size
            return rank if self.group is None else dist.get_global_rank(self.group, rank)

        operations = [dist.P2POp(dist.isend, x, peer(1), self.group) for x in outgoing if x.numel()]
        operations += [dist.P2POp(dist.irecv, x, peer(-1), self.group) for x in incoming if x.numel()]
        works: list[dist.Work] = self.call(step, dist.batch_isend_irecv, operations) if operations else []
        return works

    def wait(self, step: str, works: list[dist.Work]) -> None:
        """Waits until tensors have gone and come."""
        for work in works:
            self.call(step, work.wait)


class SumOverRanks(torch.autograd.Function):
    """Sums over ranks; in the backward pass, what arrives on the ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return team.sum("summing the losses", value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.team.sum("summing the gradients of the losses", gradient), None


Visit = Callable[[Tensor, "Tensor | None"], "Tensor | None"]
"""What is done with the keys [P, M, D] of another rank and their labels [P, M]; their gradient, in a backward pass."""


@dataclass(frozen=True)
class Gather:
    """All keys come at once and stay for the backward pass."""

    team: Team
    sizes: list[int]
    """Keys of each rank."""

    def outward(self, keys: Tensor, labels: Tensor | None, visit: Visit) -> tuple[Tensor | None, ...]:
        """Visits the keys of the other ranks; returns what `homeward` wants back."""
        everyone = self._from_all(keys), None if labels is None else self._from_all(labels)
        for source in self._others():
            visit(*self._of(source, *everyone))
        return everyone

    def homeward(
        self,
        keys: Tensor,
        labels: Tensor | None,
        kept: tuple[Tensor | None, ...],
        visit: Visit,
        dtype: torch.dtype | None,
    ) -> Tensor | None:
        """Visits them again. With a `dtype` for gradients: returns what the other ranks found for this rank's keys."""
        everyone, everyones_labels = kept
        assert everyone is not None
        gradients = None if dtype is None else torch.zeros_like(everyone, dtype=dtype)
        for source in self._others():
            gradient = visit(*self._of(source, everyone, everyones_labels))
            if gradients is not None and gradient is not None:
                gradients[source, :, : self.sizes[source]] = gradient
        if gradients is None:
            return None
        return self.team.sum_home("returning the gradients of keys", gradients)[:, : keys.shape[1]]

    def _others(self) -> list[int]:
        return [source for source in range(self.team.size) if source != self.team.rank]

    def _of(self, source: int, keys: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = slice(self.sizes[source])
        return keys[source, :, rows], None if labels is None else labels[source, :, rows].contiguous()

    def _from_all(self, own: Tensor) -> Tensor:
        """[ranks, P, M, ...], with as many rows M as the largest needs."""
        most = max(self.sizes)
        if own.shape[1] < most:
            own = torch.cat([own, own.new_zeros(own.shape[0], most - own.shape[1], *own.shape[2:])], 1)
        return self.team.gather("gathering keys", own)


@dataclass(frozen=True)
class Ring:
    """Keys come one rank at a time: in step s, those of the rank s before this one. The next travel meanwhile."""

    team: Team
    sizes: list[int]
    """Keys of each rank."""

    def outward(self, keys: Tensor, labels: Tensor | None, visit: Visit) -> tuple[Tensor | None, ...]:
        """As `Gather.outward`."""
        for _, received in self._stream(keys, labels):
            visit(*received)
        return ()

    def homeward(
        self,
        keys: Tensor,
        labels: Tensor | None,
        kept: tuple[Tensor | None, ...],
        visit: Visit,
        dtype: torch.dtype | None,
    ) -> Tensor | None:
        """As `Gather.homeward`."""
        problems, _, features = keys.shape
        arriving = torch.zeros_like(keys, dtype=dtype)
        doing, works = "", list[dist.Work]()
        for step, received in self._stream(keys, labels):
            gradient = visit(*received)
            if gradient is None or dtype is None:
                continue
            # What arrives are the gradients of the same keys from the ranks that they visited before this one.
            self.team.wait(doing, works)
            if step > 1:
                gradient += arriving
            arriving = gradient.new_empty(problems, self.sizes[self._source(step + 1)], features)
            doing = self._doing("gradients", step)
            works = self.team.shift(doing, [gradient.contiguous()], [arriving])
        self.team.wait(doing, works)
        return None if dtype is None else arriving

    def _source(self, step: int) -> int:
        return (self.team.rank - step) % self.team.size

    def _doing(self, what: str, step: int) -> str:
        last = self.team.size - 1
        return f"passing on {what} in step {step} of {last} of the ring, from rank {self._source(1)} behind it"

    def _stream(self, keys: Tensor, labels: Tensor | None) -> Iterator[tuple[int, tuple[Tensor, Tensor | None]]]:
        """Step, keys and labels of every other rank."""
        at_hand = keys.contiguous(), labels
        following = self._pass_on(at_hand, 1)
        for step in range(1, self.team.size):
            at_hand, works = following
            self.team.wait(self._doing("keys", step), works)
            following = self._pass_on(at_hand, step + 1)
            yield step, at_hand

    def _pass_on(
        self, at_hand: tuple[Tensor, Tensor | None], step: int
    ) -> tuple[tuple[Tensor, Tensor | None], list[dist.Work]]:
        """Starts to send keys and labels and to receive those of `step`, which come with the handles to wait for."""
        if step >= self.team.size:
            return at_hand, []
        keys, labels = at_hand
        rows = self.sizes[self._source(step)]
        coming = keys.new_empty(keys.shape[0], rows, keys.shape[2])
        if labels is None:
            return (coming, None), self.team.shift(self._doing("keys", step), [keys], [coming])
        coming_labels = labels.new_empty(labels.shape[0], rows)
        works = self.team.shift(self._doing("keys", step), [keys, labels], [coming, coming_labels])
        return (coming, coming_labels), works
