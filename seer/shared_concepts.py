"""InfoNCE where texts have several concepts and any shared one makes a pair positive.

"Shares a concept with" is no equality of labels (a|b shares with a and with b, which share nothing), so the kernels,
which compare integers, cannot express it; here an explicit mask does. A batch has some ten to some hundred pairs: the
B x B similarities are a small part of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from seer_kernels import ContrastiveStatistics, info_nce


def info_nce_of_sets(
    query: Tensor, key: Tensor, concepts: Tensor, *, temperature: float, same_label: str
) -> tuple[Tensor, ContrastiveStatistics]:
    """`seer_kernels.info_nce` with its `same_label` read as "shares a concept".

    Args:
        query: [L, B, D].
        key: [L, B, D]; row i pairs with row i of `query`.
        concepts: (B, 2, C) bool: the concepts of query i and of key i.
        temperature: divides the cosines.
        same_label: what another key is that shares a concept with the query: "negative", "ignore" or "positive".

    Returns:
        The loss and its statistics, (L,) each, in float32 (float64 for float64 input).
    """
    if same_label == "negative":
        return info_nce(query, key, temperature=temperature, return_stats=True)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        cosines = normalize(query.to(dtype), dim=-1) @ normalize(key.to(dtype), dim=-1).mT  # [L, B, B]
        sets = concepts.to(dtype)
        shares = sets[:, 0] @ sets[:, 1].T > 0  # [B, B]
    own = torch.eye(len(concepts), dtype=torch.bool, device=query.device)
    negative = ~(shares | own)
    positive = shares | own if same_label == "positive" else own
    logits = (cosines / temperature).masked_fill(~(positive | negative), -torch.inf)
    log_shares = cosines / temperature - logits.logsumexp(-1, keepdim=True)
    losses = -(log_shares * positive).sum(-1) / positive.sum(-1)  # [L, B]

    with torch.no_grad():
        has_negative = negative.any(-1)
        to_negatives = (cosines * negative).sum(-1) / negative.sum(-1).clamp(min=1)
        best_positive, best_negative = (cosines.masked_fill(~m, -torch.inf).amax(-1) for m in (positive, negative))
        statistics = ContrastiveStatistics(
            positive_similarity=((cosines * positive).sum(-1) / positive.sum(-1)).mean(-1),
            negative_similarity=to_negatives.sum(-1) / has_negative.sum().clamp(min=1),
            top1_accuracy=(best_positive > best_negative).to(dtype).mean(-1),
        )
    return losses.mean(-1), statistics
