"""How long things take at a worker, fitted online from the life events of legs. No effects.

    prefill   s = a + b × missing + c × missing × (cached + missing / 2)     scheduled → first token
    transfer  s = a + b × missing                                           first token → all blocks
    step      s = a + b × requests + c × context                            one token of one answer

Each is fitted per worker and, for workers that have shown little yet, over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.cluster.placement import ANY_NUMBER, Price
from pdserve.protocol import events
from pdserve.protocol.messages import LifeEvent

FORGETTING = 0.99
"""Weight of a sample against the next one: a hundred of them are remembered."""
STIFFNESS = 1e-2
"""Of the prior (all weights 0), in samples: what no sample speaks of stays near 0."""
LOOSEST = 1e4
"""Trace of the covariance beyond which nothing is forgotten: else it would grow without bound in
directions in which nothing is seen."""
OUTLIER = 4.0
"""An error counts for at most so many usual errors."""
CREDIBLE = 0.1
"""Or for so much of what was expected: else a fit that has never erred could not change."""
WARM = 8
"""Samples before a fit is believed."""
LONGEST_S = 600.0
"""Longer durations are not learnt from: something else was wrong."""
MAX_WORKERS = 1024
HARM = 2.0
"""A second that each stream waits for a prefill beside it, in seconds of the request's own wait: a
stream that stutters is worse than one that begins later, and more will come while it computes."""

LATER = 3.0
"""What it costs those who come later that a token is computed once more, in such tokens;
`bench/placement.py` shows what that brings."""


class Fit:
    """y ≈ weights · x, all weights ≥ 0: recursive least squares with exponential forgetting
    (Haykin, Adaptive Filter Theory, ch. 10), errors clipped as in Huber's M-estimator."""

    __slots__ = ("_covariance", "_usual_error", "count", "weights")

    def __init__(self, size: int) -> None:
        """`size`: features. They should be of the order of 1."""
        self.weights = [0.0] * size
        self.count = 0
        self._covariance = [
            [float(row == column) / STIFFNESS for column in range(size)] for row in range(size)
        ]
        self._usual_error = 0.0

    def add(self, x: Sequence[float], y: float) -> None:
        """Learn from one sample. O(size²)."""
        gains = [sum(p * f for p, f in zip(row, x, strict=True)) for row in self._covariance]
        spread = FORGETTING + sum(f * gain for f, gain in zip(x, gains, strict=True))
        expected = self.predict(x)
        error = y - expected
        bound = max(OUTLIER * self._usual_error, CREDIBLE * expected)
        if self.count >= WARM:
            error = math.copysign(min(abs(error), bound), error)
        self._usual_error += (abs(error) - self._usual_error) / min(self.count + 1, 20)
        self.weights = [
            max(0.0, weight + gain / spread * error)
            for weight, gain in zip(self.weights, gains, strict=True)
        ]
        loose = sum(row[i] for i, row in enumerate(self._covariance)) > LOOSEST
        keep = 1.0 if loose else FORGETTING
        self._covariance = [
            [(p - gains[i] * gains[j] / spread) / keep for j, p in enumerate(row)]
            for i, row in enumerate(self._covariance)
        ]
        self.count += 1

    def predict(self, x: Sequence[float]) -> float:
        return sum(weight * f for weight, f in zip(self.weights, x, strict=True))


class Fits:
    """The same law at many workers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._own: dict[str, Fit] = {}
        self._shared = Fit(size)

    def add(self, worker_id: str, x: Sequence[float], y: float) -> None:
        if not 0 <= y <= LONGEST_S:
            return
        self._shared.add(x, y)
        if worker_id not in self._own and len(self._own) >= MAX_WORKERS:
            del self._own[next(iter(self._own))]
        self._own.setdefault(worker_id, Fit(self._size)).add(x, y)

    def of(self, worker_id: str) -> Fit | None:
        """What is believed of a worker; None if too little is known of any."""
        own = self._own.get(worker_id)
        if own is not None and own.count >= WARM:
            return own
        return self._shared if self._shared.count >= WARM else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LegFacts:
    """A leg that has ended well."""

    worker_id: str
    length: int
    """Tokens when it was submitted."""
    cached: int
    """Of them, found in the worker's prefix cache."""
    drawn: int
    """Tokens that it brought."""
    requests: int
    """On the worker when it ended."""
    events: tuple[LifeEvent, ...]
    hand_over_s: float | None = None
    """By how much its blocks came later than the first token of the answer."""


