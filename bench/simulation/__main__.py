"""`pdserve simulate`: which topology serves a workload best, on a cluster that nobody has to build.

Runs the product's own scheduler and placement over the step times that `pdserve bench profile` has
measured. Finds the split of the workers into prefill and decode that serves most within the
targets, compares it with all of them colocated, and replays a trace on the whole cluster. Writes a
folder with a report (HTML, Markdown), plots and JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from pdserve.bench import report
from pdserve.bench.arrivals import BenchError
from pdserve.bench.compare import ITL_SLACK, TTFT_SLACK, ladder, rates_given
from pdserve.bench.figures import Slo, quantile
from pdserve.bench.machine import circumstances
from pdserve.bench.serve import EXIT_USAGE, ProgressBar, add_load_options, finite, load_of
from pdserve.bench.simulation import against, pictures, words
from pdserve.bench.simulation.against import take_over
from pdserve.bench.simulation.cluster import Outcome, Simulation
from pdserve.bench.simulation.load import TRACES, Load
from pdserve.bench.simulation.profile import Profile, load, mean
from pdserve.bench.simulation.search import Search, attainment, capacity, latencies
from pdserve.bench.topology import Topology
from pdserve.bench.workloads import MOONCAKE_BLOCK, Shape, rows_of

PROFILES = Path(__file__).parents[1] / "profiles"
SAMPLE = 32
"""Larger clusters are searched on so many workers: placement looks at no more than 64 at once, so
what a worker sees does not depend on how many there are beside them."""
RUNGS = 10
TOP = 1.3
"""The highest rate that is tried at first, as a share of what the workers have time for."""
LONG_SLACK = 1.5
"""Targets where none are given: no less than so many times what the longest twentieth takes
alone."""
PER_WORKER = 40
"""Requests per worker and simulated rate, where nobody says how many."""
BUSY = 0.7
"""A replay asks for so much of what was found to be the most."""
MOST = 200_000
"""Requests of a replay, unless --rate-scale is given."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="pdserve simulate", description=__doc__)
    add = found.add_argument
    add("--workers", type=int, default=8, help="how many, GPUs for instance (default: 8)")
    add("--topologies", default="", help="only these, like 1P+1D,2C (default: the best split)")
    add("--profile", nargs="+", default=["cpu-mid"], help="file of `pdserve bench profile`, or the "
        "name of one that comes along: "
        + ", ".join(sorted(p.stem for p in PROFILES.glob("*.json")))
        + " (default: cpu-mid); of several, made at different times, the mean")  # fmt: skip
    add("--kv-tokens", type=int, default=0, help="KV cache of a worker (default: the profile's)")
    add("--max-num-batched-tokens", type=int, default=0, help="of a step (default: the profile's)")
    add("--block-size", type=int, default=0, help="tokens of a KV block (default: the profile's; "
        "what a hash of the trace stands for, if that is known)")  # fmt: skip
    add("--routing-policy", default="prefix", choices=("prefix", "least-load"), help="of the "
        "routers (default: prefix)")  # fmt: skip
    add("--rates", default="", help="requests per second, a list (default: found by trying)")
    add("--rate-scale", type=float, default=0.0, help="replay: the trace's requests so many times "
        f"(default: {BUSY:g} of what the cluster serves, at most {MOST:,} requests)")  # fmt: skip
    add("--no-replay", action="store_true", help="do not replay the trace on the whole cluster")
    add("--against", type=Path, help="folder of `bench compare`: predict what was measured there")
    add("--out", type=Path, default=Path("simulation"), help="folder (default: simulation)")
    add_load_options(found)
    for action in found._actions:
        if action.dest == "trace":
            action.type, action.help = str, f"{' or '.join(TRACES)}, or a file of that workload"
        if action.dest == "length_scale":
            action.default, action.help = (
                0.0,
                (
                    "traces: lengths are divided by this (default: the power of two with which "
                    "every request fits the profile's model)"
                ),
            )
        if action.dest == "requests":
            action.default, action.help = (
                0,
                f"of each simulation (default: {PER_WORKER} per worker)",
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        print(_Study(args).report(sys.argv[1:] if argv is None else argv))
    except BenchError as error:
        print(f"pdserve simulate: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


class _Study:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises BenchError for options that make no sense."""
        self._args = args
        profile = _profile(args)
        self.measured = take_over(args, args.against, profile.workers) if args.against else []
        if args.workers < 1:
            raise BenchError(f"--workers must be at least 1, not {args.workers}.")
        if args.rate_scale < 0 or not math.isfinite(args.rate_scale):
            raise BenchError(f"--rate-scale must be above 0, not {args.rate_scale}.")
        named = [Topology.parse(text) for text in filter(None, args.topologies.split(","))]
        self.workers = max((one.workers for one in named), default=args.workers)
        self.sample = self.workers if named else min(self.workers, SAMPLE)
        self.named = named
        if args.trace in TRACES:
            args.workload, args.trace = args.trace, None
        given = args.length_scale
        args.trace = Path(args.trace) if args.trace else None
        args.requests = args.requests or PER_WORKER * max(self.sample, 4)
        args.length_scale = args.length_scale or 1.0
        shape, arrivals, slo = load_of(args)
        if not given and shape.kind in TRACES:
            scale = _fitting(profile, shape)
            shape = dataclasses.replace(shape, length_scale=scale)
        self.profile = _in_blocks(profile, args.block_size, shape)
        self.load = Load(
            shape=shape, arrivals=arrivals, seed=args.seed, block_size=self.profile.block_size
        )
        self.load.check()
        self.lengths = self.load.lengths()
        if not self.lengths:
            raise BenchError("The workload has no requests: see --trace and --max-len.")
        self.slo = self._targets(slo)

    def _targets(self, slo: Slo) -> Slo:
        """Those that were not given: as `bench compare`, from requests that are alone; but no less
        than that nearly all of the longest can meet."""
        alone = [self.profile.alone_s(*lengths) for lengths in self.lengths]
        ttft, tpot = (
            sorted(1e3 * value for value in column) for column in zip(*alone, strict=True)
        )
        ttft_ms, itl_ms = (
            max(slack * quantile(values, 0.5), LONG_SLACK * quantile(values, 0.95))
            for slack, values in ((TTFT_SLACK, ttft), (ITL_SLACK, tpot))
        )
        return Slo(
            ttft_ms=slo.ttft_ms if math.isfinite(slo.ttft_ms) else ttft_ms,
            itl_ms=slo.itl_ms if math.isfinite(slo.itl_ms) else itl_ms,
        )

    def _rates(self) -> tuple[float, ...]:
        given = rates_given(self._args.rates)
        return given or ladder(0.0, TOP * capacity(self.profile, self.lengths, self.sample), RUNGS)

    def report(self, argv: Sequence[str]) -> str:
        """Search, replay, write the folder; returns text for a terminal."""
        begun = time.monotonic()
        bar = ProgressBar(0)
        paced = against.paced(self.profile, self.measured)
        with Search(
            self.profile, self.load, self.slo, self._rates(), bar.show_of,
            fixed=bool(self._args.rates), policy=self._args.routing_policy,
            paced=paced,
        ) as search:  # fmt: skip
            duel, shown = self._search(search)
            bar.end()
            verdict = []
            if self.measured:
                verdict.append(against.verdict(search, self.measured, self.profile, paced))
            verdict += words.opening(duel, self._whole, self.load.shape.kind)
            verdict += [*words.when(duel), words.why(duel, shown)]
            verdict.append(self._said(search, time.monotonic() - begun))
            runs = self._replay(duel, search, shown, verdict)
            return self._write(argv, duel, shown, runs, [text for text in verdict if text])

    def _search(self, search: Search) -> tuple[words.Duel, dict[Topology, str]]:
        if self.named:
            search.look_at(self.named)
            pairs = [one for one in self.named if one.prefill]
            others = [one for one in self.named if not one.prefill]
            order = sorted(self.named, key=lambda one: -search.goodput(one).rate)
            split = max(pairs or order, key=lambda one: search.goodput(one).rate)
            other = max(others or order[::-1], key=lambda one: search.goodput(one).rate)
        else:
            other = Topology(colocated=self.sample)
            search.look_at([other])
            split = other if self.sample < 2 else search.best_split(self.sample)
        shown = {one: str(self._whole(one)) for one in search.rungs}
        return words.Duel(search, split, other, self.slo), shown

    def _whole(self, topology: Topology) -> Topology:
        """What stands for it in the whole cluster."""
        if self.sample == self.workers or self.named:
            return topology
        if topology.colocated:
            return Topology(colocated=self.workers)
        prefill = round(topology.prefill * self.workers / self.sample)
        return Topology(prefill=prefill, decode=self.workers - prefill)

    def _said(self, search: Search, spent_s: float) -> str:
        step, shape = self.profile, self.load.shape
        found = (
            f"Simulated from the step times of {step.model} ({step.dtype} on {step.device}, "
            f"{step.kv_tokens:,} tokens of KV per worker, {step.workers} on each machine): "
            f"{len(search.rungs)} topologies at "
            f"{len(next(iter(search.rungs.values())))} rates with {shape.requests} requests each, "
            f"in {spent_s:.0f} s"
        )
        if shape.length_scale != 1:
            found += f"; the trace's lengths divided by {shape.length_scale:g}"
        if self.sample < self.workers:
            found += (
                f"; on {self.sample} workers, which stand for the {self.workers:,} "
                f"(their rates below: for the whole cluster × {self.workers / self.sample:g})"
            )
        return found + "."

    def _replay(
        self, duel: words.Duel, search: Search, shown: dict[Topology, str], verdict: list[str]
    ) -> list[tuple[str, Outcome]]:
        """The whole trace on the whole cluster, under the better topology."""
        if not self.load.traced or self._args.no_replay:
            return []
        rows = list(self.load.replay(1.0))
        rate = len(rows) / max(rows[-1].at, 1.0)
        most = search.goodput(duel.winner).rate * self.workers / self.sample
        copies = self._args.rate_scale or min(BUSY * most / rate, MOST / len(rows))
        if not copies:
            return []
        topology = self._whole(duel.winner)
        total = round(copies * len(rows))
        bar = ProgressBar(total)
        begun = time.monotonic()
        simulation = Simulation(
            self.profile, topology, seed=self._args.seed, policy=self._args.routing_policy
        )
        outcome = simulation.run(self.load.replay(copies), bar.show)
        bar.end()
        title = f"{topology}, trace × {copies:.3g}"
        ttft = latencies(outcome)["ttft"]
        verdict.append(
            f"The whole trace ({rows[-1].at / 60:.0f} minutes, {len(rows):,} requests), "
            f"{copies:.3g} times at once with other prompts and other moments "
            f"({len(outcome.ttft):,} requests, {copies * rate:.3g} per second, "
            f"{copies * rate / most:.0%} of what the cluster is found to serve), on {topology}: "
            f"{attainment(outcome, self.slo):.1%} met the "
            f"targets, first token p50 {ttft['p50']:.0f} ms and p99 {ttft['p99']:.0f} ms; "
            f"simulated in {time.monotonic() - begun:.0f} s."
        )
        return [(title, outcome)]

    def _write(
        self,
        argv: Sequence[str],
        duel: words.Duel,
        shown: dict[Topology, str],
        runs: Sequence[tuple[str, Outcome]],
        verdict: Sequence[str],
    ) -> str:
        folder, search = self._args.out, duel.search
        content: dict[str, Any] = {
            "command": ["pdserve", "simulate", *argv],
            "circumstances": circumstances(),
            "profile": {**msgspec.to_builtins(self.profile), "measured": "left out"},
            "slo": finite(dataclasses.asdict(self.slo)),
            "verdict": verdict,
            "goodput": {shown[one]: search.goodput(one).rate for one in search.rungs},
            "cells": [
                {"topology": str(one), "rate": rung.rate, "attainment": rung.attainment(self.slo),
                 "latencies": finite(latencies(rung.outcome)), "phases": rung.outcome.phases,
                 "busy": rung.outcome.busy}
                for one, rungs in search.rungs.items() for rung in rungs
            ],
        }  # fmt: skip
        drawn = {
            "goodput": pictures.goodputs(duel, shown),
            "attainment": pictures.attainment(search, self.slo, shown),
            "targets": pictures.map_of(duel, shown),
        }
        if runs:
            drawn["hour"] = pictures.hour(runs)
        best = search.goodput(duel.winner).rate
        looked = [
            (f"{shown[one]} at {rung.rate:g}/s", rung.outcome)
            for one in dict.fromkeys((duel.split, duel.colocated))
            for rung in search.rungs[one]
            if rung.rate <= best * 1.2
        ]
        tables = {
            "Goodput": words.table(search, self.slo, shown),
            "Runs": words.run_table([*looked, *runs], self.slo),
        }
        if self.measured:
            tables["Predicted and measured"] = against.table(search, self.measured)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "simulation.json").write_text(json.dumps(content, indent=1) + "\n")
        return report.write_page(
            folder, f"pdserve: {self.load.shape.kind}, simulated",
            f"How to use {self.workers:,} workers for {self.load.shape.kind}",
            content, drawn, tables,
        )  # fmt: skip


def _profile(args: argparse.Namespace) -> Profile:
    """The profile that was asked for. Raises BenchError."""
    shipped = [PROFILES / f"{name}.json" for name in args.profile]
    files = [
        one if one.exists() else Path(name) for one, name in zip(shipped, args.profile, strict=True)
    ]
    found = mean([load(file) for file in files])
    blocks = args.kv_tokens // found.block_size if args.kv_tokens else found.num_blocks
    if blocks < 1:
        raise BenchError(
            f"--kv-tokens ({args.kv_tokens}) must be at least a block of {found.block_size}."
        )
    most = args.max_num_batched_tokens or found.max_num_batched_tokens
    if most < found.max_num_seqs:
        raise BenchError(
            f"--max-num-batched-tokens ({most}) must be at least the {found.max_num_seqs} requests "
            "of a step."
        )
    return msgspec.structs.replace(found, num_blocks=blocks, max_num_batched_tokens=most)


def _fitting(profile: Profile, shape: Shape) -> float:
    """The least power of two by which a trace's lengths are to be divided so that all fit."""
    room = min(profile.kv_tokens, profile.max_model_len)
    longest = max((row.input_len + row.output_len for row in rows_of(shape)), default=1)
    return 2.0 ** max(0, math.ceil(math.log2(longest / room)))


def _in_blocks(profile: Profile, size: int, shape: Shape) -> Profile:
    """With KV blocks of another size; 0: as a trace's hashes cut its prompts, since smaller ones
    know no more."""
    if not size and shape.kind == "mooncake-conversation":
        size = max(profile.block_size, round(MOONCAKE_BLOCK / shape.length_scale))
    if not size:
        return profile
    if size > profile.kv_tokens:
        raise BenchError(f"--block-size ({size}) is more than the {profile.kv_tokens} of KV.")
    return msgspec.structs.replace(profile, block_size=size, num_blocks=profile.kv_tokens // size)


if __name__ == "__main__":
    sys.exit(main())
