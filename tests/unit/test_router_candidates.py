"""Who may take a leg: found out anew when something changes, and not before."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from pdserve.cluster.channel import Channel
from pdserve.cluster.membership import Membership
from pdserve.cluster.placement import ANY_NUMBER, Option
from pdserve.cluster.records import ModelInfo, Role, WorkerRecord, WorkerState
from pdserve.protocol.messages import StepFrame, WorkerStatus
from pdserve.router.candidates import MAX_AGE_S, MIXED_AGE_S, MOST_ASKED, Candidates, CandidateSet
from pdserve.router.link import WorkerLink
from pdserve.router.placement import Candidate, Disaggregate, WorkerLoad
from pdserve.router.predict import Predictor
from pdserve.router.workers import WorkerPool

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}
MODEL = ModelInfo(
    architecture="", dtype="", max_model_len=9, vocab_size=9, block_size=16, fingerprint="f"
)


class NoChannel:
    closed = False


def record(name: str, **changes: Any) -> WorkerRecord:
    found = WorkerRecord(
        worker_id=name, epoch=3, role=ROLES[name[0]], state=WorkerState.READY, host="", port=1,
        http_port=1, pid=1, model=MODEL,
    )  # fmt: skip
    return msgspec.structs.replace(found, **changes)


class Cluster:
    def __init__(self, *names: str) -> None:
        self.now = 0.0
        self.pool = WorkerPool(Membership("unix:///none"), secret="", name="")
        for name in names:
            self.join(name)
        self.candidates = Candidates(
            self.pool, Predictor(), Disaggregate.ALWAYS, clock=lambda: self.now
        )

    def join(self, name: str) -> WorkerLink:
        return self.pool.adopt(record(name), cast(Channel, NoChannel()))

    def link(self, name: str) -> WorkerLink:
        link = self.pool.link(name)
        assert link is not None
        return link


def names(found: CandidateSet) -> list[str]:
    return [one.worker.worker_id for one in found.candidates]


def drain(cluster: Cluster) -> None:
    zeros = dict.fromkeys(
        ("blocks_total", "blocks_free", "blocks_cached", "blocks_held", "waiting", "running",
         "fetching", "queued_tokens", "steps"), 0
    )  # fmt: skip
    status = WorkerStatus(**zeros, draining=True)
    cluster.link("p1").receive(StepFrame(epoch=3, step=1, outputs=[], status=status))


def trip(cluster: Cluster) -> None:
    for _ in range(3):
        cluster.link("p1")._breaker.failure()


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda cluster: cluster.join("p2"), ["p0", "p1", "p2"]),
        (lambda cluster: cluster.link("p1").withdraw(), ["p0"]),
        (lambda cluster: cluster.link("p1").fail("gone"), ["p0"]),
        (lambda cluster: cluster.link("p1").follow(record("p1", role=Role.DECODE)), ["p0"]),
        (drain, ["p0"]),
        (trip, ["p0"]),
    ],
    ids=["joins", "withdrawn", "lost", "switches its role", "drains", "fails"],
)
def test_the_list_is_kept_until_something_changes(
    change: Callable[[Cluster], object], left: list[str]
) -> None:
    cluster = Cluster("p0", "p1", "d0")
    before = cluster.candidates.for_prompt()
    assert names(before) == ["p0", "p1"] and cluster.candidates.for_prompt() is before
    change(cluster)
    assert names(cluster.candidates.for_prompt()) == left


def test_the_list_is_made_anew_after_a_while_and_sooner_where_roles_mix() -> None:
    for workers, lasts_s in ((("p0", "d0"), MAX_AGE_S), (("c0", "d0"), MIXED_AGE_S)):
        cluster = Cluster(*workers)
        first = cluster.candidates.for_prompt()
        cluster.now = 0.99 * lasts_s
        assert cluster.candidates.for_prompt() is first
        cluster.now = lasts_s
        assert cluster.candidates.for_prompt() is not first


def test_every_kind_has_its_own() -> None:
    candidates = Cluster("p0", "d0", "d1").candidates
    assert names(candidates.for_prompt()) == ["p0"]
    assert names(candidates.for_blocks("f")) == names(candidates.for_rest()) == ["d0", "d1"]
    assert not candidates.for_blocks("other")
    assert candidates.for_blocks("f").candidates[0].price.token < 1


def test_who_has_met_failures_gets_a_list_of_its_own() -> None:
    candidates = Cluster("p0", "p1", "d0").candidates
    everybody = candidates.for_prompt()
    assert names(candidates.for_prompt(avoid={"p0"})) == ["p1"]
    assert candidates.for_prompt() is everybody


def unpacked(argument: bytes) -> list[Option]:
    """Options from an argument for the script: length, line's end, msgpack, line's end."""
    head, _, text = argument.partition(b"\r\n")
    assert head == b"$%d" % len(text[:-2])
    return msgspec.msgpack.decode(text[:-2], type=list[Option])


def test_options_are_packed_as_the_script_reads_them() -> None:
    found = Cluster("p0", "p1", "d0").candidates.for_prompt()
    options = unpacked(found.asked(b"", random.Random(0))[1])
    assert [(one.worker_id, one.epoch) for one in options] == [("p0", 3), ("p1", 3)]
    assert options[0].price.most_requests == ANY_NUMBER


def many(count: int) -> CandidateSet:
    return CandidateSet(
        [Candidate(WorkerLoad(worker_id=f"d{i}", role=Role.DECODE)) for i in range(count)]
    )


def asked(found: CandidateSet, key: bytes, seed: int) -> list[str]:
    candidates, packed = found.asked(key, random.Random(seed))
    ids = [one.worker.worker_id for one in candidates]
    assert [one.worker_id for one in unpacked(packed)] == ids
    return ids


def test_of_many_the_same_few_are_asked_for_the_same_prefix_and_some_by_chance() -> None:
    few = many(MOST_ASKED)
    assert asked(few, b"k", 0) == names(few)
    cluster = many(1000)
    one, two = asked(cluster, b"k", 1), asked(cluster, b"k", 2)
    half = MOST_ASKED // 2
    assert len(set(one)) == len(one) == MOST_ASKED
    assert one[:half] == two[:half] and one[half:] != two[half:]
    counts = Counter(name for n in range(500) for name in asked(cluster, str(n).encode(), n))
    assert len(counts) == 1000 and max(counts.values()) < 8 * 500 * MOST_ASKED / 1000
    fewer = CandidateSet([c for c in cluster.candidates if c.worker.worker_id != one[0]])
    assert asked(fewer, b"k", 1)[: half - 1] == one[1:half]
