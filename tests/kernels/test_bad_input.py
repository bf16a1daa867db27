"""Every wrong argument gets an error that names it, what was expected and what came, before any kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seer_kernels import InfoNCELoss, info_nce
from seer_kernels.contrastive import native, reference

X = torch.randn(2, 4, 3)
LABELS = torch.arange(4)

CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [[1.0]]}, TypeError, r"query must be a tensor of shape \(\.\.\., rows, features\); got .*list"),
    ({"query": X.int()}, TypeError, r"query must be float64, float32, bfloat16 or float16; got torch.int32"),
    ({"query": torch.randn(3)}, ValueError, r"query must have shape \(\.\.\., rows, features\); got \(3,\)"),
    (
        {"query": X[..., :0], "key": X[..., :0]},
        ValueError,
        r"query must have at least one feature; got shape \(2, 4, 0\)",
    ),
    ({"key": X.double()}, TypeError, r"key must have the dtype of query \(torch.float32\); got torch.float64"),
    ({"key": X.to("meta")}, ValueError, r"key must be on the device of query \(cpu\); got meta"),
    ({"key": X[..., :2]}, ValueError, r"key must have shape \(2, M >= 4, 3\) .* got \(2, 4, 2\)"),
    ({"key": X[:1]}, ValueError, r"key must have shape \(2, M >= 4, 3\) .* got \(1, 4, 3\)"),
    ({"key": X[:, :3]}, ValueError, r"key must have at least as many rows as query .* expected 4 or more, got 3"),
    ({"temperature": 0.0}, ValueError, r"temperature must be positive and finite; got 0\.0"),
    ({"temperature": -1}, ValueError, r"temperature must be positive and finite; got -1"),
    ({"temperature": float("nan")}, ValueError, r"temperature must be positive and finite; got nan"),
    ({"temperature": torch.tensor(-0.5)}, ValueError, r"temperature must be positive and finite; got -0\.5"),
    ({"temperature": torch.ones(1)}, ValueError, r"temperature must be a float or a floating 0-d tensor; .*\(1,\)"),
    ({"temperature": "0.1"}, TypeError, r"temperature must be a float .* got '0\.1' \(str\)"),
    ({"temperature": True}, TypeError, r"temperature must be a float .* got True \(bool\)"),
    ({"same_label": "positives"}, ValueError, r"same_label must be one of 'negative', .*; got 'positives'"),
    ({"same_label": "ignore"}, ValueError, r"same_label='ignore' needs query_labels; got none"),
    ({"reduction": "avg"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', .*; got 'cuda'"),
    ({"key_labels": LABELS}, ValueError, r"key_labels were given without query_labels"),
    ({"query_labels": LABELS.float()}, TypeError, r"query_labels must hold integers; got dtype torch.float32"),
    (
        {"query_labels": [0, 1, 2, 3]},
        TypeError,
        r"query_labels must be a tensor of shape \(2, 4\) or \(4,\); got .*list",
    ),
    ({"query_labels": LABELS[:3]}, ValueError, r"query_labels must have shape \(2, 4\) or \(4,\); got \(3,\)"),
    ({"query_labels": LABELS.expand(3, 4)}, ValueError, r"query_labels must have shape \(2, 4\) .* got \(3, 4\)"),
    ({"query_labels": LABELS.to("meta")}, ValueError, r"query_labels must be on cpu like the features; got meta"),
    (
        {"query_labels": LABELS, "key": torch.randn(2, 6, 3)},
        ValueError,
        r"key_labels must be given: key has 6 rows and query_labels cover only the first 4",
    ),
    (
        {"query_labels": LABELS + 2**40, "same_label": "ignore"},
        ValueError,
        r"query_labels must fit in int32 .* got values from 1099511627776 to 1099511627779.*torch\.unique",
    ),
    ({"weights": torch.ones(5)}, ValueError, r"weights must have shape \(2, 4\) or \(4,\); got \(5,\)"),
    ({"weights": LABELS}, TypeError, r"weights must be floating or bool; got dtype torch.int64"),
    (
        {"weights": -torch.ones(4)},
        ValueError,
        r"weights must be finite and not negative; got values from -1\.0 to -1\.0",
    ),
    ({"weights": torch.full((4,), torch.nan)}, ValueError, r"weights must be finite and not negative"),
    ({"weights": torch.ones(4, requires_grad=True)}, ValueError, r"weights must not require grad"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CASES, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_error_names_the_argument(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a kernel ran on bad input")

    monkeypatch.setattr(native, "forward", never)
    monkeypatch.setattr(reference, "forward", never)
    with pytest.raises(error, match=message):
        info_nce(**{"query": X, "key": X.clone(), **arguments})


def test_module_checks_its_options_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        InfoNCELoss(temperature=0.0)
    with pytest.raises(ValueError, match="same_label must be one of"):
        InfoNCELoss(same_label="drop")
    with pytest.raises(ValueError, match="reduction must be one of"):
        InfoNCELoss(reduction="max")
    with pytest.raises(ValueError, match="backend must be one of"):
        InfoNCELoss(backend="cpp")


def test_values_are_checked_inside_compiled_graphs_too() -> None:
    compiled = torch.compile(lambda q, k, w: info_nce(q, k, weights=w), backend="aot_eager", fullgraph=True)
    compiled(X, X.clone(), torch.ones(4))
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        compiled(X, X.clone(), -torch.ones(4))
