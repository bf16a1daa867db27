"""The contrastive losses over the samples of all ranks: everybody's keys are compared with everybody's queries.

The functions take what the local ones of the same name take, of this rank's samples, plus the process group and how
keys travel. All ranks must call them together, forward and backward. Batch sizes may differ between ranks.

**Value.** With `reduction="mean"` or `"sum"` every rank returns the loss of the whole batch: what one process with all
samples would return. So do the statistics. `"none"` returns the rows of this rank.

**Gradient.** It is that of the sum over ranks of what the ranks return. DistributedDataParallel and FSDP divide
gradients by the number of ranks, which leaves the gradient of the whole batch's loss: exactly the parameter gradients
of one process, with no factor to remember. A parameter outside of such a wrapper (a temperature, say) needs its `.grad`
averaged over the ranks by hand.

**How keys travel.** `mode="gather"` brings all keys to every rank and sends all their gradients home, in one exchange
each: the fewest messages, memory for the keys of all ranks. `mode="ring"` passes keys from neighbour to neighbour,
merges what the queries need of them as they come by, and in the backward pass lets their gradients travel along: memory
for the keys of three ranks, one more trip of the keys. The README of the family counts the bytes.

**Failures.** A rank that refuses its arguments tells the others, which raise too. A rank that dies or hangs ends in an
error that names rank and step, at the latest after the timeout of the process group, `init_process_group(timeout=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import Required, Unpack

from seer_kernels import _checks, _dispatch
from seer_kernels._ranks import Gather, Ring, SumOverRanks, Team
from seer_kernels.contrastive import ContrastiveStatistics, native
from seer_kernels.contrastive.functional import REDUCTIONS, _check_values, _no_pairs, _pair_labels, backend_module
from seer_kernels.contrastive.problem import (
    SAME_LABEL,
    Gradients,
    Pairing,
    Problem,
    RowResults,
    Slopes,
    Wanted,
    accumulation_dtype,
    no_anchors,
    settle,
)

MODES = ("gather", "ring")
LOSSES = ("info_nce", "nt_xent", "sup_con", "siglip")


class _Tail(TypedDict, total=False):
    """The keyword arguments that all losses share, for the type checker."""

    normalize: bool
    weights: Tensor | None
    reduction: str
    backend: str
    validate: bool
    group: dist.ProcessGroup | None
    mode: str


class _PairTail(_Tail, total=False):
    query_labels: Tensor | None
    key_labels: Tensor | None
    same_label: str


class _InfoNCE(_PairTail, total=False):
    temperature: float | Tensor
    symmetric: bool


class _NTXent(_Tail, total=False):
    temperature: float | Tensor
    labels: Tensor | None
    same_label: str


class _SupCon(_Tail, total=False):
    temperature: float | Tensor
    keys: Tensor | None
    key_labels: Tensor | None


class _SigLip(_PairTail, total=False):
    temperature: Required[float | Tensor]
    bias: Required[float | Tensor]


_WithStatistics = tuple[Tensor, ContrastiveStatistics]


@overload
def info_nce(
    query: Tensor, key: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[_InfoNCE]
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor, key: Tensor, *, return_stats: Literal[True], **options: Unpack[_InfoNCE]
) -> _WithStatistics: ...


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    same_label: str = "negative",
    symmetric: bool = False,
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    validate: bool = False,
    group: dist.ProcessGroup | None = None,
    mode: str = "gather",
) -> Tensor | _WithStatistics:
    """`seer_kernels.info_nce` of the queries and keys of all ranks, banks included.

    Args:
        query: (..., N, D), the queries of this rank. N may differ between ranks, the other sizes may not.
        key: (..., M, D) with M >= N; row i pairs with row i of this rank's `query`.
        group: the ranks that take part; default: all.
        mode: how keys travel, `"gather"` or `"ring"`; see the module.

    All other arguments, and the result, are those of the local function; value and gradient as the module states. For
    `backend` note that native code has no CUDA kernels for keys of other ranks: `"auto"` takes Triton or the reference.

    Raises:
        TypeError, ValueError, RuntimeError: as the local function, on all ranks if on any; ValueError where ranks
            disagree on what they compute; RuntimeError where torch.distributed is not initialised or communication
            fails.
    """

    def prepare() -> _Batch:
        _checks.check_feature_pair("query", query, "key", key)
        _checks.check_pair_shapes(query, key)
        labels = _pair_labels(query, key, query_labels, key_labels, same_label)
        return _batch(query, key, *labels, weights, temperature, None, validate)

    form = "symmetric" if symmetric else "softmax"
    options = _Options("info_nce", form, "rows", same_label, normalize, reduction, return_stats, backend, mode)
    return _across_ranks(prepare, options, group)


@overload
def nt_xent(
    view1: Tensor, view2: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[_NTXent]
) -> Tensor: ...


@overload
def nt_xent(
    view1: Tensor, view2: Tensor, *, return_stats: Literal[True], **options: Unpack[_NTXent]
) -> _WithStatistics: ...


def nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    labels: Tensor | None = None,
    same_label: str = "negative",
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    validate: bool = False,
    group: dist.ProcessGroup | None = None,
    mode: str = "gather",
) -> Tensor | _WithStatistics:
    """`seer_kernels.nt_xent` of the views of all ranks' samples. Group, mode, result and errors as `info_nce`."""

    def prepare() -> _Batch:
        _checks.check_feature_pair("view1", view1, "view2", view2)
        _checks.check_same_shape("view2", view2, "view1", view1)
        _checks.check_same_label(same_label, SAME_LABEL, "labels", labels)
        leading, n, device = view1.shape[:-2], view1.shape[-2], view1.device
        row_labels = row_weights = None
        if labels is not None:
            row_labels = _checks.check_labels("labels", labels, leading, n, device).repeat(*[1] * len(leading), 2)
        if weights is not None:
            row_weights = _checks.check_weights(weights, leading, n, device).repeat(*[1] * len(leading), 2)
        rows = torch.cat([view1, view2], -2)
        return _batch(rows, None, row_labels, row_labels, row_weights, temperature, None, validate)

    options = _Options("nt_xent", "softmax", "views", same_label, normalize, reduction, return_stats, backend, mode)
    return _across_ranks(prepare, options, group)


