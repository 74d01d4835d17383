"""Triton's thresholds and races where they are hard: the kept sets of the reference, and keys whose
errors stay within what the race allows for. In the interpreter, with small chunks and tiles."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve import kernels
from pdserve.kernels import configs, dispatch, random, sampling

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_filters = pytest.importorskip("pdserve.kernels.triton_filters")
triton_sampling = pytest.importorskip("pdserve.kernels.triton_sampling")

pytestmark = pytest.mark.usefixtures("interpreted")

VOCAB = 2000


def logits_of(kind: str) -> torch.Tensor:
    """[VOCAB] on few levels, so that rounded sums decide nothing."""
    levels = (torch.randn(VOCAB) * 2).round()
    if kind == "equal":
        return torch.zeros(VOCAB)
    if kind == "mostly forbidden":
        levels[torch.randperm(VOCAB)[: VOCAB * 9 // 10]] = -math.inf
    if kind == "three":
        levels[torch.randperm(VOCAB)[3:]] = -math.inf
    if kind == "clustered":
        levels = levels.clamp(max=0)
        levels[128:192] = 3.0 + torch.arange(64) % 5
    if kind == "peak":
        levels[777] = 30.0
    return levels


FILTERS = [
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (64, 1.0, 0.0),
    (300, 1.0, 0.0),
    (VOCAB - 1, 1.0, 0.0),
    (0, 1e-6, 0.0),
    (0, 0.5, 0.0),
    (0, 0.9, 0.0),
    (0, 0.9999, 0.0),
    (50, 0.9, 0.01),
    (0, 1.0, 0.05),
]
"""top_k, top_p, min_p."""


@pytest.mark.parametrize(
    "kind", ["levels", "equal", "mostly forbidden", "three", "clustered", "peak"]
)
def test_the_kept_set_is_the_references(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_filters, "TILE", 256)
    monkeypatch.setattr(triton_filters, "WIDER", 3)
    logits = logits_of(kind).expand(len(FILTERS), -1)
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*FILTERS, strict=True))
    temperature = torch.full((len(FILTERS),), 0.8)
    least, tops = triton_filters.thresholds(logits, temperature, top_k, top_p, min_p, 512, 4)
    scores = logits / temperature.unsqueeze(1)
    expected = sampling._thresholds(scores, top_k, top_p, min_p)
    possible = scores > -math.inf
    kept = (scores >= least.unsqueeze(1)) & possible
    assert torch.equal(kept, (scores >= expected.unsqueeze(1)) & possible)
    assert torch.equal(tops[:, 0], scores[:, :512].amax(1))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_winners_are_those_of_the_reference_whatever_the_chunks(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(configs.TABLE, "sample", ({"CHUNK": 64, "num_warps": 4},))
    rows, vocab = 8, 700
    logits = torch.randn(rows, vocab) * scale
    logits[1] = -math.inf
    logits[2, [300, 650]] = math.inf
    logits[3, 5:] = -math.inf
    arguments = {
        "temperature": torch.tensor([0.01, 1.0] * 4),
        "top_k": torch.zeros(rows, dtype=torch.int64),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "seeds": torch.arange(rows) * 2**40,
        "positions": torch.arange(rows),
    }
    drawn = kernels.sample(logits, **arguments)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    dispatch.forget()
    assert drawn.tolist() == kernels.sample(logits, **arguments).tolist()


def test_a_race_that_is_near_is_decided_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens of different chunks whose keys differ by less than float32 tells apart."""
    monkeypatch.setitem(configs.TABLE, "sample", ({"CHUNK": 64, "num_warps": 4},))
    seeds, positions = torch.arange(6), torch.full((6,), 3)
    delays = random.exponential(random.vocabulary_words(seeds, positions, 256)).log()
    logits = torch.full((6, 256), -math.inf)
    logits[:, 10] = 1000.0
    logits[:, 200] = (1000.0 - delays[:, 10] + delays[:, 200]).float()
    keys = logits.double() - delays
    assert (keys[:, 10] - keys[:, 200]).abs().max() < 1e-4
    one, none = torch.ones(6), torch.zeros(6)
    drawn = kernels.sample(
        logits,
        temperature=one,
        top_k=none.long(),
        top_p=one,
        min_p=none,
        seeds=seeds,
        positions=positions,
    )
    assert torch.equal(drawn, keys.argmax(1))
    assert len(set(drawn.tolist())) == 2


@triton.jit
def exponential_kernel(word_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, SIZE)
    word = tl.load(word_ptr + place).to(tl.uint32)
    tl.store(out_ptr + place, triton_sampling.near_exponential(word))


def test_near_exponentials_are_near() -> None:
    edge = 2**32 // 16
    words = torch.cat(
        [
            torch.tensor([0, 1, 2, 2**32 - 1, 2**32 - 2, edge - 1, edge, edge + 1, 2**31]),
            (2.0 ** (torch.rand(1000) * 32)).long().clamp(max=2**32 - 1),
            2**32 - 1 - (2.0 ** (torch.rand(1000) * 32)).long().clamp(max=2**32 - 1),
            torch.randint(2**32, (2087,)),
        ]
    )
    near = torch.empty(4096)
    exponential_kernel[(1,)](words, near, SIZE=4096)
    exact = random.exponential(words)
    assert ((near.double() - exact) / exact).abs().max() < 1e-5
