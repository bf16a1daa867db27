"""The command line that the benchmarks share: choose sizes and providers, measure, print the table, leave the files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Case, Figure, Measurement, Provider
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Benchmark:
    """What a script measures. Sizes are of any type that its functions share."""

    name: str
    """Stem of the result files."""
    title: str
    """What the calls compute, for table and picture."""
    description: str
    examples: str
    """Command lines with what they do, for `--help`."""
    sizes: Sequence[Any]
    sizes_quick: Sequence[Any]
    parse_size: Callable[[str], Any]
    """Raises argparse.ArgumentTypeError."""
    size_help: str
    make_case: Callable[[Any, torch.dtype, torch.device], Case]
    make_inputs: Callable[[Any, torch.dtype, torch.device, int], Any]
    """One set of inputs from size, dtype, device and seed."""
    input_bytes: Callable[[Any, torch.dtype], int]
    """Bytes of one set."""
    make_providers: Callable[[bool], Mapping[str, Provider]]
    """All providers by name, in the order of the table; for the quick run or the full one."""
    make_figures: Callable[[Sequence[Measurement]], Sequence[Figure]]
    forget: Callable[[], None]
    """Called after every case, to drop what was kept of its inputs."""
    measured: str
    """What a call computes, for `--help`."""
    checked: str = """loss and gradients against the reference in fp64, tolerance from the error that idiomatic torch
            makes in the same dtype"""
    """What is checked before, for `--help`."""
    packages: tuple[str, ...] = ("seer-kernels", "pytorch-metric-learning")
    """Whose versions are noted."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    extra_columns: Callable[[Measurement, Sequence[Measurement]], Mapping[str, Any]] = lambda m, everyone: {}
    """Further columns of a measurement's row, given all measurements."""
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    """Adds what only this script takes."""
    use_arguments: Callable[[argparse.Namespace], str] = lambda options: ""
    """Takes it; returns what is to be said about it."""
    timed: bool = True
    budgets: float = 1.0
    """Time for timed calls per case, in `harness.BUDGET`s: more where small ratios are told from noise."""
    draw: Callable[[Path, Path], None] | None = None
    """Draws the picture from the result file; by default `harness.plot` draws the measurements."""
    floor: str = "floor"
    """The provider that all times are divided by."""
    ours: str = "native"
    """Likewise, the second line of ratios."""


