"""Names of the moments in a request's life; metrics, traces and benchmarks share them."""

from __future__ import annotations

from collections.abc import Mapping

QUEUED = "queued"
"""The worker put the request into its queue."""
SCHEDULED = "scheduled"
"""The first step that computes (or fetches) something for it began."""
FIRST_TOKEN = "first_token"
"""The first token of this leg was drawn."""
OFFERED = "offered"
"""The ticket is out while the prompt is still being computed."""
HELD = "held"
"""The KV blocks lie in the outbox, the ticket is minted."""
FETCH_STARTED = "fetch_started"
RESUMED = "resumed"
"""The first token of a request that fetches early has come from the prefill worker."""
FETCHED = "fetched"
"""All blocks arrived and their checksums hold."""
RECOMPUTED = "recomputed"
"""The fetch failed; the worker prefills by itself."""
PREEMPTED = "preempted"
FINISHED = "finished"


def fetch_s(at: Mapping[str, float]) -> float | None:
    """Seconds that a leg has waited for its blocks, by the moments of its events: since the fetch
    began, or, if blocks travelled early, since the token came. None if it has not fetched."""
    if FETCH_STARTED not in at or FETCHED not in at:
        return None
    return max(0.0, at[FETCHED] - at.get(RESUMED, at[FETCH_STARTED]))
