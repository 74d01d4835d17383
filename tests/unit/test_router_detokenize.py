"""Incremental detokenizing: pieces joined are the text, whatever the tokens."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pdserve.cluster.model_files import DEMO_MODEL
from pdserve.router.detokenize import MAX_PENDING, TokenText, byte_alphabet
from pdserve.router.tokenizer import TextTokenizer, load_tokenizer

ALPHABETS = (
    "abcdefghij klmno. ,\n\t",
    "äöüßéñ çøå",
    "漢字かなカナ한국어",
    "👍🏽👩‍👩‍👧🇩🇪☃️e\u0301",
    "0123456789+-=<|im_end|>",
)


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def sentencepiece_like() -> TokenText:
    """A tokenizer in the manner of Llama 2: ▁ for blanks, <0x..> for bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "!"]
    core = Tokenizer(
        models.BPE(
            {word: place for place, word in enumerate(words)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens([AddedToken("<end>", special=True)])
    return TokenText(core, frozenset({core.token_to_id("<end>")}))


def texts(count: int) -> list[str]:
    rng = random.Random(7)
    found = []
    for _ in range(count):
        parts = rng.sample(ALPHABETS, rng.randint(1, 3))
        found.append("".join(rng.choice(rng.choice(parts)) for _ in range(rng.randint(0, 60))))
    return found


def pieces(
    tokens: TokenText, ids: list[int], skip: bool, prompt: tuple[int, ...] = ()
) -> list[str]:
    detokenizer = tokens.detokenizer(prompt, skip)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


def test_the_alphabet_is_gpt2s() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_thousand_random_texts_come_back(demo: TextTokenizer) -> None:
    for text in texts(1000):
        ids = demo.encode(text, False)
        assert "".join(pieces(demo.tokens, ids, False)) == text
        for skip in (False, True):
            expected = demo.core.decode(ids, skip_special_tokens=skip)
            assert "".join(pieces(demo.tokens, ids, skip)) == expected


def test_random_tokens_agree_with_the_library(demo: TextTokenizer) -> None:
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(demo.size) for _ in range(rng.randint(0, 40))]
        for skip in (False, True):
            expected = demo.core.decode(ids, skip_special_tokens=skip)
            assert "".join(pieces(demo.tokens, ids, skip)) == expected


def test_a_character_over_several_tokens_appears_once_and_whole(demo: TextTokenizer) -> None:
    ids = demo.encode("a☃b", False)
    assert len(ids) > 3, "the snowman must not be a token of the demo model"
    found = [piece for piece in pieces(demo.tokens, ids, True) if piece]
    assert found == ["a", "☃", "b"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end(demo: TextTokenizer) -> None:
    ids = demo.encode("a☃", False)[:-1]
    assert "".join(pieces(demo.tokens, ids, True)) == "a\ufffd"


def test_special_tokens_show_only_if_wanted(demo: TextTokenizer) -> None:
    ids = [*demo.encode("hi", False), demo.eos_id or 0]
    assert demo.tokens.text(ids, True) == "hi"
    assert demo.tokens.text(ids, False) == "hi<|im_end|>"


def test_unknown_ids_are_nothing(demo: TextTokenizer) -> None:
    assert demo.tokens.text([10**9, *demo.encode("x", False)], True) == "x"


def test_window_keeps_blanks_after_the_prompt(sentencepiece_like: TokenText) -> None:
    core = sentencepiece_like.core
    hello, world = core.token_to_id("▁hello"), core.token_to_id("▁world")
    assert pieces(sentencepiece_like, [world], True, (hello,)) == [" world", ""]
    assert pieces(sentencepiece_like, [hello, world], True) == ["hello", " world", ""]


def test_window_holds_bytes_until_the_character_is_whole(sentencepiece_like: TokenText) -> None:
    core = sentencepiece_like.core
    ids = [core.token_to_id(f"<0x{byte:02X}>") for byte in "☃".encode()]
    ids.append(core.token_to_id("!"))
    assert pieces(sentencepiece_like, ids, True, (core.token_to_id("▁hello"),)) == [
        "",
        "",
        "☃",
        "!",
        "",
    ]


def test_window_agrees_with_the_library(sentencepiece_like: TokenText) -> None:
    core, rng = sentencepiece_like.core, random.Random(3)
    end = core.token_to_id("<end>")
    options = [core.token_to_id(word) for word in ("▁hello", "▁world", "!", "▁")]
    letters = [[core.token_to_id(f"<0x{b:02X}>") for b in c.encode()] for c in "é☃漢👍"]
    for _ in range(200):
        ids: list[int] = []
        for _ in range(rng.randint(0, 20)):
            ids += rng.choice([[rng.choice(options)], rng.choice(letters), [end]])
        for skip in (False, True):
            expected = core.decode(ids, skip_special_tokens=skip)
            assert "".join(pieces(sentencepiece_like, ids, skip)) == expected


def test_window_stays_small_whatever_comes(sentencepiece_like: TokenText) -> None:
    """Bytes that never make a character, or nothing but special tokens, are not held for ever."""
    core = sentencepiece_like.core
    for token in ("<0x80>", "<end>"):
        detokenizer = sentencepiece_like.detokenizer((), True)
        silent = longest = 0
        for _ in range(100):
            silent = 0 if detokenizer.add(core.token_to_id(token)) else silent + 1
            longest = max(longest, silent)
            assert len(detokenizer._tokens) <= 2 * (MAX_PENDING + 2)
        if token == "<0x80>":
            assert longest <= MAX_PENDING