@overload
def sup_con(
    features: Tensor, labels: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[_SupCon]
) -> Tensor: ...


@overload
def sup_con(
    features: Tensor, labels: Tensor, *, return_stats: Literal[True], **options: Unpack[_SupCon]
) -> _WithStatistics: ...


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    validate: bool = False,
    group: dist.ProcessGroup | None = None,
    mode: str = "gather",
) -> Tensor | _WithStatistics:
    """`seer_kernels.sup_con` of the features, or features and `keys`, of all ranks.

    Group, mode, result and errors as `info_nce`.
    """

    def prepare() -> _Batch:
        _checks.check_features("features", features)
        leading, device = features.shape[:-2], features.device
        own = _checks.check_labels("labels", labels, leading, features.shape[-2], device)
        if keys is None and key_labels is None:
            return _batch(features, None, own, own, weights, temperature, None, validate)
        if keys is None or key_labels is None:
            missing, given = ("keys", "key_labels") if keys is None else ("key_labels", "keys")
            raise ValueError(f"{missing} must be given together with {given}; got None")
        _checks.check_feature_pair("features", features, "keys", keys)
        _checks.check_key_shapes("keys", keys, "features", features)
        others = _checks.check_labels("key_labels", key_labels, leading, keys.shape[-2], device)
        return _batch(features, keys, own, others, weights, temperature, None, validate)

    pairing = "self" if keys is None else "labels"
    options = _Options("sup_con", "softmax", pairing, "positive", normalize, reduction, return_stats, backend, mode)
    return _across_ranks(prepare, options, group)


@overload
def siglip(query: Tensor, key: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[_SigLip]) -> Tensor: ...


@overload
def siglip(
    query: Tensor, key: Tensor, *, return_stats: Literal[True], **options: Unpack[_SigLip]
) -> _WithStatistics: ...


def siglip(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    same_label: str = "negative",
    normalize: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    validate: bool = False,
    group: dist.ProcessGroup | None = None,
    mode: str = "gather",
) -> Tensor | _WithStatistics:
    """`seer_kernels.siglip` of the queries and keys of all ranks. Group, mode, result and errors as `info_nce`."""

    def prepare() -> _Batch:
        _checks.check_feature_pair("query", query, "key", key)
        _checks.check_pair_shapes(query, key)
        _checks.check_scalar("bias", bias)
        labels = _pair_labels(query, key, query_labels, key_labels, same_label)
        return _batch(query, key, *labels, weights, temperature, bias, validate)

    options = _Options("siglip", "sigmoid", "rows", same_label, normalize, reduction, return_stats, backend, mode)
    return _across_ranks(prepare, options, group)


