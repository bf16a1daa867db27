"""Explanations for people and programs: terminal, JSON lines, and a page that stands alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from seer.calibration import UNKNOWN, Calibration
from seer.colors import CONCEPT_COLORS
from seer.explainer import Explanation
from seer.files import atomic_path

# From white to a dark blue: one hue, so that darker is more to every eye.
_LIGHT, _DARK = (255, 255, 255), (8, 48, 107)
_STEPS = 20
_OPEN_TABLES = 3  # the first so many tables of a page are shown unfolded


def print_explanation(console: Console, explanation: Explanation, heading: str) -> None:
    """Write one explanation to a terminal: per layer its text, coloured by concept, and the answers that were given.

    Args:
        console: where to.
        explanation: what.
        heading: first line.
    """
    console.print(Styled(visible(heading), style="bold"))
    if explanation.prompt is not None:
        console.print(Styled.assemble(("prompt  ", "dim"), visible(explanation.prompt, keep="\n")))
    for layer, values in explanation.layers.items():
        line = Styled(f"layer {layer}  ", style="dim")
        answers = values.answers()
        for piece, answer in zip(explanation.pieces, answers, strict=True):
            line.append(visible(piece, keep="\n"), style=style_of(answer, values.concepts))
        console.print(line)
        counts = Counter(answers).most_common()
        shares = [
            Styled(f"{answer} {count / len(answers):.0%}", style_of(answer, values.concepts))
            for answer, count in counts
        ]
        console.print(Styled.assemble(("tokens   ", "dim"), Styled(", ").join(shares)))
        if explanation.text is not None:
            whole = explanation.text[layer]
            (answer,) = whole.answers()
            nearest = whole.concepts[int(whole.scores.argmax())]
            hint = "" if nearest == answer else f" nearest {nearest}"
            shown = (answer, style_of(answer, values.concepts))
            console.print(Styled.assemble(("as text  ", "dim"), shown, f"{hint} {whole.scores.max():.2f}"))
    for flag in explanation.flags:
        said = _flag_line(explanation, flag.position, flag.concept, flag.score, flag.layer)
        console.print(Styled.assemble(("flag     ", "dim"), (said, "bold")))


def style_of(answer: str, concepts: Sequence[str]) -> str:
    """Terminal style of an answer: a colour per concept, dim for "unknown"."""
    if answer == UNKNOWN:
        return "dim"
    color = CONCEPT_COLORS[concepts.index(answer) % len(CONCEPT_COLORS)]
    ink = "#000000" if _luminance(color) > 0.18 else "#ffffff"
    return f"{ink} on {color}"


def calibration_table(calibration: Calibration) -> Table:
    """Temperatures and what they are worth, for a terminal."""
    table = Table(title="calibration on held-out texts")
    columns = ("layer", "scores of", "samples", "T", "accuracy", "ECE before", "ECE after", "unknown caught")
    for column in columns:
        table.add_column(column, justify="left" if column == "scores of" else "right")
    for layer, scopes in calibration.layers.items():
        for scope, fit in scopes.items():
            caught = "-" if fit.unknown_caught is None else f"{fit.unknown_caught:.0%}"
            figures = (fit.temperature, fit.accuracy, fit.ece_before, fit.ece_after)
            table.add_row(str(layer), f"{scope}s", str(fit.samples), *(f"{value:.3f}" for value in figures), caught)
    return table


def as_record(explanation: Explanation) -> dict[str, Any]:
    """An explanation as JSON knows it; scores and cosines have six decimals."""

    def at(layer: int, index: int) -> dict[str, Any]:
        values = explanation.layers[layer]
        return {
            "answer": answers[layer][index],
            "scores": _by_concept(values.concepts, values.scores[index].tolist()),
            "cosines": _by_concept(values.concepts, values.cosines[index].tolist()),
        }

    answers = {layer: values.answers() for layer, values in explanation.layers.items()}
    record: dict[str, Any] = {"prompt": explanation.prompt, "text": str(explanation)}
    if explanation.text is not None:
        record["whole_text"] = {
            str(layer): {
                "answer": values.answers()[0],
                "scores": _by_concept(values.concepts, values.scores[0].tolist()),
            }
            for layer, values in explanation.text.items()
        }
    record["tokens"] = [
        {"id": token_id, "text": piece, "layers": {str(layer): at(layer, index) for layer in explanation.layers}}
        for index, (token_id, piece) in enumerate(zip(explanation.token_ids, explanation.pieces, strict=True))
    ]
    record["flags"] = [
        {"concept": flag.concept, "layer": flag.layer, "token": flag.position, "score": round(flag.score, 6)}
        for flag in explanation.flags
    ]
    record["overhead"] = round(explanation.overhead, 6)
    return record


def write_jsonl(explanations: Sequence[Explanation], path: str | os.PathLike[str]) -> None:
    """One line per explanation, see `as_record`."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for explanation in explanations:
            file.write(json.dumps(as_record(explanation), ensure_ascii=False) + "\n")


