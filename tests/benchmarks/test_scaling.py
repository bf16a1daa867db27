"""docs/scaling.md is what scaling.py says, and its bytes are those that processes send."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import scaling
import torch
import torch.distributed as dist
from scaling import Batch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from across_ranks import counted_bytes, features, launch

from seer_kernels import distributed

BATCH = Batch(M=6, D=64)


def sent_by_this_rank() -> dict[tuple[str, str, bool], float]:
    """Bytes by mode, direction and labels, without sums and sizes."""
    found = {}
    world = dist.get_world_size()
    sizes = (world - 1) * 8 * (len(distributed._Facts._fields) + 1)
    for mode in scaling.MODES:
        for labels in (False, True):
            query, key = features(BATCH.M, dtype=torch.bfloat16, width=BATCH.D)
            options = {"query_labels": torch.arange(BATCH.M), "same_label": "ignore"} if labels else {}
            with counted_bytes() as forward:
                loss = distributed.info_nce(query, key, mode=mode, **options)
            with counted_bytes() as backward:
                loss.sum().backward()
            for direction, sent in (("forward", forward), ("backward", backward)):
                counted = sum(count for name, count in sent.items() if name != "all_reduce")  # sums
                found[mode, direction, labels] = counted - (sizes if direction == "forward" else 0)
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_are_those_that_processes_send(ranks: int, tmp_path: Path) -> None:
    results = launch(ranks, sent_by_this_rank, tmp_path)
    assert None not in results, "a process died"
    for found in results:
        assert len(found) == 8
        for (mode, direction, labels), counted in found.items():
            assert counted == scaling.bytes_sent(mode, direction, ranks, BATCH, labels), (mode, direction, labels)


def test_the_page_is_up_to_date() -> None:
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.page(), "run python benchmarks/scaling.py"


def test_the_model_hides_the_ring_behind_large_products_only() -> None:
    machine = scaling.MACHINES[0]
    threshold = scaling.threshold(machine)
    for pairs, hidden in ((threshold / 4, False), (4 * threshold, True)):
        exposed = scaling.seconds("ring", machine, Batch(int(pairs), 4096))[2]
        assert (exposed == 0) == hidden
    computed, communicated, exposed = scaling.seconds("gather", machine, Batch(512, 1024))
    assert exposed == communicated > 0
    assert scaling.seconds("ring", machine, scaling.BATCHES["CLIP, 4096 pairs a rank"])[2] == 0  # as the page concludes
    assert computed == scaling.flops(machine.ranks, Batch(512, 1024)) / machine.flops
