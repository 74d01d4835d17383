"""An engine without tensors: the "KV" of a token is the token itself, so wrong blocks show.

`FakeRunner` writes each computed token into its slot and checks, before it draws, that the slots of
the whole sequence hold exactly the sequence: a block freed too early, shared wrongly or fetched
into the wrong place fails the test at that step. The "model" draws a hash of all tokens so far.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Sequence

import msgspec

from pdserve.engine.blocks import BlockPool
from pdserve.engine.loop import Engine, StepOutcome
from pdserve.engine.pace import Pace
from pdserve.engine.ports import Chunk, ChunkResult, Watcher
from pdserve.engine.scheduler import Limits
from pdserve.protocol.blocks import pack_tokens
from pdserve.protocol.errors import ErrorCode
from pdserve.protocol.messages import Continue, Output, Submit
from pdserve.protocol.sampling import SamplingParams
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport

VOCAB = 1000
FINGERPRINT = LayoutFingerprint(
    model="fake",
    weights="0",
    dtype="float32",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    block_size=4,
)


def next_token(token_ids: Sequence[int]) -> int:
    """The fake model: any change anywhere in the sequence changes the draw."""
    return zlib.crc32(repr(list(token_ids)).encode()) % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What any correct topology must answer."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Keeps the tokens of every slot of its pool."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.told: Callable[[int], object] = lambda slices: None
        """Called after each slice that the watcher was told of."""
        self.slots: list[list[int]] = [[-1] * block_size for _ in range(num_blocks)]
        self.steps: list[list[tuple[str, int, int]]] = []
        self.fail_next = False

    def execute(self, chunks: Sequence[Chunk], watcher: Watcher | None = None) -> list[ChunkResult]:
        if watcher is not None:
            for slices in range(1, watcher.slices):
                watcher.tell(slices, None)
                self.told(slices)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake device is on fire")
        self.steps.append([(c.request.request_id, c.start, c.length) for c in chunks])
        return [self._run(chunk) for chunk in chunks]

    def _run(self, chunk: Chunk) -> ChunkResult:
        request = chunk.request
        for position in range(chunk.start, chunk.start + chunk.length):
            self._slot(request.block_table, position, request.token_ids[position])
        end = chunk.start + chunk.length
        seen = [self._slot(request.block_table, position) for position in range(end)]
        assert seen == request.token_ids[:end], f"{request.request_id} reads wrong KV"
        return ChunkResult(token_id=next_token(seen) if chunk.samples else None)

    def _slot(self, table: Sequence[int], position: int, value: int | None = None) -> int:
        block = self.slots[table[position // self.block_size]]
        if value is not None:
            block[position % self.block_size] = value
        return block[position % self.block_size]


class FakeOutbox:
    """Holds blocks until told to return them."""

    def __init__(self, source: str = "p", slices: int = 1) -> None:
        self.slices = slices
        self.advanced: list[tuple[str, list[int], int]] = []
        """What was said of slices: ticket, blocks, slices."""
        self.tickets: dict[str, tuple[KVTicket, list[int]]] = {}
        self.returned: Callable[[str], None] = lambda ticket_id: None
        self.source = source
        self.minted = 0
        self.growing: dict[str, str] = {}
        """Request id → ticket id."""
        self.read: set[str] = set()
        """Requests whose blocks somebody is looking at when they are cut."""
        self.cut_tickets: set[str] = set()
        """Tickets that were cut while somebody looked."""

    def offer(
        self,
        request_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        block_hashes: Sequence[bytes],
    ) -> KVTicket:
        ticket = self._mint(request_id, num_tokens, block_hashes, False)
        self.tickets[ticket.ticket_id] = (ticket, list(block_ids))
        assert len(block_ids) == ticket.num_blocks
        return ticket

    def open(
        self,
        request_id: str,
        num_tokens: int,
        block_hashes: Sequence[bytes],
        *,
        sliced: bool = False,
    ) -> KVTicket:
        assert request_id not in self.growing
        ticket = self._mint(request_id, num_tokens, block_hashes, True)
        ticket = msgspec.structs.replace(ticket, slices=self.slices if sliced else 1)
        self.tickets[ticket.ticket_id] = (ticket, [])
        self.growing[request_id] = ticket.ticket_id
        return ticket

    def extend(self, request_id: str, block_ids: Sequence[int]) -> None:
        self.tickets[self.growing[request_id]][1].extend(block_ids)

    def advance(
        self,
        ticket_id: str,
        block_ids: Sequence[int],
        slices: int,
        computed: Callable[[], None] | None = None,
    ) -> None:
        assert 0 < slices < self.slices and ticket_id in self.growing.values()
        ticket, blocks = self.tickets[ticket_id]
        assert block_ids and len({*blocks, *block_ids}) == len(blocks) + len(block_ids)
        assert len(blocks) + len(block_ids) <= ticket.num_blocks
        self.advanced.append((ticket_id, list(block_ids), slices))

    def seal(self, request_id: str, block_ids: Sequence[int]) -> KVTicket:
        ticket_id = self.growing.pop(request_id)
        ticket, blocks = self.tickets[ticket_id]
        blocks.extend(block_ids)
        assert len(blocks) == ticket.num_blocks == len(set(blocks))
        return msgspec.structs.replace(ticket, growing=False)

    def cut(self, request_id: str) -> bool:
        ticket_id = self.growing.pop(request_id)
        if request_id in self.read:
            self.cut_tickets.add(ticket_id)
            return False
        del self.tickets[ticket_id]
        return True

    def _mint(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes], growing: bool
    ) -> KVTicket:
        self.minted += 1
        size = FINGERPRINT.block_size
        assert len(block_hashes) == num_tokens // size
        return KVTicket(
            ticket_id=f"t{self.minted}",
            request_id=request_id,
            source=self.source,
            epoch=1,
            host="",
            port=0,
            transports=("fake",),
            fingerprint=FINGERPRINT,
            num_tokens=num_tokens,
            num_blocks=-(-num_tokens // size),
            block_hashes=tuple(block_hashes),
            lease_s=30.0,
            growing=growing,
        )

    def withdraw(self, request_id: str) -> None:
        for ticket, _ in list(self.tickets.values()):
            taken = request_id not in self.growing and ticket.ticket_id not in self.cut_tickets
            if ticket.request_id == request_id and taken:
                self.give_back(ticket.ticket_id)

    def give_back(self, ticket_id: str) -> None:
        self.cut_tickets.discard(ticket_id)
        del self.tickets[ticket_id]
        self.returned(ticket_id)


class FakeInbox:
    """Copies slots from a FakeOutbox's runner when told to `deliver`."""

    def __init__(self, source: FakeRunner, outbox: FakeOutbox, target: FakeRunner) -> None:
        self.source, self.outbox, self.target = source, outbox, target
        self.pending: dict[str, Callable[..., None]] = {}
        self.cancelled: list[str] = []
        self.slow = False
        """A fetch that is cancelled goes on until `deliver`."""
        self.kept: set[str] = set()

    def keep(self, ticket: KVTicket) -> None:
        self.kept.add(ticket.request_id)

    def drop(self, request_id: str) -> None:
        self.kept.remove(request_id)

    def fetch(
        self,
        ticket: KVTicket,
        wanted: Sequence[int],
        targets: Sequence[int],
        deadline: float,
        done: Callable[[FetchReport], None],
    ) -> None:
        assert len(wanted) == len(targets)
        self.kept.remove(ticket.request_id)

        def finish(failed: tuple[int, ...] = ()) -> None:
            over = {*self.outbox.growing.values(), *self.outbox.cut_tickets}
            if ticket.ticket_id in self.outbox.tickets and ticket.ticket_id not in over:
                _, blocks = self.outbox.tickets[ticket.ticket_id]
                for index, target in zip(wanted, targets, strict=True):
                    if index not in failed:
                        self.target.slots[target][:] = self.source.slots[blocks[index]]
                self.outbox.give_back(ticket.ticket_id)
            else:
                failed = tuple(wanted) or (ticket.num_blocks - 1,)
            done(FetchReport(request_id=ticket.request_id, failed=failed, reason="fake"))

        self.pending[ticket.request_id] = finish

    def cancel(self, request_id: str) -> None:
        if not self.slow:
            self.pending.pop(request_id)((0,))
        elif request_id not in self.cancelled:
            self.cancelled.append(request_id)

    def deliver(self, request_id: str, failed: tuple[int, ...] = ()) -> None:
        self.pending.pop(request_id)(failed)


