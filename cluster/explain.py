"""`pdserve explain REQUEST_ID`: where a request went, why, and where its time went."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from pdserve.cluster.journal import (
    KEEP_S,
    AnswerStory,
    Chosen,
    Considered,
    Journal,
    LegStory,
    Record,
)
from pdserve.cluster.options import EXIT_USAGE, load, options_of
from pdserve.cluster.requests import RequestRecord, RequestRecords
from pdserve.cluster.status import StatusSettings
from pdserve.cluster.target import find_target
from pdserve.protocol import events
from pdserve.protocol.errors import PdserveError

_STORY = (
    "Prints how a request was placed and where its time went. REQUEST_ID is the id of the answer "
    "(chatcmpl-...) or the header x-request-id of the response."
)
PREFIXES = ("", "chatcmpl-", "cmpl-", "generate-tokens-")
"""Tried before an id that is not known as it is."""
RUNNING = "running"
WIDTH = 40
"""Characters of the bar picture."""

BEGINS = {
    events.QUEUED: "queue",
    events.SCHEDULED: "prefill",
    events.FETCH_STARTED: "transfer",
    events.FETCHED: "wait for a step",
    events.RECOMPUTED: "queue, fetch failed",
    events.FIRST_TOKEN: "decode",
    events.PREEMPTED: "queue, preempted",
    events.HELD: "",
    events.FINISHED: "",
}
"""What a leg does from this event on; other events change nothing."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a request's life, in seconds since the router received it."""

    where: str
    name: str
    begin_s: float
    end_s: float


def explain(argv: Sequence[str]) -> int:
    """Print a request's record; returns the exit code."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    rest = argv[1:] if name else argv
    settings = StatusSettings(**load("pdserve explain", _STORY, options_of(StatusSettings), rest))
    try:
        if not name:
            raise PdserveError(
                "Which request? Give its id first: pdserve explain chatcmpl-... [OPTION ...]."
            )
        record = asyncio.run(_find(name, settings))
    except PdserveError as error:
        print(f"pdserve explain: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if settings.json:
        print(msgspec.json.format(msgspec.json.encode(record), indent=2).decode())
    else:
        for line in as_text(record):
            print(_printable(line))
    return 0


def _printable(line: str) -> str:
    """Ids come from clients; what is printed must not steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in line)


async def _find(name: str, settings: StatusSettings) -> Record:
    place = find_target(settings)
    journal = Journal(place.redis, place.cluster)
    records = RequestRecords(place.redis, place.cluster)
    ids = [prefix + name for prefix in PREFIXES]
    try:
        for one in ids:
            record = await journal.find(one)
            if record is not None:
                running = record.state == RUNNING
                carried = await records.find(record.id) if running else None
                return msgspec.structs.replace(record, carried=carried)
        carried = await records.find(*ids)
    finally:
        await journal.close()
        await records.close()
    if carried is not None:
        return _untold(carried)
    raise PdserveError(
        f"No request {name!r} is known to the cluster {place.cluster}. Requests are remembered for "
        f"{KEEP_S // 60} minutes, from half a second after they began; give the id of the answer "
        "or the header x-request-id of the response."
    )


def _untold(carried: RequestRecord) -> Record:
    """Of a request whose story was dropped, or has not been written yet."""
    return Record(
        id=carried.id,
        request_id=carried.request_id,
        router=carried.router,
        state=RUNNING,
        received=carried.received,
        elapsed_s=max(0.0, time.time() - carried.received),
        tokenized_s=0.0,
        prompt_tokens=carried.prompt_tokens,
        carried=carried,
    )


def _whereabouts(carried: RequestRecord | None) -> str:
    """Where a running request is now, as a line."""
    if carried is None:
        return "now: no router carries it; it has just ended, or its router died"
    places = ", ".join(f"{one.kind} on {one.worker} (epoch {one.epoch})" for one in carried.holders)
    left_s = max(0.0, carried.deadline - time.time())
    return f"now: {carried.tokens} tokens, {places or 'on no worker'}; ends within {left_s:.0f} s"


