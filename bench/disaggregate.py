"""Whether handing prompts over pays: `python -P -m pdserve.bench.disaggregate`.

The same open load on the same topology with `--disaggregate` always, auto and never, in
alternation: what a client waits for the first token and between tokens, and the KV bytes that
moved. Under `auto` what was measured decides for each prompt, so each cluster is warmed up first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from pdserve.bench.arrivals import Arrivals
from pdserve.bench.client import Server, drive
from pdserve.bench.figures import Slo, figures
from pdserve.bench.machine import circumstances
from pdserve.bench.topology import NAME, Cluster, Topology, up
from pdserve.bench.workloads import Shape, make

MODES = ("always", "auto", "never")
SHOWN = (("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"))
WARM_UP = 24
"""Requests, half of which suffice for a prediction."""
Row = dict[str, float]


def loaded(cluster: Cluster, args: argparse.Namespace, rate: float, seed: int, count: int) -> Row:
    """One run; times in ms."""
    shape = Shape(
        kind=args.workload,
        requests=count,
        input_len=args.input_len,
        output_len=args.output_len,
        vocab=(10, args.vocab),
        seed=seed,
    )
    before = cluster.moved_mib()
    server = Server(url=cluster.url, model=NAME)
    run = asyncio.run(drive(server, make(shape), Arrivals(kind="poisson", rate=rate), seed=seed))
    found = figures(run, Slo())
    row = {f"{name} {share}": found.latencies[name][share] for name, share in SHOWN}
    return row | {
        "MiB moved": cluster.moved_mib() - before,
        "failed": float(found.failed + found.rejected),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m pdserve.bench.disaggregate", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", default="", help="folder or hub name (default: the demo model)")
    parser.add_argument("--topology", default="1P+1D", help="default: 1P+1D")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5, 3.5, 5.0],
                        help="requests per second (default: 1.5 3.5 5)")  # fmt: skip
    parser.add_argument("--requests", type=int, default=40, help="of a run (default: 40)")
    parser.add_argument("--workload", default="fixed", choices=("fixed", "random"))
    parser.add_argument("--input-len", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--vocab", type=int, default=1000, help="prompt token ids lie under this")
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--out", type=Path, help="JSON file for figures and circumstances")
    args, more = parser.parse_known_args(argv)
    options = [*Topology.parse(args.topology).options(), *more]
    options += [f"--model={args.model}"] if args.model else []
    found: dict[str, dict[str, list[Row]]] = {
        str(rate): {mode: [] for mode in args.modes} for rate in args.rates
    }
    for number in range(args.rounds):
        for mode in args.modes:
            with up([*options, f"--disaggregate={mode}"]) as cluster:
                loaded(cluster, args, min(args.rates), 1000, WARM_UP)
                for rate in args.rates:
                    seed = number * 100 + round(10 * rate)
                    found[str(rate)][mode].append(loaded(cluster, args, rate, seed, args.requests))
            print(f"round {number + 1}: {mode}", file=sys.stderr)
    print(f"{args.topology}, {args.input_len} tokens in, {args.output_len} out; ms, medians")
    for rate, modes in found.items():
        for mode, rows in modes.items():
            told = "  ".join(
                f"{name} {statistics.median(row[name] for row in rows):.1f}" for name in rows[0]
            )
            print(f"  {rate}/s {mode:<7} {told}")
    if args.out:
        asked = {name: str(value) for name, value in vars(args).items()}
        result = {"arguments": asked, "circumstances": circumstances(), "rows": found}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
