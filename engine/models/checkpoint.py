"""What a checkpoint of a model holds: names, shapes and dtypes, in Hugging Face's naming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.engine.config import ModelConfig, ModelError
from pdserve.engine.tensor_spec import TensorSpec

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
NAMES = {
    "qwen3": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}
"""Of a mixture's tensors in a layer: the block, and each expert's gate, up and down."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer of a model: its name, outputs, inputs, and whether it has a bias."""

    name: str
    rows: int
    columns: int
    bias: bool = False


def linear_layers(config: ModelConfig) -> Iterator[LinearShape]:
    """All linear layers but the output."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.num_heads * dim, config.num_kv_heads * dim
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield LinearShape(prefix + "self_attn.q_proj", query, hidden, config.qkv_bias)
        yield LinearShape(prefix + "self_attn.k_proj", kv, hidden, config.qkv_bias)
        yield LinearShape(prefix + "self_attn.v_proj", kv, hidden, config.qkv_bias)
        yield LinearShape(prefix + "self_attn.o_proj", hidden, query, config.o_bias)
        experts = config.experts
        if experts is None or not experts.layers[layer]:
            yield LinearShape(prefix + "mlp.gate_proj", inner, hidden, config.mlp_bias)
            yield LinearShape(prefix + "mlp.up_proj", inner, hidden, config.mlp_bias)
            yield LinearShape(prefix + "mlp.down_proj", hidden, inner, config.mlp_bias)
        else:
            block, (gate, up, down) = NAMES[experts.naming]
            size = experts.intermediate_size
            yield LinearShape(f"{prefix}{block}.gate", experts.count, hidden)
            for expert in range(experts.count):
                one = f"{prefix}{block}.experts.{expert}."
                yield LinearShape(one + gate, size, hidden)
                yield LinearShape(one + up, size, hidden)
                yield LinearShape(one + down, hidden, size)


def quantized_layers(config: ModelConfig) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each quantised layer, by the last parts of their names. Raises ModelError for
    a layer whose shape the format does not allow."""
    if config.quantization is None:
        return {}
    found = {}
    for layer in linear_layers(config):
        if config.quantization.covers(layer.name):
            try:
                tensors = config.quantization.scheme.tensors(layer.rows, layer.columns)
            except ValueError as error:
                raise ModelError(f"{layer.name} cannot be quantised like this: {error}") from None
            found[layer.name] = tensors
    return found


def weight_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor by its name."""
    specs: dict[str, TensorSpec] = {}

    def add(name: str, *shape: int) -> None:
        specs[name] = TensorSpec((shape,))

    hidden, dim = config.hidden_size, config.head_dim
    add(EMBEDDING, config.vocab_size, hidden)
    add("model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        add(OUTPUT, config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        add(prefix + "input_layernorm.weight", hidden)
        add(prefix + "post_attention_layernorm.weight", hidden)
        if config.qk_norm:
            add(prefix + "self_attn.q_norm.weight", dim)
            add(prefix + "self_attn.k_norm.weight", dim)
    quantized = quantized_layers(config)
    for linear in linear_layers(config):
        if linear.name in quantized:
            for name, spec in quantized[linear.name].items():
                specs[f"{linear.name}.{name}"] = spec
        else:
            add(linear.name + ".weight", linear.rows, linear.columns)
        if linear.bias:
            add(linear.name + ".bias", linear.rows)
    return specs
