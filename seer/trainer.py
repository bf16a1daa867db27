"""The SEER training step on top of transformers' Trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from seer.calibration import Calibration, calibrate
from seer.checkpoints import CheckpointingTrainer, digest
from seer.config import RATE_TIMES_WIDTH, SeerConfig
from seer.data import ConceptDataset, TextDataset, Tokens, pad_token_id, tokenize, warn_of_shared_texts
from seer.errors import InputError
from seer.evaluation import Encoding, Separation, encode, separation, separation_by_concept
from seer.layers import (
    BaseModel,
    Head,
    check_packing,
    compile_layers,
    find_layers,
    freeze_copy,
    lm_head,
    without_dropout,
)
from seer.objective import Objective
from seer.prototypes import Prototypes
from seer.reference_cache import ReferenceCache
from seer.sampling import PairCollator, PairDataset, PairSampler, require_contrast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Held-out samples under the base model (before) and the adapted one (after)."""

    prototypes: Prototypes
    """Of the adapted model, from the training samples."""
    encoding: Encoding
    """Of the held-out samples."""
    before: dict[int, Separation]
    """Layer -> values of the base model, with prototypes of its own."""
    after: dict[int, Separation]
    """Layer -> values of the adapted model."""
    by_concept: dict[int, dict[str, Separation]]
    """Layer -> concept -> values of its held-out samples under the adapted model."""


