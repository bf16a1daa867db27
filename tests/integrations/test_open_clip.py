"""The losses with open_clip's signatures against its own."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from seer_kernels.integrations import open_clip as ours


def original() -> dict[str, Any]:
    """open_clip's module of losses, by itself: the package as a whole imports torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        pytest.skip("open_clip_torch is not installed")
    return runpy.run_path(str(Path(package.submodule_search_locations[0]) / "loss.py"))


def inputs(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(rows, 8, generator=generator, dtype=torch.float64), dim=-1) for _ in "it")
    scale, bias = torch.tensor(14.3, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    return tuple(x.requires_grad_() for x in (image, text, scale, bias))  # type: ignore[return-value]


def value_and_gradients(loss: Any, bias: bool, seed: int = 0) -> list[Tensor]:
    image, text, scale, shift = inputs(seed=seed)
    value = loss(image, text, scale, shift if bias else None)
    value.backward()
    return [value.detach(), *(x.grad for x in (image, text, scale, *([shift] if bias else [])))]


@pytest.mark.parametrize(("name", "bias"), [("ClipLoss", False), ("ClipLoss", True), ("SigLipLoss", True)])
def test_one_process(name: str, bias: bool) -> None:
    want = value_and_gradients(original()[name](), bias)
    got = value_and_gradients(getattr(ours, name)(), bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_scale_with_one_dimension_and_a_dictionary() -> None:
    image, text, *_ = inputs()
    scale = torch.tensor([10.0])
    for name, more in (("ClipLoss", {}), ("SigLipLoss", {"logit_bias": torch.tensor([-3.0])})):
        want = original()[name]()(image, text, scale, output_dict=True, **more)
        got = getattr(ours, name)()(image, text, scale, output_dict=True, **more)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.ClipLoss(use_horovod=True), "use_horovod must be False here; got True"),
        (lambda: ours.ClipLoss(world_size=2), "gather_with_grad must be True here; got False"),
        (lambda: ours.SigLipLoss(dist_impl="tree"), "dist_impl must be one of 'bidir', 'shift', 'reduce', 'gather'"),
    ],
)
def test_what_is_not_supported_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"world_size=2 needs torch\.distributed"):
        ours.ClipLoss(gather_with_grad=True, rank=0, world_size=2)(*inputs()[:3])


CASES = [
    *(("ClipLoss", {"local_loss": local, "gather_with_grad": True}) for local in (True, False)),
    *(("SigLipLoss", {"dist_impl": way}) for way in ("bidir", "shift", "reduce", "gather")),
]


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    for name, options in CASES:
        pair = []
        for losses in (original(), vars(ours)):
            loss = losses[name](rank=rank, world_size=2, **options)
            pair.append(value_and_gradients(loss, name == "SigLipLoss", seed=rank))
            for scalar in pair[-1][3:]:  # as DistributedDataParallel does: each rank has its own share
                dist.all_reduce(scalar)
        found.append(pair)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    original()
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for (name, options), (want, got) in zip(CASES, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name, o=options, r=rank: f"{n} {o} rank {r}: {m}"
            )
