"""Names of KV blocks: a hash of a block's tokens and everything before them.

Computed here, without tensors, because several processes must agree on them. There are two kinds:

- *block hashes*, one per block, chained: engines (prefix cache) and the transfer (which blocks the
  other side already holds) rely on them, so they are long.
- *route hashes*, at few positions that lie ever further apart: routers find out with them, cheaply,
  which worker has the longest prefix of a prompt. A wrong one costs a cache hit, never a token.
"""

from __future__ import annotations

import hashlib
import struct
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
    """Token ids as little-endian 32-bit words. About 3 ns per token, less than half of what
    `struct.pack` takes, which copies its arguments twice more."""
    return struct.Struct(f"<{len(token_ids)}I").pack(*token_ids)


def unpack_tokens(packed: bytes) -> list[int]:
    """The inverse of `pack_tokens`; bytes behind the last whole word are ignored."""
    return list(struct.unpack_from(f"<{len(packed) // 4}I", packed))


def route_hashes(
    token_ids: Sequence[int] | bytes, salt: str = "", known: Sequence[bytes] = ()
) -> list[bytes]:
    """The route hashes of all route positions within `token_ids`, shortest prefix first.

    They depend on the tokens and the cache salt alone, not on the layout of the blocks. `known` are
    the first of them, computed earlier. Each is the XXH3-64 of the tokens since the position before
    it, seeded with the hash before it. Packed tokens (see `pack_tokens`) cost about 0.5 ns each.
    """
    hashes = list(known)
    start = route_position(len(hashes) - 1) if hashes else 0
    if isinstance(token_ids, bytes):
        words = memoryview(token_ids)[4 * start :]
    else:
        end = _last_route_position(len(token_ids))
        words = memoryview(pack_tokens(token_ids[start:end]))
    count, offset = start + len(words) // 4, start
    seed = int.from_bytes(hashes[-1], "little") if hashes else xxh3_64_intdigest(salt.encode())
    while (end := route_position(len(hashes))) <= count:
        seed = xxh3_64_intdigest(words[4 * (start - offset) : 4 * (end - offset)], seed)
        start = end
        hashes.append(seed.to_bytes(ROUTE_BYTES, "little"))
    return hashes


def _last_route_position(num_tokens: int) -> int:
    """The last one within so many tokens; 0 if there is none."""
    units = num_tokens // ROUTE_UNIT
    spare = max(0, units.bit_length() - 4)
    return (units >> spare << spare) * ROUTE_UNIT
