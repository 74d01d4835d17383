"""Block ownership: every block has one owner, whatever is done in whatever order."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdserve.engine.blocks import BlockPool, IntegrityError
from pdserve.protocol.blocks import (
    block_hashes,
    is_route_position,
    num_routes,
    pack_tokens,
    root_hash,
    route_hashes,
    route_index,
    route_position,
    unpack_tokens,
)

ROOT = root_hash("layout")


def test_hashes_name_the_whole_prefix():
    tokens = list(range(12))
    hashes = block_hashes(tokens, 4, ROOT)
    assert len(hashes) == 3
    assert len(set(hashes)) == 3
    assert block_hashes([9, *tokens[1:]], 4, ROOT)[2] != hashes[2]
    assert block_hashes(tokens, 4, root_hash("layout", "salt"))[0] != hashes[0]
    assert block_hashes(tokens[:11], 4, ROOT) == hashes[:2]
    assert block_hashes(tokens, 4, ROOT, hashes[:1]) == hashes


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    pool.release(blocks)
    assert pool.num_available == 4


def test_a_prefix_outlives_its_continuations():
    pool = BlockPool(3, 2)
    hashes = block_hashes(range(6), 2, ROOT)
    blocks = pool.allocate(3) or []
    for block, name in zip(blocks, hashes, strict=True):
        assert pool.register(block, name)
    pool.release(blocks)
    assert pool.match(hashes) == blocks
    pool.allocate(1)
    assert pool.match(hashes) == blocks[:2]


def test_pinned_blocks_are_not_evicted():
    pool = BlockPool(2, 2)
    (name,) = block_hashes(range(2), 2, ROOT)
    (block,) = pool.allocate(1) or []
    pool.register(block, name)
    assert pool.allocate(2) is None
    pool.release([block])
    assert pool.allocate(2) is not None


def test_a_second_copy_of_a_block_stays_with_its_request():
    pool = BlockPool(2, 2)
    (name,) = block_hashes(range(2), 2, ROOT)
    first, second = pool.allocate(2) or []
    assert pool.register(first, name)
    assert not pool.register(second, name)
    pool.release([second])
    assert (pool.num_free, pool.match([name])) == (1, [first])


def test_double_release_is_an_error():
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1) or []
    pool.release(blocks)
    with pytest.raises(IntegrityError, match="released twice"):
        pool.release(blocks)


def test_lost_and_shared_blocks_are_found():
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2) or []
    pool.check_integrity([blocks], [])
    with pytest.raises(IntegrityError, match="do not add up"):
        pool.check_integrity([blocks[:1]], [])
    with pytest.raises(IntegrityError, match="do not add up"):
        pool.check_integrity([blocks, blocks[:1]], [])
    with pytest.raises(IntegrityError, match="belongs to REQUEST"):
        pool.check_integrity([], [blocks])


class PoolMachine(RuleBasedStateMachine):
    """Requests come, grow, share, go to the outbox and end, in any order."""

    @initialize(size=st.integers(1, 12))
    def start(self, size: int) -> None:
        self.pool = BlockPool(size, 2)
        self.tables: list[tuple[list[int], list[bytes]]] = []
        self.held: list[list[int]] = []

    @rule(prompt=st.lists(st.integers(0, 1), min_size=2, max_size=12))
    def admit(self, prompt: list[int]) -> None:
        hashes = block_hashes(prompt, 2, ROOT)
        cached = self.pool.match(hashes)
        self.pool.pin(cached)
        rest = self.pool.allocate(self.pool.blocks_for(len(prompt)) - len(cached))
        if rest is None:
            self.pool.release(cached)
            return
        for block, name in zip(rest, hashes[len(cached) :], strict=False):
            self.pool.register(block, name)
        self.tables.append((cached + rest, hashes))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.hold(table)
        self.held.append(table)

    @precondition(lambda self: self.held)
    @rule()
    def returned(self) -> None:
        self.pool.release(self.held.pop())

    @rule()
    def reset_cache(self) -> None:
        self.pool.reset_cache()
        assert not self.pool.num_evictable

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity([table for table, _ in self.tables], self.held)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for table in [t for t, _ in self.tables] + self.held:
                self.pool.release(table)
            self.pool.check_integrity([], [])
            assert self.pool.num_available == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_route_positions() -> None:
    positions = [route_position(index) for index in range(80)]
    assert positions[:18] == [16 * n for n in (*range(1, 17), 18, 20)]
    assert positions == [n for n in range(positions[-1] + 1) if is_route_position(n)]
    assert [route_index(position) for position in positions] == list(range(80))
    for length in range(2000):
        assert num_routes(length) == sum(position <= length for position in positions)


def test_packed_tokens_have_the_same_route_hashes() -> None:
    rng = random.Random(0)
    for length in (0, 1, 15, 16, 17, 300, 1000, 4096):
        tokens = [rng.choice([0, 7, 2**32 - 1]) for _ in range(length)]
        packed = pack_tokens(tokens)
        assert unpack_tokens(packed) == tokens
        hashes = route_hashes(tokens, "s")
        assert route_hashes(packed, "s") == hashes
        for known in (0, len(hashes) // 2, len(hashes)):
            assert route_hashes(packed, "s", hashes[:known]) == hashes
            assert route_hashes(tokens, "s", hashes[:known]) == hashes


def test_route_hashes_name_prefixes() -> None:
    tokens = list(range(500))
    hashes = route_hashes(tokens)
    assert len(hashes) == 23 and len(set(hashes)) == 23  # 15 + 8 of 16 … 30, up to 480 tokens
    assert route_hashes(tokens, known=hashes[:7]) == hashes
    assert route_hashes(tokens[:100]) == hashes[:6]
    assert route_hashes([*tokens[:33], 9, *tokens[34:]])[:3] == [*hashes[:2], ANY]
    assert not set(route_hashes(tokens, "salt")) & set(hashes)


class _Any:
    def __eq__(self, _: object) -> bool:
        return True


ANY = _Any()


def test_news_say_what_came_and_went() -> None:
    pool = BlockPool(2, 16)
    [first], [second] = pool.allocate(1) or [], pool.allocate(1) or []
    assert pool.register(first, b"a", [b"A", b"B"]) and pool.register(second, b"b")
    assert pool.take_news() == {b"A": True, b"B": True} and pool.take_news() == {}
    pool.release([first])
    assert pool.take_news() == {}
    pool.allocate(1)
    assert pool.take_news() == {b"A": False, b"B": False}
