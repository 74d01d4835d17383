"""`pdserve demo`: start a cluster, ask it a few questions through the official client, stop it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.demo.questions import SHOWCASE, answers

STOP_TIMEOUT_S = 10.0
_READY = "ready "


@dataclass(frozen=True, slots=True)
class Timing:
    """When one answer came, in seconds since it was asked for."""

    first_s: float
    last_s: float
    tokens: int

    def __str__(self) -> str:
        rate = (self.tokens - 1) / max(self.last_s - self.first_s, 1e-9)
        return (
            f"first token after {self.first_s * 1e3:.0f} ms, then {rate:.0f} tokens/s "
            f"({self.tokens} tokens in {self.last_s:.2f} s)"
        )


def demo(options: Sequence[str]) -> int:
    """Run the demo; `options` go to `pdserve up`. Returns the exit code."""
    if "-h" in options or "--help" in options:
        print("usage: pdserve demo [OPTION ...]\n\nOptions are those of `pdserve up`.")
        return 0
    try:
        import openai
    except ImportError:
        print("pdserve demo: error: the demo needs the package openai: pip install openai.")
        return 2
    with _cluster(options) as url:
        if not url:
            return 1
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            timings, wrong = _ask_all(client)
    print("\nWhere the time went:")
    for (question, _), timing in zip(SHOWCASE, timings, strict=True):
        print(f"  {question:<45} {timing}")
    if wrong:
        print(f"\nNot as expected: {', '.join(wrong)}")
    return 1 if wrong else 0


@contextlib.contextmanager
def _cluster(options: Sequence[str]) -> Iterator[str]:
    """The URL of a cluster that lives as long as the context; "" if it did not start."""
    command = [sys.executable, "-P", "-m", "pdserve.cluster", "up", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = ""
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith(_READY):
                    url = line.removeprefix(_READY).strip()
                    break
            yield url
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            print(process.stdout.read(), end="")
            process.wait(STOP_TIMEOUT_S)


def _ask_all(client: Any) -> tuple[list[Timing], list[str]]:
    """Ask and print; returns timings, and the questions with unexpected answers."""
    model = client.models.list().data[0].id
    timings, wrong = [], []
    for question, must in SHOWCASE:
        print(f"\n> {question}\n", flush=True)
        text, timing = _ask(client, model, question)
        timings.append(timing)
        if not answers(text, must):
            wrong.append(question)
    return timings, wrong


def _ask(client: Any, model: str, question: str) -> tuple[str, Timing]:
    """One streamed chat answer, printed as it comes."""
    asked = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    first = last = 0.0
    tokens = 0
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.perf_counter() - asked
            first = first or last
            pieces.append(chunk.choices[0].delta.content)
            print(pieces[-1], end="", flush=True)
    print(flush=True)
    return "".join(pieces), Timing(first, last, tokens)


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
