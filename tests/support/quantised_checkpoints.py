"""Quantised copies of a checkpoint, in the formats of the tools that write them, each with a twin
that holds in float32 what the quantised matrices stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import rewrite_config
from quantised_weights import Nibbles, packed_last
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor]
"""A layer's tensors by the last part of their names, and the matrix that they stand for."""
EXCLUDED = "model.layers.1.mlp.down_proj"
"""A layer that keeps its precision where the format can say so."""


def rounded(matrix: torch.Tensor, group: int, *, scattered: bool, symmetric: bool) -> Nibbles:
    """Round to four bits, each output and group on its own."""
    columns = matrix.shape[1]
    group_of = torch.arange(columns) // group
    if scattered:
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    scales, zeros = [], []
    for index in range(int(group_of.max()) + 1):
        part = matrix[:, group_of == index]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        if symmetric:
            high = part.abs().amax(1)
            low = -high
        scale = ((high - low) / 15).half()
        scales.append(scale)
        zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(0, 15)
        zeros.append(zero.long())
    scale, zero = torch.stack(scales), torch.stack(zeros)
    values = (matrix / scale[group_of].t()).round() + zero[group_of].t()
    return Nibbles(values.clamp(0, 15).long(), zero, scale, group, group_of)


def awq(matrix: torch.Tensor) -> Made:
    made = rounded(matrix, 16, scattered=False, symmetric=False)
    return made.awq(), made.matrix


def gptq(matrix: torch.Tensor, *, version: int = 1, scattered: bool = False) -> Made:
    made = rounded(matrix, 32, scattered=scattered, symmetric=False)
    return made.gptq(version), made.matrix


def packed(matrix: torch.Tensor, *, symmetric: bool, scattered: bool = False) -> Made:
    made = rounded(matrix, 32, scattered=scattered, symmetric=symmetric)
    tensors = {
        "weight_packed": packed_last(made.values),
        "weight_scale": made.scales.t().contiguous(),
        "weight_shape": torch.tensor(matrix.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed_last(made.zeros).t().contiguous()
    if scattered:
        tensors["weight_g_idx"] = made.group_of.int()
    return tensors, made.matrix


def eight(matrix: torch.Tensor, kind: str, *, whole: bool = False) -> Made:
    """whole: one scale for the tensor, not for each output."""
    largest = matrix.abs().amax() if whole else matrix.abs().amax(1, keepdim=True)
    scale = (largest / (127 if kind == "int8" else 448)).bfloat16()
    values = matrix / scale.float()
    values = values.round().char() if kind == "int8" else values.to(torch.float8_e4m3fn)
    tensors = {"weight": values, "weight_scale": scale.reshape(-1, 1) if not whole else scale}
    return tensors, values.double() * scale.double()


def blocks(matrix: torch.Tensor, rows: int = 24, columns: int = 32) -> Made:
    """One scale per block of e4m3."""
    scale = torch.zeros(-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns))
    spread = torch.zeros_like(matrix)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = matrix[place].abs().max() / 448
            spread[place] = scale[i, j]
    values = (matrix / spread).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scale}, values.double() * spread.double()


def compressed(kind: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {**group, **more}},
        "ignore": ["lm_head", f"re:.*{EXCLUDED[12:]}$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


PER_CHANNEL = {"num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
PER_GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": [EXCLUDED]}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Made]]] = {
    "awq": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 16,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [EXCLUDED],
        },
        awq,
    ),
    "gptq": (GPTQ, gptq),
    "gptq_v2 act-order": (
        {**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"},
        lambda matrix: gptq(matrix, version=2, scattered=True),
    ),
    "fp8 blocks": ({**FP8, "weight_block_size": [24, 32]}, blocks),
    "fp8 tensor": (FP8, lambda matrix: eight(matrix, "fp8", whole=True)),
    "int-quantized": (
        compressed("int-quantized", {**PER_CHANNEL, "type": "int"}),
        lambda matrix: eight(matrix, "int8"),
    ),
    "float-quantized": (
        compressed(
            "float-quantized",
            {**PER_CHANNEL, "type": "float"},
            input_activations={"num_bits": 8, "type": "float", "dynamic": True},
        ),
        lambda matrix: eight(matrix, "fp8"),
    ),
    "pack-quantized": (
        compressed("pack-quantized", {**PER_GROUP, "symmetric": True}),
        lambda matrix: packed(matrix, symmetric=True),
    ),
    "pack-quantized asymmetric act-order": (
        compressed("pack-quantized", {**PER_GROUP, "symmetric": False, "actorder": "group"}),
        lambda matrix: packed(matrix, symmetric=False, scattered=True),
    ),
}
"""quantization_config, and what makes of a matrix the tensors of that format."""


def quantise_checkpoint(folder: Path, out: Path, kind: str) -> tuple[Path, Path]:
    """Write the checkpoint in `folder` (one file) in the format `kind`, a key of FORMATS, and its
    twin. Returns both folders."""
    config, make = FORMATS[kind]
    excludes = EXCLUDED[12:] in json.dumps(config)
    quantised, twin = out / "quantised", out / "twin"
    for copy in (quantised, twin):
        shutil.copytree(folder, copy)
    rewrite_config(quantised, quantization_config=config)
    tensors = load_file(folder / "model.safetensors")
    dense = dict(tensors)
    for name in list(tensors):
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj") or (excludes and layer == EXCLUDED):
            continue
        parts, matrix = make(tensors.pop(name).float())
        tensors |= {f"{layer}.{part}": value for part, value in parts.items()}
        dense[name] = matrix.float()
    save_file(tensors, quantised / "model.safetensors")
    save_file(dense, twin / "model.safetensors")
    return quantised, twin
