"""Which implementation of an operation runs: decided once per process, logged once.

A public function checks its arguments, asks `implementation`, and calls what it gets, or goes on
with its own plain-torch reference for None. On the CPU that is always the reference, and neither
Triton nor CuPy is imported. On a CUDA device it is Triton, or CUDA C++ compiled through CuPy where
there is only that or where a measurement at the start preferred it (`settle`), and the reference
for element types that the GPU is too old for. `PDSERVE_KERNELS` overrides: a word for everything,
or comma-separated operation=word pairs, or both, the later ones winning:

    PDSERVE_KERNELS=reference
    PDSERVE_KERNELS=triton,attention_decode=reference,gather_blocks=cuda

"triton" for tensors of the CPU needs Triton's interpreter (TRITON_INTERPRET=1): slow, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from pdserve.kernels.checks import KernelError

log = logging.getLogger(__name__)

ENVIRONMENT = "PDSERVE_KERNELS"
WORDS = ("reference", "triton", "cuda")
MODULES: dict[str, dict[str, str]] = {
    "rms_norm": {"triton": "triton_norm"},
    "fused_add_rms_norm": {"triton": "triton_norm"},
    "silu_and_mul": {"triton": "triton_activation"},
    "gelu_and_mul": {"triton": "triton_activation"},
    "linear": {"triton": "triton_matmul"},
    "route": {"triton": "triton_experts"},
    "mixture": {"triton": "triton_experts"},
    "rope": {"triton": "triton_cache"},
    "store_kv": {"triton": "triton_cache"},
    "rope_and_store_kv": {"triton": "triton_cache"},
    "attention_prefill": {"triton": "triton_prefill"},
    "attention_decode": {"triton": "triton_decode"},
    "gather_blocks": {"triton": "triton_blocks", "cuda": "cuda_blocks"},
    "scatter_blocks": {"triton": "triton_blocks", "cuda": "cuda_blocks"},
    "pack_blocks": {"triton": "triton_wire"},
    "unpack_blocks": {"triton": "triton_wire"},
    "sum_blocks": {"triton": "triton_sums"},
    "copy_blocks_summed": {"triton": "triton_sums"},
    "apply_penalties": {"triton": "triton_sampling"},
    "apply_bitmask": {"triton": "triton_sampling"},
    "sample": {"triton": "triton_sampling"},
    "log_probabilities": {"triton": "triton_sampling"},
    "quantized_linear": {"triton": "triton_quantized"},
    "dequantize": {"triton": "triton_quantized"},
}
"""Operation → word → module of this package that holds a function of the operation's name; the
first word is the one that runs unless something says otherwise."""
ASKING = ("store_kv", "rope_and_store_kv", "attention_prefill", "attention_decode", "mixture")
"""Operations of a decode step whose references ask the host for numbers."""
MINIMUM_CAPABILITY = (8, 0)
"""Below it (before Ampere) there is no bfloat16 arithmetic and the references run."""
CAPABILITIES = {torch.float8_e4m3fn: (8, 9)}
"""Element types that need a newer GPU than that."""


def implementation(operation: str, *tensors: torch.Tensor) -> Callable[..., Any] | None:
    """The function that computes `operation` where `tensors` lie; None: the reference.

    tensors: those whose element types matter, all on one device."""
    dtypes = frozenset(tensor.dtype for tensor in tensors if tensor.dtype in CAPABILITIES)
    return _resolved(operation, tensors[0].device.type, dtypes)


def choices(device: str) -> Mapping[str, str]:
    """Operation → word for tensors on `device` ("cpu", "cuda"). Raises KernelError for an override
    that names what does not exist or cannot run here."""
    return MappingProxyType(_chosen(device))


def settle(operation: str, word: str) -> bool:
    """Let `word` compute `operation` on CUDA from now on, because it was measured to be faster;
    for the start of a process. False, and nothing changes, where PDSERVE_KERNELS has a say or the
    word's compiler is not installed."""
    if word not in MODULES[operation]:
        raise KernelError(f"{operation} has no implementation {word!r}.")
    if operation in _override(os.environ.get(ENVIRONMENT, "")) or not _is_installed(word):
        return False
    _chosen("cuda")[operation] = word
    _resolved.cache_clear()
    return True


