"""What the engine is built from: the model's configuration, read from its folder, and the engine's
own settings. Both are final: "auto" has been resolved when they exist."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pdserve.engine.quantization import Quantization
from pdserve.engine.quantization_config import read_quantization
from pdserve.engine.rope_config import RopeConfig, read_rope
from pdserve.protocol.errors import PdserveError
from pdserve.protocol.ticket import LayoutFingerprint

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Element types that weights, activations and the KV cache can have, by name."""
FLOAT8 = "float8_e4m3fn"
CACHE_DTYPES = {**DTYPES, FLOAT8: torch.float8_e4m3fn}
"""Element types of the KV cache, by name."""


class ModelError(PdserveError):
    """A model folder that cannot be served; `str()` is a sentence that names file and reason."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How the decoders that we serve differ, and what a config.json may leave unsaid.

    The defaults are those of transformers' configuration classes.
    """

    qkv_bias: bool | str
    """Whether q, k and v have biases, or the key of config.json that says so (default false)."""
    o_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    """RMS norm of each query and key head before the rotation."""
    windows: str
    """Which layers use `sliding_window`: "none", "all", or "some" (use_sliding_window,
    max_window_layers, layer_types)."""
    default_head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    default_kv_heads: int | None = None
    """None: as many as query heads."""
    experts: str = ""
    """How config.json describes the mixture of experts: "mixtral" or "qwen3"; "": there is none."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("attention_bias", "attention_bias", "mlp_bias", False, "none"),
    "MistralForCausalLM": Architecture(False, False, False, False, "all", default_kv_heads=8),
    "Qwen2ForCausalLM": Architecture(True, False, False, False, "some", default_kv_heads=32),
    "Qwen3ForCausalLM": Architecture(
        "attention_bias", "attention_bias", False, True, "some", 128, default_kv_heads=32
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "attention_bias", "attention_bias", False, True, "some", default_kv_heads=4, experts="qwen3"
    ),
    "MixtralForCausalLM": Architecture(
        False, False, False, False, "all", default_kv_heads=8, experts="mixtral"
    ),
}

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """The mixtures of experts that stand in for some layers' feed-forward part."""

    count: int
    active: int
    """Experts per token."""
    intermediate_size: int
    """Of each expert."""
    renormalise: bool
    """Whether the weights of a token's experts are made to add up to one."""
    naming: str
    """Of the tensors: "mixtral" or "qwen3"."""
    layers: tuple[bool, ...]
    """Which layers have one; the others have an ordinary feed-forward part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a decoder: everything that `engine.models.decoder` needs to know."""

    architecture: str
    """A key of ARCHITECTURES."""
    dtype: str
    """The checkpoint's own element type, a key of DTYPES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    """One of ACTIVATIONS."""
    rms_norm_eps: float
    max_position_embeddings: int
    """Tokens, prompt and answer together, that the model is made for."""
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens; None: the layer sees everything."""
    tie_word_embeddings: bool
    """The output layer is the embedding matrix."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    experts: ExpertsConfig | None = None
    quantization: Quantization | None = None
    """How linear layers are stored in fewer bits; None: in full precision."""

    def digest(self) -> str:
        """A short text that is equal for equal configurations, wherever the folder lies."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much of the machine the engine may use, and how."""

    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int = 0
    """KV blocks; 0: as many as fit into kv_cache_memory."""
    kv_cache_memory: int = 0
    """Bytes for the KV pool; used if num_blocks is 0. 0: 1 GiB on the CPU, what is free on CUDA."""
    max_num_batched_tokens: int = 0
    """Tokens computed in one step, at most; 0: 512 on the CPU, 2048 on CUDA, but no fewer than
    max_num_seqs."""
    max_num_seqs: int = 64
    """Requests in one step, at most."""
    max_model_len: int = 0
    """Tokens per request, prompt and answer together; 0: the model's max_position_embeddings."""
    dtype: str = "auto"
    """A key of DTYPES, or "auto": the checkpoint's."""
    kv_cache_dtype: str = "auto"
    """"fp8" or "fp8_e4m3" (the same), or "auto": as dtype. Resolved: a key of CACHE_DTYPES."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda if there is one."""
    load_format: str = "auto"
    """"auto": safetensors files; "dummy": random weights made from the configuration."""
    logprobs_mode: str = "raw_logprobs"
    """What is told of drawn tokens, one of LOGPROBS_MODES: log-probabilities or logits, of the
    model or as they were drawn from (bias, penalties, grammar, temperature, filters)."""
    batch_invariant: bool = False
    """A token's KV and logits have the same bits in any batch and any chunk."""
    quantization: str = "none"
    """"int8" or "fp8": round the linear layers of a full-precision checkpoint; "none"."""
    compute_nans_in_logits: bool = False
    """Look for logits that are not numbers, among those that tokens are drawn from."""
    kv_cache_metrics_sample: float = 0.0
    """Share of the KV blocks whose lives in the prefix cache are measured; 0: nobody measures."""
    seed: int = 0
    """Of the dummy weights."""
    threads: int = 0
    """CPU threads of matrix products; 0: torch's own choice."""


def read_model_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json. Raises ModelError where it is missing or asks for what we lack."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"The model folder {folder} has no config.json.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return model_config(raw, str(path))


