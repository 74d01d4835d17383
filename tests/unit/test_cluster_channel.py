"""Channels over real sockets: both ways, strangers, liars, and peers that do not read."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvloop

from pdserve.cluster import channel as channel_module
from pdserve.cluster.channel import Channel, ChannelServer, connect
from pdserve.protocol.errors import AuthenticationError, ProtocolError
from pdserve.protocol.handshake import Challenge, Proof, Welcome, challenge, prove
from pdserve.protocol.messages import Abort, StepFrame, ToRouter, ToWorker
from pdserve.protocol.wire import MAX_FRAME_BYTES, encode_frame

SECRET = "a secret"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    """Runs a scenario on either event loop, within 20 s."""

    def run_it(scenario: Awaitable[None]) -> None:
        async def main() -> None:
            async with asyncio.timeout(20):
                await scenario

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(main())

    return run_it


def step(number: int) -> StepFrame:
    return StepFrame(epoch=7, step=number, outputs=[])


def abort(name: str) -> Abort:
    return Abort(request_id=name, epoch=7)


async def echo(channel: Channel) -> None:
    """Answers the n-th message with step n."""
    number = 0
    async for _ in channel:
        channel.send(step(number := number + 1))


def server(on_channel: Callable[[Channel], Awaitable[None]] = echo, **more: Any) -> ChannelServer:
    return ChannelServer(
        secret=SECRET,
        worker_id="decode-0",
        epoch=7,
        receives=ToWorker,
        on_channel=on_channel,
        host="127.0.0.1",
        **more,
    )


async def join(server: ChannelServer, secret: str = SECRET, **more: Any) -> Channel:
    return await connect(
        "127.0.0.1", server.port, secret=secret, name="router-1", receives=ToRouter, **more
    )


@asynccontextmanager
async def pair(**more: Any) -> AsyncIterator[tuple[Channel, Channel]]:
    """(client's end, server's end) of one channel; nobody reads the server's end."""
    met: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def hold(channel: Channel) -> None:
        met.set_result(channel)
        await done.wait()

    async with server(hold, **more) as listening:
        client = await join(listening, **more)
        yield client, await met
        done.set()
        await client.close()


Run = Callable[[Awaitable[None]], None]


def test_messages_go_both_ways_in_order(run: Run) -> None:
    async def scenario() -> None:
        async with server() as listening:
            client = await join(listening)
            assert (client.peer, client.epoch) == ("decode-0", 7)
            for number in range(1000):
                client.send(abort(str(number)))
            steps = [(await anext(client)).step for _ in range(1000)]
            assert steps == list(range(1, 1001))
            await client.close()
            assert client.closed

    run(scenario())


def test_each_side_learns_the_others_name(run: Run) -> None:
    async def scenario() -> None:
        async with pair() as (client, served):
            assert (client.peer, client.epoch) == ("decode-0", 7)
            assert (served.peer, served.epoch) == ("router-1", 7)

    run(scenario())


def test_the_sends_of_one_tick_leave_together(run: Run) -> None:
    async def scenario() -> None:
        async with pair() as (client, served):
            written: list[int] = []
            transport = client._stream.transport

            class Counting:
                def write(self, data: bytes) -> None:
                    written.append(len(data))
                    transport.write(data)

                def __getattr__(self, name: str) -> Any:
                    return getattr(transport, name)

            client._stream.transport = Counting()  # type: ignore[assignment]
            for number in range(100):
                client.send(abort(str(number)))
            got = [(await anext(served)).request_id for _ in range(100)]
            assert got == [str(number) for number in range(100)]
            assert len(written) == 1

    run(scenario())


def test_long_frames_pass_whole(run: Run) -> None:
    async def scenario() -> None:
        async with pair() as (client, served):
            name = "x" * 3_000_000
            client.send(abort(name))
            client.send(abort("short"))
            assert (await anext(served)).request_id == name
            assert (await anext(served)).request_id == "short"

    run(scenario())


def test_iteration_ends_when_the_peer_closes(run: Run) -> None:
    async def scenario() -> None:
        async with pair() as (client, served):
            client.send(abort("last words"))
            await client.close()
            await client.close()
            assert [message.request_id async for message in served] == ["last words"]
            with pytest.raises(ConnectionError):
                client.send(abort("too late"))

    run(scenario())


def test_closing_ends_the_own_iteration(run: Run) -> None:
    async def scenario() -> None:
        async with pair() as (client, _):
            reading = asyncio.ensure_future(anext(client, None))
            await asyncio.sleep(0)
            await client.close()
            assert await reading is None

    run(scenario())


def test_closing_the_server_ends_its_channels(run: Run) -> None:
    async def scenario() -> None:
        listening = server()
        await listening.start()
        client = await join(listening)
        await listening.close()
        await listening.close()
        assert [message async for message in client] == []
        with pytest.raises(ConnectionError, match="Cannot open a channel to 127.0.0.1:"):
            await join(listening)

    run(scenario())


