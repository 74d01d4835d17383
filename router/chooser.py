"""Chooses workers: over the load that all routers share in Redis, or over this router's own view.

Answer ─pick─► one candidate, or a policy without numbers ─► at once
             ─► Redis: match, score, choose, charge (one round trip for all that wait) ─► later
             ─► Redis is away ─► at once, over the own view
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.placement import Ask, Choice, Placement, Recall, Score, ask
from pdserve.router.candidates import CandidateSet
from pdserve.router.placement import (
    Candidate,
    Policy,
    WorkerLoad,
    by_cost,
    by_session,
    by_turn,
)

log = logging.getLogger(__name__)

ANSWER_S = 0.25
"""Redis gets so long for a choice."""
PAUSE_S = 1.0
"""After it has failed to answer, it is not asked for so long."""
OWN_VIEW = "own view"
NEAR = 15
"""Index of the route hash (256 tokens) that says which prompts have the same first choices."""


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
    choice: Choice | None = None
    """If Redis chose: with a score for each of `among`."""

    @property
    def scores(self) -> Sequence[Score]:
        """One for each of `among`, if Redis chose; unpacked anew each time."""
        return self.choice.scores[: len(self.among)] if self.choice else ()


@dataclass(frozen=True, slots=True)
class _Waiting:
    among: CandidateSet
    candidates: Sequence[Candidate]
    """Those that Redis is asked about."""
    need: Need
    question: Ask
    done: Callable[[Verdict], None]


def near(routes: Sequence[bytes], draw: int) -> bytes:
    """What decides which of many workers are asked about, for a prompt with these route hashes."""
    return routes[min(NEAR, len(routes) - 1)] if routes else draw.to_bytes(4, "little")


class Chooser:
    """One router's choices. Event loop only."""

    def __init__(
        self,
        placement: Placement | None,
        policy: Policy,
        load_of: Callable[[str], WorkerLoad | None],
        rng: random.Random,
    ) -> None:
        """`placement`: None leaves every choice to the own view: what `load_of(worker)` says, None
        for one that has left."""
        self._placement = placement
        self._policy = policy
        self._load_of = load_of
        self._rng = rng
        self._turns = {False: 0, True: 0}
        """Whose turn it is among those that compute, and among those that fetch: with one count
        for both, every pair would take two turns, and half of the workers would never come."""
        self._waiting: list[_Waiting] = []
        self._asking: asyncio.Task[None] | None = None
        self._away_until = 0.0

    def pick(self, among: CandidateSet, need: Need, done: Callable[[Verdict], None]) -> None:
        """Choose one of the candidates (at least one); `done` hears of it, now or later."""
        if len(among) == 1:
            candidates = self._as_they_are(among.candidates)
            done(Verdict(candidates[0], "only one", need.tokens, candidates))
        elif self._policy is Policy.ROUND_ROBIN:
            candidates = self._as_they_are(among.candidates)
            index = by_turn(candidates, need.tokens, self._turns[need.fetches])
            self._turns[need.fetches] += 1
            done(Verdict(candidates[index or 0], self._policy, need.tokens, candidates))
        elif self._policy is Policy.SESSION and need.session:
            candidates = self._as_they_are(among.candidates)
            index = by_session(candidates, need.tokens, need.session)
            done(Verdict(candidates[index or 0], self._policy, need.tokens, candidates))
        elif self._placement is None or time.monotonic() < self._away_until:
            done(self._own_view(among.candidates, need))
        else:
            self._waiting.append(self._question(among, need, done))
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())

    def _as_they_are(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """With their loads of this moment: what has just been sent included."""
        return [
            dataclasses.replace(one, worker=self._load_of(one.worker.worker_id) or one.worker)
            for one in candidates
        ]

    def _own_view(self, candidates: Sequence[Candidate], need: Need) -> Verdict:
        candidates = self._as_they_are(candidates)
        index = by_cost(candidates, need.tokens, self._rng.getrandbits(30))
        return Verdict(candidates[index or 0], OWN_VIEW, need.tokens, candidates)

    def _question(
        self,
        among: CandidateSet,
        need: Need,
        done: Callable[[Verdict], None],
        recall: Recall = Recall.CONSIDER,
    ) -> _Waiting:
        draw = self._rng.getrandbits(30)
        routes = () if self._policy is Policy.LEAST_LOAD else need.routes()
        candidates, options = among.asked(near(routes, draw), self._rng)
        question = ask(
            options,
            routes,
            need.tokens,
            charge_tokens=not need.fetches,
            random=draw,
            recall=recall if len(candidates) < len(among) else Recall.NOTHING,
        )
        return _Waiting(among, candidates, need, question, done)

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
        verdicts: Sequence[Verdict | None]
        try:
            choices = await self._placement.choose([one.question for one in batch])
            verdicts = [_verdict(one, choice) for one, choice in zip(batch, choices, strict=True)]
        except RedisUnavailable as error:
            log.warning("%s Choosing over the own view for a while.", error)
            self._away_until = time.monotonic() + PAUSE_S
            verdicts = [self._own_view(one.candidates, one.need) for one in batch]
        except Exception:  # whatever it is, nobody may wait for a choice for ever
            log.exception("Choosing in Redis failed; choosing over the own view.")
            verdicts = [self._own_view(one.candidates, one.need) for one in batch]
        for one, verdict in zip(batch, verdicts, strict=True):
            if verdict is None:
                again = self._question(one.among, one.need, one.done, Recall.STORE)
                self._waiting.append(again)
                continue
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


def _verdict(asked: _Waiting, choice: Choice) -> Verdict | None:
    """None: the worker that was chosen for the prompt's beginning must not be chosen now: it
    leaves, does something else or fails. That is rare, and another round trip is bearable."""
    candidates = asked.candidates
    if choice.recalled is not None:
        recalled = asked.among.find(*choice.recalled)
        if recalled is not None:
            candidates = [*candidates, recalled]
        elif choice.index == len(candidates):
            return None
    return Verdict(candidates[choice.index], "redis", asked.need.tokens, candidates, choice)
