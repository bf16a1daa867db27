"""Errors for bad input: the only place that words them. Each names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
INT32 = torch.iinfo(torch.int32)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """`value` must be one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_flag(name: str, value: object) -> None:
    """`value` must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {_describe(value)}")


def check_dense(name: str, value: Tensor) -> None:
    """`value` must be an ordinary, strided tensor."""
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got layout {value.layout}")


def check_positive_integer(name: str, value: object) -> None:
    """`value` must be an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {_describe(value)}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more; got {value}")


def check_samples(name: str, values: list[object]) -> None:
    """`values` must be tensors, at least one, whose first dimensions are the same number of samples."""
    for value in values:
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise TypeError(
                f"{name} must hold tensors of shape (samples, ...) and nothing else; got {_describe(value)}"
            )
    counts = [len(value) for value in values if isinstance(value, Tensor)]
    if len(set(counts)) != 1:
        raise ValueError(f"{name} must hold tensors with one number of samples; got {counts or 'none'}")


def check_features(name: str, value: object) -> None:
    """`value` must be a floating tensor of shape (..., rows, features) with at least one feature."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (..., rows, features); got {_describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}")
    check_dense(name, value)
    if value.dim() < 2:
        raise ValueError(f"{name} must have shape (..., rows, features); got {tuple(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature; got shape {tuple(value.shape)}")


def check_same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` must have the dtype and device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} ({other.dtype}); got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}); got {value.device}")


def check_feature_pair(name: str, value: object, other_name: str, other: object) -> None:
    """Both must be features, of one dtype and on one device."""
    check_features(name, value)
    check_features(other_name, other)
    check_same_kind(other_name, other, name, value)  # type: ignore[arg-type]


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` must have the shape of `other`."""
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}; got {tuple(value.shape)}")


def check_key_shapes(name: str, key: Tensor, other_name: str, query: Tensor, *, at_least: str = "") -> None:
    """`key` must be (..., M, D) for a `query` of (..., N, D)."""
    if key.shape[:-2] != query.shape[:-2] or key.shape[-1] != query.shape[-1]:
        rows = f"M{at_least}"
        expected = f"({', '.join(map(str, (*query.shape[:-2], rows, query.shape[-1])))})"
        raise ValueError(
            f"{name} must have shape {expected} to match {other_name} {tuple(query.shape)}; got {tuple(key.shape)}"
        )


def check_pair_shapes(query: Tensor, key: Tensor) -> None:
    """`key` must be (..., M, D) for a `query` of (..., N, D), with M >= N."""
    check_key_shapes("key", key, "query", query, at_least=f" >= {query.shape[-2]}")
    if key.shape[-2] < query.shape[-2]:
        raise ValueError(
            f"key must have at least as many rows as query (row i of query pairs with row i of key): "
            f"expected {query.shape[-2]} or more, got {key.shape[-2]}"
        )


def check_same_label(value: str, choices: Iterable[str], labels_name: str, labels: object) -> None:
    """`same_label` must be a choice, and needs labels unless it is the default."""
    check_choice("same_label", value, choices)
    if labels is None and value != "negative":
        raise ValueError(f"same_label={value!r} needs {labels_name}; got none")


