"""k-variance of concepts: how far two samples of one concept lie from each other in Wasserstein-1 distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seer_kernels import _checks, _dispatch
from seer_kernels.sinkhorn.costs import cost_matrix
from seer_kernels.sinkhorn.functional import sinkhorn_from_cost
from seer_kernels.sinkhorn.problem import accumulation_dtype

METHODS = ("sinkhorn", "exact")


class KVariance(NamedTuple):
    """k-variances of C concepts, in the order of `labels`."""

    values: Tensor
    """(C,): mean Wasserstein-1 distance between the two halves of a split, float32 (float64 for float64 features)."""
    standard_errors: Tensor
    """(C,): standard error of that mean over the splits, for the samples at hand."""
    labels: Tensor
    """(C,): the concepts, sorted."""


def k_variance(
    features: Tensor,
    labels: Tensor,
    *,
    k: int | None = None,
    splits: int = 64,
    generator: torch.Generator | None = None,
    method: str = "sinkhorn",
    eps: float = 0.05,
    max_iterations: int = 1000,
    tolerance: float = 1e-3,
    backend: str = "auto",
) -> KVariance:
    """Var_k of every concept: E[W1(mu_k, mu'_k)] over two disjoint k-samples, with Euclidean ground cost.

    Chuang et al. 2021, arXiv 2106.03314, definition 2. Each split draws 2k of a concept's samples without replacement
    and halves them; all splits of all concepts are one batch of transport problems, whose costs are parts of one
    distance matrix per concept. No gradient.

    Args:
        features: (N, D) in float64, float32, bfloat16 or float16.
        labels: (N,) integers, the concept of each row.
        k: size of each half; a concept with fewer than 2k samples uses half of them. Default: half of each concept.
        splits: how many random splits per concept, at least 2.
        generator: makes the splits reproducible; on the CPU. Default: torch's global one.
        method: `"sinkhorn"`: `<P, C>` of the entropic plan, which lies above W1 by a bias that grows with `eps`;
            `"exact"`: `ot.emd2` of POT, one problem at a time, to know that bias.
        eps: weight of the entropy, a float, relative to the mean cost of each problem.
        max_iterations, tolerance, backend: as in `sinkhorn`.

    Raises:
        TypeError, ValueError: a wrong argument, or a concept with a single sample.
        ModuleNotFoundError: `method="exact"` without POT.

    Warns:
        ConvergenceWarning: as `sinkhorn`.
    """
    _checks.check_features("features", features)
    if features.dim() != 2:
        raise ValueError(f"features must have shape (N, D); got {tuple(features.shape)}")
    labels = _checks.check_labels("labels", labels, torch.Size([]), features.shape[0], features.device)
    _checks.check_choice("method", method, METHODS)
    _checks.check_choice("backend", backend, ("auto", *_dispatch.BACKENDS))
    _checks.check_count("splits", splits, 2)
    if k is not None:
        _checks.check_count("k", k, 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be None or a torch.Generator; got {generator!r}")
    with torch.no_grad():
        concepts = torch.unique(labels)
        halves = []
        for concept in concepts:
            samples = int((labels == concept).sum())
            if samples < 2:
                raise ValueError(
                    f"labels must give every concept at least two samples; concept {int(concept)} has {samples}"
                )
            halves.append(min(samples // 2, k or samples))
        costs = _split_costs(features, labels, concepts, halves, splits, generator, backend)
        lengths = torch.tensor(halves, device=features.device).repeat_interleave(splits)
        if method == "exact":
            distances = _exact(costs, lengths)
        else:
            # Scaling a cost and its eps alike scales <P, C>, so results stay in the units of the features.
            scaled = sinkhorn_from_cost(
                costs,
                eps=eps,
                scale_cost="mean",
                x_lengths=lengths,
                y_lengths=lengths,
                max_iterations=max_iterations,
                tolerance=tolerance,
                backend=backend,
            )
            distances = scaled.transport_cost * scaled.scale
        distances = distances.view(len(concepts), splits)
        return KVariance(distances.mean(1), distances.std(1) / splits**0.5, concepts)


def _split_costs(
    features: Tensor,
    labels: Tensor,
    concepts: Tensor,
    halves: list[int],
    splits: int,
    generator: torch.Generator | None,
    backend: str,
) -> Tensor:
    """Distances between the halves of every split: [C * splits, k, k] for the largest k, zeros past the others'."""
    largest = max(halves, default=0)
    dtype = accumulation_dtype(features.dtype)
    costs = features.new_zeros(len(concepts), splits, largest, largest, dtype=dtype)
    for concept, half, of_concept in zip(concepts, halves, costs, strict=True):
        cloud = features[labels == concept].unsqueeze(0)
        distances = cost_matrix(cloud, cloud, None, None, "euclidean", backend)[0]
        # Sorting random numbers, drawn on the CPU, gives the same splits on every device.
        drawn = torch.rand(splits, cloud.shape[1], generator=generator).argsort(1).to(features.device)
        rows, columns = drawn[:, :half], drawn[:, half : 2 * half]
        of_concept[:, :half, :half] = distances[rows.unsqueeze(2), columns.unsqueeze(1)]
    return costs.flatten(0, 1)


def _exact(costs: Tensor, lengths: Tensor) -> Tensor:
    try:
        import ot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('method="exact" needs POT: pip install pot') from error
    values = []
    for cost, k in zip(costs.cpu().double(), lengths.tolist(), strict=True):
        uniform = torch.full((k,), 1 / k, dtype=torch.float64).numpy()
        values.append(float(ot.emd2(uniform, uniform, cost[:k, :k].contiguous().numpy(), numItermax=1_000_000)))
    return torch.tensor(values, dtype=costs.dtype, device=costs.device)
