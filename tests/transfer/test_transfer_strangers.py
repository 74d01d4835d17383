"""Peers that do not keep to the protocol, on either end: refused, logged, nothing else happens."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from fake_source import FakeSource
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_rig import FINGERPRINT, PATIENCE_S, Rig, is_poison, poison, scramble

from pdserve.kv_transfer.line import (
    REQUEST_LIMIT,
    Address,
    Complaints,
    Line,
    connect,
)
from pdserve.kv_transfer.source import TransferSource
from pdserve.protocol.handshake import Challenge, Handshake, Proof, prove
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import (
    Fetch,
    FetchHeader,
    Outcome,
    Refused,
    Release,
    Released,
    ToReader,
    ToSource,
)
from pdserve.protocol.wire import MessageDecoder, encode_frame

HANDSHAKE: MessageDecoder[object] = MessageDecoder(Handshake)
TO_READER: MessageDecoder[object] = MessageDecoder(ToReader)
TO_SOURCE: MessageDecoder[object] = MessageDecoder(ToSource)


@pytest.fixture
def source(rig: Rig) -> TransferSource:
    return rig.source(stall_s=1.0)


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def dial(source: TransferSource) -> socket.socket:
    return socket.create_connection(("127.0.0.1", source.port), timeout=PATIENCE_S)


def authenticated(source: TransferSource, name: str = "stranger") -> Line:
    address = Address("127.0.0.1", source.port, "prefill-0", 7)
    return connect(address, secret="a secret", name=name, deadline=soon(), attach=lambda line: None)


def say_last(sock: socket.socket, data: bytes) -> None:
    """Send and say no more; the peer may have hung up meanwhile."""
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def ended(sock: socket.socket) -> bool:
    """Reads until the peer closes; false if it does not within the socket's timeout."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def still_serves(rig: Rig, source: TransferSource) -> bool:
    return rig.fetch(rig.sink(), rig.ticket(source, "good", [1]), [0], [1]).only().ok


FRAME = struct.Struct("<I")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        FRAME.pack(5000) + b"x" * 5000,
        FRAME.pack(2**32 - 1),
        FRAME.pack(0),
        FRAME.pack(3) + b"\xff\xff\xff",
        encode_frame(Release(ticket_id="t", epoch=7, outcome=Outcome.COMMITTED)),
        encode_frame(Proof(nonce=b"n" * 16, name="stranger", mac=b"m" * 32)),
        FRAME.pack(100) + b"only half of it",
    ],
    ids=["http", "long", "huge", "empty", "garbage", "no-proof", "wrong-proof", "truncated"],
)
def test_strangers_before_the_handshake(rig: Rig, source: TransferSource, sent: bytes) -> None:
    with dial(source) as sock:
        say_last(sock, sent)
        assert ended(sock)
    assert still_serves(rig, source)
    assert source.counters().complaints == 1


def test_a_recorded_handshake_is_of_no_use(rig: Rig, source: TransferSource) -> None:
    ticket = rig.ticket(source, "r", [1])
    with dial(source) as sock:
        line = Line(sock)
        asked = line.receive(HANDSHAKE, soon())
        assert isinstance(asked, Challenge)
        proof = prove("a secret", asked, "honest")
        line.send(proof, soon())
        line.receive(HANDSHAKE, soon())
    with dial(source) as sock:
        release = Release(ticket_id=ticket.ticket_id, epoch=7, outcome=Outcome.COMMITTED)
        sock.sendall(encode_frame(proof) + encode_frame(release))
        assert ended(sock)
    assert rig.returned.got == []
    assert source.counters().complaints == 1


@pytest.mark.parametrize(
    "sent",
    [
        FRAME.pack(REQUEST_LIMIT + 1),
        FRAME.pack(4) + b"\xc1\xc1\xc1\xc1",
        encode_frame(Released(ticket_id="t", valid=True)),
        FRAME.pack(1000) + b"then nothing more",
        b"\x01",
    ],
    ids=["oversized", "garbage", "other-direction", "truncated", "half-a-length"],
)
def test_malformed_frames_after_the_handshake(
    rig: Rig, source: TransferSource, sent: bytes
) -> None:
    ticket = rig.ticket(source, "r", [1])
    line = authenticated(source)
    say_last(line._sock, sent)
    assert ended(line._sock)
    line.close()
    assert still_serves(rig, source)
    assert source.counters().complaints == 1
    assert ("r", "committed") not in rig.returned.got
    assert source.outbox.renew(ticket.ticket_id, 7)


