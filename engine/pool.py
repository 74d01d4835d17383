"""The KV pool: one tensor for all blocks of all layers, in memory that other processes can map."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import weakref

import torch

from pdserve.engine.config import CACHE_DTYPES, ModelConfig

NONCE_BYTES = 16


class KVPool:
    """`num_blocks` blocks, each contiguous: [num_layers, 2, block_size, num_kv_heads, head_dim].

    On the CPU the memory is an anonymous file (memfd): zero until written, committed page by page,
    and open to other processes of this user on this host through `path`. The 16 bytes after the
    blocks are `nonce`: a reader compares them with what it was told and so knows that it has the
    right pool. The file and the mapping end with `close`, or with the process.
    """

    def __init__(
        self, model: ModelConfig, *, num_blocks: int, block_size: int, dtype: str, device: str
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, model.num_layers, 2, block_size, model.num_kv_heads, model.head_dim)
        self.block_nbytes = block_nbytes(model, block_size, dtype)
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.path = ""
        self._memory: memoryview | None = None
        self._owned: weakref.finalize[[int], KVPool] | None = None
        if device == "cpu":
            size = num_blocks * self.block_nbytes
            descriptor, mapping = _shared_memory(size, self.nonce)
            self._owned = weakref.finalize(self, os.close, descriptor)
            self._memory = memoryview(mapping)
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
            flat = torch.frombuffer(mapping, dtype=torch.uint8, count=size)
            self.tensor = flat.view(CACHE_DTYPES[dtype]).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=CACHE_DTYPES[dtype], device=device)

    def layer(self, index: int) -> torch.Tensor:
        """One layer's cache, a strided view [num_blocks, 2, block_size, num_kv_heads, head_dim]."""
        return self.tensor[:, index]

    def view(self, block_id: int) -> memoryview:
        """The bytes of one block, writable. Only on the CPU; must not outlive the pool."""
        if self._memory is None:
            raise ValueError("The blocks of this KV pool are not in this host's memory.")
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"Block {block_id} is not in the pool of {self.num_blocks} blocks.")
        begin = block_id * self.block_nbytes
        return self._memory[begin : begin + self.block_nbytes]

    def close(self) -> None:
        """Give the memory back (once the last view of it is gone). Idempotent."""
        if self._owned is not None:
            self._owned()
        self.path = ""
        self._memory = None
        self.tensor = torch.empty(0)


def block_nbytes(model: ModelConfig, block_size: int, dtype: str) -> int:
    """Bytes of one block: K and V of `block_size` tokens in all layers. dtype: a key of
    CACHE_DTYPES."""
    per_token = model.num_layers * 2 * model.num_kv_heads * model.head_dim
    return block_size * per_token * CACHE_DTYPES[dtype].itemsize


def _shared_memory(size: int, nonce: bytes) -> tuple[int, mmap.mmap]:
    """A mapped memfd of `size` bytes and the nonce: (its descriptor, to be closed, and the map)."""
    descriptor = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size + len(nonce))
        # Readers map the file: shrinking it would kill them with SIGBUS, so it cannot be shrunk.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        mapping = mmap.mmap(descriptor, size + len(nonce))
        mapping[size:] = nonce
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, mapping
