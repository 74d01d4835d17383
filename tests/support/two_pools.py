"""Two real pools, a real source and a real sink, driven at random and checked against a model.

The driver plays both engines: it admits prompts, computes them chunk by chunk and sometimes slice
by slice, offers them at the end or while they grow, fetches, decodes, preempts, aborts, lets leases
expire, restarts either side, and asks with tickets that are no longer good, while connections
break, bytes change (`faults`) and tickets end at the worst moment (`meddling`). Blocks that become
free are scribbled over at once, so that whoever still reads them is found out.

After every step all blocks of both pools are accounted for; every block that a report calls intact
is compared with what it must hold; a ticket that was over when the fetch began brings nothing, nor
does one that was over before a borrowed copy was confirmed; no block is free while it is read.
"""

from __future__ import annotations

import queue
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from meddling import Meddler
from transfer_rig import FINGERPRINT

from pdserve.engine.blocks import BlockPool, Owner
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink, faulty_source
from pdserve.kv_transfer.held import TicketState
from pdserve.kv_transfer.memory import HostMemory
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import FetchReport

BLOCKS, BLOCK_NBYTES, SIZE = 24, 96, FINGERPRINT.block_size
SLICES = 4
CHAINS, LONGEST = 6, 6
LEASE_S = 30.0
PATIENCE_S = 20.0


