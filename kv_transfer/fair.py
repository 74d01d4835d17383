"""The queue of fetches: first come first served, but no source gets all the threads.

A source that accepts connections and then says nothing holds a thread for as long as a stall may
last, twice; the others must not wait for that.
"""

from __future__ import annotations

import threading
from collections import Counter, deque

from pdserve.kv_transfer.job import Job


class FairQueue:
    """Thread-safe. At most `most` jobs of one source are out at the same time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Job] = deque()
        self._out: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def take(self) -> Job | None:
        """Wait for a job; `done` must follow. None once the queue is closed and empty of what may
        be taken."""
        with self._changed:
            while True:
                for index, job in enumerate(self._waiting):
                    if self._out[job.ticket.source] < self._most or self._closed:
                        del self._waiting[index]
                        self._out[job.ticket.source] += 1
                        return job
                if self._closed:
                    return None
                self._changed.wait()

    def done(self, job: Job) -> None:
        with self._changed:
            source = job.ticket.source
            self._out[source] -= 1
            if not self._out[source]:
                del self._out[source]
            self._changed.notify()

    def close(self) -> None:
        """Nobody waits any longer; what is still there is given out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
