"""Who wins where, by how much, and whether that is more than noise. Pure decisions over cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.bench.figures import ATTAINED, Figures, Slo
from pdserve.bench.reference import NOBODY, Pace
from pdserve.bench.topology import Topology

LOWER, HIGHER = 0.5, 1.5
"""Of a rate that is tried because the ladder did not reach far enough."""
UNSTEADY = 0.1
"""Changes of the machine's speed by so much are mentioned."""
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
    pace: Pace = NOBODY
    """Of the machine, before and after the run."""


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


_EASIER = ("attainment", "end to end p90")


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


def goodput(cells: Sequence[Cell], topology: str, *, twin: bool = False) -> Goodput:
    """From the median over rounds at each rate. `twin`: of the first topology's second starts."""
    shares = [
        (rate, [cell.figures.attainment for cell in at(cells, topology, rate, twin=twin)])
        for rate in rates_of(cells)
    ]
    return crossing([(rate, statistics.median(found)) for rate, found in shares if found])


def goodput_noise(cells: Sequence[Cell]) -> float:
    """How far the first topology's goodput is from itself, relatively; NaN if nobody knows."""
    first = topologies_of(cells)[0]
    once, again = goodput(cells, first), goodput(cells, first, twin=True)
    if not once.rate or not again.rate or once.at_least or again.at_least:
        return math.nan
    return abs(again.rate / once.rate - 1)


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


def further(cells: Sequence[Cell]) -> float:
    """A rate that has not been tried and would tell more: below the lowest while a topology does
    not sustain it but gets closer, above the highest while one does. 0: there is nothing more to
    learn."""
    names, rates = topologies_of(cells), rates_of(cells)
    reached = {name: goodput(cells, name) for name in names}
    if any(not reached[name].rate and _closer(cells, name) for name in names):
        return rounded(rates[0] * LOWER)
    if any(one.at_least for one in reached.values()):
        return rounded(rates[-1] * HIGHER)
    return 0.0


def _closer(cells: Sequence[Cell], name: str) -> bool:
    """Whether the lowest rate is easier for the topology than the one above it: otherwise it is not
    load that keeps it from its targets."""
    attainment, e2e = (metric for metric in METRICS if metric.name in _EASIER)
    rates = rates_of(cells)[:2]
    if len(rates) < 2:
        return True
    lowest, above = (at(cells, name, rate) for rate in rates)
    more = median(lowest, attainment) > median(above, attainment) + LEAST
    return more or relative(median(lowest, e2e), median(above, e2e)) < -LEAST


def rounded(rate: float) -> float:
    """To three digits, as rates are tried and shown."""
    return float(f"{rate:.3g}")


def sentences(cells: Sequence[Cell], slo: Slo, workload: str) -> list[str]:
    """The verdict in words, the most important first."""
    names = topologies_of(cells)
    reached = {name: goodput(cells, name) for name in names}
    by_shape = {Topology.parse(name): reached[name] for name in names}
    band = goodput_noise(cells)
    found = [headline(by_shape, LEAST if math.isnan(band) else max(LEAST, band))]
    found.append(promise(slo, workload))
    if not math.isnan(band):
        found.append(
            f"Noise: {names[0]} measured a second time served "
            f"{goodput(cells, names[0], twin=True)} ({band:.0%} off)."
        )
    for other in names[1:]:
        found += _differences(cells, names[0], other)
    if why := _why(cells, names):
        found.append(why)
    found += unsteady(cells)
    limited = sorted({f"{cell.topology} at {cell.rate:g}/s" for cell in cells if cell.limited})
    if limited:
        found.append(
            "The client may have limited these runs, so they make the cluster look worse than it "
            f"is: {', '.join(limited)}."
        )
    return found


def unsteady(cells: Sequence[Cell]) -> list[str]:
    """A sentence if the machine itself was slower at one time than at another."""
    first = topologies_of(cells)[0]
    gaps = [cell.pace.gap_s for cell in cells if cell.topology == first]
    known = sorted(gap for gap in gaps if not math.isnan(gap))
    if not known or known[-1] <= known[0] * (1 + UNSTEADY):
        return []
    return [
        f"The machine's own speed changed meanwhile: the same small load on {first} took from "
        f"{known[0] * 1e3:.2f} to {known[-1] * 1e3:.2f} ms per token, at one run and at another."
    ]


def promise(slo: Slo, workload: str) -> str:
    """What "in good time" means."""
    return (
        f"In good time: of ten requests ({workload}) nine get their first token within "
        f"{slo.ttft_ms:.0f} ms and then one every {slo.itl_ms:.0f} ms on average."
    )


def headline(reached: Mapping[Topology, Goodput], band: float = LEAST) -> str:
    """Who serves most, in a sentence for those who decide. What differs by no more than `band`,
    relatively, does not differ."""
    best, *others = sorted(reached, key=lambda one: -reached[one].rate)
    if not others:
        return f"{best.plain.capitalize()}: {reached[best]} in good time."
    if not reached[best].rate:
        return "Nobody serves even the lowest rate that was tried in good time."
    tied = [one for one in others if reached[one].rate >= reached[best].rate / (1 + band)]
    if tied:
        names = " and ".join(one.plain for one in (best, *tied))
        if band > LEAST:
            rates = ", ".join(f"{one} {reached[one]}" for one in (best, *tied))
            return (
                f"{names} serve the same rate in good time as far as can be told here: {rates}, "
                f"which differ by no more than one of them from itself ({band:.0%})."
            )
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
