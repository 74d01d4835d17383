"""What a router costs: CPU time per streamed token and per request, chat template, tokenizing,
detokenizing, placement and HTTP included.

    python -P -m pdserve.bench.router_cost [--streams 32] [--requests 600]

A real router process, a real Redis, one prefill and one decode worker without engines. Two runs of
the same requests, with short and long answers, alternate; CPU time is that of the router's process,
from /proc. Per token: the difference of two runs over the difference in tokens. Per request: what a
run with short answers costs beyond its tokens. Goals: 60 µs and 1.2 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import uvloop

from pdserve.bench.machine import commit
from pdserve.bench.scripted_worker import ScriptedWorker
from pdserve.cluster.membership import Membership
from pdserve.cluster.model_files import read_json, resolve_model
from pdserve.cluster.process import Child, Command, start, stop
from pdserve.cluster.records import Role
from pdserve.cluster.redis_server import private_folder, private_redis, until_answering
from pdserve.router.tokenizer import load_tokenizer

START_S = 60.0
SHORT, LONG = 8, 136
"""Tokens of answers."""
AIM_TOKEN_US, AIM_REQUEST_MS = 60.0, 1.2
TICKS = os.sysconf("SC_CLK_TCK")
ANSWER = "A prefill worker reads the prompt, a decode worker writes the answer. "
QUESTION = "What is the difference between a prefill worker and a decode worker? "


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.asynccontextmanager
async def running(
    folder: Path, redis: str, secret: str, options: Sequence[str]
) -> AsyncIterator[tuple[Child, int]]:
    """A router and the port that it serves."""
    log = folder / "router.log"
    argv = [sys.executable, "-P", "-m", "pdserve.router", "--port", "0", "--redis", redis]
    environment = {**os.environ, "PDSERVE_SECRET": secret}
    child = start(Command(name="router", argv=[*argv, *options], env=environment, log=log))
    try:
        yield child, await asyncio.to_thread(_port_when_ready, log)
    finally:
        await stop([child], 5.0)


def _port_when_ready(log: Path) -> int:
    """Raises RuntimeError after START_S."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = re.search(r"Serving on \S+:(\d+)", log.read_text() if log.exists() else "")
        if found:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"http://127.0.0.1:{found[1]}/health", trust_env=False)
                if answer.status_code == 200:
                    return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"The router was not ready within {START_S:g} s:\n{log.read_text()}")


async def load(port: int, bodies: Sequence[bytes], streams: int) -> None:
    """Send all of them, so many at a time, each stream down a connection of its own."""
    left = iter(bodies)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in left:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            kind = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            writer.write(head + kind + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the router answered {answer[:200]!r}")
            await reader.readuntil(b"0\r\n\r\n")
        writer.close()

    await asyncio.gather(*(client() for _ in range(streams)))


def bodies(count: int, tokens: int, turns: int) -> list[bytes]:
    """Conversations of so many questions, each different from the first word on."""
    return [
        json.dumps(
            {
                "model": "demo",
                "messages": [
                    {"role": ("user", "assistant")[turn % 2], "content": f"{number}: {QUESTION}"}
                    for turn in range(turns)
                ],
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        for number in range(count)
    ]


async def measure(pid: int, port: int, args: argparse.Namespace) -> list[tuple[float, float]]:
    """(µs per token, ms per request) of each round."""
    found = []
    await load(port, bodies(args.streams, SHORT, args.turns), args.streams)
    for number in range(args.rounds):
        spent = []
        for tokens in (SHORT, LONG):
            requests = bodies(args.requests, tokens, args.turns)
            before = cpu_s(pid)
            await load(port, requests, args.streams)
            spent.append(cpu_s(pid) - before)
        token_s = (spent[1] - spent[0]) / (args.requests * (LONG - SHORT))
        request_s = spent[0] / args.requests - SHORT * token_s
        found.append((token_s * 1e6, request_s * 1e3))
        print(f"round {number + 1}: {found[-1][0]:.1f} µs, {found[-1][1]:.2f} ms", flush=True)
    return found


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--streams", type=int, default=32, help="at a time (default: 32)")
    parser.add_argument("--requests", type=int, default=600, help="of each run (default: 600)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--turns", type=int, default=3, help="of a conversation (default: 3)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="between tokens (default: 10)")
    args, options = parser.parse_known_args()
    folder = private_folder()
    redis = private_redis(folder, folder / "redis.log")
    child = start(redis.command)
    secret, model = secrets.token_hex(16), resolve_model("")
    config, tokenizer = read_json(model / "config.json"), load_tokenizer(model)
    try:
        async with AsyncExitStack() as stack:
            await until_answering(redis.url, child)
            membership = Membership(redis.url, "pdserve")
            stack.push_async_callback(membership.close)
            for role in (Role.PREFILL, Role.DECODE):
                worker = ScriptedWorker(
                    membership, role, secret, tokenizer.encode(ANSWER, False),
                    config["max_position_embeddings"], config["vocab_size"], args.step_ms / 1000,
                )  # fmt: skip
                await stack.enter_async_context(worker)
            router, port = await stack.enter_async_context(
                running(folder, redis.url, secret, options)
            )
            found = await measure(router.pid, port, args)
    finally:
        await stop([child], 2.0)
        shutil.rmtree(folder)
    token_us, request_ms = (statistics.median(column) for column in zip(*found, strict=True))
    print(
        f"router: {token_us:.1f} µs of CPU per streamed token (aim {AIM_TOKEN_US:g}), "
        f"{request_ms:.2f} ms per request (aim {AIM_REQUEST_MS:g}); {args.streams} streams, "
        f"{args.turns} turns, commit {commit()}"
    )


if __name__ == "__main__":
    uvloop.run(main())
