"""The training step: its value and gradient, the passes it takes, and what it does not depend on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import DECODERS, SIZES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig, TrainerCallback
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from seer import ConceptDataset, InputError, Prototypes, SeerTrainer, TextDataset
from seer.config import POSITIONS
from seer.data import Text, Tokens
from seer.evaluation import separation, separation_by_concept
from seer.packing import Packing
from seer_kernels import sinkhorn_divergence


def exact(trainer: SeerTrainer) -> SeerTrainer:
    """In float64, with adapter weights that matter."""
    trainer.model.double().eval()
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return trainer


def gradients(trainer: SeerTrainer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in trainer.model.parameters() if p.requires_grad]))


def assert_same_gradient(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Up to the float32 that models compute norms and rotary angles in, whatever their own type."""
    a, b = torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in theirs])
    assert (a - b).norm() < 1e-5 * b.norm()


def states_and_logits(trainer: SeerTrainer, ids: list[int]) -> tuple[list[Tensor], Tensor]:
    """One text alone, without padding, the plain way: every layer's output, and the logits."""
    outputs: list[Tensor] = []
    layers = trainer.stack.layers
    hooks = [layer.register_forward_hook(lambda _, args, out: outputs.append(out)) for layer in layers]
    hooks.append(layers[0].register_forward_pre_hook(lambda _, args: outputs.append(args[0])))
    logits = trainer.model(input_ids=torch.tensor([ids])).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits[0]


def at_position(states: Tensor, request_length: int, position: str) -> Tensor:
    """[T, D] states of one text to [D]."""
    if position == "mean":
        return states.mean(0)
    if position == "response_mean":
        return states[request_length:].mean(0)
    return states[-1] if position == "last" else states[request_length - 1]


def formula(
    trainer: SeerTrainer, view1: list[Tokens], view2: list[Tokens], retain: list[Tokens], ids: list[int]
) -> Tensor:
    """The loss of the method, one text at a time."""
    args = trainer.args
    losses = []
    views = [[(states_and_logits(trainer, text.ids)[0], text) for text in view] for view in (view1, view2)]
    for position in args.positions:
        for layer in trainer.target_layers:
            z1, z2 = (
                torch.stack([at_position(states[layer + 1][0], text.request_length, position) for states, text in view])
                for view in views
            )
            cosines = torch.nn.functional.cosine_similarity(z1[:, None], z2[None], dim=-1)
            for i in range(len(ids)):
                keys = [j for j in range(len(ids)) if j == i or args.same_label == "negative" or ids[i] != ids[j]]
                losses.append((cosines[i, keys] / args.temperature).logsumexp(0) - cosines[i, i] / args.temperature)
    disentangle = torch.stack(losses).mean()

    distances, divergences = [], []
    for text in retain:
        adapted, logits = states_and_logits(trainer, text.ids)
        with torch.no_grad(), trainer.model.disable_adapter():
            base, base_logits = states_and_logits(trainer, text.ids)
        if args.retain_layers is not None:
            adapted, base = ([states[layer + 1] for layer in args.retain_layers] for states in (adapted, base))
        if args.retain_loss == "sinkhorn":
            parts = [sinkhorn_divergence(a[0], b[0], scale_cost="mean") for a, b in zip(adapted, base, strict=True)]
            distances.append(torch.stack(parts).mean())
        else:
            distances.append((torch.stack(adapted) - torch.stack(base)).square().sum().sqrt())
        p, log_q = base_logits.softmax(-1), logits.log_softmax(-1)
        if args.kl_form == "full":
            divergences.append((p * (p.log() - log_q)).sum(-1))
        else:
            steps, labels = range(len(text.ids) - 1), text.ids[1:]
            divergences.append(-(p[steps, labels] * log_q[steps, labels]).sum(0, keepdim=True))
    retained = torch.stack(distances).mean()
    if args.retain_loss == "norm":
        retained = retained * len(trainer.target_layers) / (max(trainer.target_layers) + 1) / 100
    kl = torch.cat(divergences).mean()
    return args.disentangle_weight * disentangle + args.retain_weight * retained + args.kl_weight * kl


def texts_of(batch: dict[str, Tensor]) -> list[Tokens]:
    masks = batch["attention_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(batch["input_ids"], masks, strict=True)]
    return [Tokens(*text) for text in zip(ids, batch["request_lengths"].tolist(), strict=True)]


RETAIN = TextDataset([Text("name one", "gold tin", "r1"), Text("is is is a cat", None, "r2"), Text("dog", "cat", "r3")])


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt_neox"])
@pytest.mark.parametrize("with_retain_texts", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": ["response_mean", "last_request", "last"], "retain_layers": [0, 1], "kl_form": "label"},
        {"retain_loss": "sinkhorn", "retain_layers": [1]},
    ],
)
def test_loss_and_gradient_are_those_of_the_method(
    make_model, make_config, dataset, tokenizer, architecture, with_retain_texts, options
) -> None:
    config = make_config(
        target_layers=[0, 2],
        lora_dropout=0.0,
        same_label="ignore",
        retain_weight=3.0,
        kl_weight=2.0,
        temperature=0.3,
        **options,
    )
    retain_dataset = RETAIN if with_retain_texts else None
    trainer = exact(SeerTrainer(make_model(architecture), config, dataset, tokenizer, retain_dataset=retain_dataset))
    batch = next(iter(trainer.get_train_dataloader()))
    texts = texts_of(batch)
    assert len(texts) == (12 if with_retain_texts else 8)
    loss = trainer.compute_loss(trainer.model, batch)
    retain = texts[8:] if with_retain_texts else texts[:4]
    expected = formula(trainer, texts[:4], texts[4:8], retain, batch["concept_ids"].tolist())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradient(gradients(trainer, loss), gradients(trainer, expected))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"positions": ["response_mean", "last_request"], "kl_form": "label"}])