def as_text(record: Record) -> Iterator[str]:
    """The lines of `pdserve explain`."""
    yield f"{record.id}: {record.state} after {record.elapsed_s:.3f} s"
    yield f"x-request-id {record.request_id}, {record.router}, {record.prompt_tokens} prompt tokens"
    if record.error:
        yield f"error: {record.error}"
    if record.state == RUNNING:
        yield _whereabouts(record.carried)
    for index, answer in enumerate(record.answers):
        yield ""
        end = f", {answer.finish_reason}" if answer.finish_reason else ""
        yield f"answer {index}: {answer.tokens} tokens{end}"
        for number, leg in enumerate(answer.legs, 1):
            yield from _leg(number, leg)
        yield from picture(timeline(record, answer), record.elapsed_s)
    if record.more_answers:
        yield f"and {record.more_answers} more answers"


def _leg(number: int, leg: LegStory) -> Iterator[str]:
    yield f"  {number}. {leg.kind} on {leg.worker} (epoch {leg.epoch}, {leg.role})"
    chosen = leg.chosen
    among = "the only candidate" if chosen.among == 1 else f"one of {chosen.among} candidates"
    yield f"     {among} for {chosen.tokens} tokens; chosen by: {chosen.how}"
    if chosen.why:
        yield f"     {chosen.why}"
    yield from ("     " + line for line in _table(chosen))
    if leg.error:
        yield f"     went wrong: {leg.error}"


_HEADINGS = ("  WORKER", "HOW", "CACHED", "QUEUED", "REQUESTS", "ROOM", "BEHIND", "COST")


def _table(chosen: Chosen) -> Iterator[str]:
    if not chosen.candidates:
        return
    rows = [
        (*_HEADINGS[:-1], f"COST ({chosen.unit})"),
        *(_row(chosen, one) for one in chosen.candidates),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        cells = (
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
    hidden = chosen.among - len(chosen.candidates)
    if hidden > 0:
        yield f"  and {hidden} more"


def _row(chosen: Chosen, one: Considered) -> tuple[str, ...]:
    return (
        ("* " if one.worker == chosen.worker else "  ") + one.worker,
        "hand over" if one.hand_off else "stay",
        str(one.cached_tokens),
        str(one.queued_tokens),
        str(one.requests),
        ("-" if one.free_tokens is None else str(one.free_tokens)) + (" full" if one.full else ""),
        str(one.floor or "-"),
        "-" if one.cost is None else str(one.cost),
    )


def timeline(record: Record, answer: AnswerStory) -> list[Phase]:
    """What happened when, from the router's moments and each leg's life events. A leg whose worker
    has not told (it runs, or was lost) is one phase."""
    legs = answer.legs
    began = legs[0].submitted_s if legs else record.submitted_s
    phases = [
        Phase("router", "read, tokenize", 0.0, record.tokenized_s),
        Phase("router", "choose", record.tokenized_s, max(began, record.tokenized_s)),
    ]
    for leg, after in itertools.zip_longest(legs, legs[1:]):
        told = list(_phases(leg))
        if not told:
            end = after.submitted_s if after else record.elapsed_s
            name = "lost" if leg.error else "answering" if leg.answered else "no answer yet"
            told = [Phase(leg.worker, name, leg.submitted_s, end)]
        phases += told
    return phases


def _phases(leg: LegStory) -> Iterator[Phase]:
    name, begin = "", 0.0
    for event in leg.events:
        if event.name not in BEGINS:
            continue
        at = leg.submitted_s + event.at_s
        if name:
            yield Phase(leg.worker, name, begin, at)
        name, begin = BEGINS[event.name], at
        if leg.kind == "prefill" and event.name == events.FIRST_TOKEN:
            name = "hold blocks"


def picture(phases: Sequence[Phase], elapsed_s: float) -> Iterator[str]:
    """One bar per phase, all on the same scale from 0 to the end."""
    end = max([elapsed_s, *(phase.end_s for phase in phases)])
    if not phases or end <= 0:
        return
    places = max(len(phase.where) for phase in phases)
    names = max(len(phase.name) for phase in phases)
    yield f"  timeline, 0 to {end:.3f} s"
    for phase in phases:
        first = min(WIDTH - 1, int(phase.begin_s / end * WIDTH))
        last = min(WIDTH, max(first + 1, round(phase.end_s / end * WIDTH)))
        bar = " " * first + "█" * (last - first)
        took = phase.end_s - phase.begin_s
        yield f"  {phase.where:<{places}}  {phase.name:<{names}}  │{bar:<{WIDTH}}│ {took:9.4f} s"
