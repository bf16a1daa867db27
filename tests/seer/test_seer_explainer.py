"""Explanations: read from the pass that produced the token, whatever way the token was produced."""

from __future__ import annotations

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, StoppingCriteria, TextStreamer

from seer import Calibration, ConceptExplainer, InputError, Prototypes
from seer.calibration import Fit
from seer.cli import main
from seer.data import Text, tokenize
from seer.explainer import split_text
from seer.render import print_explanation, visible, write_page
from seer.run import Run, make_prototypes
from seer.train import run_training

LAYERS = [0, 2]
PROMPTS = ["name a fruit", "name one one one metal is a gold", "cat"]


def random_prototypes(size: int = 32, layers=LAYERS, concepts=("animal", "fruit", "metal")) -> Prototypes:
    generator = torch.Generator().manual_seed(1)
    rows = {layer: normalize(torch.randn(len(concepts), size, generator=generator), dim=-1) for layer in layers}
    return Prototypes(list(concepts), rows)


def some_calibration(prototypes: Prototypes, unknown_below: float = -1.0) -> Calibration:
    rest = dict.fromkeys(("accuracy", "nll_before", "nll_after", "ece_before", "ece_after"), 0.0)
    fits = {
        layer: {
            scope: Fit(
                temperature=0.1 * (layer + 1) * factor,
                unknown_below=unknown_below,
                texts=9,
                samples=9,
                unknown_caught=None,
                unknown_auroc=None,
                **rest,
            )
            for scope, factor in (("token", 1.0), ("text", 3.0))
        }
        for layer in prototypes.layers
    }
    return Calibration(prototypes.concepts, prototypes.weights, 0.1, fits)


@pytest.fixture
def explainer(make_model, tokenizer) -> ConceptExplainer:
    prototypes = random_prototypes()
    model = make_model("llama")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return ConceptExplainer(model, tokenizer, prototypes, calibration=some_calibration(prototypes))


def second_pass(explainer: ConceptExplainer, token_ids: list[int], layer: int) -> torch.Tensor:
    """[T, C] cosines by a pass of transformers alone: no hooks, cache, batch or padding."""
    with torch.no_grad():
        output = explainer.model.model(torch.tensor([token_ids]), output_hidden_states=True, use_cache=False)
        # The last entry of hidden_states has been through the final norm, which is not the layer's output.
        states = (*output.hidden_states[:-1], None)[layer + 1]
        if states is None:
            kept = []
            handle = explainer.model.model.layers[layer].register_forward_hook(lambda *args: kept.append(args[-1]))
            explainer.model.model(torch.tensor([token_ids]), use_cache=False)
            handle.remove()
            states = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
    return normalize(states[0], dim=-1) @ explainer.prototypes.layers[layer].T


def prompt_ids(explainer: ConceptExplainer, prompt: str) -> list[int]:
    return explainer._prompt_ids(prompt, 1)


def check_generation(explainer: ConceptExplainer, explanation, tolerance: float = 1e-5) -> None:
    prompt = prompt_ids(explainer, explanation.prompt)
    for layer in explainer.layers:
        values = explanation.layers[layer]
        expected = second_pass(explainer, [*prompt, *explanation.token_ids], layer)[len(prompt) - 1 : -1]
        torch.testing.assert_close(values.cosines, expected, rtol=tolerance, atol=tolerance)
        temperature = explainer.calibration.layers[layer]["token"].temperature
        torch.testing.assert_close(values.scores, (expected / temperature).softmax(-1), rtol=1e-4, atol=1e-4)
        assert values.answers() == [explainer.concepts[index] for index in expected.argmax(-1)]