def model_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The configuration described by the parsed config.json `raw`; `source` names it in errors."""
    name = _architecture_name(raw, source)
    kind = ARCHITECTURES[name]
    _refuse_unsupported(raw, source)
    layers = _positive(raw, "num_hidden_layers", source)
    heads = _positive(raw, "num_attention_heads", source)
    hidden = _positive(raw, "hidden_size", source)
    kv_heads = _optional(raw, "num_key_value_heads", kind.default_kv_heads, source) or heads
    head_dim = _optional(raw, "head_dim", kind.default_head_dim, source) or hidden // heads
    if heads % kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
            f"({kv_heads})."
        )
    if head_dim % 2:
        raise ModelError(f"{source}: head_dim must be even for rotary embeddings, not {head_dim}.")
    activation = raw.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"{source}: hidden_act {activation!r} is not supported; known: "
            f"{', '.join(ACTIVATIONS)}."
        )
    positions = _positive(raw, "max_position_embeddings", source)
    try:
        rope = read_rope(raw, positions)
        quantization = read_quantization(raw)
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from None
    if quantization is not None and kind.experts:
        raise ModelError(
            f"{source}: quantization_config with the architecture {name}: mixtures of experts with "
            "quantised weights are not supported; use the unquantised checkpoint."
        )
    return ModelConfig(
        architecture=name,
        dtype=_dtype(raw, source),
        vocab_size=_positive(raw, "vocab_size", source),
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size", source),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        activation=activation,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=positions,
        rope=rope,
        windows=_windows(raw, kind.windows, layers, source),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=_flag(raw, kind.qkv_bias),
        o_bias=_flag(raw, kind.o_bias),
        mlp_bias=_flag(raw, kind.mlp_bias),
        qk_norm=kind.qk_norm,
        experts=_experts(raw, kind.experts, layers, source),
        quantization=quantization,
    )


def layout_fingerprint(
    model: ModelConfig,
    weights_digest: str,
    dtype: str,
    block_size: int,
    batch_invariant: bool = False,
) -> LayoutFingerprint:
    """What a pool of this model's KV blocks must share with another one. dtype: a key of
    CACHE_DTYPES. The scales of a float8 cache are part of the weights' digest."""
    return LayoutFingerprint(
        model=model.digest(),
        weights=weights_digest,
        dtype=dtype,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=block_size,
        batch_invariant=batch_invariant,
    )


def _architecture_name(raw: dict[str, Any], source: str) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ModelError(
            f"{source}: the architecture {names!r} is not supported; known: "
            f"{', '.join(ARCHITECTURES)}."
        )
    name: str = names[0]
    return name


def _refuse_unsupported(raw: dict[str, Any], source: str) -> None:
    if raw.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ModelError(f"{source}: partial_rotary_factor must be 1.")


def _experts(raw: dict[str, Any], kind: str, layers: int, source: str) -> ExpertsConfig | None:
    if not kind:
        return None
    # transformers 5 writes num_local_experts for both; older configs of Qwen say num_experts.
    key = "num_experts" if "num_experts" in raw else "num_local_experts"
    count, active = _positive(raw, key, source), _positive(raw, "num_experts_per_tok", source)
    if active > count:
        raise ModelError(
            f"{source}: num_experts_per_tok ({active}) must not be above {key} ({count})."
        )
    if kind == "mixtral":
        inner, sparse, renormalise = "intermediate_size", (True,) * layers, True
    else:
        inner, renormalise = "moe_intermediate_size", bool(raw.get("norm_topk_prob", False))
        step = _optional(raw, "decoder_sparse_step", 1, source) or 1
        dense = raw.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise ModelError(f"{source}: mlp_only_layers must be a list of layers, not {dense!r}.")
        sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    return ExpertsConfig(
        count=count,
        active=active,
        intermediate_size=_positive(raw, inner, source),
        renormalise=renormalise,
        naming=kind,
        layers=sparse,
    )


def _windows(raw: dict[str, Any], kind: str, layers: int, source: str) -> tuple[int | None, ...]:
    if kind == "none" or (kind == "some" and not raw.get("use_sliding_window", False)):
        types = raw.get("layer_types")
        if kind == "some" and types is not None and "sliding_attention" in types:
            raise ModelError(
                f"{source}: layer_types names sliding_attention, but use_sliding_window is false."
            )
        return (None,) * layers
    window = raw.get("sliding_window", _DEFAULT_WINDOW)
    if window is None:
        return (None,) * layers
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"{source}: sliding_window must be a positive integer, not {window!r}.")
    if kind == "all":
        return (window,) * layers
    types = raw.get("layer_types")
    if types is None:
        first = int(raw.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS))
        return tuple(window if layer >= first else None for layer in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
        raise ModelError(
            f"{source}: layer_types must name full_attention or sliding_attention for each of the "
            f"{layers} layers, not {types!r}."
        )
    return tuple(known[kind] for kind in types)


def _dtype(raw: dict[str, Any], source: str) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ModelError(f"{source}: dtype {name!r} is not supported; known: {', '.join(DTYPES)}.")
    return str(name)


def _flag(raw: dict[str, Any], rule: bool | str) -> bool:
    return bool(raw.get(rule, False)) if isinstance(rule, str) else rule


def _positive(raw: dict[str, Any], key: str, source: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{source}: {key} must be a positive integer, not {value!r}.")
    return value


def _optional(raw: dict[str, Any], key: str, default: int | None, source: str) -> int | None:
    if key not in raw:
        return default
    return None if raw[key] is None else _positive(raw, key, source)
