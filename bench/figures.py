"""From a run's records to figures: pure functions, milliseconds for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdserve.bench.client import Record, Run

SHARES = (0.5, 0.9, 0.99)
WORST = 0.1
"""The longest tenth of a request's gaps: what a reader feels as stuttering (Mooncake's TBT)."""
LATE_S = 0.005
BUSY = 0.9
ATTAINED = 0.9
"""A rate is sustained if so many of its requests meet both targets (DistServe)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must meet, in milliseconds; infinity: no target."""

    ttft_ms: float = math.inf
    itl_ms: float = math.inf
    """Of the mean of its gaps (TPOT)."""

    def met(self, record: Record) -> bool:
        """Whatever was refused or failed missed."""
        return record.ok and record.ttft * 1e3 <= self.ttft_ms and record.tpot * 1e3 <= self.itl_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. Times in milliseconds."""

    requests: int
    failed: int
    """Neither answered nor refused for want of room."""
    rejected: int
    request_rate: float
    """Requests per second that were due, over the time in which they were."""
    output_tok_s: float
    total_tok_s: float
    """Prompt and output tokens of answered requests per second."""
    attainment: float
    """Share of all requests, refused ones included, that met the targets."""
    goodput: float
    """Requests per second that met the targets."""
    cached_share: float
    """Prompt tokens that the server found in its cache, of all (NaN if it does not say)."""
    latencies: Mapping[str, Mapping[str, float]]
    """ttft, itl, tpot, e2e, worst_gaps → mean, p50, p90, p99."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, linear between neighbours (Hyndman and Fan's type 7); NaN of nothing."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def figures(run: Run, slo: Slo) -> Figures:
    good = [record for record in run.records if record.ok]
    rejected = sum(record.rejected for record in run.records)
    span = max((record.due for record in run.records), default=0.0)
    tokens = sum(len(record.token_times) for record in good)
    prompts = sum(record.prompt_len for record in good)
    known = [record for record in good if record.cached_tokens is not None]
    cached = sum(record.cached_tokens or 0 for record in known)
    met = sum(slo.met(record) for record in run.records)
    return Figures(
        requests=len(run.records),
        failed=len(run.records) - len(good) - rejected,
        rejected=rejected,
        request_rate=len(run.records) / span if span else math.nan,
        output_tok_s=tokens / run.wall_s,
        total_tok_s=(tokens + prompts) / run.wall_s,
        attainment=met / len(run.records) if run.records else math.nan,
        goodput=met / run.wall_s,
        cached_share=cached / sum(r.prompt_len for r in known) if known else math.nan,
        latencies={
            "ttft": summary([record.ttft for record in good if record.token_times]),
            "itl": summary([gap for record in good for gap in record.gaps]),
            "tpot": summary([record.tpot for record in good if len(record.token_times) > 1]),
            "e2e": summary([record.e2e for record in good if record.token_times]),
            "worst_gaps": summary([worst_gaps(record) for record in good if record.gaps]),
        },
    )


def worst_gaps(record: Record) -> float:
    """The mean of the longest tenth of its gaps, in seconds."""
    gaps = sorted(record.gaps, reverse=True)
    longest = gaps[: math.ceil(len(gaps) * WORST)]
    return sum(longest) / len(longest)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds."""
    ordered = sorted(value * 1e3 for value in seconds)
    found = {"mean": sum(ordered) / len(ordered) if ordered else math.nan}
    return found | {f"p{share * 100:g}": quantile(ordered, share) for share in SHARES}


def bottleneck(run: Run) -> str:
    """A sentence if the client, not the server, may have limited the run; "" otherwise."""
    late = quantile(sorted(record.sent - record.due for record in run.records), 0.99)
    if late > LATE_S:
        return (
            f"The client was the bottleneck: 1 % of the requests left {late * 1e3:.1f} ms late or "
            f"later (at most {LATE_S * 1e3:g} ms is fine). Give it a core of its own, or lower the "
            "rate."
        )
    lag = quantile(sorted(run.loop_lags), 0.99)
    if lag > LATE_S:
        return (
            f"The client was the bottleneck: its loop came {lag * 1e3:.1f} ms late in 1 % of the "
            f"looks (at most {LATE_S * 1e3:g} ms is fine), and so may the times of tokens be. Give "
            "it a core of its own, or lower the rate."
        )
    busy = run.client_cpu_s / run.wall_s if run.wall_s else 0.0
    if busy > BUSY:
        return (
            f"The client was the bottleneck: it used {busy:.0%} of a core (at most {BUSY:.0%} is "
            "fine). Lower the rate, or share the load among several clients."
        )
    return ""