def test_a_given_text_has_the_scores_of_a_plain_pass(explainer) -> None:
    texts = ["name a fruit", Text("name one one one metal", "gold is one"), Text("cat")]
    explanations = explainer.explain(texts)
    rows = tokenize(explainer.tokenizer, [Text("name a fruit", ""), texts[1], Text("cat", "")], 64)
    for (row, _), explanation in zip(rows, explanations, strict=True):
        assert explanation.token_ids == row
        for layer in LAYERS:
            expected = second_pass(explainer, row, layer)
            torch.testing.assert_close(explanation.layers[layer].cosines, expected)
            scores = (expected / explainer.calibration.layers[layer]["token"].temperature).softmax(-1)
            torch.testing.assert_close(explanation.layers[layer].scores, scores)
            whole = (expected[-1:] / explainer.calibration.layers[layer]["text"].temperature).softmax(-1)
            torch.testing.assert_close(explanation.text[layer].scores, whole)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt_neox"])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 2.0}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=str,
)
def test_generated_tokens_have_the_scores_of_the_pass_that_produced_them(
    architecture, options, make_model, tokenizer
) -> None:
    prototypes = random_prototypes(layers=[0, 1])
    model = make_model(architecture)
    calibration = some_calibration(prototypes)
    explainer = ConceptExplainer(model, tokenizer, prototypes, calibration=calibration, layers=[0, 1])
    if architecture != "llama":
        explainer.model.model = explainer.model.base_model  # what second_pass runs
    torch.manual_seed(0)
    explanations = explainer.generate(PROMPTS, max_new_tokens=12, **options)
    assert [explanation.prompt for explanation in explanations] == PROMPTS
    for explanation in explanations:
        check_generation(explainer, explanation)
    assert max(len(explanation.token_ids) for explanation in explanations) == 12


def test_the_deepest_layer_and_what_generate_alone_would_write(explainer) -> None:
    explanations = explainer.generate(PROMPTS, max_new_tokens=9, eos_token_id=None)
    for prompt, explanation in zip(PROMPTS, explanations, strict=True):
        check_generation(explainer, explanation)
        ids = prompt_ids(explainer, prompt)
        plain = explainer.model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=None)
        assert explanation.token_ids == plain[0, len(ids) :].tolist()


def test_rows_end_at_their_end_token(explainer) -> None:
    free = explainer.generate(PROMPTS, max_new_tokens=12, eos_token_id=None)
    end = free[0].token_ids[4]
    explanations = explainer.generate(PROMPTS, max_new_tokens=12, eos_token_id=[end])
    for longer, explanation in zip(free, explanations, strict=True):
        ids = longer.token_ids
        expected = ids[: ids.index(end) + 1] if end in ids else ids
        assert explanation.token_ids == expected
        assert all(len(values.scores) == len(expected) for values in explanation.layers.values())
    assert {len(explanation.token_ids) for explanation in explanations} != {12}


def test_several_sequences_per_prompt(explainer) -> None:
    torch.manual_seed(0)
    explanations = explainer.generate(PROMPTS[:2], max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert [explanation.prompt for explanation in explanations] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert explanations[0].token_ids != explanations[1].token_ids
    for explanation in explanations:
        check_generation(explainer, explanation)


def test_streams_give_the_same_tokens_and_scores(explainer) -> None:
    (whole,) = explainer.generate(PROMPTS[:1], max_new_tokens=10)
    tokens = [*explainer.stream(PROMPTS[0], max_new_tokens=10)]
    assert [token.token_id for token in tokens] == whole.token_ids
    assert "".join(token.piece for token in tokens) == str(whole)
    for layer in LAYERS:
        scores = torch.cat([token.layers[layer].scores for token in tokens])
        torch.testing.assert_close(scores, whole.layers[layer].scores)
    first = next(explainer.stream(PROMPTS[0], max_new_tokens=10))  # leaves the rest unwritten
    assert first.token_id == whole.token_ids[0]
    assert explainer._pass is None
    with pytest.raises(InputError, match="nothing but white space"):
        next(explainer.stream(" "))
    shown = []
    explainer.generate(PROMPTS[:1], max_new_tokens=10, streamer=RecordingStreamer(explainer.tokenizer, shown))
    assert "".join(shown).split() == [*prompt_text(explainer).split(), *str(whole).split()]


class RecordingStreamer(TextStreamer):
    def __init__(self, tokenizer, shown) -> None:
        super().__init__(tokenizer)
        self.shown = shown

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.shown.append(text)


def prompt_text(explainer) -> str:
    return explainer.tokenizer.decode(prompt_ids(explainer, PROMPTS[0]))


def test_no_hook_stays_behind(explainer) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in explainer.model.modules())

    class Fails(StoppingCriteria):
        def __call__(self, *args, **kwargs):
            raise ZeroDivisionError

    before = hooks()
    explainer.explain(["cat"])
    explainer.generate(["cat"], max_new_tokens=2)
    with pytest.raises(ZeroDivisionError):
        explainer.generate(["cat"], max_new_tokens=2, stopping_criteria=[Fails()])
    assert hooks() == before
    assert explainer._pass is None


