"""Keys of past batches as further negatives (cross-batch memory, Wang et al. 2020, arXiv 1912.06798)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seer_kernels import _checks
from seer_kernels._ranks import Team


class MemoryBank(nn.Module):
    """The latest keys of past batches and their labels, to be compared with behind the batch's own.

        bank = MemoryBank(8192, features=512)
        past_keys, past_labels = bank(keys, labels)  # what was there; then stores the batch
        loss = info_nce(queries, torch.cat([keys, past_keys]), same_label="ignore",
                        query_labels=labels, key_labels=torch.cat([labels, past_labels]))

    or `sup_con(features, labels, keys=past_keys, key_labels=past_labels)`. Keys are detached: they get no gradient, and
    the slower the encoder changes the better they serve (He et al. 2020, MoCo, arXiv 1911.05722). Padding does not
    belong in a bank: store `keys[mask]`.

    The content is part of `state_dict` and moves with `.to()`. Outside of DistributedDataParallel, please, which would
    overwrite the bank of each rank by that of rank 0; or with `gather=True`, where all banks are alike.

    Args:
        size: keys that are kept.
        features: their size.
        labelled: whether keys come with integer labels.
        gather: store the keys of all ranks on every rank. All ranks must then store together; batch sizes may differ.
            For use with the local losses: those of `seer_kernels.distributed` compare with the banks of all ranks.
        group: the ranks that gather; default: all.
        dtype: of the stored keys; half precision halves the memory. They are returned in the dtype of the batch.

    Raises:
        TypeError, ValueError: bad arguments.
    """

    keys: Tensor  # [size, features]
    labels: Tensor | None  # [size] int64

    def __init__(
        self,
        size: int,
        *,
        features: int,
        labelled: bool = True,
        gather: bool = False,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _checks.check_positive_integer("size", size)
        _checks.check_positive_integer("features", features)
        if dtype not in _checks.FLOAT_DTYPES:
            raise ValueError(f"dtype must be float64, float32, bfloat16 or float16; got {dtype}")
        if group is not None and not gather:
            raise ValueError("group was given without gather=True; without it no rank meets another")
        self.register_buffer("keys", torch.zeros(size, features, dtype=dtype))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64) if labelled else None)
        self.gather, self.group = gather, group
        self._next = 0  # the row that the next key goes to
        self._stored = 0

    @property
    def stored(self) -> int:
        """How many keys there are."""
        return self._stored

    def forward(self, keys: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What was stored, as copies; then stores the batch. Arguments and errors as `enqueue`.

        Returns:
            Keys (stored, features) in the dtype of `keys`, oldest first, and labels (stored,), None where not labelled.
        """
        past_keys, past_labels = self.content()
        self.enqueue(keys, labels)
        return past_keys.to(keys.dtype), past_labels

    def content(self) -> tuple[Tensor, Tensor | None]:
        """Copies of the stored keys (stored, features), oldest first, and of their labels (stored,)."""
        keys, labels = self.keys[: self._stored], None if self.labels is None else self.labels[: self._stored]
        oldest = self._next if self._stored == len(self.keys) else 0
        keys = torch.cat([keys[oldest:], keys[:oldest]])
        return keys, None if labels is None else torch.cat([labels[oldest:], labels[:oldest]])

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Stores a batch in place of the oldest keys; of a batch larger than the bank, the last rows.

        Args:
            keys: (N, features) on the device of the bank.
            labels: integers (N,), given exactly if the bank is labelled.

        Raises:
            TypeError, ValueError: a wrong type, shape or device; labels missing or not expected.
            RuntimeError: ranks gather and communication fails.
        """
        team = Team.of(self.group, "MemoryBank(gather=True)") if self.gather else None
        try:
            self._check(keys, labels)
        except (TypeError, ValueError):
            if team is not None:
                team.tell(None, 1)
            raise
        keys, labels = keys.detach().to(self.keys.dtype), None if labels is None else labels.to(torch.int64)
        if team is not None:
            counts = [count for (count,) in team.tell([len(keys)], 1)]
            keys = _joined(team, counts, keys)
            labels = None if labels is None else _joined(team, counts, labels)
        size = len(self.keys)
        keys, labels = keys[-size:], None if labels is None else labels[-size:]
        rows = torch.arange(self._next, self._next + len(keys), device=keys.device) % size
        self.keys[rows] = keys
        if self.labels is not None and labels is not None:
            self.labels[rows] = labels
        self._next = (self._next + len(keys)) % size
        self._stored = min(self._stored + len(keys), size)

    def _check(self, keys: Tensor, labels: Tensor | None) -> None:
        _checks.check_features("keys", keys)
        if keys.dim() != 2 or keys.shape[1] != self.keys.shape[1]:
            raise ValueError(f"keys must have shape (N, {self.keys.shape[1]}); got {tuple(keys.shape)}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on the device of the bank ({self.keys.device}); got {keys.device}")
        if (labels is None) == (self.labels is not None):
            expected = "must be given: the bank is labelled" if labels is None else "must be None: labelled=False"
            raise ValueError(f"labels {expected}")
        if labels is not None:
            _checks.check_labels("labels", labels, torch.Size(), len(keys), keys.device)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self._next, self._stored])

    def set_extra_state(self, state: Tensor) -> None:
        self._next, self._stored = (int(value) for value in state)

    def extra_repr(self) -> str:
        size, features = self.keys.shape
        return f"{size}, features={features}, labelled={self.labels is not None}, gather={self.gather}"


def _joined(team: Team, counts: list[int], own: Tensor) -> Tensor:
    """The rows of all ranks, of which each has `counts`."""
    missing = own.new_zeros(max(counts) - len(own), *own.shape[1:])
    everyone = team.gather("gathering keys for the memory bank", torch.cat([own, missing]))
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])
