"""Disaggregated against colocated, in one run: `python -P -m pdserve.bench.topologies`.

Starts each topology with all cores of the machine, sends the same requests, and repeats that in
alternation. Prints output tok/s, TTFT, ITL, KV bytes moved, and the router's CPU per token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pdserve.bench.load import Record, Workload, percentile, run

TOPOLOGIES = {
    "1P+1D": ("--prefill", "1", "--decode", "1"),
    "colocated": ("--colocated", "1"),
}
READY_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One topology, one round. Times in milliseconds."""

    topology: str
    output_tok_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    mib_moved: float
    router_us_per_token: float
    failed: int


@dataclass(frozen=True, slots=True)
class Up:
    """A running `pdserve up`."""

    process: subprocess.Popen[str]
    url: str

    def status(self) -> list[dict[str, object]]:
        command = [*PDSERVE, "status", "--json", "--pid", str(self.process.pid)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        workers: list[dict[str, object]] = json.loads(text)["workers"]
        return workers

    def bytes_moved(self) -> float:
        total = 0.0
        for worker in self.status():
            address = f"http://{worker['host']}:{worker['http_port']}/metrics"
            with urllib.request.urlopen(address, timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if line.startswith("pdserve_worker_bytes_in"):
                        total += float(line.rpartition(" ")[2])
        return total

    def router_cpu_s(self) -> float:
        """User and system seconds of the router process so far."""
        for child in _children(self.process.pid):
            if b"pdserve.router" in Path(f"/proc/{child}/cmdline").read_bytes():
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        raise RuntimeError("The launcher has no router among its children.")


PDSERVE = (sys.executable, "-P", "-m", "pdserve.cluster.main")


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(text) for task in tasks for text in task.read_text().split()]


@contextlib.contextmanager
def up(options: Sequence[str]) -> Iterator[Up]:
    """Start a cluster, wait until it is ready, stop it at the end."""
    process = subprocess.Popen(
        [*PDSERVE, "up", "--port", "0", "--served-model-name", "bench", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Up(process, _ready_url(process))
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + READY_TIMEOUT_S
    for line in process.stdout:
        if line.startswith("ready "):
            return line.split()[1]
        if time.monotonic() > deadline:
            break
    raise RuntimeError("The cluster did not become ready; its messages are above.")


def measure(name: str, options: Sequence[str], workload: Workload) -> Figures:
    """Start, warm up, run the workload once, stop."""
    with up([*options, *TOPOLOGIES[name]]) as cluster:
        warm_up = Workload(
            requests=workload.concurrency,
            input_len=workload.input_len,
            output_len=4,
            concurrency=workload.concurrency,
            vocab=workload.vocab,
            seed=workload.seed + 1,
        )
        asyncio.run(run(cluster.url, "bench", warm_up))
        cpu, moved, begun = cluster.router_cpu_s(), cluster.bytes_moved(), time.perf_counter()
        records = asyncio.run(run(cluster.url, "bench", workload))
        wall = time.perf_counter() - begun
        cpu = cluster.router_cpu_s() - cpu
        time.sleep(0.3)  # workers report their traffic ten times a second
        moved = cluster.bytes_moved() - moved
    return figures(name, records, wall, cpu, moved)


def figures(name: str, records: list[Record], wall: float, cpu: float, moved: float) -> Figures:
    for message in {record.error for record in records if record.error}:
        print(f"{name}: a request failed: {message}", file=sys.stderr)
    good = [record for record in records if not record.error]
    tokens = sum(len(record.token_times) for record in good)
    ttft = [record.ttft * 1e3 for record in good]
    gaps = [gap * 1e3 for record in good for gap in record.gaps]
    return Figures(
        topology=name,
        output_tok_s=tokens / wall,
        ttft_p50=percentile(ttft, 0.5),
        ttft_p99=percentile(ttft, 0.99),
        itl_p50=percentile(gaps, 0.5),
        itl_p99=percentile(gaps, 0.99),
        mib_moved=moved / 2**20,
        router_us_per_token=cpu / max(tokens, 1) * 1e6,
        failed=len(records) - len(good),
    )


def table(rows: list[Figures]) -> str:
    """The median over rounds of each topology, and the ratio of the first to the last."""
    columns = [name for name in Figures.__dataclass_fields__ if name != "topology"]
    lines = [f"{'':12}" + "".join(f"{name:>21}" for name in columns)]
    medians: dict[str, list[float]] = {}
    for topology in dict.fromkeys(row.topology for row in rows):
        mine = [row for row in rows if row.topology == topology]
        medians[topology] = [statistics.median(getattr(r, name) for r in mine) for name in columns]
        lines.append(f"{topology:12}" + "".join(f"{v:21.2f}" for v in medians[topology]))
    if len(medians) > 1:
        first, *_, last = medians.values()
        pairs = zip(first, last, strict=True)
        ratios = "".join(f"{a / b:21.2f}" if b else f"{'-':>21}" for a, b in pairs)
        lines.append(f"{'ratio':12}{ratios}")
    return "\n".join(lines)


def circumstances(args: argparse.Namespace) -> dict[str, object]:
    """What a reader needs to repeat a result."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "commit": git.stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> int:
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
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--out", type=Path, help="JSON file for figures and circumstances")
    args, more = parser.parse_known_args()
    workload = Workload(
        requests=args.requests,
        input_len=args.input_len,
        output_len=args.output_len,
        concurrency=args.concurrency,
        vocab=range(10, args.vocab),
    )
    options = ([f"--model={args.model}"] if args.model else []) + more
    rows = []
    for number in range(args.rounds):
        for name in args.topologies:
            print(f"round {number + 1} of {args.rounds}: {name} ...", file=sys.stderr, flush=True)
            rows.append(measure(name, options, workload))
    print(
        f"{args.requests} requests, {args.input_len} tokens in, {args.output_len} out, "
        f"{args.concurrency} at a time; times in ms, medians of {args.rounds} rounds"
    )
    print(table(rows))
    if args.out:
        result = {**circumstances(args), "rows": [asdict(row) for row in rows]}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
