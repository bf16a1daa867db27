"""The losses with pytorch-metric-learning's signatures against its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, reducers, regularizers  # noqa: E402

from seer_kernels.integrations import pytorch_metric_learning as ours  # noqa: E402

NAMES = ("NTXentLoss", "SupConLoss")
LABELS = {
    "pairs": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    "classes": [0, 1, 0, 2, 0, 1, 1, 3, 0, 9],
    "equal": [0, 1, 2, 0, 1, 2, 0, 1, 2, 7],
}


def embeddings(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator, dtype=torch.float64).requires_grad_()


def outcome(loss: Any, labels: list[int], ref_labels: list[int] | None) -> list[Tensor]:
    queries, refs = embeddings(len(labels)), None if ref_labels is None else embeddings(len(ref_labels), 1)
    more = {} if ref_labels is None else {"ref_emb": refs, "ref_labels": torch.tensor(ref_labels)}
    value = loss(queries, torch.tensor(labels), **more)
    value.backward()
    return [value.detach(), queries.grad, *([] if refs is None else [refs.grad])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("ref_labels", [None, [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 9, 9, 9, 5, 0, 0, 0, 0, 1, 8]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "reducer": reducers.PerAnchorReducer()},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
        {"embedding_regularizer": regularizers.LpRegularizer(), "reducer": reducers.ThresholdReducer(low=0.7)},
    ],
    ids=["default", "per anchor", "dot product", "regularized"],
)
def test_equal(name: str, kind: str, ref_labels: list[int] | None, options: dict[str, Any]) -> None:
    if isinstance(options.get("reducer"), reducers.PerAnchorReducer) and (name == "SupConLoss" or ref_labels):
        pytest.skip("it reduces pairs, and fails by itself where there are more references than anchors")
    want = outcome(getattr(losses, name)(**options), LABELS[kind], ref_labels)
    got = outcome(getattr(ours, name)(**options), LABELS[kind], ref_labels)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("labels", "ref_labels"), [([0, 0, 0], None), ([0, 1, 2], None), ([0, 1, 2], [4, 5]), ([1, 1], [1, 1, 1])]
)
def test_without_positives_or_without_negatives_the_loss_is_zero(
    name: str, labels: list[int], ref_labels: list[int] | None
) -> None:
    want = outcome(getattr(losses, name)(), labels, ref_labels)
    got = outcome(getattr(ours, name)(), labels, ref_labels)
    assert got[0] == want[0] == 0
    assert not got[1].any()


def test_with_its_wrapper_for_two_views() -> None:
    def run(kind: Any) -> list[Tensor]:
        views = embeddings(5), embeddings(5, 1)
        value = losses.SelfSupervisedLoss(kind(temperature=0.2))(*views)
        value.backward()
        return [value.detach(), *(view.grad for view in views)]

    torch.testing.assert_close(run(ours.NTXentLoss), run(losses.NTXentLoss), rtol=1e-10, atol=1e-10)


def test_every_pair_is_in_one_matching() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        n, m = (int(x) for x in torch.randint(1, 12, (2,), generator=generator))
        labels, refs = (torch.randint(0, 4, (k,), generator=generator) for k in (n, m))
        for others in (refs, labels):
            groups = list(ours._matchings(labels, others))
            pairs = [pair for a, p in groups for pair in zip(a.tolist(), p.tolist(), strict=True)]
            same = {(i, j) for i in range(n) for j in range(len(others)) if labels[i] == others[j]}
            assert len(pairs) == len(set(pairs))
            assert set(pairs) == (same if others is refs else {(i, j) for i, j in same if i != j})
            for side in (part for group in groups for part in group):
                assert len(side.unique()) == len(side)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_supported_is_refused(name: str) -> None:
    kind = getattr(ours, name)
    for distance in (distances.LpDistance(), distances.CosineSimilarity(power=2)):
        with pytest.raises(ValueError, match="distance must be CosineSimilarity or DotProductSimilarity"):
            kind(distance=distance)
    x, labels = embeddings(4), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="indices_tuple must be None here"):
        kind()(x, labels, (torch.tensor([0]), torch.tensor([2]), torch.tensor([1])))
    with pytest.raises(ValueError, match="labels must be given"):
        kind()(x)


def test_ref_labels_that_are_the_labels_are_refused() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"Pass ref_labels=labels\.clone\(\)"):
        ours.SupConLoss()(embeddings(4), labels, ref_emb=embeddings(4, 1), ref_labels=labels)
