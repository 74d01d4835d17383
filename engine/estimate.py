"""What a token costs by the model's shape, for those who watch how busy the hardware is."""

from __future__ import annotations

from pdserve.engine.config import ModelConfig


def token_flops(model: ModelConfig) -> int:
    """Floating-point operations for a token: two for each weight of the matrices that it is
    multiplied with. Attention over its context is left out, which for contexts shorter than a few
    times the hidden size is little (Kaplan et al. 2020, table 1)."""
    width, head = model.hidden_size, model.head_dim
    attention = 2 * width * head * (model.num_heads + model.num_kv_heads)
    dense = 3 * width * model.intermediate_size
    experts = model.experts
    sparse = 0 if experts is None else 3 * width * experts.intermediate_size * experts.active
    mixed = 0 if experts is None else sum(experts.layers)
    layers = model.num_layers * attention + (model.num_layers - mixed) * dense + mixed * sparse
    return 2 * (layers + width * model.vocab_size)