def test_a_monitor_flags_and_stops_where_the_score_is_reached(explainer) -> None:
    free = explainer.generate(PROMPTS, max_new_tokens=12, eos_token_id=None)
    layer = LAYERS[-1]
    scores = [explanation.layers[layer].scores[:, 1] for explanation in free]  # of "fruit"
    level = float(torch.cat(scores).sort().values[-9])  # reached at 9 of 36 tokens

    monitor = explainer.monitor("fruit", level, "flag")
    flagged = explainer.generate(PROMPTS, max_new_tokens=12, eos_token_id=None, stopping_criteria=[monitor])
    assert [explanation.token_ids for explanation in flagged] == [explanation.token_ids for explanation in free]
    expected = {(row, t) for row, values in enumerate(scores) for t in (values >= level).nonzero().flatten().tolist()}
    blank = {explainer.pad_token_id, explainer.tokenizer.eos_token_id, explainer.model.generation_config.eos_token_id}
    expected = {(row, t) for row, t in expected if free[row].token_ids[t] not in blank}
    assert expected
    assert {(flag.row, flag.position) for explanation in flagged for flag in explanation.flags} == expected
    assert all(flag.score >= level for flag in monitor.flags)

    stopper = explainer.monitor("fruit", level, "stop")
    stopped = explainer.generate(PROMPTS, max_new_tokens=12, eos_token_id=None, stopping_criteria=[stopper])
    for row, (explanation, whole) in enumerate(zip(stopped, free, strict=True)):
        first = min((t for r, t in expected if r == row), default=11)
        assert explanation.token_ids == whole.token_ids[: first + 1]


def test_a_monitor_works_in_generate_of_the_model_itself(explainer) -> None:
    (free,) = explainer.generate(PROMPTS[:1], max_new_tokens=8, eos_token_id=None)
    ids = prompt_ids(explainer, PROMPTS[0])
    scores = free.layers[0].scores[:, 2]
    monitor = explainer.monitor("metal", float(scores[3:].max()), "stop", layer=0)
    first = int((scores >= monitor.level).nonzero()[0])

    def run():
        return explainer.model.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, stopping_criteria=[monitor]
        )

    with monitor:
        assert run()[0, len(ids) :].tolist() == free.token_ids[: first + 1]
    assert [flag.position for flag in monitor.flags] == [len(ids) + first]
    with pytest.raises(InputError, match="expected generation by the explainer, or inside `with monitor:`"):
        run()


