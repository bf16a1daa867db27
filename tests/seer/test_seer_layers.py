"""Finding the layers by structure, and reading them in one pass."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from seer import InputError
from seer.layers import BaseModel, Head, find_layers, forward_states, lm_head, representations

ARCHITECTURES = ["llama", "qwen2", "mistral", "gemma", "gpt_neox", "bert"]
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
INPUTS = {"input_ids": TOKENS, "attention_mask": MASK}


def with_lora(model, layers: int = 2):
    """Adapter on the first layers, with weights that matter."""
    stack = find_layers(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=stack.linear_pattern(range(layers))))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_that_the_model_reports(make_model, architecture: str) -> None:
    model = make_model(architecture).eval()
    stack = find_layers(model)
    assert len(stack.layers) == 3
    with torch.no_grad():
        states = forward_states(model, INPUTS, stack)
        expected = model(**INPUTS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states.embeddings, expected[0])
    # The model reports its last layer after the final norm; ours is before it.
    for ours, theirs in zip(states.layers[:-1], expected[1:-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    norm = {"gpt_neox": "gpt_neox.final_layer_norm", "bert": None}.get(architecture, "model.norm")
    last = states.layers[-1] if norm is None else model.get_submodule(norm)(states.layers[-1])
    torch.testing.assert_close(last, expected[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_changes_its_layers_and_later_ones_and_can_be_disabled(make_model, architecture: str) -> None:
    plain = make_model(architecture).eval()
    with torch.no_grad():
        expected = forward_states(plain, INPUTS, find_layers(plain))
        model = with_lora(make_model(architecture))
        stack = find_layers(model)
        adapted = forward_states(model, INPUTS, stack)
        model.train()
        base = BaseModel(stack).forward_states(model, INPUTS)
        assert all(part.training for part in model.modules())
    torch.testing.assert_close(adapted.embeddings, expected.embeddings)
    for layer in range(3):
        torch.testing.assert_close(base.layers[layer], expected.layers[layer])
        assert (adapted.layers[layer] - expected.layers[layer])[MASK.bool()].abs().max() > 1e-3
    adapted_layers = {name.split("layer")[1].split(".")[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted_layers == {"0", "1"}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES[:-1], "gemma2", "granite", "mixtral"])
def test_head_turns_the_states_of_chosen_tokens_into_the_models_logits(make_model, architecture: str) -> None:
    model = with_lora(make_model(architecture))
    stack = find_layers(model)
    with torch.no_grad():
        expected = model(**INPUTS).logits  # [R, T, V]
        states = forward_states(model, INPUTS, stack, MASK.bool())
        assert forward_states(model, INPUTS, stack).head_inputs is None
        assert states.head_inputs is not None
        logits = Head(stack)(states.head_inputs)
        after = model(**INPUTS).logits  # no hook is left behind
    torch.testing.assert_close(logits, expected[MASK.bool()])
    torch.testing.assert_close(after, expected)
    Head(stack).check(stack)


def test_a_head_that_needs_more_than_the_last_states_is_refused(make_model) -> None:
    model = make_model("llama")
    plain = type(model).forward

    def forward(self, input_ids=None, **kwargs):
        output = plain(self, input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + 1.0 + input_ids.unsqueeze(-1)
        return output

    model.forward = forward.__get__(model)
    stack = find_layers(model)
    with pytest.raises(InputError, match=r"--kl_weight: expected 0 for LlamaForCausalLM, .*\(they differ\)"):
        Head(stack).check(stack)


def test_every_linear_projection_of_the_first_layers_is_adapted(make_model) -> None:
    model = make_model("llama")
    expected = {
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.startswith(("model.layers.0.", "model.layers.1."))
    }
    wrapped = with_lora(model)
    adapted = {name.removesuffix(".lora_A.default") for name, _ in wrapped.get_base_model().named_modules()}
    assert {name for name in adapted if name + ".lora_A.default" in dict(model.named_modules())} == expected
    assert len(expected) == 14


def test_bert_without_head_has_none(make_model) -> None:
    assert lm_head(find_layers(make_model("bert"))) is None
    assert lm_head(find_layers(make_model("llama"))) is not None


def test_layer_indices(make_model) -> None:
    stack = find_layers(make_model("llama"))
    assert stack.resolve([-1, 0, 2]) == [0, 2]
    assert stack.resolve(None) == [2]  # 25/32 of 3 layers
    for index in (3, -4):
        with pytest.raises(InputError, match=rf"--target_layers: expected layers from -3 to 2 .* got {index}"):
            stack.resolve([index])


def test_experts_inside_a_layer_are_not_mistaken_for_layers(make_model) -> None:
    model = make_model("llama")
    for layer in model.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert find_layers(model).path == "model.layers"


def test_mixture_of_experts() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    assert find_layers(MixtralForCausalLM(config)).path == "model.layers"


def test_two_stacks_need_a_path() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=2))
    with pytest.raises(InputError, match=r"more than one list of 2 layers .* --layers_path.*decoder\.block \(2\)"):
        find_layers(model)
    assert find_layers(model, "encoder.block").layers == list(model.encoder.block)


def test_no_layers(make_model) -> None:
    model = make_model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]])
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no list of 3 layers .*model\.layers \(1\)"):
        find_layers(model)
    with pytest.raises(InputError, match=r"--layers_path: expected the path of a non-empty nn\.ModuleList .*'blocks'"):
        find_layers(model, "blocks")


def test_representations_are_read_at_positions_wherever_the_padding_is() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    requests = torch.tensor([2, 1, 2, 1])
    layers = [torch.randn(4, 5, 6, dtype=torch.float64) for _ in range(3)]
    positions = ["response_mean", "last", "last_request", "mean"]
    found = representations(layers, mask, requests, positions)
    assert found.shape == (4, 3, 4, 6)
    for index, states in enumerate(layers):
        for row in range(4):
            real = states[row, mask[row].bool()]
            torch.testing.assert_close(found[0, index, row], real[requests[row] :].mean(0))
            torch.testing.assert_close(found[1, index, row], real[-1])
            torch.testing.assert_close(found[2, index, row], real[requests[row] - 1])
            torch.testing.assert_close(found[3, index, row], real.mean(0))
    torch.testing.assert_close(representations(layers, mask, requests, ["last"])[0], found[1])


def test_layers_of_different_sizes_cannot_be_represented() -> None:
    layers = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 6)]
    with pytest.raises(InputError, match=r"--target_layers: expected layers of one hidden size, got sizes \[4, 6\]"):
        representations(layers, torch.ones(1, 2), torch.ones(1), ["last"])
