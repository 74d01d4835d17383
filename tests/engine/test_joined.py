"""Products of one input made as one, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import Stepper

from pdserve.engine.build import Built
from pdserve.engine.models import linear
from pdserve.engine.models.linear import Joined, Linear

MakeModel = Callable[..., Path]
Build = Callable[..., Built]


def layers(bias: bool) -> list[Linear]:
    rows = (7, 3, 12)
    return [
        Linear(torch.randn(count, 5), torch.randn(count) if bias else None, False) for count in rows
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_make_the_same(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, x = layers(bias), torch.randn(4, 5)
    apart = Joined(parts)
    assert apart.whole is None
    expected = apart(x)
    monkeypatch.setattr(linear, "JOINED_ON", ("cpu",))
    held = [part.weight for part in parts]
    together = Joined(parts)
    assert together.whole is not None
    for mine, other in zip(together(x), expected, strict=True):
        torch.testing.assert_close(mine, other)
    (whole, _), first = together.whole, parts[0].weight
    assert isinstance(whole.weight, torch.Tensor) and isinstance(first, torch.Tensor)
    assert first is held[0]
    assert first.data_ptr() == whole.weight.data_ptr()  # nothing is held twice
    assert len({one.untyped_storage().data_ptr() for one in held}) == 1  # type: ignore[union-attr]


def test_layers_of_which_some_have_biases_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "JOINED_ON", ("cpu",))
    assert Joined([*layers(False), *layers(True)]).whole is None


@pytest.mark.parametrize(
    ("arch", "options"),
    [("qwen2", {}), ("qwen3", {}), ("qwen3", {"batch_invariant": True}), ("qwen3moe", {})],
    ids=str,
)
def test_a_joined_model_says_the_same(
    arch: str,
    options: dict[str, Any],
    make_model: MakeModel,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers() -> list[list[int]]:
        built = build(make_model(arch), **options)
        monkeypatch.setattr(built.runner._decoder, "decode", None)
        stepper = Stepper(built)
        return stepper.run([stepper.add(list(range(5, 5 + n))) for n in (1, 20, 33)], 8, budget=9)

    expected = answers()
    monkeypatch.setattr(linear, "JOINED_ON", ("cpu",))
    assert answers() == expected
