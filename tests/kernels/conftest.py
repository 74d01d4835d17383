"""Fixtures of the kernel tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, so that a kernel that forgets its tail fails."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoning(*args: Any, original: Any = original, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

        monkeypatch.setattr(torch, name, poisoning)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share the machine: threads that wait for one another would only spin."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
