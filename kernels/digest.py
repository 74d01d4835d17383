"""Checksums of blocks of bytes: xxh3-64, alone or of what is being copied, in one pass.

In C where it can be compiled (`native_digest.c`), else through the package xxhash: the same
numbers, but a copy then reads memory twice. Calls run outside the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import xxhash

from pdserve.kernels.native import library

SHORTEST = 241
"""Bytes; shorter blocks are summed by other rules, which only the package knows."""

Bytes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint8]]
Sums: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
"""Checksums, one per block."""


def prepare() -> None:
    """Compile the C, where that has not been done, so that no transfer waits for the compiler."""
    _loaded(SHORTEST)


def digest_blocks(
    data: Bytes, block_ids: Sequence[int] | np.ndarray[Any, Any], nbytes: int
) -> Sums:
    """xxh3-64 of each block: [n] uint64.

    data: [N · nbytes] uint8, contiguous; block i begins at i · nbytes. Raises IndexError for a
    block outside.
    """
    count = _whole(data, nbytes)
    loaded = _loaded(nbytes)
    if loaded is None:
        return np.array([_digest(data, block, count, nbytes) for block in block_ids], np.uint64)
    ids = np.ascontiguousarray(block_ids, np.int64)
    sums = np.empty(len(ids), np.uint64)
    if not loaded.pdserve_digest(
        data.ctypes.data, count, ids.ctypes.data, len(ids), nbytes, sums.ctypes.data
    ):
        raise IndexError(f"A block to be summed lies outside the {count}.")
    return sums


def copy_blocks(
    source: Bytes,
    source_ids: Sequence[int] | np.ndarray[Any, Any],
    target: Bytes,
    target_ids: Sequence[int] | np.ndarray[Any, Any],
    nbytes: int,
    *,
    streamed: bool = False,
) -> Sums:
    """Copy block source_ids[i] to block target_ids[i]; returns xxh3-64 of each, as it lies there:
    [n] uint64.

    source, target: [N · nbytes] uint8, contiguous, no block of both; target writable. `streamed`:
    the copy goes past the caches, which is faster for more than they hold. Raises IndexError for a
    block outside, before anything is copied.
    """
    if len(source_ids) != len(target_ids):
        raise ValueError(f"{len(source_ids)} blocks cannot go into {len(target_ids)} places.")
    if not target.flags.writeable:
        raise ValueError("Blocks cannot be copied into memory that is read-only.")
    limits = _whole(source, nbytes), _whole(target, nbytes)
    loaded = _loaded(nbytes)
    if loaded is None:
        return _copy(source, source_ids, target, target_ids, nbytes, limits)
    theirs, mine = (np.ascontiguousarray(ids, np.int64) for ids in (source_ids, target_ids))
    sums = np.empty(len(mine), np.uint64)
    if not loaded.pdserve_copy(
        source.ctypes.data,
        limits[0],
        theirs.ctypes.data,
        target.ctypes.data,
        limits[1],
        mine.ctypes.data,
        len(mine),
        nbytes,
        streamed,
        sums.ctypes.data,
    ):
        raise IndexError(f"A block to be copied lies outside: {limits} blocks, source and target.")
    return sums


def _whole(data: Bytes, nbytes: int) -> int:
    """Blocks in `data`."""
    if nbytes < 1 or data.dtype != np.uint8 or not data.flags.c_contiguous or data.ndim != 1:
        raise ValueError("Blocks must lie in a contiguous array of bytes and have at least one.")
    return len(data) // nbytes


def _loaded(nbytes: int) -> ctypes.CDLL | None:
    """The C library, if it can sum such blocks."""
    return library() if nbytes >= SHORTEST and sys.byteorder == "little" else None


def _digest(data: Bytes, block: int, count: int, nbytes: int) -> int:
    if not 0 <= block < count:
        raise IndexError(f"Block {block} lies outside the {count}.")
    return xxhash.xxh3_64_intdigest(data[block * nbytes : (block + 1) * nbytes].data)


def _copy(
    source: Bytes,
    source_ids: Sequence[int] | np.ndarray[Any, Any],
    target: Bytes,
    target_ids: Sequence[int] | np.ndarray[Any, Any],
    nbytes: int,
    limits: tuple[int, int],
) -> Sums:
    for ids, limit in ((source_ids, limits[0]), (target_ids, limits[1])):
        if any(not 0 <= block < limit for block in ids):
            raise IndexError(f"A block to be copied lies outside the {limit}.")
    sums = []
    for theirs, mine in zip(source_ids, target_ids, strict=True):
        part = target[mine * nbytes : (mine + 1) * nbytes]
        np.copyto(part, source[theirs * nbytes : (theirs + 1) * nbytes])
        sums.append(xxhash.xxh3_64_intdigest(part.data))
    return np.array(sums, np.uint64)
