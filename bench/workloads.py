"""What is asked: prompts as token ids and the lengths of answers, from a seed or from a trace.

Prompts are tokens, so that every server reads the same ones, whatever its tokenizer.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import lzma
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench.arrivals import BenchError

TRACES = Path(__file__).parent / "traces"
MOONCAKE, AZURE = TRACES / "mooncake_conversation.jsonl.xz", TRACES / "azure_conv.csv"
MOONCAKE_BLOCK = 512
"""Tokens per hash id of a Mooncake trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request of a workload."""

    prompt: tuple[int, ...]
    """Token ids; of a later turn of a conversation, what is added to all that was said before."""
    output_len: int
    """Tokens to generate."""
    offset: float | None = None
    """Of a trace: seconds after its first request."""
    follows: int | None = None
    """Of a later turn: the job before it, which must have been answered."""
    think_s: float = 0.0
    """Of a later turn: seconds between that answer and this request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Everything that decides a workload."""

    kind: str
    requests: int = 100
    input_len: int = 256
    output_len: int = 64
    spread: float = 0.5
    """Random: lengths are drawn evenly from mean × (1 ± spread)."""
    prefixes: int = 10
    """Shared prefixes: how many there are."""
    prefix_len: int = 128
    """Shared prefixes: their length; `input_len` tokens of its own follow in each prompt."""
    turns: int = 4
    """Conversations: requests of each; `input_len` new tokens in every one."""
    think_s: float = 1.0
    """Conversations: seconds between an answer and the next turn."""
    trace: Path | None = None
    """Mooncake, Azure: a file, instead of the sample that comes along."""
    length_scale: float = 1.0
    """Traces: lengths are divided by this."""
    vocab: tuple[int, int] = (10, 1000)
    """Token ids are drawn from first .. last - 1."""
    max_len: int = 0
    """Requests of a trace with more tokens than this, answer included, are left out (0: none)."""
    seed: int = 0

    def check(self) -> None:
        """Raises BenchError."""
        if self.kind not in MAKERS:
            raise BenchError(f"--workload must be one of {', '.join(MAKERS)}, not {self.kind!r}.")
        for name in ("requests", "input_len", "output_len", "prefixes", "turns", "length_scale"):
            if getattr(self, name) <= 0:
                option = name.replace("_", "-")
                raise BenchError(f"--{option} must be above 0, not {getattr(self, name)}.")
        if not 0 <= self.spread < 1:
            raise BenchError(f"--spread must be from 0 to below 1, not {self.spread}.")
        if not 0 <= self.vocab[0] < self.vocab[1]:
            raise BenchError(f"--vocab must be FIRST:END with FIRST below END, not {self.vocab}.")


def make(shape: Shape) -> list[Job]:
    """The jobs of a workload, in the order in which they arrive. Equal shapes, equal jobs."""
    shape.check()
    jobs = MAKERS[shape.kind](shape)
    if not jobs:
        raise BenchError("The workload has no requests: see --trace, --max-len and --requests.")
    return jobs


def _tokens(shape: Shape, key: str, count: int) -> tuple[int, ...]:
    """The same `count` tokens for the same key."""
    rng = random.Random(f"{shape.seed}/{key}")
    return tuple(rng.choices(range(*shape.vocab), k=count))


def _fixed(shape: Shape) -> list[Job]:
    return [
        Job(prompt=_tokens(shape, f"fixed/{n}", shape.input_len), output_len=shape.output_len)
        for n in range(shape.requests)
    ]


def _random(shape: Shape) -> list[Job]:
    rng = random.Random(f"{shape.seed}/lengths")

    def length(mean: int) -> int:
        return max(1, round(mean * (1 + shape.spread * rng.uniform(-1, 1))))

    lengths = [(length(shape.input_len), length(shape.output_len)) for _ in range(shape.requests)]
    return [
        Job(prompt=_tokens(shape, f"random/{n}", count), output_len=output_len)
        for n, (count, output_len) in enumerate(lengths)
    ]


def _shared_prefix(shape: Shape) -> list[Job]:
    rng = random.Random(f"{shape.seed}/prefixes")
    prefixes = [
        _tokens(shape, f"prefix/{number}", shape.prefix_len) for number in range(shape.prefixes)
    ]
    return [
        Job(
            prompt=rng.choice(prefixes) + _tokens(shape, f"own/{n}", shape.input_len),
            output_len=shape.output_len,
        )
        for n in range(shape.requests)
    ]


def _conversation(shape: Shape) -> list[Job]:
    """Conversations one after the other: first turns arrive, later ones follow their answers."""
    return [
        Job(
            prompt=_tokens(shape, f"turn/{n}", shape.input_len),
            output_len=shape.output_len,
            follows=n - 1 if n % shape.turns else None,
            think_s=shape.think_s if n % shape.turns else 0.0,
        )
        for n in range(shape.requests)
    ]


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    second: float
    input_len: int
    output_len: int
    hashes: tuple[int, ...] = ()
    """Of its blocks of MOONCAKE_BLOCK tokens, if they are known."""


def rows_of(shape: Shape) -> Iterator[Row]:
    """A trace's requests with their lengths divided, without those that are too long; times count
    from the first of them."""
    if shape.kind == "mooncake-conversation":
        rows = mooncake_rows(shape.trace or MOONCAKE)
    else:
        rows = azure_rows(shape.trace or AZURE)
    begin: float | None = None
    for row in rows:
        count = max(1, round(row.input_len / shape.length_scale))
        output_len = max(1, round(row.output_len / shape.length_scale))
        if shape.max_len and count + output_len > shape.max_len:
            continue
        begin = row.second if begin is None else begin
        yield Row(row.second - begin, count, output_len, row.hashes)


def _replay(shape: Shape) -> list[Job]:
    return [
        Job(
            prompt=_trace_prompt(shape, number, row),
            output_len=row.output_len,
            offset=row.second,
        )
        for number, row in enumerate(itertools.islice(rows_of(shape), shape.requests))
    ]


def _trace_prompt(shape: Shape, number: int, row: Row) -> tuple[int, ...]:
    """Its tokens; blocks with equal hashes have equal tokens, as in the trace."""
    count = row.input_len
    if not row.hashes:
        return _tokens(shape, f"row/{number}", count)
    size = max(1, round(MOONCAKE_BLOCK / shape.length_scale))
    found: list[int] = []
    for hashed in row.hashes:
        found += _tokens(shape, f"block/{hashed}", size)
    # Rounding may leave the blocks a little short of the length.
    found += _tokens(shape, f"row/{number}", max(0, count - len(found)))
    return tuple(found[:count])


def mooncake_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            yield Row(
                row["timestamp"] / 1e3,
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(row["hash_ids"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(
                f"{path}, line {number}, is no row of a Mooncake trace: {error}."
            ) from None


def azure_rows(path: Path) -> Iterator[Row]:
    for number, row in enumerate(csv.DictReader(_lines(path)), 2):
        try:
            # Seven digits of a second's fraction; datetime takes six.
            moment = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])
            second = moment.replace(tzinfo=datetime.UTC).timestamp()
            yield Row(second, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(
                f"{path}, line {number}, is no row of an Azure trace: {error}."
            ) from None


def _lines(path: Path) -> Iterator[str]:
    try:
        with (
            lzma.open(path, "rt", encoding="utf-8")
            if path.suffix == ".xz"
            else path.open(encoding="utf-8")
        ) as file:
            yield from file
    except (OSError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BenchError(f"--trace: {path} cannot be read: {reason}.") from None


MAKERS: dict[str, Callable[[Shape], list[Job]]] = {
    "fixed": _fixed,
    "random": _random,
    "shared-prefix": _shared_prefix,
    "conversation": _conversation,
    "mooncake-conversation": _replay,
    "azure-conv": _replay,
}