def test_half_a_frame_is_not_waited_for_long(source: TransferSource) -> None:
    line = authenticated(source)
    line._sock.sendall(FRAME.pack(1000) + b"half")
    line._sock.settimeout(5.0)
    begun = time.monotonic()
    assert ended(line._sock)
    assert 0.5 < time.monotonic() - begun < 4.0
    line.close()


def test_idle_connections_are_ended(rig: Rig) -> None:
    source = rig.source(idle_s=0.2)
    line = authenticated(source)
    line._sock.settimeout(5.0)
    assert ended(line._sock)
    line.close()


def test_connections_are_bounded(rig: Rig) -> None:
    source = rig.source(max_connections=2)
    lines = [authenticated(source), authenticated(source)]
    with dial(source) as sock:
        assert ended(sock)
    lines.pop().close()
    end = time.monotonic() + 5.0
    while source.counters().connections == 2 and time.monotonic() < end:
        time.sleep(0.01)
    lines.append(authenticated(source))
    for line in lines:
        line.close()


def ask(ticket: KVTicket, **changes: object) -> Fetch:
    fetch = Fetch(
        ticket_id=ticket.ticket_id,
        request_id=ticket.request_id,
        epoch=ticket.epoch,
        fingerprint=ticket.fingerprint,
        transport="tcp",
        wanted=(0,),
        host_id="",
    )
    return msgspec.structs.replace(fetch, **changes)


@pytest.mark.parametrize(
    ("changes", "other_transport"),
    [
        ({"ticket_id": "guess"}, False),
        ({"epoch": 6}, False),
        ({"wanted": (5,)}, False),
        ({"transport": "pigeon"}, True),
        ({"transport": "shm"}, True),
    ],
    ids=lambda value: str(value),
)
def test_refusals_leave_the_connection_usable(
    rig: Rig, source: TransferSource, changes: dict[str, object], other_transport: bool
) -> None:
    ticket = rig.ticket(source, "r", [1])
    line = authenticated(source)
    line.send(ask(ticket, **changes), soon())
    refused = line.receive(TO_READER, soon())
    assert isinstance(refused, Refused)
    assert refused.reason and refused.retry_other_transport is other_transport
    line.send(ask(ticket), soon())
    assert isinstance(line.receive(TO_READER, soon()), FetchHeader)
    line.close()


def test_release_twice_and_by_another(rig: Rig, source: TransferSource) -> None:
    ticket = rig.ticket(source, "r", [1])
    release = Release(ticket_id=ticket.ticket_id, epoch=7, outcome=Outcome.COMMITTED)
    answers = []
    for name in ("a", "a", "b"):
        line = authenticated(source, name)
        line.send(release, soon())
        answers.append(line.receive(TO_READER, soon()))
        line.close()
    assert [isinstance(answer, Released) and answer.valid for answer in answers] == [
        True,
        True,
        False,
    ]
    assert rig.returned.got == [("r", "committed")]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.binary(max_size=64), announced=st.none() | st.integers(0, 2**32 - 1))
def test_fuzzed_frames(
    rig: Rig, source: TransferSource, body: bytes, announced: int | None
) -> None:
    line = authenticated(source)
    say_last(line._sock, FRAME.pack(len(body) if announced is None else announced) + body)
    assert ended(line._sock)
    line.close()
    assert source.counters().outbox.offered == 0


def test_complaints_are_rationed(caplog: pytest.LogCaptureFixture) -> None:
    complain = Complaints(logging.getLogger("test"), interval_s=0.1)
    for _ in range(1000):
        complain("again")
    assert len(caplog.records) <= 3 and complain.count == 1000
    time.sleep(0.11)
    complain("once more")
    assert "more since" in caplog.records[-1].getMessage()


