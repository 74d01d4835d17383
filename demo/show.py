"""`pdserve demo`: start a cluster, ask it a few questions through the official client, stop it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.demo.questions import SHOWCASE, answers

STOP_TIMEOUT_S = 10.0
_READY = "ready "


PHASES = (
    ("queue", "queued", "scheduled"),
    ("prefill", "scheduled", "first_token"),
    ("transfer", "resumed", "fetched"),
    ("transfer", "fetch_started", "fetched"),
    ("decode", "fetched", "finished"),
    ("decode", "first_token", "finished"),
)
"""Phase, and the events of one leg between which it lies; the first pair found counts."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one answer went, in seconds."""

    first_s: float
    """From asking until the first text came here."""
    last_s: float
    tokens: int
    phases: Mapping[str, float]

    def __str__(self) -> str:
        rate = (self.tokens - 1) / max(self.last_s - self.first_s, 1e-9)
        spans = "  ".join(f"{name} {span_s * 1e3:.1f}" for name, span_s in self.phases.items())
        return (
            f"first token {self.first_s * 1e3:.0f} ms, then {rate:.0f} tokens/s "
            f"({self.tokens} in {self.last_s:.2f} s)\n      in ms: {spans}"
        )


def phases_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per phase, from the `pdserve` member that the router adds for those who ask."""
    spans = {"tokenize": float(measured["router"]["tokenized"])}
    for leg in measured["choices"][0]["legs"]:
        at = dict(leg["events"])
        found: dict[str, float] = {}
        for phase, begin, end in PHASES:
            if begin in at and end in at and not (leg["kind"] == "decode" and phase == "prefill"):
                found.setdefault(phase, max(0.0, at[end] - at[begin]))
        for phase, span_s in found.items():
            spans[phase] = spans.get(phase, 0.0) + span_s
    return spans


def demo(options: Sequence[str]) -> int:
    """Run the demo; `options` go to `pdserve up`. Returns the exit code."""
    if "-h" in options or "--help" in options:
        print("usage: pdserve demo [OPTION ...]\n\nOptions are those of `pdserve up`.")
        return 0
    try:
        import openai
    except ImportError:
        print(
            "pdserve demo: error: the demo needs the package openai: pip install openai.",
            file=sys.stderr,
        )
        return 2
    with _cluster(options) as url:
        if not url:
            return 1
        with openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            # the cluster is ours and here; its certificate may be for other names
            http_client=openai.DefaultHttpxClient(verify=not url.startswith("https:")),
        ) as client:
            timings, wrong = _ask_all(client)
    print("\nWhere the time went:")
    for (question, _), timing in zip(SHOWCASE, timings, strict=True):
        print(f"  {question}\n      {timing}")
    if wrong and "--model" not in " ".join(options):
        print(f"\nNot as expected: {', '.join(wrong)}")
        return 1
    return 0


@contextlib.contextmanager
def _cluster(options: Sequence[str]) -> Iterator[str]:
    """The URL of a cluster that lives as long as the context; "" if it did not start."""
    command = [sys.executable, "-P", "-m", "pdserve.cluster.main", "up", "--port", "0", *options]
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
        extra_headers={"X-Pdserve-Timings": "1"},
    )
    pieces: list[str] = []
    first = last = 0.0
    tokens, phases = 0, {}
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
            phases = phases_of(chunk.model_extra["pdserve"])
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.perf_counter() - asked
            first = first or last
            pieces.append(chunk.choices[0].delta.content)
            print(pieces[-1], end="", flush=True)
    print(flush=True)
    return "".join(pieces), Timing(first, last, tokens, phases)


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
