"""What a token is said to cost, against the weights themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from pdserve.engine.config import read_model_config
from pdserve.engine.estimate import token_flops
from pdserve.engine.models.checkpoint import EMBEDDING, OUTPUT, weight_specs


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3moe", "mixtral"])
def test_two_operations_for_each_weight(tmp_path: Path, architecture: str) -> None:
    make_checkpoint(tmp_path, architecture)
    model = read_model_config(tmp_path)
    specs = weight_specs(model)
    used = 0.0
    for name, spec in specs.items():
        matrix = len(spec.shapes[0]) == 2 and not name.endswith("gate.weight")  # routers are small
        if matrix and (name != EMBEDDING or OUTPUT not in specs):
            share = model.experts.active / model.experts.count if model.experts else 1
            used += math.prod(spec.shapes[0]) * (share if "experts" in name else 1)
    assert token_flops(model) == 2 * used