@pytest.fixture
def fake() -> Iterator[Callable[[Callable[[Line, Fetch], None]], FakeSource]]:
    made: list[FakeSource] = []

    def make(answer: Callable[[Line, Fetch], None]) -> FakeSource:
        made.append(FakeSource(answer))
        return made[-1]

    yield make
    for source in made:
        source.close()


def header(fetch: Fetch, **changes: object) -> FetchHeader:
    count = len(fetch.wanted)
    answer = FetchHeader(
        ticket_id=fetch.ticket_id,
        epoch=7,
        num_blocks=count,
        block_nbytes=3000,
        checksums=(0,) * count,
    )
    return msgspec.structs.replace(answer, **changes)


ANSWERS: dict[str, tuple[Callable[[Line, Fetch], None], str]] = {
    "garbage": (lambda line, fetch: line._sock.sendall(FRAME.pack(3) + b"\xc1\xc1\xc1"), "decoded"),
    "oversized": (lambda line, fetch: line._sock.sendall(b"\xff\xff\xff\xff"), "exceeds"),
    "hangs up": (lambda line, fetch: line.interrupt(), "closed"),
    "another message": (
        lambda line, fetch: line.send(Released(ticket_id="t", valid=True), soon()),
        "another message",
    ),
    "another ticket": (
        lambda line, fetch: line.send(header(fetch, ticket_id="t"), soon()),
        "another ticket",
    ),
    "another epoch": (lambda line, fetch: line.send(header(fetch, epoch=8), soon()), "another"),
    "too many": (lambda line, fetch: line.send(header(fetch, num_blocks=9), soon()), "9 blocks"),
    "no checksums": (lambda line, fetch: line.send(header(fetch, checksums=()), soon()), "blocks"),
    "a file": (
        lambda line, fetch: line.send(
            header(fetch, pool_path="/etc/passwd", pool_blocks=(0,), pool_nonce=b"n" * 16), soon()
        ),
        "must look like",
    ),
    "no pool": (
        lambda line, fetch: line.send(
            header(fetch, pool_path="/proc/1/fd/99999", pool_blocks=(0,), pool_nonce=b""), soon()
        ),
        "cannot be opened",
    ),
    "other blocks": (
        lambda line, fetch: line.send(header(fetch, pool_blocks=(0, 1)), soon()),
        "another number",
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_source_that_lies(
    rig: Rig, fake: Callable[[Callable[[Line, Fetch], None]], FakeSource], kind: str
) -> None:
    answer, says = ANSWERS[kind]
    dishonest = fake(answer)
    ours = rig.memory()
    poison(ours)
    ticket = rig.ticket(rig.source(), "r", [1])
    ticket = msgspec.structs.replace(ticket, port=dishonest.port, place=None)
    sink = rig.sink(ours, transport="shm", stall_s=1.0)
    report = rig.fetch(sink, ticket, [0], [1]).only()
    assert report.failed == (0,)
    assert says in report.reason
    assert is_poison(ours, 1)


def test_a_source_that_sends_half_a_block(
    rig: Rig, fake: Callable[[Callable[[Line, Fetch], None]], FakeSource]
) -> None:
    def half(line: Line, fetch: Fetch) -> None:
        line.send(header(fetch), soon())
        line._sock.sendall(b"x" * 1500)
        line.interrupt()

    ticket = rig.ticket(rig.source(), "r", [1])
    ticket = msgspec.structs.replace(ticket, port=fake(half).port)
    report = rig.fetch(rig.sink(transport="tcp"), ticket, [0], [1]).only()
    assert report.failed == (0,)
    assert "middle of a frame" in report.reason


def test_a_source_without_the_secret(rig: Rig) -> None:
    theirs = rig.memory()
    scramble(theirs)
    source = rig.source(theirs, secret="another secret", fingerprint=FINGERPRINT)
    ours = rig.memory()
    poison(ours)
    report = rig.fetch(rig.sink(ours), rig.ticket(source, "r", [1]), [0], [1]).only()
    assert report.failed == (0,)
    assert is_poison(ours, 1)


def test_a_connection_that_has_ended_before_it_is_used_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()  # with a reset
        until = time.monotonic() + 10
        while ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            assert time.monotonic() < until
        with pytest.raises(OSError, match="not connected"):
            Line(ours)
    assert ours.fileno() == -1
