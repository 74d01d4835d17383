"""Numbers on their way to a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdserve.engine.numbers import ALIGNED, packed, to_device


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_arrays_lie_one_after_the_other_and_begin_at_multiples(dtype: type) -> None:
    arrays = [
        np.arange(3, dtype=dtype),
        np.arange(6, dtype=dtype).reshape(2, 3) + 10,
        np.empty(0, dtype=dtype),
        np.arange(5, dtype=dtype) + 20,
    ]
    together, begins = packed(arrays)
    assert together.dtype == dtype
    for array, begin in zip(arrays, begins, strict=True):
        assert begin * array.itemsize % ALIGNED == 0
        assert (together[begin : begin + array.size] == array.ravel()).all()


def test_they_arrive_in_their_shapes() -> None:
    arrays = [np.arange(3), np.arange(6).reshape(2, 3)]
    here = to_device(arrays, "cpu")
    assert [tensor.tolist() for tensor in here] == [array.tolist() for array in arrays]
    assert here[0].data_ptr() == arrays[0].ctypes.data
    there = to_device(arrays, "meta")
    assert [tensor.shape for tensor in there] == [torch.Size([3]), torch.Size([2, 3])]
    assert all(tensor.device.type == "meta" and tensor.is_contiguous() for tensor in there)
