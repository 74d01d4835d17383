"""When requests arrive: pure functions from a seed to times.

Open loop: a client does not wait for answers before it sends the next request, as the public does.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

KINDS = ("poisson", "gamma", "constant", "ramp", "trace", "closed")
""""trace": the workload's own times; "closed": a number of requests is kept going."""


class BenchError(ValueError):
    """A benchmark cannot be run as asked; the message is a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests arrive."""

    kind: str
    rate: float = 1.0
    """Requests per second; of a ramp, at its beginning. Not for "trace" and "closed"."""
    rate_to: float = 0.0
    """Of a ramp: requests per second at its end."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps: 1 is Poisson, less is burstier, as in vLLM."""
    time_scale: float = 1.0
    """Trace: its times are multiplied by this."""
    concurrency: int = 1
    """Closed: requests at a time."""

    def check(self) -> None:
        """Raises BenchError."""
        if self.kind not in KINDS:
            raise BenchError(f"--arrivals must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        limits = [("--rate", self.rate), ("--burstiness", self.burstiness)]
        limits += [("--time-scale", self.time_scale), ("--concurrency", self.concurrency)]
        if self.kind == "ramp":
            limits.append(("--rate-to", self.rate_to))
        for name, value in limits:
            if not (value > 0 and math.isfinite(value)):
                raise BenchError(f"{name} must be above 0, not {value}.")


def times(arrivals: Arrivals, count: int, seed: int) -> list[float]:
    """`count` ascending times in seconds, the first one gap after 0. Equal seeds, equal times."""
    rng = random.Random(f"arrivals/{seed}")
    if arrivals.kind == "constant":
        return [index / arrivals.rate for index in range(count)]
    if arrivals.kind == "ramp":
        return _ramp(arrivals.rate, arrivals.rate_to, count, rng)
    shape = arrivals.burstiness if arrivals.kind == "gamma" else 1.0
    now, found = 0.0, []
    for _ in range(count):
        now += rng.gammavariate(shape, 1.0 / (arrivals.rate * shape))
        found.append(now)
    return found


def _ramp(first: float, last: float, count: int, rng: random.Random) -> list[float]:
    """A Poisson process whose rate goes linearly from `first` to `last` while `count` requests are
    expected: arrivals of rate 1, through the inverse of the expected number (Çinlar 1975)."""
    length = 2 * count / (first + last)
    slope = (last - first) / length
    expected, found = 0.0, []
    for _ in range(count):
        expected += rng.expovariate(1.0)
        # first t + slope t² / 2 = expected; beyond the ramp's end the rate stays.
        inside = min(expected, count)
        root = math.sqrt(max(first * first + 2 * slope * inside, 0.0))
        found.append(2 * inside / (first + root) + (expected - inside) / last)
    return found