def test_unknown_is_the_answer_where_no_prototype_is_near(make_model, tokenizer) -> None:
    prototypes = random_prototypes()
    plain = ConceptExplainer(make_model("llama"), tokenizer, prototypes, layers=[2])
    assert not plain.explain(["cat"])[0].layers[2].unknown.any()
    nearest = plain.explain(["name a fruit"])[0].layers[2].cosines.amax(-1)
    threshold = float(nearest.median()) + 1e-6
    calibration = some_calibration(prototypes, unknown_below=threshold)
    strict = ConceptExplainer(make_model("llama"), tokenizer, prototypes, calibration=calibration, layers=[-1])
    values = strict.explain(["name a fruit"])[0].layers[2]
    assert values.unknown.tolist() == (nearest < threshold).tolist()
    assert [answer == "unknown" for answer in values.answers()] == values.unknown.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.explain([]), "expected at least one text, got none"),
        (lambda e: e.explain([""]), "sample 0: expected some text, got nothing but white space"),
        (lambda e: e.generate([]), "prompts: expected at least one, got none"),
        (lambda e: e.generate("cat"), "prompts: expected a list of strings, got the string 'cat'"),
        (lambda e: e.generate(["cat"], num_beams=2), "num_beams: expected generation of one token per pass and row"),
        (lambda e: e.generate(["cat"] * 2, max_new_tokens=64), "expected at most 64 tokens with the answer, got 3 and"),
        (lambda e: e.monitor("plant", 0.5), "concept: expected one of ['animal', 'fruit', 'metal'], got 'plant'"),
        (lambda e: e.monitor("fruit", 1.5), "level: expected a score above 0 and up to 1, got 1.5"),
        (lambda e: e.monitor("fruit", float("nan")), "level: expected a score above 0 and up to 1, got nan"),
        (lambda e: e.monitor("fruit", 0.5, "halt"), "action: expected one of ('flag', 'stop'), got 'halt'"),
        (lambda e: e.monitor("fruit", 0.5, layer=1), "layer: expected one of [0, 2], got 1"),
    ],
)
def test_bad_input(explainer, call, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call(explainer)


def test_prototypes_of_another_model_layer_or_calibration(make_model, tokenizer) -> None:
    model = make_model("llama")
    for prototypes, message in (
        (random_prototypes(size=16), r"for hidden size 32, got shape \(3, 16\) at layer 0: they are of another model"),
        (random_prototypes(layers=[0, 7]), "expected prototypes of layers 0 to 2, got some of layer 7"),
    ):
        with pytest.raises(InputError, match=message):
            ConceptExplainer(model, tokenizer, prototypes)
    others = some_calibration(random_prototypes(concepts=("a", "b", "c")))
    with pytest.raises(InputError, match="expected a calibration of the prototypes beside it"):
        ConceptExplainer(model, tokenizer, random_prototypes(), calibration=others)
    with pytest.raises(InputError, match=r"layers: expected layers that have prototypes \(\[0, 2\]\), got 1"):
        ConceptExplainer(model, tokenizer, random_prototypes(), layers=[1])
    encoder = ConceptExplainer(make_model("bert"), tokenizer, random_prototypes())
    assert encoder.explain(["cat"])[0].layers[2].scores.shape[1] == 3
    with pytest.raises(InputError, match="expected a language model to generate with, got BertModel"):
        encoder.generate(["cat"])


def test_pieces_joined_are_the_text_also_where_a_character_is_several_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["x"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "a é 🙂 <b>\n語"
    ids = tokenizer(text)["input_ids"]
    pieces = split_text(tokenizer, ids)
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(pieces) == text
    assert "".join(split_text(tokenizer, ids[:-1])) == tokenizer.decode(ids[:-1])  # ends inside a character
    assert pieces.count("") == len(ids) - len(text)


HOSTILE = "</span><script>alert(1)</script>\x1b[31m\u202e&amp;"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_shows_model_text_as_text(explainer, tmp_path) -> None:
    (explanation,) = explainer.explain(["name a fruit"])
    hostile = type(explanation)(
        explanation.token_ids,
        [HOSTILE, *explanation.pieces[1:]],
        explanation.layers,
        prompt=HOSTILE,
        overhead=0.01,
    )
    page_file = tmp_path / "page.html"
    write_page([hostile], [HOSTILE], page_file, title=HOSTILE, calibration=explainer.calibration)
    page = Tags()
    content = page_file.read_text(encoding="utf-8")
    page.feed(content)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "default-src 'none'" in content
    assert "\x1b" not in content
    assert "\u202e" not in content
    assert any("<script>alert(1)</script>" in text for text in page.text)
    assert page.tags.count("table") == 1 + len(LAYERS)
    # Every cell says its score in words: the colours are not needed.
    cells = re.findall(r'<td class="s(\d+)[^"]*">([^<]*)</td>', content)
    assert len(cells) == len(LAYERS) * len(hostile.pieces) * 3
    assert [value for _, value in cells] == [
        f"{score:.2f}" for layer in LAYERS for row in hostile.layers[layer].scores.tolist() for score in row
    ]
    assert html.escape(explainer.concepts[0]) in content

    terminal = io.StringIO()
    print_explanation(Console(file=terminal, width=200), hostile, "[bold]heading[/]")
    assert "\x1b[31m" not in terminal.getvalue()
    assert "<script>alert(1)</script>\\x1b[31m\\u202e" in terminal.getvalue()
    assert "[bold]heading[/]" in terminal.getvalue()
    assert visible("a\nb\u00e9", keep="\n") == "a\nb\u00e9"


@pytest.fixture
def run_folder(make_config, model_folder, data_file) -> Path:
    config = make_config(
        model=str(model_folder), data=str(data_file), max_steps=4, learning_rate=1e-2, target_layers=[1, 2]
    )
    return Path(run_training(config).output_dir)


def test_the_folder_of_a_run_suffices(run_folder, tmp_path, capsys) -> None:
    capsys.readouterr()
    lines, page = tmp_path / "out.jsonl", tmp_path / "out.html"
    outputs = ["--jsonl", str(lines), "--html", str(page)]
    assert (
        main(["explain", str(run_folder), "--prompt", PROMPTS[0], "--prompt", "cat", "--max_new_tokens", "5", *outputs])
        == 0
    )
    printed = capsys.readouterr().out
    assert "Answer 2" in printed
    assert "calibration on held-out texts" in printed
    explainer = ConceptExplainer.from_run(run_folder)
    explanations = explainer.generate([PROMPTS[0], "cat"], max_new_tokens=5, do_sample=False)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    for record, explanation in zip(records, explanations, strict=True):
        assert record["text"] == str(explanation)
        assert [token["id"] for token in record["tokens"]] == explanation.token_ids
        for layer in (1, 2):
            answers = explanation.layers[layer].answers()
            assert [token["layers"][str(layer)]["answer"] for token in record["tokens"]] == answers
            first = record["tokens"][0]["layers"][str(layer)]
            expected = dict(zip(explainer.concepts, explanation.layers[layer].scores[0].tolist(), strict=True))
            assert first["scores"] == pytest.approx(expected, abs=1e-5)
            assert sum(first["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert page.read_text().count("<section>") == 2

    more = ["--text", "name a fruit", "--layers", "-1", "--jsonl", str(lines)]
    assert main(["explain", str(run_folder), *more]) == 0
    (record,) = map(json.loads, lines.read_text().splitlines())
    assert record["whole_text"]["2"]["answer"] in [*explainer.concepts, "unknown"]
    assert [*record["tokens"][0]["layers"]] == ["2"]

    level = f"{explainer.concepts[0]}=0.0001"
    stop = ["--prompt", "cat", "--stream", "--stop", level, "--max_new_tokens", "5", "--sampling_temperature", "1"]
    assert main(["explain", str(run_folder), *stop, "--jsonl", str(lines)]) == 0
    (record,) = map(json.loads, lines.read_text().splitlines())
    assert [flag["token"] for flag in record["flags"]] == [len(record["tokens"]) - 1]


def test_an_adapter_without_prototypes_gets_the_same_ones_back(run_folder, capsys) -> None:
    prototypes, calibration = run_folder / "prototypes.safetensors", run_folder / "calibration.json"
    before, fitted = Prototypes.load(prototypes), Calibration.load(calibration)
    prototypes.unlink()
    assert main(["explain", str(run_folder), "--text", "cat"]) == 2
    assert f"got an adapter without prototypes. Make them from the run's data: seer prototypes {run_folder}" in (
        capsys.readouterr().err
    )
    assert main(["prototypes", str(run_folder)]) == 0
    after = Prototypes.load(prototypes)
    assert after.concepts == before.concepts
    assert after.weights == before.weights
    for layer in (1, 2):
        torch.testing.assert_close(after.layers[layer], before.layers[layer])
        again = Calibration.load(calibration).layers[layer]["token"]
        assert again.temperature == pytest.approx(fitted.layers[layer]["token"].temperature, rel=1e-2)
    assert main(["prototypes", str(run_folder), "--layers", "0"]) == 0
    assert [*Prototypes.load(prototypes).layers] == [*Calibration.load(calibration).layers] == [0]


def test_files_that_do_not_belong_together(run_folder, tmp_path, capsys) -> None:
    prototypes, calibration = run_folder / "prototypes.safetensors", run_folder / "calibration.json"
    good = Prototypes.load(prototypes)

    def refuse(message: str) -> None:
        assert main(["explain", str(run_folder), "--text", "cat"]) == 2
        assert message in capsys.readouterr().err

    Prototypes(good.concepts, good.layers, "0" * 16).save(prototypes)
    refuse("expected prototypes made with the weights beside them, got those of others")
    random_prototypes(size=8).save(prototypes)
    refuse("for hidden size 32, got shape (3, 8) at layer 0: they are of another model")
    prototypes.write_text("nothing")
    refuse("expected a prototype file written by seer train")
    good.save(prototypes)
    calibration.write_text("{}")
    refuse("calibration.json: expected a calibration written by seer")
    some_calibration(random_prototypes()).save(calibration)
    refuse("calibration.json: expected a calibration of the prototypes beside it")
    calibration.unlink()
    assert main(["explain", str(run_folder), "--text", "cat"]) == 0
    assert "The scores are not calibrated." in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "config.yaml"):
        (run_folder / name).rename(tmp_path / name)
        refuse(f"expected the folder of a finished seer train run, got one without {name}")
        (tmp_path / name).rename(run_folder / name)
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace("model: ", "model: /gone"))
    refuse("config.yaml: --model: expected a folder or Hub name of a transformers model")
    config.write_text("- 1")
    refuse("config.yaml: expected the options that seer train wrote")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --prompt, or --text and --data, got both or neither"),
        (["--prompt", "a", "--text", "b"], "expected either --prompt, or --text and --data, got both or neither"),
        (["--prompt", "a", "--stop", "fruit"], "--stop: expected CONCEPT=LEVEL such as weapons=0.8, got 'fruit'"),
        (["--text", "a", "--stream"], "--flag, --stop and --stream: expected with --prompt, got them without"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens: expected a whole number >= 1, got 0"),
        (["--prompt", "a", "--promt", "b"], "unrecognized arguments: --promt"),
        (["--prompt", "a"], "/no/run: expected the folder of a finished seer train run"),
    ],
)
def test_bad_arguments(arguments, message, capsys) -> None:
    assert main(["explain", "/no/run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_with_its_model_in_memory(make_config, make_model, data_file, tokenizer) -> None:
    out = run_training(make_config(data=str(data_file), max_steps=1), make_model("llama"), tokenizer).output_dir
    with pytest.raises(InputError, match="--model: expected a local folder"):
        Run.load(out)
    assert ConceptExplainer.from_run(out, model=make_model("llama")).explain(["cat"])
    with pytest.raises(InputError, match="expected an adapter of the given model"):
        Run.load(out, model=make_model("gpt_neox"))


def test_what_the_caller_does_with_a_token_is_not_overhead(explainer, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("seer.explainer.perf_counter", lambda: clock[0])

    def slow(row, token) -> None:
        clock[0] += 1

    (explanation,) = explainer.generate(["cat"], max_new_tokens=3, eos_token_id=None, on_token=slow)
    assert clock == [3.0]
    assert explanation.overhead == 0


def test_the_state_that_stands_for_a_text_is_that_of_the_prototypes(make_model, tokenizer) -> None:
    explainer = ConceptExplainer(
        make_model("llama"), tokenizer, random_prototypes(layers=[1]), position="response_mean"
    )
    answered, request = explainer.explain([Text("name a fruit", "plum is one"), "cat"])
    assert request.text is None
    (row,) = tokenize(tokenizer, [Text("name a fruit", "plum is one")], 64)
    with torch.no_grad():
        states = explainer.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0]
    mean = normalize(states[row.request_length :].mean(0), dim=0)
    torch.testing.assert_close(answered.text[1].cosines[0], explainer.prototypes.layers[1] @ mean)


@pytest.mark.parametrize(
    "options",
    [{"adapter": "none", "learning_rate": 1e-3}, {"positions": ["response_mean"]}, {"adapter": "dora"}],
    ids=str,
)
def test_every_kind_of_run_is_loaded_with_its_base_model(options, make_config, model_folder, data_file) -> None:
    config = make_config(
        **{"model": str(model_folder), "data": str(data_file), "max_steps": 4, "learning_rate": 1e-2, **options}
    )
    result = run_training(config)
    run = Run.load(result.output_dir)
    _, held_out = run.samples()
    encoding = run.encode(held_out.texts, list(result.representations_after))
    for layer, after in result.representations_after.items():
        torch.testing.assert_close(encoding.after[layer], torch.from_numpy(after))
        torch.testing.assert_close(encoding.before[layer], torch.from_numpy(result.representations_before[layer]))
        assert (encoding.after[layer] - encoding.before[layer]).abs().max() > 1e-4
    prototypes = run.prototypes()
    made = make_prototypes(run.encode(run.samples()[0].texts, [*prototypes.layers]).after, run.samples()[0])
    for layer, rows in prototypes.layers.items():
        torch.testing.assert_close(made.layers[layer], rows)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad(), run.base_layers() as layers:
        torch.testing.assert_close(layers.root(**inputs).logits, base(**inputs).logits)
    assert ConceptExplainer.from_run(result.output_dir).generate(["cat"], max_new_tokens=2)
