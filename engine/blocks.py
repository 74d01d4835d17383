"""Who owns each KV block: the allocator and the prefix cache. No tensors.

At every moment a block has exactly one owner:

    FREE ──allocate──► REQUEST ──register──► CACHE ──evict (pins = 0)──► FREE
                          │  └──hold──► OUTBOX ──┐
                          └──────── release ─────┴──────────────────────► FREE

A CACHE block is full, named by its chained hash, never written again, and may be pinned by any
number of requests and outbox entries at once; with no pins it is evictable, least recently used
first. Whoever has a block in its table either owns it (REQUEST) or pins it (CACHE), so `release`
needs nothing but the block ids. Only the engine thread touches this object.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from pdserve.engine.measuring import BlockLives
from pdserve.protocol.errors import PdserveError


class Owner(enum.Enum):
    FREE = enum.auto()
    REQUEST = enum.auto()
    CACHE = enum.auto()
    OUTBOX = enum.auto()


class IntegrityError(PdserveError):
    """The block accounts do not add up: a bug, never a condition to recover from."""


class BlockPool:
    """The accounts of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int, lives: BlockLives | None = None) -> None:
        """`lives`: who measures how long cached blocks are kept."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"A pool needs blocks: got {num_blocks} of {block_size} tokens.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owner = [Owner.FREE] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}
        self._pins: Counter[int] = Counter()
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._routes: dict[int, Sequence[bytes]] = {}
        self._news: dict[bytes, bool] = {}
        self._lives = lives
        self.listening = False
        """Somebody wants to know which route hashes the cache holds; else none are kept."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for a request, evicting cached ones if needed; None if there are too
        few (then nothing changes)."""
        if count > self.num_available:
            return None
        while len(self._free) < count:
            self._evict()
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owner[block] = Owner.REQUEST
        if self._lives is not None:
            self._lives.allocated(blocks)
        return blocks

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        del self._cached[self._name.pop(block)]
        self._news.update(dict.fromkeys(self._routes.pop(block, ()), False))
        self._owner[block] = Owner.FREE
        self._free.append(block)
        if self._lives is not None:
            self._lives.evicted(block)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of `hashes`. Changes nothing."""
        blocks = []
        for name in hashes:
            block = self._cached.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def pin(self, blocks: Iterable[int]) -> None:
        """Keep cached blocks from eviction; undone by `release`."""
        for block in blocks:
            self._expect(block, Owner.CACHE)
            self._pins[block] += 1
            self._evictable.pop(block, None)
            if self._lives is not None:
                self._lives.used(block)

    def register(self, block: int, name: bytes, routes: Sequence[bytes] = ()) -> bool:
        """Give a request's full block to the cache; the request keeps a pin instead.

        `routes`: the route hashes of all positions within the block, if somebody listens.
        False if the cache already has a block of that name: then the request keeps its own.
        """
        self._expect(block, Owner.REQUEST)
        if name in self._cached:
            return False
        self._owner[block] = Owner.CACHE
        self._cached[name] = block
        self._name[block] = name
        self._pins[block] = 1
        if routes:
            self._routes[block] = routes
            self._news.update(dict.fromkeys(routes, True))
        return True

    def take_news(self) -> dict[bytes, bool]:
        """What changed since the last call: route hash → whether the cache holds its block."""
        news, self._news = self._news, {}
        return news

    def release(self, blocks: Sequence[int]) -> None:
        """Give back what a request (or the outbox) owned or pinned.

        Goes from the last block to the first, so that a prefix outlives its continuations.
        """
        for block in reversed(blocks):
            owner = self._owner[block]
            if owner is Owner.CACHE:
                self._unpin(block)
            elif owner is Owner.FREE:
                raise IntegrityError(f"Block {block} was released twice.")
            else:
                self._owner[block] = Owner.FREE
                self._free.append(block)

    def _unpin(self, block: int) -> None:
        if self._pins[block] < 1:
            raise IntegrityError(f"Cached block {block} was unpinned more often than pinned.")
        self._pins[block] -= 1
        if not self._pins[block]:
            del self._pins[block]
            self._evictable[block] = None

    def hold(self, blocks: Iterable[int]) -> None:
        """A request's blocks pass to the outbox; pins on cached ones pass with them."""
        for block in blocks:
            if self._owner[block] is not Owner.CACHE:
                self._expect(block, Owner.REQUEST)
                self._owner[block] = Owner.OUTBOX

    def reset_cache(self) -> None:
        """Forget every cached block that nobody pins."""
        while self._evictable:
            self._evict()

    def _expect(self, block: int, owner: Owner) -> None:
        if self._owner[block] is not owner:
            raise IntegrityError(
                f"Block {block} belongs to {self._owner[block].name}, not to {owner.name}."
            )

    def check_integrity(
        self, tables: Iterable[Sequence[int]], held: Iterable[Sequence[int]]
    ) -> None:
        """Add everything up: `tables` are all requests' block tables, `held` the outbox's.

        Raises IntegrityError with the totals if one block is lost, owned twice or wrongly pinned.
        """
        uses: Counter[int] = Counter()
        private: Counter[int] = Counter()
        for owner, lists in ((Owner.REQUEST, tables), (Owner.OUTBOX, held)):
            for table in lists:
                for block in table:
                    if self._owner[block] is Owner.CACHE:
                        uses[block] += 1
                    else:
                        self._expect(block, owner)
                        private[block] += 1
        cached = len(self._cached)
        total = len(self._free) + cached + len(private)
        sound = (
            total == self.num_blocks
            and uses == self._pins
            and all(count == 1 for count in private.values())
            and len(set(self._free)) == len(self._free)
            and cached == len(self._evictable) + len(self._pins)
            and len(self._name) == cached
            and self._routes.keys() <= self._name.keys()
        )
        if not sound:
            raise IntegrityError(
                f"The block accounts do not add up: {len(self._free)} free + {cached} cached "
                f"({len(self._evictable)} evictable, {len(self._pins)} pinned, {len(uses)} used) "
                f"+ {len(private)} of requests and outbox, of {self.num_blocks} in all."
            )
