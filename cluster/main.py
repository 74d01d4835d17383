"""The `pdserve` command: one word chooses what to do, the rest are its options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

HELP = """\
usage: pdserve COMMAND [OPTION ...]

LLM serving with separate prefill and decode workers.

  up          start a whole cluster on this machine; Ctrl-C stops it
  router      run one router, which serves the HTTP APIs
  render      run a server without workers: requests to token ids and back
  prefill     run one prefill worker
  decode      run one decode worker (--accept-prompts: a colocated one)
  colocated   run one worker that does both
  status      print who is in a cluster
  simulate    which topology serves a workload best, on a cluster of any size (no cluster needed)
  bench       load on a server: TTFT, ITL, goodput (pdserve bench --help)
  explain     print where a request went, why, and where its time went
  drain       let a worker finish what it has and leave: pdserve drain WORKER
  role        switch a running worker: pdserve role WORKER prefill|decode|both
  demo        start a cluster with the demo model, ask a few questions, stop
  version     print the version

`pdserve COMMAND --help` lists the options of a command with their units and defaults. To make a
cluster over several hosts, start a Redis, set PDSERVE_SECRET to the same long random text
everywhere, and give the same --redis URL to `pdserve router`, `prefill` and `decode`.
"""

MODULES = {
    "router": ("pdserve.router",),
    "render": ("pdserve.router", "--render-only"),
    "prefill": ("pdserve.prefill_worker",),
    "decode": ("pdserve.decode_worker",),
    "colocated": ("pdserve.decode_worker", "--accept-prompts"),
    "bench": ("pdserve.bench",),
    "simulate": ("pdserve.bench.simulation",),
    "demo": ("pdserve.demo.show",),
}
"""Commands that become another process: this package may not import what they run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. This module imports next to nothing, so that nearly
    all of the life of a process is inside of this function."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        from pdserve.cluster.options import EXIT_INTERRUPTED

        return EXIT_INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    from pdserve.cluster.options import EXIT_USAGE

    words = list(sys.argv[1:] if argv is None else argv)
    command, options = (words[0], words[1:]) if words else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(HELP, end="")
        return 0 if command else EXIT_USAGE
    if command in ("version", "--version", "-V"):
        from importlib.metadata import version

        print(version("pdserve"))
        return 0
    if command in MODULES:
        _become(*MODULES[command], *options)
    if command in _HERE:
        return _HERE[command](options)
    known = ", ".join([*_HERE, *MODULES, "version"])
    print(f"pdserve: error: unknown command {command!r}; one of {known}.", file=sys.stderr)
    return EXIT_USAGE


def _become(module: str, *arguments: str) -> NoReturn:
    command = [sys.executable, "-P", "-m", module, *arguments]
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - our own interpreter


def _up(options: Sequence[str]) -> int:
    from pdserve.cluster.launcher import up

    return up(options)


def _status(options: Sequence[str]) -> int:
    from pdserve.cluster.status import status

    return status(options)


def _explain(options: Sequence[str]) -> int:
    from pdserve.cluster.explain import explain

    return explain(options)


def _drain(options: Sequence[str]) -> int:
    from pdserve.cluster.operate import drain

    return drain(options)


def _role(options: Sequence[str]) -> int:
    from pdserve.cluster.operate import role

    return role(options)


_HERE: dict[str, Callable[[Sequence[str]], int]] = {
    "up": _up,
    "status": _status,
    "explain": _explain,
    "drain": _drain,
    "role": _role,
}
"""Each imports what it needs when it is chosen."""


if __name__ == "__main__":
    sys.exit(main())
