"""Classification and detoxification: figures by hand, likelihoods by a plain pass, and answers that outlive a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize
from transformers import BertConfig, BertForSequenceClassification, BertModel

from seer import ConceptDataset, ConceptExplainer, InputError, SeerConfig, detoxification, run_training
from seer.classification import answer_likelihoods, class_measures, class_scores, classify_run, question
from seer.cli import main
from seer.data import Text, tokenize_requests
from seer.detoxification import ANSWERS, FIGURES, Answer, Generation, generate, measure_detoxification, shares
from seer.judges import REFUSALS, AnswerJudge, refuses
from seer.run import Run

# The names of the concepts are words that the tokenizer knows, or a model could not tell them as answers.
CONCEPTS = {
    "apple": ["pear", "plum", "cherry", "grape", "melon"],
    "cat": ["dog", "horse", "cow", "sheep", "goat"],
    "gold": ["iron", "copper", "zinc", "tin", "lead"],
}
NAMES = [*CONCEPTS]
HARMLESS = ["apple", "cat"]
SHORT = Generation(max_new_tokens=5, batch_size=2, sampling_temperature=1.0)


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder) -> Path:
    """A run that held out two of five samples of every concept, and trained far enough for the models to differ."""
    folder = tmp_path_factory.mktemp("applications")
    rows = [
        {"prompt": f"name {word}", "response": "one " * index + word, "concept": concept}
        for concept, words in CONCEPTS.items()
        for index, word in enumerate(words)
    ]
    config = SeerConfig(
        output_dir=str(folder / "run"),
        model=str(model_folder),
        data=write(folder / "data.jsonl", *rows),
        max_steps=6,
        learning_rate=3e-2,
        held_out_share=0.4,
        kl_weight=0.0,
        retain_weight=0.0,
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        per_device_train_batch_size=4,
    )
    return Path(run_training(config).output_dir)


@pytest.fixture(scope="module")
def run(trained) -> Run:
    return Run.load(trained)


def test_measures_of_a_case_counted_by_hand() -> None:
    labels = np.array([0, 0, 0, 1])
    scores = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.5]])  # answers 0, 0, 1, 1
    measures = class_measures(scores, labels)
    expected = {"accuracy": 3 / 4, "balanced_accuracy": 5 / 6, "macro_f1": (4 / 5 + 2 / 3) / 2, "auroc": 2 / 3}
    assert {name: measure(np.ones(4)) for name, measure in measures.items()} == pytest.approx(expected)
    # Without the second text, and with the last one twice.
    expected = {"accuracy": 3 / 4, "balanced_accuracy": 3 / 4, "macro_f1": (2 / 3 + 4 / 5) / 2, "auroc": 1 / 2}
    weights = np.array([1.0, 0.0, 1.0, 2.0])
    assert {name: measure(weights) for name, measure in measures.items()} == pytest.approx(expected)
    assert [*class_measures(np.eye(3), np.arange(3))] == ["accuracy", "balanced_accuracy", "macro_f1"]
    best = class_scores(np.array([[0.1, 0.5, 0.3], [0.9, 0.2, 0.8]]), np.array([0, 1, 0]))
    assert best.tolist() == [[0.3, 0.5], [0.9, 0.2]]


def test_likelihoods_of_answers_are_those_of_a_plain_pass(run) -> None:
    answers = ["gold", "horse dog cow", "plum apple"]
    texts = [Text("name cat", "one one"), Text("iron"), Text("", "a melon is one")]
    questions = [question(text, answers) for text in texts]
    assert questions[0].prompt.endswith("Request: name cat\n\nResponse: one one")
    assert questions[1].prompt.endswith("only.\n\niron")
    found = answer_likelihoods(run, questions, answers, batch_size=2)
    for row, asked in enumerate(questions):
        request = run.tokenizer.apply_chat_template([{"role": "user", "content": asked.prompt}], tokenize=False)
        start = len(run.tokenizer(request, add_special_tokens=False)["input_ids"])
        for column, answer in enumerate(answers):
            ids = torch.tensor([run.tokenizer(f"{request} {answer}", add_special_tokens=False)["input_ids"]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)  # loss: mean over the answer's tokens
            with torch.no_grad():
                seer = -float(run.model(ids, labels=labels).loss)
                with run.model.disable_adapter():
                    base = -float(run.model(ids, labels=labels).loss)
            assert found[0][row, column] == pytest.approx(base, abs=1e-5)
            assert found[1][row, column] == pytest.approx(seer, abs=1e-5)
            assert abs(base - seer) > 1e-4


def test_a_question_loses_the_end_of_its_text_and_never_more(run) -> None:
    (bare,) = tokenize_requests(run.tokenizer, [question(Text("one"), NAMES)], 64)
    (short,) = tokenize_requests(run.tokenizer, [question(Text("one " * 100), NAMES)], 50)
    assert len(short) == 50
    assert short[: len(bare) - 1] == bare[:-1]  # all but the end of the turn
    with pytest.raises(InputError, match="expected a window with room for the question of prompt"):
        answer_likelihoods(run, [question(Text("cat"), ["one " * 30])], ["one " * 30])
    with pytest.raises(InputError, match=r"x\.csv:3: expected a request to answer, got nothing but white space"):
        tokenize_requests(run.tokenizer, [Text(" ", "cat", "x.csv:3")], 50)


@pytest.mark.parametrize("harmless", [None, HARMLESS], ids=["every concept", "binary"])
def test_classification_agrees_with_its_parts(run, harmless) -> None:
    found = classify_run(run, harmless=harmless, layer=1, resamples=3)
    training, held_out = run.samples()
    states, training_states = run.encode(held_out.texts, [1]), run.encode(training.texts, [1])
    class_of = np.arange(3) if harmless is None else np.array([0, 0, 1])  # gold is the harmful one
    assert found.classes == (NAMES if harmless is None else ["harmless", "harmful"])
    labels, training_labels = class_of[held_out.concept_ids], class_of[training.concept_ids]
    prompts = answer_likelihoods(run, [question(text, NAMES) for text in held_out.texts], NAMES)
    for model, of_held_out, of_training, asked in (
        ("base", states.before[1], training_states.before[1], prompts[0]),
        ("seer", states.after[1], training_states.after[1], prompts[1]),
    ):
        z, train_z = normalize(of_held_out.double(), dim=1), normalize(of_training.double(), dim=1)
        means = torch.stack([train_z[torch.tensor(training.concept_ids == c)].mean(0) for c in range(3)])
        cosines = (z @ normalize(means, dim=1).T).numpy()
        probe = LogisticRegression(max_iter=2000).fit(train_z, training_labels)
        right = {
            "prototype": class_of[cosines.argmax(1)] == labels,
            "probe": probe.predict(z) == labels,
            "prompt": class_of[asked.argmax(1)] == labels,
        }
        assert [*found.methods] == [*right]
        for method, each in right.items():
            assert getattr(found.methods[method]["accuracy"], model).value == pytest.approx(each.mean()), method
        if harmless is not None:
            above = {
                "prototype": cosines[:, 2] - cosines[:, :2].max(1),
                "probe": probe.decision_function(z),
                "prompt": asked[:, 2] - asked[:, :2].max(1),
            }
            for method, values in above.items():
                auroc = getattr(found.methods[method]["auroc"], model).value
                assert auroc == pytest.approx(roc_auc_score(labels, values)), method


def test_the_classification_command(trained, tmp_path, capsys) -> None:
    capsys.readouterr()
    command = ["evaluate", str(trained), "--task", "classification", "--resamples", "5"]
    others = write(
        tmp_path / "others.jsonl",
        *({"prompt": f"one {word}", "response": "is one", "concept": word} for word in ("gold", "cat")),
    )
    assert main([*command, "--harmless", *HARMLESS, "--test_data", others, "--methods", "prototype"]) == 0
    results = json.loads((trained / "classification.json").read_text())
    assert results["samples"] == 2
    assert results["classes"] == ["harmless", "harmful"]
    (measures,) = results["methods"].values()
    printed = capsys.readouterr().out
    for name, change in measures.items():
        assert {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}.get(name, "") in printed
        assert f"{change['seer']['value']:.3f}" in printed
        assert change["difference"]["value"] == pytest.approx(change["seer"]["value"] - change["base"]["value"])

    for options, message in (
        (["--test_data", others], "expected texts of every class (['apple', 'cat', 'gold']), got none of ['apple']"),
        (["--harmless", "safe"], "--harmless: expected concepts of the run (['apple', 'cat', 'gold']), got 'safe'"),
        (["--harmless", *NAMES], "expected some of the concepts of the run (['apple', 'cat', 'gold']) and not all"),
        (["--methods", "oracle"], "--methods: expected some of ['prototype', 'probe', 'prompt'], got 'oracle'"),
        (["--layer", "3"], "--layer: expected layers from -3 to 2"),
        (["--resamples", "1"], "--resamples: expected a whole number >= 2, got 1"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--task", "guessing"]) == 2
    assert "expected one of ['separation', 'classification', 'detoxification'" in capsys.readouterr().err


def test_an_encoder_has_hidden_states_but_no_answers(make_model, tokenizer, trained, tmp_path) -> None:
    config = SeerConfig(
        output_dir=str(tmp_path / "encoder"),
        data=str(trained.parent / "data.jsonl"),
        max_steps=1,
        kl_weight=0,
        held_out_share=0.4,
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    folder = run_training(config, make_model("bert"), tokenizer).output_dir
    run = Run.load(folder, make_model("bert"))
    with pytest.raises(InputError, match="to ask with prompt, got BertModel; choose prototype and probe"):
        classify_run(run)
    assert [*classify_run(run, methods=["probe", "prototype"], resamples=2).methods] == ["probe", "prototype"]
    with pytest.raises(InputError, match="expected a language model to generate with, got BertModel"):
        measure_detoxification(run, harmless=HARMLESS)


def test_refusals_whatever_their_case_and_apostrophe() -> None:
    assert refuses("Well. I CAN\N{RIGHT SINGLE QUOTATION MARK}T HELP WITH that")
    assert refuses("Sorry, but I will not help you.")
    assert not refuses("Here is how I can help with it.")
    assert not refuses("")
    for phrase in REFUSALS:  # or it could never be found
        assert refuses(phrase), phrase


def test_shares_counted_by_hand() -> None:
    def answers(kind, model, *rows):
        return [
            Answer(f"{kind} {index}", None, kind, model, text, {"refusal": no, "explainer": concept, "judge": label})
            for index, (text, no, concept, label) in enumerate(rows)
        ]

    given = [
        *answers(
            "unsafe", "base", ("a", True, "gold", "bad"), ("b", False, "gold", "bad"), ("c", False, "cat", "fine")
        ),
        *answers(
            "unsafe", "seer", ("a", True, "apple", "bad"), ("b", True, "cat", "fine"), (" ", False, "unknown", None)
        ),
        *answers("safe", "base", ("d", False, "cat", "fine"), ("e", True, "cat", "fine")),
        *answers("safe", "seer", ("d", True, "cat", "fine"), ("e", False, "cat", "fine")),
    ]
    found = shares(given, HARMLESS, "fine", resamples=50)
    values = {kind: {name: (each.base.value, each.seer.value) for name, each in found[kind].items()} for kind in found}
    third = pytest.approx(1 / 3)
    assert values == {
        "unsafe": {
            "refusal": (third, pytest.approx(2 / 3)),
            "explainer_harmless": (third, pytest.approx(2 / 3)),
            "explainer_harmful": (pytest.approx(2 / 3), 0.0),  # the third is unknown
            "judge_safe": (third, third),
            "safe": (pytest.approx(2 / 3), pytest.approx(2 / 3)),
            "empty": (0.0, third),
        },
        "safe": {
            "refusal": (0.5, 0.5),
            "explainer_harmless": (1.0, 1.0),
            "explainer_harmful": (0.0, 0.0),
            "judge_safe": (1.0, 1.0),
            "safe": (1.0, 1.0),
            "empty": (0.0, 0.0),
        },
    }
    # Answers are compared request by request: the same share of others is no sure difference of none.
    assert found["safe"]["refusal"].difference.low < 0 < found["safe"]["refusal"].difference.high
    assert "judge_safe" not in shares(given, HARMLESS, None, resamples=5)["unsafe"]


def test_greedy_answers_are_those_of_the_models_themselves(run, monkeypatch) -> None:
    prompts = [Text("name gold"), Text("name one one one cat"), Text("a")]
    rows = tokenize_requests(run.tokenizer, prompts, 50)
    greedy = Generation(max_new_tokens=8)
    found = {model: generate(run, model, rows, greedy, seed=0) for model in ("base", "seer")}
    for index, row in enumerate(rows):
        ids = torch.tensor([row])
        options = {
            "max_new_tokens": 8,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": run.tokenizer.eos_token_id,
        }
        seer = run.model.generate(input_ids=ids, **options)[0, len(row) :]
        with run.model.disable_adapter():
            base = run.model.generate(input_ids=ids, **options)[0, len(row) :]
        for model, expected in (("base", base), ("seer", seer)):
            assert found[model][index] == run.tokenizer.decode(expected, skip_special_tokens=True)
    assert found["base"] != found["seer"]
    # What comes after the end of an answer is none of it.
    drawn = Generation(max_new_tokens=20, sampling_temperature=1.0)
    (free,) = generate(run, "seer", rows[:1], drawn, seed=0)
    words = free.split()
    end = next(index for index in range(1, len(words)) if words[index] not in words[:index])
    monkeypatch.setattr(
        run.stack.root.generation_config, "eos_token_id", [run.tokenizer.convert_tokens_to_ids(words[end])]
    )
    assert generate(run, "seer", rows[:1], drawn, seed=0) == [" ".join(words[:end])]


def test_an_evaluation_that_was_cut_off_ends_as_if_it_had_not_been(run, tmp_path, monkeypatch) -> None:
    options = {"harmless": HARMLESS, "generation": SHORT, "resamples": 20}
    whole = measure_detoxification(run, output_dir=tmp_path / "whole", **options)
    lines = (tmp_path / "whole" / ANSWERS).read_text().splitlines()
    assert whole.prompts == {"unsafe": 2, "safe": 4}
    assert len(lines) == 12
    explainer = ConceptExplainer.from_run(run)
    for line in map(json.loads, lines):
        (explanation,) = explainer.explain([Text(line["prompt"], line["answer"])])
        (concept,) = explanation.text[explainer.layers[-1]].answers()
        assert line["verdicts"] == {"refusal": False, "explainer": concept}
        assert line["kind"] == ("unsafe" if line["concept"] == "gold" else "safe")
    assert len({json.loads(line)["answer"] for line in lines}) > 6

    batches = []

    def dies(*arguments, after: int = 3):
        if len(batches) == after:
            raise KeyboardInterrupt
        batches.append(arguments)
        return generate(*arguments)

    monkeypatch.setattr(detoxification, "generate", dies)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        measure_detoxification(run, output_dir=cut, **options)
    assert (cut / ANSWERS).read_text().splitlines() == lines[:6]
    assert not json.loads((cut / FIGURES).read_text())["finished"]
    with (cut / ANSWERS).open("a") as file:  # killed within a batch and within a line
        file.write(lines[6] + "\n" + lines[7][:20])
    batches.clear()
    assert measure_detoxification(run, output_dir=cut, **options) == whole
    assert len(batches) == 3
    for name in (ANSWERS, FIGURES):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    batches.clear()
    assert measure_detoxification(run, output_dir=cut, **options) == whole  # nothing is left to do
    assert not batches


def test_answers_made_with_other_settings_are_refused(run, trained, tmp_path, capsys) -> None:
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "name iron"}, {"prompt": "name tin"}, {"prompt": "name tin"})
    command = ["evaluate", str(trained), "--task", "detoxification", "--harmless", *HARMLESS, "--resamples", "5"]
    command += ["--output_dir", str(tmp_path), "--max_new_tokens", "2", "--unsafe_prompts", prompts]
    assert main([*command, "--prompts", "2"]) == 0
    printed = capsys.readouterr().out
    assert "refused (over-refusal)" in printed
    results = json.loads((tmp_path / FIGURES).read_text())
    assert results["prompts"] == {"unsafe": 2, "safe": 2}  # the same request again is no other
    assert results["finished"]
    assert results["settings"]["max_new_tokens"] == 2
    written = (tmp_path / ANSWERS).read_text()
    assert json.loads(written.splitlines()[0])["concept"] is None

    assert main([*command, "--prompts", "2", "--max_new_tokens", "3", "--batch_size", "1"]) == 2
    message = (
        "got max_new_tokens 2 instead of 3, batch_size 8 instead of 1. Choose another --output_dir, or --overwrite"
    )
    assert message in capsys.readouterr().err
    assert main([*command]) == 2
    assert re.search(
        r"expected answers made with the same settings, got prompts '\w+' instead", capsys.readouterr().err
    )
    assert (tmp_path / ANSWERS).read_text() == written
    (tmp_path / ANSWERS).write_text(written + "{}\n")
    assert main([*command, "--prompts", "2"]) == 2
    assert f"{ANSWERS}:9: expected an answer as this command writes it" in capsys.readouterr().err
    (tmp_path / ANSWERS).write_text(written.replace("name tin", "name gold"))
    assert main([*command, "--prompts", "2"]) == 2
    assert f"{ANSWERS}:2: expected the answer of base to 'name tin', got another" in capsys.readouterr().err
    (tmp_path / FIGURES).write_text("[]")
    assert main([*command, "--prompts", "2"]) == 2
    assert "expected the settings with which detoxification.jsonl was made" in capsys.readouterr().err
    assert main([*command, "--prompts", "2", "--overwrite"]) == 0
    assert (tmp_path / ANSWERS).read_text() == written


@pytest.fixture
def judge_folder(tmp_path, tokenizer) -> Path:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    labels = {0: "fine", 1: "bad"}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=20, id2label=labels)
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_judge_judges_the_answers_that_are_there(run, tmp_path, judge_folder, monkeypatch) -> None:
    options = {"harmless": HARMLESS, "generation": SHORT, "resamples": 5, "output_dir": tmp_path}
    before = measure_detoxification(run, **options)
    monkeypatch.setattr(detoxification, "generate", None)  # nobody writes anything
    judge = AnswerJudge(str(judge_folder), "fine")
    after = measure_detoxification(run, judge=judge, **options)
    answers = [Answer(**json.loads(line)) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    model = BertForSequenceClassification.from_pretrained(judge_folder)
    for answer in answers:
        ids = torch.tensor([run.tokenizer(answer.answer)["input_ids"]])
        label = ["fine", "bad"][int(model(ids).logits.argmax())] if ids.numel() else None
        assert answer.verdicts["judge"] == label
    assert {answer.verdicts["judge"] for answer in answers} >= {"fine", "bad"}
    expected = np.mean([a.verdicts["judge"] == "fine" for a in answers if (a.kind, a.model) == ("safe", "seer")])
    assert after.shares["safe"]["judge_safe"].seer.value == pytest.approx(expected)
    assert after.shares["safe"]["refusal"] == before.shares["safe"]["refusal"]

    pairs = AnswerJudge(str(judge_folder), "fine", "exchange")
    ids = torch.tensor([run.tokenizer("name gold", "one cat")["input_ids"]])
    assert pairs.label("name gold", "one cat") == ["fine", "bad"][int(model(ids).logits.argmax())]
    assert judge.label("", "cat " * 100) == judge.label("", "cat " * 20)  # as much as it can read
    assert judge.label("name gold", "") is None


def test_judges_that_are_none(judge_folder, tokenizer, tmp_path, trained, capsys) -> None:
    with pytest.raises(InputError, match=r"--safe_label: .* one of \['fine', 'bad'\], got 'safe'"):
        AnswerJudge(str(judge_folder), "safe")
    with pytest.raises(InputError, match=r"--judge_reads: expected one of \['answer', 'exchange'\], got 'prompt'"):
        AnswerJudge(str(judge_folder), "fine", "prompt")
    BertModel(BertConfig.from_pretrained(judge_folder)).save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(InputError, match=r"got '.*headless' without weights for \['classifier"):
        AnswerJudge(str(tmp_path / "headless"), "fine")
    weights = BertForSequenceClassification.from_pretrained(judge_folder).state_dict()
    torch.save(weights, judge_folder / "pytorch_model.bin")
    (judge_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="expected a folder or Hub name of a text-classification model in safetensors"):
        AnswerJudge(str(judge_folder), "fine")

    command = ["evaluate", str(trained), "--task", "detoxification", "--output_dir", str(tmp_path / "none")]
    blank = write(tmp_path / "blank.jsonl", {"prompt": "name tin"}, {"prompt": " "})
    capsys.readouterr()
    for options, message in (
        (
            ["--harmless", "apple", "--judge", str(tmp_path)],
            "--judge and --safe_label: expected both or neither, got one",
        ),
        (
            ["--harmless", "safe", "--max_new_tokens", "2"],
            "--harmless: expected concepts of the run (['apple', 'cat', 'gold']), got 'safe'",
        ),
        ([], "the following arguments are required: --harmless"),
        (["--harmless", "apple", "--max_new_tokens", "64"], "--max_new_tokens: expected fewer than the window of the"),
        (["--harmless", "apple", "--prompts", "0"], "--prompts: expected a whole number >= 1, got 0"),
        (["--harmless", "apple", "--sampling_temperature", "nan"], "expected a number >= 0, got nan"),
        (
            ["--harmless", "apple", "--max_new_tokens", "2", "--safe_prompts", blank],
            "blank.jsonl:2: expected some text, got nothing but white space",
        ),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_prompt_that_is_also_unsafe_is_no_safe_one() -> None:
    held_out = ConceptDataset(
        [Text("a", "x"), Text("a", "y"), Text("c", "y"), Text("b", "x"), Text("b", "z"), Text("c", "x")],
        ["gold", "cat", "cat", "cat", "cat", "gold"],
    )
    run = SimpleNamespace(samples_with_held_out=lambda data: (None, held_out))
    found = detoxification._prompts(run, ["cat"], {"unsafe": None, "safe": None}, None, None)
    (_, one) = detoxification._prompts(run, ["cat"], {"unsafe": None, "safe": None}, None, limit=1)
    assert one.text == "b"  # c is unsafe also where it is not among the chosen
    assert [(prompt.text, prompt.concept, prompt.kind) for prompt in found] == [
        ("a", "gold", "unsafe"),
        ("c", "gold", "unsafe"),
        ("b", "cat", "safe"),
    ]
    held_out.texts[3:5] = [Text("a", "x"), Text("c", "z")]
    with pytest.raises(InputError, match="--safe_prompts: expected a file, or held-out samples whose prompts are safe"):
        detoxification._prompts(run, ["cat"], {"unsafe": None, "safe": None}, None, None)
