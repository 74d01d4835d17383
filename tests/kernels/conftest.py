"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pdserve.kernels import dispatch


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, so that a kernel that forgets its tail fails."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoning(*args: Any, original: Any = original, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

        monkeypatch.setattr(torch, name, poisoning)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything by Triton, in its interpreter."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1.")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in the interpreter whose rows know nothing of each other, as a GPU's do. Numpy's are
    its BLAS', which on some processors rounds a row by its place in the matrix."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    library = interpreter.InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
            return library(builder, a, b, d, *rest)
        left, right = (part.data.astype(d.data.dtype) for part in (a, b))
        total = np.zeros_like(d.data)
        for k in range(left.shape[-1]):
            total += left[..., :, k : k + 1] * right[..., k : k + 1, :]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=["reference", "triton"])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Each way that there is here; Triton in its interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    monkeypatch.setenv(dispatch.ENVIRONMENT, request.param)
    dispatch.forget()
    yield request.param
    dispatch.forget()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share the machine: threads that wait for one another would only spin."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