class SeerTrainer(CheckpointingTrainer):
    """Trains a LoRA adapter so that hidden states gather by concept while the model stays as it was.

    A step of B pairs is one forward pass of the adapted model over 2 B rows (3 B with retain texts) and one of the base
    model, which is the same model with its adapter disabled, over B rows.

    Args:
        model: any transformers model; it gets an adapter in place, unless all its weights are to be trained. A model
            that peft already wraps is used with the adapter it has.
        args: the options.
        train_dataset: texts by concept, two or more of each.
        processing_class: the model's tokenizer.
        eval_dataset: held-out texts of the same concepts, for `measure` and `evaluate`.
        retain_dataset: texts on which the model must stay as it was; by default the first text of every pair.
        callbacks: further callbacks.

    Raises:
        InputError: layers not found or out of range, no head for the KL term, a concept with a single sample.
    """

    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SeerConfig,
        train_dataset: ConceptDataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: ConceptDataset | None = None,
        retain_dataset: TextDataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if args.n_gpu > 1:
            raise InputError(
                f"expected one GPU per process, got {args.n_gpu}: start with `accelerate launch` or torchrun, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        train_dataset.require_pairs()
        require_contrast(args, len(train_dataset.names))
        if (train_dataset.memberships.sum(1) > 1).any():
            _require_plain_pairs(args)
        self.stack = find_layers(model, args.layers_path)
        self.target_layers = self.stack.resolve(args.target_layers)
        if args.learning_rate is None:
            args.learning_rate = RATE_TIMES_WIDTH / self.stack.root.config.get_text_config().hidden_size
        if args.uses("kl") and lm_head(self.stack) is None:
            raise InputError(
                f"--kl_weight: expected 0 for {type(self.stack.root).__name__}, which has no language-model head, got "
                f"{max(args.kl_weight, args.kl_weight_end or 0.0)}; --preset encoder has the options of sentence "
                "encoders"
            )
        if retain_dataset is None and (args.uses("retain") or args.uses("kl")):
            logger.warning("No retain texts: the behaviour is kept on the first text of every pair (--retain_data).")

        if args.negatives != "local" and args.world_size == 1:
            raise InputError(
                f"--negatives: expected local in a run of one process, got {args.negatives!r}; several are started by "
                "`accelerate launch` or torchrun"
            )
        if args.cache_reference and retain_dataset is None and args.view_dropout > 0:
            raise InputError(
                "--cache_reference: expected retain texts that do not change; with --view_dropout "
                f"{args.view_dropout} the first texts of pairs do, so give --retain_data"
            )

        adapted_layers = self._adapted_layers(args, isinstance(model, PeftModel))
        set_seed(args.seed)
        if args.adapter == "none":
            if isinstance(model, PeftModel):
                raise InputError("--adapter: expected lora or dora for a model that has an adapter, got none")
            model.requires_grad_(True)
            self.base = BaseModel(self.stack, freeze_copy(self.stack))
        else:
            if not isinstance(model, PeftModel):
                model = get_peft_model(model, self._lora_config(args, adapted_layers))
            self.base = BaseModel(self.stack)

        self._tokenizer = processing_class
        self._positions = args.positions
        limits = (args.max_length, processing_class.model_max_length, _window(self.stack.root))
        self._max_length = min(limit for limit in limits if limit is not None)
        self._pad_token_id = pad_token_id(processing_class)
        self._truncation = args.truncation
        self._tokenized: WeakKeyDictionary[TextDataset, list[Tokens]] = WeakKeyDictionary()
        rows = self._rows(train_dataset)
        self._require_positions(train_dataset)
        retain_rows = None
        if retain_dataset is not None:
            retain_rows = self._rows(retain_dataset)
            warn_of_shared_texts(retain_rows, rows, "retain texts", "they are held where they were and moved at once")
        if isinstance(eval_dataset, ConceptDataset) and eval_dataset is not train_dataset:
            warn_of_shared_texts(self._rows(eval_dataset), rows, "held-out texts", "figures on them flatter")
        self._pairs = PairDataset(rows, train_dataset.memberships, retain_rows)
        self._sampler = PairSampler(
            train_dataset.memberships,
            args.seed if args.data_seed is None else args.data_seed,
            len(retain_rows or ()),
            batch_size=args.train_batch_size,
            processes=args.world_size,
            concepts_per_batch=args.concepts_per_batch,
            balance=args.balance,
            view_dropout=args.view_dropout,
            lengths=[len(row.ids) for row in rows] if args.train_sampling_strategy == "group_by_length" else None,
        )
        share = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(self._sampler) < share:
            raise InputError(
                f"--dataloader_drop_last: expected false where a step takes {share} pairs and an epoch has "
                f"{len(self._sampler)}: there would be no step at all; got true"
            )
        self._concept_names = train_dataset.names
        self._term_sums: dict[str, Tensor] = {}
        self._steps_summed = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(self._pad_token_id),
            train_dataset=self._pairs,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_FirstPassWithAdapter(self), _SetPairEpoch(self._sampler), *(callbacks or [])],
        )
        _require_wished_engine("FSDP", self.is_fsdp_enabled)
        _require_wished_engine("DEEPSPEED", self.is_deepspeed_enabled)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if args.grad_cache_chunk is not None and sharded:
            raise InputError(
                "--grad_cache_chunk: expected none with FSDP or DeepSpeed, which reduce gradients in every backward "
                f"pass; got {args.grad_cache_chunk}"
            )
        self.in_shards_already: bool = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
        if self.in_shards_already:
            _require_no_early_pass(args)
        else:
            self.check_model()
        if args.torch_compile:
            compile_layers(self.stack, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.objective = Objective(
            args,
            self.stack,
            self.target_layers,
            len(adapted_layers),
            self.base,
            self.accelerator.autocast,
            sharded=sharded,
        )

    def check_model(self) -> None:
        """Raise InputError where the model cannot do what the options ask; runs it on a few tokens."""
        if self.args.uses("kl"):
            Head(self.stack).check(self.stack)
        if self.args.packing:
            check_packing(self.stack)

    def _adapted_layers(self, args: SeerConfig, has_adapter: bool) -> list[int]:
        """The layers that are trained, or that count as such in a model that came with its adapter."""
        if args.adapter == "none":
            return [*range(len(self.stack.layers))]
        last = max(self.target_layers)
        if args.adapted_layers is None:
            return [*range(last + 1)]
        if has_adapter:
            raise InputError(
                f"--adapted_layers: expected none for a model that has an adapter, got {args.adapted_layers}"
            )
        adapted = self.stack.resolve(args.adapted_layers, "adapted_layers")
        if adapted[-1] > last:
            raise InputError(
                f"--adapted_layers: expected layers up to the last target layer, {last}, got {adapted[-1]}: L_d does "
                "not reach what is behind it"
            )
        return adapted

    def _lora_config(self, args: SeerConfig, adapted_layers: list[int]) -> LoraConfig:
        return LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_dora=args.adapter == "dora",
            target_modules=self.stack.linear_pattern(adapted_layers),
            task_type="CAUSAL_LM" if lm_head(self.stack) is not None else "FEATURE_EXTRACTION",
        )

    def data_digests(self) -> dict[str, str]:
        texts = {"training_texts": self._pairs.rows, "retain_texts": self._pairs.retain_rows or ()}
        concepts = digest(self._pairs.memberships.astype(int).tolist())
        return {
            "concepts_of_texts": concepts,
            **{name: digest([row.ids for row in rows]) for name, rows in texts.items()},
        }

    def save_own_state(self, checkpoint: Path) -> None:
        if self.objective.bank is not None:
            keys, labels = self.objective.bank.content()
            assert labels is not None
            save_file({"keys": keys, "labels": labels}, self._bank_file(checkpoint))

    def load_own_state(self, checkpoint: Path) -> None:
        file = self._bank_file(checkpoint)
        if self.args.memory_bank_size is not None and file.exists():
            bank = load_file(file)
            self.objective.fill_bank(bank["keys"].to(self.args.device), bank["labels"].to(self.args.device))

    def _bank_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"memory_bank_{self.args.process_index}.safetensors"

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without compilation of the whole model, whose layers are compiled instead: see `compile_layers`."""
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        arguments.pop("dynamo_plugin", None)
        return arguments

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As in transformers; keeps the base model's states of the retain texts in a file meanwhile if so told."""
        if not self.args.cache_reference:
            return super().train(*arguments, **options)
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        with self.args.main_process_first(local=True, desc="reference states"):
            cache = ReferenceCache(
                folder / "reference_states.bin",
                self._pairs.rows if self._pairs.retain_rows is None else self._pairs.retain_rows,
                lambda inputs: self.objective.cached_states(model, inputs),
                pad_token_id=self._pad_token_id,
                batch_size=self.args.per_device_eval_batch_size,
                device=self.args.device,
                write=self.args.local_process_index == 0,
            )
        self.objective.cache = cache
        try:
            return super().train(*arguments, **options)
        finally:
            self.objective.cache = None
            if self.args.local_process_index == 0:
                cache.remove()

    @property
    def training_rows(self) -> Sequence[Tokens]:
        """The training texts."""
        return self._pairs.rows

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def decode(self, index: int) -> str:
        """A training text as the model reads it."""
        return str(self._tokenizer.decode(self._pairs.rows[index].ids))

    def largest_batch(self) -> dict[str, Tensor]:
        """The batch with the most tokens that the data can make: the longest texts, padded to the longest of them."""

        def longest(rows: Sequence[Tokens], count: int) -> list[int]:
            order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
            return [order[place % len(order)] for place in range(count)]

        pairs = self.args.train_batch_size
        first = longest(self._pairs.rows, pairs)
        columns = [first, first]
        if self._pairs.retain_rows is not None:
            columns.append(longest(self._pairs.retain_rows, pairs))
        batch: dict[str, Tensor] = self.data_collator([self._pairs[index] for index in zip(*columns, strict=True)])
        return batch

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of pairs; how many workers load them is up to the `dataloader_*` options."""
        args = self.args
        loader: DataLoader[Any] = DataLoader(
            self._pairs,
            batch_size=self._train_batch_size,
            sampler=self._sampler,
            collate_fn=self.data_collator,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch that a PairCollator made; see `Objective`.

        Args:
            model: the model as the Trainer wrapped it.
            inputs: the batch.
            return_outputs: also return the terms.
            num_items_in_batch: not used.
        """
        loss, terms = self.objective(model, inputs, self._progress())
        if model.training:
            self._add_terms(terms)
        return (loss, terms) if return_outputs else loss

    def _progress(self) -> float:
        return min(self.state.global_step / max(self.state.max_steps - 1, 1), 1.0)

    def _add_terms(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + value
        self._steps_summed += 1

    def _forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.args.grad_cache_chunk is None:
            return super()._forward_and_backward(model, inputs, num_items_in_batch)
        model.train()
        share = self.current_gradient_accumulation_steps
        loss, terms = self.objective.cached_backward(
            model,
            self._prepare_inputs(inputs),
            self._progress(),
            self.args.grad_cache_chunk,
            lambda loss: self.accelerator.backward(loss / share),
        )
        self._add_terms(terms)
        return loss / share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every loss term since the last log to the Trainer's own entry."""
        if "loss" in logs and self._steps_summed:
            means = torch.stack([*self._term_sums.values()]) / self._steps_summed
            means = self.accelerator.reduce(means, reduction="mean")
            logs.update({name: round(mean, 4) for name, mean in zip(self._term_sums, means.tolist(), strict=True)})
            self._term_sums, self._steps_summed = {}, 0
        super().log(logs, start_time)

    def prototypes(self) -> Prototypes:
        """Concept prototypes of the adapted model, from the training samples."""
        return self._make_prototypes(self._encode_training().after)

    def calibrate(self, prototypes: Prototypes, dataset: ConceptDataset) -> Calibration:
        """Fit scores by these prototypes to held-out samples.

        Raises:
            InputError: fewer than two samples or two concepts.
        """
        return calibrate(
            self.accelerator.unwrap_model(self.model),
            self.stack,
            self._rows(dataset),
            dataset.concept_ids,
            prototypes,
            temperature=self.args.temperature,
            position=self._positions[0],
            pad_token_id=self._pad_token_id,
            batch_size=self.args.per_device_eval_batch_size,
        )

    def measure(self, dataset: ConceptDataset | None = None) -> Measurement:
        """Compare the base model with the adapted one on held-out samples, by default on `eval_dataset`."""
        if dataset is None and isinstance(self.eval_dataset, ConceptDataset):
            dataset = self.eval_dataset
        if dataset is None:
            raise InputError("expected held-out samples to measure: pass a dataset, or eval_dataset to the trainer")
        if dataset.names != self._concept_names:
            raise InputError(
                f"dataset: expected the concepts {self._concept_names} as in training, got {dataset.names}"
            )
        training = self._encode_training()
        self._require_positions(dataset)
        held_out = self._encode(self._rows(dataset), with_kl=lm_head(self.stack) is not None)
        concept_ids = torch.from_numpy(dataset.concept_ids)

        def separations(states: dict[int, Tensor], prototypes: Prototypes) -> dict[int, Separation]:
            return {layer: separation(states[layer], concept_ids, prototypes, layer) for layer in self.target_layers}

        prototypes = self._make_prototypes(training.after)
        return Measurement(
            prototypes=prototypes,
            encoding=held_out,
            before=separations(held_out.before, self._make_prototypes(training.before)),
            after=separations(held_out.after, prototypes),
            by_concept={
                layer: separation_by_concept(held_out.after[layer], concept_ids, prototypes, layer)
                for layer in self.target_layers
            },
        )

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: ConceptDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the adapted model on held-out samples; every value is the mean over target layers.

        Returns:
            `<prefix>_same_concept_cosine`, `<prefix>_different_concept_cosine`, `<prefix>_nearest_prototype_accuracy`,
            each also as `<name>/<concept>` for the samples of one concept, and, for a model with a language-model head,
            `<prefix>_kl_to_base` in nats per token.
        """
        measurement = self.measure(eval_dataset)
        metrics = _mean_over_layers(metric_key_prefix, "", measurement.after.values())
        for concept in next(iter(measurement.by_concept.values())):
            of_concept = [values[concept] for values in measurement.by_concept.values()]
            metrics |= _mean_over_layers(metric_key_prefix, f"/{concept}", of_concept)
        if measurement.encoding.kl is not None:
            metrics[f"{metric_key_prefix}_kl_to_base"] = measurement.encoding.kl
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _rows(self, dataset: TextDataset) -> list[Tokens]:
        """Tokens; made, and remarked upon, once per data set."""
        if dataset not in self._tokenized:
            self._tokenized[dataset] = tokenize(self._tokenizer, dataset.texts, self._max_length, self._truncation)
        return self._tokenized[dataset]

    def _require_positions(self, dataset: ConceptDataset) -> None:
        """Raise InputError unless all texts, which are to be represented, have all positions."""
        for text, row in zip(dataset.texts, self._rows(dataset), strict=True):
            if "last_request" in self._positions and row.request_length == 0:
                raise InputError(f"{text.source}: expected a request for --positions last_request, got none")
            if "response_mean" in self._positions and (text.response is None or row.request_length == len(row.ids)):
                raise InputError(f"{text.source}: expected a response for --positions response_mean, got none")

    def _encode_training(self) -> Encoding:
        return self._encode(self._pairs.rows)

    def _encode(self, rows: Sequence[Tokens], with_kl: bool = False) -> Encoding:
        return encode(
            self.accelerator.unwrap_model(self.model),
            rows,
            base=self.base,
            layers=self.target_layers,
            position=self._positions[0],
            pad_token_id=self._pad_token_id,
            batch_size=self.args.per_device_eval_batch_size,
            with_kl=with_kl,
        )

    def _make_prototypes(self, training_states: dict[int, Tensor]) -> Prototypes:
        memberships = torch.from_numpy(self._pairs.memberships)
        return Prototypes.from_representations(training_states, memberships, self._concept_names)


class _FirstPassWithAdapter(TrainerCallback):
    """FSDP settles which parameters are trained, and their dtypes, at the first forward pass. That must not be the one
    of the base model, in which the adapter is disabled. Under ZeRO-3 there are no whole weights to check before."""

    def __init__(self, trainer: SeerTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        is_sharded = isinstance(model, FSDPModule)
        if is_sharded:
            one_token = torch.ones(1, 1, dtype=torch.int64, device=args.device)
            with torch.no_grad(), without_dropout(model):
                model(input_ids=one_token, attention_mask=one_token)
        elif self.trainer.in_shards_already:
            self.trainer.check_model()


class _SetPairEpoch(TrainerCallback):
    """Tells the sampler the epoch; accelerate does not in a resumed run of several processes."""

    def __init__(self, sampler: PairSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


def _require_wished_engine(name: str, enabled: bool) -> None:
    """Raise InputError where accelerate leaves out, without a word, what its launcher was told."""
    if not enabled and os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
        raise InputError(
            f"accelerate launch: expected GPUs for {name}, which accelerate would leave out on this machine without a "
            "word; got none that it knows"
        )


def _require_no_early_pass(args: SeerConfig) -> None:
    """Raise InputError for what needs the weights before DeepSpeed brings them together, pass by pass."""
    for option, only in (("cache_reference", (False,)), ("adapter", ("lora", "dora"))):
        if getattr(args, option) not in only:
            raise InputError(
                f"--{option}: expected {' or '.join(map(str, only))} with ZeRO-3, which has no whole weights before "
                f"training begins; got {getattr(args, option)}"
            )


def _require_plain_pairs(args: SeerConfig) -> None:
    """Raise InputError for what L_d cannot do with texts of several concepts."""
    for option, only in (("disentangle_loss", "info_nce"), ("negatives", "local"), ("memory_bank_size", None)):
        if getattr(args, option) != only:
            raise InputError(
                f"--{option}: expected {only} for texts of several concepts, got {getattr(args, option)!r}"
            )
    if args.pairs_may_lack_positions():
        raise InputError(
            "--view_dropout: expected 0 for texts of several concepts with --positions other than last and "
            f"mean, got {args.view_dropout}"
        )


def _mean_over_layers(prefix: str, suffix: str, layers: Iterable[Separation]) -> dict[str, float]:
    by_layer = [asdict(values) for values in layers]
    return {
        f"{prefix}_{name}{suffix}": sum(values[name] for values in by_layer) / len(by_layer)
        for name, first in by_layer[0].items()
        if first is not None
    }


def _window(model: PreTrainedModel) -> int | None:
    """Tokens that the model can take at once, where its config says so."""
    window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return window
