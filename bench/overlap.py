"""What hand-overs cost while others are served: `python -P -m pdserve.bench.overlap`.

Two clusters of one prefill and one decode worker, asked in alternation:

- *overlap*: prompts are computed in chunks, and their blocks travel meanwhile;
- *at the end*: prompts are computed in one step, so that nothing can travel before its end.

For each, the hand-over as the client sees it: from the first token of a long prompt (drawn by the
prefill worker) to the second (drawn by the decode worker), beside the pause between the second and
the third, which is a decode step. Then, with the first cluster, the pauses of short requests that
are being decoded while long prompts arrive: answered with one token (computed, but never handed
over) and with two (handed over), in alternating rounds. The difference is what an incoming transfer
and one more decoding request do to the decode worker's steps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench.arrivals import Arrivals
from pdserve.bench.client import Record, Server, drive
from pdserve.bench.figures import quantile
from pdserve.bench.machine import circumstances
from pdserve.bench.topology import NAME, Cluster, Topology, up
from pdserve.bench.workloads import Shape, make

PAIR = Topology(prefill=1, decode=1)
SETTLED = 20
"""First pauses of a stream that are left out: its own hand-over, and those of the others."""
Series = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one cluster; every prompt is another one, so that no cache helps."""

    up: Cluster
    vocab: tuple[int, int]
    length: int

    async def ask(
        self, seed: int, output_len: int, *, length: int = 0, count: int = 1
    ) -> list[Record]:
        shape = Shape(
            kind="fixed",
            requests=count,
            input_len=length or self.length,
            output_len=output_len,
            vocab=self.vocab,
            seed=seed,
        )
        server = Server(url=self.up.url, model=NAME)
        arrivals = Arrivals(kind="closed", concurrency=count)
        run = await drive(server, make(shape), arrivals, seed=seed)
        for record in run.records:
            if record.error:
                raise SystemExit(f"A request failed: {record.error}")
        return run.records


async def hand_overs(askers: dict[str, Asker], rounds: int) -> Series:
    """Seconds by cluster: to the first token, from the first to the second, to the third."""
    found: Series = {name: {"ttft": [], "hand-over": [], "step": []} for name in askers}
    for seed in range(-2, rounds):  # the first two warm up
        for name, asker in askers.items():
            (record,) = await asker.ask(1000 + seed, 3)
            if seed >= 0:
                first, second = record.gaps
                for what, value in (("ttft", record.ttft), ("hand-over", first), ("step", second)):
                    found[name][what].append(value)
    return found


async def pauses(asker: Asker, seed: int, streams: int, moved: bool) -> tuple[list[float], int]:
    """Pauses of `streams` decoding requests, in seconds, while long prompts come one after the
    other; and how many of those there were."""
    prompts = 0

    async def arrive() -> None:
        nonlocal prompts
        while True:
            await asker.ask(seed * 10_000 + prompts, 2 if moved else 1)
            prompts += 1

    arriving = asyncio.create_task(arrive())
    records = await asker.ask(seed, 200, length=16, count=streams)
    arriving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await arriving
    return [gap for record in records for gap in record.gaps[SETTLED:]], prompts


async def steps(asker: Asker, rounds: int, streams: int) -> Series:
    """By whether prompts are handed over: p50, p99 of the pauses and prompts, of each round."""
    found: Series = {name: {"p50": [], "p99": [], "prompts": []} for name in ("computed", "moved")}
    for number in range(rounds):
        for name in ("computed", "moved"):
            gaps, prompts = await pauses(asker, 7000 + number, streams, name == "moved")
            found[name]["p50"].append(quantile(sorted(gaps), 0.5))
            found[name]["p99"].append(quantile(sorted(gaps), 0.99))
            found[name]["prompts"].append(prompts)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m pdserve.bench.overlap", description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub name (default: the demo model)")
    parser.add_argument("--input-len", type=int, default=1024, help="tokens (default: 1024)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a step (default: 128)")
    parser.add_argument("--streams", type=int, default=4, help="being decoded (default: 4)")
    parser.add_argument("--rounds", type=int, default=10, help="of each (default: 10)")
    parser.add_argument("--vocab", type=int, default=1000, help="prompt token ids lie under this")
    parser.add_argument("--out", type=Path, help="JSON file for figures and circumstances")
    args, more = parser.parse_known_args(argv)
    common = [
        *PAIR.options(),
        "--disaggregate=always",
        *([f"--model={args.model}"] if args.model else []),
        *more,
    ]
    vocab = (10, args.vocab)

    def chunks(size: int) -> list[str]:
        return [*common, "--max-num-batched-tokens", str(size)]

    with up(chunks(args.chunk)) as first, up(chunks(args.input_len + 64)) as second:
        askers = {
            "overlap": Asker(first, vocab, args.input_len),
            "at the end": Asker(second, vocab, args.input_len),
        }
        handed = asyncio.run(hand_overs(askers, args.rounds))
        paused = asyncio.run(steps(askers["overlap"], max(2, args.rounds // 3), args.streams))
        moved = {name: asker.up.moved_mib() for name, asker in askers.items()}
    print(f"prompts of {args.input_len} tokens; ms, medians (and worst) of {args.rounds} rounds")
    for name, figures in handed.items():
        told = "  ".join(
            f"{what} {statistics.median(values) * 1e3:.1f} ({max(values) * 1e3:.1f})"
            for what, values in figures.items()
        )
        print(f"  {name:<12}{told}  MiB moved {moved[name]:.0f}")
    print(f"pauses of {args.streams} decoding requests while such prompts arrive; ms, per round")
    for name, figures in paused.items():
        p50, p99 = ([f"{value * 1e3:.1f}" for value in figures[key]] for key in ("p50", "p99"))
        prompts = sum(int(count) for count in figures["prompts"])
        print(f"  {name:<12}p50 {' '.join(p50)}  p99 {' '.join(p99)}  prompts {prompts}")
    if args.out:
        asked = {name: str(value) for name, value in vars(args).items()}
        result = {"arguments": asked, "circumstances": circumstances(), "hand_overs": handed}
        result |= {"pauses": paused, "mib": moved}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