def test_padding_changes_nothing(make_model, make_config, dataset, tokenizer, architecture: str, options) -> None:
    config = make_config(target_layers=[1, 2], lora_dropout=0.0, **options)
    trainer = exact(SeerTrainer(make_model(architecture), config, dataset, tokenizer))
    batch = next(iter(trainer.get_train_dataloader()))
    rows = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert len({len(row) for row in rows}) > 1

    def padded(length: int, left: bool) -> dict[str, Tensor]:
        ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        return {**batch, "input_ids": ids, "attention_mask": mask}

    width = batch["input_ids"].shape[1]
    loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    expected = gradients(trainer, loss)
    assert terms["L_r"] > 0
    assert terms["L_kl"] > 0
    for other in (padded(width + 9, left=False), padded(width, left=True), padded(width + 9, left=True)):
        loss, other_terms = trainer.compute_loss(trainer.model, other, return_outputs=True)
        torch.testing.assert_close(other_terms, terms, rtol=1e-5, atol=1e-7)
        assert_same_gradient(gradients(trainer, loss), expected)


@pytest.mark.parametrize(
    ("options", "retain_dataset", "passes"),
    [
        ({}, None, [("base", 4), ("adapted", 8)]),
        ({"target_layers": [0, 1, 2]}, None, [("base", 4), ("adapted", 8)]),
        ({}, RETAIN, [("base", 4), ("adapted", 12)]),
        ({"kl_weight": 0.0}, None, [("base", 4), ("adapted", 8)]),
        ({"kl_weight": 0.0, "retain_weight": 0.0}, None, [("adapted", 8)]),
    ],
)
def test_passes_of_a_step(make_model, make_config, dataset, tokenizer, options, retain_dataset, passes) -> None:
    config = make_config(max_steps=2, **options)
    trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=retain_dataset)
    seen: list[tuple[str, int]] = []

    def count(module, args, kwargs) -> None:
        disabled = trainer.model.get_model_status().enabled is False
        seen.append(("base" if disabled else "adapted", len(kwargs["input_ids"])))

    trainer.stack.root.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert seen == passes * 2


