"""Fixtures of the engine tests: small checkpoints, made once per session."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint

from pdserve.engine.build import Built, build_runner
from pdserve.engine.config import EngineConfig

MakeModel = Callable[..., Path]
Build = Callable[..., Built]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests share the machine: threads that wait for one another would only spin."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_checkpoint(arch, **options) into a folder that tests share and must not change."""
    made: dict[str, Path] = {}

    def make(arch: str, shape: str = "nano", **options: Any) -> Path:
        key = json.dumps([arch, shape, options], sort_keys=True)
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(arch), arch, shape, **options)
        return made[key]

    return make


@pytest.fixture
def build() -> Iterator[Build]:
    """build_runner with settings for small models; the pools are closed at the end."""
    opened: list[Built] = []

    def builder(folder: Path, **options: Any) -> Built:
        defaults: dict[str, Any] = {"num_blocks": 256, "max_model_len": 256, "dtype": "float32"}
        opened.append(build_runner(folder, EngineConfig(**{**defaults, **options})))
        return opened[-1]

    yield builder
    for built in opened:
        built.pool.close()
