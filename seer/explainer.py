"""What the model says about itself: the concepts in its hidden states, token by token.

The score of concept c at layer l and token t is softmax_c(cos(h_l(x, t), mu_c,l) / T) with the prototypes mu of the run
(Chen et al., arXiv 2502.05242) and a temperature T fitted on held-out samples. Scores of generated tokens come from the
pass that produced the token: nothing runs twice.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria

from seer.calibration import CALIBRATION, UNKNOWN, Calibration, Scope
from seer.data import Text, TextDataset, pad_token_id, tokenize
from seer.errors import InputError
from seer.layers import find_layers, has_positions, lm_head, representations, without_dropout
from seer.prototypes import Prototypes
from seer.reading import LayerReader, pad_left
from seer.run import Run, check_prototypes
from seer.sampling import pad_rows

Action = Literal["flag", "stop"]


@dataclass(frozen=True)
class LayerScores:
    """What one layer says at T places: the tokens of a text, or one token."""

    concepts: list[str]
    cosines: Tensor
    """[T, C] float32 on the CPU, to every prototype."""
    scores: Tensor
    """[T, C] float32 on the CPU, probabilities."""
    unknown_below: float
    """A prototype with a cosine below this is not near; minus infinity without a calibration."""

    @property
    def unknown(self) -> Tensor:
        """(T,) bool: no prototype is near."""
        return self.cosines.amax(-1) < self.unknown_below

    def answers(self) -> list[str]:
        """The concept with the highest score at each of the T places, or "unknown"."""
        best = self.scores.argmax(-1).tolist()
        return [UNKNOWN if no else self.concepts[index] for index, no in zip(best, self.unknown.tolist(), strict=True)]


@dataclass(frozen=True)
class Flag:
    """A monitored concept reached its level."""

    concept: str
    layer: int
    row: int
    """Row of the batch."""
    position: int
    """Column of `input_ids` at which the token stands whose pass reached the level."""
    score: float


@dataclass(frozen=True)
class Explanation:
    """One text or generation of T tokens with the scores of every chosen layer."""

    token_ids: list[int]
    pieces: list[str]
    """T strings that joined together give the text; empty for a token that only begins a character."""
    layers: dict[int, LayerScores]
    prompt: str | None = None
    """For a generation, what it answers. Its tokens are not among the T."""
    text: dict[int, LayerScores] | None = None
    """For a given text, the whole text's scores at every layer (T = 1); None if it lacks the part, such as a response,
    that stands for it."""
    flags: list[Flag] = field(default_factory=list)
    """What monitors said during the generation; positions count the generated tokens."""
    overhead: float = 0.0
    """Time spent on reading and scoring over the time of everything else, in the call that made this."""

    def __str__(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class TokenScores:
    """One generated token."""

    token_id: int
    piece: str
    layers: dict[int, LayerScores]
    """Layer -> its scores, T = 1."""


class ConceptExplainer:
    """Reads concepts out of a model while it reads or writes text.

        explainer = ConceptExplainer.from_run("run")
        for token in explainer.stream("How do I pick a lock?", max_new_tokens=50):
            print(token.piece, token.layers[25].answers())

    Args:
        model: the adapted model, or any other whose prototypes these are.
        tokenizer: its tokenizer.
        prototypes: from `seer train` or `Prototypes.from_representations`.
        calibration: fitted for these prototypes; without it scores have `temperature` and no answer is "unknown".
        temperature: of layers that have no calibration.
        layers: which of the prototypes' layers to read; default all.
        position: where the state is that stands for a text, as in the prototypes: one of `seer.config.POSITIONS`.
        layers_path: where the layers of the model are, if its structure does not say.
        max_length: longest text in tokens; the rest is cut off. Default: the window of tokenizer and model.
        batch_size: texts per pass in `explain`.

    Raises:
        InputError: prototypes of another model or layer, or a calibration of other prototypes.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        prototypes: Prototypes,
        *,
        calibration: Calibration | None = None,
        temperature: float = 0.1,
        layers: Sequence[int] | None = None,
        position: str = "last",
        layers_path: str | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
    ) -> None:
        if temperature <= 0:
            raise InputError(f"temperature: expected a number > 0, got {temperature}")
        self.model = model
        self.tokenizer = tokenizer
        self.stack = find_layers(model, layers_path)
        check_prototypes(prototypes, self.stack, "prototypes")
        if calibration is not None:
            calibration.require_same(prototypes, "calibration")
        self.layers = _chosen_layers(layers, prototypes, len(self.stack.layers))
        device = next(self.stack.root.parameters()).device
        self.prototypes = replace(prototypes, layers={n: prototypes.layers[n].to(device) for n in self.layers})
        self.calibration = calibration
        self._fits = {scope: self._fit(temperature, scope) for scope in get_args(Scope)}
        self.position = position
        self.pad_token_id = pad_token_id(tokenizer)
        """Fills up short rows."""
        self._window = getattr(self.stack.root.config.get_text_config(), "max_position_embeddings", None)
        limits = (max_length, tokenizer.model_max_length, self._window)
        self._max_length = min(limit for limit in limits if limit is not None)
        self._batch_size = batch_size
        self._pass: _Pass | None = None

    @classmethod
    def from_run(
        cls,
        folder: str | os.PathLike[str] | Run,
        *,
        model: PreTrainedModel | None = None,
        layers: Sequence[int] | None = None,
    ) -> ConceptExplainer:
        """Load the base model, adapter, prototypes and calibration of a `seer train` run.

        Args:
            folder: its --output_dir; or the run, if it is loaded already.
            model: the base model, for a run that was given one in memory.
            layers: which layers to read; default all that have prototypes.

        Raises:
            InputError: something is missing or does not fit; the message says what makes it.
        """
        run = folder if isinstance(folder, Run) else Run.load(folder, model)
        prototypes = run.prototypes()
        file = run.folder / CALIBRATION
        calibration = Calibration.load(file) if file.is_file() else None
        if calibration is not None:
            calibration.require_same(prototypes, str(file))
        return cls(
            run.model,
            run.tokenizer,
            prototypes,
            calibration=calibration,
            temperature=run.config.temperature,
            layers=layers,
            position=run.position,
            layers_path=run.config.layers_path,
            max_length=run.config.max_length,
        )

    @property
    def concepts(self) -> list[str]:
        """The C concepts, in the order of the scores."""
        return self.prototypes.concepts

    @torch.no_grad()
    def explain(self, texts: Sequence[str | Text]) -> list[Explanation]:
        """Scores at every token of given texts, and for each text as a whole.

        Args:
            texts: read in the tokenizer's chat template, a plain string or a `Text` without a response as a request, so
                that the last token means what it meant in training.

        Returns:
            One explanation per text. A score at token t is of the state that has read the text up to t.

        Raises:
            InputError: no text, or a text without a token.
        """
        given = [Text(text) if isinstance(text, str) else text for text in texts]
        given = [text._replace(response=text.response or "") for text in given]
        rows = tokenize(self.tokenizer, TextDataset(given).texts, self._max_length)
        device = next(self.stack.root.parameters()).device
        explanations: list[Explanation] = []
        for start in range(0, len(rows), self._batch_size):
            chosen = rows[start : start + self._batch_size]
            pieces = [split_text(self.tokenizer, row.ids) for row in chosen]
            inputs = {name: values.to(device) for name, values in pad_rows(chosen, self.pad_token_id).items()}
            where = inputs["attention_mask"], inputs.pop("request_lengths"), [self.position]
            started = perf_counter()
            with self._reading() as newest, without_dropout(self.model):
                self.stack.root.base_model(**inputs)
                passed = perf_counter()
                states = {layer: newest.states[layer] for layer in self.layers}
                texts_as_wholes = {layer: representations([each], *where)[0, 0] for layer, each in states.items()}
                cosines = self._cosines(states)  # [L, R, T, C]
                wholes = self._cosines(texts_as_wholes)  # [L, R, C]
                stands = has_positions(*where)[0].tolist()
            batch = [
                Explanation(
                    row.ids,
                    pieces[index],
                    self._score(cosines[:, index, : len(row.ids)], "token"),
                    text=self._score(wholes[:, index, None], "text") if stands[index] else None,
                )
                for index, row in enumerate(chosen)
            ]
            overhead = (perf_counter() - passed) / (passed - started)
            explanations += [replace(explanation, overhead=overhead) for explanation in batch]
        return explanations

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 100,
        on_token: Callable[[int, TokenScores], None] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] = (),
        **options: Any,
    ) -> list[Explanation]:
        """Let the model answer, and explain every token from the pass that produced it.

        Args:
            prompts: requests; put into the chat template if the tokenizer has one.
            max_new_tokens: longest answer.
            on_token: called with the row and the token as soon as it is there.
            stopping_criteria: among them monitors, see `monitor`.
            **options: for `generate` of transformers: do_sample, temperature, streamer, ...

        Returns:
            One explanation per prompt and returned sequence, up to its end token (included) or where a criterion
            stopped it. A score at token t is of the state from which t was predicted, which has read all before t.

        Raises:
            InputError: no prompt or too long a one, a model without a language-model head, or an option with which
                passes and tokens do not go together, such as beams.
        """
        if lm_head(self.stack) is None:
            raise InputError(f"expected a language model to generate with, got {type(self.stack.root).__name__}")
        settings = options.get("generation_config") or self.stack.root.generation_config
        for name, plain in (("num_beams", 1), ("prompt_lookup_num_tokens", None), ("assistant_model", None)):
            value = options.get(name, getattr(settings, name, plain))
            if value not in (plain, None):
                raise InputError(f"{name}: expected generation of one token per pass and row, got {value!r}")
        rows = [self._prompt_ids(prompt, max_new_tokens) for prompt in _some(prompts)]
        inputs = pad_left(rows, self.pad_token_id, next(self.stack.root.parameters()).device)
        criteria = list(stopping_criteria)
        if options.get("stop_strings") is not None:
            criteria.append(StopStringCriteria(self.tokenizer, options.pop("stop_strings")))
        copies = options.get("num_return_sequences", getattr(settings, "num_return_sequences", None)) or 1
        eos = options.get("eos_token_id", settings.eos_token_id)
        options.setdefault("pad_token_id", self.pad_token_id)

        with self._reading() as newest, without_dropout(self.model):
            recorder = _Recorder(self, newest, len(rows) * copies, criteria, _as_list(eos), on_token)
            started = perf_counter()
            # Compiled passes run no hooks that they were not compiled with.
            generate: Any = self.model.generate
            output = generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                stopping_criteria=[recorder],
                return_dict_in_generate=False,
                disable_compile=True,
                **options,
            )
            seconds = perf_counter() - started
        prompt_length = inputs["input_ids"].shape[1]
        monitors = {id(each): each for each in criteria if isinstance(each, ConceptMonitor)}
        flags = [flag for each in monitors.values() for flag in each.flags[recorder.flags_before[id(each)] :]]
        explanations = []
        cosines = torch.stack(recorder.cosines).cpu()  # [T, L, R, C]
        answers = output[:, prompt_length:].tolist()
        for row, (answer, end) in enumerate(zip(answers, recorder.ends(answers), strict=True)):
            ids = answer[:end]
            explanations.append(
                Explanation(
                    ids,
                    split_text(self.tokenizer, ids),
                    self._score(cosines[:end, :, row].transpose(0, 1), "token"),
                    prompt=prompts[row // copies],
                    flags=[replace(flag, position=flag.position - prompt_length) for flag in flags if flag.row == row],
                    overhead=recorder.seconds / (seconds - recorder.seconds),
                )
            )
        return explanations

    def stream(self, prompt: str, **options: Any) -> Iterator[TokenScores]:
        """Yield every token of one answer with its scores while the model writes on, in a thread of its own.

        `generate` with `on_token` does the same for a function that takes the tokens, and needs no thread.

        Args:
            prompt: a request.
            **options: as for `generate`. Leaving the loop early stops the generation.
        """
        tokens: queue.SimpleQueue[TokenScores | BaseException | None] = queue.SimpleQueue()
        left = threading.Event()

        def hand_over(_: int, token: TokenScores) -> None:
            if left.is_set():
                raise GeneratorExit
            tokens.put(token)

        def work() -> None:
            try:
                self.generate([prompt], on_token=hand_over, **options)
                tokens.put(None)
            except BaseException as error:  # raised again where the tokens are read
                tokens.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (item := tokens.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()
            worker.join()

    def monitor(
        self, concept: str, level: float, action: Action = "flag", *, layer: int | None = None
    ) -> ConceptMonitor:
        """A stopping criterion that watches the score of one concept while a model generates.

        Pass it to `generate` of this explainer, or of the model itself inside `with monitor:`.

        Args:
            concept: which.
            level: acts where the score is at least this, above 0 and up to 1.
            action: "flag" writes down where, in `flags`; "stop" also ends that row, after the token at hand.
            layer: where to look; default the deepest that the explainer reads.

        Raises:
            InputError: a concept or layer that the explainer does not know, or a level out of its range.
        """
        return ConceptMonitor(self, concept, level, action, self.layers[-1] if layer is None else layer)

    def _prompt_ids(self, prompt: str, max_new_tokens: int) -> list[int]:
        if not prompt.strip():
            raise InputError("prompt: expected some text, got nothing but white space")
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(f"{prompt}\n\n", verbose=False)["input_ids"]
        else:
            try:
                string = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
            except TemplateError as error:
                raise InputError(f"prompt {prompt!r}: the tokenizer's chat template refuses it; {error}") from error
            ids = self.tokenizer(str(string), add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError(f"prompt {prompt!r}: expected text that the tokenizer knows, got no token at all")
        if self._window is not None and len(ids) + max_new_tokens > self._window:
            raise InputError(
                f"prompt {prompt[:40]!r}: expected at most {self._window} tokens with the answer, got {len(ids)} and "
                f"max_new_tokens {max_new_tokens}"
            )
        return list(ids)

    def _fit(self, temperature: float, scope: Scope) -> tuple[Tensor, list[float]]:
        """The temperature of every layer, [L, 1, 1], and the cosine below which its answer is "unknown"."""
        known = {} if self.calibration is None else self.calibration.layers
        fits = [known[layer][scope] if layer in known else None for layer in self.layers]
        temperatures = [temperature if fit is None else fit.temperature for fit in fits]
        unknown_below = [float("-inf") if fit is None else fit.unknown_below for fit in fits]
        return torch.tensor(temperatures)[:, None, None], unknown_below

    @contextmanager
    def _reading(self) -> Iterator[_Pass]:
        """Inside, every pass of the model is read. May be entered again inside."""
        if self._pass is not None:
            yield self._pass
            return
        with LayerReader(self.stack, self.layers) as reader:
            self._pass = _Pass(reader, self.prototypes)
            try:
                yield self._pass
            finally:
                self._pass = None

    def _cosines(self, states: dict[int, Tensor]) -> Tensor:
        """Layer -> [..., D] to [L, ..., C] on the CPU."""
        return torch.stack([self.prototypes.similarity(layer, each).cpu() for layer, each in states.items()])

    def _score(self, cosines: Tensor, scope: Scope) -> dict[int, LayerScores]:
        """[L, T, C] cosines on the CPU -> the scores of every layer."""
        temperature, unknown_below = self._fits[scope]
        scores = (cosines / temperature).softmax(-1)
        parts = zip(cosines.unbind(), scores.unbind(), unknown_below, strict=True)
        return {layer: LayerScores(self.concepts, *of) for layer, of in zip(self.layers, parts, strict=True)}


class ConceptMonitor(StoppingCriteria):
    """Watches one concept during `generate`; made by `ConceptExplainer.monitor`."""

    def __init__(self, explainer: ConceptExplainer, concept: str, level: float, action: Action, layer: int) -> None:
        if concept not in explainer.concepts:
            raise InputError(f"concept: expected one of {explainer.concepts}, got {concept!r}")
        if layer not in explainer.layers:
            raise InputError(f"layer: expected one of {explainer.layers}, got {layer}")
        if not 0 < level <= 1:
            raise InputError(f"level: expected a score above 0 and up to 1, got {level}")
        if action not in get_args(Action):
            raise InputError(f"action: expected one of {get_args(Action)}, got {action!r}")
        self.concept, self.level, self.action, self.layer = concept, level, action, layer
        self.flags: list[Flag] = []
        """What was seen so far, in order."""
        self._explainer = explainer
        self._column = explainer.concepts.index(concept)
        settings = explainer.stack.root.generation_config
        ends = [*_as_list(settings.eos_token_id), *_as_list(settings.pad_token_id), explainer.pad_token_id]
        self._ends = torch.tensor(ends)
        self._inside: Any = None

    def __enter__(self) -> ConceptMonitor:
        self._inside = self._explainer._reading()
        self._inside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        newest = self._explainer._pass
        if newest is None:
            raise InputError("monitor: expected generation by the explainer, or inside `with monitor:`; got neither")
        cosines = newest.cosines()
        if cosines.shape[1] != len(input_ids):
            raise InputError(f"monitor: expected a state per row ({len(input_ids)}), got {cosines.shape[1]}: no beams")
        reached = self._explainer._score(cosines.cpu(), "token")[self.layer].scores[:, self._column]  # (R,)
        # What a pass gives for an end or padding token explains nothing that anybody reads.
        text = ~torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
        seen = (reached >= self.level) & text.to(reached.device)
        for row in seen.nonzero().flatten().tolist():
            position = input_ids.shape[1] - 1
            self.flags.append(Flag(self.concept, self.layer, row, position, float(reached[row])))
        stop = seen if self.action == "stop" else torch.zeros_like(seen)
        return stop.to(input_ids.device)


class _Pass:
    """The newest forward pass, and its cosines, computed once."""

    def __init__(self, reader: LayerReader, prototypes: Prototypes) -> None:
        self._reader = reader
        directions = torch.stack([prototypes.layers[layer] for layer in reader.layers]).mT  # [L, D, C]
        self._directions = directions.squeeze(0)  # of one layer: a plain product costs less than a batched one
        self._known: tuple[Tensor, Tensor] | None = None

    @property
    def states(self) -> dict[int, Tensor]:
        """Layer -> [R, T, D]."""
        return self._reader.states

    def cosines(self) -> Tensor:
        """At the last token of every row to every prototype, [L, R, C]."""
        states = [self._reader.states[layer] for layer in self._reader.layers]
        if self._known is None or self._known[0] is not states[-1]:
            # All layers at once: on small models the operations' own overhead is what reading costs.
            last = torch.stack([each[:, -1].to(self._directions) for each in states])  # [L, R, D]
            lengths = torch.linalg.vector_norm(last, dim=-1, keepdim=True).clamp_min(1e-12)
            self._known = (states[-1], last @ self._directions / lengths)
        return self._known[1]


class _Recorder(StoppingCriteria):
    """Called by `generate` once per token, right after the pass that produced it: keeps the cosines of that pass."""

    def __init__(
        self,
        explainer: ConceptExplainer,
        newest: _Pass,
        rows: int,
        criteria: Sequence[StoppingCriteria],
        eos_token_ids: list[int],
        on_token: Callable[[int, TokenScores], None] | None,
    ) -> None:
        self.cosines: list[Tensor] = []
        """Per token [L, R, C]."""
        self.seconds = 0.0
        self.flags_before = {id(each): len(each.flags) for each in criteria if isinstance(each, ConceptMonitor)}
        self._explainer = explainer
        self._newest = newest
        self._criteria = criteria
        device = next(explainer.stack.root.parameters()).device
        self._eos = set(eos_token_ids)
        self._rows = rows
        self._stopped = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of rows that a criterion stopped
        self._goes_on = torch.zeros(rows, dtype=torch.bool, device=device)
        self._told_end = [False] * rows
        self._on_token = on_token
        self._splitters = [_Splitter(explainer.tokenizer) for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        started = perf_counter()
        cosines = self._newest.cosines()
        if cosines.shape[1] != self._rows or len(input_ids) != self._rows:
            raise InputError(f"expected generation of {self._rows} rows, got states of {cosines.shape[1]}: no beams")
        self.cosines.append(cosines)
        if self._on_token is not None:
            self._tell(input_ids[:, -1].tolist(), cosines.cpu().tensor_split(self._rows, dim=1))
        stop = self._goes_on  # at end tokens `generate` stops by itself
        if self._criteria:
            for criterion in self._criteria:
                stop = stop | criterion(input_ids, scores, **kwargs)
            self._stopped = torch.where((self._stopped == 0) & stop, len(self.cosines), self._stopped)
            stop = self._stopped > 0
        self.seconds += perf_counter() - started
        return stop

    def ends(self, answers: list[list[int]]) -> list[int]:
        """Tokens of every row up to its end token (included), or where a criterion stopped it."""
        found = []
        for answer, stopped in zip(answers, self._stopped.tolist(), strict=True):
            end = next((place + 1 for place, token_id in enumerate(answer) if token_id in self._eos), len(self.cosines))
            found.append(min(end, stopped or end))
        return found

    def _tell(self, token_ids: list[int], cosines: Sequence[Tensor]) -> None:
        assert self._on_token is not None
        stopped = self._stopped.tolist() if self._criteria else [0] * self._rows
        for row, token_id in enumerate(token_ids):
            if self._told_end[row] or stopped[row]:
                continue
            self._told_end[row] = token_id in self._eos
            layers = self._explainer._score(cosines[row], "token")
            token = TokenScores(token_id, self._splitters[row].add(token_id), layers)
            called = perf_counter()
            self._on_token(row, token)
            self.seconds -= perf_counter() - called  # what the caller does with it is the caller's


class _Splitter:
    """Turns token ids, one by one, into strings that joined together are what decoding them all gives."""

    WINDOW = 4  # ids decoded together, which costs less than decoding twice per token

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the newest: what is before them shows spaces as they are in the middle of a text
        self._done = 0  # of them, ids whose text was given out
        self._given = ""  # that text

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        piece = text[len(self._given) :]
        # After a token without text the space before the next one still depends on what was before.
        if piece and len(self._ids) > self.WINDOW:
            del self._ids[: self._done]
            text = self._decode()
        self._done, self._given = len(self._ids), text
        return piece

    def rest(self) -> str:
        """What is left of a character that never came to its end."""
        return self._decode()[len(self._given) :]

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, clean_up_tokenization_spaces=False))


def split_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """One string per token; joined together they give the text. A token that only begins a character has an empty one.

    Args:
        tokenizer: of the tokens.
        token_ids: of one text.
    """
    splitter = _Splitter(tokenizer)
    pieces = [splitter.add(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += splitter.rest()
    return pieces


def _chosen_layers(layers: Sequence[int] | None, prototypes: Prototypes, depth: int) -> list[int]:
    known = sorted(prototypes.layers)
    if layers is None:
        return known
    for layer in layers:
        if layer % depth not in known or not -depth <= layer < depth:
            raise InputError(f"layers: expected layers that have prototypes ({known}), got {layer}")
    if not layers:
        raise InputError("layers: expected at least one, got none")
    return sorted({layer % depth for layer in layers})


def _some(prompts: Sequence[str]) -> Sequence[str]:
    if isinstance(prompts, str):
        raise InputError(f"prompts: expected a list of strings, got the string {prompts[:40]!r}")
    if not prompts:
        raise InputError("prompts: expected at least one, got none")
    return prompts


def _as_list(token_ids: int | Sequence[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