def candidates() -> str:
    """What a measurement may choose among, as a text: the override, and whether CuPy is there."""
    return f"{os.environ.get(ENVIRONMENT, '')}; {'cuda' * _is_installed('cuda')}"


def records(device: str, cache: torch.dtype) -> bool:
    """Whether a decode step on `device`, with a KV cache of that type, can be recorded as a CUDA
    graph."""
    if device != "cuda" or torch.cuda.get_device_capability() < CAPABILITIES.get(cache, (0, 0)):
        return False
    return all(choices(device)[name] != "reference" for name in ASKING)


def forget() -> None:
    """Decide again at the next call: for tests that change the environment."""
    _chosen.cache_clear()
    _resolved.cache_clear()


@functools.cache
def _chosen(device: str) -> dict[str, str]:
    if device == "cuda" and torch.cuda.get_device_capability() >= MINIMUM_CAPABILITY:
        chosen = {
            name: next(filter(_is_installed, words), "reference") for name, words in MODULES.items()
        }
        where = "cuda, {}, sm_{}{}".format(
            torch.cuda.get_device_name(), *torch.cuda.get_device_capability()
        )
    else:
        chosen, where = dict.fromkeys(MODULES, "reference"), device
    override = _override(os.environ.get(ENVIRONMENT, ""))
    _check_override(override, device)
    chosen |= override
    words = sorted(set(chosen.values()))
    summary = "; ".join(
        f"{word}: {', '.join(name for name in chosen if chosen[name] == word)}" for word in words
    )
    log.info("kernels on %s: %s", where, words[0] if len(words) == 1 else summary)
    return chosen


@functools.cache
def _resolved(
    operation: str, device: str, dtypes: frozenset[torch.dtype]
) -> Callable[..., Any] | None:
    word = _chosen(device)[operation]
    if word == "reference":
        return None
    for dtype in dtypes:
        if device == "cuda" and torch.cuda.get_device_capability() < CAPABILITIES[dtype]:
            log.info(
                "%s of %s runs as its reference: this GPU is below sm_%d%d",
                operation,
                str(dtype)[6:],
                *CAPABILITIES[dtype],
            )
            return None
    module = importlib.import_module(f"pdserve.kernels.{MODULES[operation][word]}")
    function: Callable[..., Any] = getattr(module, operation)
    return function


def _is_installed(word: str) -> bool:
    return importlib.util.find_spec("triton" if word == "triton" else "cupy") is not None


def _override(text: str) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        operation, equals, word = item.partition("=")
        if not equals:
            operation, word = "", item
        if operation and operation not in MODULES:
            raise KernelError(
                f"{ENVIRONMENT} names the operation {operation!r}; known: {', '.join(MODULES)}."
            )
        if word not in WORDS:
            raise KernelError(
                f"{ENVIRONMENT} asks for {word!r}; known implementations: {', '.join(WORDS)}."
            )
        if operation and word != "reference" and word not in MODULES[operation]:
            raise KernelError(
                f"{ENVIRONMENT}: {operation} has no implementation {word!r}; it has reference, "
                f"{', '.join(MODULES[operation])}."
            )
        # A word for everything means: wherever there is such an implementation.
        for name in [operation] if operation else MODULES:
            if word == "reference" or word in MODULES[name]:
                chosen[name] = word
    return chosen


def _check_override(override: Mapping[str, str], device: str) -> None:
    for operation, word in override.items():
        asked = f"{ENVIRONMENT} asks for {operation}={word}, but"
        if word != "reference" and not _is_installed(word):
            raise KernelError(
                f"{asked} {'Triton' if word == 'triton' else 'CuPy'} is not installed: install "
                "it, or ask for another implementation."
            )
        if device == "cpu" and word == "cuda":
            raise KernelError(f"{asked} the tensors are on the CPU: use reference.")
        if device == "cpu" and word == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            raise KernelError(
                f"{asked} the tensors are on the CPU: use reference, or triton with "
                "TRITON_INTERPRET=1 (slow, for tests)."
            )
