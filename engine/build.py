"""Builds what an engine needs from a model folder: weights, KV pool, runner, fingerprint."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pdserve import kernels
from pdserve.engine import weights as loading
from pdserve.engine.config import (
    DTYPES,
    FLOAT8,
    EngineConfig,
    ModelConfig,
    ModelError,
    layout_fingerprint,
    read_model_config,
)
from pdserve.engine.graphs import cuda_capture
from pdserve.engine.kv_scales import read_scales, scale_names
from pdserve.engine.models.checkpoint import OUTPUT, quantized_layers, weight_specs
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.pool import KVPool, block_nbytes
from pdserve.engine.quantization import AtLoad, Quantization
from pdserve.engine.runner import ModelRunner
from pdserve.kernels import dispatch, trials, tuning
from pdserve.protocol.ticket import LayoutFingerprint

CPU_KV_BYTES = 1 << 30
"""KV pool on the CPU if kv_cache_memory is 0."""

QUANTIZATIONS = {"int8": AtLoad(kind="int8"), "fp8": AtLoad(kind="fp8")}
"""What --quantization makes of a checkpoint in full precision."""

log = logging.getLogger(__name__)

KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
"""What --kv-cache-dtype may be."""
STEP_TOKENS = {"cpu": 512, "cuda": 2048}
"""max_num_batched_tokens if it is 0. On the CPU a prompt's token takes as long in larger steps
(bench/results/cpu-step-tokens.md)."""
MIN_MODEL_LEN = 16
"""Shorter ones have no room for a prompt and an answer."""


@dataclass(frozen=True, slots=True)
class Built:
    """A loaded model. Whoever holds it closes the pool."""

    runner: ModelRunner
    pool: KVPool
    model: ModelConfig
    config: EngineConfig
    """As given, with every "auto" and 0 resolved."""
    fingerprint: LayoutFingerprint


def build_runner(
    folder: Path, config: EngineConfig, progress: loading.Progress = lambda share: None
) -> Built:
    """Load the model in `folder`. Raises ModelError, a sentence, for a folder or settings that
    cannot work together. Sets torch's thread count for the whole process."""
    model = quantized(read_model_config(folder), config.quantization)
    config = resolve(config, model)
    if config.threads:
        torch.set_num_threads(config.threads)
    decoder, digest = _load(folder, model, config, progress)
    if config.device == "cuda":
        torch.cuda.empty_cache()  # weights that were joined have left holes, which the pool needs
    pool = KVPool(
        model,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        dtype=config.kv_cache_dtype,
        device=config.device,
    )
    log.info(
        "%s: %s%s on %s, %d KV blocks of %d tokens in %s (%d MiB), up to %d tokens per request",
        model.architecture,
        config.dtype,
        "" if model.quantization is None else f", weights {model.quantization.scheme.format},",
        config.device,
        config.num_blocks,
        config.block_size,
        config.kv_cache_dtype,
        config.num_blocks * pool.block_nbytes >> 20,
        config.max_model_len,
    )
    fingerprint = layout_fingerprint(
        model, digest, config.kv_cache_dtype, config.block_size, config.batch_invariant
    )
    runner = ModelRunner(
        decoder, pool, config.device, config.logprobs_mode, config.compute_nans_in_logits
    )
    if config.device == "cuda" and tuning.wanted():
        _tune(pool, model, config)  # before decode steps are recorded
    if kernels.records(config.device, pool.tensor.dtype):
        runner.record(config.max_num_seqs, config.max_model_len, cuda_capture())
    return Built(runner, pool, model, config, fingerprint)


@torch.inference_mode()
def _tune(pool: KVPool, model: ModelConfig, config: EngineConfig) -> None:
    """Choose the configurations of this process's kernels, on a pool that nobody owns yet."""
    sizes = trials.Model(
        dtype=DTYPES[config.dtype],
        heads=model.num_heads,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        invariant=config.batch_invariant,
        experts=model.experts.count if model.experts else 0,
        active=model.experts.active if model.experts else 0,
        inner_size=model.experts.intermediate_size if model.experts else 0,
    )
    words = dispatch.choices(config.device)
    if "triton" not in words.values():
        return
    chosen = (
        trial for trial in trials.trials(pool.tensor, sizes) if words[trial.public] != "reference"
    )
    try:
        tuning.tune(chosen, key=tuning.fingerprint(), timer=tuning.cuda_seconds)
    except Exception:  # a worker can do without, and must not fail to start for it
        log.exception("The kernels' configurations could not be measured.")
    torch.cuda.empty_cache()


def quantized(model: ModelConfig, kind: str) -> ModelConfig:
    """The model with its linear layers rounded at load; `kind` is --quantization's value."""
    if kind == "none":
        return model
    if kind not in QUANTIZATIONS:
        raise ModelError(
            f"--quantization must be none or one of {', '.join(QUANTIZATIONS)}, not {kind!r}."
        )
    if model.experts is not None:
        raise ModelError(f"--quantization {kind}: mixtures of experts are not supported.")
    if model.quantization is not None:
        raise ModelError(
            f"--quantization {kind}: the checkpoint is quantised already "
            f"({model.quantization.scheme.format}); leave the option out."
        )
    return replace(model, quantization=Quantization(scheme=QUANTIZATIONS[kind]))


