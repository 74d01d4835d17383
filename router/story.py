"""A request's story for `pdserve explain`: from its legs to a `Record`. Pure."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from pdserve.cluster.journal import MAX_BYTES, AnswerStory, Chosen, Considered, LegStory, Record
from pdserve.cluster.placement import Score
from pdserve.router.chooser import OWN_VIEW, Verdict
from pdserve.router.leg import AnswerLeg
from pdserve.router.placement import Candidate, rank

MAX_CANDIDATES = 16
"""Told of per choice, the best ones."""
MAX_ANSWERS = 8
MAX_LEGS = 10
"""The last ones of an answer."""
MAX_HEADER = 4096
"""Longest value of the response header, in characters."""


def considered(verdict: Verdict) -> list[Considered]:
    """The candidates with their numbers, least cost first, the chosen one in any case."""
    among, scores = verdict.among, verdict.scores
    chosen = verdict.candidate.worker.worker_id

    def order(place: int) -> tuple[bool, int, bool]:
        other = among[place].worker.worker_id != chosen
        if scores:
            return scores[place].full, scores[place].cost, other
        full, cost = rank(among[place], verdict.tokens)
        return bool(full), cost if verdict.how == OWN_VIEW else 0, other

    best = heapq.nsmallest(MAX_CANDIDATES, range(len(among)), key=order)
    if all(among[place].worker.worker_id != chosen for place in best):
        best += [i for i, one in enumerate(among) if one.worker.worker_id == chosen]
    return [_considered(verdict, among[place], scores[place] if scores else None) for place in best]


def _considered(verdict: Verdict, candidate: Candidate, score: Score | None) -> Considered:
    worker = candidate.worker
    if score is not None:
        return Considered(
            worker=worker.worker_id,
            hand_off=candidate.hand_off,
            cached_tokens=score.cached_tokens,
            queued_tokens=score.queued_tokens,
            requests=score.requests,
            free_tokens=score.free_tokens if score.free_tokens >= 0 else None,
            floor=round(candidate.floor),
            cost=score.cost,
            full=score.full,
        )
    full, cost = rank(candidate, verdict.tokens)
    return Considered(
        worker=worker.worker_id,
        hand_off=candidate.hand_off,
        cached_tokens=worker.cached_tokens,
        queued_tokens=worker.queued_tokens,
        requests=worker.requests,
        free_tokens=worker.free_tokens,
        floor=round(candidate.floor),
        cost=cost if verdict.how == OWN_VIEW else None,
        full=bool(full),
    )


def why(kind: str, candidates: Sequence[Considered], chosen: str, unit: str = "") -> str:
    """Why the prompt is computed at one worker and handed over, or is not, as a sentence."""
    if kind == "decode":
        return "the prompt's blocks are computed and fetched from there"
    if kind == "moved":
        return "prompt and tokens so far are computed again"
    pairs = [one for one in candidates if one.hand_off]
    alone = [one for one in candidates if not one.hand_off]
    if kind == "prefill" and not alone:
        return "handed over: nobody may prefill and decode, or nothing has been measured yet"
    if kind == "full" and not pairs:
        return "not handed over: no prefill worker with a decode worker behind it may be chosen"
    other = min(alone if kind == "prefill" else pairs, key=lambda one: one.cost or 0)
    mine = next((one for one in candidates if one.worker == chosen), other)
    verb = "handed over" if kind == "prefill" else "not handed over"
    if mine.cost is None or other.cost is None:
        return f"{verb}: the policy does not count costs"
    return f"{verb}: costs {mine.cost}{unit}, otherwise {other.cost} (on {other.worker})"


def unit_of(candidate: Candidate) -> str:
    """Of costs: tokens to be computed, until it is known how long things take."""
    return "µs" if candidate.timed else "tokens"


def chosen_of(leg: AnswerLeg) -> Chosen:
    verdict = leg.verdict
    candidates = considered(verdict)
    return Chosen(
        how=verdict.how,
        worker=leg.link.worker_id,
        tokens=verdict.tokens,
        among=len(verdict.among),
        candidates=candidates,
        why=why(leg.kind, candidates, leg.link.worker_id, f" {unit_of(verdict.candidate)}"),
        unit=unit_of(verdict.candidate),
    )


def leg_story(leg: AnswerLeg, received: float) -> LegStory:
    """`received`: when the request came, as `leg.submitted_at` counts."""
    error = leg.error
    return LegStory(
        kind=leg.kind,
        worker=leg.link.worker_id,
        epoch=leg.link.epoch,
        role=leg.link.role.value,
        submitted_s=round(leg.submitted_at - received, 6),
        chosen=chosen_of(leg),
        answered=leg.answered,
        error=f"{error.code.value}: {error.message}" if error else "",
        events=leg.events,
    )


def encoded(record: Record) -> bytes | None:
    """As JSON of at most MAX_BYTES: if need be without the candidates; None if even so too long."""
    text = msgspec.json.encode(record)
    if len(text) > MAX_BYTES:
        text = msgspec.json.encode(_without_candidates(record))
    return text if len(text) <= MAX_BYTES else None


def _without_candidates(record: Record) -> Record:
    def leg(story: LegStory) -> LegStory:
        chosen = msgspec.structs.replace(story.chosen, candidates=[])
        return msgspec.structs.replace(story, chosen=chosen)

    answers = [
        msgspec.structs.replace(answer, legs=[leg(story) for story in answer.legs])
        for answer in record.answers
    ]
    return msgspec.structs.replace(record, answers=answers)


def header(answers: Sequence[AnswerStory]) -> str:
    """The choices as compact ASCII JSON of at most MAX_HEADER characters, whole choices only."""
    listed: list[dict[str, Any]] = []
    size = 2
    for index, answer in enumerate(answers):
        for leg in answer.legs:
            one = _compact(index, leg)
            size += len(json.dumps(one, separators=(",", ":"))) + 1
            if size > MAX_HEADER:
                break
            listed.append(one)
    return json.dumps(listed, separators=(",", ":"))


def _compact(index: int, leg: LegStory) -> dict[str, Any]:
    mine = next((one for one in leg.chosen.candidates if one.worker == leg.worker), None)
    return {
        "answer": index,
        "kind": leg.kind,
        "worker": leg.worker,
        "how": leg.chosen.how,
        "among": leg.chosen.among,
        "tokens": leg.chosen.tokens,
        "cached_tokens": mine.cached_tokens if mine else 0,
        "queued_tokens": mine.queued_tokens if mine else 0,
        "requests": mine.requests if mine else 0,
        "cost": mine.cost if mine else None,
        "submitted_ms": round(leg.submitted_s * 1000, 3),
        "why": leg.chosen.why,
        **({"error": leg.error} if leg.error else {}),
    }


def answer_story(
    legs: Sequence[AnswerLeg], tokens: int, finish_reason: str, received: float
) -> AnswerStory:
    return AnswerStory(
        tokens=tokens,
        finish_reason=finish_reason,
        legs=[leg_story(leg, received) for leg in legs[-MAX_LEGS:]],
    )
