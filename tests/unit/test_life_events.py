"""What the moments of a leg say."""

from __future__ import annotations

import pytest

from pdserve.protocol.events import FETCH_STARTED, FETCHED, RESUMED, fetch_s


@pytest.mark.parametrize(
    ("at", "waited"),
    [
        ({}, None),
        ({FETCH_STARTED: 1.0}, None),
        ({FETCH_STARTED: 1.0, FETCHED: 1.5}, 0.5),
        ({FETCH_STARTED: 1.0, RESUMED: 3.0, FETCHED: 3.25}, 0.25),
        ({FETCH_STARTED: 1.0, FETCHED: 2.0, RESUMED: 3.0}, 0.0),
    ],
)
def test_a_fetch_that_began_early_counts_from_the_token(
    at: dict[str, float], waited: float | None
) -> None:
    assert fetch_s(at) == waited
