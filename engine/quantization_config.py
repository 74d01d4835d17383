"""Reads `quantization_config` of a config.json, as AutoAWQ, AutoGPTQ, GPTQModel, transformers and
llm-compressor write it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pdserve.engine.quantization import Awq, EightBits, Gptq, Packed, Quantization

KEY = "quantization_config"
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
METHODS = ("awq", "gptq", "fp8", "compressed-tensors")


def read_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """How the checkpoint of the parsed config.json `raw` is quantised; None: it is not.

    Raises ValueError, a sentence with key and value, for a format that is not supported.
    """
    given = raw.get(KEY)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"{KEY} must be an object, not {given!r}.")
    method = _one_of(given, "quant_method", METHODS, None)
    if method == "awq":
        return _awq(given)
    if method == "gptq":
        return _gptq(given)
    if method == "fp8":
        return _fp8(given)
    found = _compressed(given)
    if found.covers("lm_head") and not raw.get("tie_word_embeddings", False):
        raise ValueError(
            f"{KEY}: ignore must name lm_head, because a quantised output layer is not supported."
        )
    return found


def _awq(given: Mapping[str, Any]) -> Quantization:
    _one_of(given, "bits", (4,), None)
    _one_of(given, "zero_point", (True,), True)
    _one_of(given, "version", ("gemm", "GEMM"), "gemm")
    group = _one_of(given, "group_size", GROUPS, 128)
    return Quantization(scheme=Awq(group=group), excluded=_names(given, "modules_to_not_convert"))


def _gptq(given: Mapping[str, Any]) -> Quantization:
    _one_of(given, "bits", (4,), None)
    _one_of(given, "is_marlin_format", (False,), False)
    _one_of(given, "lm_head", (False,), False)
    _one_of(given, "pack_dtype", ("int32",), "int32")
    for key in ("dynamic", "modules_in_block_to_quantize"):
        if given.get(key):
            raise ValueError(f"{KEY}: {key} {given[key]!r} is not supported; leave it out.")
    version = _one_of(given, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    group = _one_of(given, "group_size", GROUPS, 128)
    return Quantization(scheme=Gptq(group=group, zero_offset=int(version == "gptq")))


def _fp8(given: Mapping[str, Any]) -> Quantization:
    _one_of(given, "activation_scheme", ("dynamic",), "dynamic")
    _one_of(given, "fmt", ("e4m3",), "e4m3")
    block = _block(given.get("weight_block_size"), "weight_block_size")
    name = "weight_scale" if block is None else "weight_scale_inv"
    excluded = _names(given, "modules_to_not_convert") + _names(given, "ignored_layers")
    scheme = EightBits(kind="fp8", scale=name, block=block, format="fp8")
    return Quantization(scheme=scheme, excluded=excluded)


def _compressed(given: Mapping[str, Any]) -> Quantization:
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError(f"{KEY}: config_groups must have one group, not {groups!r}.")
    (group,) = groups.values()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ValueError(f"{KEY}: config_groups must describe weights, not {group!r}.")
    if group.get("targets") != ["Linear"]:
        raise ValueError(
            f"{KEY}: targets {group.get('targets')!r} is not supported; known: ['Linear']."
        )
    _check_cache(given.get("kv_cache_scheme"))
    for key in ("sparsity_config", "transform_config"):
        if given.get(key):
            raise ValueError(f"{KEY}: {key} {given[key]!r} is not supported; known: null.")
    _one_of(given, "quantization_status", ("compressed",), "compressed")
    if group.get("output_activations"):
        raise ValueError(f"{KEY}: output_activations are not supported; known: null.")
    inputs = group.get("input_activations")
    if inputs and not (isinstance(inputs, dict) and inputs.get("dynamic") is True):
        raise ValueError(
            f"{KEY}: input_activations {inputs!r} are not supported; known: null, dynamic ones."
        )
    weights = group["weights"]
    written = group if group.get("format") else given
    kinds = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    kind = _one_of(written, "format", kinds, None)
    excluded = _names(given, "ignore")
    if kind == "pack-quantized":
        return Quantization(scheme=_packed(weights), excluded=excluded)
    numbers = _one_of(weights, "type", ("int", "float"), None)
    if kind != "naive-quantized":
        _one_of(weights, "type", (kind.partition("-")[0],), None)
    return Quantization(scheme=_eight_bits(weights, numbers), excluded=excluded)


def _check_cache(scheme: Any) -> None:
    """What --kv-cache-dtype fp8 can use: the checkpoint's scales are read by `kv_scales`."""
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    if scheme is None:
        return
    if not isinstance(scheme, dict) or any(scheme.get(key) != wanted[key] for key in wanted):
        raise ValueError(
            f"{KEY}: kv_cache_scheme {scheme!r} is not supported; known: null and {wanted!r}."
        )


def _packed(weights: Mapping[str, Any]) -> Packed:
    _one_of(weights, "num_bits", (4,), None)
    _one_of(weights, "type", ("int",), None)
    strategy = _one_of(weights, "strategy", ("group", "channel"), None)
    order = _one_of(weights, "actorder", (None, "weight", "static", "group", "dynamic"), None)
    return Packed(
        group=-1 if strategy == "channel" else _one_of(weights, "group_size", GROUPS, None),
        symmetric=_one_of(weights, "symmetric", (True, False), True),
        ordered=order in ("group", "dynamic"),
    )


def _eight_bits(weights: Mapping[str, Any], numbers: str) -> EightBits:
    _one_of(weights, "num_bits", (8,), None)
    _one_of(weights, "symmetric", (True,), True)
    _one_of(weights, "dynamic", (False,), False)
    strategy = _one_of(weights, "strategy", ("tensor", "channel", "block"), None)
    block = None
    if strategy == "block":
        block = _block(weights.get("block_structure"), "block_structure")
        if block is None:
            raise ValueError(f"{KEY}: the strategy block needs block_structure.")
    kind: Literal["int8", "fp8"] = "int8" if numbers == "int" else "fp8"
    return EightBits(kind=kind, scale="weight_scale", block=block, format=f"{numbers}-quantized")


def _one_of(given: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any) -> Any:
    """given[key], or `default` where it is absent or null; one of `allowed`."""
    value = given.get(key)
    value = default if value is None else value
    # True == 1: a flag is no number.
    if not any(value == known and type(value) is type(known) for known in allowed):
        known = ", ".join(str(item) for item in allowed)
        raise ValueError(f"{KEY}: {key} {value!r} is not supported; known: {known}.")
    return value


def _names(given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = given.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{KEY}: {key} must be a list of names, not {names!r}.")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ValueError(f"{KEY}: {key} has the pattern {name!r}: {error}.") from None
    return tuple(names)


def _block(value: Any, key: str) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = value if isinstance(value, list) else []
    whole = [size for size in sizes if type(size) is int and size >= 1]
    if len(sizes) != 2 or len(whole) != 2 or whole[1] not in GROUPS:
        known = ", ".join(str(size) for size in GROUPS[1:])
        raise ValueError(
            f"{KEY}: {key} {value!r} is not supported; known: outputs and inputs of a block, the "
            f"latter one of {known}."
        )
    return whole[0], whole[1]
