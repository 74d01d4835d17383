"""Which implementation of an operation runs: decided once per process, logged once.

A public function checks its arguments, asks `implementation`, and calls what it gets, or goes on
with its own plain-torch reference for None. On the CPU that is always the reference, and Triton is
never imported; on a CUDA device it is Triton. `PDSERVE_KERNELS` overrides: a word for everything,
or comma-separated operation=word pairs, or both, the later ones winning:

    PDSERVE_KERNELS=reference
    PDSERVE_KERNELS=triton,attention_decode=reference

"triton" for tensors of the CPU needs Triton's interpreter (TRITON_INTERPRET=1): slow, for tests.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pdserve.kernels.checks import KernelError

log = logging.getLogger(__name__)

ENVIRONMENT = "PDSERVE_KERNELS"
WORDS = ("reference", "triton")
MODULES: dict[str, dict[str, str]] = {
    "rms_norm": {"triton": "triton_norm"},
    "fused_add_rms_norm": {"triton": "triton_norm"},
    "silu_and_mul": {"triton": "triton_activation"},
    "gelu_and_mul": {"triton": "triton_activation"},
    "rope": {"triton": "triton_cache"},
    "store_kv": {"triton": "triton_cache"},
    "rope_and_store_kv": {"triton": "triton_cache"},
    "attention_prefill": {"triton": "triton_prefill"},
    "attention_decode": {"triton": "triton_decode"},
    "gather_blocks": {"triton": "triton_blocks"},
    "scatter_blocks": {"triton": "triton_blocks"},
    "apply_penalties": {"triton": "triton_sampling"},
    "apply_bitmask": {"triton": "triton_sampling"},
    "sample": {"triton": "triton_sampling"},
    "log_probabilities": {"triton": "triton_sampling"},
}
"""Operation → word → module of this package that holds a function of the operation's name."""
MINIMUM_CAPABILITY = (8, 0)
"""Below it (before Ampere) there is no bfloat16 arithmetic and the references run."""


def implementation(operation: str, tensor: torch.Tensor) -> Callable[..., Any] | None:
    """The function that computes `operation` where `tensor` lies; None: the reference."""
    return _resolved(operation, tensor.device.type)


@functools.cache
def choices(device: str) -> Mapping[str, str]:
    """Operation → word for tensors on `device` ("cpu", "cuda"). Raises KernelError for an override
    that names what does not exist."""
    if device == "cuda" and torch.cuda.get_device_capability() >= MINIMUM_CAPABILITY:
        chosen = dict.fromkeys(MODULES, "triton")
    else:
        chosen = dict.fromkeys(MODULES, "reference")
    chosen |= _override(os.environ.get(ENVIRONMENT, ""))
    if device == "cpu":
        _check_interpreter(chosen)
    words = sorted(set(chosen.values()))
    summary = "; ".join(
        f"{word}: {', '.join(name for name in chosen if chosen[name] == word)}" for word in words
    )
    log.info("kernels on %s: %s", device, words[0] if len(words) == 1 else summary)
    return chosen


def forget() -> None:
    """Decide again at the next call: for tests that change the environment."""
    choices.cache_clear()
    _resolved.cache_clear()


@functools.cache
def _resolved(operation: str, device: str) -> Callable[..., Any] | None:
    word = choices(device)[operation]
    if word == "reference":
        return None
    module = importlib.import_module(f"pdserve.kernels.{MODULES[operation][word]}")
    function: Callable[..., Any] = getattr(module, operation)
    return function


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


def _check_interpreter(chosen: Mapping[str, str]) -> None:
    for operation, word in chosen.items():
        if word == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            raise KernelError(
                f"{ENVIRONMENT} asks for {operation}={word}, but the tensors are on the CPU: use "
                "reference, or triton with TRITON_INTERPRET=1 (slow, for tests)."
            )