def test_only_tokens_that_the_kl_reads_go_through_the_head(make_model, make_config, dataset, tokenizer) -> None:
    trainer = SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    shapes = []
    trainer.stack.root.lm_head.register_forward_hook(lambda _, args, out: shapes.append(out.numel() // 64))
    trainer.compute_loss(trainer.model, batch)
    tokens = int(batch["attention_mask"][:4].sum())
    assert sorted(shapes) == [0, 0, 1, tokens, tokens]  # 1: what a row of logits is long


def test_reference_is_the_base_model_without_dropout(make_model, make_config, dataset, tokenizer) -> None:
    """At the start the adapter changes nothing, so both retain terms are 0 in spite of the adapter's dropout."""
    trainer = SeerTrainer(make_model("llama"), make_config(lora_dropout=0.5), dataset, tokenizer)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    _, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert terms["L_r"] == pytest.approx(0, abs=1e-7)  # a product may round in another order when run again
    assert terms["L_kl"] == pytest.approx(0, abs=1e-7)
    assert trainer.model.training
    assert all(part.training for part in trainer.model.modules())


def test_activation_checkpointing_gives_the_same_gradient(make_model, make_config, dataset, tokenizer) -> None:
    trainer = exact(SeerTrainer(make_model("llama"), make_config(lora_dropout=0.0), dataset, tokenizer))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    expected = gradients(trainer, trainer.compute_loss(trainer.model, batch))
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradient(gradients(trainer, trainer.compute_loss(trainer.model, batch)), expected)


def test_logged_loss_is_the_weighted_sum_of_the_logged_terms(make_model, make_config, dataset, tokenizer) -> None:
    config = make_config(
        per_device_train_batch_size=3,  # six batches per epoch, so that no step has fewer than two
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        kl_weight=5.0,
    )
    trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        expected = 10 * entry["L_d"] + entry["L_r"] + 5 * entry["L_kl"]
        assert entry["loss"] == pytest.approx(expected, abs=2e-3)
        assert -1 <= entry["negative_similarity"] <= 1
    assert logs[1]["L_d"] < logs[0]["L_d"]
    assert logs[1]["L_kl"] > 1e-3


def test_encoder_without_head(make_model, make_config, dataset, tokenizer) -> None:
    message = r"--kl_weight: expected 0 for BertModel, which has no language-model head, got 1\.0"
    with pytest.raises(InputError, match=message):
        SeerTrainer(make_model("bert"), make_config(), dataset, tokenizer)
    config = make_config(kl_weight=0.0, max_steps=2)
    trainer = SeerTrainer(make_model("bert"), config, dataset, tokenizer, eval_dataset=dataset)
    trainer.train()
    assert {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    measures = ("same_concept_cosine", "different_concept_cosine", "nearest_prototype_accuracy")
    suffixes = ("", "/animal", "/fruit", "/metal")
    assert set(trainer.evaluate()) == {f"eval_{name}{suffix}" for name in measures for suffix in suffixes}


def test_a_killed_run_continues_as_if_nothing_had_happened(
    make_model, make_config, dataset, tokenizer, tmp_path
) -> None:
    """Six samples of three concepts, batches of four: five steps per epoch, and a checkpoint in the second epoch."""
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 7, "lora_dropout": 0.1, "learning_rate": 1e-2}

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 9:
                raise KeyboardInterrupt

    def trainer(folder: str, **more) -> SeerTrainer:
        config = make_config(output_dir=str(tmp_path / folder), **options)
        return SeerTrainer(make_model("llama"), config, dataset, tokenizer, **more)

    whole = trainer("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("killed", callbacks=[Kill()]).train()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-7"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_an_epoch_has_the_pairs_of_its_number(make_model, make_config, dataset, tokenizer) -> None:
    """Told by the trainer itself: what accelerate does about it depends on how many processes there are."""
    trainer = SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer)
    first = list(trainer._sampler)
    trainer.state.epoch = 3.5
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert trainer._sampler.epoch == 3
    assert list(trainer._sampler) != first


def test_the_seed_decides_the_adapter(make_model, make_config, dataset, tokenizer) -> None:
    def train(seed: int) -> dict[str, Tensor]:
        model = make_model("llama")
        torch.seed()  # what the caller did with the generator must not matter
        trainer = SeerTrainer(model, make_config(max_steps=5, seed=seed), dataset, tokenizer)
        trainer.train()
        return {name: p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name}

    first, second, other = train(3), train(3), train(4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_evaluate_measures_the_adapted_model(make_model, make_config, dataset, tokenizer) -> None:
    trainer = exact(SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer, eval_dataset=dataset))
    metrics = trainer.evaluate()
    measurement = trainer.measure()
    target = trainer.target_layers[0]
    rows, prefix = trainer._pairs.rows, "eval_"
    with torch.no_grad():
        alone = [states_and_logits(trainer, row.ids) for row in rows]
        with trainer.model.disable_adapter():
            base = [states_and_logits(trainer, row.ids) for row in rows]
    after = torch.stack([states[target + 1][0, -1] for states, _ in alone]).float()
    before = torch.stack([states[target + 1][0, -1] for states, _ in base]).float()
    torch.testing.assert_close(measurement.encoding.after[target], after)
    torch.testing.assert_close(measurement.encoding.before[target], before)
    p = torch.cat([logits for _, logits in base]).log_softmax(-1)
    q = torch.cat([logits for _, logits in alone]).log_softmax(-1)
    assert metrics[f"{prefix}kl_to_base"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    expected = separation(after, torch.from_numpy(dataset.concept_ids), measurement.prototypes, target)
    assert metrics[f"{prefix}same_concept_cosine"] == pytest.approx(expected.same_concept_cosine)
    assert measurement.before[target] != measurement.after[target]


def test_texts_that_serve_two_ends_are_counted_and_remarks_are_made_once(
    make_model, make_config, dataset, tokenizer, caplog
) -> None:
    first = dataset.texts[:2]
    retain = TextDataset([*first, Text("name one", "gold tin", "r1")])
    held_out = ConceptDataset([*first, Text("cat", "")], ["fruit", "metal", "animal"])
    trainer = SeerTrainer(
        make_model("llama"), make_config(), dataset, tokenizer, eval_dataset=held_out, retain_dataset=retain
    )
    assert "2 of 3 retain texts are also among the training texts" in caplog.text
    assert "2 of 3 held-out texts are also among the training texts" in caplog.text
    for _ in range(2):
        trainer.evaluate()
    assert caplog.text.count("1 of 3 texts have an empty response") == 1


def test_held_out_concepts_must_be_those_of_training(make_model, make_config, dataset, tokenizer) -> None:
    trainer = SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer)
    other = ConceptDataset([Text("a", "cat"), Text("a", "dog")], ["animal", "plant"])
    with pytest.raises(
        InputError, match=r"expected the concepts \['animal', 'fruit', 'metal'\] .* got \['animal', 'pl"
    ):
        trainer.measure(other)


class Resized(nn.Module):
    """A decoder layer that hands on states of another size than it works with."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, states: Tensor, **inputs) -> Tensor:
        states = self.layer(nn.functional.pad(states, (0, 32 - states.shape[-1])), **inputs)
        return nn.functional.pad(states, (0, self.size - states.shape[-1]))


def test_layers_of_different_sizes(make_model, make_config, dataset, tokenizer) -> None:
    """Are trained where nothing compares them with each other, and refused before any weight moved where it does."""

    def trainer(**options) -> SeerTrainer:
        model = make_model("llama")
        for index, size in ((0, 16), (1, 32)):
            model.model.layers[index] = Resized(model.model.layers[index], size)
        config = make_config(max_steps=2, logging_steps=1, learning_rate=1e-2, **options)
        return SeerTrainer(model, config, dataset, tokenizer, eval_dataset=dataset)

    narrow = trainer(target_layers=[0], packing=True)
    narrow.train()
    assert narrow.state.log_history[1]["L_r"] > 0
    assert narrow.measure().encoding.after[0].shape == (18, 16)
    for options, message in (
        ({"target_layers": [0, 1]}, r"--target_layers: expected layers of one hidden size, got sizes \[16, 32\]"),
        ({"retain_loss": "sinkhorn"}, r"--retain_layers: expected layers of one hidden size .* got sizes \[16, 32\]"),
        ({"cache_reference": True}, r"--cache_reference: expected hidden states of one size, got sizes \[16, 32\]"),
    ):
        refused = trainer(**options)
        with pytest.raises(InputError, match=message):
            refused.train()
        assert refused.state.global_step == 0


def test_an_epoch_without_a_whole_batch_is_refused(make_model, make_config, dataset, tokenizer) -> None:
    config = make_config(per_device_train_batch_size=19, dataloader_drop_last=True)
    with pytest.raises(InputError, match=r"--dataloader_drop_last: expected false where a step takes 19 pairs"):
        SeerTrainer(make_model("llama"), config, dataset, tokenizer)


def test_sharding_that_would_be_left_out_is_said(make_model, make_config, dataset, tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="accelerate launch: expected GPUs for FSDP"):
        SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer)


def test_separation_is_that_of_all_pairs() -> None:
    states, ids = torch.randn(7, 5), torch.tensor([0, 0, 1, 2, 2, 2, 0])
    prototypes = Prototypes(["a", "b", "c"], {4: torch.nn.functional.normalize(torch.randn(3, 5), dim=-1)})
    values = separation(states, ids, prototypes, 4)
    cosines = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    same = [float(cosines[i, j]) for i in range(7) for j in range(7) if i != j and ids[i] == ids[j]]
    different = [float(cosines[i, j]) for i in range(7) for j in range(7) if ids[i] != ids[j]]
    assert values.same_concept_cosine == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert values.different_concept_cosine == pytest.approx(sum(different) / len(different), abs=1e-6)
    nearest = [max(range(3), key=lambda c: float(states[i] @ prototypes.layers[4][c])) for i in range(7)]
    assert values.nearest_prototype_accuracy == sum(int(a == b) for a, b in zip(nearest, ids, strict=True)) / 7
    assert separation(states[2:4], ids[2:4], prototypes, 4).same_concept_cosine is None


def test_separation_of_single_concepts_is_that_of_their_pairs() -> None:
    states, ids = torch.randn(7, 5), torch.tensor([0, 0, 1, 2, 2, 2, 0])
    prototypes = Prototypes(list("abcd"), {4: torch.nn.functional.normalize(torch.randn(4, 5), dim=-1)})
    values = separation_by_concept(states, ids, prototypes, 4)
    assert list(values) == ["a", "b", "c"]
    cosines = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    own, others = ids == 2, ids != 2
    same = (cosines[own][:, own].sum() - 3) / 6
    assert values["c"].same_concept_cosine == pytest.approx(float(same), abs=1e-6)
    assert values["c"].different_concept_cosine == pytest.approx(float(cosines[own][:, others].mean()), abs=1e-6)
    nearest = (states[own] @ prototypes.layers[4].T).argmax(-1)
    assert values["c"].nearest_prototype_accuracy == pytest.approx(float((nearest == 2).float().mean()))
    assert values["b"].same_concept_cosine is None


def test_prototypes_are_normalised_means_and_survive_the_file(tmp_path) -> None:
    states, ids = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    prototypes = Prototypes.from_representations({2: states, 5: 3 * states}, ids, ["a", "ü"])
    z = states / states.norm(dim=-1, keepdim=True)
    mean = z[ids == 1].mean(0)
    torch.testing.assert_close(prototypes.layers[2][1], mean / mean.norm())
    torch.testing.assert_close(prototypes.layers[5], prototypes.layers[2])
    prototypes.save(tmp_path / "p.safetensors")
    loaded = Prototypes.load(tmp_path / "p.safetensors")
    assert loaded.concepts == ["a", "ü"]
    assert list(loaded.layers) == [2, 5]
    assert all(torch.equal(loaded.layers[layer], prototypes.layers[layer]) for layer in (2, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"other\.safetensors: expected a prototype file"):
        Prototypes.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("position", POSITIONS)
def test_a_representation_is_that_of_the_text_alone(make_model, make_config, dataset, tokenizer, position) -> None:
    config = make_config(positions=[position])
    trainer = exact(SeerTrainer(make_model("llama"), config, dataset, tokenizer, eval_dataset=dataset))
    after = trainer.measure().encoding.after[2]
    with torch.no_grad():
        for row, states in zip(trainer._pairs.rows, after, strict=True):
            alone, _ = states_and_logits(trainer, row.ids)
            torch.testing.assert_close(states, at_position(alone[3][0], row.request_length, position).float())


@pytest.mark.parametrize(
    ("position", "text", "message"),
    [
        ("last_request", Text("cat", None), "sample 18: expected a request for --positions last_request, got none"),
        ("last_request", Text("", "cat"), "sample 18: expected a request for --positions last_request, got none"),
        ("response_mean", Text("cat", None), "sample 18: expected a response for --positions response_mean, got none"),
        ("response_mean", Text("cat", ""), "sample 18: expected a response for --positions response_mean, got none"),
    ],
)
def test_texts_must_have_the_positions(make_model, make_config, dataset, tokenizer, position, text, message) -> None:
    more = ConceptDataset([*dataset.texts, text], [*dataset.concepts, "animal"])
    with pytest.raises(InputError, match=message):
        SeerTrainer(make_model("llama"), make_config(positions=["last", position]), more, tokenizer)
    trainer = SeerTrainer(make_model("llama"), make_config(positions=[position]), dataset, tokenizer)
    with pytest.raises(InputError, match=message):
        trainer.measure(more)


def test_weights_move_linearly_from_the_first_step_to_the_last(make_model, make_config, dataset, tokenizer) -> None:
    config = make_config(
        max_steps=5,
        logging_steps=1,
        lora_dropout=0.0,
        disentangle_weight=8.0,
        disentangle_weight_end=0.0,
        retain_weight=0.0,
        retain_weight_end=4.0,
        kl_weight=2.0,
    )
    trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (w_d, w_r) in zip(logs, [(8, 0), (6, 1), (4, 2), (2, 3), (0, 4)], strict=True):
        expected = w_d * entry["L_d"] + w_r * entry["L_r"] + 2 * entry["L_kl"]
        assert entry["loss"] == pytest.approx(expected, abs=2e-3)
    assert logs[0]["L_d"] > 0.1
    assert logs[-1]["L_r"] > 0


def test_a_term_that_is_never_weighed_is_not_computed(make_config) -> None:
    config = make_config(retain_weight=0.0, kl_weight=0.0, kl_weight_end=1.0)
    assert [config.uses(term) for term in ("disentangle", "retain", "kl")] == [True, False, True]
    assert [config.weight("kl", progress) for progress in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": ["first"]}, r"--positions: expected some of \('last', .*got \['first'\]"),
        ({"positions": []}, r"--positions: expected some of"),
        ({"positions": ["last", "last"]}, r"--positions: expected some of"),
        ({"retain_layers": []}, r"--retain_layers: expected at least one layer"),
        ({"kl_weight_end": -1.0}, r"--kl_weight_end: expected a number >= 0, got -1\.0"),
        ({"kl_form": "half"}, r"--kl_form: expected one of \('full', 'label'\), got 'half'"),
        (
            {"disentangle_loss": "sup_con", "same_label": "ignore"},
            r"--same_label: expected one of \('positive',\) with --disentangle_loss sup_con, got 'ignore'",
        ),
        ({"disentangle_loss": "ot_contrastive", "same_label": "ignore"}, r"--same_label: expected one of"),
    ],
)
def test_options_out_of_range(make_config, options, message) -> None:
    with pytest.raises(InputError, match=message):
        make_config(**options)


def test_same_label_follows_the_loss_unless_given(make_config) -> None:
    assert make_config(disentangle_loss="sup_con").same_label == "positive"
    assert make_config(disentangle_loss="ot_contrastive").same_label == "positive"
    assert make_config(disentangle_loss="ot_contrastive", same_label="negative").same_label == "negative"
    assert make_config(disentangle_loss="nt_xent", same_label="positive").same_label == "positive"


def test_retain_layers_must_exist(make_model, make_config, dataset, tokenizer) -> None:
    with pytest.raises(InputError, match=r"--retain_layers: expected layers from -3 to 2 .* got 3"):
        SeerTrainer(make_model("llama"), make_config(retain_layers=[3]), dataset, tokenizer)


def test_pairs_that_lack_a_position_are_left_out_there(make_model, make_config, dataset, tokenizer) -> None:
    config = make_config(
        view_dropout=0.6,
        positions=["response_mean", "last"],
        same_label="ignore",
        lora_dropout=0.0,
        retain_weight=0.0,
        kl_weight=0.0,
    )
    trainer = exact(SeerTrainer(make_model("llama"), config, dataset, tokenizer))
    losses, lacking = [], 0
    for batch in trainer.get_train_dataloader():
        texts, pairs = texts_of(batch), len(batch["concept_ids"])
        parts = []
        for position in config.positions:
            kept = [
                i
                for i in range(pairs)
                if position == "last" or all(texts[j].request_length < len(texts[j].ids) for j in (i, pairs + i))
            ]
            lacking += pairs - len(kept)
            if not kept:
                parts.append(torch.zeros((), dtype=torch.float64))
                continue
            z1, z2 = (
                torch.stack(
                    [
                        at_position(states_and_logits(trainer, text.ids)[0][3][0], text.request_length, position)
                        for text in (texts[start + i] for i in kept)
                    ]
                )
                for start in (0, pairs)
            )
            scores = torch.nn.functional.cosine_similarity(z1[:, None], z2[None], dim=-1) / config.temperature
            ids, own = batch["concept_ids"][kept], torch.eye(len(kept), dtype=torch.bool)
            scores = scores.masked_fill((ids[:, None] == ids) & ~own, -torch.inf)
            parts.append((scores.logsumexp(-1) - scores.diagonal()).mean())
        expected = config.disentangle_weight * torch.stack(parts).mean()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-6, atol=0)
        losses.append(expected)
    assert len(losses) > 2
    assert lacking > 2


def test_texts_of_several_concepts_take_plain_options(make_model, make_config, dataset, tokenizer) -> None:
    concepts = [[concept, "thing"] for concept in dataset.concepts]
    several = ConceptDataset(dataset.texts, concepts)
    for options, message in (
        ({"disentangle_loss": "nt_xent"}, "--disentangle_loss: expected info_nce for texts of several concepts"),
        ({"view_dropout": 0.1, "positions": ["response_mean"]}, "--view_dropout: expected 0 for texts of several"),
    ):
        with pytest.raises(InputError, match=message):
            SeerTrainer(make_model("llama"), make_config(**options), several, tokenizer)


@pytest.mark.parametrize(
    ("options", "retain_dataset"),
    [
        ({}, RETAIN),
        ({}, None),
        ({"retain_layers": [0, 2], "kl_form": "label"}, RETAIN),
        ({"retain_weight": 0.0}, RETAIN),
        ({"kl_weight": 0.0, "retain_layers": [1]}, None),
        ({"bf16": True}, RETAIN),
    ],
)
def test_cached_reference_is_the_recomputed_one(
    make_model, make_config, dataset, tokenizer, tmp_path, options, retain_dataset
) -> None:
    logs = []
    for cached in (False, True):
        config = make_config(cache_reference=cached, max_steps=4, logging_steps=1, learning_rate=1e-2, **options)
        trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=retain_dataset)
        exact(trainer).model.float()  # where nothing moved yet, L_r has the direction of rounding errors
        seen: list[int] = []
        trainer.stack.root.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        if cached:  # a text for its type, all texts in batches of eight, then the steps
            texts = len(dataset) if retain_dataset is None else len(retain_dataset)
            assert sum(seen[:-4]) == 1 + texts
            assert seen[-4:] == [12 if retain_dataset else 8] * 4
    tolerance = 2e-2 if "bf16" in options else 1e-4
    for recomputed, cached in zip(*logs, strict=True):
        for name in {"loss", "L_d", "L_r", "L_kl"} & {*recomputed}:
            assert cached[name] == pytest.approx(recomputed[name], rel=tolerance, abs=2e-4), name
    assert logs[0][-1]["loss"] != logs[0][0]["loss"]
    assert not list(tmp_path.rglob("reference_states*"))


def test_reference_cannot_be_cached(make_model, make_config, dataset, tokenizer, monkeypatch) -> None:
    with pytest.raises(InputError, match="--cache_reference: expected false where neither L_r nor L_kl has a weight"):
        make_config(cache_reference=True, retain_weight=0.0, kl_weight=0.0)
    config = make_config(cache_reference=True, view_dropout=0.2, max_steps=1)
    with pytest.raises(InputError, match="--cache_reference: expected retain texts that do not change"):
        SeerTrainer(make_model("llama"), config, dataset, tokenizer)
    SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=RETAIN)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    trainer = SeerTrainer(make_model("llama"), make_config(cache_reference=True, max_steps=1), dataset, tokenizer)
    with pytest.raises(InputError, match=r"--cache_reference: expected room for 0\.0 GiB in .*got 0\.0 GiB"):
        trainer.train()


def test_compiled_layers_give_the_same_losses(make_model, make_config, dataset, tokenizer) -> None:
    logs = []
    for compiled in (False, True):
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        config = make_config(max_steps=2, logging_steps=1, lora_dropout=0.0, target_layers=[0], **options)
        trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer)
        exact(trainer).model.float()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for plain, compiled_log in zip(*logs, strict=True):
        for name in ("loss", "L_d", "L_r", "L_kl"):
            assert compiled_log[name] == pytest.approx(plain[name], rel=1e-4), name
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_mixed_precision_and_activation_checkpointing_run(make_model, make_config, dataset, tokenizer) -> None:
    config = make_config(max_steps=2, logging_steps=1, bf16=True, gradient_checkpointing=True, lora_dropout=0.0)
    trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=RETAIN)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    plain = SeerTrainer(
        make_model("llama"), make_config(max_steps=1, logging_steps=1, lora_dropout=0.0), dataset, tokenizer
    )
    plain.train()
    assert logs[0]["L_d"] == pytest.approx(plain.state.log_history[0]["L_d"], rel=0.05)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_dora_is_trained_and_can_be_disabled(make_model, make_config, dataset, tokenizer) -> None:
    trainer = SeerTrainer(
        make_model("llama"), make_config(adapter="dora", max_steps=2, learning_rate=1e-2), dataset, tokenizer
    )
    magnitudes = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "magnitude" in n}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert magnitudes
    assert any(not torch.equal(after[name], value) for name, value in magnitudes.items())
    measured = trainer.measure(dataset)
    plain = SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer).measure(dataset)
    torch.testing.assert_close(measured.encoding.before, plain.encoding.before)


@pytest.mark.parametrize("cached", [False, True])
def test_all_weights_are_trained_against_a_frozen_copy(make_model, make_config, dataset, tokenizer, cached) -> None:
    config = make_config(
        adapter="none",
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        cache_reference=cached,
        gradient_checkpointing=True,
    )
    trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=RETAIN)
    original = make_model("llama").state_dict()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (logs[0]["L_r"], logs[0]["L_kl"]) == (pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-4))
    assert logs[-1]["L_r"] > 1e-3
    assert logs[-1]["L_kl"] > 1e-3
    trained = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    assert not any(torch.equal(trained[name], value) for name, value in original.items())
    frozen = trainer.base.copy.root.state_dict()
    assert all(torch.equal(frozen[name].cpu(), value) for name, value in original.items())
    measured = trainer.measure(dataset)
    plain = SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer).measure(dataset)
    torch.testing.assert_close(measured.encoding.before, plain.encoding.before)
    assert measured.encoding.kl > 1e-3


def test_an_adapter_that_is_there_cannot_be_wished_away(make_model, make_config, dataset, tokenizer) -> None:
    wrapped = SeerTrainer(make_model("llama"), make_config(), dataset, tokenizer).model
    with pytest.raises(InputError, match="--adapter: expected lora or dora for a model that has an adapter, got none"):
        SeerTrainer(wrapped, make_config(adapter="none"), dataset, tokenizer)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(
    ("options", "retain_dataset"),
    [
        ({}, None),
        ({"positions": ["response_mean", "last"], "kl_form": "label"}, RETAIN),
        ({"kl_weight": 0.0, "retain_normalization": "token"}, RETAIN),
        ({"kl_weight": 0.0, "retain_weight": 0.0}, RETAIN),
    ],
)
def test_cached_gradient_is_that_of_the_whole_batch(
    make_model, make_config, dataset, tokenizer, chunk, options, retain_dataset
) -> None:
    config = make_config(lora_dropout=0.0, target_layers=[0, 2], grad_cache_chunk=chunk, **options)
    trainer = exact(SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=retain_dataset))
    batch = next(iter(trainer.get_train_dataloader()))
    loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    expected = gradients(trainer, loss)
    seen: list[int] = []
    trainer.stack.root.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    cached, cached_terms = trainer.objective.cached_backward(trainer.model, batch, 0.0, chunk, Tensor.backward)
    assert max(seen) <= chunk
    torch.testing.assert_close(cached, loss.detach())
    torch.testing.assert_close(cached_terms, terms)
    assert_same_gradient([p.grad for p in trainer.model.parameters() if p.requires_grad], expected)


def test_a_run_with_cached_gradients_is_the_run_without(make_model, make_config, dataset, tokenizer) -> None:
    logs = []
    for chunk in (None, 3):
        config = make_config(
            grad_cache_chunk=chunk,
            max_steps=3,
            logging_steps=1,
            lora_dropout=0.0,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
        )
        trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=RETAIN)
        exact(trainer).model.float()
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for whole, cached in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "L_d", "L_r", "L_kl"):
            assert cached[name] == pytest.approx(whole[name], rel=1e-3, abs=2e-4), name


PACKED_MODELS = {
    **{name: (DECODERS[name], "sdpa") for name in ("llama", "gemma", "gpt_neox")},
    "llama, eager": (DECODERS["llama"], "eager"),
    "windows": (lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3), "sdpa"),
}


@pytest.mark.parametrize("architecture", list(PACKED_MODELS))
@pytest.mark.parametrize(
    ("options", "retain_dataset"),
    [
        ({"positions": ["response_mean", "last_request", "last"]}, RETAIN),
        ({"positions": ["response_mean"], "kl_form": "label", "view_dropout": 0.5, "retain_layers": [0, 1]}, None),
        ({"retain_loss": "sinkhorn", "retain_layers": [1], "kl_weight": 0.0, "grad_cache_chunk": 5}, RETAIN),
    ],
)
def test_packed_texts_give_the_loss_and_gradient_of_padded_ones(
    make_config, dataset, tokenizer, architecture, options, retain_dataset
) -> None:
    make_architecture, attention = PACKED_MODELS[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_architecture(), attn_implementation=attention)
    config = make_config(target_layers=[0, 2], lora_dropout=0.0, packing=True, **options)
    trainer = exact(SeerTrainer(model, config, dataset, tokenizer, retain_dataset=retain_dataset))
    batch = next(iter(trainer.get_train_dataloader()))
    shapes = []
    trainer.stack.root.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = []
    for packing in (True, False):
        config.packing = packing
        if config.grad_cache_chunk is None:
            loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
            found.append((terms, gradients(trainer, loss)))
        else:
            trainer.model.zero_grad()
            _, terms = trainer.objective.cached_backward(trainer.model, batch, 0.0, 5, Tensor.backward)
            found.append((terms, [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]))
    packed, padded = shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]
    assert sum(shape.numel() for shape in packed) < 0.9 * sum(shape.numel() for shape in padded)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-9)
    assert_same_gradient(found[0][1], found[1][1])


def test_packing_is_refused_where_texts_would_see_each_other(make_model, make_config, dataset, tokenizer) -> None:
    message = r"--packing: expected false for BertModel with attention 'sdpa', .* \(its layers mix the texts of a row\)"
    with pytest.raises(InputError, match=message):
        SeerTrainer(make_model("bert"), make_config(kl_weight=0.0, packing=True), dataset, tokenizer)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4))
    with pytest.raises(InputError, match=r"--packing: expected false for BloomForCausalLM with attention"):
        SeerTrainer(bloom, make_config(packing=True), dataset, tokenizer)


def test_a_packed_run_is_the_padded_one(make_model, make_config, dataset, tokenizer) -> None:
    logs = []
    for packing in (True, False):
        options = {"gradient_checkpointing": True, "cache_reference": True, "learning_rate": 1e-2}
        config = make_config(packing=packing, max_steps=3, logging_steps=1, lora_dropout=0.0, **options)
        trainer = SeerTrainer(make_model("llama"), config, dataset, tokenizer, retain_dataset=RETAIN)
        exact(trainer).model.float()
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for packed, padded in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "L_d", "L_r", "L_kl"):
            assert packed[name] == pytest.approx(padded[name], rel=1e-3, abs=2e-4), name


def test_where_the_tokens_of_packed_texts_are() -> None:
    """Lengths 2, 5, 3, 1, 3; some padded on the left, one on both sides."""
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 0], [1, 1, 1, 0, 0]])
    ids = torch.arange(10, 35).view(5, 5)

    def pack(attention: str) -> tuple[Packing, list[list[int]], list[list[int]]]:
        packing = Packing.of(mask, SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention)))
        inputs = packing.inputs(ids)
        return packing, inputs["input_ids"].tolist(), inputs["position_ids"].tolist()

    packing, packed, positions = pack("sdpa")  # the longest first, each where there is room
    assert packed == [[15, 16, 17, 18, 19], [22, 23, 24, 10, 11], [30, 31, 32, 28, 0]]
    assert positions == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    states = packing.unpack(torch.tensor(packed).unsqueeze(-1).float())
    assert torch.equal(states.squeeze(-1), (ids * mask).float())

    packing, packed, positions = pack("flash_attention_2")
    assert packed == [[15, 16, 17, 18, 19, 22, 23, 24, 30, 31, 32, 10, 11, 28]]
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(packing.position_ids)
    assert (starts.tolist(), int(longest)) == ([0, 5, 8, 11, 13, 14], 5)  # what the kernel would be told


def test_second_texts_of_past_batches_are_further_negatives(make_model, make_config, dataset, tokenizer) -> None:
    config = make_config(
        memory_bank_size=6,
        same_label="ignore",
        positions=["last", "response_mean"],
        target_layers=[0, 2],
        retain_weight=0.0,
        kl_weight=0.0,
        lora_dropout=0.0,
    )
    trainer = exact(SeerTrainer(make_model("llama"), config, dataset, tokenizer))
    past: list[tuple[Tensor, Tensor]] = []
    for batch in trainer.get_train_dataloader():
        ids, pairs = batch["concept_ids"], len(batch["concept_ids"])
        views = []
        for texts in (texts_of(batch)[:pairs], texts_of(batch)[pairs:]):
            outputs = [states_and_logits(trainer, text.ids)[0] for text in texts]
            views.append(
                torch.stack(
                    [
                        torch.stack(
                            [
                                torch.stack(
                                    [
                                        at_position(states[layer + 1][0], text.request_length, position)
                                        for states, text in zip(outputs, texts, strict=True)
                                    ]
                                )
                                for layer in (0, 2)
                            ]
                        )
                        for position in config.positions
                    ]
                )
            )  # [P, L, B, D]
        keys = torch.cat([views[1], *(old for old, _ in past)], dim=2)
        labels = torch.cat([ids, *(old for _, old in past)])
        cosines = torch.nn.functional.cosine_similarity(views[0].unsqueeze(3), keys.unsqueeze(2), dim=-1)
        own = torch.eye(pairs, len(labels), dtype=torch.bool)
        scores = (cosines / config.temperature).masked_fill((ids[:, None] == labels) & ~own, -torch.inf)
        expected = 10 * (scores.logsumexp(-1) - scores.diagonal(dim1=-2, dim2=-1)).mean()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-6, atol=0)
        joined = (
            torch.cat([old for old, _ in past] + [views[1].detach()], dim=2),
            torch.cat([*(o for _, o in past), ids]),
        )
        past = [(joined[0][:, :, -6:], joined[1][-6:])]
    assert len(past[0][1]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"disentangle_loss": "ot_contrastive", "negatives": "ring"},
            "--negatives: expected local with",
        ),
        (
            {"disentangle_loss": "nt_xent", "memory_bank_size": 4},
            "--memory_bank_size: expected none with",
        ),
        ({"memory_bank_size": 0}, "--memory_bank_size: expected a whole number >= 1, got 0"),
        ({"grad_cache_chunk": 0}, "--grad_cache_chunk: expected a whole number >= 1, got 0"),
        (
            {"memory_bank_size": 4, "view_dropout": 0.1, "positions": ["response_mean"]},
            "--memory_bank_size: expected none where --view_dropout takes away --positions, got 4",
        ),
    ],
)
def test_negatives_that_do_not_go_together(make_config, options, message) -> None:
    with pytest.raises(InputError, match=message):
        make_config(**options)


def test_one_process_has_no_others_to_ask(make_model, make_config, dataset, tokenizer) -> None:
    with pytest.raises(InputError, match="--negatives: expected local in a run of one process, got 'gather'"):
        SeerTrainer(make_model("llama"), make_config(negatives="gather"), dataset, tokenizer)