def check_rows(name: str, value: object, leading: torch.Size, rows: int, device: torch.device) -> Tensor:
    """`value` must be a tensor on `device` that broadcasts to `(*leading, rows)`; returns it expanded."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {(*leading, rows)} or ({rows},); got {_describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the features; got {value.device}")
    check_dense(name, value)
    fits = value.dim() >= 1 and value.shape[-1] == rows and value.dim() <= len(leading) + 1
    if not fits or any(s not in (1, n) for s, n in zip(value.shape[-2::-1], leading[::-1], strict=False)):
        raise ValueError(f"{name} must have shape {(*leading, rows)} or ({rows},); got {tuple(value.shape)}")
    return value.expand(*leading, rows)


def check_labels(name: str, value: object, leading: torch.Size, rows: int, device: torch.device) -> Tensor:
    """`value` must be integer labels that broadcast to `(*leading, rows)`; returns them expanded."""
    if isinstance(value, Tensor) and value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must hold integers; got dtype {value.dtype}")
    return check_rows(name, value, leading, rows, device)


def check_weights(value: object, leading: torch.Size, rows: int, device: torch.device) -> Tensor:
    """`weights` must be a constant floating or boolean tensor that broadcasts to `(*leading, rows)`."""
    if isinstance(value, Tensor) and value.dtype not in (*FLOAT_DTYPES, torch.bool):
        raise TypeError(f"weights must be floating or bool; got dtype {value.dtype}")
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError("weights must not require grad (the losses give no gradient to weights); detach them first")
    return check_rows("weights", value, leading, rows, device)


def check_scalar(name: str, value: object) -> None:
    """`value` must be a real number or a floating tensor with one element and no dimensions."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be a float or a floating 0-d tensor; got {_describe(value)}")
        check_dense(name, value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a floating 0-d tensor; got {_describe(value)}")


def check_temperature_value(value: float) -> None:
    """The temperature must be a positive, finite number."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"temperature must be positive and finite; got {value}")


def check_bounds(name: str, value: float, bounds_name: str, bounds: tuple[float, float]) -> None:
    """`bounds` must be two positive, finite numbers in order with `value` strictly between them."""
    low, high = bounds
    if not 0.0 < low < high < float("inf"):
        raise ValueError(f"{bounds_name} must be two positive, finite numbers in order; got {bounds}")
    if not low < value < high:
        raise ValueError(f"{name} must lie between {bounds_name} {bounds}; got {value}")


def check_label_values(name: str, value: Tensor) -> None:
    """Labels must fit in int32, which is what the kernels compare."""
    if value.dtype == torch.int64 and value.numel() > 0:
        low, high = (int(v) for v in value.aminmax())
        if low < INT32.min or high > INT32.max:
            raise ValueError(
                f"{name} must fit in int32 ({INT32.min} to {INT32.max}); got values from {low} to {high}. "
                "Map them to small integers first, for example with torch.unique(..., return_inverse=True)"
            )


def check_weight_values(value: Tensor) -> None:
    """Weights must be finite and not negative."""
    if value.numel() > 0:
        low, high = (float(v) for v in value.aminmax())
        if not (low >= 0.0 and high < float("inf")):
            raise ValueError(f"weights must be finite and not negative; got values from {low} to {high}")


def check_finite(name: str, value: Tensor) -> None:
    """Features must be finite; names the first row that is not."""
    bad = ~torch.isfinite(value).all(dim=-1)
    if bool(bad.any()):
        row = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} must be finite; row {row} holds NaN or infinity ({int(bad.sum())} such rows)")


def check_cloud_pair(x: object, y: object) -> None:
    """`x` must be (B, n, D) or (n, D), and `y` (B, m, D) or (m, D) likewise, neither without points."""
    check_feature_pair("x", x, "y", y)
    assert isinstance(x, Tensor)
    assert isinstance(y, Tensor)
    if x.dim() > 3:
        raise ValueError(f"x must have shape (B, n, D) or (n, D); got {tuple(x.shape)}")
    check_key_shapes("y", y, "x", x)
    for name, cloud in (("x", x), ("y", y)):
        if cloud.shape[-2] == 0:
            raise ValueError(f"{name} must have at least one point; got shape {tuple(cloud.shape)}")


def check_cost_matrix(value: object) -> None:
    """`cost` must be a floating tensor (B, n, m) or (n, m) with at least one row and one column."""
    if not isinstance(value, Tensor):
        raise TypeError(f"cost must be a tensor of shape (B, n, m) or (n, m); got {_describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"cost must be float64, float32, bfloat16 or float16; got {value.dtype}")
    check_dense("cost", value)
    if value.dim() not in (2, 3) or 0 in value.shape[-2:]:
        raise ValueError(f"cost must have shape (B, n, m) or (n, m) with n, m >= 1; got {tuple(value.shape)}")


def check_masses(name: str, value: object, batch: int, points: int, device: torch.device) -> Tensor:
    """`value` must be a floating tensor on `device` that broadcasts to (batch, points); returns it expanded."""
    if isinstance(value, Tensor) and value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating; got dtype {value.dtype}")
    if isinstance(value, Tensor) and value.device != device:
        raise ValueError(f"{name} must be on {device} like the costs; got {value.device}")
    return check_rows(name, value, torch.Size([batch]), points, device)


def check_lengths(name: str, value: object, batch: int, device: torch.device) -> Tensor:
    """`value` must be an integer tensor (batch,) on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape ({batch},); got {_describe(value)}")
    if value.dtype not in INTEGER_DTYPES or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers; got dtype {value.dtype}")
    check_dense(name, value)
    if value.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), one length per problem; got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the costs; got {value.device}")
    return value


