"""Chooses workers: over the load that all routers share in Redis, or over this router's own view.

Answer ─pick─► one candidate, or a policy without numbers ─► at once
             ─► Redis: match, score, choose, charge (one round trip for all that wait) ─► later
             ─► Redis is away ─► at once, over the own view
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.placement import Ask, Option, Placement, Score, ask, pack_options
from pdserve.router.placement import (
    MOST_ASKED,
    NEAR,
    Candidate,
    Policy,
    by_cost,
    by_session,
    by_turn,
    shortlist,
)

log = logging.getLogger(__name__)

ANSWER_S = 0.25
"""Redis gets so long for a choice."""
PAUSE_S = 1.0
"""After it has failed to answer, it is not asked for so long."""


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be placed."""

    tokens: int
    """Prompt and answer so far."""
    routes: Callable[[], Sequence[bytes]]
    """Their route hashes; called only if they are needed."""
    session: str = ""
    fetches: bool = False
    """The KV that is missing is fetched, not computed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A choice, with the numbers that led to it."""

    candidate: Candidate
    how: str
    """"redis", "own view", "only one", or the policy's name."""
    tokens: int = 0
    """What was to be placed."""
    among: Sequence[Candidate] = ()
    scores: Sequence[Score] = ()
    """One for each of `among`, if Redis chose."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    candidates: Sequence[Candidate]
    need: Need
    question: Ask
    done: Callable[[Verdict], None]


class Chooser:
    """One router's choices. Event loop only."""

    def __init__(
        self, placement: Placement | None, policy: Policy, epoch_of: Callable[[str], int],
        rng: random.Random,
    ) -> None:  # fmt: skip
        """`placement`: None leaves every choice to the own view. `epoch_of(worker)`."""
        self._placement = placement
        self._policy = policy
        self._epoch_of = epoch_of
        self._rng = rng
        self._turns = {False: 0, True: 0}
        """Whose turn it is among those that compute, and among those that fetch: with one count
        for both, every pair would take two turns, and half of the workers would never come."""
        self._waiting: list[_Waiting] = []
        self._asking: asyncio.Task[None] | None = None
        self._away_until = 0.0
        self._packed: tuple[tuple[Option, ...], bytes] = ((), b"")

    def pick(
        self, candidates: Sequence[Candidate], need: Need, done: Callable[[Verdict], None]
    ) -> None:
        """Choose one of the candidates (at least one); `done` hears of it, now or later."""
        if len(candidates) == 1:
            done(Verdict(candidates[0], "only one", need.tokens, candidates))
        elif self._policy is Policy.ROUND_ROBIN:
            index = by_turn(candidates, need.tokens, self._turns[need.fetches])
            self._turns[need.fetches] += 1
            done(Verdict(candidates[index or 0], self._policy, need.tokens, candidates))
        elif self._policy is Policy.SESSION and need.session:
            index = by_session(candidates, need.tokens, need.session)
            done(Verdict(candidates[index or 0], self._policy, need.tokens, candidates))
        elif self._placement is None or time.monotonic() < self._away_until:
            done(self._own_view(candidates, need))
        else:
            candidates = self._few(candidates, need)
            question = self._question(candidates, need)
            self._waiting.append(_Waiting(candidates, need, question, done))
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())

    def _own_view(self, candidates: Sequence[Candidate], need: Need) -> Verdict:
        index = by_cost(candidates, need.tokens, self._rng.getrandbits(30))
        return Verdict(candidates[index or 0], "own view", need.tokens, candidates)

    def _few(self, candidates: Sequence[Candidate], need: Need) -> Sequence[Candidate]:
        """Those that are asked about."""
        if len(candidates) <= MOST_ASKED:
            return candidates
        draw = self._rng.getrandbits(30)
        routes = () if self._policy is Policy.LEAST_LOAD else need.routes()
        key = routes[min(NEAR, len(routes) - 1)] if routes else draw.to_bytes(4, "little")
        return shortlist(candidates, key, draw)

    def _question(self, candidates: Sequence[Candidate], need: Need) -> Ask:
        options = tuple(
            Option(c.worker.worker_id, self._epoch_of(c.worker.worker_id), c.floor, c.price)
            for c in candidates
        )
        if options != self._packed[0]:
            self._packed = (options, pack_options(options))
        return ask(
            self._packed[1],
            () if self._policy is Policy.LEAST_LOAD else need.routes(),
            need.tokens,
            charge_tokens=not need.fetches,
            random=self._rng.getrandbits(30),
        )

    async def _ask(self) -> None:
        """Until nobody waits: one round trip for all who do."""
        assert self._placement is not None
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._ask_for(batch)
        finally:
            self._asking = None

    async def _ask_for(self, batch: Sequence[_Waiting]) -> None:
        assert self._placement is not None
        verdicts: list[Verdict]
        try:
            choices = await self._placement.choose([one.question for one in batch])
            verdicts = [
                Verdict(
                    one.candidates[choice.index],
                    "redis",
                    one.need.tokens,
                    one.candidates,
                    choice.scores,
                )
                for one, choice in zip(batch, choices, strict=True)
            ]
        except RedisUnavailable as error:
            log.warning("%s Choosing over the own view for a while.", error)
            self._away_until = time.monotonic() + PAUSE_S
            verdicts = [self._own_view(one.candidates, one.need) for one in batch]
        except Exception:  # whatever it is, nobody may wait for a choice for ever
            log.exception("Choosing in Redis failed; choosing over the own view.")
            verdicts = [self._own_view(one.candidates, one.need) for one in batch]
        for one, verdict in zip(batch, verdicts, strict=True):
            try:
                one.done(verdict)
            except Exception:
                log.exception("A choice could not be carried out")

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        if self._placement is not None:
            await self._placement.close()
