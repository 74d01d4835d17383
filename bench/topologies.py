"""Disaggregated against colocated in a minute: `python -P -m pdserve.bench.topologies`.

A fixed number of requests at a time, in alternation; prints output tok/s, TTFT, ITL, TPOT, KV bytes
moved and the CPU per token of the router and of the client, and says when the client was the
bottleneck. What holds under load, and whether a difference is more than noise,
is what `pdserve bench compare` tells.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Server, measure
from pdserve.bench.figures import Slo, bottleneck, figures
from pdserve.bench.machine import circumstances
from pdserve.bench.topology import NAME, Topology, up
from pdserve.bench.workloads import Shape, make

Row = dict[str, float]


def one_round(topology: Topology, options: Sequence[str], shape: Shape, at_once: int) -> Row:
    """Start, warm up, run the workload once, stop. Times in ms."""
    with up([*options, *topology.options()]) as cluster:
        server, arrivals = (
            Server(url=cluster.url, model=NAME),
            Arrivals(kind="closed", concurrency=at_once),
        )
        warm = dataclasses.replace(shape, requests=at_once, output_len=4, seed=shape.seed + 1)
        measure(server, make(warm), arrivals, seed=0)
        before = cluster.account()
        run = measure(server, make(shape), arrivals, seed=0)
        time.sleep(0.3)  # workers report their traffic ten times a second
        after = cluster.account()
    for message in {record.error for record in run.records if record.error}:
        print(f"{topology}: a request failed: {message}", file=sys.stderr)
    if limited := bottleneck(run):
        print(f"{topology}: {limited}", file=sys.stderr)
    found = figures(run, Slo())
    tokens = sum(len(record.token_times) for record in run.records)
    router = after.cpu_s["router"] - before.cpu_s["router"]
    latencies = {
        f"{name} {share}": found.latencies[name][share]
        for name in ("ttft", "itl", "tpot")
        for share in ("p50", "p99")
    }
    return {
        "output tok/s": found.output_tok_s,
        **latencies,
        "MiB moved": after.moved_mib - before.moved_mib,
        "router µs/token": router / max(tokens, 1) * 1e6,
        "client µs/token": run.client_cpu_s / max(tokens, 1) * 1e6,
        "failed": found.failed + found.rejected,
    }


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    """The median over rounds of each topology, and the ratio of the first to the last."""
    columns = list(next(iter(rows.values()))[0])
    lines = [f"{'':10}" + "".join(f"{name:>16}" for name in columns)]
    medians = {
        name: [statistics.median(row[column] for row in mine) for column in columns]
        for name, mine in rows.items()
    }
    for name, values in medians.items():
        lines.append(f"{name:10}" + "".join(f"{value:16.2f}" for value in values))
    if len(medians) > 1:
        first, *_, last = medians.values()
        pairs = zip(first, last, strict=True)
        ratios = "".join(f"{a / b:16.2f}" if b else f"{'-':>16}" for a, b in pairs)
        lines.append(f"{'ratio':10}{ratios}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m pdserve.bench.topologies", description=__doc__
    )
    parser.add_argument("--model", default="", help="folder or hub name (default: the demo model)")
    parser.add_argument("--requests", type=int, default=32, help="per round (default: 32)")
    parser.add_argument("--input-len", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--concurrency", type=int, default=8, help="at a time (default: 8)")
    parser.add_argument("--rounds", type=int, default=2, help="of each topology (default: 2)")
    parser.add_argument("--vocab", type=int, default=1000, help="prompt token ids lie under this")
    parser.add_argument("--topologies", nargs="+", type=Topology.parse,
                        default=[Topology.parse("1P+1D"), Topology.parse("1C")])  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file for figures and circumstances")
    args, more = parser.parse_known_args(argv)
    shape = Shape(
        kind="fixed",
        requests=args.requests,
        input_len=args.input_len,
        output_len=args.output_len,
        vocab=(10, args.vocab),
    )
    try:
        shape.check()
    except BenchError as error:
        parser.error(str(error))
    options = ([f"--model={args.model}"] if args.model else []) + more
    rows: dict[str, list[Row]] = {}
    for number in range(args.rounds):
        for topology in args.topologies:
            print(f"round {number + 1} of {args.rounds}: {topology} ...", file=sys.stderr)
            row = one_round(topology, options, shape, args.concurrency)
            rows.setdefault(str(topology), []).append(row)
    print(
        f"{args.requests} requests, {args.input_len} tokens in, {args.output_len} out, "
        f"{args.concurrency} at a time; times in ms, medians of {args.rounds} rounds"
    )
    print(table(rows))
    if args.out:
        asked = {name: str(value) for name, value in vars(args).items()}
        result = {"arguments": asked, "circumstances": circumstances(), "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["failed"] for mine in rows.values() for row in mine) else 0


if __name__ == "__main__":
    sys.exit(main())
