"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.router.stops import StopScanner


def run(pieces: list[str], stops: tuple[str, ...], include: bool = False) -> tuple[str, str | None]:
    """(all text that came out, the match)."""
    scanner = StopScanner(stops, include)
    out = ""
    for piece in pieces:
        free, match = scanner.feed(piece)
        out += free
        if match is not None:
            return out, match
    return out + scanner.flush(), None


@pytest.mark.parametrize("cut", range(len("one END two")))
def test_a_stop_is_found_however_the_text_is_cut(cut: int) -> None:
    text = "one END two"
    assert run([text[:cut], text[cut:]], ("END",)) == ("one ", "END")
    assert run([text[:cut], text[cut:]], ("END",), True) == ("one END", "END")


def test_nothing_of_a_stop_leaks_and_a_near_miss_is_released() -> None:
    scanner = StopScanner(("STOP",))
    assert scanner.feed("aST") == ("a", None)
    assert scanner.feed("O") == ("", None)
    assert scanner.feed("x") == ("STOx", None)
    assert scanner.feed("ST") == ("", None)
    assert scanner.flush() == "ST"


def test_only_what_may_become_a_stop_is_held() -> None:
    assert StopScanner(("a long stop string",)).feed("hello") == ("hello", None)


def test_without_stops_text_passes() -> None:
    assert run(["a", "b"], ()) == ("ab", None)


def test_the_one_that_is_complete_first_wins() -> None:
    assert run(list("xabcdy"), ("abcd", "bc")) == ("xa", "bc")
    assert run(["xabcdy"], ("abcd", "bc")) == ("xa", "bc")
    assert run(["xabcy"], ("bc", "abc")) == ("x", "abc")  # both end there: the longest


def test_overlapping_beginnings() -> None:
    assert run(list("aaab"), ("aab",)) == ("a", "aab")
    assert run(list("ababac"), ("abac",)) == ("ab", "abac")


def reference(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab☃", max_size=30),
    st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=4).map(tuple),
    st.booleans(),
    st.integers(),
)
def test_cuts_never_matter(text: str, stops: tuple[str, ...], include: bool, seed: int) -> None:
    rng = random.Random(seed)
    pieces, rest = [], text
    while rest:
        cut = rng.randint(1, 4)
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert run(pieces, stops, include) == reference(text, stops, include)
