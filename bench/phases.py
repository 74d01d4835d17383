"""Where a request's time went, from what the router tells those who ask for timings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PHASES = ("router", "queue", "prefill", "transfer", "wait", "decode")
"""In the order in which a request goes through them. "wait": from the arrival of the blocks to the
first token that the decode worker makes of them."""
HEADER = {"x-pdserve-timings": "1"}


def phases_of(timings: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per phase of a request's first answer; what overlaps counts for the earlier phase.

    timings: the `pdserve` member of its last event.
    """
    spent = dict.fromkeys(PHASES, 0.0)
    spent["router"] = float(timings["router"]["submitted"])
    reached = spent["router"]
    for leg in timings["choices"][0]["legs"]:
        for phase, end in _marks(leg):
            if end > reached:
                spent[phase] += end - reached
                reached = end
    return spent


def _marks(leg: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Phase, and the second (since the request came) at which it ended, in order."""
    at = {name: float(leg["submitted"]) + second for name, second in leg["events"]}
    fetches = "fetch_started" in at
    order = [
        ("queue", "fetch_started" if fetches else "scheduled"),
        ("transfer", "fetched"),
        ("wait" if fetches and "recomputed" not in at else "prefill", "first_token"),
        ("decode" if leg["kind"] != "prefill" else "queue", "finished"),
    ]
    return [(phase, at[name]) for phase, name in order if name in at]


def mean_phases(all_timings: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds per phase; empty if nobody was told."""
    found = [phases_of(timings) for timings in all_timings]
    if not found:
        return {}
    return {phase: sum(spent[phase] for spent in found) / len(found) for phase in PHASES}
