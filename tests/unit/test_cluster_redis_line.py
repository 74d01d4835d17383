"""The lean connection to Redis: in order, under deadlines, and never out of step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from redis.asyncio import Redis
from redis_for_tests import RedisForTests, redis_for_tests

from pdserve.cluster.redis_line import LineError, ScriptLine, _Line, packed

ECHO = "return ARGV[1] .. KEYS[1]"
SLOW = """
local till = redis.call('TIME')[1] + 2
while tonumber(redis.call('TIME')[1]) < till do end
return 'late'
"""
Scenario = Callable[[RedisForTests], Awaitable[None]]


def run(scenario: Scenario, runner: Callable[..., None] = asyncio.run) -> None:
    async def main() -> None:
        async with redis_for_tests() as redis:
            await scenario(redis)

    runner(main())


def line(redis: RedisForTests, script: str = ECHO, timeout_s: float = 5.0) -> ScriptLine:
    return ScriptLine(redis.url, script, ["key"], timeout_s)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_answers_come_in_order(runner: Callable[..., None]) -> None:
    async def scenario(redis: RedisForTests) -> None:
        echo = line(redis)
        texts = [b"x" * size + b"\r\n" for size in (0, 1, 70_000, 3)]
        for _ in range(2):  # the second time the script is known
            answers = await echo.run([packed(text) for text in texts], 1)
            assert answers == [text + b"key" for text in texts]
        one, two = await asyncio.gather(echo.run([packed("a")], 1), echo.run([packed("b")], 1))
        assert (one, two) == ([b"akey"], [b"bkey"])
        echo.close()

    run(scenario, runner)


def test_errors_are_raised_and_the_line_goes_on() -> None:
    async def scenario(redis: RedisForTests) -> None:
        bad = line(redis, "return redis.call('NONSENSE', ARGV[1])")
        with pytest.raises(LineError, match="(?i)unknown redis command"):
            await bad.run([packed("a")], 1)
        raw = Redis.from_url(redis.url)
        await raw.script_flush()
        await raw.aclose()
        with pytest.raises(LineError, match="(?i)unknown redis command"):
            await bad.run([packed("a")], 1)  # and the lost script was loaded again
        bad.close()
        wrong = ScriptLine(redis.url.replace(":", ":wrong", 2), ECHO, [], 5.0)
        with pytest.raises((LineError, OSError)):
            await wrong.run([packed("a")], 1)
        wrong.close()

    run(scenario)


def test_a_late_answer_is_never_taken_for_the_next_one() -> None:
    async def scenario(redis: RedisForTests) -> None:
        slow = line(redis, SLOW, timeout_s=0.1)
        with pytest.raises(TimeoutError):
            await slow.run([packed("a")], 1)
        echo = line(redis)
        assert await echo.run([packed("b")], 1) == [b"bkey"]
        task = asyncio.create_task(line(redis, SLOW).run([packed("a")], 1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        echo.close()

    run(scenario)


def test_all_that_it_takes_to_get_an_answer_is_under_one_limit() -> None:
    """A server that needs 0.2 s for every reply, and has lost the script."""

    gone = asyncio.Event()

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in (b"-NOSCRIPT No matching script\r\n", b"$1\r\nx\r\n", b"$1\r\ny\r\n"):
            await reader.readuntil(b"a\r\n")
            await asyncio.sleep(0.2)
            writer.write(reply)
        await reader.read()
        writer.close()
        gone.set()

    async def main() -> None:
        server = await asyncio.start_server(slowly, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        lost = ScriptLine(f"redis://127.0.0.1:{port}", "a", [], timeout_s=0.5)
        with pytest.raises(TimeoutError):
            await lost.run([packed("a")], 1)
        server.close()
        await gone.wait()

    asyncio.run(main())


def test_redis_away_and_back() -> None:
    async def scenario(redis: RedisForTests) -> None:
        echo = line(redis)
        assert await echo.run([packed("a")], 1) == [b"akey"]
        await redis.stop()
        with pytest.raises(OSError):  # noqa: PT011 - whichever of them comes first
            await echo.run([packed("a")], 1)
        await redis.start()
        assert await echo.run([packed("a")], 1) == [b"akey"]
        echo.close()

    run(scenario)


@pytest.mark.parametrize("data", [b"$-5\r\n", b"$99999999999\r\n", b"$x\r\n", b"*1\r\n", b"hi\r\n"])
def test_what_is_not_the_protocol_ends_the_connection(data: bytes) -> None:
    class Wire(asyncio.Transport):
        aborted = False

        def write(self, data: object) -> None: ...

        def abort(self) -> None:
            self.aborted = True

    async def main() -> None:
        connection, wire = _Line(), Wire()
        until = asyncio.get_running_loop().time() + 5
        connection.connection_made(wire)
        call = connection.call(b"", 1, until)
        for byte in data:
            connection.data_received(bytes([byte]))
        with pytest.raises(LineError):
            await call
        assert wire.aborted and connection.closed
        with pytest.raises(ConnectionError):
            await connection.call(b"", 1, until)

    asyncio.run(main())
