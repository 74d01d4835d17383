"""Names of KV blocks: a hash of a block's tokens and everything before them.

Computed here, without tensors, because several processes must agree on them. There are two kinds:

- *block hashes*, one per block, chained: engines (prefix cache) and the transfer (which blocks the
  other side already holds) rely on them, so they are long.
- *route hashes*, at few positions that lie ever further apart: routers find out with them, cheaply,
  which worker has the longest prefix of a prompt. A wrong one costs a cache hit, never a token.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

HASH_BYTES = 16
"""Length of a block hash: blake2b cut to 128 bits, collision-resistant against chosen prompts."""


ROUTE_BYTES = 8
"""Length of a route hash."""
ROUTE_UNIT = 16
"""Tokens between the first route positions."""


def root_hash(fingerprint: str, salt: str = "") -> bytes:
    """The parent of a first block: separates models and layouts, and the clients' cache salts."""
    return hashlib.blake2b(f"{fingerprint}\0{salt}".encode(), digest_size=HASH_BYTES).digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of one full block of tokens that follows `parent`."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.blake2b(packed, key=parent, digest_size=HASH_BYTES).digest()


def block_hashes(
    token_ids: Sequence[int], block_size: int, root: bytes, known: Sequence[bytes] = ()
) -> list[bytes]:
    """Hashes of all full blocks of `token_ids`, oldest first; a partial last block has none.

    `known` are the hashes of the first blocks, computed earlier, so that a growing request hashes
    each block once.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = next_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes


def route_position(index: int) -> int:
    """The number of tokens that the route hash `index` (0, 1, …) covers.

    In units of ROUTE_UNIT: 1, 2, … 16, 18, … 32, 36, … 64, 72, …: eight per doubling, so that a
    prompt of n units has about 8 × log2(n / 4) of them and the longest cached prefix is known to an
    eighth.
    """
    if index < 15:
        return (index + 1) * ROUTE_UNIT
    doublings, eighth = divmod(index - 7, 8)
    return ((8 + eighth) << doublings) * ROUTE_UNIT


def is_route_position(num_tokens: int) -> bool:
    """Whether a prefix of so many tokens has a route hash."""
    units, rest = divmod(num_tokens, ROUTE_UNIT)
    spare = max(0, units.bit_length() - 4)
    return not rest and units > 0 and units >> spare << spare == units


def route_index(num_tokens: int) -> int:
    """The inverse of `route_position`."""
    return num_routes(num_tokens) - 1


def num_routes(num_tokens: int) -> int:
    """Route positions within the first `num_tokens` tokens."""
    units = num_tokens // ROUTE_UNIT
    doublings = max(0, units.bit_length() - 4)
    return 8 * doublings + (units >> doublings)


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit words. About 2.6 ns per token; `struct.pack`, which copies
    its arguments first, takes 8."""
    words = array("I")
    words.fromlist(token_ids if isinstance(token_ids, list) else list(token_ids))
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """The inverse of `pack_tokens`; bytes behind the last whole word are ignored."""
    return list(struct.unpack_from(f"<{len(packed) // 4}I", packed))


def route_hashes(
    token_ids: Sequence[int] | bytes, salt: str = "", known: Sequence[bytes] = ()
) -> list[bytes]:
    """The route hashes of all route positions within `token_ids`, shortest prefix first.

    They depend on the tokens and the cache salt alone, not on the layout of the blocks. `known` are
    the first of them, computed earlier. Each is the XXH3-64 of the tokens since the position before
    it, seeded with the hash before it. Packed tokens (see `pack_tokens`) cost about 0.3 ns each.
    """
    hashes = list(known)
    length = len(token_ids) // 4 if isinstance(token_ids, bytes) else len(token_ids)
    ends = _route_positions(num_routes(length))
    if len(hashes) >= len(ends):
        return hashes
    start = ends[len(hashes) - 1] if hashes else 0
    if isinstance(token_ids, bytes):
        words = memoryview(token_ids)[4 * start : 4 * ends[-1]].cast("I")
    else:
        words = memoryview(pack_tokens(token_ids[start : ends[-1]])).cast("I")
    seed = int.from_bytes(hashes[-1], "little") if hashes else xxh3_64_intdigest(salt.encode())
    done = 0
    for end in ends[len(hashes) :]:
        seed = xxh3_64_intdigest(words[done : end - start], seed)
        done = end - start
        hashes.append(seed.to_bytes(ROUTE_BYTES, "little"))
    return hashes


@functools.cache
def _route_positions(count: int) -> tuple[int, ...]:
    """The first `count`. A few hundred are all that prompts can have."""
    return tuple(route_position(index) for index in range(count))
