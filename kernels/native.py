"""The CPU kernels in C: `native_*.c`, compiled for this machine when first needed.

The library lies in the user's cache folder under a name that follows from the sources, the flags
and the processor, so it is made once per machine and never out of date. Without a C compiler, or
with "reference" in PDSERVE_KERNELS, everything runs through torch; the log says so once.

float32 and bfloat16 only. Results differ from the references by rounding; they have the same bits
alone and in any batch, and with any number of threads. Calls run outside the interpreter's lock,
on as many threads as torch uses.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pdserve.kernels.checks import KernelError
from pdserve.kernels.user_cache import cache_folder

log = logging.getLogger(__name__)

HEADER = "native.h"
SOURCES = (
    *("native_threads.c", "native_products.c", "native_attention.c", "native_step.c"),
    *("native_digest.c", "native_prefill.c", "native_chunks.c", "native_logits.c"),
)
"""Compiled together, in this folder."""
FLAGS = (
    *("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread"),
    *("-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"),
)
MACHINE_FLAGS = ("-march=native",)
COMPILE_TIMEOUT_S = 120.0
DTYPES = (torch.float32, torch.bfloat16)
MOST_TOKENS = 64
"""Most rows of a call into C (MOST_TOKENS in native.h)."""
MOST_DIM = 256
"""Largest head size."""
MOST_GROUP = 32
"""Most query heads per KV head."""

Pointer = ctypes.c_void_p
Long = ctypes.c_int64


class Matrix(ctypes.Structure):
    _fields_ = [("weight", Pointer), ("bias", Pointer), ("rows", Long)]


class Attention(ctypes.Structure):
    _fields_ = [
        *((name, Long) for name in ("sequences", "heads", "kv_heads", "dim")),
        *((name, Long) for name in ("num_blocks", "block_size", "block_stride", "table_width")),
        *((name, Pointer) for name in ("lens", "table")),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap")),
    ]


class Prefill(ctypes.Structure):
    _fields_ = [("attention", Attention), ("starts", Pointer), ("window", Long)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, Matrix) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("cache", Pointer),
        ("window", Long),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("attention", Attention),
        *((name, Long) for name in ("hidden_size", "inner_size", "num_layers")),
        ("eps", ctypes.c_float),
        *((name, Pointer) for name in ("cos", "sin")),
        ("num_positions", Long),
        *((name, Pointer) for name in ("positions", "slots", "hidden")),
    ]


class Chunks(ctypes.Structure):
    _fields_ = [
        ("step", Step),
        ("starts", Pointer),
        *((name, Long) for name in ("tokens", "singles")),
        *((name, Pointer) for name in ("query", "mixed")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it is switched off or cannot be made (logged)."""
    words = os.environ.get("PDSERVE_KERNELS", "").split(",")
    if any(word.rpartition("=")[2].strip() == "reference" for word in words):
        return None
    try:
        loaded = ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        log.warning(
            "The CPU kernels run through torch, which is slower at decoding: those in C cannot be "
            "compiled (%s). %s",
            error,
            output.decode(errors="replace")[:500],
        )
        return None
    loaded.pdserve_linear.argtypes = [
        ctypes.c_int, *[Pointer] * 4, *[Long] * 3, ctypes.c_int
    ]  # fmt: skip
    loaded.pdserve_linear.restype = None
    loaded.pdserve_attention.argtypes = [
        ctypes.c_int, ctypes.POINTER(Attention), *[Pointer] * 3, Long, ctypes.c_int
    ]  # fmt: skip
    loaded.pdserve_prefills.argtypes = [Long, Long]
    loaded.pdserve_prefill.argtypes = [
        ctypes.POINTER(Prefill), Pointer, Pointer, Pointer, ctypes.c_int
    ]  # fmt: skip
    loaded.pdserve_decode.argtypes = [
        ctypes.c_int, ctypes.POINTER(Step), ctypes.POINTER(Layer), ctypes.c_int
    ]  # fmt: skip
    loaded.pdserve_chunkable.argtypes = [Long, Long]
    loaded.pdserve_chunks.argtypes = [ctypes.POINTER(Chunks), ctypes.POINTER(Layer), ctypes.c_int]
    loaded.pdserve_logits.argtypes = [
        *(ctypes.c_int, Pointer, Pointer, ctypes.c_float, Pointer, Pointer),
        *(Long, Long, Long, ctypes.c_int),
    ]  # fmt: skip
    loaded.pdserve_greedy.argtypes = [Pointer, Long, Long, Pointer]
    loaded.pdserve_greedy.restype = None
    loaded.pdserve_digest.argtypes = [Pointer, Long, Pointer, Long, Long, Pointer]
    loaded.pdserve_copy.argtypes = [
        *(Pointer, Long, Pointer, Pointer, Long, Pointer), Long, Long, ctypes.c_int,
        Pointer,
    ]  # fmt: skip
    return loaded


