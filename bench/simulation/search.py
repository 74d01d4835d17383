"""Which topology serves most: simulations at a ladder of rates, and what targets make of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Self

from pdserve.bench.figures import Slo, summary
from pdserve.bench.simulation.cluster import Outcome, Simulation
from pdserve.bench.simulation.load import Load
from pdserve.bench.simulation.profile import Profile
from pdserve.bench.topology import Topology
from pdserve.bench.verdict import HIGHER, Goodput, crossing, rounded
from pdserve.cluster.process import die_with

MOST_RUNGS = 40
FEW = 8
"""Splits of so few workers are all tried; of more, so many at first, and then between the best."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One simulation."""

    profile: Profile
    topology: Topology
    load: Load
    rate: float
    policy: str

    def run(self) -> Outcome:
        simulation = Simulation(
            self.profile, self.topology, seed=self.load.seed, policy=self.policy
        )
        return simulation.run(self.load.at_rate(self.rate))


@dataclass(frozen=True, slots=True)
class Rung:
    """What came of a topology at a rate."""

    rate: float
    outcome: Outcome

    def attainment(self, slo: Slo) -> float:
        return attainment(self.outcome, slo)


def attainment(outcome: Outcome, slo: Slo) -> float:
    """Share of all requests that met both targets; whatever was refused did not."""
    pairs = zip(outcome.ttft, outcome.tpot, strict=True)
    met = sum(1e3 * ttft <= slo.ttft_ms and 1e3 * tpot <= slo.itl_ms for ttft, tpot in pairs)
    return met / len(outcome.ttft) if outcome.ttft else math.nan


def goodput(rungs: Sequence[Rung], slo: Slo) -> Goodput:
    return crossing([(rung.rate, rung.attainment(slo)) for rung in rungs])


def latencies(outcome: Outcome) -> dict[str, dict[str, float]]:
    """As bench.figures has them, in milliseconds."""
    columns = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2e": outcome.e2e}
    return {
        name: summary([value for value in column if not math.isnan(value)])
        for name, column in columns.items()
    }


def capacity(profile: Profile, lengths: Sequence[tuple[int, int]], workers: int) -> float:
    """Requests per second for which so many workers have time if nothing is cached: where to
    begin."""
    busy = max(1, profile.max_num_seqs // 4)
    spent = 0.0
    for length, output in lengths:
        step = profile.beside.decode_s(busy, busy * (length + output // 2))
        spent += profile.prompt_s(length, profile.beside) + output * step / busy
    return workers * len(lengths) / spent


class Search:
    """Simulations of one profile and load, in as many processes as there are cores."""

    def __init__(
        self, profile: Profile, load: Load, slo: Slo, rates: Sequence[float],
        progress: Callable[[int, int], None] = lambda done, of: None, *,
        fixed: bool = False, policy: str = "prefix",
        paced: Mapping[tuple[Topology, float], Profile] | None = None,
    ) -> None:  # fmt: skip
        """`rates`: ascending; `fixed`: and no others. `progress(done, of so many simulations)`.
        `policy`: the routers'. `paced`: the profile at some topologies and rates, if it differs."""
        self._paced = paced or {}
        self._profile, self._load, self._slo = profile, load, slo
        self._rates, self._fixed = list(rates), fixed
        self._progress = progress
        self._policy = policy
        self._done = self._asked = 0
        self.rungs: dict[Topology, list[Rung]] = {}
        self._pool = ProcessPoolExecutor(_cores(), initializer=die_with, initargs=(os.getpid(),))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def goodput(self, topology: Topology, slo: Slo | None = None) -> Goodput:
        return goodput(self.rungs[topology], slo or self._slo)

    def look_at(self, topologies: Iterable[Topology]) -> None:
        """Simulate these at all rates, and at higher ones while the highest is sustained."""
        new = [topology for topology in topologies if topology not in self.rungs]
        found = self._outcomes([(topology, rate) for topology in new for rate in self._rates])
        for topology in new:
            self.rungs[topology] = [Rung(rate, found[topology, rate]) for rate in self._rates]
        while not self._fixed and len(self._rates) < MOST_RUNGS:
            if not any(self.goodput(topology).at_least for topology in self.rungs):
                break
            self._rates.append(rounded(self._rates[-1] * HIGHER))
            self._catch_up()
        self._catch_up()

    def _catch_up(self) -> None:
        """Every topology is tried at every rate."""
        missing = [
            (topology, rate)
            for topology, rungs in self.rungs.items()
            for rate in self._rates[len(rungs) :]
        ]
        found = self._outcomes(missing)
        for topology, rate in missing:
            self.rungs[topology].append(Rung(rate, found[topology, rate]))

    def _outcomes(
        self, wanted: Sequence[tuple[Topology, float]]
    ) -> dict[tuple[Topology, float], Outcome]:
        asks = [
            Ask(
                self._paced.get((topology, rate), self._profile),
                topology,
                self._load,
                rate,
                self._policy,
            )
            for topology, rate in wanted
        ]
        self._asked += len(asks)
        found = {}
        for key, outcome in zip(wanted, self._pool.map(Ask.run, asks), strict=True):
            found[key] = outcome
            self._done += 1
            self._progress(self._done, self._asked)
        return found

    def best_split(self, workers: int) -> Topology:
        """The numbers of prefill and decode workers that serve most."""
        step = max(1, workers // FEW)
        self.look_at(Topology(prefill=p, decode=workers - p) for p in range(step, workers, step))
        while True:
            best = max(
                (one for one in self.rungs if one.prefill and not one.colocated),
                key=lambda one: self.goodput(one).rate,
            )
            if step == 1:
                return best
            step = (step + 1) // 2
            around = (best.prefill - step, best.prefill + step)
            self.look_at(Topology(prefill=p, decode=workers - p) for p in around if 0 < p < workers)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def splits(topologies: Iterable[Topology]) -> list[Topology]:
    """The pairs among them, by the number of prefill workers."""
    return sorted((one for one in topologies if one.prefill), key=lambda one: one.prefill)
