"""Texts by name: what schedulers and caches need of a prompt, without its tokens.

The scheduler hashes tokens itself where hashes are missing. Those of a prompt are given to it;
those of the answer it makes from `Tokens`, which are the same wherever the request is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from xxhash import xxh3_64_digest

from pdserve.protocol.blocks import (
    HASH_BYTES,
    block_hashes,
    is_route_position,
    root_hash,
    route_hashes,
    route_index,
    route_position,
)

ROOT = root_hash("simulated")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of `length` tokens."""

    length: int
    hashes: Sequence[bytes]
    """Of its full blocks."""
    routes: Sequence[bytes]
    """Its route hashes."""
    held: Sequence[tuple[int, bytes]]
    """Route positions at which a block ends, with their hashes, ascending."""
    tail: Sequence[int] = ()
    """Its tokens behind the last full block, if they are known."""


def of_tokens(tokens: Sequence[int], block_size: int) -> Prompt:
    """A prompt whose tokens are known."""
    routes, length = route_hashes(tokens), len(tokens)
    return Prompt(
        length,
        block_hashes(tokens, block_size, ROOT),
        routes,
        _held(length, block_size, routes),
        tokens[length - length % block_size :],
    )


def of_names(names: Sequence[int], unit: int, length: int, block_size: int, copy: int) -> Prompt:
    """A prompt of a trace, of which only the names of its pieces of `unit` tokens are known
    (`block_size` is a multiple or a part of it). Equal names of one `copy` are equal tokens; the
    name 0, with which every conversation begins, is the same in all copies."""
    if block_size >= unit:
        step = block_size // unit
        groups = [names[first : first + step] for first in range(0, len(names), step)]
    else:
        groups = [(name,) for name in names for _ in range(unit // block_size)]
    chain, parent = [], ROOT
    for group in groups[: -(-length // block_size)]:
        text = b"".join(
            (name << 32 | (copy if name else 0)).to_bytes(8, "little") for name in group
        )
        parent = hashlib.blake2b(text, key=parent, digest_size=HASH_BYTES).digest()
        chain.append(parent)
    routes: list[bytes] = []
    while (end := route_position(len(routes))) <= min(length, len(chain) * block_size):
        # Tokens up to the middle of a block are the same where the whole block is.
        routes.append(xxh3_64_digest(chain[(end - 1) // block_size], end))
    return Prompt(length, chain[: length // block_size], routes, _held(length, block_size, routes))


def _held(length: int, block_size: int, routes: Sequence[bytes]) -> list[tuple[int, bytes]]:
    ends = range(block_size, length + 1, block_size)
    found = [(end, route_index(end)) for end in ends if is_route_position(end)]
    return [(end, routes[index]) for end, index in found if index < len(routes)]


class Tokens(Sequence[int]):
    """Token ids of a request: as many as are known. Those of the answer are functions of their
    place and the request, and so are those of the prompt that nobody will hash again. Takes the
    place of a list in `engine.request.Request`."""

    __slots__ = ("_first", "_prompt", "length")

    def __init__(self, prompt: Prompt, number: int, drawn: int = 0) -> None:
        """`number`: of the request; the same for all its legs. `drawn` tokens of its answer are
        there."""
        self._prompt = prompt
        self._first = number * 0x9E3779B1 & 0x7FFFFFFF
        self.length = prompt.length + drawn

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, int):
            return self[place : place + 1][0]
        start, stop, _ = place.indices(self.length)
        prompt, first = self._prompt, self._first
        known = prompt.length - len(prompt.tail)
        if start >= prompt.length or stop <= known or not prompt.tail:
            return range(first + start, first + stop)
        before = range(first + start, first + known)
        tail = prompt.tail[max(0, start - known) : stop - known]
        return [*before, *tail, *range(first + prompt.length, first + stop)]

    def append(self, token: int) -> None:
        self.length += 1

    def grow(self, count: int) -> None:
        self.length += count

    def answer(self, count: int) -> Sequence[int]:
        """The first tokens of the answer."""
        start = self._first + self._prompt.length
        return range(start, start + count)
