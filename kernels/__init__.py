"""Functions from tensors to tensors, each with a plain-torch reference.

What stands here today is the reference, and also the CPU backend. No requests, no configuration and
no memory of their own: a function checks its arguments, computes, and returns.
"""

from pdserve.kernels.activation import gelu_and_mul, silu_and_mul
from pdserve.kernels.attention import attention_decode, attention_prefill
from pdserve.kernels.cache import gather_blocks, rope_and_store_kv, scatter_blocks, store_kv
from pdserve.kernels.checks import KernelError
from pdserve.kernels.norm import fused_add_rms_norm, rms_norm
from pdserve.kernels.rope import rope
from pdserve.kernels.sampling import (
    apply_bias,
    apply_penalties,
    greedy,
    log_probabilities,
    sample,
)

__all__ = [
    "KernelError",
    "apply_bias",
    "apply_penalties",
    "attention_decode",
    "attention_prefill",
    "fused_add_rms_norm",
    "gather_blocks",
    "gelu_and_mul",
    "greedy",
    "log_probabilities",
    "rms_norm",
    "rope",
    "rope_and_store_kv",
    "sample",
    "scatter_blocks",
    "silu_and_mul",
    "store_kv",
]
