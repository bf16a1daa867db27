"""Writes docs/scaling.md: what a loss over the samples of all ranks sends, computes and holds, for 8 and 1024 GPUs.

Bytes are counted (a test compares them with what processes send); times follow from them by a model whose assumptions
the page states. Nothing here was timed on many GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path

import harness

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MODES = ("gather", "ring")
GRADIENT_BYTES = 4
"""Gradients of keys travel in float32."""


@dataclass(frozen=True)
class Batch:
    """What every rank holds of P problems: M keys each, and as many queries, of D features of `item` bytes."""

    M: int
    D: int
    P: int = 1
    item: int = 2

    def keys(self) -> int:
        return self.P * self.M * self.D * self.item

    def gradients(self) -> int:
        return self.P * self.M * self.D * GRADIENT_BYTES


@dataclass(frozen=True)
class Machine:
    """Ranks and what joins them."""

    name: str
    ranks: int
    flops: float
    """Products per second and rank that blocks of this size reach, flop/s."""
    bandwidth: float
    """Bytes that a rank sends per second while it receives as many."""
    latency: float
    """Seconds that a message takes beyond its bytes."""


MACHINES = (
    Machine("8 GPUs, one node", 8, 500e12, 350e9, 5e-6),
    Machine("1024 GPUs, 128 nodes", 1024, 500e12, 40e9, 15e-6),
)
BATCHES = {
    "SEER, 8 pairs a rank, 3 layers": Batch(8, 4096, P=3),
    "retrieval, 512 pairs a rank": Batch(512, 1024),
    "CLIP, 4096 pairs a rank": Batch(4096, 1024),
}


def bytes_sent(mode: str, direction: str, ranks: int, batch: Batch, labels: bool = False) -> int:
    """Bytes of keys, labels and gradients of keys that a rank sends, sums and sizes apart."""
    others = ranks - 1
    label = 4 * batch.P * batch.M if labels else 0
    if direction == "forward":
        return others * (batch.keys() + label)
    if mode == "gather":
        return others * batch.gradients()
    return others * (batch.keys() + label + batch.gradients())


def memory(mode: str, ranks: int, batch: Batch) -> int:
    """Bytes of keys and their gradients that a rank holds at a time."""
    return (ranks if mode == "gather" else min(ranks, 3)) * (batch.keys() + batch.gradients())


def flops(ranks: int, batch: Batch) -> float:
    """Of one rank: similarities in the forward pass; in the backward pass again, and a product for each gradient."""
    return 4 * 2.0 * batch.P * batch.M * (ranks * batch.M) * batch.D


def seconds(mode: str, machine: Machine, batch: Batch) -> tuple[float, float, float]:
    """Products, communication, and what of the latter is not hidden behind the former: all of it when gathering."""
    computed = flops(machine.ranks, batch) / machine.flops
    sent = sum(bytes_sent(mode, direction, machine.ranks, batch) for direction in ("forward", "backward"))
    messages = 2 * log2(machine.ranks) if mode == "gather" else 2 * (machine.ranks - 1)
    communicated = sent / machine.bandwidth + messages * machine.latency
    exposed = communicated if mode == "gather" else max(0.0, communicated - computed)
    return computed, communicated, exposed


HEAD = """\
# Losses over the samples of many GPUs

This page is written by `python benchmarks/scaling.py`. Its bytes are formulas that a test compares with what two, three
and four processes send; **its times are a model, and nothing on it was timed on several GPUs**.

## Bytes

Each of R ranks holds M keys of D features of b bytes, and compares its queries with the keys of all. A rank sends,
beside labels (4 bytes a key), sizes and sums:

| mode | forward | backward | keys and gradients in memory |
| --- | --- | --- | --- |
| gather | (R - 1) M D b | (R - 1) M D 4 | R M D (b + 4) |
| ring | (R - 1) M D b | (R - 1) M D (b + 4) | 3 M D (b + 4) |

The bytes of a rank grow with the ranks, since everybody sees everybody's keys, and so do its products. Who waits for
whom therefore depends on M: four products with the keys of another rank are 8 M M D flop, and in the ring these keys
cost M D (2 b + 4) bytes, which is M flop a byte in half precision. The ring hides what it sends behind products where
M exceeds the flop that a GPU does in the time of one byte."""

ASSUMPTIONS = """\
- Half precision. Four products of M x R M x D a rank: similarities in the forward pass, and in the backward pass again,
  with one product for each gradient. Normalisation and exponentials are left out.
- Gathering waits: nothing is computed while keys come or gradients go home. Its messages are those of a tree.
- The ring overlaps each step's products with the next step's keys, and sends R - 1 messages one after the other each
  way. What is not hidden is by how much communication exceeds products in all, which is kind to it: no step waits for a
  late neighbour.
- One network: on many nodes all bytes are charged at the bandwidth between nodes, though neighbours in a node are
  nearer."""

CONCLUSIONS = """\
What follows from the model: with few pairs a rank both modes wait for the network, and gathering, with fewer bytes and
messages, waits less. Thousands of pairs a rank hide the ring within a node, and not between nodes, where neither mode
hides. There memory decides: gathering holds the keys of all ranks, the ring those of three.

How one machine's times and memory grow with rows, features, problems and processes is measured:
[growth along one dimension](performance.md#growth-along-one-dimension-cpu).

To check it on GPUs: time `seer_kernels.distributed.info_nce` in both modes under `torchrun` with these batches; the
bandwidth to put in is that of `torch.distributed.all_gather_into_tensor` alone."""


def page() -> str:
    machines = [
        [m.name, f"{m.flops / 1e12:.0f}", f"{m.bandwidth / 1e9:.0f}", f"{m.latency * 1e6:.0f}", f"{threshold(m):.0f}"]
        for m in MACHINES
    ]
    rows = [
        [name, machine.name, mode, *_sizes(mode, machine, batch), *_milliseconds(mode, machine, batch)]
        for name, batch in BATCHES.items()
        for machine in MACHINES
        for mode in MODES
    ]
    of_machines = ["machine", "Tflop/s a GPU", "GB/s a GPU, each way", "latency, µs", "M at which the ring hides"]
    of_rows = ["batch", "machine", "mode", "sent", "keys held", "products, ms", "communication, ms", "not hidden, ms"]
    parts = [HEAD, "## Assumptions of the times", _table(of_machines, machines, 1), ASSUMPTIONS]
    parts += ["## Times and memory of a rank", _table(of_rows, rows, 3), CONCLUSIONS]
    return "\n\n".join(parts) + "\n"


def threshold(machine: Machine) -> float:
    """Keys a rank from which the ring's bytes hide behind its products, latency apart."""
    return machine.flops / machine.bandwidth


def _sizes(mode: str, machine: Machine, batch: Batch) -> list[str]:
    sent = sum(bytes_sent(mode, direction, machine.ranks, batch) for direction in ("forward", "backward"))
    return [harness.format_bytes(n) for n in (sent, memory(mode, machine.ranks, batch))]


def _milliseconds(mode: str, machine: Machine, batch: Batch) -> list[str]:
    return [f"{1e3 * s:.3g}" for s in seconds(mode, machine, batch)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """Markdown; all columns but the first `texts` hold numbers."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of date")
    options = parser.parse_args(arguments)
    if options.check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