def test_a_failing_handler_closes_its_channel_alone(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(channel: Channel) -> None:
        async for _ in channel:
            raise RuntimeError("a fault of ours")

    async def scenario() -> None:
        async with server(fail) as listening:
            first, second = await join(listening), await join(listening)
            first.send(abort("x"))
            assert [message async for message in first] == []
            assert not second.closed
            await first.close()
            await second.close()

    run(scenario())
    assert "a fault of ours" in caplog.text


# strangers


def test_a_client_with_another_secret_is_refused(run: Run) -> None:
    async def scenario() -> None:
        met = []

        async def note(channel: Channel) -> None:
            met.append(channel)

        async with server(note) as listening:
            with pytest.raises(AuthenticationError, match="secret"):
                await join(listening, secret="another")
        assert not met

    run(scenario())


@asynccontextmanager
async def impostor(
    speak: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A bare server; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await speak(reader, writer)
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def read_frame(reader: asyncio.StreamReader, kind: type[Any]) -> Any:
    (length,) = struct.unpack("<I", await reader.readexactly(4))
    return msgspec.msgpack.decode(await reader.readexactly(length), type=kind)


async def join_port(port: int, **more: Any) -> Channel:
    return await connect(
        "127.0.0.1", port, secret=SECRET, name="router-1", receives=ToRouter, **more
    )


def test_a_server_that_does_not_know_the_secret_is_refused(run: Run) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_frame(challenge("decode-0", 7)))
        await read_frame(reader, Proof)
        writer.write(encode_frame(Welcome(mac=b"\0" * 32)))
        await reader.read()

    async def scenario() -> None:
        async with impostor(speak) as port:
            with pytest.raises(AuthenticationError, match="decode-0 does not know"):
                await join_port(port)

    run(scenario())


def test_another_protocol_version_is_a_clear_error(run: Run) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = msgspec.structs.replace(challenge("decode-0", 7), version=99)
        writer.write(encode_frame(asked))
        await reader.read()

    async def scenario() -> None:
        async with impostor(speak) as port:
            with pytest.raises(ProtocolError, match="version 99"):
                await join_port(port)

    run(scenario())


def test_a_silent_server_is_given_up_in_time(run: Run) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def scenario() -> None:
        async with impostor(speak) as port:
            with pytest.raises(ConnectionError, match="no answer within 0.05 s"):
                await join_port(port, timeout_s=0.05)

    run(scenario())


def test_something_else_than_a_worker_is_a_protocol_error(run: Run) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()

    async def scenario() -> None:
        async with impostor(speak) as port:
            with pytest.raises(ProtocolError, match="exceeds the limit of 4096 bytes"):
                await join_port(port)

    run(scenario())


def test_frames_before_the_handshake_are_small(run: Run) -> None:
    async def scenario() -> None:
        async with server() as listening:
            reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
            await read_frame(reader, Challenge)
            writer.write(struct.pack("<I", 4097))
            assert await reader.read() == b"", "closed at the header, before any body"
            writer.close()

    run(scenario())


def test_a_client_that_proves_nothing_is_closed_in_time(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        async with server() as listening:
            reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
            await read_frame(reader, Challenge)
            assert await reader.read() == b""
            writer.close()

    run(scenario())


def test_strangers_are_few(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_STRANGERS", 3)

    async def scenario() -> None:
        async with server() as listening:
            waiting = []
            for _ in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
                await read_frame(reader, Challenge)
                waiting.append(writer)
            with pytest.raises((ConnectionError, AuthenticationError)):
                await join(listening)
            for writer in waiting:
                writer.close()
                await writer.wait_closed()
            while True:  # until the server has seen them go
                try:
                    client = await join(listening)
                except (ConnectionError, AuthenticationError):
                    continue
                await client.close()
                return

    run(scenario())


# liars and sleepers, after the handshake


async def raw_client(listening: ChannelServer) -> asyncio.StreamWriter:
    """An authenticated connection on which a test can write any bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
    asked = await read_frame(reader, Challenge)
    writer.write(encode_frame(prove(SECRET, asked, "liar")))
    await read_frame(reader, Welcome)
    return writer


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("<I", MAX_FRAME_BYTES + 1), "exceeds the limit"),
        (struct.pack("<I", 3) + b"\xc1\xc1\xc1", "cannot be decoded"),
        (encode_frame(step(1)), "cannot be decoded"),
    ],
    ids=["oversized", "garbage", "wrong-type"],
)
def test_a_frame_that_breaks_the_protocol_ends_the_channel(
    run: Run, data: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def read_all(channel: Channel) -> None:
            got = [message.request_id async for message in channel]
            assert got in (["fine"], [])
            assert channel.closed
            ended.set()

        async with server(read_all) as listening:
            writer = await raw_client(listening)
            writer.write(encode_frame(abort("fine")) + data)
            await ended.wait()
            writer.close()

    with caplog.at_level(logging.ERROR):
        run(scenario())
    assert words in caplog.text
    assert "liar" in caplog.text


def test_frames_that_follow_the_proof_at_once_are_not_lost(run: Run) -> None:
    async def scenario() -> None:
        got: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def note(channel: Channel) -> None:
            async for message in channel:
                got.set_result(message.request_id)

        async with server(note) as listening:
            reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
            asked = await read_frame(reader, Challenge)
            eager = encode_frame(abort("y" * 10_000))
            writer.write(encode_frame(prove(SECRET, asked, "eager")) + eager)
            assert await got == "y" * 10_000
            writer.close()

    run(scenario())


def test_a_peer_that_does_not_read_is_cut_off(run: Run) -> None:
    async def scenario() -> None:
        async with pair(max_buffer=100_000) as (client, _):
            frame = abort("z" * 50_000)
            with pytest.raises(ConnectionError, match="unread"):
                for _ in range(1000):
                    client.send(frame)
                    await asyncio.sleep(0)
            assert client.closed

    run(scenario())


def test_an_unread_channel_stops_reading_and_goes_on_later(run: Run) -> None:
    async def scenario() -> None:
        async with pair(max_buffer=8_000_000) as (client, served):
            while served._stream._reading:  # some 8 MB of the frames, then no more
                client.send(abort("z" * 50_000))
                await asyncio.sleep(0)
            stopped_at = served._stream._queued_bytes
            client.send(abort("end"))
            await asyncio.sleep(0)
            assert served._stream._queued_bytes == stopped_at < 9_000_000
            async for message in served:
                if message.request_id == "end":
                    break
            assert served._stream._reading

    run(scenario())
