"""What a search found, in words and tables. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.bench.figures import Slo
from pdserve.bench.report import Table
from pdserve.bench.simulation.cluster import PHASES, Outcome
from pdserve.bench.simulation.search import Rung, Search, attainment, latencies, splits
from pdserve.bench.topology import Topology
from pdserve.bench.verdict import LEAST, Goodput, headline, promise

FACTORS = (0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.6, 2.0, 3.0, 5.0)
"""Targets that are looked at beside those that were asked for, as multiples of them."""


@dataclass(frozen=True, slots=True)
class Duel:
    """The best split against all workers colocated."""

    search: Search
    split: Topology
    colocated: Topology
    slo: Slo

    def at(self, slo: Slo) -> float:
        """The split's goodput against the colocated one's, -1 … ∞; NaN if neither serves."""
        ours, theirs = (self.search.goodput(one, slo).rate for one in (self.split, self.colocated))
        if not theirs:
            return math.inf if ours else math.nan
        return ours / theirs - 1

    def scaled(self, ttft: float, itl: float) -> Slo:
        return Slo(ttft_ms=self.slo.ttft_ms * ttft, itl_ms=self.slo.itl_ms * itl)

    @property
    def winner(self) -> Topology:
        return self.split if self.at(self.slo) > 0 else self.colocated


def opening(duel: Duel, whole: Callable[[Topology], Topology], workload: str) -> list[str]:
    """The verdict. `whole(topology)`: what stands for it in the whole cluster."""
    reached = {}
    for topology in (duel.split, duel.colocated):
        found, all_of_it = duel.search.goodput(topology), whole(topology)
        rate = found.rate * all_of_it.workers / topology.workers
        reached[all_of_it] = Goodput(rate, found.at_least)
    return [headline(reached), promise(duel.slo, workload)]


def when(duel: Duel) -> list[str]:
    """For which targets the other one is better, in sentences."""
    between = _along("between tokens", [duel.scaled(1.0, f) for f in FACTORS], duel)
    first = _along("for the first token", [duel.scaled(f, 1.0) for f in FACTORS], duel)
    found = [text for text in (between, first) if text]
    changes = [duel.at(duel.scaled(a, b)) for a in FACTORS for b in FACTORS]
    known = [change for change in changes if not math.isnan(change)]
    if known:
        share = sum(change > LEAST for change in known) / len(known)
        found.append(
            f"Over all pairs of targets from {FACTORS[0]:g} to {FACTORS[-1]:g} times these that "
            f"can be met, the split serves more under {share:.0%}, colocated workers as much or "
            "more under the others: see the map."
        )
    return found


def _along(name: str, targets: Sequence[Slo], duel: Duel) -> str:
    """Where the winner changes while one target grows and the other stays."""
    known = [(slo, duel.at(slo) > LEAST) for slo in targets if not math.isnan(duel.at(slo))]
    places = [n for n, (one, other) in enumerate(itertools.pairwise(known)) if one[1] != other[1]]
    if not places:
        return ""

    def ms(slo: Slo) -> float:
        return slo.itl_ms if name == "between tokens" else slo.ttft_ms

    if len(places) > 1:
        return (
            f"Which is better changes {len(places)} times as the target {name} goes from "
            f"{ms(known[0][0]):.0f} to {ms(known[-1][0]):.0f} ms: they are close there."
        )
    (low, split_first), (high, _) = known[places[0]], known[places[0] + 1]
    tight, loose = ("the split", "colocated workers") if split_first else (
        "colocated workers", "the split"
    )  # fmt: skip
    return (
        f"With the other target as it is: up to {ms(low):.0f} ms {name}, {tight} serve more; from "
        f"{ms(high):.0f} ms on, {loose}."
    )


def why(duel: Duel, shown: dict[Topology, str]) -> str:
    """Where time goes at the highest rate that the better one sustains."""
    best = duel.search.goodput(duel.winner).rate
    rungs = {one: duel.search.rungs[one] for one in (duel.split, duel.colocated)}
    places = [n for n, rung in enumerate(rungs[duel.winner]) if rung.rate <= best]
    if not places:
        return ""
    at = places[-1]
    parts = []
    for topology, mine in rungs.items():
        outcome = mine[at].outcome
        spent = ", ".join(
            f"{outcome.phases[name] * 1e3:.0f} ms {name}" for name in PHASES if outcome.phases[name]
        )
        busy = ", ".join(f"{role} {share:.0%} busy" for role, share in outcome.busy.items())
        tpot = latencies(outcome)["tpot"]["p90"]
        parts.append(f"{shown[topology]}: {spent}; {tpot:.1f} ms per token (p90); {busy}")
    return (
        f"At {rungs[duel.winner][at].rate:g} requests/s a mean request spends — {'. '.join(parts)}."
    )


def table(search: Search, slo: Slo, shown: dict[Topology, str]) -> Table:
    rows = [["topology", "goodput", *(f"met at {rung.rate:g}/s" for rung in _any(search))]]
    order = [*splits(search.rungs), *(one for one in search.rungs if not one.prefill)]
    for topology in order:
        shares = [rung.attainment(slo) for rung in search.rungs[topology]]
        found: Goodput = search.goodput(topology)
        rows.append([shown[topology], str(found), *(f"{share:.0%}" for share in shares)])
    return rows


def _any(search: Search) -> Sequence[Rung]:
    return next(iter(search.rungs.values()))


def run_table(runs: Sequence[tuple[str, Outcome]], slo: Slo) -> Table:
    """Figures of whole runs."""
    rows = [["run", "requests", "refused", "met", "TTFT p50", "p90", "p99 ms", "TPOT p50",
             "p90 ms", "output tok/s", "from caches", *(f"{name} ms" for name in PHASES),
             "busy"]]  # fmt: skip
    for title, run in runs:
        found = latencies(run)
        ttft, tpot = found["ttft"], found["tpot"]
        cached = 1 - run.computed / run.prompt_tokens if run.prompt_tokens else 0.0
        rows.append([
            title, f"{len(run.ttft):,}", f"{run.refused:,}", f"{attainment(run, slo):.1%}",
            *(f"{ttft[share]:.0f}" for share in ("p50", "p90", "p99")),
            *(f"{tpot[share]:.1f}" for share in ("p50", "p90")),
            f"{run.tokens / run.span_s:,.0f}", f"{cached:.0%}",
            *(f"{run.phases[name] * 1e3:.1f}" for name in PHASES),
            ", ".join(f"{role} {share:.0%}" for role, share in run.busy.items()),
        ])  # fmt: skip
    return rows