def check_per_problem(name: str, value: object, batch: int, device: torch.device) -> None:
    """`value` must be a number, or a floating tensor () or (batch,) on `device` that needs no gradient."""
    if isinstance(value, Tensor):
        if value.dtype not in FLOAT_DTYPES or value.shape not in ((), (batch,)):
            raise ValueError(f"{name} must be a float or a floating tensor of shape ({batch},); got {_describe(value)}")
        check_dense(name, value)
        if value.device != device:
            raise ValueError(f"{name} must be on {device} like the costs; got {value.device}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require grad (there is no gradient to it); detach it first")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a floating tensor of shape ({batch},); got {_describe(value)}")


def check_marginal_weight(name: str, value: object) -> None:
    """`value` must be None (a balanced marginal) or a positive, finite number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be None or a float; got {_describe(value)}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, or None for a balanced marginal; got {value}")


def check_marginal_weights(name: str, value: object) -> None:
    """`value` must be None or a positive, finite number, for both marginals, or a pair of these."""
    if isinstance(value, tuple) and len(value) != 2:
        raise ValueError(f"{name} must be None, a float, or a pair of these for queries and keys; got {value!r}")
    for one in value if isinstance(value, tuple) else (value,):
        check_marginal_weight(name, one)


def check_count(name: str, value: object, at_least: int) -> None:
    """`value` must be an integer of at least `at_least` that an int32 holds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {_describe(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    if value > INT32.max:
        raise ValueError(f"{name} must be at most {INT32.max}; got {value}")


def check_tolerance(value: object) -> None:
    """`tolerance` must be a finite number, not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"tolerance must be a float; got {_describe(value)}")
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"tolerance must be finite and not negative; got {value}")


def can_wait(device: torch.device) -> bool:
    """Whether values on `device` may be read now. While a CUDA graph is captured they do not exist yet."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def check_eps_fits(value: float, dtype: torch.dtype) -> None:
    """eps must not overflow in the dtype that problems are solved in."""
    if abs(value) > torch.finfo(dtype).max:
        raise ValueError(f"eps must be positive and finite in {dtype}; got {value}")


def check_eps_values(value: Tensor) -> None:
    """eps must be positive and finite; names the first problem where it is not."""
    bad = ~((value > 0) & (value < float("inf")))
    if bool(bad.any()):
        raise ValueError(f"eps must be positive and finite; problem {_first(bad)} has {float(value[_first(bad)])}")


def check_length_values(name: str, value: Tensor, points: int) -> None:
    """Lengths must lie between 1 and the padded size; names the first problem where one does not."""
    bad = (value < 1) | (value > points)
    if bool(bad.any()):
        raise ValueError(
            f"{name} must lie between 1 and {points}, the padded size; problem {_first(bad)} has "
            f"{int(value[_first(bad)])}"
        )


def check_mass_values(name: str, value: Tensor) -> None:
    """Weights [B, n] must be finite, not negative and not all zero; names the first problem where they are not."""
    bad = ~((value >= 0) & torch.isfinite(value)).all(-1)
    if bool(bad.any()):
        row = value[_first(bad)]
        worst = float(row[~((row >= 0) & torch.isfinite(row))][0])
        raise ValueError(f"{name} must be finite and not negative; problem {_first(bad)} holds {worst}")
    bad = value.sum(-1) == 0
    if bool(bad.any()):
        raise ValueError(f"{name} must have a positive sum; problem {_first(bad)} has no weight")


def check_equal_masses(a: Tensor, b: Tensor) -> None:
    """Balanced marginals [B, n] and [B, m] must have equal sums; names the first problem where they differ."""
    a_mass, b_mass = a.double().sum(-1), b.double().sum(-1)
    bad = (a_mass - b_mass).abs() > torch.finfo(a.dtype).eps ** 0.5 * torch.maximum(a_mass, b_mass)
    if bool(bad.any()):
        p = _first(bad)
        raise ValueError(
            f"a and b must have equal sums unless tau_a or tau_b is given; problem {p} has {float(a_mass[p]):.6g} and "
            f"{float(b_mass[p]):.6g}"
        )


def check_cost_values(name: str, usable: Tensor) -> None:
    """`usable` [B] says whose costs are finite; names the first problem whose are not."""
    if not bool(usable.all()):
        raise ValueError(
            f"{name} must be finite and not overflow; problem {_first(~usable)} holds NaN, infinity or "
            "too large a number"
        )


def check_scale_values(scale_cost: str | None, scale: Tensor) -> None:
    """Costs must be scaled by something positive; names the first problem where they are not."""
    bad = ~(scale > 0)
    if bool(bad.any()):
        raise ValueError(
            f"scale_cost={scale_cost!r} needs costs whose {scale_cost} is positive; problem {_first(bad)} has "
            f"{float(scale[_first(bad)]):.6g}"
        )
