"""Hostile input at both ends of the transfer: any message, any bytes, frames changed or replayed.

A source must keep every ticket that nobody released, answer or hang up, and serve on; a sink must
report a failure and leave all blocks but its targets alone.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import msgspec
import pytest
from fake_source import FakeSource, soon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_rig import PATIENCE_S, Rig, is_poison, poison

from pdserve.kv_transfer.line import Address, Line, connect
from pdserve.kv_transfer.memory import host_id
from pdserve.kv_transfer.source import TransferSource
from pdserve.protocol.ticket import KVTicket, LeaseMark, Place
from pdserve.protocol.transfer import (
    DevicePool,
    Fetch,
    FetchHeader,
    Grown,
    Outcome,
    Parcels,
    Ready,
    Refused,
    Release,
    Released,
    Renew,
    ToReader,
    Watch,
)
from pdserve.protocol.wire import MessageDecoder, encode_frame

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 70)
TEXTS = st.text(max_size=8) | st.sampled_from(["shm", "tcp", "ipc", "nccl", "prefill-0"])
PATHS = st.text(max_size=12) | st.just("/proc/self/fd/0")
SHORT = st.binary(max_size=20)
TO_READER: MessageDecoder[object] = MessageDecoder(ToReader)
MANY = st.lists(NUMBERS, max_size=6).map(tuple)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pdserve")


@pytest.fixture
def source(rig: Rig) -> TransferSource:
    return rig.source(stall_s=1.0)


@pytest.fixture
def ticket(rig: Rig, source: TransferSource) -> KVTicket:
    """Nobody has the right to end it."""
    return rig.ticket(source, "held", [5, 6, 7])


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], int]]:
    """Starts a source that answers fetches with these bytes and hangs up; its port."""
    made: list[FakeSource] = []

    def start(data: bytes) -> int:
        def answer(line: Line, fetch: Fetch) -> None:
            line._sock.sendall(data)
            line.interrupt()

        made.append(FakeSource(answer))
        return int(made[-1].port)

    yield start
    for source in made:
        source.close()


def dial(source: TransferSource) -> Line:
    address = Address("127.0.0.1", source.port, "prefill-0", 7)
    return connect(address, secret="a secret", name="fuzz", deadline=soon(), attach=_nobody)


def _nobody(line: Line) -> None:
    """Nothing interrupts these lines."""


def drain(line: Line, data: bytes) -> None:
    """Send, say no more, and read until the peer hangs up."""
    with contextlib.suppress(OSError):  # it may have hung up already
        line._sock.sendall(data)
        line._sock.shutdown(socket.SHUT_WR)
    line._sock.settimeout(PATIENCE_S)
    try:
        while line._sock.recv(65536):
            pass
    except ConnectionError:
        pass
    finally:
        line.close()


def unharmed(rig: Rig, source: TransferSource, ticket: KVTicket) -> bool:
    """The ticket stands, its blocks are the outbox's, and others are served."""
    good = rig.ticket(source, "good", [1])
    line = dial(source)
    line.send(_fetch(good, wanted=(0,)), soon())
    header = line.receive(TO_READER, soon())
    line.close()
    source.withdraw("good")
    ended = [name for name, _ in rig.returned.got if name == "held"]
    return (
        isinstance(header, FetchHeader) and not ended and source.outbox.renew(ticket.ticket_id, 7)
    )


def _fetch(ticket: KVTicket, **changes: object) -> Fetch:
    fetch = Fetch(
        ticket_id=ticket.ticket_id,
        request_id=ticket.request_id,
        epoch=7,
        fingerprint=ticket.fingerprint,
        transport="tcp",
        wanted=(0, 1),
        host_id="",
    )
    return msgspec.structs.replace(fetch, **changes)


