"""Stories of requests: what is told of choices, within which bounds, and the timeline."""

from __future__ import annotations

import json

import msgspec
import pytest

from pdserve.cluster.explain import picture, timeline
from pdserve.cluster.journal import MAX_BYTES, AnswerStory, Chosen, Considered, LegStory, Record
from pdserve.cluster.placement import Choice, Score
from pdserve.cluster.records import Role
from pdserve.protocol.messages import LifeEvent
from pdserve.router.chooser import Verdict
from pdserve.router.placement import Candidate, WorkerLoad
from pdserve.router.story import MAX_CANDIDATES, MAX_HEADER, considered, encoded, header, why


def candidate(name: str, hand_off: bool = False, queued: int = 0) -> Candidate:
    role = Role.PREFILL if hand_off else Role.COLOCATED
    return Candidate(WorkerLoad(worker_id=name, role=role, queued_tokens=queued), hand_off)


def choice(index: int, scores: list[Score]) -> Choice:
    return Choice(index, msgspec.Raw(msgspec.msgpack.encode(scores)))


def leg(kind: str, worker: str, submitted: float, **more: object) -> LegStory:
    chosen = Chosen(how="redis", worker=worker, tokens=10, among=1)
    fields = {"kind": kind, "worker": worker, "epoch": 1, "role": "decode", "chosen": chosen}
    return msgspec.convert(fields | {"submitted_s": submitted} | more, LegStory)


def record(*answers: AnswerStory, elapsed: float = 1.0) -> Record:
    return Record(
        id="chatcmpl-1", request_id="1", router="r", state="finished", received=0.0,
        elapsed_s=elapsed, tokenized_s=0.1, answers=list(answers),
    )  # fmt: skip


def test_the_best_candidates_are_told_of_and_the_chosen_one_always() -> None:
    among = [candidate(f"c{i}") for i in range(40)]
    scores = [Score(0, 0, 0, 10, cost=i, full=False) for i in range(40)]
    found = considered(Verdict(among[35], "redis", 10, among, choice(35, scores)))
    assert len(found) == MAX_CANDIDATES + 1
    assert [one.worker for one in found[:3]] == ["c0", "c1", "c2"] and found[-1].worker == "c35"


def test_those_without_room_come_last() -> None:
    among = [candidate("a"), candidate("b")]
    scores = [Score(0, 0, 0, 0, cost=1, full=True), Score(0, 0, 0, -1, cost=9, full=False)]
    found = considered(Verdict(among[1], "redis", 10, among, choice(1, scores)))
    assert [(one.worker, one.full, one.free_tokens) for one in found] == [
        ("b", False, None), ("a", True, 0),
    ]  # fmt: skip


def test_the_own_view_tells_costs_and_a_policy_without_costs_does_not() -> None:
    among = [candidate("a", queued=7)]
    assert considered(Verdict(among[0], "own view", 10, among))[0].cost == 47
    assert considered(Verdict(among[0], "round-robin", 10, among))[0].cost is None


@pytest.mark.parametrize(
    ("kind", "chosen", "options", "said"),
    [
        ("decode", "d", [("d", False, 1)], "fetched from there"),
        ("moved", "d", [("d", False, 1)], "computed again"),
        ("prefill", "p", [("p", True, 1)], "nobody may prefill and decode"),
        ("full", "d", [("d", False, 1)], "no prefill worker"),
        ("prefill", "p", [("p", True, 5), ("d", False, 9)], "handed over: costs 5, otherwise 9"),
        ("full", "d", [("p", True, 9), ("d", False, 5)], "not handed over: costs 5, otherwise 9"),
        ("full", "d", [("p", True, None), ("d", False, None)], "does not count costs"),
    ],
)
def test_why(kind: str, chosen: str, options: list[tuple[str, bool, int]], said: str) -> None:
    found = [Considered(worker=name, hand_off=pair, cost=cost) for name, pair, cost in options]
    assert said in why(kind, found, chosen)


def test_records_are_bounded_first_without_candidates() -> None:
    many = [Considered(worker="w" * 100)] * 1000
    chosen = Chosen(how="redis", worker="w", tokens=1, among=1000, candidates=many)
    story = AnswerStory(
        tokens=1, legs=[msgspec.structs.replace(leg("full", "w", 0.0), chosen=chosen)]
    )
    text = encoded(record(story))
    assert text is not None and len(text) <= MAX_BYTES
    assert msgspec.json.decode(text, type=Record).answers[0].legs[0].chosen.candidates == []
    assert encoded(msgspec.structs.replace(record(story), error="e" * MAX_BYTES)) is None


def test_the_header_is_ascii_and_holds_whole_choices() -> None:
    text = header([AnswerStory(tokens=0, legs=[leg("full", "wörk\n", 0.0)] * 100)])
    assert text.isascii() and text.isprintable() and len(text) <= MAX_HEADER
    assert 0 < len(json.loads(text)) < 100


def test_the_timeline_of_a_pair_and_of_a_lost_worker() -> None:
    def events(*pairs: tuple[str, float]) -> tuple[LifeEvent, ...]:
        return tuple(LifeEvent(name, at) for name, at in pairs)

    prefill = leg("prefill", "p", 0.2, answered=True)
    prefill = msgspec.structs.replace(
        prefill,
        events=events(("queued", 0), ("scheduled", 0.1), ("first_token", 0.3), ("held", 0.31)),
    )
    decode = msgspec.structs.replace(
        leg("decode", "d", 0.55),
        events=events(
            ("queued", 0), ("fetch_started", 0.05), ("news", 0.06), ("fetched", 0.1),
            ("first_token", 0.15), ("finished", 0.4),
        ),
    )  # fmt: skip
    lost = leg("full", "x", 0.15, error="worker_lost: gone")
    answer = AnswerStory(tokens=4, legs=[lost, prefill, decode])
    phases = timeline(record(answer), answer)
    assert [(one.where, one.name) for one in phases] == [
        ("router", "read, tokenize"), ("router", "choose"), ("x", "lost"), ("p", "queue"),
        ("p", "prefill"), ("p", "hold blocks"), ("d", "queue"), ("d", "transfer"),
        ("d", "wait for a step"), ("d", "decode"),
    ]  # fmt: skip
    assert phases[2].end_s == 0.2 and phases[7].begin_s == pytest.approx(0.6)
    lines = list(picture(phases, 1.0))
    assert len(lines) == 11 and len({len(line) for line in lines[1:]}) == 1
    assert all("█" in line for line in lines[1:])


def test_a_request_that_has_not_begun_has_an_empty_picture() -> None:
    assert list(picture([], 0.0)) == []
    assert list(picture(timeline(record(elapsed=0.0), AnswerStory(tokens=0)), 0.0))
