"""The decoder of Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE, composed from kernels; they
differ by flags.

Legend: T tokens of all sequences of a step, B sequences, M blocks per row of the block table,
E hidden size, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as functional

from pdserve import kernels
from pdserve.engine.config import ExpertsConfig, ModelConfig
from pdserve.engine.models.checkpoint import EMBEDDING, NAMES, OUTPUT
from pdserve.engine.models.linear import Joined, Linear
from pdserve.engine.weights import Weights

FEW_SINGLES = 12
"""Of more single tokens the products are faster in the tiles of longer chunks, where the processor
has instructions for those (bench/LOG.md)."""
Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of a step's tokens, [T, D / 2] float32 each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's tokens. The first `num_decodes` sequences have one token each."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64, each token's index in its sequence."""
    slots: torch.Tensor
    """[T] int64, where each token's K and V go."""
    query_start: torch.Tensor
    """[B + 1] int64, first row of each sequence."""
    context_lens: torch.Tensor
    """[B] int64, cached tokens of each sequence, this step's included."""
    block_table: torch.Tensor
    """[B, M] int64."""
    num_decodes: int


class Attention:
    """Grouped-query self-attention of one layer over its paged cache.

    invariant, here and below: a row has the same bits in any batch and any chunk."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, invariant: bool) -> None:
        prefix = f"model.layers.{layer}.self_attn."
        self.query = Linear.of(weights, prefix + "q_proj", invariant)
        self.key = Linear.of(weights, prefix + "k_proj", invariant)
        self.value = Linear.of(weights, prefix + "v_proj", invariant)
        self.projections = Joined((self.query, self.key, self.value))
        self.output = Linear.of(weights, prefix + "o_proj", invariant)
        self.invariant = invariant
        self.norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.qk_norm:
            self.norms = (weights[prefix + "q_norm.weight"], weights[prefix + "k_norm.weight"])
        self.eps = config.rms_norm_eps
        self.dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.windows[layer]
        # Of a float8 cache (engine.kv_scales); absent, and 1, for every other one.
        scales = [weights.get(f"{prefix}{kind}_scale") for kind in "kv"]
        self.k_scale, self.v_scale = (1.0 if one is None else float(one) for one in scales)

    def __call__(
        self, x: torch.Tensor, angles: Angles, cache: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """x: [T, E]; cache: the layer's. Returns [T, E]."""
        query, key, value = (part.unflatten(-1, (-1, self.dim)) for part in self.projections(x))
        query = kernels.rope_and_store_kv(
            query,
            key,
            value,
            *angles,
            cache,
            batch.slots,
            norms=None if self.norms is None else (*self.norms, self.eps),
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )
        return self.output(self._attend(query, cache, batch).flatten(1))

    def _attend(self, query: torch.Tensor, cache: torch.Tensor, batch: Batch) -> torch.Tensor:
        # Invariant: one kernel for single tokens and chunks, so that both leave the same bits.
        decodes = 0 if self.invariant else batch.num_decodes
        lens, table = batch.context_lens, batch.block_table
        parts = []
        if decodes:
            parts.append(
                kernels.attention_decode(
                    query[:decodes],
                    cache,
                    lens[:decodes],
                    table[:decodes],
                    scale=self.scale,
                    window=self.window,
                    k_scale=self.k_scale,
                    v_scale=self.v_scale,
                )
            )
        if decodes < lens.shape[0]:
            parts.append(
                kernels.attention_prefill(
                    query[decodes:],
                    cache,
                    batch.query_start[decodes:] - decodes,
                    lens[decodes:],
                    table[decodes:],
                    scale=self.scale,
                    window=self.window,
                    invariant=self.invariant,
                    k_scale=self.k_scale,
                    v_scale=self.v_scale,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class FeedForward:
    """down(act(gate(x)) · up(x)): [T, E] → [T, E]."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, invariant: bool) -> None:
        prefix = f"model.layers.{layer}.mlp."
        self.gate = Linear.of(weights, prefix + "gate_proj", invariant)
        self.up = Linear.of(weights, prefix + "up_proj", invariant)
        self.halves = Joined((self.gate, self.up))
        self.down = Linear.of(weights, prefix + "down_proj", invariant)
        self.activate = partial(kernels.GATES[config.activation], invariant=invariant)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activate(*self.halves(x)))


class Experts:
    """A mixture of feed-forward experts, a few of them for each token: [T, E] → [T, E]."""

    def __init__(
        self,
        config: ModelConfig,
        experts: ExpertsConfig,
        weights: Weights,
        layer: int,
        invariant: bool,
    ) -> None:
        block, names = NAMES[experts.naming]
        prefix = f"model.layers.{layer}.{block}."
        self.router = Linear.of(weights, prefix + "gate", invariant)
        matrices = []
        for expert in range(experts.count):
            one = f"{prefix}experts.{expert}."
            gate, up, down = (weights[f"{one}{name}.weight"] for name in names)
            matrices.append((gate, up, down))
        self.matrices = kernels.expert_weights(matrices)
        self.active = experts.active
        self.renormalise = experts.renormalise
        self.activation = config.activation
        self.invariant = invariant

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        routed = kernels.route(self.router(x), self.active, renormalise=self.renormalise)
        return kernels.mixture(x, *routed, self.matrices, self.activation, invariant=self.invariant)


class Layer:
    """One decoder layer: norm, attention, norm, feed-forward, with the residual beside."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, invariant: bool) -> None:
        prefix = f"model.layers.{layer}."
        self.before_attention = weights[prefix + "input_layernorm.weight"]
        self.before_mlp = weights[prefix + "post_attention_layernorm.weight"]
        self.attention = Attention(config, weights, layer, invariant)
        experts = config.experts
        self.mlp: FeedForward | Experts
        if experts is not None and experts.layers[layer]:
            self.mlp = Experts(config, experts, weights, layer, invariant)
        else:
            self.mlp = FeedForward(config, weights, layer, invariant)
        self.eps = config.rms_norm_eps

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        angles: Angles,
        cache: torch.Tensor,
        batch: Batch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: what the layer below adds to `residual` (None: x is the embedding). Both [T, E];
        returns this layer's addition and the residual that it is to be added to."""
        norm = self.before_attention
        if residual is None:
            x, residual = kernels.rms_norm(x, norm, self.eps), x
        else:
            x, residual = kernels.fused_add_rms_norm(x, residual, norm, self.eps)
        x = self.attention(x, angles, cache, batch)
        x, residual = kernels.fused_add_rms_norm(x, residual, self.before_mlp, self.eps)
        return self.mlp(x), residual

    def tensors(self) -> kernels.LayerTensors | None:
        """Everything that the layer computes with, for `kernels.DecodeStep`; None with experts or
        quantised weights, which that does not know."""
        if isinstance(self.mlp, Experts):
            return None
        attention, mlp = self.attention, self.mlp
        linears = {
            "query": attention.query.tensors,
            "key": attention.key.tensors,
            "value": attention.value.tensors,
            "output": attention.output.tensors,
            "gate": mlp.gate.tensors,
            "up": mlp.up.tensors,
            "down": mlp.down.tensors,
        }
        plain = {name: pair for name, pair in linears.items() if pair is not None}
        if len(plain) < len(linears):
            return None
        return kernels.LayerTensors(
            attention_norm=self.before_attention,
            mlp_norm=self.before_mlp,
            head_norms=attention.norms,
            window=attention.window,
            **plain,
        )


class Decoder:
    """A causal language model over a paged KV cache. Holds weights, never state."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        max_model_len: int,
        device: str,
        *,
        invariant: bool = False,
    ) -> None:
        """weights: what `weight_specs(config)` describes, on `device`. invariant: a token's KV and
        logits have the same bits in whatever batch and chunk it is computed, alone too."""
        self.config = config
        self.invariant = invariant
        self.embedding = weights[EMBEDDING]
        self.output = weights[EMBEDDING if config.tie_word_embeddings else OUTPUT]
        self.norm = weights["model.norm.weight"]
        self.layers = [
            Layer(config, weights, index, invariant) for index in range(config.num_layers)
        ]
        cos, sin = config.rope.table(config.head_dim, max_model_len)
        self.cos, self.sin = cos.to(device), sin.to(device)
        self.decode: kernels.DecodeStep | None = None
        """A step of single tokens in one call, where there is a kernel for it: on the CPU, with KV
        in the dtype of the weights. It rounds in other places than the kernels of longer chunks
        do, so it is not invariant."""
        found = [layer.tensors() for layer in self.layers]
        tensors = [layer for layer in found if layer is not None]
        whole = config.activation == "silu" and len(tensors) == len(found)
        self.chunks: kernels.ChunkStep | None = None
        """The same for any step, layer by layer."""
        self.most_singles = kernels.DecodeStep.MOST_TOKENS
        """Of a step that takes the one call."""
        whole = whole and not invariant
        if whole and kernels.DecodeStep.fits(tensors, config.head_dim):
            self.decode = kernels.DecodeStep(
                tensors, cos=self.cos, sin=self.sin, eps=config.rms_norm_eps
            )
        if whole and kernels.ChunkStep.fits(tensors, config.head_dim):
            self.chunks = kernels.ChunkStep(
                tensors, cos=self.cos, sin=self.sin, eps=config.rms_norm_eps
            )
            self.most_singles = FEW_SINGLES

    def forward(
        self,
        batch: Batch,
        caches: Sequence[torch.Tensor],
        after: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute the batch's tokens and store their KV in `caches` (one view per layer).

        `after(n)` is called when the first n layers have been put to the device, unless all are
        computed in one call. Returns the hidden states before the last norm, [T, E].
        """
        x = functional.embedding(batch.token_ids, self.embedding)
        plain = caches[0].dtype == x.dtype
        single = batch.num_decodes == x.shape[0] and plain
        if self.decode is not None and single and x.shape[0] <= self.most_singles:
            self.decode(
                x,
                caches,
                positions=batch.positions,
                slots=batch.slots,
                context_lens=batch.context_lens,
                block_table=batch.block_table,
            )
            return x
        if self.chunks is not None and plain:
            compute = self.chunks.begin(
                x,
                caches[0],
                positions=batch.positions,
                slots=batch.slots,
                query_start=batch.query_start,
                context_lens=batch.context_lens,
                block_table=batch.block_table,
                singles=batch.num_decodes,
            )
            for index, cache in enumerate(caches):
                compute(index, cache)
                if after is not None:
                    after(index + 1)
            return x
        angles = self.cos[batch.positions], self.sin[batch.positions]
        residual: torch.Tensor | None = None
        for count, (layer, cache) in enumerate(zip(self.layers, caches, strict=True), 1):
            x, residual = layer(x, residual, angles, cache, batch)
            if after is not None:
                after(count)
        return x if residual is None else x + residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of `forward`'s result → [rows, V] float32."""
        return kernels.logits(
            hidden,
            self.norm,
            self.output,
            self.config.rms_norm_eps,
            invariant=self.invariant,
        )
