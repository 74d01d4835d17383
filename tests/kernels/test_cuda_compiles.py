"""The CUDA C++ kernels on a machine without a GPU: nvcc makes machine code of them for Hopper, and
the part that says which word goes where runs as C++ and is compared with the reference, once by
itself and once under the wrapper, with a CuPy that launches it here."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pdserve import kernels
from pdserve.kernels.block_geometry import Geometry, geometry

KERNELS = Path(kernels.__file__).parent
SOURCES = sorted(KERNELS.glob("*.cu"))
WORDS = (16, 8, 4, 2, 1)


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_it_for_hopper(source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc on this machine")
    target = tmp_path / "out.cubin"
    said = run(
        nvcc, "-arch=sm_90", "-cubin", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v",
        "-o", target, source,
    )  # fmt: skip
    assert target.stat().st_size > 0
    spills = [line for line in said.splitlines() if "spill" in line]
    assert len(spills) == said.count("Compiling entry function") > 0
    assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """blocks.cu as C++ for this processor."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on this machine")
    target = tmp_path_factory.mktemp("blocks") / "blocks.so"
    run(
        compiler, "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra",
        "-Werror", KERNELS / "blocks.cu", "-o", target,
    )  # fmt: skip
    return ctypes.CDLL(str(target))


