"""What a fetch still misses, against a dict of the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pdserve.kv_transfer.missing import Missing, rising, units_of
from pdserve.kv_transfer.slices import units


@given(st.data())
def test_missing_is_what_did_not_arrive(data: st.DataObject) -> None:
    left = data.draw(st.dictionaries(st.integers(0, 50), st.integers(0, 99), max_size=20))
    left = dict(sorted(left.items()))
    missing = Missing(units_of(list(left)), units_of(list(left.values())))
    while left:
        some = data.draw(st.lists(st.sampled_from(list(left)), unique=True, min_size=1))
        arrived = units_of(sorted(some))
        assert missing.targets_of(arrived).tolist() == [left[unit] for unit in sorted(some)]
        missing.arrived(arrived)
        for unit in some:
            del left[unit]
        assert len(missing) == len(left)
        assert missing.units.tolist() == list(left)
        assert missing.targets.tolist() == list(left.values())


@given(st.lists(st.integers(-5, 5)))
def test_rising_is_strict(numbers: list[int]) -> None:
    assert rising(units_of(numbers)) == (numbers == sorted(set(numbers)))


def test_numbers_of_any_kind_and_their_slices() -> None:
    assert units_of(range(7, 1, -2)).tolist() == [7, 5, 3]
    assert units_of((4, 2)).tolist() == [4, 2]
    assert units_of([]).dtype == np.int64
    assert units(units_of([2, 5]), 3).tolist() == [6, 7, 8, 15, 16, 17]
    assert units(units_of([2, 5]), 1).tolist() == [2, 5]
