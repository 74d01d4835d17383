"""Copies of whole blocks between the pool and one contiguous buffer, in one launch, in CUDA C++.

blocks.cu is compiled once per machine and kept by CuPy, for any shape: nothing is compiled in the
path of a request. A launch goes to torch's current stream and gets torch's addresses; CuPy owns no
memory here. See `pdserve.kernels.blocks` for the arguments.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cupy
import torch

from pdserve.kernels.block_geometry import geometry
from pdserve.kernels.checks import KernelError

SOURCE = Path(__file__).with_name("blocks.cu")
OPTIONS = ("-std=c++17",)
THREADS = 256
TILE = 4 * THREADS
"""Words per block of threads, as in blocks.cu."""
WORDS = (16, 8, 4, 2, 1)
"""Bytes that a thread can move at once."""
MOST_TILES = 65_535
"""CUDA's limit of the second dimension of a grid."""
MOST_TOKENS = 2**32 - 1
"""That one call can move: tokens are counted in 32 bits, bytes in 64."""


def gather_blocks(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: tuple[int, int] | None = None,
) -> torch.Tensor:
    """See `pdserve.kernels.gather_blocks`; `out` tells the buffer's block size."""
    _launch("gather", pool, out, block_ids, heads)
    return out


def scatter_blocks(
    buffer: torch.Tensor,
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    heads: tuple[int, int] | None = None,
) -> None:
    """See `pdserve.kernels.scatter_blocks`."""
    _launch("scatter", pool, buffer, block_ids, heads)


def _launch(
    name: str,
    pool: torch.Tensor,
    buffer: torch.Tensor,
    block_ids: torch.Tensor,
    heads: tuple[int, int] | None,
) -> None:
    if buffer.numel() == 0:
        return
    shape = geometry(pool, buffer, heads, WORDS)
    tiles = -(-shape.lots * shape.other * shape.taken // TILE)
    if tiles > MOST_TILES:
        raise KernelError(
            f"A block of the buffer may have at most {MOST_TILES * TILE * shape.word_nbytes} "
            f"bytes, not {buffer[0].numel() * buffer.element_size()}."
        )
    tokens = block_ids.shape[0] * shape.size
    if max(tokens, buffer.shape[0] * shape.other) > MOST_TOKENS:
        raise KernelError(f"One call can move at most {MOST_TOKENS} tokens, not {tokens}.")
    ids = block_ids.contiguous()
    kernel = _kernel(pool.device, f"{name}_{shape.word_nbytes}_{str(ids.dtype)[6:]}")
    stream = cupy.cuda.Stream.from_external(_TorchStream(pool.device))
    with torch.cuda.device(pool.device), stream:
        kernel(
            (buffer.shape[0], tiles),
            (THREADS,),
            (  # a Python integer arrives as 8 bytes: a long long or an address
                pool.data_ptr(),
                buffer.data_ptr(),
                ids.data_ptr(),
                tokens,
                shape.lots,
                shape.size,
                shape.other,
                shape.width,
                shape.first,
                shape.taken,
            ),
        )


class _TorchStream:
    """torch's current stream, as CuPy takes streams of others."""

    def __init__(self, device: torch.device) -> None:
        self._address = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


@functools.cache
def _kernel(device: torch.device, name: str) -> Any:
    return _module(device).get_function(name)


@functools.cache
def _module(device: torch.device) -> Any:
    """The source, compiled for that GPU."""
    with torch.cuda.device(device):
        return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=OPTIONS)
