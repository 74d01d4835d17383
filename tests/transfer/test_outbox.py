"""The outbox alone: a fake clock, no sockets, no threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
import pytest

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.held import Read, Refusal, TicketState
from pdserve.kv_transfer.outbox import Outbox
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import Fetch, Outcome, Progress


def sums(numbers: Iterable[int]) -> Sums:
    return np.array(list(numbers), np.uint64)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def returned() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def outbox(fingerprint: LayoutFingerprint, clock: Clock, returned: list[tuple[str, str]]) -> Outbox:
    return Outbox(
        worker_id="p",
        epoch=3,
        host="h",
        port=1,
        transports=("tcp",),
        fingerprint=fingerprint,
        lease_s=10.0,
        on_returned=lambda ticket, ending: returned.append((ticket.request_id, ending)),
        slices=4,
        clock=clock,
    )


def offer(outbox: Outbox, request_id: str = "r", blocks: int = 3) -> KVTicket:
    return outbox.offer(request_id, list(range(10, 10 + blocks)), 16 * blocks, [b"h"] * blocks)


def ask(ticket: KVTicket, *wanted: int, slices: int = 1) -> Fetch:
    return Fetch(
        ticket_id=ticket.ticket_id,
        request_id=ticket.request_id,
        epoch=ticket.epoch,
        fingerprint=ticket.fingerprint,
        transport="tcp",
        wanted=wanted or (0,),
        host_id="",
        slices=slices,
    )


def release(outbox: Outbox, ticket: KVTicket, reader: str = "d", epoch: int = 3) -> bool:
    return outbox.release(ticket.ticket_id, epoch, Outcome.COMMITTED, reader)


def test_ticket_says_what_was_offered(outbox: Outbox, fingerprint: LayoutFingerprint) -> None:
    ticket = outbox.offer("r", [5, 9], 20, [b"h" * 16])
    assert (ticket.num_tokens, ticket.num_blocks, ticket.block_hashes) == (20, 2, (b"h" * 16,))
    assert (ticket.source, ticket.epoch, ticket.host, ticket.port) == ("p", 3, "h", 1)
    assert (ticket.fingerprint, ticket.lease_s) == (fingerprint, 10.0)
    assert outbox.begin(ask(ticket, 1)).block_ids == (9,)


@pytest.mark.parametrize(
    ("blocks", "tokens", "hashes", "says"),
    [
        ([1], 17, [b"h"], "do not fill 1 blocks"),
        ([1, 2], 16, [b"h"], "do not fill 2 blocks"),
        ([], 0, [], "at least one token"),
        ([1, 2], 17, [], "0 hashes"),
        ([1, 1], 32, [b"h", b"h"], "twice"),
    ],
)
def test_contradictory_offers_are_refused(
    outbox: Outbox, blocks: list[int], tokens: int, hashes: list[bytes], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        outbox.offer("r", blocks, tokens, hashes)
    assert outbox.counters().held_blocks == 0


def test_a_request_is_offered_once_at_a_time(outbox: Outbox) -> None:
    offer(outbox)
    with pytest.raises(ValueError, match="already"):
        offer(outbox)
    outbox.withdraw("r")
    offer(outbox)


def test_release_returns_once_and_answers_its_reader_again(
    outbox: Outbox, returned: list[tuple[str, str]]
) -> None:
    ticket = offer(outbox)
    assert outbox.counters().held_blocks == 3
    assert release(outbox, ticket)
    assert release(outbox, ticket)
    assert not release(outbox, ticket, reader="another")
    assert returned == [("r", "committed")]
    assert outbox.counters().held_blocks == 0
    assert outbox.state(ticket.ticket_id) is TicketState.RETURNED


def test_withdraw_waits_for_the_reader(outbox: Outbox, returned: list[tuple[str, str]]) -> None:
    ticket = offer(outbox)
    first, second = outbox.begin(ask(ticket)), outbox.begin(ask(ticket, 1, 2))
    assert outbox.state(ticket.ticket_id) is TicketState.SENDING
    outbox.withdraw("r")
    assert first.stopped
    assert outbox.state(ticket.ticket_id) is TicketState.ENDING
    with pytest.raises(Refusal, match="released or expired"):
        outbox.begin(ask(ticket))
    outbox.end(first)
    assert returned == []
    outbox.end(second)
    assert returned == [("r", "withdrawn")]
    assert not release(outbox, ticket)
    outbox.withdraw("r")
    assert returned == [("r", "withdrawn")]


def test_expiry_waits_for_the_reader_but_does_not_stop_it(
    outbox: Outbox, clock: Clock, returned: list[tuple[str, str]]
) -> None:
    ticket = offer(outbox)
    read = outbox.begin(ask(ticket))
    clock.now += 10
    assert outbox.expire() is None
    assert not read.stopped
    assert returned == []
    outbox.end(read)
    assert returned == [("r", "expired")]


def test_expire_names_the_next_deadline(
    outbox: Outbox, clock: Clock, returned: list[tuple[str, str]]
) -> None:
    assert outbox.expire() is None
    offer(outbox, "a")
    clock.now += 4
    offer(outbox, "b")
    assert outbox.expire() == 110.0
    clock.now = 110.0
    assert outbox.expire() == 114.0
    assert returned == [("a", "expired")]


@pytest.mark.parametrize("late", ["begin", "renew", "release"])
def test_a_lease_is_over_on_time_even_if_nobody_swept(
    outbox: Outbox, clock: Clock, returned: list[tuple[str, str]], late: str
) -> None:
    ticket = offer(outbox)
    clock.now += 10
    if late == "begin":
        with pytest.raises(Refusal):
            outbox.begin(ask(ticket))
    elif late == "renew":
        assert not outbox.renew(ticket.ticket_id, 3)
    else:
        assert not release(outbox, ticket)
    assert returned == [("r", "expired")]


def test_renewal_starts_the_lease_anew(
    outbox: Outbox, clock: Clock, returned: list[tuple[str, str]]
) -> None:
    ticket = offer(outbox)
    clock.now += 9
    assert outbox.renew(ticket.ticket_id, 3)
    clock.now += 9
    assert outbox.expire() == 119.0
    assert returned == []


def test_another_epoch_is_refused_everywhere(
    outbox: Outbox, returned: list[tuple[str, str]]
) -> None:
    ticket = offer(outbox)
    with pytest.raises(Refusal, match=r"epoch 2; p is in epoch 3"):
        outbox.begin(msgspec.structs.replace(ask(ticket), epoch=2))
    assert not outbox.renew(ticket.ticket_id, 2)
    assert not release(outbox, ticket, epoch=2)
    assert returned == []


def _other(field: str, value: object) -> Callable[[LayoutFingerprint], LayoutFingerprint]:
    return lambda fingerprint: msgspec.structs.replace(fingerprint, **{field: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": _other("dtype", "float16")}, "differ in dtype: 'float32' here"),
        ({"request_id": "another"}, "another request"),
        ({"ticket_id": "unknown"}, "unknown"),
        ({"wanted": ()}, "at least one"),
        ({"wanted": (1, 1)}, "ascending"),
        ({"wanted": (2, 0)}, "ascending"),
        ({"wanted": (0, 3)}, "below 3"),
        ({"wanted": (-1,)}, "ascending"),
    ],
)
def test_wrong_fetches_are_refused_with_a_sentence(
    outbox: Outbox, change: dict[str, object], says: str
) -> None:
    ticket = offer(outbox)
    fetch = ask(ticket)
    if callable(make := change.get("fingerprint")):
        change = {"fingerprint": make(fetch.fingerprint)}
    with pytest.raises(Refusal, match=says):
        outbox.begin(msgspec.structs.replace(fetch, **change))
    assert outbox.state(ticket.ticket_id) is TicketState.READY


def test_close_returns_everything_and_takes_nothing_more(
    outbox: Outbox, returned: list[tuple[str, str]]
) -> None:
    ticket = offer(outbox, "read")
    offer(outbox, "idle")
    read = outbox.begin(ask(ticket))
    outbox.close()
    outbox.close()
    assert returned == [("idle", "closed")]
    assert read.stopped
    outbox.end(read)
    assert returned == [("idle", "closed"), ("read", "closed")]
    with pytest.raises(RuntimeError, match="closed"):
        offer(outbox)
    assert outbox.counters().returned == {"closed": 2}


def test_checksums_are_computed_once(outbox: Outbox) -> None:
    ticket = offer(outbox)
    computed: list[int] = []

    def compute(blocks: Sequence[int]) -> Sums:
        computed.extend(blocks)
        return sums(block * 2 for block in blocks)

    assert outbox.begin(ask(ticket, 0, 2)).checksums("k", compute) == (20, 24)
    assert outbox.begin(ask(ticket, 0, 1, 2)).checksums("k", compute) == (20, 22, 24)
    assert computed == [10, 12, 11]


def test_a_failing_callback_does_not_stop_the_outbox(fingerprint: LayoutFingerprint) -> None:
    def fail(ticket: KVTicket, ending: str) -> None:
        raise RuntimeError("boom")

    outbox = Outbox(
        worker_id="p",
        epoch=3,
        host="h",
        port=1,
        transports=("tcp",),
        fingerprint=fingerprint,
        lease_s=10.0,
        on_returned=fail,
    )
    assert release(outbox, offer(outbox))
    assert outbox.counters().returned == {"committed": 1}


def test_sums_are_computed_ahead_once_and_given_to_readers(outbox: Outbox) -> None:
    ticket = offer(outbox)
    outbox.sum_ahead(ticket.ticket_id, "k", lambda blocks: sums(block * 100 for block in blocks), 2)
    read = outbox.begin(ask(ticket, 0, 2))

    def nobody(blocks: Sequence[int]) -> Sums:
        raise AssertionError("computed a second time")

    assert read.checksums("k", nobody) == (1000, 1200)
    assert read.checksums("another", lambda blocks: sums(blocks)) == (10, 12)


def test_sums_of_a_block_that_went_back_meanwhile_are_not_kept(outbox: Outbox) -> None:
    """Between computing and keeping, the ticket ends while a reader still has the blocks."""
    ticket = offer(outbox)
    reads: list[Read] = []

    def withdrawn_meanwhile(blocks: Sequence[int]) -> Sums:
        reads.append(outbox.begin(ask(ticket)))
        outbox.withdraw("r")
        return sums(1 for _ in blocks)

    outbox.sum_ahead(ticket.ticket_id, "k", withdrawn_meanwhile)
    (read,) = reads  # and no further block was looked at
    assert read.checksums("k", lambda blocks: sums(2 for _ in blocks)) == (2,)
    outbox.end(read)


def test_sums_are_left_to_a_reader_that_has_come(outbox: Outbox) -> None:
    ticket = offer(outbox)
    seen: list[Sequence[int]] = []

    def compute(blocks: Sequence[int]) -> Sums:
        seen.append(blocks)
        return sums(1 for _ in blocks)

    read = outbox.begin(ask(ticket))
    outbox.sum_ahead(ticket.ticket_id, "k", compute)
    outbox.end(read)
    outbox.sum_ahead("unknown", "k", compute)
    assert seen == []


def test_another_epoch_ends_what_was_offered(
    outbox: Outbox, returned: list[tuple[str, str]]
) -> None:
    """Blocks that are being read go back when their last reader has stopped."""
    idle, busy = offer(outbox, "idle"), offer(outbox, "busy")
    read = outbox.begin(ask(busy))
    outbox.begin_epoch(9)
    assert returned == [("idle", "fenced")] and read.stopped
    outbox.end(read)
    assert returned[1:] == [("busy", "fenced")]
    for ticket in (idle, busy):
        assert not outbox.renew(ticket.ticket_id, ticket.epoch)
        assert not outbox.release(ticket.ticket_id, ticket.epoch, Outcome.COMMITTED, "d")
        with pytest.raises(Refusal, match="epoch 3"):
            outbox.begin(ask(ticket))
    assert offer(outbox, "new").epoch == 9


def test_a_growing_ticket_has_no_lease_until_it_is_complete(
    outbox: Outbox, clock: Clock, returned: list[tuple[str, str]]
) -> None:
    ticket = outbox.open("r", 20, [b"h"])
    assert outbox.state(ticket.ticket_id) is TicketState.GROWING
    clock.now += 1000.0
    assert outbox.expire() is None
    assert outbox.renew(ticket.ticket_id, ticket.epoch)
    outbox.withdraw("r")
    assert release(outbox, ticket), "nobody but its engine ends it"
    assert outbox.counters().growing == 1
    outbox.extend("r", [1])
    outbox.seal("r", [2])
    assert outbox.expire() == clock.now + 10.0
    assert outbox.counters().held_blocks == 2
    assert release(outbox, ticket) and returned == [("r", "committed")]


def test_progress_is_told_at_once_or_after_the_wait(outbox: Outbox) -> None:
    ticket = outbox.open("r", 40, [b"h", b"h"])
    none, two, three = (Progress(blocks=count) for count in (0, 2, 3))
    assert outbox.watch(ticket.ticket_id, 3, none, 0.001) == (none, False)
    outbox.extend("r", [4, 5])
    assert outbox.watch(ticket.ticket_id, 3, none, 60.0) == (two, False)
    assert outbox.watch(ticket.ticket_id, 3, two, 0.001) == (two, False)
    outbox.seal("r", [6])
    assert outbox.watch(ticket.ticket_id, 3, three, 60.0) == (three, True)
    with pytest.raises(Refusal, match="unknown"):
        outbox.watch(ticket.ticket_id, 2, none, 60.0)


def test_slices_of_blocks_that_are_being_computed(outbox: Outbox) -> None:
    ticket = outbox.open("r", 40, [b"h", b"h"], sliced=True)
    outbox.extend("r", [4])
    outbox.advance(ticket.ticket_id, [5, 6], 2)
    ready = Progress(blocks=1, ahead=2, slices=2)
    assert outbox.watch(ticket.ticket_id, 3, Progress(blocks=1), 60.0) == (ready, False)
    assert outbox.watch(ticket.ticket_id, 3, ready, 0.001) == (ready, False)
    wanted = (3, 4, 5, 8, 9)
    assert outbox.begin(ask(ticket, *wanted, slices=4)).block_ids == (19, 20, 21, 24, 25)
    for unit, says in ((6, "still to be computed"), (12, "below 12")):
        with pytest.raises(Refusal, match=says):
            outbox.begin(ask(ticket, unit, slices=4))
    with pytest.raises(Refusal, match="have 4 slices"):
        outbox.begin(ask(ticket, 0, slices=2))
    with pytest.raises(Refusal, match="still to be computed"):
        outbox.begin(ask(ticket, 1))
    outbox.extend("r", [5])
    assert outbox.watch(ticket.ticket_id, 3, ready, 60.0) == (Progress(blocks=2), False)
    outbox.advance(ticket.ticket_id, [5], 3)  # a device was late
    outbox.seal("r", [6])
    outbox.advance(ticket.ticket_id, [6], 3)
    assert outbox.watch(ticket.ticket_id, 3, ready, 60.0) == (Progress(blocks=3), True)
    assert outbox.begin(ask(ticket, 6, 11, slices=4)).block_ids == (22, 27)


def test_slices_that_cannot_be_are_refused(outbox: Outbox) -> None:
    outbox.advance("nobody's", [1], 2)
    ticket = outbox.open("r", 40, [b"h", b"h"], sliced=True)
    for blocks, slices, says in (
        ([1], 4, "4 slices of 4"),
        ([1], 0, "0 slices of 4"),
        ([1, 1], 1, "twice"),
        ([1, 2, 3, 4], 1, "do not fill 4 blocks"),
    ):
        with pytest.raises(ValueError, match=says):
            outbox.advance(ticket.ticket_id, blocks, slices)
    assert outbox.watch(ticket.ticket_id, 3, Progress(), 0.0) == (Progress(), False)


def test_growing_blocks_that_cannot_be_are_refused(outbox: Outbox) -> None:
    with pytest.raises(ValueError, match="no ticket that grows"):
        outbox.extend("r", [1])
    outbox.open("r", 40, [b"h", b"h"])
    outbox.extend("r", [4])
    for blocks, says in (([4], "twice"), ([5, 6, 7], "do not fill 4 blocks")):
        with pytest.raises(ValueError, match=says):
            outbox.extend("r", blocks)
    with pytest.raises(ValueError, match="do not fill 2 blocks"):
        outbox.seal("r", [5])
    assert outbox.cut("r")
    with pytest.raises(ValueError, match="no ticket that grows"):
        outbox.cut("r")
    assert outbox.counters().returned == {"withdrawn": 1}


@pytest.mark.parametrize("end", ["seal", "cut"])
def test_closed_while_it_grows(outbox: Outbox, returned: list[tuple[str, str]], end: str) -> None:
    ticket = outbox.open("r", 20, [b"h"])
    outbox.close()
    assert not returned and outbox.state(ticket.ticket_id) is TicketState.ENDING
    with pytest.raises(Refusal, match="unknown"):
        outbox.watch(ticket.ticket_id, 3, 0, 60.0)
    if end == "cut":
        assert outbox.cut("r") and not returned
    else:
        outbox.seal("r", [1, 2])
        assert returned == [("r", "closed")]
    assert outbox.counters().held_blocks == outbox.counters().growing == 0
