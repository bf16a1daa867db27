"""What the benchmarks share: cases and providers, the checked and interleaved measurement, result files and pictures.

A benchmark states its cases (what is computed, at which size) and its providers (who computes it), and calls `measure`
for every case:

1. Each provider runs once, after a first call where that compiles. This call yields its peak memory, and its outputs
   are checked; a provider whose check fails is reported as failed and never timed.
2. The providers take turns in one process, round after round, each round starting with another one, so that whatever
   else the machine does hits all of them alike. A provider whose calls take long takes part in fewer rounds, evenly
   spread. Each call gets the next of several input sets, which together exceed the last-level cache.

Times are medians with quartiles over the rounds. A ratio is the quotient of two medians of one case, hence of one run.
"""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop otherwise

RESULTS = Path(__file__).parent / "results"

BUDGET = 4.0
"""Seconds of timed calls per case, shared equally by its providers, within the bounds below."""
CALLS = (5, 200)
"""Fewest and most timed calls of a provider on a case."""
WARM_CALL = 0.2
"""A provider whose checked call takes longer (seconds) needs no further call to warm up."""
SLOW_CALL = 5.0
"""A provider whose checked call takes longer (seconds) is timed by that call alone."""
INPUT_LIMIT = 1 << 30
"""Most bytes that the input sets of a case may take together."""


class Outputs(NamedTuple):
    """What a provider returns from one call."""

    value: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One problem at one size."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Columns that describe the case in the result file."""


class Check(NamedTuple):
    """How far a provider's outputs are from the truth, for the output that comes closest to breaking its tolerance."""

    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        return f"{self.output}: relative error {self.error:.1e} against fp64, tolerance {self.tolerance:.1e}"


def _fits(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute what a benchmark measures."""

    name: str
    """Used on the command line and in result files."""
    label: str
    """Used in tables and pictures."""
    prepare: Callable[[Case], Callable[[Any], Outputs]]
    """Allocates what a case needs once, and returns the call to measure; that takes one set of inputs."""
    check: Callable[[Case, Any, Outputs], Check]
    """Compares outputs with the truth for these inputs."""
    left_out: Callable[[Case], str | None] = _fits
    """Why this provider is not run on a case (not installed, too large), or None."""
    note: str = ""
    """Footnote of the table."""
    compiles: bool = False
    """Whether its first call compiles: that call is neither timed nor is its memory taken. On CUDA all do."""
    detail: Callable[[Case, Sequence[Any]], Mapping[str, float]] = lambda case, inputs: {}
    """What else is measured after the timing, by name, given the input sets. `peak_bytes` replaces what was counted in
    this process."""
    foreign: bool = False
    """Whether this is another package, whose failure is reported but is none of the run."""


@dataclass(frozen=True)
class Measurement:
    """What came out for one provider on one case."""

    case: Case
    provider: Provider
    status: str
    """`"ok"`, `"failed"` (wrong result or an exception: not timed) or `"left out"`."""
    reason: str = ""
    """Why it failed or was left out."""
    check: Check | None = None
    peak_bytes: int | None = None
    seconds: tuple[float, ...] = ()
    """One entry per timed call."""
    detail: Mapping[str, float] = field(default_factory=dict)
    """What the provider measures beside time and memory, by name."""
    busy_elsewhere: float | None = None
    """Share of the CPUs, 0 to 1, that other processes used while the case was timed; None where unknown."""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the seconds; NaN where nothing was timed."""
        if not self.seconds:
            return (math.nan,) * 3
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    @property
    def median(self) -> float:
        return self.quartiles[1]


def compare(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerances: Mapping[str, float]) -> Check:
    """The named output whose error is the largest multiple of its tolerance."""
    checks = [Check(name, relative_error(actual[name], expected[name]), tolerances[name]) for name in expected]
    return max(checks, key=lambda check: math.inf if math.isnan(check.error) else check.error / check.tolerance)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest absolute expected value; infinite for a wrong shape."""
    if actual.shape != expected.shape:
        return math.inf
    return float((actual.to(expected.dtype) - expected).abs().max() / expected.abs().max())


def tolerance(yardstick_error: float, dtype: torch.dtype) -> float:
    """Error allowed to every provider, given the error that idiomatic torch makes in the same dtype.

    Four times that error, or 16 units of rounding where torch happened to be nearly exact. RuntimeError if torch itself
    is off by more than the square root of the rounding unit: then the yardstick is wrong, not inexact.
    """
    eps = torch.finfo(dtype).eps
    if not yardstick_error <= eps**0.5:
        raise RuntimeError(
            f"idiomatic torch differs from the fp64 reference by {yardstick_error:.1e} in {dtype}, "
            f"expected at most {eps**0.5:.1e}: one of the two computes something else"
        )
    return 4 * max(yardstick_error, 4 * eps)


def peak_memory(call: Callable[[], Outputs], device: torch.device) -> tuple[int, Outputs, float]:
    """Peak memory of `call()` in bytes above inputs and gradients, its outputs, and the seconds it took.

    The largest number of bytes alive at one time among those that torch's allocator handed out during the call (forward
    and backward), minus the bytes of the gradients that the call returns: what a step needs on top of what it must hold
    anyway. Inputs and other tensors that existed before do not count, nor do gradients written into them.

    On the CPU the allocator reports every allocation and release to the profiler; on CUDA its own counter is read.
    Memory that a library takes from elsewhere (packing buffers of a matrix product) is not seen, for any provider.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        outputs, seconds = _timed(call, device)
        peak = torch.cuda.max_memory_allocated(device) - before
        remaining = torch.cuda.memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            outputs, seconds = _timed(call, device)
        peak, remaining = _replay_allocations(profile)
    gradient_bytes = sum(g.numel() * g.element_size() for g in outputs.gradients)
    return peak - min(gradient_bytes, remaining), outputs, seconds


