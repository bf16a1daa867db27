"""Random problems and random nonsense for the compiled kernels: right results, or an error that names an argument.

`SEER_FUZZ_EXAMPLES=20000` tries so many of each, at random; without it a few, the same every time. `tests/sanitize.py`
runs this file with compiled code that watches every access to memory.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import seer_kernels as sk
from seer_kernels import _native
from seer_kernels.contrastive import native as contrastive_native
from seer_kernels.contrastive.native import CACHED_ROWS

EXAMPLES = os.environ.get("SEER_FUZZ_EXAMPLES")


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def restored() -> Any:
    yield
    _native.limit_instruction_set(_native.best_instruction_set())


class Draw:
    """Problems, from numbers that hypothesis draws."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(self.below(2**31))

    def below(self, bound: int) -> int:
        return int(self.data.draw(st.integers(0, bound - 1)))

    def one_of(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def size(self, least: int = 0) -> int:
        """Mostly around the widths of vectors and blocks, where a loop's tail goes wrong."""
        return max(least, self.one_of(1, 4, 8, 16, 32, 64) + self.below(3) - 1)

    def rows(self) -> int:
        """Sometimes above CACHED_ROWS, where other kernels take over."""
        return self.size() if self.below(8) else CACHED_ROWS + self.size()

    def chance(self) -> bool:
        return bool(self.below(2))

    def machine(self) -> None:
        torch.set_num_threads(self.one_of(1, 1, 2, 3))
        _native.limit_instruction_set(self.below(1 + _native.best_instruction_set()))

    def features(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Often not contiguous."""
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)
        layout = self.below(4)
        if layout == 1:
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == 2:
            x = torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
        elif layout == 3 and shape[-2] > 0:
            x = x[..., :1, :].expand(*shape)  # all rows one and the same memory
        return x

    def labels(self, *shape: int) -> Tensor:
        low = self.one_of(0, -3, 2**31 - 4, -(2**31))
        dtype = self.one_of(torch.int64, torch.int32)
        return (torch.randint(0, 4, shape, generator=self.generator) + low).to(dtype)

    def weights(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.rand(shape, generator=self.generator).round(decimals=1).to(dtype)


def contrastive_problem(draw: Draw, dtype: torch.dtype) -> tuple[str, list[Tensor], dict[str, Any]]:
    """A function, its features and its options."""
    loss = draw.one_of("info_nce", "nt_xent", "sup_con", "siglip")
    leading = draw.one_of((), (1,), (3,), (0,), (2, 2))
    N, D = draw.rows(), draw.size(1)
    options: dict[str, Any] = {
        "temperature": draw.one_of(0.05, 0.5, 3.0),
        "reduction": draw.one_of("mean", "sum", "none"),
        "normalize": draw.chance(),
    }
    if draw.chance():
        options["weights"] = draw.weights(*draw.one_of(leading, ()), N, dtype=torch.float32)
    features = [draw.features(*leading, N, D, dtype=dtype)]
    if loss == "sup_con":
        return loss, features, options | {"labels": draw.labels(*leading, N)}
    symmetric = loss == "info_nce" and draw.chance()
    M = N + (0 if loss == "nt_xent" or symmetric else draw.one_of(0, 1, 5, 33))
    features.append(draw.features(*leading, M, D, dtype=dtype))
    if draw.chance():
        options["same_label"] = draw.one_of("negative", "ignore", "positive")
        if loss == "nt_xent":
            options["labels"] = draw.labels(N)
        else:
            options |= {"query_labels": draw.labels(*leading, N), "key_labels": draw.labels(M)}
    if loss == "siglip":
        options["bias"] = draw.one_of(-10.0, 0.0, 2.0)
    elif loss == "info_nce":
        options["symmetric"] = symmetric
    return loss, features, options


def evaluate(loss: str, features: list[Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    """The loss and the gradients of the features."""
    leaves = [x.detach().requires_grad_() for x in features]
    result = getattr(sk, loss)(*leaves, **options, backend=backend)
    return [result.detach(), *torch.autograd.grad(result.sum(), leaves, allow_unused=True, materialize_grads=True)]


@fuzz(25)
@given(st.data())
def test_contrastive_losses_are_those_of_the_reference(data: st.DataObject) -> None:
    draw = Draw(data)
    draw.machine()
    loss, features, options = contrastive_problem(draw, draw.one_of(torch.float64, torch.float32, torch.bfloat16))
    dtype = features[0].dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2}[dtype]
    # The oracle sees the same numbers in float64.
    wide = [x.double() for x in features]
    results = zip(evaluate(loss, features, options, "native"), evaluate(loss, wide, options, "reference"), strict=True)
    for got, wanted in results:
        assert got.shape == wanted.shape
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


HARSH = (math.nan, math.inf, -math.inf, 3e38, 1e-45, -0.0)


@fuzz(15)
@given(st.data())
def test_no_number_breaks_the_contrastive_kernels(data: st.DataObject) -> None:
    draw = Draw(data)
    draw.machine()
    loss, features, options = contrastive_problem(draw, draw.one_of(*sk._checks.FLOAT_DTYPES))
    x = draw.one_of(*features).clone(memory_format=torch.contiguous_format)
    features = [x if x.shape == f.shape else f for f in features]
    if x.numel():
        for _ in range(1 + draw.below(4)):
            x.view(-1)[draw.below(x.numel())] = draw.one_of(*HARSH)
    results = evaluate(loss, features, options, "native")
    assert [r.shape for r in results[1:]] == [f.shape for f in features]


def transport_problem(draw: Draw, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    B, n, m, D = draw.one_of(1, 2, 5, 0), draw.size(1), draw.size(1), draw.size(1)
    x, y = draw.features(B, n, D, dtype=dtype), draw.features(B, m, D, dtype=dtype)
    options: dict[str, Any] = {
        "eps": draw.one_of(0.5, 0.05, 5.0),
        "cost": draw.one_of("sqeuclidean", "euclidean", "cosine"),
        "scale_cost": draw.one_of(None, "mean", "max"),
        "max_iterations": draw.one_of(1, 7, 40),
        "tolerance": draw.one_of(0.0, 1e-3),
    }
    if draw.chance():
        options["x_lengths"] = torch.randint(1, n + 1, (B,), generator=draw.generator)
    if draw.chance():
        options["y_lengths"] = torch.randint(1, m + 1, (B,), generator=draw.generator)
    if draw.chance():
        options |= {"tau_a": draw.one_of(None, 0.3, 50.0), "tau_b": 1.0}
        options["a"] = draw.weights(B, n, dtype=dtype) + 0.1
    return x, y, options


def solve(x: Tensor, y: Tensor, options: dict[str, Any], backend: str) -> list[Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.ConvergenceWarning)
        result = sk.sinkhorn(x, y, **options, backend=backend)
    gradients = torch.autograd.grad(result.value.sum(), (x, y))
    return [result.value.detach(), result.transport_cost.detach(), result.f.detach(), result.g.detach(), *gradients]


@fuzz(15)
@given(st.data())
def test_transport_is_that_of_the_reference(data: st.DataObject) -> None:
    draw = Draw(data)
    draw.machine()
    x, y, options = transport_problem(draw, torch.float64)
    options["max_iterations"], options["tolerance"] = 400, 1e-11  # to the end: the way there is each backend's own
    options["eps"] = draw.one_of(0.5, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.ConvergenceWarning)
        ended = sk.sinkhorn(x, y, **options, backend="reference").converged
    for got, wanted in zip(solve(x, y, options, "native"), solve(x, y, options, "reference"), strict=True):
        assert got.shape == wanted.shape
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(got[ended], wanted[ended], rtol=1e-6, atol=1e-6 * max(scale, 1e-3))


@fuzz(15)
@given(st.data())
def test_no_number_breaks_the_transport_kernels(data: st.DataObject) -> None:
    draw = Draw(data)
    draw.machine()
    x, y, options = transport_problem(draw, draw.one_of(*sk._checks.FLOAT_DTYPES))
    options["eps"] = draw.one_of(1e-6, 0.05, 1e6)
    y = y.clone(memory_format=torch.contiguous_format)
    if y.numel():
        for _ in range(draw.below(3)):
            y.view(-1)[draw.below(y.numel())] = draw.one_of(*HARSH)
    try:
        results = solve(x, y, options, "native")
    except ValueError as error:
        if not re.search(r"cost of x and y must be finite|scale_cost=", str(error)):
            raise
        return
    assert [r.shape for r in results[-2:]] == [x.shape, y.shape]


@fuzz(15)
@given(st.data())
def test_alternation_is_that_of_the_reference(data: st.DataObject) -> None:
    draw = Draw(data)
    draw.machine()
    leading = draw.one_of((), (3,), (2, 2))
    N, D = draw.size(1), draw.size(1)
    labelled = draw.chance()
    M = N + (draw.one_of(0, 1, 33) if labelled else 0)
    features = [draw.features(*leading, rows, D, dtype=torch.float64) for rows in (N, M)]
    options: dict[str, Any] = {"iterations": draw.one_of(1, 5, 12), "tau": draw.one_of(None, 0.5), "temperature": 0.3}
    if labelled:
        options |= {"query_labels": draw.labels(*leading, N), "key_labels": draw.labels(*leading, M)}
    results = [evaluate("ot_contrastive", features, options, backend) for backend in ("native", "reference")]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


NONSENSE = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**70,
    math.nan,
    -0.5,
    1e300,
    "cuda",
    b"mean",
    [],
    (1.0, 2.0, 3.0),
    object(),
    torch.empty(0),
    torch.ones(()),
    torch.ones(4),
    torch.ones(2, 4, 3, dtype=torch.complex64),
    torch.ones(2, 4, 3, dtype=torch.int64),
    torch.ones(2, 4, 3).to_sparse(),
    torch.ones(2, 4, 3, device="meta"),
    torch.ones(2, 4, 3, 1),
    torch.full((2,), -7),
    torch.full((2,), 2**62),
    torch.full((2, 4), math.nan),
    torch.ones(2, 4, requires_grad=True),
)


def valid(name: str) -> dict[str, Any]:
    """Arguments that a public function takes."""
    x, labels = torch.ones(2, 4, 3).cumsum(1), torch.arange(4)
    first = {
        "info_nce": ("query", "key"),
        "siglip": ("query", "key"),
        "ot_contrastive": ("query", "key"),
        "nt_xent": ("view1", "view2"),
        "sinkhorn": ("x", "y"),
        "sinkhorn_divergence": ("x", "y"),
    }
    if name in first:
        extra = {"temperature": 0.1, "bias": 0.0} if name == "siglip" else {}
        return dict.fromkeys(first[name], x) | extra
    if name == "sup_con":
        return {"features": x, "labels": labels}
    if name == "k_variance":
        return {"features": torch.randn(8, 3), "labels": torch.arange(8) % 2, "splits": 2}
    return {"cost": torch.ones(2, 4, 4)}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sk, name)
    for name in (
        "info_nce",
        "nt_xent",
        "sup_con",
        "siglip",
        "ot_contrastive",
        "sinkhorn",
        "sinkhorn_from_cost",
        "sinkhorn_divergence",
        "k_variance",
    )
}


@pytest.mark.filterwarnings("ignore::seer_kernels.ConvergenceWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nonsense_gets_an_error_that_names_an_argument(name: str) -> None:
    """Every argument gets every piece of nonsense, the others being right. What happens to make sense may pass."""
    names = list(inspect.signature(FUNCTIONS[name]).parameters)
    complaints = [complaint(name, names, argument, value) for argument in names for value in NONSENSE]
    assert not any(complaints), "\n".join(filter(None, complaints))


def complaint(name: str, names: list[str], argument: str, value: object) -> str:
    """What is wrong with the error that `value` gets as `argument`; nothing where it is right, or there is none."""
    try:
        FUNCTIONS[name](**{**valid(name), "backend": "native", argument: value})
    except Exception as error:
        named = re.search(rf"\b({'|'.join(names)})\b(=| must| with| was| were|,)", str(error))
        if named and isinstance(error, (ValueError, TypeError, RuntimeError)):
            return ""
        return f"{argument}={described(value)}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.layout} {value.dtype} {tuple(value.shape)} on {value.device}"
    return repr(value)


def compiled_functions() -> list[str]:
    return [n for n in dir(_native) if callable(getattr(_native, n)) and not n.startswith("__")]


@pytest.mark.parametrize("name", compiled_functions())
def test_the_compiled_module_refuses_what_is_no_number(name: str) -> None:
    """Addresses cannot be checked there, but a tensor, a float or a negative number for one never gets through."""
    function = getattr(_native, name)
    documentation = (function.__init__ if isinstance(function, type) else function).__doc__ or ""
    arguments = re.findall(r"(\w+): (?:typing\.|collections\.abc\.)?Supports(?:Int|Index)|(\w+): int\b", documentation)
    names = [a or b for a, b in arguments]
    if not names:
        assert name in ("instruction_set", "best_instruction_set", "limit_instruction_set")
        return
    for value in (None, "x", 1.5, torch.ones(3), 2**70, -(2**70)):
        with pytest.raises(TypeError, match="incompatible"):
            function(**dict.fromkeys(names, value))


class Guarded:
    """`torch` for a module, whose `empty` memory lies between two guards."""

    GUARD, MARK = 64, 12345.0

    def __init__(self) -> None:
        self.rooms: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, **options: Any) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        self.rooms.append(torch.full((size.numel() + 2 * self.GUARD,), self.MARK, **options))
        return self.rooms[-1][self.GUARD : -self.GUARD].view(size)

    def empty_like(self, x: Tensor) -> Tensor:
        return self.empty(x.shape, dtype=x.dtype)


@fuzz(30)
@given(st.data())
def test_the_compiled_module_writes_only_where_it_should(data: st.DataObject) -> None:
    """Losses of few rows, whose results are all written by the compiled module."""
    draw = Draw(data)
    draw.machine()
    loss, features, options = contrastive_problem(draw, draw.one_of(torch.float32, torch.float64))
    few = CACHED_ROWS // 2  # so that two views of them are few, too
    features = [x[..., :few, :] for x in features]
    options = {name: x[..., :few] if isinstance(x, Tensor) else x for name, x in options.items()}
    guarded = Guarded()
    with mock.patch.object(contrastive_native, "torch", guarded):
        evaluate(loss, features, options, "native")
    assert guarded.rooms or 0 in features[0].shape
    for room in guarded.rooms:
        assert (room[: Guarded.GUARD] == Guarded.MARK).all()
        assert (room[-Guarded.GUARD :] == Guarded.MARK).all()
