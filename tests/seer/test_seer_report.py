"""The page of a run and the comparison of runs: what is in them, for people and for browsers."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import rows

from seer import SeerConfig, run_training
from seer.cli import main
from seer.compare import compare_runs
from seer.errors import InputError
from seer.report import COMMANDS, MEANINGS, cell, number, write_report
from seer.run import Run

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data, concepts and file name try to become markup."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "<b>data & 'co'.csv"
    concepts = {"fruit": HOSTILE, "metal": 'metal" onload="alert(1)', "animal": "{{ 7 * 7 }}"}
    with data.open("w", newline="", encoding="utf-8") as file:
        lines = [(f"{HOSTILE} {prompt}", response, concepts[concept]) for prompt, response, concept in rows()]
        csv.writer(file).writerows([("prompt", "response", "concept"), *lines])
    config = SeerConfig(
        model=str(model_folder),
        data=str(data),
        output_dir=str(folder / "run"),
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        held_out_share=0.34,
        target_layers=[0, 2],
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    run_training(config)
    assert main(["evaluate", str(folder / "run"), "--resamples", "5"]) == 0
    assert main(["faithfulness", str(folder / "run"), "--texts", "3", "--controls", "1"]) == 0
    return folder / "run"


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, wanted: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == wanted]

    def section(self, title: str) -> str:
        """The text from one heading of the page to the next."""
        after = self.source.split(f'<h2 id="{title}">')[1].split("<h2")[0]
        return " ".join(re.sub("<[^>]+>", " ", after).split())


@pytest.fixture(scope="module")
def whole(trained: Path) -> Page:
    """The page with everything that a run can have."""
    other = trained.parent / "page.html"
    (trained / "generalization.json").write_text(json.dumps(GENERALIZATION))
    (trained / "classification.json").write_text(json.dumps(CLASSIFICATION))
    (trained / "detoxification.json").write_text(json.dumps(DETOXIFICATION))
    assert main(["report", str(trained), "--output", str(other), "--texts", "2"]) == 0
    for name in ("generalization.json", "classification.json", "detoxification.json"):
        (trained / name).unlink()
    return Page(other)


def change(base: float, seer: float) -> dict[str, Any]:
    """A measure as the evaluations write it."""
    parts = {"base": base, "seer": seer, "difference": seer - base}
    return {name: {"value": value, "low": value - 0.05, "high": value + 0.05} for name, value in parts.items()}


TERMS = {
    "training": {
        "k": 4,
        "k_variance": {HOSTILE: {"value": 0.6125, "standard_error": 0.01}},
        "exact": None,
        "bound": {"value": 3912.5, "standard_error": 12.25},
        "margin_loss": None,
    },
    "held_out": {"error": 0.375},
}
GENERALIZATION = {
    "features": "unit-normalised",
    "settings": {"splits": 64, "exact": False, "gamma": None, "seed": 0},
    "layers": {"2": {"base": TERMS, "seer": {**TERMS, "held_out": {"error": 0.25}}}},
}
CLASSIFICATION = {
    "samples": 6,
    "classes": ["harmless", "harmful"],
    "layer": 2,
    "methods": {"probe": {"macro_f1": change(0.512, 0.634)}, "prompt": {"macro_f1": change(0.211, 0.222)}},
    "resamples": 5,
}
DETOXIFICATION = {
    "finished": False,
    "harmless": [HOSTILE],
    "shares": {"unsafe": {"refusal": change(0.125, 0.875)}, "safe": {"refusal": change(0.062, 0.437)}},
}


def test_every_figure_of_the_files_is_on_the_page(trained: Path, whole: Page) -> None:
    metrics, evaluation, faithfulness = (
        json.loads((trained / name).read_text()) for name in ("metrics.json", "evaluation.json", "faithfulness.json")
    )
    held_out = whole.section("held-out")
    for values in metrics["held_out"]["layers"].values():
        for side in ("before", "after"):
            for value in values[side].values():
                assert f"{value:.3f}" in held_out
    assert number(metrics["held_out"]["kl_to_base_nats_per_token"]["after"]) in held_out
    section = whole.section("evaluation")
    for measures in (*evaluation["layers"].values(), evaluation["retention"]):
        for measure, values in measures.items():
            assert measure in MEANINGS
            row = " ".join(cell(values[side]) for side in ("base", "seer", "difference"))
            assert f"{measure.replace('_', ' ')} {row}" in section
    section = whole.section("faithfulness")
    for model in ("base", "seer"):
        for comparison in faithfulness[model]["comparisons"].values():
            for value in comparison.values():
                assert cell(value) in section
    assert f"torch {metrics['versions']['torch']}" in whole.section("options")
    for name, value in yaml.safe_load((trained / "config.yaml").read_text()).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert f"{name} {value}" in whole.section("options")


def test_results_of_any_evaluation_become_tables(whole: Page) -> None:
    section = whole.section("generalization")
    assert "0.375 0.250" in section  # held-out error, base and SEER
    assert "3912.500 ± 12.250" in section
    assert "features unit-normalised settings splits: 64; exact: no; gamma: -; seed: 0" in section
    assert "training: margin loss - -" in section
    assert "probe: macro f1 0.512 [0.462, 0.562] 0.634 [0.584, 0.684] 0.122 [0.072, 0.172]" in whole.section(
        "classification"
    )
    section = whole.section("detoxification")
    assert "finished no" in section
    assert "unsafe: refusal 0.125 [0.075, 0.175] 0.875 [0.825, 0.925]" in section
    assert "safe: refusal 0.062" in section
    assert "share of answers with a phrase of refusal" in section


def test_numbers_keep_what_counts() -> None:
    assert [number(value) for value in (None, float("nan"), 3, 0.0, 0.5, 4.24e-4)] == [
        "-",
        "-",
        "3",
        "0.000",
        "0.500",
        "0.00042",
    ]
    assert cell({"value": None, "low": None, "high": None}) == "-"
    assert cell({"value": 0.25, "low": None, "high": None}) == "0.250"
    assert cell({"value": 9e-4, "low": -7e-6, "high": 2e-3}) == "0.0009 [0.0000, 0.0020]"


def test_nothing_of_the_data_becomes_markup(whole: Page) -> None:
    assert not {"script", "iframe", "object", "link", "b onload"} & set(whole.tags)
    assert not [name for _, name, _ in whole.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in whole.text  # shown as text: concept names
    assert "<b>data & 'co'.csv" in whole.text
    assert "{{ 7 * 7 }}" in whole.text
    assert '"><script' not in whole.source


def test_the_page_loads_nothing_and_every_picture_says_what_it_shows(trained: Path, whole: Page) -> None:
    sources = [value for tag, name, value in whole.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(value.startswith(("data:image/png;base64,iVBOR", "#")) for value in sources)
    assert not re.search(r"url\(|@import|https?://", whole.source.replace(HOSTILE, ""))
    assert "default-src 'none'" in whole.source
    alternatives = whole.values("alt")
    assert len(alternatives) == whole.tags.count("img") == len(set(alternatives))
    assert all(len(each) > 40 for each in alternatives)
    layers = [each for each in alternatives if "held-out samples in the plane" in each]
    assert [each[:7] for each in layers] == ["Layer 0", "Layer 2"]
    losses = [entry["loss"] for entry in json.loads((trained / "trainer_state.json").read_text())["log_history"][:-1]]
    (curve,) = (each for each in alternatives if each.startswith("loss over the steps"))
    assert curve == f"loss over the steps. {number(losses[0])} at step 1, {number(losses[-1])} at step 3."


def test_ids_are_unique_links_lead_somewhere_and_the_markup_is_valid(whole: Page) -> None:
    ids = whole.values("id")
    assert len(ids) == len(set(ids)) > 5
    assert {value[1:] for value in whole.values("href")} == set(ids)
    regions = [value for tag, name, value in whole.attributes if (tag, name) == ("div", "aria-label")]
    assert len(regions) == whole.tags.count("table")
    html5lib = pytest.importorskip("html5lib")
    parser = html5lib.HTMLParser(strict=True)
    parser.parse(whole.source)  # raises on the first error


def test_held_out_texts_have_heat_maps(trained: Path, whole: Page) -> None:
    _, held_out = Run.load(trained).samples()
    section = whole.section("texts")
    assert "Held-out text 1:" in section
    assert f"Held-out text {len(held_out)}:" in section
    heat = re.findall(r'<td class="s\d+', whole.source)
    run = Run.load(trained)
    tokens = [len(run.tokens([held_out.texts[index]])[0].ids) for index in (0, -1)]
    assert len(heat) == sum(tokens) * 3


def test_what_is_missing_names_its_command(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("evaluation.json", "faithfulness.json", "trainer_state.json"):
        (run_folder / name).unlink()
    assert main(["report", str(run_folder), "--files_only"]) == 0
    assert f"Wrote {run_folder / 'report.html'}" in capsys.readouterr().out
    page = Page(run_folder / "report.html")
    for name, command in COMMANDS.items():
        words = command.split()
        expected = " ".join([*words[:2], str(run_folder), *words[2:]])
        assert page.section(name.removesuffix(".json")).endswith(f"Not measured yet: {expected}")
    assert f"The model was not loaded (--files_only). With them: seer report {run_folder}" in page.section("pictures")
    assert "img" not in page.tags

    (run_folder / "prototypes.safetensors").unlink()
    page = Page(write_report(run_folder, run=Run.load(run_folder), layers=[-1], method="pca"))
    assert f"Prototypes are made by seer prototypes {run_folder}" in page.section("texts")
    assert "projected by PCA" in page.section("pictures")
    assert [each[:7] for each in page.values("alt")] == ["Layer 2"]


def test_what_the_page_says_of_the_accuracy(run_folder: Path) -> None:
    file, results = run_folder / "metrics.json", run_folder / "evaluation.json"
    metrics, evaluation = json.loads(file.read_text()), json.loads(results.read_text())
    sides = {
        "before": {"same_concept_cosine": 0.8, "different_concept_cosine": 0.7, "nearest_prototype_accuracy": 0.5},
        "after": {"same_concept_cosine": 0.9, "different_concept_cosine": 0.4, "nearest_prototype_accuracy": 0.25},
    }
    metrics["held_out"]["layers"] = {"2": sides}
    file.write_text(json.dumps(metrics))
    said = "the share of held-out samples whose nearest prototype is the right one fell from 50.0% to 25.0%."
    caution = " The concepts lie further apart, yet fewer samples are told right: separation alone is no gain."
    for low, high, chance in (
        (-0.6, 0.1, " The 95 % interval of the difference holds 0: it may be chance."),
        (-0.6, -0.1, ""),
    ):
        measures = evaluation["layers"]["2"]["nearest_prototype_accuracy"]
        measures["difference"] = {"value": -0.25, "low": low, "high": high}
        results.write_text(json.dumps(evaluation))
        text = Page(write_report(run_folder)).text
        assert f"Layer 2: {said}{chance}{caution}" in text
        assert f"difference -0.250 [{low:.3f}, {high:.3f}]" in text
        assert "0.100 → 0.500" in text  # 0.8 - 0.7 and 0.9 - 0.4
    results.unlink()
    assert f"Layer 2: {said}{caution}" in Page(write_report(run_folder)).text


def test_figures_that_do_not_exist_are_dashes(run_folder: Path) -> None:
    file = run_folder / "evaluation.json"
    evaluation = json.loads(file.read_text())
    nothing = dict.fromkeys(("value", "low", "high"))
    for measures in evaluation["layers"].values():
        measures["silhouette"] = dict.fromkeys(("base", "seer", "difference"), nothing)
    file.write_text(json.dumps({**evaluation, "retention": None}))
    metrics = json.loads((run_folder / "metrics.json").read_text())
    (run_folder / "metrics.json").write_text(json.dumps({**metrics, "held_out": None}))
    page = Page(write_report(run_folder))
    assert "silhouette - - -" in page.section("evaluation")
    assert "perplexity" not in page.section("evaluation")
    assert page.section("held-out").endswith("The run held no samples out.")
    assert "silhouette by layer, base model and SEER. layer 0: - and -; layer 1: - and -" in " ".join(
        page.values("alt")
    )


def test_run_missing_runs_what_is_missing(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "faithfulness.json").unlink()
    ran: list[list[str]] = []

    def evaluate(arguments: list[str]) -> None:
        ran.append(arguments)
        if "classification" in arguments:
            raise InputError("--task: not for this model")

    monkeypatch.setattr("seer.evaluate.run_evaluate", evaluate)
    monkeypatch.setattr("seer.faithfulness.run_faithfulness", ran.append)
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    data = ["--data", config["data"]]
    assert main(["report", str(run_folder), "--run_missing", "--texts", "0", *data]) == 0
    assert ran == [
        [str(run_folder), *data],
        [str(run_folder), "--task", "generalization", *data],
        [str(run_folder), "--task", "classification", *data],
    ]
    printed = capsys.readouterr().out
    assert "Left out: --task: not for this model" in printed
    assert "Left out: seer evaluate --task detoxification --harmless CONCEPT" in printed


def test_bad_input_of_a_report_is_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "expected the folder of a finished seer train run, got one without config.yaml": [str(run_folder.parent)],
        "--texts: expected a whole number >= 0, got -1": [str(run_folder), "--texts", "-1"],
        "--run_missing: expected without --files_only, got both": [str(run_folder), "--files_only", "--run_missing"],
        "expected layers from -3 to 2": [str(run_folder), "--layers", "7"],
    }
    for message, arguments in cases.items():
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    for name, content in (("evaluation.json", "{"), ("faithfulness.json", '{"seer": 3}'), ("metrics.json", "[]")):
        kept = (run_folder / name).read_text()
        (run_folder / name).write_text(content)
        with pytest.raises(InputError, match=rf"{name}: expected what seer \w+ writes"):
            write_report(run_folder)
        (run_folder / name).write_text(kept)


# Compare


def write_run(folder: Path, accuracy: float, *, kl: float | None = 0.5, samples: int = 40, **options: Any) -> str:
    """The files of a run, as `seer train` writes them."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "data": "d.csv",
                "held_out_share": 0.2,
                "seed": 0,
                "temperature": 0.1,
                "output_dir": str(folder),
                **options,
            }
        )
    )
    measures = {"same_concept_cosine": 0.8, "different_concept_cosine": 0.5}
    layer = {
        "before": {"nearest_prototype_accuracy": 0.5, **measures},
        "after": {"nearest_prototype_accuracy": accuracy, **measures},
    }
    metrics = {
        "samples": {"training": samples, "held_out": 10},
        "concepts": ["a", "b"],
        "target_layers": [3],
        "held_out": {
            "layers": {"3": layer},
            "kl_to_base_nats_per_token": None if kl is None else {"before": 0.0, "after": kl},
        },
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_runs_that_differ_in_the_seed_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    runs = [
        write_run(tmp_path / "first", 0.6, kl=0.25),
        write_run(tmp_path / "other", 0.9, temperature=0.5, seed=4),
        write_run(tmp_path / "second", 0.8, kl=0.75, seed=1, logging_steps=3),
    ]
    picture, figures = tmp_path / "all.png", tmp_path / "all.json"
    assert main(["compare", *runs, "--output", str(picture), "--json", str(figures)]) == 0
    groups = json.loads(figures.read_text())
    assert [(group["runs"], group["seeds"], group["options"]) for group in groups] == [
        ([runs[0], runs[2]], [0, 1], {"temperature": 0.1}),
        ([runs[1]], [4], {"temperature": 0.5}),
    ]
    # (0.6 + 0.8) / 2, and sqrt((0.1^2 + 0.1^2) / 1)
    found = groups[0]["layers"]["3"]["after"]["nearest_prototype_accuracy"]
    assert found == {"mean": pytest.approx(0.7), "deviation": pytest.approx(0.02**0.5), "values": [0.6, 0.8]}
    assert groups[0]["kl"] == {"mean": 0.5, "deviation": pytest.approx(0.125**0.5), "values": [0.25, 0.75]}
    assert groups[1]["layers"]["3"]["after"]["nearest_prototype_accuracy"]["deviation"] is None
    printed = capsys.readouterr().out
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    first, other = (
        next(index for index, line in enumerate(lines) if line[0] == name) for name in ("first + 1", "other")
    )
    assert lines[first : first + 4] == [
        ["first + 1", "0.500 ± 0.000", "0.800 ± 0.000", "0.500 ± 0.000"],
        ["seeds 0, 1", "0.700 ± 0.141", "0.800 ± 0.000", "0.500 ± 0.000", "0.500 ± 0.354"],
        ["temperature 0.1"],
        ["layer 3"],
    ]
    assert lines[other : other + 2] == [
        ["other", "0.500", "0.800", "0.500"],
        ["seed 4", "0.900", "0.800", "0.500", "0.500"],
    ]
    assert "The seeds differ between the lines" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from seer.plots import plot_comparison

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.touch()))
    groups = compare_runs([write_run(tmp_path / "x", 0.6, kl=None), write_run(tmp_path / "y", 0.9, temperature=0.2)])
    plot_comparison(groups, tmp_path / "c.png")
    accuracy, cosine, kl = figures[0].axes
    drawn = {each.get_label(): each.lines[0].get_xdata().tolist() for each in accuracy.containers}
    assert drawn == {"before": [0.5, 0.5], "after": [0.6, 0.9]}
    assert [each.get_label() for each in cosine.containers] == [
        "same concept, before",
        "same concept, after",
        "different concept, before",
        "different concept, after",
    ]
    assert [each.lines[0].get_ydata().tolist() for each in kl.containers] == [[1]]  # the other has none
    assert [label.get_text() for label in accuracy.get_yticklabels()] == [
        "x (temperature 0.1), layer 3",
        "y (temperature 0.2), layer 3",
    ]


