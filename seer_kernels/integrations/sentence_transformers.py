"""The ranking losses of sentence-transformers, and a supervised contrastive one, without the matrix of scores.

    from seer_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss

    trainer = SentenceTransformerTrainer(model, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))

The classes extend those of sentence-transformers, from which they have their constructors, what a trainer asks them
and, for the cached one, the encoding in two passes: only the loss of the embeddings is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seer_kernels._checks import check_scalar, check_temperature_value
from seer_kernels.contrastive import info_nce, sup_con
from seer_kernels.integrations._host import host_module, supported

host_module("sentence_transformers.sentence_transformer.losses", "sentence-transformers>=6.2")

from sentence_transformers import __version__  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank  # noqa: E402

if not hasattr(losses.CachedMultipleNegativesRankingLoss, "forward_cached"):
    raise ImportError(f"this integration of seer_kernels needs sentence-transformers 6.2 or later; found {__version__}")


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """`sentence_transformers.losses.MultipleNegativesRankingLoss`, in both partition modes.

    Args:
        model, scale, gather_across_devices, partition_mode: as in the original.
        directions: as in the original; "doc_to_doc" needs "doc_to_query".
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`.
        hardness_mode, hardness_strength: must leave the negatives as they are (None, or strength 0).

    Raises:
        ValueError: an option that is not supported, or that the original refuses.
    """

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        _normalizes(self)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of anchors (N, D), positives (N, D) and, for each further column, negatives (N, D)."""
        loss: Tensor = _ranking_loss(self, embeddings)
        return loss


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """`sentence_transformers.losses.CachedMultipleNegativesRankingLoss`: embeddings in mini-batches, one loss.

    Args:
        model, scale, gather_across_devices, partition_mode: as in the original.
        directions, similarity_fct, hardness_mode, hardness_strength: as in `MultipleNegativesRankingLoss`.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar: as in the original; they bound what is encoded at a
            time. The loss needs no mini-batches.

    Raises:
        ValueError: an option that is not supported, or that the original refuses.
    """

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        _normalizes(self)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the columns' embeddings, given in mini-batches; with its backward pass up to them if asked."""
        loss: Tensor = _ranking_loss(self, [torch.cat(column) for column in reps])
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


class SupConLoss(nn.Module):
    """The supervised contrastive loss for texts with integer labels; see `seer_kernels.sup_con`.

    A data set has one or more columns of texts and one of labels. Every text is drawn to all other texts of its label,
    those in the other columns of its row among them. A text that is alone with its label in the batch counts for
    nothing: `BatchSamplers.GROUP_BY_LABEL` makes batches where that does not happen.

    Args:
        model: a SentenceTransformer.
        temperature: positive float.
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`.

    Raises:
        ValueError: an option that is not supported.
    """

    def __init__(
        self, model: Any, temperature: float = 0.1, similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim
    ) -> None:
        super().__init__()
        check_scalar("temperature", temperature)
        check_temperature_value(temperature)
        self.model = model
        self.temperature = temperature
        self.similarity_fct = similarity_fct
        _normalizes(self)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of columns of tokenized texts with `labels` (N,)."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of columns of embeddings (N, D) with `labels` (N,)."""
        loss: Tensor = sup_con(
            torch.cat(list(embeddings)),
            labels.repeat(len(embeddings)),
            temperature=self.temperature,
            normalize=_normalizes(self),
        )
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {"temperature": self.temperature, "similarity_fct": self.similarity_fct.__name__}


def _normalizes(loss: Any) -> bool:
    """Whether a loss compares by cosine; ValueError where its options are not supported."""
    original = "the loss of sentence-transformers"
    supported("similarity_fct", loss.similarity_fct, (cos_sim, dot_score), original)
    if getattr(loss, "hardness_mode", None) is not None and loss.hardness_strength > 0:
        supported("hardness_mode", loss.hardness_mode, (None,), original)
    directions = getattr(loss, "directions", ())
    if "doc_to_doc" in directions and "doc_to_query" not in directions:
        raise ValueError(
            'directions must have "doc_to_query" where they have "doc_to_doc" here; '
            f"got {directions}. Instead: {original}"
        )
    return bool(loss.similarity_fct is cos_sim)


def _ranking_loss(loss: Any, columns: list[Tensor]) -> Any:
    """The loss of columns [N, D] of anchors, positives and negatives, with the options of `loss`.

    The losses of row i as an anchor, log(sum of exp of its scores) minus the score of its pair, share that pair, so the
    loss of one softmax over several directions follows from those of each.
    """
    if len(columns) < 2:
        raise ValueError(f"sentence_features must have two columns or more; got {len(columns)}")
    normalize, directions = _normalizes(loss), set(loss.directions)
    anchors, own = columns[0], len(columns[0])
    queries, documents = anchors, columns[1:]
    if loss.gather_across_devices:
        # Own rows first, as rows pair by position.
        shift = -get_rank() * own
        queries, *documents = (all_gather_with_grad(column).roll(shift, 0) for column in columns)
    positives = documents[0][:own]
    options: dict[str, Any] = {"temperature": 1.0 / loss.scale, "normalize": normalize}

    def one_sided(query: Tensor, pairs: list[Tensor], same_kind: list[Tensor], reduction: str) -> Any:
        """The loss of `query` against `pairs`, whose first rows are its own, and others of its kind of other rows."""
        keys = torch.cat([*pairs, *same_kind])
        if not same_kind:
            return info_nce(query, keys, reduction=reduction, **options)
        rows = torch.arange(len(query), device=query.device)
        labels = torch.full((len(keys),), -1, device=query.device)
        for start in range(sum(map(len, pairs)), len(keys), len(queries)):
            labels[start : start + len(query)] = rows
        return info_nce(
            query, keys, query_labels=rows, key_labels=labels, same_label="ignore", reduction=reduction, **options
        )

    backwards = "doc_to_query" in directions
    if loss.partition_mode == "per_direction" and backwards and queries is anchors:
        return info_nce(anchors, torch.cat(documents), symmetric=True, **options)
    same_kind = [queries] if "query_to_query" in directions else []
    reduction = "none" if backwards and loss.partition_mode == "joint" else "mean"
    forwards_loss = one_sided(anchors, documents, same_kind, reduction)
    if not backwards:
        return forwards_loss
    same_kind = documents if "doc_to_doc" in directions else []
    backwards_loss = one_sided(positives, [queries], same_kind, reduction)
    if loss.partition_mode == "per_direction":
        return (forwards_loss + backwards_loss) / 2
    return torch.logaddexp(forwards_loss, backwards_loss).mean()
