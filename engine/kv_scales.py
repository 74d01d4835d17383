"""The scales of a float8 KV cache: one number for K and one for V of each layer.

Checkpoints that were calibrated for such a cache carry them, under one of the names that vLLM
reads; without them they are 1, which suits most models, whose K and V stay below e4m3's 448.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from pdserve.engine import weights as loading
from pdserve.engine.config import ModelError

NAMES = (
    "self_attn.{kind}_scale",
    "self_attn.attn.{kind}_scale",
    "self_attn.{kind}_proj.{kind}_scale",
    "self_attn.{kind}_proj.output_scale",
)
"""Within a layer, `kind` "k" or "v"; the first one is what `engine.models.decoder` looks for."""


def scale_names(num_layers: int) -> frozenset[str]:
    """Every name that a checkpoint may use."""
    return frozenset(
        name for layer in range(num_layers) for kind in "kv" for name in _names(layer, kind)
    )


def read_scales(folder: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """The scales that the checkpoint in `folder` has, under the first of NAMES: float32 scalars.

    Raises ModelError for one that occurs twice, is not a single number, or is not positive."""
    found = loading.read_some(folder, scale_names(num_layers))
    scales = {}
    for layer in range(num_layers):
        for kind in "kv":
            names = _names(layer, kind)
            present = [name for name in names if name in found]
            if len(present) > 1:
                raise ModelError(
                    f"{folder}: the tensors {' and '.join(present)} both are the {kind.upper()} "
                    f"scale of layer {layer}; there can be one."
                )
            if present:
                scales[names[0]] = _number(folder, present[0], found)
    return scales


def _names(layer: int, kind: str) -> list[str]:
    return [f"model.layers.{layer}.{name.format(kind=kind)}" for name in NAMES]


def _number(folder: Path, name: str, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = found[name]
    if tensor.numel() != 1:
        raise ModelError(
            f"{folder}: the tensor {name} has the shape {list(tensor.shape)}; a KV cache has one "
            "scale for K and one for V of each layer."
        )
    scale = tensor.float().reshape(())
    if not 0 < scale.item() < math.inf:
        raise ModelError(f"{folder}: the scale {name} must be a positive number, not {scale}.")
    return scale
