"""What is known of workers without a channel: the load that they last reported to Redis.

Looked at each SURVEY_S, at most MOST_SURVEYED workers at a time, drawn by chance: a look costs the
same however large the cluster is. Who was not among them is taken to be like those who were.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from pdserve.cluster.placement import UNKNOWN, LoadReport
from pdserve.cluster.records import WorkerRecord, WorkerState
from pdserve.router.placement import WorkerLoad

SURVEY_S = 1.0
MOST_SURVEYED = 256


class Survey:
    """The last look, and those who could have been looked at."""

    def __init__(self, reports: Mapping[str, LoadReport] | None = None, of: int = 0) -> None:
        """`of`: so many workers were meant, `reports` are those of some of them."""
        self._reports = reports or {}
        self._of = max(of, len(self._reports))
        count = max(1, len(self._reports))
        self._usual = LoadReport(
            sum(one.queued_tokens for one in self._reports.values()) // count,
            sum(one.requests for one in self._reports.values()) // count,
            UNKNOWN,
        )

    @property
    def waiting(self) -> int:
        """Requests not yet started, on all workers that were meant."""
        found = sum(one.waiting for one in self._reports.values())
        return found * self._of // max(1, len(self._reports))

    def load_of(self, record: WorkerRecord, shunned: bool) -> WorkerLoad:
        report = self._reports.get(record.worker_id, self._usual)
        return WorkerLoad(
            worker_id=record.worker_id,
            role=record.role,
            epoch=record.epoch,
            fingerprint=record.model.fingerprint if record.model else "",
            queued_tokens=report.queued_tokens,
            requests=report.requests,
            free_tokens=report.free_tokens if report.free_tokens != UNKNOWN else None,
            shunned=shunned,
        )


def unlinked(records: Iterable[WorkerRecord], links: Mapping[str, object]) -> list[WorkerRecord]:
    """Those that may get new work and have no channel."""
    return [
        record
        for record in records
        if record.state is WorkerState.READY and record.worker_id not in links
    ]


def sample(records: Sequence[WorkerRecord], rng: random.Random) -> list[WorkerRecord]:
    """Who is looked at next."""
    return rng.sample(records, min(MOST_SURVEYED, len(records)))
