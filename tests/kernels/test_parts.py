"""Keys seen in parts: merged statistics and summed gradients are those of all keys at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seer_kernels.contrastive import native, reference
from seer_kernels.contrastive.problem import Pairing, Problem, Wanted, no_anchors, settle

BACKENDS = {"reference": reference, "native": native}
NOTHING = Wanted(False, False, False, False)


def problem(dtype: torch.dtype, *, pairing: str, same_label: str, form: str = "softmax") -> Problem:
    """Two problems of 7 queries against 40 keys; logits reach +-60, and label 3 is that of some queries alone."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, rows, 6, generator=generator, dtype=torch.float64).to(dtype) for rows in (7, 40))
    return Problem(
        query=query,
        key=key,
        temperature=torch.tensor(0.05, dtype=dtype),
        bias=torch.tensor(-0.4, dtype=dtype) if form == "sigmoid" else None,
        query_labels=torch.randint(0, 4, (2, 7), generator=generator).int(),
        key_labels=torch.randint(0, 3, (2, 40), generator=generator).int(),
        weights=None,
        form=form,
        pairing=Pairing(pairing),
        same_label=same_label,
        normalize=True,
    )


def parts(whole: Problem) -> list[Problem]:
    """The queries' own keys, which make pairs, and then the others in parts that only labels make pairs with."""
    assert whole.key is not None
    assert whole.key_labels is not None
    return [
        replace(
            whole,
            key=whole.key[:, a:b],
            key_labels=whole.key_labels[:, a:b].contiguous(),
            pairing=whole.pairing if a == 0 else Pairing("labels"),
        )
        for a, b in ((0, 12), (12, 13), (13, 40))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("same_label", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("pairing", ["rows", "labels"])
def test_softmax(backend: str, dtype: torch.dtype, same_label: str, pairing: str) -> None:
    module = BACKENDS[backend]
    whole = problem(dtype, pairing=pairing, same_label=same_label)
    row_gradient = torch.rand(2, 7, dtype=dtype) + 0.5
    wanted = Wanted(True, True, True, False)
    exact = reference.forward(to_double(whole), NOTHING)[0]
    exact_gradients = reference.backward(to_double(whole), row_gradient.double(), wanted)

    anchors = no_anchors(whole)
    for part in reversed(parts(whole)):  # the own keys last: nothing may depend on the order
        module.statistics(part, anchors)
    rows, slopes, logit_dot = settle(anchors, row_gradient, whole.temperature)
    pieces = [module.slope_gradients(part, slopes, Wanted(True, True, False, False)) for part in parts(whole)]

    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-4}
    for got, expected in zip(rows, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, **close)
    torch.testing.assert_close(sum(g.query for g in pieces).double(), exact_gradients.query, **close)
    torch.testing.assert_close(torch.cat([g.key for g in pieces], 1).double(), exact_gradients.key, **close)
    temperature_gradient = (-logit_dot.sum(-1) / whole.temperature).double()
    torch.testing.assert_close(temperature_gradient, exact_gradients.temperature, rtol=close["rtol"], atol=1e-2)
    if pairing == "labels" and same_label == "positive":
        assert exact.valid.eq(0).any(), "some queries must be without a positive"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairing", ["self", "views"])
def test_rows_of_one_set_and_others(backend: str, pairing: str) -> None:
    """Self-contrast of a set with further keys: the whole is the set extended by rows that are no anchors."""
    module = BACKENDS[backend]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 30, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (1, 30), generator=generator).int()
    n = 8
    base = problem(torch.float64, pairing="self", same_label="positive")
    own = {"query": rows[:, :n], "key": None} if pairing == "self" else {"query": rows[:, :4], "key": rows[:, 4:n]}
    inside = replace(base, **own, query_labels=labels[:, :n], key_labels=labels[:, :n], pairing=Pairing(pairing))
    outside = replace(
        base,
        query=rows[:, :n],
        key=rows[:, n:],
        query_labels=labels[:, :n].contiguous(),
        key_labels=labels[:, n:].contiguous(),
        pairing=Pairing("labels"),
    )
    inside = replace(inside, query_labels=labels[:, :n].contiguous(), key_labels=labels[:, :n].contiguous())
    anchors = no_anchors(inside)
    for part in (inside, outside):
        module.statistics(part, anchors)
    row_gradient = torch.rand(1, n, dtype=torch.float64)
    results, slopes, _ = settle(anchors, row_gradient, base.temperature)
    wanted = Wanted(True, pairing == "views", False, False)
    own_gradients = module.slope_gradients(inside, slopes, wanted)
    gradient = own_gradients.query if pairing == "self" else torch.cat([own_gradients.query, own_gradients.key], 1)
    others = module.slope_gradients(outside, slopes, Wanted(True, True, False, False))

    leaf = rows.clone().requires_grad_()
    unit = torch.nn.functional.normalize(leaf, dim=-1)
    logits = unit[:, :n] @ unit.mT / base.temperature
    index = torch.arange(30)
    positive = labels[:, :n, None] == labels[:, None]
    if pairing == "views":
        positive = positive | (index == (torch.arange(n)[:, None] + 4) % n)
    alone = index == torch.arange(n)[:, None]
    positive = positive & ~alone
    has = positive.any(-1)
    normalizer = logits.masked_fill(alone, -torch.inf).logsumexp(-1)
    loss = (normalizer - (logits * positive).sum(-1) / positive.sum(-1).clamp(min=1)) * has
    torch.testing.assert_close(results.loss, loss.detach(), rtol=1e-11, atol=1e-11)
    (expected,) = torch.autograd.grad((loss * row_gradient).sum(), leaf)
    torch.testing.assert_close(gradient + others.query, expected[:, :n], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(others.key, expected[:, n:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("same_label", ["negative", "ignore", "positive"])
def test_sigmoid_sums_over_parts(backend: str, dtype: torch.dtype, same_label: str) -> None:
    """Rows of a sigmoid loss count without a positive among these keys."""
    module = BACKENDS[backend]
    whole = problem(dtype, pairing="rows", same_label=same_label, form="sigmoid")
    row_gradient = torch.rand(2, 7, dtype=dtype) + 0.5
    wanted = Wanted(True, True, True, True)
    exact = reference.backward(to_double(whole), row_gradient.double(), wanted)
    pieces = [module.backward(part, row_gradient, wanted) for part in parts(whole)]
    loss = sum(module.forward(part, NOTHING)[0].loss for part in parts(whole))

    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-3}
    torch.testing.assert_close(loss.double(), reference.forward(to_double(whole), NOTHING)[0].loss, **close)
    torch.testing.assert_close(torch.cat([g.key for g in pieces], 1).double(), exact.key, **close)
    for name in ("query", "temperature", "bias"):
        total = sum(getattr(g, name) for g in pieces)
        torch.testing.assert_close(total.double(), getattr(exact, name), rtol=close["rtol"], atol=close["atol"] * 10)


def to_double(problem: Problem) -> Problem:
    names = ("query", "key", "temperature", "bias")
    wide = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    return replace(problem, **{name: value.double() for name, value in wide.items()})