def _replay_allocations(profile: torch.profiler.profile) -> tuple[int, int]:
    """Most bytes alive at one time and bytes alive at the end, of those allocated while `profile` was on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    alive: dict[int, int] = {}
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            alive[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= alive.pop(address, 0)  # 0: it existed before
    return peak, now


def _timed(call: Callable[[], Outputs], device: torch.device) -> tuple[Outputs, float]:
    """Outputs, and seconds: on CUDA between two events on an idle device, so what the host takes to launch counts."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        outputs = call()
        end.record()
        torch.cuda.synchronize(device)
        return outputs, begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    outputs = call()
    return outputs, time.perf_counter() - start


class Ceilings(NamedTuple):
    """What the machine can do, measured in the process that measures the rest."""

    flops_per_second: float
    """Of a large square matrix product by torch's library, 2 n^3 flop."""
    bytes_per_second: float
    """Of a large copy, bytes read plus bytes written."""


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The better of a few attempts each, on random numbers."""
    n, copied = (8192, 1 << 30) if device.type == "cuda" else (1024, min(4 * _last_level_cache(device), 1 << 28))
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.rand(copied // 4, device=device)
    target = torch.empty_like(source)

    def seconds(work: Callable[[], Tensor]) -> float:
        return min(_timed(lambda: Outputs(work(), ()), device)[1] for _ in range(4))

    return Ceilings(
        2 * n**3 / seconds(lambda: torch.mm(a, b, out=product)), 2 * copied / seconds(lambda: target.copy_(source))
    )


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets to rotate through: twice the last-level cache, at least two, at most `INPUT_LIMIT` bytes."""
    wanted = math.ceil(2 * _last_level_cache(device) / bytes_per_set)
    return max(2, min(wanted, INPUT_LIMIT // bytes_per_set))


def _last_level_cache(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


class _BusyElsewhere:
    """Share of the CPUs used by other processes since it was made (Linux)."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """CPU seconds of all processes, of this one and those it started, and the time."""
        try:
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        own = os.times()
        started = [Path(f"/proc/{process.pid}/stat") for process in multiprocessing.active_children()]
        # The fields after the name, which is in parentheses and may hold anything: user and system time are 11 and 12.
        fields = [stat.read_text().rpartition(")")[2].split() for stat in started if stat.exists()]
        per_second = os.sysconf("SC_CLK_TCK")
        of_started = sum(int(each[11]) + int(each[12]) for each in fields) / per_second
        busy = (sum(ticks) - ticks[3] - ticks[4]) / per_second
        return busy, own.user + own.system + of_started, time.perf_counter()

    def share(self) -> float | None:
        end = self._read()
        if self._start is None or end is None:
            return None
        busy, own, wall = (e - s for e, s in zip(end, self._start, strict=True))
        return min(1.0, max(0.0, (busy - own) / (wall * (os.cpu_count() or 1))))


def measure(
    case: Case,
    providers: Sequence[Provider],
    inputs: Sequence[Any],
    device: torch.device,
    *,
    budget: float | None = BUDGET,
    report: Callable[[str], None] = lambda message: None,
) -> list[Measurement]:
    """Checks, then times every provider on one case; one measurement per provider, in their order.

    `inputs` are the sets to rotate through, `budget` is the time for timed calls in seconds (see `BUDGET`; with None
    nothing is timed), `report` is told what goes on.
    """
    results: dict[str, Measurement] = {}
    calls: dict[str, Callable[[Any], Outputs]] = {}
    first: dict[str, float] = {}
    times: dict[str, tuple[float, ...]] = {}
    for provider in providers:
        if reason := provider.left_out(case):
            results[provider.name] = Measurement(case, provider, "left out", reason)
            continue
        report(f"checking {provider.name}")
        try:
            call = provider.prepare(case)
            if provider.compiles or device.type == "cuda":  # where workspaces of matrix products stay, too
                call(inputs[0])
            peak, outputs, seconds = peak_memory(lambda call=call: call(inputs[0]), device)  # type: ignore[misc]
            check = provider.check(case, inputs[0], outputs)
        except Exception as error:  # whatever a provider throws: it failed, the others go on
            if "cannot run on" in str(error):  # how this package words that a backend does not serve a problem
                results[provider.name] = Measurement(case, provider, "left out", str(error).partition(". Available")[0])
            else:
                results[provider.name] = Measurement(case, provider, "failed", f"{type(error).__name__}: {error}")
            continue
        if not check.passed:
            results[provider.name] = Measurement(case, provider, "failed", str(check), check)
            continue
        results[provider.name] = Measurement(case, provider, "ok", check=check, peak_bytes=peak)
        if budget is None:
            pass
        elif seconds > SLOW_CALL:
            times[provider.name] = (seconds,)
        else:
            calls[provider.name], first[provider.name] = call, seconds
        del outputs

    turns, busy = _take_turns(calls, first, inputs, device, budget or 0.0, report)
    times |= turns
    report("measuring details")
    details = {p.name: dict(p.detail(case, inputs)) for p in providers if p.name in times}
    peaks = {name: int(detail.pop("peak_bytes")) for name, detail in details.items() if "peak_bytes" in detail}
    return [
        replace(
            r,
            seconds=times.get(name, ()),
            detail=details.get(name, {}),
            peak_bytes=peaks.get(name, r.peak_bytes),
            busy_elsewhere=busy,
        )
        for name, r in results.items()
    ]


def _take_turns(
    calls: Mapping[str, Callable[[Any], Outputs]],
    first: Mapping[str, float],
    inputs: Sequence[Any],
    device: torch.device,
    budget: float,
    report: Callable[[str], None],
) -> tuple[dict[str, tuple[float, ...]], float | None]:
    """Seconds of the timed calls by provider, and the share of the CPUs that other processes used meanwhile.

    `first` holds the seconds of each provider's first call.
    """
    report("warming up")
    number = {}
    for name, call in calls.items():
        seconds = first[name]
        if seconds < WARM_CALL:
            _, seconds = _timed(lambda call=call: call(inputs[-1]), device)  # type: ignore[misc]
        number[name] = min(max(int(budget / len(calls) / seconds), CALLS[0]), CALLS[1])
    rounds = max(number.values(), default=0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    turn = 0
    gc.collect()
    gc.disable()
    try:
        others = _BusyElsewhere()
        for r in range(rounds):
            report(f"round {r + 1} of {rounds}")
            for name in names[r % len(names) :] + names[: r % len(names)]:
                if r * number[name] % rounds >= number[name]:  # takes part in number[name] of the rounds, evenly spread
                    continue
                chosen = inputs[turn % len(inputs)]
                turn += 1
                outputs, seconds = _timed(lambda call=calls[name], x=chosen: call(x), device)  # type: ignore[misc]
                times[name].append(seconds)
                del outputs
        return {name: tuple(t) for name, t in times.items()}, others.share()
    finally:
        gc.enable()


def environment(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Columns that say where and with what a run was made; a package that is not installed has the version ''."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    """Output of git in this checkout; empty where there is no git or no checkout."""
    try:
        result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def rows(
    benchmark: str, measurements: Sequence[Measurement], environment: Mapping[str, Any], compared: Sequence[Provider]
) -> list[dict[str, Any]]:
    """Long form: one row per case and provider. `time_vs_X` is the median time over that of provider X on the case."""
    medians = {(m.case.name, m.provider.name): m.median for m in measurements}
    result = []
    for m in measurements:
        low, median, high = m.quartiles
        row: dict[str, Any] = {
            "benchmark": benchmark,
            "case": m.case.name,
            **m.case.fields,
            "provider": m.provider.name,
            "status": m.status,
            "reason": m.reason,
            "median_ms": _cell(median * 1e3),
            "quartile_1_ms": _cell(low * 1e3),
            "quartile_3_ms": _cell(high * 1e3),
            "runs": len(m.seconds),
            "peak_bytes": "" if m.peak_bytes is None else m.peak_bytes,
        }
        for other in compared:
            row[f"time_vs_{other.name}"] = _cell(median / medians.get((m.case.name, other.name), math.nan))
        row |= {
            "checked_output": m.check.output if m.check else "",
            "error": _cell(m.check.error) if m.check else "",
            "tolerance": _cell(m.check.tolerance) if m.check else "",
            "busy_elsewhere": "" if m.busy_elsewhere is None else round(m.busy_elsewhere, 3),
        }
        result.append(row | dict(environment))
    return result


def _cell(x: float) -> float | str:
    """Four significant digits; empty for NaN."""
    return "" if math.isnan(x) else float(f"{x:.4g}")


def write_csv(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


class Figure(NamedTuple):
    """A number that a benchmark is held to."""

    text: str
    """What is measured, with the bound and its unit."""
    measured: float | None
    """None where the run did not include what it takes."""
    bound: float
    at_most: bool
    """Whether `bound` is an upper one."""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured <= self.bound if self.at_most else self.measured >= self.bound
        return "met" if met else "missed"


def time_ratio(measurements: Sequence[Measurement], case: str, provider: str, other: str) -> float | None:
    """Median time of `provider` over that of `other` on a case; None if one of them was not timed."""
    medians = {m.provider.name: m.median for m in measurements if m.case.name == case and m.seconds}
    return medians[provider] / medians[other] if provider in medians and other in medians else None


def peak_mebibytes(measurements: Sequence[Measurement], case: str, provider: str) -> float | None:
    for m in measurements:
        if (m.case.name, m.provider.name) == (case, provider) and m.peak_bytes is not None:
            return m.peak_bytes / 2**20
    return None


def figures_table(figures: Sequence[Figure]) -> Table:
    table = Table(title="Figures", title_justify="left", title_style="bold")
    table.add_column("target")
    table.add_column("measured", justify="right")
    table.add_column("")
    style = {"met": "green", "missed": "bold red", "not measured": "dim"}
    for f in figures:
        table.add_row(f.text, "" if f.measured is None else _short(f.measured), Text(f.verdict, style[f.verdict]))
    return table


def write_figures(path: Path, figures: Sequence[Figure], environment: Mapping[str, Any]) -> None:
    content = {
        "environment": dict(environment),
        "figures": [f._asdict() | {"verdict": f.verdict} for f in figures],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def results_table(title: str, measurements: Sequence[Measurement], *, floor: str, ours: str) -> Table:
    """Cases downwards; providers across, without those that never ran. The others are divided by `floor` and `ours`."""
    cases = {m.case.name: m.case for m in measurements}
    providers = {m.provider.name: m.provider for m in measurements if m.status != "left out"}
    by_key = {(m.case.name, m.provider.name): m for m in measurements}
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("case", style="bold")
    table.add_column("")
    for provider in providers.values():
        table.add_column(provider.label, justify="right")
    for case in cases:
        cells = [by_key[case, name] for name in providers]
        bases = [by_key[case, name] for name in (floor, ours) if name in providers]
        lines: list[tuple[str, Sequence[str | Text]]] = [
            ("time", [_status_cell(m) for m in cells]),
            ("quartiles", [_spread_cell(m) for m in cells]),
            *[(f"÷ {base.provider.label}", [_ratio_cell(m, base) for m in cells]) for base in bases],
            ("peak memory", ["" if m.peak_bytes is None else format_bytes(m.peak_bytes) for m in cells]),
        ]
        for i, (label, line) in enumerate(lines):
            table.add_row(case if i == 0 else "", Text(label, "dim"), *line, end_section=i == len(lines) - 1)
    return table


def nowhere(measurements: Sequence[Measurement]) -> dict[str, str]:
    """Label of every provider that was left out of all cases -> its reasons."""
    ran = {m.provider.name for m in measurements if m.status != "left out"}
    reasons: dict[str, list[str]] = {}
    for m in measurements:
        if m.provider.name not in ran:
            reasons.setdefault(m.provider.label, []).append(m.reason)
    return {label: "; ".join(dict.fromkeys(texts)) for label, texts in reasons.items()}


def _status_cell(m: Measurement) -> Text:
    if m.status == "ok" and not m.seconds:
        return Text("not timed", "dim")
    if m.status == "ok":
        return Text(f"{_ms(m.median)} ms" + (" (1 run)" if len(m.seconds) == 1 else ""), "bold")
    if m.status == "failed":
        return Text(f"FAILED: {m.reason}", "bold red", overflow="fold")
    return Text(f"left out: {m.reason}", "dim")


def _spread_cell(m: Measurement) -> str:
    return f"{_ms(m.quartiles[0])} – {_ms(m.quartiles[2])}" if len(m.seconds) > 1 else ""


def _ratio_cell(m: Measurement, base: Measurement) -> str:
    return _short(m.median / base.median) if m.seconds and base.seconds else ""


def _ms(seconds: float) -> str:
    return _short(seconds * 1e3)


def _short(x: float) -> str:
    """Three significant digits, more where they stand before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def format_bytes(n: int) -> str:
    """In the largest of B, KiB, MiB and GiB that leaves at least one of them."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{_short(n / size)} {unit}"
    return f"{n} B"


# Okabe and Ito: told apart by people with any common colour blindness; the markers say the same again
_COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9")
STYLES = tuple(zip(2 * _COLOURS, ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h"), strict=True))


def plot(path: Path, title: str, caption: str, measurements: Sequence[Measurement], *, floor: str) -> None:
    """Dots per case: time over that of provider `floor` (whiskers: quartiles) on the left, peak memory on the right.

    Where no floor was timed, times are in milliseconds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    cases = list(dict.fromkeys(m.case.name for m in measurements))
    providers = {m.provider.name: m.provider.label for m in measurements if m.provider.name != floor and m.seconds}
    floors = {m.case.name: m.median for m in measurements if m.provider.name == floor and m.seconds}
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(12, 1.8 + 0.95 * len(cases)), width_ratios=(4, 3), layout="constrained"
    )
    timed = {
        c: [m.provider.name for m in measurements if m.case.name == c and m.seconds and m.provider.name in providers]
        for c in cases
    }
    step = 0.8 / max(len(providers), 1)
    for i, (name, label) in enumerate(providers.items()):
        color, marker = STYLES[i % len(STYLES)]
        dot = {"color": color, "marker": marker, "markersize": 7, "linestyle": "none"}
        named = False
        for m in measurements:
            if m.provider.name != name or not m.seconds:
                continue
            beside = timed[m.case.name]
            y = cases.index(m.case.name) + (beside.index(name) - (len(beside) - 1) / 2) * step
            text = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": "#333333"}
            if m.case.name in floors or not floors:
                low, median, high = (t / floors.get(m.case.name, 1e-3) for t in m.quartiles)
                legend = {} if named else {"label": label}
                named = True
                left.errorbar(median, y, xerr=[[median - low], [high - median]], capsize=2, **dot, **legend)
                left.annotate(_short(median) + ("×" if floors else ""), (high, y), **text)
            if m.peak_bytes:
                right.plot(m.peak_bytes / 2**20, y, **dot)
                right.annotate(format_bytes(m.peak_bytes), (m.peak_bytes / 2**20, y), **text)
    if floors:
        left.axvline(1, color="#333333", linewidth=1, linestyle="--")
    left.set_xlabel("time over that of the floor, log scale" if floors else "time in ms, log scale")
    right.set_xlabel("peak memory in MiB, log scale")
    left.set_yticks(range(len(cases)), [f"{c}\n(floor {_ms(floors[c])} ms)" if c in floors else c for c in cases])
    left.invert_yaxis()
    for axes in (left, right):
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.grid(axis="x", which="major", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for boundary in range(1, len(cases)):
            axes.axhline(boundary - 0.5, color="#eeeeee", linewidth=1)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    if left.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper right", ncols=min(len(providers), 5), frameon=False)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color="#666666")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
