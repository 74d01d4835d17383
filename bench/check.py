"""`pdserve bench check`: is the load generator telling the truth on this machine?

Runs it against a mock server that answers with known delays, and prints what it measured beside
them. Exit code 0: within 2 ms or 2 %; 1: not; 3: the client itself was the bottleneck.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pdserve.bench import mock_server
from pdserve.bench.arrivals import Arrivals
from pdserve.bench.client import Server, measure
from pdserve.bench.figures import Slo, bottleneck, figures
from pdserve.bench.serve import EXIT_CLIENT, EXIT_FAILED, ProgressBar
from pdserve.bench.workloads import Shape, make

DELAYS = ((0.02, 0.005), (0.1, 0.02), (0.5, 0.05))
"""Seconds to the first token, and between tokens."""
LEEWAY_MS, LEEWAY = 2.0, 0.02


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdserve bench check", description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="per delay (default: 60)")
    parser.add_argument("--rate", type=float, default=10.0, help="per second (default: 10)")
    args = parser.parse_args(argv)
    jobs = make(Shape(kind="fixed", requests=args.requests, input_len=256, output_len=20))
    arrivals = Arrivals(kind="poisson", rate=args.rate)
    arrivals.check()
    wrong, limits = 0, []
    print(f"{'ms':8}{'is':>8}{'p50':>9}{'p90':>9}{'p99':>9}")
    for ttft_s, itl_s in DELAYS:
        bar = ProgressBar(len(jobs))
        with mock_server.started(ttft_s, itl_s) as url:
            server = Server(url=url, model="mock")
            run = measure(server, jobs, arrivals, seed=1, progress=bar.show)
        bar.end()
        found = figures(run, Slo()).latencies
        limits.append(bottleneck(run))
        for name, true_s in (("ttft", ttft_s), ("itl", itl_s)):
            true = true_s * 1e3
            shares = [found[name][share] for share in ("p50", "p90", "p99")]
            fine = all(abs(value - true) <= max(LEEWAY_MS, LEEWAY * true) for value in shares)
            wrong += not fine
            row = "".join(f"{value:9.2f}" for value in shares)
            print(f"{name:8}{true:8.1f}{row}{'' if fine else '   more than 2 ms and 2 % off'}")
    for limited in filter(None, limits):
        print(limited)
    if any(limits):
        return EXIT_CLIENT
    return EXIT_FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