def walk(
    library: ctypes.CDLL, ids: torch.Tensor, blocks: int, shape: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, pool): the places of every word of the buffer, -1 where the pool has none."""
    sizes = (shape.lots, shape.size, shape.other, shape.width, shape.first, shape.taken)
    result = torch.empty(blocks * shape.lots * shape.other * shape.taken, 2, dtype=torch.int64)
    library.walk(
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_longlong(blocks),
        ctypes.c_longlong(ids.shape[0] * shape.size),
        (ctypes.c_uint * 6)(*sizes),
        ctypes.c_void_p(result.data_ptr()),
    )
    return result[:, 0], result[:, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [None, (0, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("block_size", [None, 1, 3, 4, 7, 32])
def test_every_word_goes_where_the_reference_puts_it(
    library: ctypes.CDLL, dtype: torch.dtype, heads: tuple[int, int] | None, block_size: int | None
) -> None:
    pool = torch.randn(7, 2, 2, 4, 4, 6).to(dtype)
    ids = torch.tensor([5, 1, 6])
    expected = kernels.gather_blocks(pool, ids, heads=heads, block_size=block_size)
    shape = geometry(pool, expected, heads, WORDS)
    where, source = walk(library, ids, expected.shape[0], shape)
    size = shape.word_nbytes
    words = pool.view(-1).view(torch.uint8).view(-1, size)
    buffer = torch.full((expected.nbytes // size, size), 255, dtype=torch.uint8)
    buffer[where] = torch.where((source >= 0)[:, None], words[source.clamp(0)], 0)
    assert torch.equal(buffer.view(-1).view(dtype), expected.view(-1))
    assert where.unique().shape == where.shape
    written = source[source >= 0]
    assert written.unique().shape == written.shape
    assert written.shape[0] * size == 3 * pool[0, ..., : expected.shape[4], :].nbytes


def test_offsets_beyond_32_bits(library: ctypes.CDLL) -> None:
    ids = torch.tensor([3_000_000])
    shape = Geometry(16, lots=72, size=16, other=16, width=128, first=64, taken=64)
    _, source = walk(library, ids, 1, shape)
    assert source[0] == 3_000_000 * 72 * 16 * 128 + 64
    shape = Geometry(16, lots=72, size=16, other=32, width=128, first=0, taken=128)
    _, source = walk(library, ids, 1, shape)
    assert source[0] == 3_000_000 * 72 * 16 * 128
    shape = Geometry(16, lots=1, size=1, other=1, width=147_456, first=0, taken=147_456)
    _, source = walk(library, ids, 1, shape)
    assert source[-1] == 3_000_001 * 147_456 - 1


@pytest.mark.parametrize(
    ("dim", "heads", "nbytes"),
    [(8, None, 16), (8, (1, 1), 16), (6, (1, 2), 4), (6, None, 16), (7, (1, 1), 2)],
)
def test_words_are_as_wide_as_both_sides_allow(
    dim: int, heads: tuple[int, int] | None, nbytes: int
) -> None:
    pool = torch.zeros(2, 1, 2, 4, 3, dim, dtype=torch.float16)
    buffer = kernels.gather_blocks(pool, torch.tensor([1]), heads=heads)
    assert geometry(pool, buffer, heads, WORDS).word_nbytes == nbytes


def test_a_buffer_that_is_not_aligned_is_moved_in_smaller_words() -> None:
    pool = torch.zeros(2, 1, 2, 4, 1, 8)
    buffer = torch.zeros(65)[1:].view(1, 1, 2, 4, 1, 8)
    assert geometry(pool, buffer, None, WORDS).word_nbytes == 4


class CpuModule:
    """`cupy.RawModule` for blocks.cu whose launches run on this processor, through `walk`."""

    def __init__(self, library: ctypes.CDLL, code: str, options: Sequence[str]) -> None:
        assert code == (KERNELS / "blocks.cu").read_text()
        self.library = library

    def get_function(self, name: str) -> Callable[..., None]:
        direction, nbytes, index = name.split("_")

        def launch(grid: Sequence[int], threads: Sequence[int], args: Sequence[int]) -> None:
            pool, buffer, ids, tokens, *numbers = args
            shape = Geometry(int(nbytes), *numbers)
            count = tokens // shape.size
            kind = {"int32": ctypes.c_int32, "int64": ctypes.c_int64}[index]
            wide = torch.tensor((kind * count).from_address(ids)[:], dtype=torch.int64)
            words = shape.lots * shape.other * shape.taken
            assert grid[1] * threads[0] * 4 >= words > (grid[1] - 1) * threads[0] * 4
            places = walk(self.library, wide, grid[0], shape)
            for where, source in zip(*(part.tolist() for part in places), strict=True):
                out, into = buffer + where * shape.word_nbytes, pool + source * shape.word_nbytes
                if direction == "gather" and source < 0:
                    ctypes.memset(out, 0, shape.word_nbytes)
                elif direction == "gather":
                    ctypes.memmove(out, into, shape.word_nbytes)
                elif source >= 0:
                    ctypes.memmove(into, out, shape.word_nbytes)

        return launch


@pytest.fixture
def cuda_blocks(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, over a CuPy that has a CPU."""
    streams: list[tuple[int, int]] = []

    def from_external(stream: Any) -> Any:
        streams.append(stream.__cuda_stream__())
        return contextlib.nullcontext()

    fake: Any = ModuleType("cupy")
    fake.cuda = SimpleNamespace(Stream=SimpleNamespace(from_external=from_external))
    fake.RawModule = lambda code, options: CpuModule(library, code, options)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    current = SimpleNamespace(cuda_stream=0x1234)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.delitem(sys.modules, "pdserve.kernels.cuda_blocks", raising=False)
    import pdserve.kernels.cuda_blocks as module

    yield module
    assert set(streams) <= {(0, 0x1234)}
    sys.modules.pop("pdserve.kernels.cuda_blocks")


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("heads", [None, (1, 2)], ids=str)
@pytest.mark.parametrize("block_size", [None, 3])
def test_the_wrapper_launches_what_the_reference_does(
    cuda_blocks: ModuleType,
    index: torch.dtype,
    heads: tuple[int, int] | None,
    block_size: int | None,
) -> None:
    pool = torch.randn(9, 2, 2, 4, 3, 10).half()
    ids = torch.tensor([8, 2, 5, 0], dtype=index)
    expected = kernels.gather_blocks(pool, ids, heads=heads, block_size=block_size)
    out = torch.empty_like(expected)
    assert cuda_blocks.gather_blocks(pool, ids, out, heads=heads) is out
    assert torch.equal(out, expected)
    mine, theirs = torch.full_like(pool, 7.0), torch.full_like(pool, 7.0)
    cuda_blocks.scatter_blocks(expected, mine, ids, heads=heads)
    kernels.scatter_blocks(expected, theirs, ids, heads=heads, block_size=block_size)
    assert torch.equal(mine, theirs)


def test_a_launch_that_would_be_too_large_is_refused(
    cuda_blocks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, ids = torch.zeros(3, 1, 2, 64, 1, 9), torch.tensor([1])
    out = kernels.gather_blocks(pool, ids)
    for limit, sentence in (
        ("MOST_TILES", "may have at most 0 bytes, not 4608"),
        ("MOST_TOKENS", "at most 0 tokens"),
    ):
        with monkeypatch.context() as patch, pytest.raises(kernels.KernelError, match=sentence):
            patch.setattr(cuda_blocks, limit, 0)
            cuda_blocks.gather_blocks(pool, ids, out)
