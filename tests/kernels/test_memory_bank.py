"""The bank of past keys: what it holds after any sequence of batches, its state, its use in losses."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from seer_kernels import MemoryBank, info_nce, sup_con


def numbered(first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Keys that hold their number, and labels that are it."""
    numbers = torch.arange(first, first + rows)
    return numbers.float().unsqueeze(1).repeat(1, 3), numbers


@pytest.mark.parametrize(
    "batches", [[2, 2], [5], [3, 2, 4], [4, 1], [7], [13, 3], [1] * 11, [0, 3, 0], [5, 5], [3, 12]]
)
def test_it_holds_the_latest_keys_oldest_first(batches: list[int]) -> None:
    bank, seen = MemoryBank(5, features=3), 0
    for rows in batches:
        before = max(0, seen - 5)
        past_keys, past_labels = bank(*numbered(seen, rows))
        assert past_labels.tolist() == list(range(before, seen)), "what was there before the batch"
        torch.testing.assert_close(past_keys, numbered(before, seen - before)[0])
        seen += rows
        assert bank.stored == min(seen, 5)
        keys, labels = bank.content()
        expected_keys, expected_labels = numbered(max(0, seen - 5), bank.stored)
        torch.testing.assert_close(keys, expected_keys)
        assert torch.equal(labels, expected_labels)


def test_what_it_returns_is_a_copy_without_a_graph() -> None:
    bank = MemoryBank(4, features=3)
    keys, labels = numbered(0, 4)
    bank.enqueue(keys.requires_grad_(), labels)
    past_keys, _ = bank(*numbered(4, 4))
    assert not past_keys.requires_grad
    assert past_keys[:, 0].tolist() == [0, 1, 2, 3]


def test_state_survives_saving_and_goes_on() -> None:
    bank = MemoryBank(5, features=3)
    bank(*numbered(0, 7))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    again = MemoryBank(5, features=3)
    again.load_state_dict(torch.load(file))
    for either in (bank, again):
        either.enqueue(*numbered(7, 2))
    assert torch.equal(again.content()[0], bank.content()[0])
    assert again.content()[1].tolist() == [4, 5, 6, 7, 8]
    assert repr(again) == "MemoryBank(5, features=3, labelled=True, gather=False)"


def test_half_precision_storage_and_moves() -> None:
    bank = MemoryBank(4, features=3, labelled=False, dtype=torch.bfloat16)
    keys = torch.randn(4, 3)
    assert bank(keys)[1] is None
    past, _ = bank(keys)
    assert past.dtype == torch.float32
    torch.testing.assert_close(past, keys.bfloat16().float(), rtol=0, atol=0)
    assert bank.keys.dtype == torch.bfloat16
    assert bank.to(torch.float64).content()[0].dtype == torch.float64
    assert bank.to("meta").keys.device.type == "meta"


def test_in_losses() -> None:
    """Behind the batch's own keys in info_nce, as keys in sup_con; a full backward pass after the bank has moved on."""
    torch.manual_seed(0)
    bank = MemoryBank(6, features=8)
    bank(torch.randn(9, 8), torch.randint(0, 3, (9,)))
    held_keys, held_labels = bank.content()
    query, key = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    labels = torch.randint(0, 3, (4,))
    past_keys, past_labels = bank(key, labels)
    loss = info_nce(
        query,
        torch.cat([key, past_keys]),
        query_labels=labels,
        key_labels=torch.cat([labels, past_labels]),
        same_label="ignore",
    ) + sup_con(query, labels, keys=past_keys, key_labels=past_labels)
    loss.backward()
    assert query.grad.abs().sum() > 0
    expected = info_nce(
        query.detach(),
        torch.cat([key.detach(), held_keys]),
        query_labels=labels,
        key_labels=torch.cat([labels, held_labels]),
        same_label="ignore",
    ) + sup_con(query.detach(), labels, keys=held_keys, key_labels=held_labels)
    torch.testing.assert_close(loss.detach(), expected)


KEYS, LABELS = numbered(0, 2)
BUILD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"size": 0}, ValueError, "size must be 1 or more; got 0"),
    ({"size": 4.0}, TypeError, r"size must be an integer; got 4\.0 \(float\)"),
    ({"features": True}, TypeError, r"features must be an integer; got True \(bool\)"),
    ({"dtype": torch.int64}, ValueError, "dtype must be float64, .*; got torch.int64"),
    ({"group": object()}, ValueError, "group was given without gather=True"),
]
STORE: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (([1.0], LABELS), TypeError, r"keys must be a tensor of shape .*; got .*list"),
    ((KEYS[:, :2], LABELS), ValueError, r"keys must have shape \(N, 3\); got \(2, 2\)"),
    ((KEYS.unsqueeze(0), LABELS), ValueError, r"keys must have shape \(N, 3\); got \(1, 2, 3\)"),
    ((KEYS.to("meta"), LABELS), ValueError, r"keys must be on the device of the bank \(cpu\); got meta"),
    ((KEYS,), ValueError, "labels must be given: the bank is labelled"),
    ((KEYS, LABELS.float()), TypeError, "labels must hold integers; got dtype torch.float32"),
    ((KEYS, LABELS[:1]), ValueError, r"labels must have shape \(2,\) .*; got \(1,\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BUILD, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_bad_options(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryBank(**{"size": 4, "features": 3, **arguments})


@pytest.mark.parametrize(("arguments", "error", "message"), STORE, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_bad_batches(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    bank = MemoryBank(4, features=3)
    with pytest.raises(error, match=message):
        bank.enqueue(*arguments)
    assert bank.stored == 0


def test_labels_that_nobody_keeps() -> None:
    with pytest.raises(ValueError, match="labels must be None: labelled=False"):
        MemoryBank(4, features=3, labelled=False).enqueue(KEYS, LABELS)
