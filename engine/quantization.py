"""How the linear layers of a checkpoint are stored in fewer bits: names, shapes and dtypes of the
tensors of each format, and what becomes of them.

All are weight-only here: activations keep the engine's dtype, also where a checkpoint was made for
8-bit activations. Schemes raise ValueError, a sentence, for layers that they cannot hold.

Legend: N rows (outputs) and K columns (inputs) of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from pdserve import kernels
from pdserve.engine.tensor_spec import TensorSpec

Parts = Mapping[str, torch.Tensor]
"""The tensors of one layer by the last part of their names, as they lie in the file."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32,)
WORD = 8
"""Values of four bits in an int32."""
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLoad:
    """Full precision in the checkpoint, rounded when it is loaded: one scale per output."""

    kind: Literal["int8", "fp8"]

    @property
    def format(self) -> str:
        return f"{self.kind}, rounded at load"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(((rows, columns),), FLOATS, 1)}

    def weight(self, parts: Parts, device: str) -> kernels.QuantizedWeight:
        return kernels.quantize(parts["weight"].to(device), self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBits:
    """int8 or e4m3 with a scale for the tensor, for each output, or for each block."""

    kind: Literal["int8", "fp8"]
    scale: str
    """The name of the scales."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale; None: a scale for the tensor or for each output."""
    format: str = "eight bits"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        if self.block is None:
            scales: tuple[tuple[int, ...], ...] = ((rows, 1), (rows,), (1,), ())
        else:
            scales = ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        return {
            "weight": TensorSpec(((rows, columns),), (EIGHT_BITS[self.kind],), 1),
            self.scale: TensorSpec(scales, FLOATS, 4),
        }

    def weight(self, parts: Parts, device: str) -> kernels.QuantizedWeight:
        values, scales = parts["weight"], parts[self.scale].float()
        rows, columns = values.shape
        if self.block is None:
            spread, group = scales.flatten().expand(rows).unsqueeze(0), columns
        else:
            spread = scales.repeat_interleave(self.block[0], dim=0)[:rows].t()
            group = self.block[1]
        return kernels.QuantizedWeight(
            packing="bytes",
            values=values.to(device),
            scales=spread.contiguous().to(device),
            group=group,
            columns=columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """AutoAWQ's version "gemm": int4 with zero points."""

    group: int
    """Inputs that share a scale; -1: all."""
    format: str = "awq"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        _check_words(rows=rows)
        groups = _groups(self.group, columns)
        return {
            "qweight": TensorSpec(((columns, rows // WORD),), INTS, 4),
            "qzeros": TensorSpec(((groups, rows // WORD),), INTS, 4),
            "scales": TensorSpec(((groups, rows),), FLOATS, 2),
        }

    def weight(self, parts: Parts, device: str) -> kernels.QuantizedWeight:
        columns = parts["qweight"].shape[0]
        return kernels.QuantizedWeight(
            packing="awq",
            values=parts["qweight"].to(device),
            zeros=parts["qzeros"].to(device),
            scales=parts["scales"].to(device),
            group=columns if self.group == -1 else self.group,
            columns=columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """AutoGPTQ's and GPTQModel's int4 with zero points, the inputs of a group anywhere."""

    group: int
    """Inputs that share a scale; -1: all."""
    zero_offset: int
    """1: the first format, whose stored zero points are one too small."""
    format: str = "gptq"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        _check_words(rows=rows, columns=columns)
        groups = _groups(self.group, columns)
        return {
            "qweight": TensorSpec(((columns // WORD, rows),), INTS, 4),
            "qzeros": TensorSpec(((groups, rows // WORD),), INTS, 4),
            "scales": TensorSpec(((groups, rows),), FLOATS, 2),
            "g_idx": TensorSpec(((columns,),), (torch.int32, torch.int64), 8),
            # AutoGPTQ adds one to each layer, of zeros where the model has none.
            "bias": TensorSpec(((rows,),), required=False),
        }

    def weight(self, parts: Parts, device: str) -> kernels.QuantizedWeight:
        columns = parts["g_idx"].shape[0]
        return _grouped(
            parts["qweight"],
            parts["qzeros"],
            parts["scales"],
            parts["g_idx"],
            columns if self.group == -1 else self.group,
            self.zero_offset,
            device,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """compressed-tensors' "pack-quantized": signed int4, stored plus 8."""

    group: int
    """Inputs that share a scale; -1: all."""
    symmetric: bool
    """There are no zero points."""
    ordered: bool
    """The inputs of a group lie anywhere (actorder "group")."""
    format: str = "pack-quantized"

    def tensors(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        _check_words(rows=rows, columns=columns)
        groups = _groups(self.group, columns)
        specs = {
            "weight_packed": TensorSpec(((rows, columns // WORD),), INTS, 4),
            "weight_scale": TensorSpec(((rows, groups),), FLOATS, 2),
            "weight_shape": TensorSpec(((2,),), (torch.int64, torch.int32), 8),
        }
        if not self.symmetric:
            specs["weight_zero_point"] = TensorSpec(((rows // WORD, groups),), INTS, 4)
        if self.ordered:
            specs["weight_g_idx"] = TensorSpec(((columns,),), (torch.int32, torch.int64), 8)
        return specs

    def weight(self, parts: Parts, device: str) -> kernels.QuantizedWeight:
        packed, scales = parts["weight_packed"], parts["weight_scale"].t()
        rows, columns = packed.shape[0], packed.shape[1] * WORD
        if parts["weight_shape"].tolist() != [rows, columns]:
            raise ValueError(
                f"weight_shape is {parts['weight_shape'].tolist()}, but weight_packed holds "
                f"{[rows, columns]}."
            )
        if self.symmetric:  # eight in every nibble
            zeros = torch.full((scales.shape[0], rows // WORD), -0x77777778, dtype=torch.int32)
        else:
            zeros = parts["weight_zero_point"].t()
        group = columns if self.group == -1 else self.group
        groups_of = parts["weight_g_idx"] if self.ordered else torch.arange(columns) // group
        return _grouped(packed.t(), zeros, scales, groups_of, group, 0, device)


Scheme = AtLoad | EightBits | Awq | Gptq | Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Which layers of a model are quantised, and how. The output layer never is."""

    scheme: Scheme
    excluded: tuple[str, ...] = ()
    """Names of layers, or of what they are part of ("lm_head", "model.layers.0.mlp"), that keep
    full precision; after "re:" a regular expression that the beginning of a name matches."""

    def covers(self, layer: str) -> bool:
        """Whether the layer of this name ("model.layers.0.mlp.up_proj") is quantised."""
        for pattern in self.excluded:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], layer):
                    return False
            elif f".{pattern}." in f".{layer}.":
                return False
        return True


def _grouped(
    values: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups_of: torch.Tensor,
    group: int,
    zero_offset: int,
    device: str,
) -> kernels.QuantizedWeight:
    """A weight in GPTQ's layout, the inputs of each group brought together."""
    values = values.contiguous().to(device)
    values, order = kernels.sort_groups(values, groups_of.to(device), group)
    return kernels.QuantizedWeight(
        packing="gptq",
        values=values,
        zeros=zeros.contiguous().to(device),
        scales=scales.contiguous().to(device),
        group=group,
        columns=groups_of.shape[0],
        zero_offset=zero_offset,
        order=order,
    )


def _groups(group: int, columns: int) -> int:
    return 1 if group == -1 else -(-columns // group)


def _check_words(**sizes: int) -> None:
    names = {"rows": "outputs", "columns": "inputs"}
    for key, size in sizes.items():
        if size % WORD:
            raise ValueError(f"int4 needs a multiple of {WORD} {names[key]}, not {size}.")
