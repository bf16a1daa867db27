"""Reading texts, what is refused and how it is said."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import datasets
import pytest
from conftest import CHAT_TEMPLATE

from seer import ConceptDataset, InputError, TextDataset
from seer.data import Text, pad_token_id, tokenize

GOOD = "prompt,response,concept\na,b,x\nc,d,x\n"


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_csv_and_jsonl_give_the_same_texts(tmp_path: Path) -> None:
    csv_file = write(tmp_path / "a.csv", 'prompt,response,concept,more\n"two\nlines","x, y",c1,\n\nä,b,c1,z\n')
    rows = [
        {"prompt": "two\nlines", "response": "x, y", "concept": "c1"},
        {"prompt": "ä", "response": "b", "concept": "c1"},
    ]
    jsonl_file = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    from_csv, from_jsonl = ConceptDataset.load(csv_file), ConceptDataset.load(jsonl_file)
    assert [text[:2] for text in from_csv.texts] == [("two\nlines", "x, y"), ("ä", "b")]
    assert [text[:2] for text in from_jsonl.texts] == [text[:2] for text in from_csv.texts]
    assert from_csv.concepts == from_jsonl.concepts == ["c1", "c1"]
    assert [text.source for text in from_csv.texts] == [f"{csv_file}:2", f"{csv_file}:5"]
    assert from_jsonl.texts[1].source == f"{jsonl_file}:2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "prompt,response\na,b\n",
            r"a\.csv:2: missing column 'concept'; got columns \['prompt', 'response'\]",
        ),
        ("a.csv", "", r"a\.csv: expected at least one row, got none"),
        ("a.csv", "prompt,response,concept\n", r"a\.csv: expected at least one row"),
        ("a.csv", GOOD + "e,f,\n", r"a\.csv:4: column concept: expected a name, got nothing"),
        ("a.csv", GOOD + "e,f\n", r"a\.csv:4: expected 3 columns as in the header, got 2"),
        ("a.csv", GOOD + " ,,x\n", r"a\.csv:4: expected some text, got nothing but white space"),
        ("a.csv", GOOD + '"e,f,x\n', r"a\.csv:4: expected a row of comma-separated values"),
        ("a.jsonl", '{"prompt": "a"}\n', r"a\.jsonl:1: missing column 'concept', 'response'; got columns \['prompt'\]"),
        ("a.jsonl", "\n{,}\n", r"a\.jsonl:2: expected a JSON object"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected a JSON object, got '\[1\]'"),
        ("a.jsonl", '{"prompt": "a", "response": 3, "concept": "x"}\n', r"a\.jsonl:1: column response: .*got 3"),
        ("a.txt", GOOD, r"a\.txt: expected a name that ends in \.csv or \.jsonl"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConceptDataset.load(write(tmp_path / name, content))


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: expected a file, got nothing there"):
        ConceptDataset.load(str(tmp_path / "none.csv"))
    (tmp_path / "latin.csv").write_bytes(GOOD.encode() + "é,b,x\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.csv: expected UTF-8 text"):
        ConceptDataset.load(str(tmp_path / "latin.csv"))


def test_concepts_are_checked_against_the_list(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", GOOD + "e,f,y\ng,h,y\n")
    with pytest.raises(InputError, match=r"a\.csv:4: column concept: expected one of \['x', 'z'\], got 'y'"):
        ConceptDataset.load(file, ["x", "z"])
    assert ConceptDataset.load(file, ["y", "z", "x"]).names == ["y", "x"]


def test_concept_with_a_single_sample_is_refused(tmp_path: Path) -> None:
    dataset = ConceptDataset.load(write(tmp_path / "a.csv", GOOD + "e,f,y\n"))
    with pytest.raises(InputError, match=r"a\.csv:4: expected two samples or more of concept 'y', got this one"):
        dataset.split(0.2, seed=0)


def test_texts_made_in_python_are_named_by_their_place() -> None:
    with pytest.raises(InputError, match=r"sample 1: column concept: expected a name"):
        ConceptDataset([Text("a", "b"), Text("c", "d")], ["x", " "])
    with pytest.raises(InputError, match=r"concepts: expected one per text \(1\), got 2"):
        ConceptDataset([Text("a", "b")], ["x", "y"])


def test_retain_texts_may_be_plain(tmp_path: Path) -> None:
    plain = TextDataset.load(write(tmp_path / "t.csv", "text\nhello there\n"))
    assert plain[0][:2] == ("hello there", None)
    chat = TextDataset.load(write(tmp_path / "c.csv", "prompt,response,concept\na,b,\n"))
    assert chat[0][:2] == ("a", "b")
    with pytest.raises(InputError, match=r"n\.csv:2: missing column 'prompt', 'response' \(or column 'text'\)"):
        TextDataset.load(write(tmp_path / "n.csv", "words\nhello\n"))


def test_a_text_may_have_several_concepts(tmp_path: Path) -> None:
    csv_file = write(tmp_path / "m.csv", "prompt,response,concept\n1,r,b | a\n2,r,a\n3,r,c|b\n4,r,c\n")
    rows = [["b", "a"], "a", ["c", "b"], "c"]
    lines = [json.dumps({"prompt": str(i + 1), "response": "r", "concept": each}) for i, each in enumerate(rows)]
    for file in (csv_file, write(tmp_path / "m.jsonl", "\n".join(lines))):
        dataset = ConceptDataset.load(file)
        assert dataset.names == ["a", "b", "c"]
        assert dataset.memberships.tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]
        assert dataset.concepts == ["b", "a", "c", "c"]
        assert dataset.concept_ids.tolist() == [1, 0, 2, 2]
        dataset.require_pairs()
    as_it_stands = ConceptDataset.load(write(tmp_path / "s.jsonl", lines[0].replace('["b", "a"]', '"b|a"')))
    assert as_it_stands.names == ["b|a"]
    for cell, message in {
        "a|": "expected a name, got nothing",
        "a|d": r"expected one of \['a', 'b', 'c'\], got 'd'",
    }.items():
        with pytest.raises(InputError, match=rf"e\.csv:2: column concept: {message}"):
            ConceptDataset.load(write(tmp_path / "e.csv", f"prompt,response,concept\n1,r,{cell}\n"), ["a", "b", "c"])
    for cell in ("[]", '["a", ""]'):
        with pytest.raises(InputError, match=r"e\.jsonl:1: column concept: expected a name, got nothing"):
            ConceptDataset.load(write(tmp_path / "e.jsonl", f'{{"prompt": "p", "response": "r", "concept": {cell}}}'))


def test_any_dataset_of_the_library_will_do() -> None:
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "response": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "labels": datasets.List(datasets.ClassLabel(names=["x", "y"])),
        }
    )
    columns = {"question": ["q0", "q1"], "response": ["r0", "r1"], "label": [1, 0], "labels": [[0, 1], [1]]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    single = ConceptDataset.from_dataset(rows, {"prompt": "question", "concept": "label"})
    assert single.concepts == ["yes", "no"]
    assert single[0] == Text("q0", "r0", "data set, row 0")
    several = ConceptDataset.from_dataset(rows, {"prompt": "question", "concept": "labels"})
    assert several.memberships.tolist() == [[1, 1], [0, 1]]
    assert TextDataset.from_dataset(rows, {"text": "question"})[1] == Text("q1", None, "data set, row 1")
    with pytest.raises(InputError, match=r"data set, row 0: missing column 'concept', 'prompt'; got columns"):
        ConceptDataset.from_dataset(rows)
    with pytest.raises(InputError, match=r"columns: expected prompt in one of \['question', .* got 'prompts'"):
        ConceptDataset.from_dataset(rows, {"prompt": "prompts"})
    with pytest.raises(InputError, match=r"data set: expected at least one row, got none"):
        TextDataset.from_dataset(rows.select([]), {"text": "question"})


def test_a_concept_that_is_always_named_second_keeps_two_samples_for_training() -> None:
    concepts = [["a", "z"], ["a", "z"], ["a", "z"], *["a"] * 6]
    dataset = ConceptDataset([Text(str(i), "r") for i in range(9)], concepts)
    for seed in range(8):
        training, held_out = dataset.split(0.7, seed)
        assert training.memberships[:, 1].sum() >= 2
        assert len(training) + len(held_out) == 9
        assert training.names == held_out.names == ["a", "z"]


def test_split_is_stratified_and_decided_by_the_seed() -> None:
    concepts = ["a"] * 20 + ["b"] * 10 + ["c"] * 3 + ["d"] * 2
    dataset = ConceptDataset([Text(str(i), "r", str(i)) for i in range(35)], concepts)
    training, held_out = dataset.split(0.2, seed=3)
    assert held_out is not None
    assert [held_out.concepts.count(name) for name in "abcd"] == [4, 2, 1, 0]
    assert sorted(text.source for text in training.texts + held_out.texts) == sorted(str(i) for i in range(35))
    assert held_out.names == training.names == ["a", "b", "c", "d"]
    again = dataset.split(0.2, seed=3)[1]
    other = dataset.split(0.2, seed=4)[1]
    assert again is not None
    assert other is not None
    assert again.texts == held_out.texts
    assert other.texts != held_out.texts
    assert dataset.split(0.0, seed=3) == (dataset, None)


def test_tokens_follow_the_chat_template(tokenizer) -> None:
    texts = [Text("name a cat", "dog", "s"), Text("cat", None, "s"), Text("cat", "", "s")]
    rows = tokenize(tokenizer, texts, 64)
    plain = [tokenizer.decode(row.ids).split() for row in rows]
    assert plain[1] == ["cat"]
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
    assert rows[2].ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert len(rows[0].ids) > len(rows[2].ids)


def test_without_chat_template_the_turns_are_joined_and_it_is_said_once(tokenizer, caplog) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    with caplog.at_level(logging.WARNING):
        rows = tokenize(tokenizer, [Text("name a", "cat", "s"), Text("one", "dog", "s")], 64)
        tokenize(tokenizer, [Text("one", "cat", "held out")], 64)
    assert tokenizer.decode(rows[0].ids).split() == ["name", "a", "cat"]
    assert sum("chat template" in record.message for record in caplog.records) == 1


TEMPLATES = {
    "of the tests": CHAT_TEMPLATE,
    "with a header for the response": (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    ),
    "with a header that only a prompt for generation has": (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> one one {% endif %}"
    ),
    "with a system turn": (
        "a one <end> {% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} <assistant>"
        "{% else %} {{ m['content'] }} <end>{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_request_ends_where_the_model_would_begin_to_answer(tokenizer, monkeypatch, name: str) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name])
    (row,) = tokenize(tokenizer, [Text("name a cat", "dog cow", "s")], 64)
    words = tokenizer.convert_ids_to_tokens(row.ids)
    assert words[row.request_length - 1] == ("<assistant>" if name != "of the tests" else "<end>")
    response = ["dog", "cow", "<end>"] if name != "of the tests" else ["<assistant>", "dog", "cow", "<end>"]
    assert words[row.request_length :] == response


def test_where_requests_end_in_other_texts(tokenizer, monkeypatch) -> None:
    texts = [Text("cat dog", None, "s"), Text("cat dog", "", "s"), Text("", "cat", "s")]
    plain, request, response = tokenize(tokenizer, texts, 64)
    assert plain.request_length == response.request_length == 0
    assert request.request_length == len(request.ids)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert tokenize(tokenizer, [Text("cat dog", "cow", "s")], 64)[0].request_length == 2


def test_long_texts_lose_their_end_but_not_the_template(tokenizer, caplog) -> None:
    text = Text("name a cat", " ".join(["dog", "cow"] * 20), "s")
    whole = tokenize(tokenizer, [text], 64)[0].ids
    with caplog.at_level(logging.WARNING):
        rows = [row.ids for row in tokenize(tokenizer, [text, Text("a", "cat", "s")], 12)]
    assert "1 of 2 texts are longer than 12 tokens" in caplog.text
    assert len(rows[0]) == 12
    assert rows[0] == whole[:11] + whole[-1:]
    assert tokenize(tokenizer, [text], 5)[0] == ([*whole[:4], whole[-1]], 5)  # only the request is left
    with pytest.raises(InputError, match=r"--max_length: expected room for text inside the chat template"):
        tokenize(tokenizer, [text], 2)


def test_long_requests_may_lose_their_middle(tokenizer, monkeypatch, caplog) -> None:
    request = "name a cat dog cow sheep goat horse is one"
    text = Text(request, "iron tin", "s")
    whole = tokenize(tokenizer, [text], 64)[0].ids
    with caplog.at_level(logging.WARNING):
        (row,) = tokenize(tokenizer, [text], len(whole) - 4, "middle")
    assert "1 of 1 texts are longer than 12 tokens and were cut." in caplog.text
    assert row.ids == tokenize(tokenizer, [Text("name a cat horse is one", "iron tin", "s")], 64)[0].ids
    # When two words are left of the request, the end of the response goes.
    (row,) = tokenize(tokenizer, [text], len(whole) - 9, "middle")
    assert row.ids == tokenize(tokenizer, [Text("name one", "iron", "s")], 64)[0].ids
    with pytest.raises(InputError, match=r"--max_length: expected room for text inside the chat template"):
        tokenize(tokenizer, [text], 2, "middle")
    assert tokenize(tokenizer, [Text("cat dog cow", None, "s")], 2, "middle") == tokenize(
        tokenizer, [Text("cat dog", None, "s")], 2
    )
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "longer than before" * len(ids))  # a tokenizer may do that
    assert len(tokenize(tokenizer, [text], 10, "middle")[0].ids) <= 10


def test_long_texts_may_be_refused(tokenizer) -> None:
    texts = [Text("a", "cat", "s:2"), Text("a", "cat " * 20, "s:3"), Text("a", "dog " * 30, "s:4")]
    with pytest.raises(InputError, match=r"s:3: expected at most 12 tokens .* got 25; 2 of 3 texts are too long"):
        tokenize(tokenizer, texts, 12, "refuse")
    assert tokenize(tokenizer, texts[:1], 12, "refuse") == tokenize(tokenizer, texts[:1], 12)


def test_empty_responses_are_counted(tokenizer, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        tokenize(tokenizer, [Text("a", "cat"), Text("a", ""), Text("one", " "), Text("dog")], 64)
    assert "2 of 4 texts have an empty response: their request stands for them." in caplog.text


def test_without_pad_token_another_is_taken_and_it_is_said(tokenizer, caplog) -> None:
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    assert f"The tokenizer has no pad token: token {tokenizer.eos_token_id} fills up" in caplog.text
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_long_plain_texts_are_cut_at_the_end(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    rows = tokenize(tokenizer, [Text("cat dog " * 30, None, "s"), Text("cat dog " * 4, None, "s")], 8)
    assert rows[0] == rows[1]


def test_text_without_tokens_is_refused(tokenizer, monkeypatch) -> None:
    tokenizer_without_words = lambda *_, **__: {"input_ids": []}  # noqa: E731
    tokenizer_without_words.chat_template = None
    with pytest.raises(InputError, match=r"here:7: expected text that the tokenizer knows"):
        tokenize(tokenizer_without_words, [Text("a", None, "here:7")], 8)