class Bench:
    """An engine driven by hand, one step at a time."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        budget: int = 16,
        max_num_seqs: int = 8,
        outbox: FakeOutbox | None = None,
        feed: tuple[FakeRunner, FakeOutbox] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.runner = FakeRunner(num_blocks, block_size)
        self.outbox = outbox
        self.inbox = FakeInbox(*feed, self.runner) if feed else None
        self.outcomes: list[StepOutcome] = []
        self.outputs: dict[str, list[Output]] = {}
        self.on_outcome: Callable[[], object] = lambda: None
        self.engine = Engine(
            pool=BlockPool(num_blocks, block_size),
            limits=Limits(
                max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_model_len=256
            ),
            runner=self.runner,
            fingerprint=FINGERPRINT,
            vocab_size=VOCAB,
            sink=self._sink,
            exporter=outbox,
            importer=self.inbox,
            pace=pace,
        )
        if outbox:
            outbox.returned = self.engine.returned

    def _sink(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)
        for outputs in outcome.outputs.values():
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
        self.on_outcome()

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int = 8,
        *,
        output: Sequence[int] = (),
        hand_off: bool = False,
        ticket: KVTicket | None = None,
        timeout_s: float = 60.0,
        client: object = "client",
        **sampling: object,
    ) -> None:
        message = Submit(
            request_id=request_id,
            epoch=1,
            prompt=pack_tokens(prompt),
            output_token_ids=list(output),
            hand_off=hand_off,
            ticket=ticket,
            timeout_s=timeout_s,
            sampling=SamplingParams(seed=0, max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        )
        self.engine.submit(message, client)

    def resume(self, request_id: str, tokens: Sequence[int]) -> None:
        message = Continue(request_id=request_id, epoch=1, output_token_ids=list(tokens))
        self.engine.resume(message)

    def run(self, limit: int = 500) -> None:
        """Step until nothing is left to do."""
        deadline = time.monotonic() + 20
        while self.engine.step() or not self.idle:
            limit -= 1
            assert limit and time.monotonic() < deadline, "the engine does not come to rest"

    @property
    def idle(self) -> bool:
        status = self.engine.status()
        return not (status.running or status.waiting) or bool(self.inbox and self.inbox.pending)

    def tokens(self, request_id: str) -> list[int]:
        return [t for output in self.outputs.get(request_id, []) for t in output.token_ids]

    def lost(self, request_id: str) -> bool:
        """Whether it ended here because its blocks did not come."""
        error = self.outputs[request_id][-1].error if request_id in self.outputs else None
        return error is not None and error.code is ErrorCode.KV_LOST

    def last(self, request_id: str) -> Output:
        return self.outputs[request_id][-1]

    def assert_clean(self) -> None:
        """Nothing waits, nothing runs, every block is free or evictable."""
        self.engine.step()
        self.engine.check_integrity()
        assert not (self.inbox and self.inbox.kept), "leases are renewed for nobody"
        status = self.engine.status()
        assert (status.waiting, status.running, status.fetching, status.blocks_held) == (0,) * 4
        assert status.blocks_free + status.blocks_cached == status.blocks_total


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def pair(slices: int = 1, **options: int) -> tuple[Bench, Bench]:
    """A prefill and a decode engine with a fake transfer between them."""
    outbox = FakeOutbox(slices=slices)
    prefill = Bench(outbox=outbox, **options)
    decode = Bench(feed=(prefill.runner, outbox), **options)
    return prefill, decode


def run_prefill(prefill: Bench, name: str, tokens: list[int], max_tokens: int = 8) -> Output:
    prefill.submit(name, tokens, max_tokens, hand_off=True)
    prefill.run()
    return prefill.last(name)
