"""The placement policy over snapshots: none, all idle, all busy, all equal, one slow."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from pdserve.cluster.records import Role
from pdserve.router.placement import (
    FETCH,
    REQUEST_TOKENS,
    Candidate,
    WorkerLoad,
    by_cost,
    by_session,
    by_turn,
    decode_options,
    first_options,
    usable,
)


def worker(name: str, queued: int = 0, requests: int = 0, **more: object) -> WorkerLoad:
    role = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}[name[0]]
    return WorkerLoad(
        worker_id=name,
        role=role,
        queued_tokens=queued,
        requests=requests,
        **more,  # type: ignore[arg-type]
    )


def first(*workers: WorkerLoad, seed: int = 0, avoid: tuple[str, ...] = ()) -> str:
    return pick(first_options(workers, avoid), 100, random.Random(seed))


def decode(*workers: WorkerLoad, seed: int = 0, avoid: tuple[str, ...] = ()) -> str:
    return pick(decode_options(workers, avoid=avoid), 100, random.Random(seed))


def pick(options: Sequence[Candidate], tokens: int, rng: random.Random) -> str:
    index = by_cost(options, tokens, rng.getrandbits(30))
    return "" if index is None else options[index].worker.worker_id


def test_nobody() -> None:
    assert first() == decode() == ""
    assert not usable([])


def test_what_is_usable() -> None:
    assert usable([worker("c0")])
    assert usable([worker("p0"), worker("d0")])
    assert not usable([worker("p0")]) and not usable([worker("d0")])
    assert not usable([worker("p0", fingerprint="a"), worker("d0", fingerprint="b")])


def test_half_a_pair_serves_nobody() -> None:
    assert first(worker("p0")) == first(worker("d0")) == ""


def test_all_idle_is_drawn_fairly() -> None:
    workers = [worker(f"p{i}") for i in range(3)] + [worker("d0")]
    rng = random.Random(0)
    counts = Counter(pick(first_options(workers), 10, rng) for _ in range(600))
    assert set(counts) == {"p0", "p1", "p2"} and min(counts.values()) > 150


def test_all_equally_busy_is_drawn_too() -> None:
    chosen = {decode(*[worker(f"d{i}", 0, 50) for i in range(3)], seed=s) for s in range(30)}
    assert chosen == {"d0", "d1", "d2"}


def test_the_same_seed_chooses_the_same() -> None:
    workers = [worker(f"d{i}") for i in range(5)]
    once = [decode(*workers, seed=seed) for seed in range(9)]
    assert once == [decode(*workers, seed=seed) for seed in range(9)]


def test_all_busy_the_least_busy_is_taken() -> None:
    assert first(worker("p0", 9000), worker("p1", 8000), worker("d0")) == "p1"
    assert decode(worker("d0", 0, 9), worker("d1", 0, 8), worker("d2", 0, 9)) == "d1"


def test_one_slow_worker_piles_up_and_is_left_alone() -> None:
    """Of three workers one takes ten times as long: it gets about a tenth of the work."""
    rng, load = random.Random(0), {"d0": 0.0, "d1": 0.0, "d2": 0.0}
    given: Counter[str] = Counter()
    for _ in range(3000):
        found = pick(decode_options([worker(n, 0, int(v)) for n, v in load.items()]), 10, rng)
        given[found] += 1
        load[found] += 1
        for name in load:
            load[name] = max(0.0, load[name] - (0.05 if name == "d0" else 0.5))
    assert given["d0"] < 0.2 * given["d1"]


def test_full_workers_come_last() -> None:
    assert decode(worker("d0", free_tokens=99), worker("d1", 0, 50, free_tokens=100)) == "d1"
    assert decode(worker("d0", free_tokens=0)) == "d0"


def test_both_kinds_are_weighed_against_each_other() -> None:
    pair = [worker("p0", 100), worker("d0")]
    assert first(*pair, worker("c0", 50)) == "c0"
    assert first(*pair, worker("c0", 150)) == "p0"


def test_a_pair_is_as_busy_as_its_busier_half() -> None:
    requests = 200 // REQUEST_TOKENS + 1
    pair = (worker("p0"), worker("d0", 0, requests))
    assert first(*pair, worker("c0", 80)) == "c0"
    assert first(*pair, worker("c0", 99 + REQUEST_TOKENS * requests)) == "p0"


def test_failed_workers_are_avoided_while_there_are_others() -> None:
    assert first(worker("p0"), worker("p1", 999), worker("d0"), avoid=("p0",)) == "p1"
    assert first(worker("p0"), worker("d0"), avoid=("p0",)) == "p0"
    assert first(worker("c0"), worker("p0", 999), worker("d0"), avoid=("c0",)) == "p0"
    assert first(worker("c0", 999), worker("p0"), worker("d0"), avoid=("p0",)) == "c0"
    assert decode(worker("d0"), worker("d1", 0, 9), avoid=("d0",)) == "d1"
    assert decode(worker("d0"), worker("c0", 0, 9), avoid=("d0",)) == "c0"


def test_a_colocated_worker_hands_over_to_one_with_less_to_do() -> None:
    def hands_over(*workers: WorkerLoad) -> bool:
        [option] = first_options(workers)
        return option.hand_off

    assert not hands_over(worker("c0", 500))
    assert not hands_over(worker("c0"), worker("d0"))
    assert hands_over(worker("c0", 0, 2), worker("d0", 0, 1))
    other = worker("d0", fingerprint="another")
    assert not hands_over(worker("c0", 0, 2), other)


def test_a_prefill_worker_may_hand_over_to_a_colocated_one() -> None:
    assert first(worker("p0"), worker("c0", 100)) == "p0"
    assert first(worker("p0", 300), worker("c0", 100)) == "c0"
    assert first(worker("p0"), worker("c0", fingerprint="another")) == "c0"


def test_blocks_go_only_where_they_fit() -> None:
    workers = [worker("d0", fingerprint="a"), worker("d1", 0, 99, fingerprint="b")]
    assert pick(decode_options(workers, fingerprint="b"), 10, random.Random(0)) == "d1"
    assert decode_options(workers, fingerprint="c") == []


def test_decode_workers_come_before_colocated_ones() -> None:
    assert decode(worker("c0"), worker("d0", 0, 3)) == "d0"
    assert decode(worker("c0"), worker("p0")) == "c0"


def test_a_cached_prefix_is_weighed_against_load() -> None:
    """100 tokens of prompt: 80 cached ones are worth 4 times as many queued ones."""
    assert decode(worker("d0", 319, cached_tokens=80), worker("d1")) == "d0"
    assert decode(worker("d0", 321, cached_tokens=80), worker("d1")) == "d1"


def test_tokens_to_be_fetched_cost_less_than_tokens_to_be_computed() -> None:
    workers = [worker("d0", 6, cached_tokens=100), worker("d1")]
    assert by_cost(decode_options(workers, price=FETCH), 100, 0) == 1
    assert by_cost(decode_options(workers), 100, 0) == 0


def test_what_is_cached_needs_no_room() -> None:
    assert decode(worker("d0", free_tokens=20, cached_tokens=80), worker("d1", 30)) == "d0"
    assert decode(worker("d0", free_tokens=19, cached_tokens=80), worker("d1", 30)) == "d1"


def three(**more: object) -> list[Candidate]:
    return decode_options([worker(f"d{i}", **more) for i in (2, 0, 1)])  # type: ignore[arg-type]


def names(options: Sequence[Candidate], indices: Sequence[int | None]) -> list[str]:
    return [options[i].worker.worker_id for i in indices if i is not None]


def test_round_robin() -> None:
    assert by_turn([], 10, 0) is None
    for options in (three(), three(queued=900, requests=9)):  # all equal, all busy
        turns = [by_turn(options, 10, turn) for turn in range(6)]
        assert names(options, turns) == ["d0", "d1", "d2"] * 2
    slow = decode_options([worker("d0", 10**6), worker("d1"), worker("d2", free_tokens=5)])
    assert names(slow, [by_turn(slow, 10, turn) for turn in range(4)]) == ["d0", "d1"] * 2
    full = three(free_tokens=0)
    assert len({by_turn(full, 10, turn) for turn in range(3)}) == 3


def test_sessions_stay_where_they_are() -> None:
    assert by_session([], 10, "s") is None
    everybody = decode_options([worker(f"d{i}") for i in range(5)])
    busy = decode_options([worker(f"d{i}", 900 * i, 9) for i in range(5)])
    where = {f"s{i}": by_session(everybody, 10, f"s{i}") for i in range(500)}
    assert where == {name: by_session(busy, 10, name) for name in where}
    assert min(Counter(where.values()).values()) > 60
    fewer = everybody[:-1]
    for name, index in where.items():
        if index != 4:
            assert by_session(fewer, 10, name) == index
    full = decode_options([worker("d0", free_tokens=5), worker("d1")])
    assert {by_session(full, 10, name) for name in where} == {1}
