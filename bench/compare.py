"""`pdserve bench compare`: the same load on several topologies of this machine, and who wins.

Starts each topology with all cores and the same memory, in alternation and more than once, and the
first of them twice per round: what it differs from itself is noise. Goes on below and above the
first rates where these do not tell who serves how much. Writes a folder with every
token's time, a report (HTML, Markdown) and plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench import report
from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Run, Server, measure
from pdserve.bench.figures import Slo, bottleneck, figures
from pdserve.bench.machine import circumstances
from pdserve.bench.phases import HEADER, mean_phases
from pdserve.bench.reference import Pace, mean, pace
from pdserve.bench.serve import (
    EXIT_FAILED,
    EXIT_USAGE,
    ProgressBar,
    add_load_options,
    document,
    finite,
    load_of,
    settings_of,
)
from pdserve.bench.topology import NAME, Cluster, Topology, up
from pdserve.bench.verdict import Cell, further, rates_of, rounded, sentences
from pdserve.bench.workloads import Job, make

RESTART_S, PACE_S = 6.0, 1.5
"""Between two topologies, and between two rates, in the estimate of how long it all takes."""
PROBE_CONCURRENCY = 16
PROBE_REQUESTS = 32
ALONE_REQUESTS = 12
TTFT_SLACK, ITL_SLACK = 5.0, 2.0
"""Targets where none are given, as multiples of an undisturbed request's (DistServe and Splitwise
use 2 to 6 times, too). For the first token of one with a long prompt, which nine of ten do not
exceed, since nine of ten are to meet the target."""
LEAST_TTFT_MS, LEAST_ITL_MS = 100.0, 5.0
"""But no less than this: nobody notices what is faster, and a small model's noise would decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is the same for all topologies."""

    jobs: tuple[Job, ...]
    arrivals: Arrivals
    rates: tuple[float, ...]
    slo: Slo
    seed: int
    options: tuple[str, ...]
    """Of `pdserve up`."""
    kv_total: int


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="pdserve bench compare",
        description=__doc__,
        epilog="Further options go to `pdserve up`, the same for every topology.",
    )
    found.add_argument(
        "--topologies",
        default="1P+1D,2C",
        help="of P prefill, D decode, C colocated workers; the first one is measured against "
        "itself, too (default: 1P+1D,2C)",
    )
    found.add_argument("--model", default="", help="folder or hub name (default: demo model)")
    found.add_argument(
        "--rates", default="", help="requests per second, a list (default: from a probe)"
    )
    found.add_argument(
        "--rungs", type=int, default=4, help="rates that are tried if none are given (default: 4)"
    )
    for name, share, what in (
        ("lowest", 0.0, "0: as far above nothing as they are from each other"),
        ("highest", 1.0, "above 1 where other topologies may do more"),
    ):
        found.add_argument(
            f"--{name}",
            type=float,
            default=share,
            metavar="SHARE",
            help=f"{name} of these rates, as a share of what the first topology does when it is "
            f"never idle; {what} (default: {share:g})",
        )
    found.add_argument(
        "--more-rungs",
        type=int,
        default=3,
        metavar="N",
        help="at most so many rates below or above these, where a topology fails at the lowest or "
        "does not at the highest; with --rates none (default: 3)",
    )
    found.add_argument("--rounds", type=int, default=2, help="of every topology (default: 2)")
    found.add_argument(
        "--kv-total", type=int, default=1024, help="KV cache of all workers, MiB (default: 1024)"
    )
    found.add_argument("--out", type=Path, default=Path("bench-compare"), help="folder")
    add_load_options(found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args, more = parser().parse_known_args(argv)
    try:
        topologies = [Topology.parse(text) for text in args.topologies.split(",")]
        if len(set(map(str, topologies))) < len(topologies):
            raise BenchError("--topologies names one twice; the first is repeated by itself.")
        for name in ("rungs", "rounds", "kv_total"):
            if getattr(args, name) < 1:
                option = name.replace("_", "-")
                raise BenchError(f"--{option} must be at least 1, not {getattr(args, name)}.")
        if args.more_rungs < 0:
            raise BenchError(f"--more-rungs must be at least 0, not {args.more_rungs}.")
        if not 0 <= args.lowest < args.highest < math.inf:
            raise BenchError(
                f"--lowest ({args.lowest:g}) must be at least 0 and below --highest "
                f"({args.highest:g})."
            )
        cells, plan = _measure_all(topologies, args, more)
    except BenchError as error:
        print(f"pdserve bench compare: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    verdict = sentences(cells, plan.slo, args.workload)
    content = {
        "command": ["pdserve", "bench", "compare", *(sys.argv[2:] if argv is None else argv)],
        "circumstances": circumstances(),
        "slo": finite(dataclasses.asdict(plan.slo)),
        "rates": rates_of(cells),
        "verdict": verdict,
        "cells": [finite(dataclasses.asdict(cell)) for cell in cells],
    }
    (args.out / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
    print(report.write(args.out, cells, plan.slo, args.workload, content))
    failed = sum(cell.figures.failed for cell in cells)
    return EXIT_FAILED if failed else 0


def _measure_all(
    topologies: Sequence[Topology], args: argparse.Namespace, more: Sequence[str]
) -> tuple[list[Cell], Plan]:
    plan = _plan(topologies, args, more)
    args.out.mkdir(parents=True, exist_ok=True)
    cells = _measure(topologies, plan, args)
    for _ in range(0 if args.rates else args.more_rungs):
        rate = further(cells)
        if not rate:
            break
        _say(f"{rate:g} requests per second, too, since the others do not tell enough")
        cells += _measure(topologies, dataclasses.replace(plan, rates=(rate,)), args)
    return cells, plan


def _measure(topologies: Sequence[Topology], plan: Plan, args: argparse.Namespace) -> list[Cell]:
    starts = args.rounds * (len(topologies) + 1)
    tried = ", ".join(f"{rate:g}" for rate in plan.rates)
    _say(
        f"about {minutes(plan, starts):.1f} minutes: {starts} starts of a topology, {tried} "
        "requests per second at each"
    )
    cells: list[Cell] = []
    for number in range(args.rounds):
        # Every second round backwards, so that a drift of the machine hits all alike.
        order = [(topology, False) for topology in topologies] + [(topologies[0], True)]
        for topology, twin in order if number % 2 == 0 else reversed(order):
            title = f"round {number + 1} of {args.rounds}: {topology}"
            _say(title + (" again, for the noise" if twin else ""))
            with up([*plan.options, *topology.options(plan.kv_total)]) as cluster:
                _warm_up(cluster, plan)
                before = _pace(cluster, plan, topology, number, 0.0, args)
                for rate in plan.rates:
                    cell = _cell(cluster, plan, topology, twin, number, rate, args)
                    after = _pace(cluster, plan, topology, number, rate, args)
                    cells.append(dataclasses.replace(cell, pace=mean((before, after))))
                    before = after
    return cells


def _plan(topologies: Sequence[Topology], args: argparse.Namespace, more: Sequence[str]) -> Plan:
    """Targets and rates that were not given come from probes."""
    shape, arrivals, slo = load_of(args)
    if arrivals.kind in ("closed", "ramp"):
        raise BenchError(f"--arrivals {arrivals.kind} has no ladder of rates to compare.")
    options = ([f"--model={args.model}"] if args.model else []) + list(more)
    plan = Plan(
        jobs=tuple(make(shape)),
        arrivals=arrivals,
        rates=rates_given(args.rates),
        slo=slo,
        seed=args.seed,
        options=tuple(options),
        kv_total=args.kv_total << 20,
    )
    if plan.rates and math.isfinite(slo.ttft_ms) and math.isfinite(slo.itl_ms):
        return plan
    alone, capacity = [], 0.0
    for topology in topologies:
        _say(f"probing {topology}")
        with up([*options, *topology.options(plan.kv_total)]) as cluster:
            _warm_up(cluster, plan)
            one = Arrivals(kind="closed", concurrency=1)
            alone.append(figures(_run(cluster, plan.jobs[:ALONE_REQUESTS], one, 0), slo).latencies)
            if not capacity:
                many = Arrivals(kind="closed", concurrency=PROBE_CONCURRENCY)
                run = _run(cluster, plan.jobs[:PROBE_REQUESTS], many, 0, "capacity")
                capacity = len(run.records) / run.wall_s
    ttft, itl = (
        min(each[name][share] for each in alone)
        for name, share in (("ttft", "p90"), ("tpot", "p50"))
    )
    return dataclasses.replace(
        plan,
        rates=plan.rates or ladder(capacity * args.lowest, capacity * args.highest, args.rungs),
        slo=targets(slo, ttft, itl),
    )


def targets(given: Slo, ttft_ms: float, itl_ms: float) -> Slo:
    """What was given, and for the rest what follows from an undisturbed request's times."""
    ttft, itl = max(ttft_ms * TTFT_SLACK, LEAST_TTFT_MS), max(itl_ms * ITL_SLACK, LEAST_ITL_MS)
    return Slo(
        ttft_ms=given.ttft_ms if math.isfinite(given.ttft_ms) else ttft,
        itl_ms=given.itl_ms if math.isfinite(given.itl_ms) else itl,
    )


def ladder(lowest: float, highest: float, rungs: int) -> tuple[float, ...]:
    """`rungs` rates up to the highest, at equal distances, to three digits; the lowest is the first
    of them, or, if it is 0, what comes before the first."""
    first = highest if rungs == 1 else lowest or highest / rungs
    step = (highest - first) / max(1, rungs - 1)
    return tuple(rounded(first + step * number) for number in range(rungs))


def minutes(plan: Plan, starts: int) -> float:
    """How long so many starts of a topology take, each at every rate."""
    arriving = sum(PACE_S + len(plan.jobs) / rate for rate in plan.rates)
    return starts * (RESTART_S + arriving) / 60


def rates_given(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted(float(word) for word in text.replace(",", " ").split()))
    except ValueError:
        raise BenchError(f"--rates must be numbers, not {text!r}.") from None
    if any(not 0 < rate < math.inf for rate in rates):
        raise BenchError(f"--rates must be above 0, not {text!r}.")
    return rates


def _run(
    cluster: Cluster, jobs: Sequence[Job], arrivals: Arrivals, seed: int, salt: str = "probe"
) -> Run:
    """`salt`: runs with different ones find nothing of each other in the prefix cache."""
    server = Server(url=cluster.url, model=NAME, headers=HEADER, extra={"cache_salt": salt})
    bar = ProgressBar(len(jobs))
    run = measure(server, jobs, arrivals, seed=seed, progress=bar.show)
    bar.end()
    return run


def _warm_up(cluster: Cluster, plan: Plan) -> None:
    jobs = [
        dataclasses.replace(job, output_len=4, follows=None)
        for job in plan.jobs[:PROBE_CONCURRENCY]
    ]
    run = _run(cluster, jobs, Arrivals(kind="closed", concurrency=4), 0, "warm-up")
    for record in run.records:
        if record.error:
            raise BenchError(f"The cluster does not serve this workload: {record.error}")


def at_rate(plan: Plan, rate: float) -> Arrivals:
    """The arrivals of a rung: a trace is stretched, the others have a rate of their own."""
    if plan.arrivals.kind != "trace":
        return dataclasses.replace(plan.arrivals, rate=rate)
    span = max(job.offset or 0.0 for job in plan.jobs)
    if not span:
        raise BenchError("The trace's requests all come at once; take another one, or --arrivals.")
    return dataclasses.replace(plan.arrivals, time_scale=len(plan.jobs) / rate / span)


def _pace(
    cluster: Cluster,
    plan: Plan,
    topology: Topology,
    number: int,
    rate: float,
    args: argparse.Namespace,
) -> Pace:
    """How fast the machine is just now."""
    salt = f"pace-{rate:g}"
    server = Server(url=cluster.url, model=NAME, headers=HEADER, extra={"cache_salt": salt})
    return pace(server, topology, args.vocab, plan.seed + number)


def _cell(
    cluster: Cluster,
    plan: Plan,
    topology: Topology,
    twin: bool,
    number: int,
    rate: float,
    args: argparse.Namespace,
) -> Cell:
    before = cluster.account()
    run = _run(cluster, plan.jobs, at_rate(plan, rate), plan.seed, f"rate-{rate:g}")
    time.sleep(0.3)  # workers report their traffic ten times a second
    after = cluster.account()
    cell = Cell(
        topology=str(topology),
        twin=twin,
        round=number,
        rate=rate,
        figures=figures(run, plan.slo),
        phases=mean_phases(record.timings for record in run.records if record.timings),
        cpu_s={name: total - before.cpu_s.get(name, 0.0) for name, total in after.cpu_s.items()},
        memory_mib=after.memory_mib,
        moved_mib=after.moved_mib - before.moved_mib,
        limited=bottleneck(run),
    )
    settings = {**settings_of(args), "topology": str(topology), "rate": rate}
    name = f"{topology}{'-again' if twin else ''}-round{number + 1}-rate{rate:g}.json"
    content = document(run, cell.figures, cell.limited, settings, cluster.url)
    (args.out / name).write_text(json.dumps(content) + "\n")
    return cell


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