@dataclass
class Prompt:
    """A request on the prefill side, perhaps at the same time on the decode side too."""

    number: int
    chain: int
    full: int
    """Full blocks; one more follows that only this request has."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    ticket: KVTicket | None = None
    growing: bool = False
    """Its ticket is out, and its blocks are still being computed."""
    shown: int = 0
    """Blocks that the growing ticket was extended by."""
    over: bool = False
    """Its ticket has ended for sure: withdrawn, expired, released, or of an earlier epoch. A
    report alone does not say so: the sink reports a failure before it tells the source."""
    targets: list[int] = field(default_factory=list)
    cached: int = 0
    """Of the targets, those that the decode side had already."""
    hopeless: bool = False
    """The ticket was over before the fetch began."""

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    @property
    def names(self) -> list[bytes]:
        return [bytes([self.chain, index]) for index in range(self.full)]

    def content(self, index: int) -> bytes:
        """What block `index` must hold."""
        own = self.number if index == self.full else 0
        return np.random.default_rng([self.chain, index, own]).bytes(BLOCK_NBYTES)


class Side:
    """One worker's memory and accounts."""

    def __init__(self) -> None:
        self.memory = HostMemory(BLOCKS, BLOCK_NBYTES)
        self.pool = BlockPool(BLOCKS, SIZE)

    def take(self, prompt: Prompt) -> tuple[list[int], int] | None:
        """Blocks for a prompt, the cached ones first: (blocks, how many are cached)."""
        matched = self.pool.match(prompt.names)
        self.pool.pin(matched)
        fresh = self.pool.allocate(prompt.full + 1 - len(matched))
        if fresh is None:
            self.pool.release(matched)
            return None
        return matched + fresh, len(matched)

    def give_back(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in blocks:
            if self.pool._owner[block] is Owner.FREE:
                self.memory.view(block)[:] = b"\xee" * BLOCK_NBYTES

    def expect(self, prompt: Prompt, blocks: list[int], indices: range | list[int]) -> None:
        for index in indices:
            assert bytes(self.memory.view(blocks[index])) == prompt.content(index), (prompt, index)


class TwoPools:
    """Call `act` with one of the methods below as often as wanted, then `finish`."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.random = random.Random(seed)
        self.dice = Dice(replace(faults, seed=seed))
        self.seen: Counter[str] = Counter()
        self.now = 1000.0
        self.epoch = 0
        self.numbers = 0
        self.computing: list[Prompt] = []
        self.offered: list[Prompt] = []
        self.fetching: dict[str, Prompt] = {}
        self.decoding: list[Prompt] = []
        self.past: list[Prompt] = []
        self.held: dict[str, Prompt] = {}
        self.meddler = Meddler(seed, self.withdraw, self.grows)
        self.asked: dict[str, str] = {}
        """Ticket → request, of all fetches."""
        self.returned: queue.SimpleQueue[tuple[KVTicket, str]] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[FetchReport] = queue.SimpleQueue()
        self.start_source()
        self.start_sink()

    # The two workers.

    def start_source(self) -> None:
        self.epoch += 1
        self.prefill = Side()
        self.source = TransferSource(
            self.prefill.memory,
            FINGERPRINT,
            worker_id="prefill-0",
            epoch=self.epoch,
            host="127.0.0.1",
            secret="s",
            transports=("shm", "tcp"),
            on_returned=self.on_returned,
            lease_s=LEASE_S,
            slices=SLICES,
            clock=lambda: self.now,
            halves={
                name: self.meddler.source(make)
                for name, make in faulty_source(SOURCE_HALVES, self.dice).items()
            },
        )

    def on_returned(self, ticket: KVTicket, ending: str) -> None:
        self.meddler.freed(ticket.ticket_id)
        self.returned.put((ticket, ending))

    def grows(self, ticket_id: str) -> bool:
        return self.source.outbox.state(ticket_id) is TicketState.GROWING

    def withdraw(self, ticket_id: str) -> bool:
        """Called by the threads that read: whether the ticket is over now."""
        source = self.source
        source.withdraw(self.asked[ticket_id])
        return source.outbox.state(ticket_id) in (TicketState.ENDING, TicketState.RETURNED)

    def start_sink(self) -> None:
        self.decode = Side()
        self.sink = TransferSink(
            self.decode.memory,
            FINGERPRINT,
            name="decode-0",
            secret="s",
            threads=2,
            transport=self.random.choice(["auto", "shm", "tcp"]),
            halves={
                name: self.meddler.sink(make)
                for name, make in faulty_sink(SINK_HALVES, self.dice).items()
            },
        )

    def restart_source(self) -> None:
        self.source.close()
        self.collect_returned()
        assert not self.held, "closing gives everything back"
        self.prefill.memory.close()
        growing = [prompt for prompt in self.computing if prompt.growing]
        for prompt in [*self.offered, *growing, *self.fetching.values()]:
            prompt.over, prompt.growing = True, False
        self.past += self.offered + growing
        self.computing, self.offered = [], []
        self.start_source()

    def restart_sink(self) -> None:
        self.sink.close()
        while self.fetching:
            self.settle()
        for prompt in self.decoding:
            self.decode.give_back(prompt.targets)
        self.decoding = []
        self.check()
        self.decode.memory.close()
        self.start_sink()

    # What happens.

    def act(self, action: Callable[[], None], seed: int) -> None:
        """`seed` decides what is left open: which prompt, how long, over which transport."""
        self.random = random.Random(seed)
        action()
        self.collect_returned()
        self.check()

    def admit(self) -> None:
        prompt = Prompt(self.numbers, self.random.randrange(CHAINS), self.random.randrange(LONGEST))
        self.numbers += 1
        self.take_in(prompt)

    def take_in(self, prompt: Prompt) -> None:
        taken = self.prefill.take(prompt)
        if taken is None:
            return
        prompt.blocks, prompt.computed = taken
        self.prefill.expect(prompt, prompt.blocks, range(prompt.computed))
        self.computing.append(prompt)

    def compute(self) -> None:
        """A chunk of one or two blocks; after the last one the prompt is offered, unless it was
        after an earlier one."""
        if not self.computing:
            return
        prompt = self.random.choice(self.computing)
        for _ in range(self.random.randint(1, 2)):
            if prompt.computed > prompt.full:
                break
            block = prompt.blocks[prompt.computed]
            self.prefill.memory.view(block)[:] = prompt.content(prompt.computed)
            if prompt.computed < prompt.full:
                self.prefill.pool.register(block, prompt.names[prompt.computed])
            prompt.computed += 1
        if prompt.computed > prompt.full:
            self.complete(prompt)
        elif self.random.random() < 0.7:
            self.grow(prompt)

    def compute_layers(self) -> None:
        """Some slices of the next blocks of a prompt whose ticket is out."""
        growing = [p for p in self.computing if p.growing and p.shown == p.computed <= p.full]
        if not growing:
            return
        fetched = [prompt for prompt in growing if self.fetching.get(prompt.request_id) is prompt]
        prompt = self.random.choice(fetched or growing)
        assert prompt.ticket is not None
        if prompt.request_id not in self.fetching:
            self.start_fetch(prompt)
        slices, length = self.random.randrange(1, SLICES), BLOCK_NBYTES // SLICES
        ahead = range(prompt.computed, min(prompt.computed + 2, prompt.full + 1))
        for index in ahead:
            part = prompt.content(index)[: slices * length]
            self.prefill.memory.view(prompt.blocks[index])[: len(part)] = part
        before = self.meddler.reads(prompt.ticket.ticket_id)
        blocks = [prompt.blocks[index] for index in ahead]
        self.source.advance(prompt.ticket.ticket_id, blocks, slices)
        if self.fetching.get(prompt.request_id) is prompt:
            self.meddler.await_read(prompt.ticket.ticket_id, before)
            self.seen["by layers"] += self.meddler.reads(prompt.ticket.ticket_id) > before
            if self.random.random() < 0.2:
                self.cut(prompt)

    def grow(self, prompt: Prompt) -> None:
        if not prompt.growing:
            prompt.growing = True
            prompt.ticket = self.source.open(
                prompt.request_id, SIZE * prompt.full + 1, prompt.names, sliced=True
            )
        assert prompt.ticket is not None
        before = self.meddler.reads(prompt.ticket.ticket_id)
        self.source.extend(prompt.request_id, prompt.blocks[prompt.shown : prompt.computed])
        prompt.shown = prompt.computed
        if self.fetching.get(prompt.request_id) is prompt and self.random.random() < 0.5:
            self.meddler.await_read(prompt.ticket.ticket_id, before)
            if self.random.random() < 0.2:
                self.cut(prompt)

    def complete(self, prompt: Prompt) -> None:
        self.computing.remove(prompt)
        self.prefill.pool.hold(prompt.blocks)
        if prompt.growing:
            assert prompt.ticket is not None
            self.held[prompt.ticket.ticket_id] = prompt
            prompt.growing = False
            prompt.ticket = self.source.seal(prompt.request_id, prompt.blocks[prompt.shown :])
            self.seen["sealed"] += 1
        else:
            prompt.ticket = self.source.offer(
                prompt.request_id, prompt.blocks, SIZE * prompt.full + 1, prompt.names
            )
            self.held[prompt.ticket.ticket_id] = prompt
        if self.fetching.get(prompt.request_id) is not prompt:
            self.offered.append(prompt)

    def cut(self, prompt: Prompt) -> None:
        """Take the blocks of a prompt that is not complete back, unless somebody reads them."""
        self.computing.remove(prompt)
        if prompt.growing:
            assert prompt.ticket is not None
            prompt.over, prompt.growing = True, False
            self.past.append(prompt)
            if not self.source.cut(prompt.request_id):
                self.seen["cut while read"] += 1
                self.prefill.pool.hold(prompt.blocks)
                self.held[prompt.ticket.ticket_id] = prompt
                return
            self.meddler.freed(prompt.ticket.ticket_id)
        self.prefill.give_back(prompt.blocks)

    def preempt(self) -> None:
        """A prompt loses its blocks, and is computed again under the same name."""
        if self.computing:
            prompt = self.random.choice(self.computing)
            self.cut(prompt)
            self.take_in(Prompt(prompt.number, prompt.chain, prompt.full))

    def fetch(self) -> None:
        growing = [prompt for prompt in self.computing if prompt.growing]
        those = growing if growing and self.random.random() < 0.5 else self.offered
        choice = [prompt for prompt in those if prompt.request_id not in self.fetching]
        if choice:
            prompt = self.random.choice(choice)
            if self.start_fetch(prompt) and not prompt.growing:
                self.offered.remove(prompt)

    def ask_again(self) -> None:
        """With a ticket that has ended."""
        gone = [prompt for prompt in self.past[-50:] if prompt.over]
        if gone:
            prompt = self.random.choice(gone)
            if prompt.request_id not in self.fetching:
                self.start_fetch(replace(prompt))

    def start_fetch(self, prompt: Prompt) -> bool:
        assert prompt.ticket is not None
        taken = self.decode.take(prompt)
        if taken is None:
            return False
        prompt.targets, prompt.cached = taken
        prompt.hopeless = prompt.over
        self.asked[prompt.ticket.ticket_id] = prompt.request_id
        self.fetching[prompt.request_id] = prompt
        self.sink.fetch(
            prompt.ticket,
            range(prompt.cached, prompt.full + 1),
            prompt.targets[prompt.cached :],
            time.monotonic() + PATIENCE_S,
            self.reports.put,
        )
        return True

    def settle(self) -> None:
        """Wait for one report, if one must come, and use it as an engine would."""
        sure = any(not prompt.growing for prompt in self.fetching.values())
        if not sure and self.reports.empty():
            return
        report = self.reports.get(timeout=2 * PATIENCE_S)
        prompt = self.fetching.pop(report.request_id)
        if not prompt.growing:
            self.past = [*self.past[-200:], prompt]
        assert prompt.ticket is not None
        borrowed = report.transport == "shm" and report.nbytes
        if borrowed and prompt.ticket.ticket_id in self.meddler.pulled:
            assert not report.ok, "the lease was over when the copy was confirmed"
        sound = min(report.failed, default=prompt.full + 1)
        if prompt.hopeless:
            assert sound == prompt.cached, "blocks came on a ticket that was over"
        failed = set(report.failed)
        intact = [index for index in range(prompt.full + 1) if index not in failed]
        self.decode.expect(prompt, prompt.targets, intact)
        for index in range(prompt.cached, min(sound, prompt.full)):
            self.decode.pool.register(prompt.targets[index], prompt.names[index])
        self.seen["ok" if report.ok else "failed"] += 1
        if report.ok:
            self.decoding.append(prompt)
        else:
            self.decode.give_back(prompt.targets)

    def finish_one(self) -> None:
        if self.decoding:
            prompt = self.decoding.pop(self.random.randrange(len(self.decoding)))
            self.decode.expect(prompt, prompt.targets, range(prompt.full + 1))
            self.decode.give_back(prompt.targets)

    def abort(self) -> None:
        """Somewhere in its life."""
        prompts = [*self.computing, *self.offered, *self.fetching.values()]
        if not prompts:
            return
        prompt = self.random.choice(prompts)
        if prompt in self.computing:
            self.cut(prompt)
        elif prompt in self.offered:
            self.offered.remove(prompt)
            self.source.withdraw(prompt.request_id)
            prompt.over = True
            self.past.append(prompt)
        elif self.random.random() < 0.5:
            self.sink.cancel(prompt.request_id)
        else:  # the prefill side hears of it first
            self.source.withdraw(prompt.request_id)

    def expire(self) -> None:
        """Nobody comes for a whole lease."""
        self.now += LEASE_S + 1
        self.source.outbox.expire()
        for prompt in self.offered:
            prompt.over = True
        self.past += self.offered
        self.offered = []

    def renew(self) -> None:
        """Time passes and those who wait say that they still do."""
        self.now += LEASE_S / 2
        for prompt in [*self.offered, *self.fetching.values()]:
            assert prompt.ticket is not None
            stands = self.source.outbox.renew(prompt.ticket.ticket_id, prompt.ticket.epoch)
            if prompt.growing:
                assert stands
            if prompt.hopeless:
                assert not stands

    # What must hold.

    def collect_returned(self) -> None:
        while not self.returned.empty():
            ticket, _ = self.returned.get()
            prompt = self.held.pop(ticket.ticket_id)  # KeyError: returned twice
            assert ticket.epoch == self.epoch, "an old epoch gave blocks back"
            prompt.over = True
            self.prefill.give_back(prompt.blocks)

    def check(self) -> None:
        assert not self.meddler.mistakes, self.meddler.mistakes
        self.prefill.pool.check_integrity(
            [prompt.blocks for prompt in self.computing],
            [prompt.blocks for prompt in self.held.values()],
        )
        self.decode.pool.check_integrity(
            [prompt.targets for prompt in [*self.fetching.values(), *self.decoding]], []
        )

    def finish(self) -> None:
        """Bring everything to an end: no block may be left with anybody."""
        for prompt in list(self.computing):
            self.cut(prompt)
        while self.fetching:
            self.settle()
        while self.decoding:
            self.finish_one()
        self.source.close()
        self.sink.close()
        self.collect_returned()
        self.check()
        assert not self.held and self.source.counters().outbox.held_blocks == 0
        assert self.sink.counters().fetching == 0
        assert self.prefill.pool.num_available == self.decode.pool.num_available == BLOCKS
        self.close()

    def close(self) -> None:
        self.source.close()
        self.sink.close()
        self.prefill.memory.close()
        self.decode.memory.close()
