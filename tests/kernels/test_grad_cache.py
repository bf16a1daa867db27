"""cached_backward against the backward pass of the whole batch."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seer_kernels import cached_backward, info_nce


def encoder(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16, dtype=dtype), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 5, dtype=dtype))


def texts(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    return found


def in_chunks(module: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """All representations with their graph, encoded in the order of cached_backward."""
    return torch.cat([module(part) for part in x.split(size)])


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_the_whole_batch(chunk_size: int, dropout: float) -> None:
    model = encoder(dropout=dropout)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    queries, keys = texts(7, 1), texts(9, 2)

    torch.manual_seed(5)
    expected = info_nce(
        in_chunks(model, queries, chunk_size), in_chunks(model, keys, chunk_size), temperature=temperature
    )
    expected.backward()
    expected_gradients, expected_temperature = gradients(model), temperature.grad
    expected_random = torch.rand(3)

    temperature.grad = None
    torch.manual_seed(5)
    actual = cached_backward(
        model, [queries, keys], lambda q, k: info_nce(q, k, temperature=temperature), chunk_size=chunk_size
    )
    assert torch.equal(torch.rand(3), expected_random), "the generator must end where one forward pass leaves it"
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(temperature.grad, expected_temperature, rtol=1e-10, atol=1e-12)
    for got, want in zip(gradients(model), expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradients_add_to_those_there() -> None:
    model = encoder()
    inputs = [texts(4, 1), texts(4, 2)]
    cached_backward(model, inputs, info_nce, chunk_size=3)
    once = [p.grad.clone() for p in model.parameters()]
    cached_backward(model, inputs, info_nce, chunk_size=3)
    for got, want in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(got, 2 * want)


def test_the_encoder_sees_no_more_than_a_chunk_and_one_graph_at_a_time() -> None:
    model, seen = encoder(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), output.requires_grad)))
    cached_backward(model, [texts(7, 1), texts(7, 2)], info_nce, chunk_size=3)
    sizes = [3, 3, 1, 3, 3, 1]
    assert seen == [(n, False) for n in sizes] + [(n, True) for n in sizes]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast(dropout: float) -> None:
    """Casts of weights that autocast keeps must not carry the first pass's lack of a graph into the second."""
    model = encoder(torch.float32, dropout=dropout)
    queries, keys = texts(7, 1, torch.float32), texts(7, 2, torch.float32)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = info_nce(in_chunks(model, queries, 3), in_chunks(model, keys, 3))
    expected.backward()
    expected_gradients = gradients(model)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = cached_backward(model, [queries, keys], info_nce, chunk_size=3)
    torch.testing.assert_close(actual, expected.detach())
    for got, want in zip(gradients(model), expected_gradients, strict=True):
        assert got.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=2**-6, atol=float(want.abs().max()) * 2**-7)


def test_mappings_sequences_and_an_encoder_for_each_input() -> None:
    model, other = encoder(), encoder()
    queries, keys = texts(5, 1), texts(5, 2)

    def by_name(*, ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids * mask)

    def by_place(ids: Tensor, mask: Tensor) -> Tensor:
        return other(ids * mask)

    mask = (texts(5, 3) > 0).double()
    expected = info_nce(model(queries * mask), other(keys * mask))
    expected.backward()
    want = gradients(model) + gradients(other)
    inputs: list[Any] = [UserDict(ids=queries, mask=mask), (keys, mask)]
    actual = cached_backward([by_name, by_place], inputs, info_nce, chunk_size=2)
    torch.testing.assert_close(actual, expected.detach())
    for got, wanted in zip(gradients(model) + gradients(other), want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_frozen_encoders_run_once() -> None:
    model, momentum, calls = encoder(), encoder().requires_grad_(False), []
    momentum.register_forward_hook(lambda *_: calls.append(1))
    queries, keys = texts(4, 1), texts(4, 2)
    cached_backward([model, momentum], [queries, keys], info_nce, chunk_size=1)
    assert len(calls) == 4 + 1, "four chunks, and one more to find that nothing is to be done"
    got = gradients(model)
    info_nce(model(queries), momentum(keys)).backward()
    for actual, expected in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(actual, expected)


def test_an_input_that_the_loss_ignores() -> None:
    model = encoder()
    cached_backward(model, [texts(3, 1), texts(3, 2), texts(4, 3)], lambda q, k, _: info_nce(q, k), chunk_size=2)
    got = gradients(model)
    cached_backward(model, [texts(3, 1), texts(3, 2)], info_nce, chunk_size=2)
    for actual, expected in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_scaler_scales_every_gradient() -> None:
    model = encoder()
    inputs = [texts(4, 1), texts(4, 2)]
    plain = cached_backward(model, inputs, info_nce, chunk_size=3)
    want = gradients(model)
    scaled = cached_backward(model, inputs, info_nce, chunk_size=3, backward=lambda loss: (loss * 1024).backward())
    torch.testing.assert_close(scaled, plain)
    for got, wanted in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(got, 1024 * wanted)


def test_no_samples() -> None:
    """A rank without samples still runs its encoder, which others may wait for."""
    model = encoder()
    value = cached_backward(model, [texts(0, 1), texts(0, 2)], info_nce, chunk_size=4)
    assert value == 0
    assert all(g.eq(0).all() for g in gradients(model))


X = torch.zeros(3, 6, dtype=torch.float64)
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"inputs": X}, TypeError, "inputs must be a list of what the encoder takes; got Tensor"),
    ({"inputs": {"ids": X}}, TypeError, "inputs must be a list of what the encoder takes; got dict"),
    ({"inputs": []}, ValueError, "inputs must have an entry or more; got none"),
    ({"inputs": [X, 3]}, TypeError, r"inputs\[1\] must be a tensor, a sequence of tensors or a mapping; got int"),
    ({"inputs": [{"ids": X, "flag": True}]}, TypeError, r"inputs\[0\] must hold tensors .* got True \(bool\)"),
    ({"inputs": [(X, X[:2])]}, ValueError, r"inputs\[0\] must hold tensors with one number of samples; got \[3, 2\]"),
    ({"inputs": [{}]}, ValueError, r"inputs\[0\] must hold tensors with one number of samples; got none"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be 1 or more; got 0"),
    ({"chunk_size": 2.0}, TypeError, r"chunk_size must be an integer; got 2\.0 \(float\)"),
    ({"encoder": [lambda x: x] * 3}, ValueError, "encoder must be one, or one for each of the 2 inputs; got 3"),
    ({"encoder": 3}, TypeError, "encoder must be callable; got int"),
    ({"encoder": lambda x: (x,)}, TypeError, r"encoder must return a tensor of \(samples, ...\); got tuple"),
    ({"encoder": lambda x: x.sum(0)}, ValueError, r"encoder must return a row for each of 2 samples; got \(6,\)"),
    ({"loss": lambda q, k: 3.0}, TypeError, "loss must return a tensor; got float"),
    ({"loss": lambda q, k: q.sum(1)}, ValueError, r"loss must return a scalar; got a tensor of shape \(3,\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CASES, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"encoder": encoder(), "inputs": [X, X], "loss": info_nce, "chunk_size": 2}
    with pytest.raises(error, match=message):
        cached_backward(**{**good, **arguments})
