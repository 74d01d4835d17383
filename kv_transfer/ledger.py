"""Which tickets stand, and the checksums of blocks, in memory that readers on the same host see.

A reader that copied out of the source's own pool (shared memory, CUDA IPC) must know that the
blocks were still the ticket's when its copy was complete. To ask is a message and an answer; to
look is neither:

    source: stamp ──► slot    the ticket is minted
    reader: copies the blocks, and then finds the stamp in the slot: the copy is the ticket's
    source: 0 ──► slot        the ticket ends, whatever for; only then its blocks are used again

The first word says what the blocks' layout is, so that a reader who has not asked does not take
them for others. The checksums are there as soon as the source has computed them ahead; 0 until
then, and again when the block is offered anew. So a reader of shared memory whose ticket says where
the blocks lie needs the source for nothing but to tell it that it is done.

The order of the two stores at the source and of the two loads at the reader is what it rests on.
Between them lie locks at both ends, which order memory on every processor. A source that was killed
leaves its stamps, and its pool as it was.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import xxhash

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.memory import (
    HOST_SUMS,
    HostMemory,
    MappedPool,
    Numbers,
    PoolError,
)
from pdserve.protocol.ticket import LayoutFingerprint, LeaseMark

log = logging.getLogger(__name__)

SLOTS = 8192
"""Tickets at once; those beyond have no mark, and their readers ask."""
WORD = 8


class Ledger:
    """The source's. Thread-safe."""

    def __init__(
        self, num_blocks: int, fingerprint: LayoutFingerprint, kind: str = HOST_SUMS
    ) -> None:
        """num_blocks: of the pool; kind: of the checksums that are put down here."""
        self.kind = kind
        self._memory = HostMemory(1 + SLOTS + num_blocks, WORD)
        words: Sums = np.frombuffer(self._memory.all, np.uint64)
        words[0] = layout_word(fingerprint)
        self._words, self._sums = words[1 : 1 + SLOTS], words[1 + SLOTS :]
        self._lock = threading.Lock()
        self._stamps = itertools.count(1)
        self._free = list(range(SLOTS - 1, -1, -1))

    def enter(self) -> LeaseMark | None:
        """The mark of a ticket that stands from now on; None if there is no slot."""
        with self._lock:
            if not self._free:
                return None
            slot, stamp = self._free.pop(), next(self._stamps)
            self._words[slot] = stamp
        memory = self._memory
        return LeaseMark(path=memory.path, nonce=memory.nonce, slot=slot, stamp=stamp)

    def forget(self, block_ids: Sequence[int]) -> None:
        """They may hold something else than when they were summed. Before their ticket is known to
        anybody."""
        self._sums[np.asarray(block_ids, np.int64)] = 0

    def know(self, block_ids: Sequence[int], sums: Sums) -> None:
        """Checksums, of its kind, of blocks whose ticket stands."""
        self._sums[np.asarray(block_ids, np.int64)] = sums

    def strike(self, mark: LeaseMark) -> None:
        """The ticket has ended. Before its blocks go back; once per mark."""
        with self._lock:
            assert self._words[mark.slot] == mark.stamp, "a mark was struck twice"
            self._words[mark.slot] = 0
            self._free.append(mark.slot)

    def close(self) -> None:
        """No more readers; those that have mapped it go on seeing it."""
        self._memory.close()


def layout_word(fingerprint: LayoutFingerprint) -> int:
    """The same for two layouts exactly when they are, but for a chance of 1 in 2⁶⁴."""
    return xxhash.xxh3_64_intdigest(fingerprint.digest().encode())


class View:
    """A source's ledger, mapped as long as this object lives."""

    def __init__(self, path: str, nonce: bytes) -> None:
        """Raises PoolError if there is none."""
        words: Sums = MappedPool(path, WORD, nonce).all.view(np.uint64)
        if len(words) <= SLOTS:
            raise PoolError(f"A ledger has more than {len(words)} words.")
        self.layout = int(words[0])
        """The source's `layout_word`."""
        self.slots, self.sums = words[1 : 1 + SLOTS], words[1 + SLOTS :]


class Lease:
    """A ticket as a reader sees it in its source's ledger."""

    def __init__(self, view: View, mark: LeaseMark) -> None:
        """Raises PoolError if there cannot be such a mark."""
        if not 0 <= mark.slot < SLOTS or mark.stamp < 1:
            raise PoolError(f"A ledger has no {mark}.")
        self._view, self._mark, self.layout = view, mark, view.layout

    def stands(self) -> bool:
        """Whether the ticket stands. To be called after the last byte was copied, not before; the
        source must be asked if not, since it may not have come to see that it is over."""
        with _ORDER:
            return int(self._view.slots[self._mark.slot]) == self._mark.stamp

    def sums(self, blocks: Numbers) -> Sums | None:
        """The checksums of these blocks of the source's pool; None if one is not known yet. Of
        blocks that are no longer the ticket's they may be anything: look whether it stands."""
        try:
            found = self._view.sums[blocks]
        except IndexError:
            return None
        return found if np.count_nonzero(found) == len(found) else None


_ORDER = threading.Lock()
"""Taken for the order of memory that comes with it."""


class Ledgers:
    """The sources' ledgers that a reader has mapped, each as long as a line to it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: weakref.WeakValueDictionary[tuple[str, bytes], View] = (
            weakref.WeakValueDictionary()
        )

    def lease(self, line: Line, mark: LeaseMark | None) -> Lease | None:
        """What the mark names, if it can be seen."""
        if mark is None:
            return None
        key = (mark.path, mark.nonce)
        try:
            with self._lock:
                view = self._mapped.get(key)
                if view is None:
                    view = self._mapped[key] = View(mark.path, mark.nonce)
            line.keeps["ledger"] = view
            return Lease(view, mark)
        except PoolError as error:
            log.debug("A ticket's mark cannot be seen: %s", error)
            return None