class _Options(NamedTuple):
    """What is computed, the same on all ranks."""

    loss: str
    form: str
    pairing: str
    same_label: str
    normalize: bool
    reduction: str
    return_stats: bool
    backend: str
    mode: str


@dataclass(frozen=True)
class _Batch:
    """The samples of this rank: P problems of N queries and M keys."""

    leading: torch.Size
    query: Tensor  # [P, N, D]
    key: Tensor | None  # [P, M, D]; None where the queries are the keys
    query_labels: Tensor | None  # [P, N]
    key_labels: Tensor | None  # [P, M]
    weights: Tensor | None  # [P, N], accumulation dtype
    temperature: Tensor
    bias: Tensor | None

    def problem(self, p: int) -> _Batch:
        """Problem p alone."""
        names = ("query", "key", "query_labels", "key_labels", "weights")
        alone: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else x[p : p + 1] for name in names}
        return replace(self, **alone)

    def is_ragged(self) -> bool:
        """Whether different rows exist in different problems."""
        if self.weights is None or self.weights.shape[0] == 1:
            return False
        exists = self.weights > 0
        return bool((exists != exists[:1]).any())

    def existing(self, pairing: str) -> tuple[_Batch, Tensor | None]:
        """Without the pairs of weight 0, so that nobody ever meets them; and which rows are left, None for all."""
        if self.weights is None:
            return self, None
        kept = (self.weights > 0).all(0).nonzero().squeeze(1)
        n = self.query.shape[1]
        key, key_labels = self.key, self.key_labels
        if pairing != "labels":  # there keys belong to no query and have no weights
            key, key_labels = (None if x is None else torch.cat([x[:, kept], x[:, n:]], 1) for x in (key, key_labels))
        return replace(
            self,
            query=self.query[:, kept],
            key=key,
            query_labels=None if self.query_labels is None else self.query_labels[:, kept],
            key_labels=key_labels,
            weights=self.weights[:, kept],
        ), kept

    def mirrored(self) -> _Batch:
        """Queries and their keys in exchanged roles; keys of a bank are no queries."""
        assert self.key is not None
        n = self.query.shape[1]
        labels = None if self.key_labels is None else self.key_labels[:, :n]
        return replace(self, query=self.key[:, :n], key=self.query, query_labels=labels, key_labels=self.query_labels)


def _batch(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    temperature: float | Tensor,
    bias: float | Tensor | None,
    validate: bool,
) -> _Batch:
    """From features and labels that are checked; all else is checked here."""
    accumulate = accumulation_dtype(query.dtype)
    leading, n = query.shape[:-2], query.shape[-2]
    problems = leading.numel()
    _checks.check_scalar("temperature", temperature)
    if weights is not None:
        weights = _checks.check_weights(weights, leading, n, query.device)
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=accumulate)
    if bias is not None and not isinstance(bias, Tensor):
        bias = torch.tensor(bias, dtype=accumulate)
    _check_values(query, key, temperature.detach(), query_labels, key_labels, weights, validate)
    return _Batch(
        leading=leading,
        query=query.reshape(problems, *query.shape[-2:]),
        key=None if key is None else key.reshape(problems, *key.shape[-2:]),
        query_labels=None if query_labels is None else query_labels.reshape(problems, n).int(),
        key_labels=None if key_labels is None else key_labels.reshape(problems, key_labels.shape[-1]).int(),
        weights=None if weights is None else weights.reshape(problems, n).to(accumulate),
        temperature=temperature,
        bias=bias,
    )


class _Facts(NamedTuple):
    """What every rank tells the others before a loss; choices as their index."""

    loss: int
    mode: int
    problems: int
    features: int
    dtype: int
    labelled: int
    same_label: int
    symmetric: int
    normalize: int
    reduction: int
    return_stats: int
    gradients: int
    """Whether the loss will be differentiated."""
    # From here on ranks may differ.
    ragged: int
    queries: int
    keys: int
    query_gradient: int
    key_gradient: int


