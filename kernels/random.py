"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As
Easy as 1, 2, 3", doi:10.1145/2063384.2063405).

A number is a function of (seed, position, token id) and of nothing else: not of the batch, the
device, or the numbers drawn before. Words are unsigned 32-bit values held in int64 tensors; a
64-bit seed is held as the int64 with the same bits.
"""

from __future__ import annotations

import torch

from pdserve.kernels import checks

WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LARGEST = 1.0 - 2.0**-33
"""The largest uniform number: keeps -log1p(-u) finite."""

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Ten rounds of Philox on four counter words and two key words (broadcast together).

    Each round: (c0, c1, c2, c3) → (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0));
    then the key words grow by the Weyl constants.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two words wraps around in int64, but keeps its 64 bits; the arithmetic
        # shift's sign bits are cut off by the mask.
        product0, product1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product1 >> 32) & WORD) ^ c1 ^ k0
        c1 = product1 & WORD
        c2 = ((product0 >> 32) & WORD) ^ c3 ^ k1
        c3 = product0 & WORD
        k0, k1 = (k0 + _WEYL_0) & WORD, (k1 + _WEYL_1) & WORD
    return c0, c1, c2, c3


def token_words(
    seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """One 32-bit word for each (seed, position, token id): the three broadcast together, int64.

    Token v takes word v % 4 of the block with key = (low, high word of the seed) and counter =
    (v // 4, low word of the position, high word of the position, 0).
    """
    words = philox4x32(_counter(positions, token_ids >> 2), _key(seeds))
    which = token_ids & 3
    return torch.where(
        which < 2,
        torch.where(which == 0, words[0], words[1]),
        torch.where(which == 2, words[2], words[3]),
    )


def vocabulary_words(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`token_words` of all tokens 0 .. vocab_size - 1 at a quarter of the cost.

    seeds, positions: [R] int64. Returns [R, vocab_size] int64.
    """
    checks.shape("positions", positions, seeds.shape)
    blocks = torch.arange((vocab_size + 3) // 4, device=seeds.device)
    counter = _counter(positions.unsqueeze(1), blocks)
    words = torch.stack(philox4x32(counter, _key(seeds.unsqueeze(1))), dim=-1)
    return words.flatten(1)[:, :vocab_size]


def exponential(words: torch.Tensor) -> torch.Tensor:
    """Standard exponential variates from 32-bit words: -ln(1 - u), u = (word + ½) / 2³², float64.

    Small values, the ones that win a race, are exact to the last bit.
    """
    uniform = (words.double() + 0.5).mul_(2.0**-32).clamp_(max=_LARGEST)
    return uniform.neg_().log1p_().neg_()


def _key(seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    checks.dtype("seeds", seeds, (torch.int64,))
    return seeds & WORD, (seeds >> 32) & WORD


def _counter(positions: torch.Tensor, blocks: torch.Tensor) -> Words:
    checks.dtype("positions", positions, (torch.int64,))
    return blocks, positions & WORD, (positions >> 32) & WORD, torch.zeros_like(positions)