def compiled(machine_flags: Sequence[str] = MACHINE_FLAGS, folder: Path | None = None) -> Path:
    """The path of the shared library, compiled if it is not in `folder` (default: the user's
    cache) yet. Raises OSError or CalledProcessError. Several processes may call this at once."""
    compiler = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *machine_flags]
    digest = hashlib.blake2b(digest_size=12)
    texts = [Path(__file__).with_name(name).read_bytes() for name in (HEADER, *SOURCES)]
    for part in (*texts, repr(compiler).encode(), _processor()):
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = cache_folder(folder)
    path = folder / f"native-{digest.hexdigest()}.so"
    if path.exists():
        return path
    with (folder / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the workers that start together compiles
        if not path.exists():
            _compile(compiler, path)
    return path


def _compile(compiler: Sequence[str], path: Path) -> None:
    """Under a temporary name first, so that what lies under the final name is always whole."""
    sources = [str(Path(__file__).with_name(name)) for name in SOURCES]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        target = Path(scratch) / path.name
        subprocess.run(
            [*compiler, *sources, "-o", str(target), "-lm"],
            check=True,
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        target.replace(path)


def _processor() -> bytes:
    """What -march=native depends on: the processor's features, as far as the system tells."""
    lines = [platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text().split("\n\n", 1)[0].splitlines()
        lines += [line for line in first if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(lines).encode()


def serves(tensor: torch.Tensor) -> bool:
    """Whether the library is there and computes with tensors like this one."""
    return tensor.dtype in DTYPES and tensor.device.type == "cpu" and library() is not None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b; see `pdserve.kernels.linear`, which has checked it. A row has the same bits in any
    batch."""
    loaded = required()
    x = x.contiguous()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    for first in range(0, x.shape[0], MOST_TOKENS):
        rows = x[first : first + MOST_TOKENS]
        loaded.pdserve_linear(
            x.dtype is torch.bfloat16,
            rows.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out[first:].data_ptr(),
            rows.shape[0],
            *weight.shape,
            torch.get_num_threads(),
        )
    return out


def logits(
    hidden: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """See `pdserve.kernels.logits`, which has checked it; at most MOST_TOKENS rows."""
    hidden = hidden.contiguous()
    out = torch.empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
    done = required().pdserve_logits(
        hidden.dtype is torch.bfloat16,
        hidden.data_ptr(),
        norm.data_ptr(),
        eps,
        weight.data_ptr(),
        out.data_ptr(),
        hidden.shape[0],
        *weight.shape,
        torch.get_num_threads(),
    )
    if not done:
        raise MemoryError
    return out


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See `pdserve.kernels.greedy`, which has checked it; contiguous float32."""
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    required().pdserve_greedy(logits.data_ptr(), *logits.shape, out.data_ptr())
    return out


def attends(query: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether `attention_decode` can do it here."""
    heads, dim = cache.shape[3:]
    fits = query.dim() == 3 and dim <= MOST_DIM and query.shape[1] <= MOST_GROUP * heads
    return fits and serves(query) and cache.stride(1) == cache.shape[2] * heads * dim


def attention_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """See `pdserve.kernels.attention_decode`, which has checked the arguments' shapes."""
    loaded = required()
    query = query.contiguous()
    lens, table = context_lens.long().contiguous(), block_table.long().contiguous()
    shape = attention_of(cache, query.shape[1], lens, table, scale, soft_cap)
    out = torch.empty_like(query)
    done = loaded.pdserve_attention(
        query.dtype is torch.bfloat16,
        ctypes.byref(shape),
        query.data_ptr(),
        cache.data_ptr(),
        out.data_ptr(),
        window or 0,
        torch.get_num_threads(),
    )
    if not done:
        room, longest = table.shape[1] * cache.shape[2], int(lens.max())
        if longest > room:
            raise KernelError(f"block_table has room for {room} tokens, the context has {longest}.")
        raise KernelError(OUT_OF_RANGE)
    return out


def prefills(query: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether `attention_prefill` can do it here."""
    if query.dtype is not torch.bfloat16 or cache.dtype != query.dtype or not serves(query):
        return False
    heads, dim = cache.shape[3:]
    follows = cache.stride(1) == cache.shape[2] * heads * dim
    return follows and bool(required().pdserve_prefills(dim, query.shape[1] // heads))


def attention_prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """See `pdserve.kernels.attention_prefill`, which has checked the arguments' shapes."""
    query = query.contiguous()
    lens, table = context_lens.long().contiguous(), block_table.long().contiguous()
    starts = query_start.long().contiguous()
    job = Prefill(
        attention_of(cache, query.shape[1], lens, table, scale, None),
        starts.data_ptr(),
        window or 0,
    )
    out = torch.empty_like(query)
    done = required().pdserve_prefill(
        ctypes.byref(job),
        query.data_ptr(),
        cache.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if not done:
        raise KernelError(OUT_OF_RANGE)
    return out


OUT_OF_RANGE = (
    "A length, block, slot or position lies outside the block table, the cache or the rope table, "
    "the sequences do not have all tokens, there is no memory, "
    f"or the heads are too many: at most {MOST_DIM} elements, {MOST_GROUP} query heads per KV head."
)


def required() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise KernelError("The native CPU kernels are switched off or could not be compiled.")
    return loaded


def attention_of(
    cache: torch.Tensor,
    heads: int,
    lens: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    soft_cap: float | None,
) -> Attention:
    num_blocks, _, block_size, kv_heads, dim = cache.shape
    if cache.stride(1) != block_size * kv_heads * dim:
        raise KernelError("Each block's V must follow its K in the cache.")
    return Attention(
        lens.shape[0],
        heads,
        kv_heads,
        dim,
        num_blocks,
        block_size,
        cache.stride(0),
        table.shape[1],
        lens.data_ptr(),
        table.data_ptr(),
        scale,
        soft_cap or 0.0,
    )