_CHOICES = {
    "loss": LOSSES,
    "mode": MODES,
    "dtype": _checks.FLOAT_DTYPES,
    "same_label": SAME_LABEL,
    "reduction": REDUCTIONS,
}


def _agree(team: Team, facts: _Facts | None) -> list[_Facts]:
    """The facts of all ranks, which must go together. None: this rank is about to raise, and so must the others."""
    table = [_Facts(*row) for row in team.tell(facts, len(_Facts._fields))]
    if facts is None:
        return table
    for name in _Facts._fields[: _Facts._fields.index("ragged")]:
        values = [getattr(row, name) for row in table]
        if len(set(values)) > 1:
            choices = _CHOICES.get(name)
            said = ", ".join(str(choices[value] if choices else value) for value in values)
            raise ValueError(f"{name} must be the same on all ranks; got, by rank: {said}")
    return table


@dataclass(frozen=True)
class _Comparison:
    """This rank's queries against the keys of all ranks: own pairs are on one rank, only labels tie keys of another."""

    options: _Options
    exchange: Gather | Ring
    backend: ModuleType
    query_labels: Tensor | None  # [P, N] int32, contiguous
    key_labels: Tensor | None  # [P, M] int32, contiguous
    queries_want_gradients: bool
    """Those of any rank."""
    keys_want_gradients: bool

    @property
    def is_sigmoid(self) -> bool:
        return self.options.form == "sigmoid"

    @property
    def needs_keys_again(self) -> bool:
        """Whether the backward pass of any rank looks at keys; the temperature's share of a softmax needs none."""
        return self.is_sigmoid or self.queries_want_gradients or self.keys_want_gradients

    def own(self, query: Tensor, key: Tensor | None, *scalars: Tensor | None) -> Problem:
        """The queries and keys of this rank."""
        problem = self._problem(query, key, self.key_labels, self.options.pairing, *scalars)
        if self.options.pairing == "views":
            half = query.shape[1] // 2
            problem = replace(problem, query=query[:, :half], key=query[:, half:])
        return problem

    def foreign(self, query: Tensor, key: Tensor, labels: Tensor | None, *scalars: Tensor | None) -> Problem:
        """The queries of this rank against keys of another."""
        return self._problem(query, key, labels, "labels", *scalars)

    def _problem(
        self,
        query: Tensor,
        key: Tensor | None,
        key_labels: Tensor | None,
        pairing: str,
        temperature: Tensor | None,
        bias: Tensor | None,
    ) -> Problem:
        accumulate = accumulation_dtype(query.dtype)
        assert temperature is not None
        return Problem(
            query=query,
            key=key,
            temperature=temperature.to(accumulate),
            bias=None if bias is None else bias.to(accumulate),
            query_labels=self.query_labels,
            key_labels=key_labels,
            weights=None,
            form="sigmoid" if self.is_sigmoid else "softmax",
            pairing=Pairing(pairing),
            same_label=self.options.same_label,
            normalize=self.options.normalize,
        )

    def see(self, problem: Problem, anchors: Tensor, loss: Tensor) -> None:
        """Adds to what is known of the queries, and to the losses of sigmoid problems, which are sums over keys."""
        if 0 in problem.sizes:
            return
        with torch.autocast(problem.query.device.type, enabled=False):
            if self.is_sigmoid:
                loss += self.backend.forward(problem, Wanted(False, False, False, False))[0].loss
            if not self.is_sigmoid or self.options.return_stats:
                self.backend.statistics(replace(problem, form="softmax", bias=None), anchors)

    def gradients(self, problem: Problem, slopes: Tensor, wanted: Wanted) -> Gradients:
        """What the pairs of a problem add to the gradients; of a softmax to those of the features only."""
        if not self.is_sigmoid:
            wanted = wanted._replace(temperature=False, bias=False)
        if 0 in problem.sizes:
            return _no_pairs(problem, wanted)[1]
        gradients: Gradients
        with torch.autocast(problem.query.device.type, enabled=False):
            if self.is_sigmoid:
                gradients = self.backend.backward(problem, slopes[_SLOPE].contiguous(), wanted)
            else:
                gradients = self.backend.slope_gradients(problem, slopes, wanted)
        return gradients


_SLOPE = Slopes._fields.index("slope")