def resolve(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """Replace "auto" and 0 by what they mean for this model, and check that it fits."""
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise ModelError(f"--dtype must be auto or one of {', '.join(DTYPES)}, not {dtype!r}.")
    if device not in ("cpu", "cuda"):
        raise ModelError(f"--device must be auto, cpu or cuda, not {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: no CUDA device is available here; use --device cpu.")
    if config.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ModelError(
            f"--kv-cache-dtype must be {', '.join(KV_CACHE_DTYPES[:-1])} or {KV_CACHE_DTYPES[-1]}, "
            f"not {config.kv_cache_dtype!r}."
        )
    if config.load_format not in ("auto", "dummy"):
        raise ModelError(f"--load-format must be auto or dummy, not {config.load_format!r}.")
    longest = config.max_model_len or model.max_position_embeddings
    if longest < MIN_MODEL_LEN:
        raise ModelError(
            f"--max-model-len must be at least {MIN_MODEL_LEN} tokens, or 0 for the model's own "
            f"limit; given: {longest}."
        )
    # Dynamic scaling is made for going beyond; every other kind ends where the model does.
    if longest > model.max_position_embeddings and model.rope.kind != "dynamic":
        raise ModelError(
            f"--max-model-len ({longest}) is above the model's {model.max_position_embeddings} "
            "positions (max_position_embeddings)."
        )
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else FLOAT8
    per_block = block_nbytes(model, config.block_size, kv_dtype)
    memory = config.kv_cache_memory or _free_memory(model, device, dtype)
    num_blocks = config.num_blocks or memory // per_block
    if num_blocks * config.block_size < longest:
        needed = -(-longest // config.block_size) * per_block
        raise ModelError(
            f"The KV cache has room for {num_blocks * config.block_size} tokens, less than one "
            f"request of {longest}: raise --kv-cache-memory to at least {needed} bytes "
            f"({-(-needed >> 20)} MiB), or lower --max-model-len."
        )
    return replace(
        config,
        dtype=dtype,
        kv_cache_dtype=kv_dtype,
        device=device,
        max_model_len=longest,
        num_blocks=num_blocks,
        max_num_batched_tokens=config.max_num_batched_tokens
        or max(STEP_TOKENS[device], config.max_num_seqs),
    )


def weight_nbytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of the weights on the device."""
    return sum(spec.nbytes(DTYPES[dtype]) for spec in weight_specs(model).values())


def _free_memory(model: ModelConfig, device: str, dtype: str) -> int:
    """Bytes for the KV pool where nobody said how many: on a GPU what is free, less the weights
    that are about to be loaded and a tenth of it all for activations and recorded graphs."""
    if device == "cpu":
        return CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info()
    weights = weight_nbytes(model, dtype)
    room = free - weights - total // 10
    if room <= 0:
        raise ModelError(
            f"The weights take {weights >> 20} MiB of the "
            f"{free >> 20} MiB that are free on the GPU, which leaves no room for a KV cache."
        )
    return room


def _load(
    folder: Path, model: ModelConfig, config: EngineConfig, progress: loading.Progress
) -> tuple[Decoder, str]:
    """The decoder and the digest of its weights."""
    dtype, specs = DTYPES[config.dtype], weight_specs(model)
    if config.load_format == "dummy":
        tensors = loading.dummy_weights(
            specs, dtype=dtype, device=config.device, seed=config.seed, progress=progress
        )
        digest = loading.dummy_digest(config.seed)
    else:
        tied = frozenset({OUTPUT}) if model.tie_word_embeddings else frozenset()
        optional = tied | scale_names(model.num_layers)
        tensors = loading.load_weights(
            folder, specs, dtype=dtype, device=config.device, optional=optional, progress=progress
        )
        if config.kv_cache_dtype == FLOAT8:
            tensors |= read_scales(folder, model.num_layers)
        digest = loading.weights_digest(folder)
    weights = loading.Weights(tensors, {})
    if model.quantization is not None:
        scheme = model.quantization.scheme
        weights = loading.assemble(tensors, quantized_layers(model), scheme, config.device)
        _compile(weights, dtype, config.batch_invariant)
    decoder = Decoder(
        model, weights, config.max_model_len, config.device, invariant=config.batch_invariant
    )
    return decoder, digest


def _compile(weights: loading.Weights, dtype: torch.dtype, invariant: bool) -> None:
    """The kernels of every shape of quantised layer."""
    found = {}
    for name, weight in weights.quantized.items():
        bias = weights.get(name + ".bias")
        found[weight.rows, weight.columns, bias is None] = weight, bias
    for weight, bias in found.values():
        kernels.compile_products(weight, dtype, bias, invariant=invariant)
