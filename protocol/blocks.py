"""Chained block hashes: the name of a KV block is its tokens and everything before them.

Computed here, without tensors, because three processes must agree on them: the engines (prefix
cache), the transfer (which blocks the other side already holds) and the router (placement).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

HASH_BYTES = 16
"""Length of a block hash: blake2b cut to 128 bits, collision-resistant against chosen prompts."""


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
