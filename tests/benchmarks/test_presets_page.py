"""The page of presets is what the committed results say."""

from __future__ import annotations

import presets


def test_the_page_is_up_to_date() -> None:
    lines = presets._read(presets.harness.RESULTS / "presets.csv")
    assert presets.page(lines) == presets.PAGE.read_text(encoding="utf-8")
    assert {line["measure"] for line in lines} == set(presets.MEASURES)


def test_a_row_tells_both_presets_and_how_many_seeds_moved_the_right_way() -> None:
    def line(preset: str, seed: int, measure: str, base: float, seer: float) -> dict[str, str]:
        place = {"preset": preset, "data": "colors", "seed": str(seed), "layer": "4", "texts_per_concept": "9"}
        return place | {
            "texts": "12",
            "steps": "8" if preset == "reference" else "2",
            "measure": measure,
            "base": str(base),
            "seer": str(seer),
        }

    page = presets.page(
        [
            line("reference", 1, "knn_accuracy", 0.5, 0.25),
            line("reference", 2, "knn_accuracy", 0.5, 0.75),
            line("default", 1, "knn_accuracy", 0.5, 0.75),
            line("default", 2, "knn_accuracy", 0.25, 0.5),
            line("default", 1, "k_variance", 1.0, 0.5),
            line("default", 1, "kl", 0.0, 0.125),
            line("default", 1, "bound", float("nan"), 3.0),
            line("default", 2, "bound", 5.0, 3.0),
        ]
    )
    assert "seeds 1, 2; 8 steps with `reference`, 2 steps with `default`" in page
    rows = {row.split(" | ")[0]: row for row in page.splitlines() if row.startswith("| ")}
    assert rows["| k-NN accuracy"] == "| k-NN accuracy | 0.375 ± 0.18 | 0.5 ± 0.35 | 1 of 2 | 0.625 ± 0.18 | 2 of 2 |"
    assert rows["| k-variance, training texts"] == "| k-variance, training texts | 1 |  |  | 0.5 | 1 of 1 |"
    assert rows["| KL to the base model, nats per token"].endswith("| 0 |  |  | 0.125 |  |")
    assert rows["| bound of the share of errors"] == "| bound of the share of errors | 5 |  |  | 3 ± 0 | 1 of 1 |"
