"""Checksums of blocks in C against the package's, and copies that carry them."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.kernels import digest, native
from pdserve.kernels.digest import Bytes, copy_blocks, digest_blocks

VARIANTS = ("-march=native", "-march=x86-64-v3", "-march=x86-64", "none")
SIZES = (1, 240, 241, 255, 256, 257, 1024, 1025, 1088, 2048, 3000, 65536)


@pytest.fixture(scope="module", params=VARIANTS, autouse=True)
def _variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The library for older processors too, and no library."""
    flag: str = request.param
    features = native._processor()
    if flag.startswith("-march=x86") and b"x86_64" not in features:
        pytest.skip("x86-64 only")
    if flag.endswith("v3") and b"avx2" not in features:
        pytest.skip(f"this processor cannot run {flag}")
    library = native.library()
    if library is None and flag != "none":
        pytest.skip("no C compiler, or the C kernels are switched off")
    patch = pytest.MonkeyPatch()
    if flag != "-march=native":
        other = None if flag == "none" else alone(flag, tmp_path_factory.mktemp("digest"))
        patch.setattr(digest, "library", lambda: other)
    yield
    patch.undo()


def alone(flag: str, folder: Path) -> ctypes.CDLL:
    """This file of the library, compiled for another processor."""
    target = folder / "digest.so"
    source = Path(native.__file__).with_name("native_digest.c")
    subprocess.run(["cc", *native.FLAGS, flag, str(source), "-o", str(target)], check=True)
    loaded, whole = ctypes.CDLL(str(target)), native.library()
    assert whole is not None
    for name in ("pdserve_digest", "pdserve_copy"):
        getattr(loaded, name).argtypes = getattr(whole, name).argtypes
    return loaded


def noise(nbytes: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def aligned(nbytes: int, to: int = 64) -> Bytes:
    room = np.zeros(nbytes + to, np.uint8)
    start = -room.ctypes.data % to
    return room[start : start + nbytes]


@pytest.mark.parametrize("nbytes", SIZES)
def test_digests_are_those_of_the_package(nbytes: int) -> None:
    data = noise(5 * nbytes + 3)
    expected = [
        xxhash.xxh3_64_intdigest(data[i * nbytes : (i + 1) * nbytes].data) for i in (4, 0, 0, 2)
    ]
    assert digest_blocks(data, [4, 0, 0, 2], nbytes).tolist() == expected
    every_other = np.array([4, 1, 0, 1, 0, 1, 2])[::2]
    assert digest_blocks(data, every_other, nbytes).tolist() == expected
    assert digest_blocks(data, [], nbytes).tolist() == []


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("nbytes", SIZES)
def test_copies_carry_their_digests(nbytes: int, offset: int, streamed: bool) -> None:
    source = noise(6 * nbytes)
    target = aligned(7 * nbytes + offset)[offset:]
    sums = copy_blocks(source, [5, 1, 2], target, [0, 4, 6], nbytes, streamed=streamed)
    expected = np.zeros(7 * nbytes, np.uint8)
    for theirs, mine in ((5, 0), (1, 4), (2, 6)):
        expected[mine * nbytes : (mine + 1) * nbytes] = source[theirs * nbytes :][:nbytes]
    assert np.array_equal(target, expected)
    assert np.array_equal(sums, digest_blocks(target, [0, 4, 6], nbytes))
    reversed_ids = np.array([2, 1, 5])[::-1], np.array([6, 4, 0])[::-1]
    again = copy_blocks(source, reversed_ids[0], target, reversed_ids[1], nbytes)
    assert np.array_equal(target, expected) and np.array_equal(again, sums)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=241, max_size=5000), st.integers(0, 63))
def test_any_length_and_alignment(content: bytes, offset: int) -> None:
    data = np.frombuffer(bytes(offset) + content, np.uint8)[offset:]
    assert digest_blocks(data, [0], len(content)).tolist() == [xxhash.xxh3_64_intdigest(content)]


@pytest.mark.parametrize("nbytes", [100, 1000])
@pytest.mark.parametrize(
    ("theirs", "mine"), [([3], [0]), ([0, 1], [0, 3]), ([-1], [0]), ([0], [-1])]
)
def test_nothing_outside_is_touched(nbytes: int, theirs: list[int], mine: list[int]) -> None:
    source, target = noise(3 * nbytes), np.zeros(3 * nbytes, np.uint8)
    with pytest.raises(IndexError, match="outside"):
        copy_blocks(source, theirs, target, mine, nbytes)
    assert not target.any()
    with pytest.raises(IndexError, match="outside"):
        digest_blocks(source, [0, 3], nbytes)


def test_callers_mistakes_raise() -> None:
    data, target = noise(3000), np.zeros(3000, np.uint8)
    with pytest.raises(ValueError, match="2 blocks cannot go into 1"):
        copy_blocks(data, [0, 1], target, [0], 1000)
    target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_blocks(data, [0], target, [0], 1000)
    with pytest.raises(ValueError, match="contiguous"):
        digest_blocks(data[::2], [0], 1000)
