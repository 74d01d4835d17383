"""The committed table of launch configurations, and which of them this process uses.

A kernel that has a choice asks `chosen` at every launch: the first entry of the table, unless the
measurement at the start of a worker (`pdserve.kernels.tuning`) settled on another one.

What fixes the order of a sum (keys per tile, tokens per split, the depth of a product's step) is
the same in all entries of an operation (`ORDER`), and a measured entry is only used if its result
had the same bits as the first one's. So a prefill worker and a decode worker, or a worker that
takes over from another, compute the same bits whatever each of them measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Config = Mapping[str, int]
"""Arguments of a launch."""
CUDA: Config = {"cuda": 1}
"""Stands for the implementation "cuda" of `dispatch.MODULES`, which has no arguments."""

ORDER = ("KEYS", "SPLIT", "MOST_SPLITS", "DEPTH")
"""Arguments that decide the order of a sum."""


def _tiles(
    *rows: tuple[int, int, int], names: tuple[str, str, str], **fixed: int
) -> tuple[Config, ...]:
    return tuple({**fixed, **dict(zip(names, row, strict=True))} for row in rows)


_TILED = ("ROWS", "num_warps", "num_stages")
_COPIES: tuple[Config, ...] = (
    {"TILE": 2048, "num_warps": 4},
    {"TILE": 4096, "num_warps": 8},
    {"TILE": 1024, "num_warps": 4},
    {"TILE": 8192, "num_warps": 8},
    CUDA,
)
_PACKS: tuple[Config, ...] = (
    {"ELEMENTS": 8192, "num_warps": 4},
    {"ELEMENTS": 4096, "num_warps": 4},
    {"ELEMENTS": 16384, "num_warps": 8},
)
TABLE: dict[str, tuple[Config, ...]] = {
    "attention_prefill": (  # 128 registers: two programs of 8 warps on a multiprocessor
        *_tiles((128, 8, 2), (128, 8, 3), names=_TILED, KEYS=64, maxnreg=128),
        *_tiles(
            (128, 8, 3), (128, 8, 2), (128, 4, 3), (64, 4, 3), (64, 4, 2), names=_TILED, KEYS=64
        ),
    ),
    "attention_prefill wide": _tiles(
        (64, 4, 2), (64, 4, 1), (64, 4, 3), (64, 8, 2), (128, 8, 2), names=_TILED, KEYS=32
    ),
    "attention_decode": (  # the block table is a stage of its own: 5 hold twice the tiles of 3
        {"KEYS": 64, "num_warps": 4, "num_stages": 2},
        {"KEYS": 64, "num_warps": 4, "num_stages": 3},
        {"KEYS": 64, "num_warps": 4, "num_stages": 5},
        {"KEYS": 64, "num_warps": 4, "num_stages": 7},
        {"KEYS": 64, "num_warps": 2, "num_stages": 5},
        {"KEYS": 64, "num_warps": 8, "num_stages": 5},
    ),
    "attention_decode wide": (
        {"KEYS": 32, "num_warps": 4, "num_stages": 2},
        {"KEYS": 32, "num_warps": 4, "num_stages": 3},
        {"KEYS": 32, "num_warps": 2, "num_stages": 2},
    ),
    "linear": _tiles(
        (64, 4, 3), (64, 4, 2), (64, 4, 4), (64, 8, 3), (128, 8, 3),
        names=_TILED, COLUMNS=64, DEPTH=128,
    ),
    "linear wide": _tiles((64, 4, 3), (64, 4, 2), (64, 8, 3), names=_TILED, COLUMNS=64, DEPTH=32),
    "mixture": _tiles(
        (64, 4, 3), (64, 4, 2), (64, 4, 4), (64, 8, 3), (32, 4, 3),
        names=_TILED, COLUMNS=64, DEPTH=128,
    ),
    "mixture wide": _tiles((64, 4, 3), (64, 4, 2), (64, 8, 3), names=_TILED, COLUMNS=64, DEPTH=32),
    "gather_blocks": _COPIES,
    "scatter_blocks": _COPIES,
    "pack_blocks": _PACKS,
    "unpack_blocks": _PACKS,
    "sample": (  # the race among all tokens: a maximum, which has no order
        {"CHUNK": 4096, "num_warps": 8},
        {"CHUNK": 2048, "num_warps": 4},
        {"CHUNK": 8192, "num_warps": 8},
        {"CHUNK": 8192, "num_warps": 16},
    ),
}  # fmt: skip
"""Operation → configurations, the one that runs without a measurement first. "wide": float32, or
more than 128 elements per head."""

_settled: dict[tuple[str, tuple[object, ...]], Config] = {}


def chosen(operation: str, *shape: object) -> Config:
    """The configuration of `operation` for a class of shapes and dtypes."""
    return _settled.get((operation, shape)) or TABLE[operation][0]


def attention_class(query: torch.Tensor, cache: torch.Tensor) -> tuple[str, tuple[object, ...]]:
    """What is written after the operation's name in the table, and the class of shapes, for a
    query [.., Hq, D] and a cache [N, 2, S, H, D]."""
    heads, dim = query.shape[-2:]
    _, _, size, kv_heads, _ = cache.shape
    wide = " wide" if query.dtype == torch.float32 or dim > 128 else ""
    return wide, (query.dtype, cache.dtype, dim, heads // kv_heads, size)


def settle(operation: str, shape: tuple[object, ...], config: Config) -> None:
    """Use `config` from now on. shape: what `chosen` is given."""
    _settled[operation, shape] = config


def forget() -> None:
    """Back to the table's first entries."""
    _settled.clear()