@FUZZ
@given(data=st.data())
def test_any_message_to_a_source(
    rig: Rig, source: TransferSource, ticket: KVTicket, data: st.DataObject
) -> None:
    parcels = st.none() | st.builds(
        Parcels, block_size=NUMBERS, first_head=NUMBERS, num_heads=NUMBERS, wire=TEXTS
    )
    layouts = st.just(ticket.fingerprint) | st.builds(
        lambda field, value: msgspec.structs.replace(ticket.fingerprint, **{field: value}),
        st.sampled_from(["block_size", "tp_rank", "tp_size", "num_layers", "num_kv_heads"]),
        NUMBERS,
    )
    ids = st.sampled_from([ticket.ticket_id, "guess"])
    epochs = st.sampled_from([7, 6, 8]) | NUMBERS
    messages = st.one_of(
        st.builds(
            Fetch,
            ticket_id=ids,
            request_id=st.sampled_from(["held", "other"]),
            epoch=epochs,
            fingerprint=layouts,
            transport=TEXTS,
            wanted=MANY,
            host_id=TEXTS,
            detail=TEXTS,
            parcels=parcels,
        ),
        st.builds(Renew, ticket_id=ids, epoch=epochs),
        st.builds(Watch, ticket_id=ids, epoch=st.sampled_from([6, 8]), have=NUMBERS),
        # Whoever knows a ticket may release it: only others are tried here.
        st.builds(
            Release,
            ticket_id=st.just("guess"),
            epoch=epochs,
            outcome=st.sampled_from(list(Outcome)),
        ),
    )
    sent = data.draw(st.lists(messages, min_size=1, max_size=4))
    drain(dial(source), b"".join(encode_frame(message) for message in sent))
    assert unharmed(rig, source, ticket)


@FUZZ
@given(data=st.data())
def test_changed_frames_to_a_source(
    rig: Rig, source: TransferSource, ticket: KVTicket, data: st.DataObject
) -> None:
    """Good frames, cut, repeated, or with some bytes changed. None of them releases anything."""
    good = [encode_frame(_fetch(ticket)), encode_frame(Renew(ticket_id=ticket.ticket_id, epoch=7))]
    frames = bytearray(b"".join(data.draw(st.lists(st.sampled_from(good), min_size=1, max_size=4))))
    for _ in range(data.draw(st.integers(0, 4))):
        frames[data.draw(st.integers(0, len(frames) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(1, len(frames)))
    drain(dial(source), bytes(frames[:end]))
    assert unharmed(rig, source, ticket)


@settings(FUZZ, max_examples=50)
@given(data=st.data())
def test_any_answer_to_a_sink(
    rig: Rig, answering: Callable[[bytes], int], data: st.DataObject
) -> None:
    """Messages of every kind with any values, or no message at all, in place of the header."""
    ours = rig.memory(8)
    poison(ours)
    device = st.none() | st.builds(
        DevicePool,
        handle=SHORT | st.just(b"h" * 64),
        offset=NUMBERS,
        num_blocks=NUMBERS,
        bus_id=TEXTS,
    )
    transport = data.draw(st.sampled_from(["auto", "shm", "tcp", "ipc", "nccl"]))
    rig.between_devices = transport in ("ipc", "nccl")
    ticket = rig.ticket(rig.source(), "r", [1, 2])
    rig.returned.got.clear()
    marks = st.builds(LeaseMark, path=PATHS, nonce=SHORT, slot=NUMBERS, stamp=NUMBERS)
    places = st.builds(
        Place,
        transport=st.just(transport) | TEXTS,
        host_id=st.just(host_id()) | TEXTS,
        path=PATHS,
        nonce=SHORT,
        block_nbytes=st.just(3000) | NUMBERS,
        blocks=SHORT | st.just(bytes(8)),
        mark=marks | st.just(ticket.place.mark if ticket.place else None),
    )
    unsigned = st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple)
    answers = st.one_of(
        st.builds(
            FetchHeader,
            ticket_id=st.just(ticket.ticket_id),
            epoch=st.just(7),
            num_blocks=st.just(2) | NUMBERS,
            block_nbytes=st.just(3000) | NUMBERS,
            checksums=st.just((1, 2)) | unsigned,
            pool_path=PATHS,
            pool_blocks=MANY,
            pool_nonce=SHORT,
            pool_device=device,
            mark=st.none() | marks,
        ),
        st.builds(Refused, ticket_id=TEXTS, reason=TEXTS, retry_other_transport=st.booleans()),
        st.builds(Released, ticket_id=TEXTS, valid=st.booleans()),
        st.builds(Ready, session=SHORT, blocks_per_send=NUMBERS),
        st.builds(Grown, ticket_id=TEXTS, ready=NUMBERS, sealed=st.booleans()),
    ).map(encode_frame) | st.binary(max_size=40)
    port = answering(data.draw(answers) + data.draw(SHORT))
    sink = rig.sink(ours, stall_s=0.5, transport=transport)
    ticket = msgspec.structs.replace(ticket, port=port, place=data.draw(st.none() | places))
    report = rig.fetch(sink, ticket, [0, 1], [3, 4]).only()
    sink.close()
    assert report.failed and report.reason
    assert all(is_poison(ours, block) for block in (0, 1, 2, 5, 6, 7))