def parse_arguments(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    everyone = benchmark.make_providers(False)
    names = "\n".join(f"  {p.name:<10}{p.label}" for p in everyone.values())
    parser = argparse.ArgumentParser(
        description=benchmark.description,
        epilog=f"""\
providers
{names}

what is measured
  time      {benchmark.measured}:
            median and quartiles of calls in which the providers take turns
  memory    most bytes alive at one time that the call took from torch's allocator, minus the gradients it returns
  check     {benchmark.checked}; a provider that fails is not timed, and the exit code is 1
            unless it is another package's
  figures   the numbers this package is held to, as met, missed or not measured; they do not change the exit code

examples
{benchmark.examples}

The complete fp32 run writes {benchmark.name}.csv, .json and .png. Other runs add what they chose to the names
({benchmark.name}-quick.csv, {benchmark.name}-bfloat16-partial.csv), so that they never replace it. See
benchmarks/README.md.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    parser.add_argument("--sizes", nargs="+", type=benchmark.parse_size, metavar="SIZE", help=benchmark.size_help)
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=list(everyone),
        metavar="NAME",
        help=f"who is measured, of: {', '.join(everyone)} (default: all, on a CPU without those that compile)",
    )
    parser.add_argument("--dtype", choices=benchmark.dtypes, default="float32", help="of the inputs (default: float32)")
    parser.add_argument(
        "--device", choices=benchmark.devices, default="cpu", help="where tensors live and providers run (default: cpu)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=harness.RESULTS,
        metavar="FOLDER",
        help="where result files go (default: benchmarks/results)",
    )
    benchmark.add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable CUDA device")
    return options


def run(
    benchmark: Benchmark, options: argparse.Namespace, providers: Sequence[Provider], status: Console
) -> list[Measurement]:
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    sizes = options.sizes or (benchmark.sizes_quick if options.quick else benchmark.sizes)
    measurements = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=status, transient=True) as progress:
        task = progress.add_task("", total=len(sizes))
        for size in dict.fromkeys(sizes):
            case = benchmark.make_case(size, dtype, device)

            def report(message: str, case: Case = case) -> None:
                progress.update(task, description=f"{case.name}: {message}")

            report("making inputs")
            count = harness.input_sets(benchmark.input_bytes(size, dtype), device)
            inputs = [benchmark.make_inputs(size, dtype, device, seed) for seed in range(count)]
            seconds = benchmark.budgets * (harness.BUDGET / 4 if options.quick else harness.BUDGET)
            budget = seconds if benchmark.timed else None
            results = harness.measure(case, providers, inputs, device, budget=budget, report=report)
            benchmark.forget()
            measurements += results
            progress.advance(task)
            progress.console.print(f"{case.name}: done, {count} input sets", highlight=False)
    return measurements


def chosen(everyone: Mapping[str, Provider], names: Sequence[str] | None, device: torch.device) -> list[Provider]:
    """Those that are named, or all; then who compiles is left out on a CPU, where that takes longer than the rest."""
    if names is not None:
        return [p for p in everyone.values() if p.name in names]

    def when_named(provider: Provider) -> Provider:
        reason = "on CPUs only where --providers names it"
        return replace(provider, left_out=lambda case: provider.left_out(case) or reason)

    return [when_named(p) if p.compiles and device.type == "cpu" else p for p in everyone.values()]


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns the exit code."""
    options = parse_arguments(benchmark, arguments)
    console, status = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 140
    if remark := benchmark.use_arguments(options):
        status.print(remark, highlight=False, soft_wrap=True)
    device = torch.device(options.device)
    everyone = benchmark.make_providers(options.quick)
    providers = chosen(everyone, options.providers, device)
    environment = harness.environment(device, benchmark.packages)
    ceilings = harness.ceilings(device, DTYPES[options.dtype])
    environment |= {name: float(f"{value:.3g}") for name, value in ceilings._asdict().items()}
    measurements = run(benchmark, options, providers, status)

    title = f"{benchmark.title}, {options.dtype}"
    rates = f"{ceilings.flops_per_second / 1e12:.3g} Tflop/s, copy {ceilings.bytes_per_second / 1e9:.3g} GB/s"
    caption = (
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"Python {environment['python']}, {environment['date']}; matrix product {rates}"
    )
    console.print(harness.results_table(title, measurements, floor=benchmark.floor, ours=benchmark.ours))
    console.print(f"[dim]{caption}[/dim]", highlight=False)
    unused = harness.nowhere(measurements)
    for provider in providers:
        note = f"left out: {unused[provider.label]}" if provider.label in unused else provider.note
        console.print(f"[bold]{provider.label}[/bold]: {note}", highlight=False)
    busy = max((m.busy_elsewhere or 0 for m in measurements), default=0)
    if busy > 0.05:
        console.print(f"[yellow]Other processes used up to {busy:.0%} of the CPUs meanwhile: times are noisy.[/yellow]")
    figures = benchmark.make_figures(measurements)
    console.print()
    console.print(harness.figures_table(figures))

    partial_run = options.sizes is not None or options.providers is not None
    parts = [options.quick and "quick", options.device == "cuda" and "cuda", partial_run and "partial"]
    parts.insert(1, options.dtype != "float32" and options.dtype)
    stem = options.out / "-".join([benchmark.name, *(p for p in parts if p)])
    options.out.mkdir(parents=True, exist_ok=True)
    rows = harness.rows(benchmark.name.removeprefix("bench_"), measurements, environment, list(everyone.values()))
    rows = [row | benchmark.extra_columns(m, measurements) for row, m in zip(rows, measurements, strict=True)]
    harness.write_csv(stem.with_suffix(".csv"), rows)
    harness.write_figures(stem.with_suffix(".json"), figures, environment)
    picture = stem.with_suffix(".png")
    if benchmark.draw is None:
        harness.plot(picture, title, caption, measurements, floor=benchmark.floor)
    elif any(m.status == "ok" for m in measurements):
        benchmark.draw(stem.with_suffix(".csv"), picture)
    console.print(f"Written: {stem}.csv, .json, .png", highlight=False, soft_wrap=True)

    failed = [m for m in measurements if m.status == "failed"]
    for m in failed:
        status.print(f"[bold red]failed[/bold red] {m.provider.name} on {m.case.name}: {m.reason}", highlight=False)
    return 1 if any(not m.provider.foreign for m in failed) else 0
