"""The counter-based generator: published vectors, and the mapping from tokens to words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pdserve.kernels.random import exponential, philox4x32, token_words, vocabulary_words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, philox4x32 with 10 rounds
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(int(word, 16)) for word in text.split())

    result = philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert [int(word) for word in result] == [int(word) for word in words(expected)]


def bits(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.array([seed], dtype=np.uint64).view(np.int64))


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("vocab", [1, 2, 7, 500, 4097])
def test_one_token_and_the_whole_vocabulary_agree(seed: int, vocab: int) -> None:
    positions = torch.tensor([5])
    words = vocabulary_words(bits(seed), positions, vocab)
    assert words.shape == (1, vocab)
    tokens = torch.arange(vocab)
    assert torch.equal(token_words(bits(seed), positions, tokens), words[0])
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32


def test_every_part_of_the_counter_and_the_key_counts() -> None:
    base = (0x0123456789ABCDEF, 5)
    others = [(base[0] ^ (1 << bit), 5) for bit in (0, 31, 32, 63)]
    others += [(base[0], 5 ^ (1 << bit)) for bit in (0, 31, 32)]
    streams = [
        tuple(vocabulary_words(bits(seed), torch.tensor([position]), 8)[0].tolist())
        for seed, position in [base, *others]
    ]
    assert len(set(streams)) == len(streams)


def test_words_are_the_published_ones_in_the_documented_order() -> None:
    words = vocabulary_words(torch.tensor([0]), torch.tensor([0]), 4)[0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_exponential_variates_are_finite_at_the_ends_and_exact_near_zero() -> None:
    ends = exponential(torch.tensor([0, 1, 2**32 - 1]))
    assert ends.isfinite().all()
    assert ends[0].item() == pytest.approx(2.0**-33, rel=1e-12)
    assert ends[1].item() == pytest.approx(1.5 * 2.0**-32, rel=1e-9)
    assert ends[2].item() == pytest.approx(33 * math.log(2), rel=1e-6)


def test_exponential_variates_have_their_distribution() -> None:
    words = vocabulary_words(torch.tensor([42]), torch.tensor([7]), 100_000)[0]
    times = exponential(words)
    assert times.mean().item() == pytest.approx(1.0, abs=0.02)
    assert times.var().item() == pytest.approx(1.0, abs=0.05)
    assert (times > 1).double().mean().item() == pytest.approx(math.exp(-1), abs=0.01)
