"""The losses of open_clip, with its constructors and calls: `ClipLoss` and `SigLipLoss`.

    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    value = loss(image_features, text_features, logit_scale)

The matrix of logits is never formed. Values and gradients are those of the original; open_clip itself is not needed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seer_kernels import distributed
from seer_kernels._checks import check_choice
from seer_kernels.contrastive import info_nce, siglip
from seer_kernels.contrastive.problem import accumulation_dtype
from seer_kernels.integrations._host import supported

DISTRIBUTED = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}
"""How keys travel, by the names that open_clip has for its implementations of the sigmoid loss."""


class ClipLoss(nn.Module):
    """`open_clip.loss.ClipLoss`: the mean over both directions of the contrastive loss of images and texts.

    Args:
        local_loss: with several ranks, return the loss of this rank's rows instead of everybody's.
        gather_with_grad: with several ranks, must be True: without it the original leaves out the share of the gradient
            that comes from the other ranks' losses.
        cache_labels: taken for the signature's sake; there are no labels to cache.
        rank, world_size: must be those of torch.distributed where `world_size` is above 1.
        use_horovod: must be False.

    Raises:
        ValueError: an option that is not supported.
        RuntimeError: several ranks, and torch.distributed says otherwise.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        supported("use_horovod", use_horovod, (False,), "torch.distributed, or open_clip's own loss")
        if world_size > 1:
            supported(
                "gather_with_grad",
                gather_with_grad,
                (True,),
                "--gather-with-grad (with --local-loss or without); the other gradient only open_clip's own loss has",
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of `image_features` (N, D) and `text_features` (N, D), which open_clip's models have normalised.

        `logit_scale` multiplies the similarities: 1 / temperature, a float or a tensor with one element. A `logit_bias`
        moves all logits alike, which changes nothing; its gradient is 0.
        """
        temperature = _temperature(logit_scale, image_features.dtype)
        if self.world_size == 1:
            loss = info_nce(image_features, text_features, temperature=temperature, symmetric=True, normalize=False)
        else:
            _check_ranks(self.rank, self.world_size)
            loss = distributed.info_nce(
                image_features,
                text_features,
                temperature=temperature,
                symmetric=True,
                normalize=False,
                reduction="none" if self.local_loss else "mean",
            ).mean()
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`open_clip.loss.SigLipLoss`: the sigmoid loss of every pair of an image and a text.

    Args:
        cache_labels: taken for the signature's sake; there are no labels to cache.
        rank, world_size: must be those of torch.distributed where `world_size` is above 1.
        dist_impl: `"bidir"` (the default) or `"shift"`: texts travel around a ring; `"reduce"` or `"gather"`: all at
            once. The loss is the same.

    Raises:
        ValueError: an unknown `dist_impl`.
        RuntimeError: several ranks, and torch.distributed says otherwise.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        check_choice("dist_impl", self.dist_impl, DISTRIBUTED)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of `image_features` (N, D) and `text_features` (N, D), which open_clip's models have normalised.

        `logit_scale` is 1 / temperature; it and `logit_bias` are floats or tensors with one element. With several ranks
        the loss is that of this rank's images against the texts of all.
        """
        bias = logit_bias.reshape(()) if isinstance(logit_bias, Tensor) else float(logit_bias or 0.0)
        temperature = _temperature(logit_scale, image_features.dtype)
        if self.world_size == 1:
            loss = siglip(image_features, text_features, temperature=temperature, bias=bias, normalize=False)
        else:
            _check_ranks(self.rank, self.world_size)
            loss = distributed.siglip(
                image_features,
                text_features,
                temperature=temperature,
                bias=bias,
                normalize=False,
                reduction="none",
                mode=DISTRIBUTED[self.dist_impl],
            ).mean()
        return {"contrastive_loss": loss} if output_dict else loss


def _temperature(logit_scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(logit_scale, Tensor):
        return 1.0 / logit_scale
    # Inverted in the precision that the loss is computed in.
    return 1.0 / logit_scale.reshape(()).to(accumulation_dtype(dtype))


def _check_ranks(rank: int, world_size: int) -> None:
    if not dist.is_initialized():
        raise RuntimeError(f"world_size={world_size} needs torch.distributed, which is not initialised")
    found = dist.get_rank(), dist.get_world_size()
    if found != (rank, world_size):
        raise RuntimeError(f"rank={rank}, world_size={world_size} do not match torch.distributed's {found}")
