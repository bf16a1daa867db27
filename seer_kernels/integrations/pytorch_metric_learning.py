"""NTXentLoss and SupConLoss of pytorch-metric-learning, without the matrices of pairs.

    from seer_kernels.integrations.pytorch_metric_learning import NTXentLoss

    loss = NTXentLoss(temperature=0.07)(embeddings, labels, ref_emb=keys, ref_labels=key_labels)

The classes extend those of pytorch-metric-learning: constructors, reducers and regularizers are theirs. Pairs follow
from the labels; pairs that a miner chose (`indices_tuple`) are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seer_kernels.contrastive import info_nce, sup_con
from seer_kernels.integrations._host import host_module

host_module("pytorch_metric_learning", "pytorch-metric-learning")

from pytorch_metric_learning import losses  # noqa: E402
from pytorch_metric_learning.distances import DotProductSimilarity  # noqa: E402
from pytorch_metric_learning.reducers import MeanReducer  # noqa: E402


class NTXentLoss(losses.NTXentLoss):
    """`pytorch_metric_learning.losses.NTXentLoss`: for each positive pair its softmax against the anchor's negatives.

    Other positives of the anchor are in no denominator. One pass over all pairs is made for every positive that an
    anchor of the largest class has: one where each label occurs twice, or once in `ref_labels`.

    Args:
        temperature: positive float.
        distance: `CosineSimilarity` (the default) or `DotProductSimilarity`.
        reducer, embedding_regularizer, embedding_reg_weight: as in the original; with the default `MeanReducer` the
            gradient is formed in the forward pass.

    Raises:
        ValueError: an option that is not supported.
    """

    def __init__(self, temperature: float = 0.07, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)
        _normalizes(self.distance)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The losses of the positive pairs of `embeddings` (N, D) and `ref_emb` (M, D), for the reducer."""
        labels, ref_labels = _labels(labels, indices_tuple, ref_labels)
        matchings = list(_matchings(labels, ref_labels))
        if not matchings or _one_label(labels, ref_labels):
            return self.zero_losses()  # type: ignore[no-any-return]
        in_total = type(self.reducer) is MeanReducer
        found = []
        for anchors, positives in matchings:
            others = torch.ones(len(ref_emb), dtype=torch.bool, device=ref_emb.device)
            others[positives] = False
            keys = torch.cat([positives, others.nonzero().squeeze(1)])
            found.append(
                info_nce(
                    embeddings[anchors],
                    ref_emb[keys],
                    temperature=self.temperature,
                    query_labels=labels[anchors],
                    key_labels=ref_labels[keys],
                    same_label="ignore",
                    normalize=_normalizes(self.distance),
                    reduction="sum" if in_total else "none",
                )
            )
        anchors, positives = (torch.cat(rows) for rows in zip(*matchings, strict=True))
        if in_total:
            return _result(torch.stack(found).sum() / len(anchors), None, "already_reduced")
        return _result(torch.cat(found), (anchors, positives), "pos_pair")


class SupConLoss(losses.SupConLoss):
    """`pytorch_metric_learning.losses.SupConLoss`: all positives of an anchor in one softmax, the mean over them.

    Args:
        temperature: positive float.
        distance: `CosineSimilarity` (the default) or `DotProductSimilarity`.
        reducer, embedding_regularizer, embedding_reg_weight: as in the original.

    Raises:
        ValueError: an option that is not supported.
    """

    def __init__(self, temperature: float = 0.1, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)
        _normalizes(self.distance)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The losses of `embeddings` (N, D) against `ref_emb` (M, D), for the reducer."""
        own = ref_labels is labels
        labels, ref_labels = _labels(labels, indices_tuple, ref_labels)
        if own and ref_emb is not embeddings:
            raise ValueError(
                "ref_labels must not be the very tensor that labels is: the original takes row i of ref_emb for "
                "row i of embeddings then, and leaves it out. Pass ref_labels=labels.clone()"
            )
        if _one_label(labels, ref_labels) or not _some_positive(labels, ref_labels, own):
            return self.zero_losses()  # type: ignore[no-any-return]
        rows = sup_con(
            embeddings,
            labels,
            temperature=self.temperature,
            keys=None if own else ref_emb,
            key_labels=None if own else ref_labels,
            normalize=_normalizes(self.distance),
            reduction="none",
        )
        return _result(rows, torch.arange(len(rows), device=rows.device), "element")


def _labels(labels: Tensor | None, indices_tuple: Any, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    if indices_tuple is not None:
        raise ValueError(
            "indices_tuple must be None here: pairs follow from the labels. Instead: the loss of "
            "pytorch-metric-learning, which holds the matrix of pairs that a miner's choice needs"
        )
    if labels is None or ref_labels is None:
        missing = "labels" if labels is None else "ref_labels"
        raise ValueError(f"{missing} must be given: pairs follow from the labels; got None")
    return labels, ref_labels


def _result(found: Tensor, indices: Any, reduction_type: str) -> dict[str, dict[str, Any]]:
    return {"loss": {"losses": found, "indices": indices, "reduction_type": reduction_type}}


def _one_label(labels: Tensor, ref_labels: Tensor) -> bool:
    """Whether no pair is a negative."""
    return bool((labels == labels[:1]).all() & (ref_labels == labels[:1]).all())


def _some_positive(labels: Tensor, ref_labels: Tensor, own: bool) -> bool:
    if own:
        return len(labels.unique()) < len(labels)
    return bool(torch.isin(labels, ref_labels).any())


def _matchings(labels: Tensor, ref_labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All positive pairs, in groups where no anchor and no reference occurs twice: (anchors, references) each.

    Within a label, n anchors and m references make max(n, m) groups: member k of the smaller side meets member k + r of
    the larger one in group r, counted in a circle. In a set compared with itself, group 0 pairs everyone with itself
    and is left out.
    """
    _, classes = torch.cat([labels, ref_labels]).unique(return_inverse=True)
    of_anchor, of_reference = classes.split([len(labels), len(ref_labels)])
    number = int(classes.max()) + 1 if len(classes) else 0
    anchors, references = of_anchor.argsort(stable=True), of_reference.argsort(stable=True)
    anchor_sizes, sizes = of_anchor.bincount(minlength=number), of_reference.bincount(minlength=number)
    n, m = anchor_sizes[of_anchor], sizes[of_anchor]
    start = (sizes.cumsum(0) - sizes)[of_anchor]
    first = (anchor_sizes.cumsum(0) - anchor_sizes)[of_anchor]
    rank = anchors.argsort() - first  # of each anchor among those of its label
    most = torch.maximum(n, m)
    for shift in range(int(ref_labels is labels), int(most[m > 0].max()) if bool((m > 0).any()) else 0):
        met = torch.where(m >= n, (rank + shift) % m.clamp(min=1), (rank - shift) % n)
        anchors = ((met < m) & (shift < most)).nonzero().squeeze(1)
        if len(anchors):
            yield anchors, references[(start + met)[anchors]]


def _normalizes(distance: Any) -> bool:
    """Whether a distance is the cosine rather than the dot product; ValueError where it is neither."""
    if not isinstance(distance, DotProductSimilarity) or distance.p != 2 or distance.power != 1:
        raise ValueError(
            "distance must be CosineSimilarity or DotProductSimilarity, with p=2 and power=1, here; got "
            f"{type(distance).__name__} with p={distance.p}, power={distance.power}. Instead: the loss of "
            "pytorch-metric-learning"
        )
    return bool(distance.normalize_embeddings)
