"""The losses as `torch.nn.Module`s: they hold options and call the public functions; no maths lives here."""

from __future__ import annotations

from torch import Tensor, nn

from seer_kernels._checks import check_choice, check_scalar, check_temperature_value
from seer_kernels._dispatch import BACKENDS
from seer_kernels.contrastive import info_nce
from seer_kernels.contrastive.functional import REDUCTIONS
from seer_kernels.contrastive.problem import SAME_LABEL


class InfoNCELoss(nn.Module):
    """`seer_kernels.info_nce` with its options fixed: `loss = InfoNCELoss(temperature=0.07)(query, key)`.

    Args:
        temperature: positive float.
        same_label, normalize, reduction, backend: as in `info_nce`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        same_label: str = "negative",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_scalar("temperature", temperature)
        check_temperature_value(temperature)
        check_choice("same_label", same_label, SAME_LABEL)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.temperature = temperature
        self.same_label = same_label
        self.normalize = normalize
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        query_labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of `query` (..., N, D) against `key` (..., M, D); see `info_nce`."""
        return info_nce(
            query,
            key,
            temperature=self.temperature,
            query_labels=query_labels,
            key_labels=key_labels,
            same_label=self.same_label,
            normalize=self.normalize,
            weights=weights,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, same_label={self.same_label!r}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
