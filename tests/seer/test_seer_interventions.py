"""Interventions do exactly what they say, and the measures of what follows are those of plain passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, normalize

from seer import InputError, Prototypes
from seer.cli import main
from seer.data import tokenize
from seer.interventions import (
    compare,
    intervention,
    measure_faithfulness,
    move_like,
    remove_component,
    swap_component,
)
from seer.layers import find_layers
from seer.reading import LayerReader
from seer.train import run_training

GENERATOR = torch.Generator().manual_seed(0)
STATES = torch.randn(2, 5, 16, generator=GENERATOR, dtype=torch.float64)
OWN, OTHER, RANDOM = normalize(torch.randn(3, 16, generator=GENERATOR, dtype=torch.float64), dim=-1)


def test_remove_takes_the_component_and_nothing_else() -> None:
    changed = remove_component(STATES, OWN)
    torch.testing.assert_close(changed @ OWN, torch.zeros(2, 5, dtype=torch.float64))
    rest = STATES - changed
    torch.testing.assert_close(rest, (STATES @ OWN).unsqueeze(-1) * OWN)
    torch.testing.assert_close(remove_component(changed, OWN), changed)


def test_swap_moves_the_component_to_the_other_direction() -> None:
    changed = swap_component(STATES, OWN, OTHER)
    torch.testing.assert_close(changed - remove_component(STATES, OWN), (STATES @ OWN).unsqueeze(-1) * OTHER)
    torch.testing.assert_close(swap_component(STATES, OWN, OWN), STATES)


def test_the_control_has_the_norm_of_what_it_controls_at_every_token() -> None:
    for changed in (remove_component(STATES, OWN), swap_component(STATES, OWN, OTHER)):
        control = move_like(STATES, changed, RANDOM) - STATES
        torch.testing.assert_close(control.norm(dim=-1), (changed - STATES).norm(dim=-1))
        torch.testing.assert_close(normalize(control, dim=-1), RANDOM.expand_as(control))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "bert"])
def test_an_intervention_changes_the_layer_and_what_follows_but_nothing_before(architecture, make_model) -> None:
    model = make_model(architecture).eval()
    stack = find_layers(model)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    direction = normalize(torch.randn(32, generator=GENERATOR), dim=-1)

    def states() -> dict[int, torch.Tensor]:
        with LayerReader(stack, [0, 1, 2]) as reader, torch.no_grad():
            model(**inputs)
            return dict(reader.states)

    plain = states()
    with intervention(stack.layers[1], lambda h: remove_component(h, direction)):
        changed = states()
    torch.testing.assert_close(changed[0], plain[0])
    torch.testing.assert_close(changed[1], remove_component(plain[1], direction))
    assert (changed[2] - plain[2]).abs().max() > 1e-4
    for layer, values in states().items():
        torch.testing.assert_close(values, plain[layer])


def test_a_known_effect_and_its_interval() -> None:
    generator = np.random.default_rng(0)
    control = generator.normal(1.0, 0.1, 400)
    values = control + generator.normal(0.5, 0.25, 400)
    found = compare(values, control)
    difference = values - control
    assert found.difference.value == pytest.approx(difference.mean())
    half = 1.96 * difference.std(ddof=1) / 20  # the normal approximation
    assert found.difference.low == pytest.approx(difference.mean() - half, abs=0.005)
    assert found.difference.high == pytest.approx(difference.mean() + half, abs=0.005)
    assert found.effect_size.value == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert found.effect_size.low < 2.0 < found.effect_size.high
    assert found.intervention.value == pytest.approx(values.mean())
    assert found.control.value == pytest.approx(control.mean())
    assert compare(np.ones(3), np.ones(3)).effect_size is None
    assert np.isfinite(compare(np.array([1.0, 2.0]), np.zeros(2)).effect_size.high)


@pytest.fixture
def prototypes(dataset) -> Prototypes:
    generator = torch.Generator().manual_seed(3)
    rows = {layer: normalize(torch.randn(3, 32, generator=generator), dim=-1) for layer in (1, 2)}
    return Prototypes(dataset.names, rows)


def test_measures_are_those_of_plain_passes_text_by_text(make_model, tokenizer, dataset, prototypes) -> None:
    model = make_model("llama").eval()
    stack = find_layers(model)
    rows = tokenize(tokenizer, dataset.texts[:7], 64)
    options = {"temperatures": {2: 0.2}, "pad_token_id": 0}
    found = measure_faithfulness(stack, rows, prototypes, 1, batch_size=3, **options)
    assert (found.layer, found.later_layers, found.texts) == (1, [2], 7)

    divergences, falls = [], []
    for row in rows:
        inputs = {"input_ids": torch.tensor([row.ids])}

        def run(reads, inputs=inputs):
            with LayerReader(stack, [1, 2]) as reader, torch.no_grad():
                logits = model(**inputs).logits[0].log_softmax(-1)
                return logits, {layer: reader.states[layer][0] for layer in reads}

        logits, states = run([1, 2])
        concept = int((normalize(states[1][-1], dim=-1) @ prototypes.layers[1].T).argmax())
        direction = prototypes.layers[1][concept]
        with intervention(stack.layers[1], lambda h, direction=direction: remove_component(h, direction)):
            new_logits, new_states = run([2])
        divergences.append(float(kl_div(new_logits, logits, reduction="batchmean", log_target=True)))
        scores = [
            ((normalize(each[2], dim=-1) @ prototypes.layers[2].T) / 0.2).softmax(-1)[:, concept].mean()
            for each in (states, new_states)
        ]
        falls.append(float(scores[0] - scores[1]))
    assert found.comparisons["remove_kl"].intervention.value == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.comparisons["remove_score"].intervention.value == pytest.approx(np.mean(falls), abs=1e-5)

    one_by_one = measure_faithfulness(stack, rows, prototypes, 1, batch_size=1, **options)
    for name in ("remove_kl", "remove_score"):
        assert one_by_one.comparisons[name].intervention.value == pytest.approx(
            found.comparisons[name].intervention.value, rel=1e-3, abs=1e-6
        )
    last = measure_faithfulness(stack, rows, prototypes, 2, temperatures={}, pad_token_id=0)
    assert [*last.comparisons] == ["remove_kl", "swap_kl"]


def test_a_direction_that_decides_the_output_beats_random_ones(make_model, tokenizer, dataset) -> None:
    """A model whose head reads a single direction, in which every state has a part: that one is the explanation."""
    model = make_model("llama").eval()
    stack = find_layers(model)
    direction = normalize(torch.randn(32, generator=torch.Generator().manual_seed(5)), dim=-1)
    weights = torch.randn(64, 1, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        model.lm_head.weight.copy_(3 * weights * direction)
        for layer in stack.layers[2:]:  # the last layer passes its input on
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    shift = 0.2 * direction
    stack.layers[0].register_forward_hook(lambda _, __, output: output + shift)
    others = normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(7)), dim=-1)
    others = normalize(remove_component(others, direction), dim=-1)
    prototypes = Prototypes(dataset.names, dict.fromkeys((1, 2), torch.stack([direction, *others])))
    rows = tokenize(tokenizer, dataset.texts, 64)
    found = measure_faithfulness(
        stack, rows, prototypes, 1, temperatures={2: 0.1}, pad_token_id=0, controls=5
    ).comparisons
    assert found["remove_kl"].difference.low > 0
    assert found["remove_kl"].effect_size.low > 0.5
    assert found["remove_score"].difference.low > 0
    assert found["swap_kl"].difference.low > 0
    assert found["swap_score"].difference.low > 0


def test_bad_input(make_model, tokenizer, dataset, prototypes) -> None:
    rows = tokenize(tokenizer, dataset.texts[:3], 64)
    options = {"temperatures": {2: 0.1}, "pad_token_id": 0}
    stack = find_layers(make_model("llama"))
    with pytest.raises(InputError, match="expected a language model to intervene in, got BertModel"):
        measure_faithfulness(find_layers(make_model("bert")), rows, prototypes, 1, **options)
    with pytest.raises(InputError, match="expected at least two texts and two concepts, got 1 and 3"):
        measure_faithfulness(stack, rows[:1], prototypes, 1, **options)
    with pytest.raises(InputError, match=r"layer: expected one that has prototypes \(\[1, 2\]\), got 0"):
        measure_faithfulness(stack, rows, prototypes, 0, **options)
    with pytest.raises(InputError, match="controls: expected at least 1, got 0"):
        measure_faithfulness(stack, rows, prototypes, 1, controls=0, **options)


def test_the_command_measures_both_models(make_config, model_folder, data_file, capsys) -> None:
    config = make_config(
        model=str(model_folder), data=str(data_file), max_steps=4, learning_rate=1e-2, target_layers=[1]
    )
    out = run_training(config).output_dir
    capsys.readouterr()
    assert main(["faithfulness", out, "--controls", "2"]) == 0
    printed = capsys.readouterr().out
    with open(f"{out}/faithfulness.json", encoding="utf-8") as file:
        results = json.load(file)
    assert {name: (each["layer"], each["texts"]) for name, each in results.items()} == {"base": (1, 3), "seer": (1, 3)}
    base, seer = (results[name]["comparisons"]["remove_kl"]["intervention"]["value"] for name in ("base", "seer"))
    assert base > 0
    assert abs(base - seer) > 1e-6
    assert f"{base:.4f}" in printed
    assert main(["faithfulness", out, "--layer", "3"]) == 2
    assert "expected layers from -3 to 2" in capsys.readouterr().err
    assert main(["faithfulness", out, "--texts", "1"]) == 2
    assert "--texts: expected a whole number >= 2, got 1" in capsys.readouterr().err
