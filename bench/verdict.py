"""Who wins where, by how much, and whether that is more than noise. Pure decisions over cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.bench.figures import ATTAINED, Figures, Slo
from pdserve.bench.topology import Topology

LEAST = 0.03
"""Differences under this are called none, however quiet the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: a topology at a rate, in a round."""

    topology: str
    twin: bool
    """The first topology's second start of a round: the same thing again, to see the noise."""
    round: int
    rate: float
    """Requests per second."""
    figures: Figures
    phases: Mapping[str, float] = field(default_factory=dict)
    """Mean seconds per phase."""
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    """Process → CPU seconds during the run."""
    memory_mib: Mapping[str, float] = field(default_factory=dict)
    moved_mib: float = 0.0
    limited: str = ""
    """Why the client may have limited the run."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure that is compared."""

    name: str
    unit: str
    higher_wins: bool
    of: Callable[[Figures], float]


def _latency(name: str, share: str) -> Callable[[Figures], float]:
    return lambda figures: figures.latencies[name][share]


METRICS = (
    Metric("output", "tok/s", True, lambda figures: figures.output_tok_s),
    Metric("total", "tok/s", True, lambda figures: figures.total_tok_s),
    Metric("attainment", "", True, lambda figures: figures.attainment),
    *(
        Metric(f"{title} {share}", "ms", False, _latency(name, share))
        for name, title in (
            ("ttft", "TTFT"),
            ("itl", "ITL"),
            ("tpot", "TPOT"),
            ("e2e", "end to end"),
            ("worst_gaps", "worst gaps"),
        )
        for share in ("p50", "p90", "p99")
    ),
)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Highest rate at which ATTAINED of the requests meet both targets."""

    rate: float
    at_least: bool
    """Even the highest rate that was tried was sustained."""

    def __str__(self) -> str:
        if not self.rate:
            return "less than the lowest rate tried"
        return f"{'at least ' if self.at_least else ''}{self.rate:.2f} requests/s"


def median(cells: Iterable[Cell], metric: Metric) -> float:
    """Over rounds; NaN of nothing."""
    values = [value for cell in cells if not math.isnan(value := metric.of(cell.figures))]
    return statistics.median(values) if values else math.nan


def rates_of(cells: Sequence[Cell]) -> list[float]:
    return sorted({cell.rate for cell in cells})


def topologies_of(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.topology for cell in cells))


def at(cells: Sequence[Cell], topology: str, rate: float, *, twin: bool = False) -> list[Cell]:
    return [
        cell for cell in cells if (cell.topology, cell.rate, cell.twin) == (topology, rate, twin)
    ]


def noise(cells: Sequence[Cell], metric: Metric) -> float:
    """The largest relative difference, over all rates, between a topology and itself."""
    first = topologies_of(cells)[0]
    found = [
        abs(relative(median(at(cells, first, rate, twin=True), metric),
                     median(at(cells, first, rate), metric)))
        for rate in rates_of(cells)
    ]  # fmt: skip
    return max((value for value in found if not math.isnan(value)), default=math.nan)


def relative(value: float, base: float) -> float:
    """value / base - 1; NaN where that means nothing."""
    if math.isnan(value) or math.isnan(base):
        return math.nan
    if base == 0:
        return 0.0 if value == 0 else math.inf
    return value / base - 1


def goodput(cells: Sequence[Cell], topology: str) -> Goodput:
    return crossing([
        (rate, statistics.median(cell.figures.attainment for cell in at(cells, topology, rate)))
        for rate in rates_of(cells)
    ])  # fmt: skip


def crossing(shares: Iterable[tuple[float, float]]) -> Goodput:
    """From (rate, attainment), by rate: between the last rate that is sustained and the first that
    is not, attainment is taken to fall in a line."""
    before = (0.0, 0.0)
    for rate, share in shares:
        if share < ATTAINED:
            if not before[0]:
                return Goodput(0.0, at_least=False)
            step = (before[1] - ATTAINED) / (before[1] - share)
            return Goodput(before[0] + (rate - before[0]) * step, at_least=False)
        before = (rate, share)
    return Goodput(before[0], at_least=True)


def sentences(cells: Sequence[Cell], slo: Slo, workload: str) -> list[str]:
    """The verdict in words, the most important first."""
    names = topologies_of(cells)
    reached = {name: goodput(cells, name) for name in names}
    by_shape = {Topology.parse(name): reached[name] for name in names}
    found = [headline(by_shape), promise(slo, workload)]
    for other in names[1:]:
        found += _differences(cells, names[0], other)
    if why := _why(cells, names):
        found.append(why)
    limited = sorted({f"{cell.topology} at {cell.rate:g}/s" for cell in cells if cell.limited})
    if limited:
        found.append(
            "The client may have limited these runs, so they make the cluster look worse than it "
            f"is: {', '.join(limited)}."
        )
    return found


def promise(slo: Slo, workload: str) -> str:
    """What "in good time" means."""
    return (
        f"In good time: of ten requests ({workload}) nine get their first token within "
        f"{slo.ttft_ms:.0f} ms and then one every {slo.itl_ms:.0f} ms on average."
    )


def headline(reached: Mapping[Topology, Goodput]) -> str:
    """Who serves most, in a sentence for those who decide."""
    best, *others = sorted(reached, key=lambda one: -reached[one].rate)
    if not others:
        return f"{best.plain.capitalize()}: {reached[best]} in good time."
    if not reached[best].rate:
        return "Nobody serves even the lowest rate that was tried in good time."
    tied = [one for one in others if reached[one].rate >= reached[best].rate / (1 + LEAST)]
    if tied:
        names = " and ".join(one.plain for one in (best, *tied))
        return (
            f"{names} serve the same rate in good time, {reached[best]}: the choice is one of "
            "latency, below."
        )
    second = reached[others[0]]
    more = f", {reached[best].rate / second.rate - 1:.0%} more than" if second.rate else "; with"
    rest = "".join(f"; {one} {reached[one]}" for one in others[1:])
    return (
        f"Use {best.plain}: {reached[best]} in good time{more} {others[0].plain}: {second}{rest}."
    )


def _differences(cells: Sequence[Cell], base: str, other: str) -> list[str]:
    """Where `other` differs from `base` by more than noise, in words."""
    better: dict[str, list[str]] = {base: [], other: []}
    for metric in METRICS:
        band = max(LEAST, noise(cells, metric))
        for rate in rates_of(cells):
            change = relative(
                median(at(cells, other, rate), metric), median(at(cells, base, rate), metric)
            )
            if math.isnan(change) or abs(change) <= band or math.isnan(band):
                continue
            winner = other if (change > 0) == metric.higher_wins else base
            better[winner].append(f"{metric.name} at {rate:g}/s ({change:+.0%})")
    return [
        f"{winner} is better than {base if winner == other else other}, beyond noise, in: "
        f"{', '.join(won)}. (Percentages: {other} against {base}.)"
        for winner, won in better.items()
        if won
    ] or [f"{other} and {base} do not differ by more than noise in anything measured."]


def _why(cells: Sequence[Cell], names: Sequence[str]) -> str:
    """The phase in which the topologies differ most, at the highest rate."""
    rate = rates_of(cells)[-1]
    spent = {name: mean_of([cell.phases for cell in at(cells, name, rate)]) for name in names}
    if len(names) < 2 or not all(spent.values()):
        return ""
    base, other = names[0], names[1]
    phase = max(spent[base], key=lambda name: abs(spent[other][name] - spent[base][name]))
    return (
        f"At {rate:g}/s a mean request spends {spent[base][phase] * 1e3:.0f} ms in {phase} with "
        f"{base} and {spent[other][phase] * 1e3:.0f} ms with {other}: the largest difference "
        "of all phases."
    )


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of rows with equal keys; empty if one is empty."""
    if not rows or not all(rows):
        return {}
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