class Predictor:
    """What a router has learnt of its cluster's speeds."""

    def __init__(self) -> None:
        self._prefill, self._transfer, self._step = Fits(3), Fits(2), Fits(3)

    def learn(self, leg: LegFacts) -> None:
        """Take a leg's events into account. Legs that were preempted, or whose fetch failed, tell
        of something else and are left out."""
        at = {event.name: event.at_s for event in reversed(leg.events)}
        if events.PREEMPTED in at or events.RECOMPUTED in at:
            return
        missing = max(0, leg.length - leg.cached)
        first = at.get(events.FIRST_TOKEN)
        if first is not None and events.SCHEDULED in at and events.FETCHED not in at:
            took = first - at[events.SCHEDULED]
            self._prefill.add(leg.worker_id, _prefill_x(missing, leg.cached), took)
        waited = events.fetch_s(at)
        if waited is not None and missing:
            self._transfer.add(leg.worker_id, (1.0, missing / 1000), waited)
        if first is not None and events.FINISHED in at and leg.drawn >= 4:
            took = (at[events.FINISHED] - first) / (leg.drawn - 1)
            self._step.add(leg.worker_id, _step_x(leg.requests, leg.length + leg.drawn), took)

    @property
    def warm(self) -> bool:
        """Whether handing over and staying can be compared."""
        return self._prefill.of("") is not None and self._transfer.of("") is not None

    def prefill_s(self, worker_id: str, missing: int, cached: int = 0) -> float | None:
        """Seconds to compute `missing` tokens behind `cached` ones; None: not known yet."""
        fit = self._prefill.of(worker_id)
        return fit.predict(_prefill_x(missing, cached)) if fit else None

    def transfer_s(self, worker_id: str, missing: int) -> float | None:
        """Seconds from the first token until `missing` tokens' blocks are there."""
        fit = self._transfer.of(worker_id)
        return fit.predict((1.0, missing / 1000)) if fit else None

    def step_s(self, worker_id: str, requests: int, context: int) -> float | None:
        """Seconds from one token to the next among so many requests."""
        fit = self._step.of(worker_id)
        return fit.predict(_step_x(requests, context)) if fit else None

    def most_requests(self, worker_id: str, itl_s: float, context: int) -> int:
        """How many requests there may be while a step takes at most `itl_s`; at least one."""
        fit = self._step.of(worker_id)
        if fit is None or fit.weights[1] <= 0:
            return ANY_NUMBER
        spare = itl_s - fit.predict(_step_x(0, context))
        return int(max(1, min(ANY_NUMBER, spare / fit.weights[1] * 10)))

    def price(self, worker_id: str, hand_off: bool) -> Price:
        """What prompts cost there, in µs until a first token can be followed by the next.
        `hand_off`: the blocks go on to another worker. Only if `warm`."""
        fit, usual = self._prefill.of(worker_id), self._prefill.of("")
        assert fit is not None and usual is not None
        # Whoever computes a token again later may be anybody: of the same worth at all workers.
        later = LATER * usual.weights[1] * 1e3
        base = fit.weights[0] * STEP_SHARE * 1e6
        token, context = fit.weights[1] * 1e3, fit.weights[2]
        if hand_off:
            transfer = self._transfer.of("")
            assert transfer is not None
            return Price(
                token=token,
                context=context,
                queued=token,
                request=0.0,
                later=later,
                base=base + transfer.weights[0] * 1e6,
                length=transfer.weights[1] * 1e3,
            )
        step = self._step.of(worker_id)
        return Price(
            token=token,
            context=context,
            queued=token,
            request=step.weights[1] * 1e5 if step else 0.0,
            base=base,
            later=later,
            harm=HARM,
        )


PriceOf = Callable[[str, bool], Price]
"""(worker id, whether the blocks go on) → price."""


STEP_SHARE = 0.05
"""Size of the feature that stands for what a prefill costs whatever its length. It is small beside
those of its tokens, so that while all prompts are equally long the prior gives the time to the
tokens: they are what streams beside it wait for, and what a cache saves."""


def _prefill_x(missing: int, cached: int) -> tuple[float, float, float]:
    return STEP_SHARE, missing / 1e3, missing * (cached + missing / 2) / 1e6


def _step_x(requests: int, context: int) -> tuple[float, float, float]:
    return 1.0, requests / 10, context / 1e4
