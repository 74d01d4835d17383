"""What the load generator makes of servers that do not answer as they should."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Run, Server, drive
from pdserve.bench.wire import Wire
from pdserve.bench.workloads import Job

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"
EVENT = b'data: {"choices": [{"token_ids": [5], "finish_reason": null}]}\n\n'
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)


def ask(*answers: bytes, jobs: int = 1, timeout_s: float = 10.0, end: bool = True) -> Run:
    """One request after the other to a server that sends these answers, one per connection."""

    async def main() -> Run:
        left = iter(answers)

        async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(next(left))
            await writer.drain()
            if not end:
                await reader.read()  # until the client goes
                await reader.read()
            writer.close()

        server = await asyncio.start_server(on_client, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            target = Server(url=f"http://127.0.0.1:{port}", model="m", timeout_s=timeout_s)
            arrivals = Arrivals(kind="closed", concurrency=1)
            work = [Job(prompt=(1,), output_len=2)] * jobs
            return await drive(target, work, arrivals, seed=0)

    return asyncio.run(main())


def test_an_answer_that_breaks_off_keeps_what_came() -> None:
    (record,) = ask(HEAD + b"\r\n" + CHUNK).records
    assert "ended before the answer did" in record.error
    assert record.status == 200 and record.token_ids == [5] and record.token_times[0] > 0


def test_what_is_no_http_is_an_error() -> None:
    (record,) = ask(b"SSH-2.0-x\r\n\r\n").records
    assert "no HTTP" in record.error


def test_a_silent_server_is_given_up() -> None:
    (record,) = ask(HEAD + b"\r\n" + CHUNK, timeout_s=0.2, end=False).records
    assert "longer than 0.2 s" in record.error and record.token_ids == [5]


def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    whole = HEAD + b"connection: close\r\n\r\n" + CHUNK + CHUNK + b"0\r\n\r\n"
    found = ask(whole, whole, whole, jobs=3)
    assert [record.error for record in found.records] == ["", "", ""]


def test_nobody_listens() -> None:
    async def main() -> Run:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        target = Server(url=f"http://127.0.0.1:{port}", model="m")
        work = [Job(prompt=(1,), output_len=1)] * 2
        return await drive(target, work, Arrivals(kind="poisson", rate=100.0), seed=0)

    found = asyncio.run(main())
    assert all("Error" in record.error and not record.status for record in found.records)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:99999"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(BenchError):
        Wire(url, {})
    with pytest.raises(BenchError):
        Wire("http://x", {"authorization": "a\r\nb: c"})
