"""The placement policy over snapshots: none, all idle, all busy, all equal, one slow."""

from __future__ import annotations

import random
from collections import Counter

from pdserve.cluster.records import Role
from pdserve.router.placement import (
    REQUEST_TOKENS,
    WorkerLoad,
    choose_decode,
    choose_path,
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
    path = choose_path(workers, 100, random.Random(seed), avoid)
    return path.first.worker_id if path else ""


def decode(*workers: WorkerLoad, seed: int = 0, avoid: tuple[str, ...] = ()) -> str:
    found = choose_decode(workers, 100, random.Random(seed), avoid=avoid)
    return found.worker_id if found else ""


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
    paths = [choose_path(workers, 10, rng) for _ in range(600)]
    counts = Counter(path.first.worker_id for path in paths if path)
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
        found = choose_decode([worker(n, 0, int(v)) for n, v in load.items()], 10, rng)
        assert found is not None
        given[found.worker_id] += 1
        load[found.worker_id] += 1
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
    assert first(worker("p0"), worker("d0", 0, requests), worker("c0", 200)) == "c0"


def test_failed_workers_are_avoided_while_there_are_others() -> None:
    assert first(worker("p0"), worker("p1", 999), worker("d0"), avoid=("p0",)) == "p1"
    assert first(worker("p0"), worker("d0"), avoid=("p0",)) == "p0"
    assert first(worker("c0"), worker("p0", 999), worker("d0"), avoid=("c0",)) == "p0"
    assert first(worker("c0", 999), worker("p0"), worker("d0"), avoid=("p0",)) == "c0"
    assert decode(worker("d0"), worker("d1", 0, 9), avoid=("d0",)) == "d1"
    assert decode(worker("d0"), worker("c0", 0, 9), avoid=("d0",)) == "c0"


def test_blocks_go_only_where_they_fit() -> None:
    workers = [worker("d0", fingerprint="a"), worker("d1", 0, 99, fingerprint="b")]
    found = choose_decode(workers, 10, random.Random(0), fingerprint="b")
    assert found is not None and found.worker_id == "d1"
    assert choose_decode(workers, 10, random.Random(0), fingerprint="c") is None


def test_decode_workers_come_before_colocated_ones() -> None:
    assert decode(worker("c0"), worker("d0", 0, 3)) == "d0"
    assert decode(worker("c0"), worker("p0")) == "c0"
