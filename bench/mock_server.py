"""A completions server with known delays, in a process of its own, to check the client against:
`python -P -m pdserve.bench.mock_server TTFT_S ITL_S`. Prints its port, serves until its input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from pdserve.bench.client import SPIN_S
from pdserve.bench.undisturbed import undisturbed


async def serve(ttft_s: float, itl_s: float) -> None:
    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            length = next(
                int(line.split(b":")[1])
                for line in head.splitlines()
                if line.lower().startswith(b"content-length")
            )
            received = asyncio.get_running_loop().time()
            body = json.loads(await reader.readexactly(length))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
            writer.write(b"transfer-encoding: chunked\r\n\r\n")
            for number in range(body["max_tokens"]):
                await _until(received + ttft_s + number * itl_s)
                choice = {"index": 0, "text": "x", "token_ids": [number], "finish_reason": None}
                _chunk(writer, json.dumps({"choices": [choice]}))
            _chunk(writer, "[DONE]")
            writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(on_client, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


async def _until(moment: float) -> None:
    """To the microsecond: timers of a loop are whole milliseconds, so the last ones are spent
    asking."""
    time = asyncio.get_running_loop().time
    if (left := moment - SPIN_S - time()) > 0:
        await asyncio.sleep(left)
    while time() < moment:  # noqa: ASYNC110 - it is time that has to pass
        await asyncio.sleep(0)


def _chunk(writer: asyncio.StreamWriter, text: str) -> None:
    event = f"data: {text}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(event), event))


@contextlib.contextmanager
def started(ttft_s: float, itl_s: float) -> Iterator[str]:
    """A mock server's URL; it ends with the context."""
    command = [sys.executable, "-P", "-m", __spec__.name, str(ttft_s), str(itl_s)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


if __name__ == "__main__":
    with undisturbed():
        asyncio.run(serve(float(sys.argv[1]), float(sys.argv[2])))
