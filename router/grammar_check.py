"""Grammars checked before anybody generates with them: a cache, and one process that compiles.

The process is started at the first wish, and again after one that it did not survive. It is asked
by a thread of its own, so that neither a slow wish nor a dead process holds the router up.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pdserve.protocol.grammar import MAX_CHARS
from pdserve.router.errors import BadRequest, Overloaded

CPU_S = 1.0
"""Processor time per wish: a schema of 2,000 properties takes about a third of a second."""
KEPT = 256
"""Wishes whose grammars (or faults) are remembered."""
KEPT_BYTES = 16 << 20
REPLY_S = 40.0
"""Longest wait for one reply; the child ends itself long before, unless the machine is stuck."""
WAIT_S = 30.0
"""Longest wait of a request for its grammar, those before it included."""
MAX_WAITING = 64
"""Wishes that wait for the process at once."""
READ = 1 << 16


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of an answer's form (see `grammars`), and the field where it said so."""

    kind: str
    value: Any
    param: str
    options: dict[str, Any] = field(default_factory=dict)


class _Child:
    """The process. Used by one thread at a time."""

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        self._command = [
            sys.executable, "-P", "-m", "pdserve.router.grammar_child",
            str(tokenizer), str(vocab_size),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> dict[str, str]:
        """{"grammar"} or {"error"}."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        try:
            reply = self._exchange(self._process, line + b"\n")
        except OSError:  # a pipe of a process that has ended
            reply = b""
        if reply:
            decoded: dict[str, str] = msgspec.json.decode(reply)
            return decoded
        self.close()
        return {
            "error": f"It is too complex: compiling it takes more than {CPU_S:g} s or too much "
            "memory. Use fewer and simpler parts."
        }

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        """Its reply, or nothing if it died or is too slow."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line)
        reply, deadline = b"", time.monotonic() + REPLY_S
        poll = select.poll()  # not `select`, which knows no descriptors beyond 1023
        poll.register(process.stdout, select.POLLIN)
        while not reply.endswith(b"\n"):
            left_ms = max(0.0, deadline - time.monotonic()) * 1000
            piece = process.stdout.read(READ) if poll.poll(left_ms) else b""
            if not piece:
                return b""
            reply += piece
        return reply

    def kill(self) -> None:
        """End it from another thread: whoever waits for its reply gets none."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None


class GrammarCheck:
    """Turns wishes into grammars that workers can use. Event loop only."""

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        self._child = _Child(tokenizer, vocab_size)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._known: OrderedDict[bytes, asyncio.Future[dict[str, str]]] = OrderedDict()
        self._bytes = 0
        self._waiting = 0

    async def grammar(self, wish: Wish) -> str:
        """Raises BadRequest naming the wish's field, or Overloaded."""
        wanted = {"kind": wish.kind, "value": wish.value, "options": wish.options}
        try:
            line = msgspec.json.encode(wanted)
        except RecursionError:
            raise BadRequest(f"{wish.param} is nested too deeply.", param=wish.param) from None
        if len(line) > MAX_CHARS:
            raise BadRequest(
                f"{wish.param} has {len(line)} bytes; a constraint may have at most {MAX_CHARS} "
                f"(parameter={wish.param}).",
                param=wish.param,
            )
        try:
            async with asyncio.timeout(WAIT_S):
                reply = await asyncio.shield(self._ask(line))
        except TimeoutError:
            raise Overloaded(
                f"The grammar was not compiled within {WAIT_S:g} s: others are before it. Try "
                "again soon."
            ) from None
        if "error" in reply:
            raise BadRequest(
                f"{wish.param} cannot be used: {reply['error']} (parameter={wish.param})",
                param=wish.param,
            )
        return reply["grammar"]

    def _ask(self, line: bytes) -> asyncio.Future[dict[str, str]]:
        """The reply, or the one that somebody waits for already, or that is known."""
        found = self._known.pop(line, None)
        if found is None:
            if self._waiting >= MAX_WAITING:
                raise Overloaded(
                    f"{self._waiting} grammars wait to be compiled, as many as may. Try again soon."
                )
            loop = asyncio.get_running_loop()
            found = loop.run_in_executor(self._executor, self._child.ask, line)
            found.add_done_callback(lambda reply: self._replied(line, reply))
            self._waiting += 1
            self._bytes += len(line)
        self._known[line] = found
        while len(self._known) > KEPT or self._bytes > KEPT_BYTES:
            oldest, _ = self._known.popitem(last=False)
            self._bytes -= len(oldest)
        return found

    def _replied(self, line: bytes, reply: asyncio.Future[dict[str, str]]) -> None:
        self._waiting -= 1
        failed = reply.cancelled() or reply.exception() is not None
        if failed and self._known.get(line) is reply:
            del self._known[line]
            self._bytes -= len(line)

    def close(self) -> None:
        """Ends the process; blocks for as long as that takes."""
        self._child.kill()
        self._executor.shutdown(cancel_futures=True)
        self._child.close()
