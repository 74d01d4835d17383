"""Whole decoder layers on the CPU in C: a step of single tokens, or of prompts' chunks beside them.

The weights stay where they lie; see native.h for how the C code reads them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pdserve.kernels.checks import KernelError
from pdserve.kernels.native import (
    MOST_DIM,
    MOST_GROUP,
    MOST_TOKENS,
    OUT_OF_RANGE,
    Chunks,
    Layer,
    Matrix,
    Step,
    attention_of,
    required,
    serves,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """One decoder layer. Products are (weight [out, in], bias [out] or None)."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    """Of each query and key head, before the rotation."""
    query: tuple[torch.Tensor, torch.Tensor | None]
    key: tuple[torch.Tensor, torch.Tensor | None]
    value: tuple[torch.Tensor, torch.Tensor | None]
    output: tuple[torch.Tensor, torch.Tensor | None]
    gate: tuple[torch.Tensor, torch.Tensor | None]
    up: tuple[torch.Tensor, torch.Tensor | None]
    down: tuple[torch.Tensor, torch.Tensor | None]
    window: int | None


class _Layers:
    """The layers as the C code sees them, and the tensors that this points into."""

    def __init__(
        self, layers: Sequence[LayerTensors], cos: torch.Tensor, sin: torch.Tensor, eps: float
    ) -> None:
        self._tensors = (list(layers), cos.contiguous(), sin.contiguous())
        self.array = (Layer * len(layers))(*(_layer(layer) for layer in layers))
        self.dim = 2 * cos.shape[1]
        self.scale: float = self.dim**-0.5
        self.heads = layers[0].query[0].shape[0] // self.dim
        self.dtype = layers[0].attention_norm.dtype
        self._shape: dict[str, Any] = {
            "hidden_size": layers[0].attention_norm.shape[0],
            "inner_size": layers[0].gate[0].shape[0],
            "num_layers": len(layers),
            "eps": eps,
            "cos": self._tensors[1].data_ptr(),
            "sin": self._tensors[2].data_ptr(),
            "num_positions": cos.shape[0],
        }

    def step(
        self,
        hidden: torch.Tensor,
        cache: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> Step:
        """Points into the tensors, which must outlive it. Raises KernelError."""
        for numbers in (positions, slots, context_lens, block_table):
            check_numbers(numbers)
        if not hidden.is_contiguous() or hidden.dtype != self.dtype or cache.dtype != self.dtype:
            raise KernelError(
                f"hidden must be contiguous and {self.dtype}, the cache {self.dtype}. Given: "
                f"{hidden.dtype} with strides {hidden.stride()}, {cache.dtype}."
            )
        shape = attention_of(cache, self.heads, context_lens, block_table, self.scale, None)
        return Step(
            attention=shape,
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            hidden=hidden.data_ptr(),
            **self._shape,
        )


def check_numbers(numbers: torch.Tensor) -> None:
    if numbers.dtype != torch.int64 or not numbers.is_contiguous():
        raise KernelError(
            f"Positions, slots, lengths and blocks must be contiguous int64. Given: "
            f"{numbers.dtype} with strides {numbers.stride()}."
        )


class DecodeStep:
    """One token of each of at most MOST_TOKENS sequences, through all layers in one call:

        x += output(attention(rope(norm(query, key)), value)) of norm(x)
        x += down(silu(gate) · up) of norm(x)

    with `rms_norm`, `rope_and_store_kv`, `attention_decode` and `silu_and_mul` as in this package,
    rounded to the dtype where these store their results.
    """

    MOST_TOKENS = MOST_TOKENS

    def __init__(
        self, layers: Sequence[LayerTensors], *, cos: torch.Tensor, sin: torch.Tensor, eps: float
    ) -> None:
        """cos, sin: [P, D / 2] float32, the rope table. See `fits` for what is possible."""
        self._library = required()
        self._layers = _Layers(layers, cos, sin, eps)

    @staticmethod
    def fits(layers: Sequence[LayerTensors], dim: int) -> bool:
        """Whether this machine and the C code can do it for such a model."""
        if not layers or not serves(layers[0].attention_norm):
            return False
        group = layers[0].query[0].shape[0] // layers[0].key[0].shape[0]
        return dim % 2 == 0 and dim <= MOST_DIM and group <= MOST_GROUP

    def __call__(
        self,
        hidden: torch.Tensor,
        caches: Sequence[torch.Tensor],
        *,
        positions: torch.Tensor,
        slots: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> None:
        """hidden: [T, E] embeddings, contiguous, replaced by what the last layer leaves; caches:
        one [N, 2, S, H, D] per layer, where K and V are stored at `slots`; positions, slots,
        context_lens: [T] int64, block_table: [T, M] int64, contiguous. No slot twice; padding
        has a negative slot and the length 0."""
        layers = self._layers
        if hidden.shape[0] > MOST_TOKENS:
            raise KernelError(f"DecodeStep takes {MOST_TOKENS} tokens, not {hidden.shape[0]}.")
        for layer, cache in zip(layers.array, caches, strict=True):
            layer.cache = cache.data_ptr()
        step = layers.step(hidden, caches[0], positions, slots, context_lens, block_table)
        done = self._library.pdserve_decode(
            layers.dtype is torch.bfloat16,
            ctypes.byref(step),
            layers.array,
            torch.get_num_threads(),
        )
        if not done:
            raise KernelError(OUT_OF_RANGE)


class ChunkStep:
    """Chunks of prompts and single tokens, layer by layer: the same as `DecodeStep` for any number
    of tokens, in bfloat16 on processors with instructions for it.

    A token's result depends on the chunk of its sequence and never on the batch or the threads. It
    may have other last bits than from `DecodeStep`, which sums in another order.
    """

    def __init__(
        self, layers: Sequence[LayerTensors], *, cos: torch.Tensor, sin: torch.Tensor, eps: float
    ) -> None:
        """cos, sin: [P, D / 2] float32, the rope table. See `fits` for what is possible."""
        self._library = required()
        self._layers = _Layers(layers, cos, sin, eps)

    @staticmethod
    def fits(layers: Sequence[LayerTensors], dim: int) -> bool:
        """Whether this machine and the C code can do it for such a model."""
        if not DecodeStep.fits(layers, dim) or layers[0].attention_norm.dtype != torch.bfloat16:
            return False
        group = layers[0].query[0].shape[0] // layers[0].key[0].shape[0]
        sizes = layers[0].attention_norm.shape[0], layers[0].gate[0].shape[0]
        loaded = required()
        return bool(loaded.pdserve_prefills(dim, group) and loaded.pdserve_chunkable(*sizes))

    def begin(
        self,
        hidden: torch.Tensor,
        cache: torch.Tensor,
        *,
        positions: torch.Tensor,
        slots: torch.Tensor,
        query_start: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        singles: int,
    ) -> Callable[[int, torch.Tensor], None]:
        """hidden: [T, E] embeddings, contiguous; cache: any layer's [N, 2, S, H, D]; positions,
        slots: [T] int64; query_start: [B + 1], context_lens: [B], block_table: [B, M] int64, all
        contiguous; the first `singles` sequences have one token each. No slot twice.

        Returns what computes layer n with its cache: K and V are stored at `slots`, `hidden` is
        replaced."""
        layers = self._layers
        check_numbers(query_start)
        if query_start.shape[0] != context_lens.shape[0] + 1:
            raise KernelError(
                f"query_start has {query_start.shape[0]} numbers for {context_lens.shape[0]} "
                "sequences; there is one more than those."
            )
        tensors = (hidden, positions, slots, query_start, context_lens, block_table)
        query, mixed = torch.empty(
            (2, hidden.shape[0], layers.heads * layers.dim), dtype=hidden.dtype
        )
        chunks = Chunks(
            layers.step(hidden, cache, positions, slots, context_lens, block_table),
            query_start.data_ptr(),
            hidden.shape[0],
            singles,
            query.data_ptr(),
            mixed.data_ptr(),
        )

        def compute(index: int, cache: torch.Tensor, kept: Any = (tensors, query, mixed)) -> None:
            layer = layers.array[index]
            layer.cache = cache.data_ptr()
            done = self._library.pdserve_chunks(
                ctypes.byref(chunks), ctypes.byref(layer), torch.get_num_threads()
            )
            if not done:
                raise KernelError(OUT_OF_RANGE)

        return compute


def _layer(tensors: LayerTensors) -> Layer:
    def matrix(product: tuple[torch.Tensor, torch.Tensor | None]) -> Matrix:
        weight, bias = product
        return Matrix(_address(weight), None if bias is None else _address(bias), weight.shape[0])

    norms = tensors.head_norms
    return Layer(
        _address(tensors.attention_norm),
        _address(tensors.mlp_norm),
        None if norms is None else _address(norms[0]),
        None if norms is None else _address(norms[1]),
        *(matrix(item) for item in (tensors.query, tensors.key, tensors.value, tensors.output)),
        *(matrix(item) for item in (tensors.gate, tensors.up, tensors.down)),
        None,
        tensors.window or 0,
    )


def _address(tensor: torch.Tensor) -> int:
    if not tensor.is_contiguous():
        raise KernelError("Weights must be contiguous.")
    return tensor.data_ptr()
