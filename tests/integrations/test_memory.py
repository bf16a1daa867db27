"""What the losses hold beside embeddings and gradients, in bytes of torch's allocator, beside the originals."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("rich", reason="the benchmarks need rich, which is not installed")
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("harness")
    finally:
        sys.path.remove(folder)


def ranking(losses: Any, rows: int) -> Callable[..., Tensor]:
    loss = losses.MultipleNegativesRankingLoss(None)
    return lambda query, key: loss.compute_loss_from_embeddings([query, key], torch.empty(0))


def pairs(losses: Any, rows: int) -> Callable[..., Tensor]:
    loss, labels = losses.NTXentLoss(), torch.arange(rows)
    return lambda query, key: loss(query, labels, ref_emb=key, ref_labels=labels.clone())


def classes(losses: Any, rows: int) -> Callable[..., Tensor]:
    loss, labels = losses.SupConLoss(), torch.arange(2 * rows) % 64
    return lambda query, key: loss(torch.cat([query, key]), labels)


@pytest.mark.parametrize(
    ("host", "module", "make", "rows"),
    [
        ("sentence_transformers", "sentence_transformers.sentence_transformer.losses", ranking, 4096),
        ("pytorch_metric_learning", "pytorch_metric_learning.losses", pairs, 128),
        ("pytorch_metric_learning", "pytorch_metric_learning.losses", classes, 2048),
    ],
    ids=["ranking", "pairs", "classes"],
)
def test_a_small_share_of_the_memory(harness: Any, host: str, module: str, make: Callable[..., Any], rows: int) -> None:
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"not installed: {host}")
    originals = importlib.import_module(module)
    peaks = []
    for losses in (originals, importlib.import_module(f"seer_kernels.integrations.{host}")):
        loss = make(losses, rows)
        query, key = torch.randn(2, rows, 32).unbind()
        query, key = query.requires_grad_(), key.requires_grad_()

        def call(loss: Callable[..., Tensor] = loss, query: Tensor = query, key: Tensor = key) -> Any:
            value = loss(query, key)
            return harness.Outputs(value.detach(), torch.autograd.grad(value, (query, key)))

        peaks.append(harness.peak_memory(call, torch.device("cpu"))[0])
    assert peaks[1] < peaks[0] / 4, peaks