class _Rows(torch.autograd.Function):
    """From queries [P, N, D] and keys [P, M, D] to the losses [P, N] and all other RowResults [5, P, N]."""

    @staticmethod
    def forward(
        ctx: Any, comparison: _Comparison, query: Tensor, key: Tensor | None, temperature: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        own = comparison.own(query, key, temperature, bias)
        anchors = no_anchors(own)
        loss = torch.zeros_like(anchors[0])

        def visit(keys: Tensor, labels: Tensor | None) -> None:
            comparison.see(comparison.foreign(query, keys, labels, temperature, bias), anchors, loss)

        comparison.see(own, anchors, loss)
        kept = comparison.exchange.outward(query if key is None else key, comparison.key_labels, visit)
        ones = torch.ones_like(loss)
        rows, slopes, logit_dot = settle(anchors, ones, own.temperature)
        if comparison.is_sigmoid:  # every row has its own pair, and nothing but its share of the loss to remember
            rows = rows._replace(loss=loss, valid=ones)
            slopes[_SLOPE] = 1.0
        others = torch.stack(rows[1:])
        ctx.comparison = comparison
        ctx.save_for_backward(query, key, temperature, bias, slopes, logit_dot, *kept)
        ctx.mark_non_differentiable(others)
        return rows.loss, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        comparison: _Comparison = ctx.comparison
        query, key, temperature, bias, slopes, logit_dot, *kept = ctx.saved_tensors
        needed = Wanted(*ctx.needs_input_grad[1:])
        slopes = slopes.clone()
        slopes[_SLOPE] *= loss_gradient

        own = comparison.own(query, key, temperature, bias)
        views = key is None and own.key is not None
        gradients = comparison.gradients(own, slopes, needed._replace(key=needed.query) if views else needed)
        if gradients.query is not None and views:
            assert gradients.key is not None
            gradients = gradients._replace(query=torch.cat([gradients.query, gradients.key], 1), key=None)

        def visit(keys: Tensor, labels: Tensor | None) -> Tensor | None:
            foreign = comparison.foreign(query, keys, labels, temperature, bias)
            more = comparison.gradients(foreign, slopes, needed._replace(key=comparison.keys_want_gradients))
            for total, summand in (
                (gradients.query, more.query),
                (gradients.temperature, more.temperature),
                (gradients.bias, more.bias),
            ):
                if total is not None and summand is not None:
                    total += summand
            return more.key

        if comparison.needs_keys_again:
            travelling = query if key is None else key
            dtype = slopes.dtype if comparison.keys_want_gradients else None
            home = comparison.exchange.homeward(travelling, comparison.key_labels, kept, visit, dtype)
            mine = gradients.query if key is None else gradients.key
            if mine is not None and home is not None:
                mine += home

        temperature_gradient = None if gradients.temperature is None else gradients.temperature.sum()
        if needed.temperature and not comparison.is_sigmoid:
            temperature_gradient = -(loss_gradient * logit_dot).sum() / own.temperature
        return (
            None,
            None if gradients.query is None else gradients.query.to(query.dtype),
            None if gradients.key is None else gradients.key.to(query.dtype),
            None if temperature_gradient is None else temperature_gradient.to(temperature.device, temperature.dtype),
            None if gradients.bias is None else gradients.bias.sum().to(bias.device, bias.dtype),
        )


def _across_ranks(
    prepare: Callable[[], _Batch], options: _Options, group: dist.ProcessGroup | None
) -> Tensor | _WithStatistics:
    """Any loss of the family; `prepare` checks and collects this rank's samples."""
    if torch.compiler.is_compiling():  # a graph break: what ranks tell each other decides what is computed
        evaluate: Callable[..., Tensor | _WithStatistics] = torch.compiler.disable(_loss)  # type: ignore[no-untyped-call]
        return evaluate(prepare, options, group)
    return _loss(prepare, options, group)


def _loss(
    prepare: Callable[[], _Batch], options: _Options, group: dist.ProcessGroup | None
) -> Tensor | _WithStatistics:
    team = Team.of(group, f"seer_kernels.distributed.{options.loss}")
    try:
        _checks.check_choice("mode", options.mode, MODES)
        _checks.check_choice("reduction", options.reduction, REDUCTIONS)
        _checks.check_choice("backend", options.backend, ("auto", *_dispatch.BACKENDS))
        batch = prepare()
        backend = backend_module(options.backend, batch.query, native.lacks_parts(batch.query.device))
    except Exception:
        _agree(team, None)
        raise
    loss, statistics = _evaluate(team, options, backend, batch)
    loss = loss.reshape(batch.leading + loss.shape[1:])
    if statistics is None:
        return loss
    return loss, ContrastiveStatistics(*(s.reshape(batch.leading) for s in statistics.unbind()))


def _evaluate(team: Team, options: _Options, backend: ModuleType, batch: _Batch) -> tuple[Tensor, Tensor | None]:
    """The loss [P] or [P, rows], and the statistics [3, P] if asked for."""
    whole, kept, ragged = batch, None, batch.is_ragged()
    if not ragged:
        batch, kept = batch.existing(options.pairing)
    table = _agree(team, _facts(options, batch, ragged))
    if any(row.ragged for row in table):  # rows that are left differ in number: one problem at a time
        parts = [_evaluate(team, options, backend, whole.problem(p)) for p in range(whole.query.shape[0])]
        every = [statistics for _, statistics in parts if statistics is not None]
        return torch.cat([loss for loss, _ in parts]), torch.cat(every, 1) if every else None

    sizes = [row.keys for row in table]
    gradients = any(row.query_gradient for row in table), any(row.key_gradient for row in table)
    rows = _compare(team, options, backend, batch, sizes, gradients)
    if options.form == "symmetric":
        sizes = [row.queries for row in table]
        rows = (rows + _compare(team, options, backend, batch.mirrored(), sizes, gradients[::-1])) / 2
    results = RowResults(*rows.unbind())
    weight = results.valid if batch.weights is None else results.valid * batch.weights  # [P, N]

    loss, statistics = weight * results.loss, None
    if options.reduction != "none" or options.return_stats:
        summands = (results.loss, results.valid, *results[2:4], results.has_negative, results.top1)
        sums = SumOverRanks.apply((weight * torch.stack(summands)).sum(-1), team)  # type: ignore[no-untyped-call]
        total, positive, negative, with_negative, top1 = sums[1:].detach()
        total, with_negative = (torch.where(x > 0, x, 1.0) for x in (total, with_negative))
        if options.return_stats:
            statistics = torch.stack([positive / total, negative / with_negative, top1 / total])
        if options.reduction != "none":
            loss = sums[0] / total if options.reduction == "mean" else sums[0]
    if kept is not None and options.reduction == "none":
        loss = loss.new_zeros(whole.query.shape[:2]).index_copy(1, kept, loss)
    return loss, statistics


def _facts(options: _Options, batch: _Batch, ragged: bool) -> _Facts:
    keys = batch.query if batch.key is None else batch.key
    differentiable = (batch.query, keys, batch.temperature, batch.bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable]
    values = {**options._asdict(), "dtype": batch.query.dtype}
    return _Facts(
        **{name: choices.index(values[name]) for name, choices in _CHOICES.items()},
        problems=batch.query.shape[0],
        features=batch.query.shape[2],
        labelled=batch.query_labels is not None,
        symmetric=options.form == "symmetric",
        normalize=options.normalize,
        return_stats=options.return_stats,
        gradients=any(wanted),
        ragged=ragged,
        queries=batch.query.shape[1],
        keys=keys.shape[1],
        query_gradient=wanted[0],
        key_gradient=wanted[1],
    )


def _compare(
    team: Team,
    options: _Options,
    backend: ModuleType,
    batch: _Batch,
    sizes: list[int],
    gradients: tuple[bool, bool],
) -> Tensor:
    """RowResults [6, P, N] of this rank's queries against all keys, of which the ranks have `sizes`; `gradients` says
    whether any rank wants that of its queries, and of its keys."""
    query_labels, key_labels = (
        None if labels is None or options.same_label == "negative" else labels.contiguous()
        for labels in (batch.query_labels, batch.key_labels)
    )
    exchange = (Gather if options.mode == "gather" else Ring)(team, sizes)
    comparison = _Comparison(options, exchange, backend, query_labels, key_labels, *gradients)
    loss, others = _Rows.apply(comparison, batch.query, batch.key, batch.temperature, batch.bias)  # type: ignore[no-untyped-call]
    return torch.cat([loss.unsqueeze(0), others])