def write_page(
    explanations: Sequence[Explanation],
    headings: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str,
    calibration: Calibration | None,
) -> None:
    """A page of HTML in one file that loads nothing and runs nothing: text in colours, heat maps of tokens x concepts.

    Args:
        explanations: N >= 1, all with the same concepts.
        headings: their N headings.
        path: file to write.
        title: of the page.
        calibration: of the scores, if they have one.
    """
    kind = "generated" if explanations[0].prompt is not None else "given"
    overhead = sum(explanation.overhead for explanation in explanations) / len(explanations)
    page = template("explanation_page.html").render(
        title=title,
        about=(
            f"{len(explanations)} {kind} text{'s' * (len(explanations) != 1)}. Every token's scores were read from the "
            "pass of the model that "
            f"{'produced' if kind == 'generated' else 'read'} it; reading them took {overhead:.1%} of the time of the "
            "passes."
        ),
        shown=shown(explanations, headings, calibration),
    )
    write_html(page, path)


def shown(
    explanations: Sequence[Explanation],
    headings: Sequence[str],
    calibration: Calibration | None,
    *,
    unfold: int = _OPEN_TABLES,
) -> dict[str, Any]:
    """What the macros of `explanations.html` show; arguments as for `write_page`.

    Args:
        explanations: N >= 1.
        headings: N.
        calibration: or None.
        unfold: so many texts have their tables open.
    """
    concepts = next(iter(explanations[0].layers.values())).concepts
    return {
        "concepts": concepts,
        "letters": {concept: _letter(number) for number, concept in enumerate(concepts)},
        "colors": CONCEPT_COLORS,
        "steps": [_step(number) for number in range(_STEPS + 1)],
        "calibration": None if calibration is None else _calibration_rows(calibration, explanations[0]),
        "texts": [
            _page_item(explanation, heading, index < unfold)
            for index, (explanation, heading) in enumerate(zip(explanations, headings, strict=True))
        ],
    }


def template(name: str) -> Template:
    """A template of a page. Everything that is put in is escaped: no text of a model or of data can become markup."""
    environment = Environment(
        loader=PackageLoader("seer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_without_control_characters,
    )
    return environment.get_template(name)


def write_html(page: str, path: str | os.PathLike[str]) -> None:
    """Write a page as UTF-8, whole or not at all; lone surrogates, which UTF-8 has no bytes for, as escapes."""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def visible(text: str, keep: str = "") -> str:
    """The text with control characters, which could steer a terminal or turn text around, written as escapes.

    Args:
        text: any.
        keep: characters that stay as they are.
    """
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def _without_control_characters(value: Any) -> Any:
    return visible(value, keep="\n\t") if type(value) is str else value


def _page_item(explanation: Explanation, heading: str, unfold: bool) -> dict[str, Any]:
    verdicts = [
        {
            "layer": layer,
            "answer": whole.answers()[0],
            "nearest": whole.concepts[int(whole.scores.argmax())],
            "score": f"{whole.scores.max():.2f}",
        }
        for layer, whole in (explanation.text or {}).items()
    ]
    layers = []
    for number, values in explanation.layers.items():
        answers, scores = values.answers(), values.scores.tolist()
        tokens = [*zip(explanation.pieces, answers, scores, strict=True)]
        runs = []
        for answer, members in groupby(tokens, key=lambda token: token[1]):
            shown = [{"text": piece, "score": f"{max(row):.2f}"} for piece, _, row in members]
            color = 0 if answer == UNKNOWN else values.concepts.index(answer) % len(CONCEPT_COLORS)
            runs.append({"answer": answer, "unknown": answer == UNKNOWN, "color": color, "tokens": shown})
        rows = [
            {
                "token": visible(piece) or "·",
                "answer": answer,
                "cells": [
                    {"score": f"{score:.2f}", "step": round(score * _STEPS), "best": concept == answer}
                    for concept, score in zip(values.concepts, row, strict=True)
                ],
            }
            for piece, answer, row in tokens
        ]
        layers.append({"number": number, "runs": runs, "rows": rows})
    return {
        "heading": heading,
        "prompt": explanation.prompt,
        "verdicts": verdicts,
        "flags": [
            _flag_line(explanation, flag.position, flag.concept, flag.score, flag.layer) for flag in explanation.flags
        ],
        "layers": layers,
        "open": unfold,
    }


def _calibration_rows(calibration: Calibration, explanation: Explanation) -> dict[str, Any]:
    fits = [
        (layer, scope, fit)
        for layer in explanation.layers
        for scope, fit in calibration.layers.get(layer, {}).items()
        if scope == "token" or explanation.text is not None
    ]
    return {
        "texts": fits[0][2].texts if fits else 0,
        "rows": [
            {
                "layer": layer,
                "scope": scope,
                "temperature": f"{fit.temperature:.3f}",
                "accuracy": f"{fit.accuracy:.2f}",
                "before": f"{fit.ece_before:.3f}",
                "after": f"{fit.ece_after:.3f}",
                "caught": "-" if fit.unknown_caught is None else f"{fit.unknown_caught:.0%}",
            }
            for layer, scope, fit in fits
        ],
    }


def _flag_line(explanation: Explanation, token: int, concept: str, score: float, layer: int) -> str:
    return f"{concept} {score:.2f} at token {token}, {visible(explanation.pieces[token])!r} (layer {layer})"


def _by_concept(concepts: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {concept: round(value, 6) for concept, value in zip(concepts, values, strict=True)}


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def _step(number: int) -> dict[str, str]:
    share = number / _STEPS
    red, green, blue = (round(light + share * (dark - light)) for light, dark in zip(_LIGHT, _DARK, strict=True))
    background = f"#{red:02x}{green:02x}{blue:02x}"
    return {"background": background, "ink": "#1a1a1a" if _luminance(background) > 0.18 else "#ffffff"}


def _luminance(color: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.1): from 0.18 on, black text has more contrast than white."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