def test_runs_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 0.6)
    none = write_run(tmp_path / "none", 0.6)
    metrics = json.loads((Path(none) / "metrics.json").read_text())
    (Path(none) / "metrics.json").write_text(json.dumps({**metrics, "held_out": None}))
    named = write_run(tmp_path / "named", 0.6)
    (Path(named) / "metrics.json").write_text(json.dumps({**metrics, "concepts": ["a", "c"]}))
    half = write_run(tmp_path / "half", 0.6)
    del metrics["held_out"]["kl_to_base_nats_per_token"]
    (Path(half) / "metrics.json").write_text(json.dumps(metrics))
    bare = tmp_path / "bare"
    bare.mkdir()
    cases = {
        "RUN: expected two runs or more to compare, got 1": [run],
        "expected different runs, got": [run, str(tmp_path / "." / "run")],
        "bare: expected the folder of a finished seer train run, got one without config.yaml": [run, str(bare)],
        "none: expected a run with held-out figures, got one that held no samples out": [run, none],
        "got another data: d.csv there, e.csv here": [run, write_run(tmp_path / "e", 0.6, data="e.csv")],
        "got another concepts: ['a', 'b'] there, ['a', 'c'] here": [run, named],
        "got another number of samples: 50 there, 60 here": [run, write_run(tmp_path / "n", 0.6, samples=50)],
        "got another held_out_share: 0.2 there, 0.5 here": [run, write_run(tmp_path / "h", 0.6, held_out_share=0.5)],
        "half: expected the metrics that seer train writes; KeyError('kl_to_base_nats_per_token')": [run, half],
        "--output: expected a name that ends in .png, .pdf or .svg, got 'x.gif'": [run, half, "--output", "x.gif"],
    }
    for message, arguments in cases.items():
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_same_data_may_lie_in_two_places(tmp_path: Path) -> None:
    for name in ("d.csv", "e.csv"):
        (tmp_path / name).write_text("prompt,response,concept\n")
    first, second = (
        write_run(tmp_path / name, 0.6, data=str(tmp_path / f"{name}.csv"), temperature=temperature)
        for name, temperature in (("d", 0.1), ("e", 0.2))
    )
    assert [group.options for group in compare_runs([first, second])] == [{"temperature": 0.1}, {"temperature": 0.2}]


# In a browser


@pytest.mark.skipif(
    find_spec("PyQt6") is None or find_spec("PyQt6.QtWebEngineCore") is None,
    reason="no browser: pip install PyQt6-WebEngine, which brings Chromium (some 200 MB)",
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_error_at_any_width(whole: Page, tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(whole.source, encoding="utf-8")
    script = Path(__file__).with_name("report_browser.py")
    done = subprocess.run(
        [sys.executable, str(script), str(file), scheme], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for width, seen in json.loads(done.stdout).items():
        assert seen["loaded"]
        assert seen["title"] == "SEER report: run"
        assert seen["viewport"] == int(width)
        assert seen["width"] <= seen["viewport"]
        assert seen["outside"] == []
        assert seen["messages"] == []
        assert seen["resources"] == []
        assert [url for url in seen["requests"] if not url.startswith("data:")] == [file.as_uri()]
        assert len(seen["images"]) == whole.tags.count("img")
        assert all(image["alt"] and image["loaded"] and image["shown"] > 100 for image in seen["images"])
        assert seen["dark"] == (scheme == "dark")
        assert (seen["background"] == "rgb(255, 255, 255)") == (scheme == "light")
