"""What workers measure: lives of cached blocks, transfers, and how routers show them."""

from __future__ import annotations

import msgspec
from fake_engine import Bench, prompt
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.engine.blocks import BlockPool
from pdserve.engine.measuring import BlockLives, Measuring
from pdserve.engine.ports import Chunk, ChunkResult, Watcher
from pdserve.protocol.measures import Measures, Tally
from pdserve.protocol.transfer import FetchReport
from pdserve.router.worker_metrics import measured

LABELS = {"model_name": "m", "engine": "0"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(*workers: tuple[str, Measures]) -> dict[tuple[str, str], float]:
    """Sample and worker → value, of a scrape."""

    class Collector:
        def collect(self) -> object:
            return measured(workers, LABELS)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())  # type: ignore[arg-type]
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name + sample.labels.get("le", ""), sample.labels["engine"]): sample.value
        for family in families
        for sample in family.samples
    }


def test_values_fall_into_buckets() -> None:
    tally = Tally((1, 2, 5))
    for value in (0, 1, 1.5, 2, 5, 6, 7):
        tally.add(value)
    assert tally.spread().counts == (2, 2, 1, 2)
    assert tally.count == 7 and tally.spread().total == 22.5


def test_lives_of_blocks() -> None:
    clock = Clock()
    lives = BlockLives(1.0, clock)
    pool = BlockPool(2, 4, lives)
    [first] = pool.allocate(1) or []
    pool.register(first, b"a")
    pool.release([first])
    for later in (1.0, 2.0, 4.0):
        clock.now += later
        pool.pin(pool.match([b"a"]))
        pool.release([first])
    clock.now += 8.0
    pool.allocate(2)  # evicts it
    found = lives.residence()
    assert found.lifetime.total == 15.0 and found.idle.total == 8.0
    assert found.reuse_gap.total == 6.0 and sum(found.reuse_gap.counts) == 2
    assert sum(found.lifetime.counts) == sum(found.idle.counts) == 1


def test_a_block_that_nobody_used_again_was_idle_all_its_life() -> None:
    clock = Clock()
    lives = BlockLives(1.0, clock)
    pool = BlockPool(1, 4, lives)
    [block] = pool.allocate(1) or []
    pool.release([block])  # was never in the cache: no life
    [block] = pool.allocate(1) or []
    clock.now += 3.0
    pool.register(block, b"a")
    pool.release([block])
    pool.reset_cache()
    found = lives.residence()
    assert found.lifetime.total == found.idle.total == 3.0
    assert not any(found.reuse_gap.counts)


def test_a_sample_of_the_blocks() -> None:
    draws = iter((0.4, 0.6))
    lives = BlockLives(0.5, draw=lambda: next(draws))
    pool = BlockPool(2, 4, lives)
    for block in pool.allocate(2) or []:
        pool.register(block, bytes([block]))
        pool.release([block])
    pool.reset_cache()
    assert sum(lives.residence().lifetime.counts) == 1


def test_transfers_are_measured_and_shown() -> None:
    measuring = Measuring()
    came = FetchReport(request_id="a", nbytes=4096, blocks=8, took_s=0.02, asking_s=0.001)
    lost = FetchReport(request_id="b", failed=(1,), reason="gone")
    measuring.fetched(came, called_off=False)
    measuring.fetched(lost, called_off=False)
    measuring.fetched(lost, called_off=True)
    measuring.fetched(FetchReport(request_id="c"), called_off=False)  # nothing was missing
    measures = measuring.measures(failed_releases=3, expired_tickets=4)
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(measures), type=Measures)
    found = shown(("d0", told), ("d1", Measuring().measures()))
    assert found["vllm:nixl_bytes_transferred_sum", "d0"] == 4096
    assert found["vllm:nixl_num_descriptors_sum", "d0"] == 8
    assert found["vllm:nixl_xfer_time_seconds_bucket0.01", "d0"] == 0
    assert found["vllm:nixl_xfer_time_seconds_bucket0.025", "d0"] == 1
    assert found["vllm:nixl_post_time_seconds_count", "d0"] == 1
    assert found["vllm:nixl_num_failed_transfers_total", "d0"] == 1
    assert found["vllm:nixl_num_failed_notifications_total", "d0"] == 3
    assert found["vllm:nixl_num_kv_expired_reqs_total", "d0"] == 4
    assert found["vllm:nixl_bytes_transferred_count", "d1"] == 0
    names = {name for name, _ in found}
    assert not any("corrupted" in name or "kv_block" in name for name in names)


def test_a_request_with_bad_logits_counts_once() -> None:
    bench = Bench()
    execute = bench.runner.execute

    def bad(chunks: list[Chunk], watcher: Watcher | None = None) -> list[ChunkResult]:
        corrupted = [chunk.request.request_id == "a" for chunk in chunks]
        return [
            ChunkResult(result.token_id, corrupted=one)
            for result, one in zip(execute(chunks, watcher), corrupted, strict=True)
        ]

    bench.runner.execute = bad  # type: ignore[method-assign, assignment]
    bench.engine.measuring = Measuring(BlockLives(1.0), nans=True)
    bench.submit("a", prompt(5), max_tokens=4)
    bench.submit("b", prompt(6), max_tokens=4)
    bench.run()
    found = shown(("w", bench.engine.measuring.measures()))
    assert found["vllm:corrupted_requests_total", "w"] == 1
    assert found["vllm:kv_block_lifetime_seconds_count", "w"] == 0
    assert found["vllm:iteration_tokens_total_sum", "w"] == 5 + 6 + 3 + 3
    bench.assert_clean()
