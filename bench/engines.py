"""Engines in processes of their own, whose steps are timed alone and beside each other."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import msgspec

from pdserve.bench.arrivals import BenchError
from pdserve.bench.step_times import POINT, READY, REST, TIME, Engine, Job

TIMEOUT_S = 600.0
"""Of building an engine, and of one pass over all steps."""


class Engines:
    """One process per job. A context manager."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._stack = contextlib.ExitStack()
        self._children: list[_Child] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack, _late(self.kill):
            self._children = [stack.enter_context(_Child(job)) for job in self._jobs]
            for child in self._children:
                child.expect(READY)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kill(self) -> None:
        for child in self._children:
            child.kill()

    def timed(self, count: int, progress: Callable[[], None]) -> list[Engine]:
        """What the first `count` of them need while they all compute, and the others do nothing.
        `progress` is called after every step of the first. Raises BenchError."""
        children = self._children[:count]
        with _late(self.kill):
            for child in children:
                child.say(TIME)
            found = [children[0].engine(progress), *(child.engine() for child in children[1:])]
            for child in children:
                child.say(REST)
            for child in children:
                child.expect(READY)
        return found


@contextlib.contextmanager
def _late(kill: Callable[[], None]) -> Iterator[None]:
    """What takes longer than TIMEOUT_S is ended."""
    ended = threading.Event()

    def end() -> None:
        ended.set()
        kill()

    timer = threading.Timer(TIMEOUT_S, end)
    timer.start()
    try:
        yield
    except BenchError:
        if ended.is_set():
            raise BenchError(
                f"The engines were not done after {TIMEOUT_S:.0f} s: the model is too slow for "
                "steps as large as --max-num-batched-tokens here."
            ) from None
        raise
    finally:
        timer.cancel()


class _Child:
    """One engine's process. A context manager."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-P", "-m", "pdserve.bench.step_times",
                   msgspec.json.encode(job).decode()]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a line that it did not take
            process.stdin.close()
        process.stdout.close()
        process.wait()

    def kill(self) -> None:
        self._process.kill()

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what is read next tells
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().rstrip("\n")
        if not line:
            raise BenchError("An engine has ended before it was timed; its messages are above.")
        return line

    def expect(self, line: str) -> None:
        if (found := self._line()) != line:
            raise BenchError(f"An engine should have said {line!r} and said {found!r}.")

    def engine(self, progress: Callable[[], None] = lambda: None) -> Engine:
        """Reads what it was told to time."""
        while (line := self._line()) == POINT:
            progress()
        return msgspec.json.decode(line, type=Engine)
