"""Functions from tensors to tensors, each with a plain-torch reference.

The reference is the specification and the CPU backend; on CUDA devices Triton computes the same
(`pdserve.kernels.dispatch` decides, once). No requests, no configuration and
no memory of their own: a function checks its arguments, computes, and returns.
"""

from pdserve.kernels.activation import GATES, gelu_and_mul, silu_and_mul
from pdserve.kernels.attention import attention_decode, attention_prefill
from pdserve.kernels.blocks import gather_blocks, scatter_blocks
from pdserve.kernels.cache import rope_and_store_kv, store_kv
from pdserve.kernels.checks import KernelError
from pdserve.kernels.dispatch import records
from pdserve.kernels.experts import ExpertWeights, expert_weights, mixture, route
from pdserve.kernels.linear import linear
from pdserve.kernels.logits import logits
from pdserve.kernels.native_layers import ChunkStep, DecodeStep, LayerTensors
from pdserve.kernels.norm import fused_add_rms_norm, rms_norm
from pdserve.kernels.quantized import compile_products, dequantize, quantized_linear
from pdserve.kernels.quantized_weight import QuantizedWeight, quantize, sort_groups
from pdserve.kernels.rope import rope
from pdserve.kernels.sampling import (
    apply_bias,
    apply_bitmask,
    apply_penalties,
    greedy,
    log_probabilities,
    sample,
)
from pdserve.kernels.sums import copy_blocks_summed, sum_blocks

__all__ = [
    "GATES",
    "ChunkStep",
    "DecodeStep",
    "ExpertWeights",
    "KernelError",
    "LayerTensors",
    "QuantizedWeight",
    "apply_bias",
    "apply_bitmask",
    "apply_penalties",
    "attention_decode",
    "copy_blocks_summed",
    "sum_blocks",
    "attention_prefill",
    "compile_products",
    "dequantize",
    "expert_weights",
    "fused_add_rms_norm",
    "gather_blocks",
    "gelu_and_mul",
    "greedy",
    "linear",
    "log_probabilities",
    "logits",
    "mixture",
    "quantize",
    "quantized_linear",
    "records",
    "rms_norm",
    "rope",
    "rope_and_store_kv",
    "route",
    "sample",
    "scatter_blocks",
    "silu_and_mul",
    "sort_groups",
    "store_kv",
]
