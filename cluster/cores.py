"""Divides the cores of this machine among its workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker gets."""

    cpus: tuple[int, ...]
    """Cores of its own; empty: it is not pinned."""
    threads: int


def divide(cores: Sequence[int], workers: int, quota: int | None = None) -> list[Share]:
    """One share per worker (at least one); earlier workers get the odd cores.

    `cores`: what this process may run on, neighbours beside each other. `quota`: cores' worth of
    time that the container may use, if that is limited: then nobody is pinned, since other
    containers may run on the same cores. With fewer cores than workers each gets one thread, and
    the system shares the cores out.
    """
    usable = len(cores) if quota is None else max(1, min(quota, len(cores)))
    if workers > usable:
        return [Share((), 1)] * workers
    each, odd = divmod(usable, workers)
    sizes = [each + (number < odd) for number in range(workers)]
    if usable < len(cores):
        return [Share((), size) for size in sizes]
    starts = [sum(sizes[:number]) for number in range(workers)]
    return [
        Share(tuple(cores[start : start + size]), size)
        for start, size in zip(starts, sizes, strict=True)
    ]


_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SPINS = 10_000
"""How often a thread of torch's pool looks for more work before it sleeps, about 0.2 ms. By itself
it would look for some milliseconds, on the core that a thread of the C kernels wants meanwhile."""


def thread_settings(threads: int) -> dict[str, str]:
    """Environment of a process that computes with so many threads, for libraries that size their
    pools when they are loaded."""
    settings = dict.fromkeys(_VARIABLES, str(threads))
    return {**settings, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", str(SPINS))}


def own_cores() -> list[int]:
    """The cores that this process may run on, those of one package and core side by side."""
    return sorted(os.sched_getaffinity(0), key=lambda cpu: (*_place(cpu), cpu))


def _place(cpu: int) -> tuple[int, int]:
    folder = _TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        package, core = (
            int((folder / name).read_text()) for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):
        return 0, 0
    return package, core


def own_quota() -> int | None:
    """Whole cores' worth of time that the container's limit (cgroup v2) allows; None: no limit."""
    try:
        limit, period = _QUOTA.read_text().split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return None
