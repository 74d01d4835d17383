"""Loads a model for a worker: what every role does before it composes its parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.cluster.model_files import resolve_model
from pdserve.cluster.records import ModelInfo
from pdserve.engine.blocks import BlockPool
from pdserve.engine.build import Built, build_runner, weight_nbytes
from pdserve.engine.config import EngineConfig
from pdserve.engine.estimate import token_flops
from pdserve.engine.grammar import Grammars
from pdserve.engine.loop import Engine, StepOutcome
from pdserve.engine.measuring import BlockLives, Measuring
from pdserve.engine.pace import LEAST_ON_CUDA_S, LEAST_S, Pace
from pdserve.engine.ports import Exporter, Importer
from pdserve.engine.scheduler import Limits
from pdserve.worker.assembly import Context


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, warm, with its pool."""

    built: Built
    grammars: Grammars
    pace: Pace
    """Of its engine; it has seen the warm-up."""
    family: str
    """Whose blocks this worker can take, and who can take its own (`LayoutFingerprint.family`)."""

    @property
    def info(self) -> ModelInfo:
        model, config = self.built.model, self.built.config
        return ModelInfo(
            architecture=model.architecture,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            vocab_size=model.vocab_size,
            block_size=config.block_size,
            fingerprint=self.family,
            token_flops=token_flops(model),
            weight_nbytes=weight_nbytes(model, config.dtype),
            token_nbytes=self.built.fingerprint.token_nbytes,
        )

    def engine(
        self,
        sink: Callable[[StepOutcome], None],
        *,
        exporter: Exporter | None = None,
        importer: Importer | None = None,
    ) -> Engine:
        """The engine over this model, not yet started."""
        config = self.built.config
        sample = config.kv_cache_metrics_sample
        lives = BlockLives(sample) if sample else None
        return Engine(
            pool=BlockPool(config.num_blocks, config.block_size, lives),
            limits=Limits(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                max_model_len=config.max_model_len,
            ),
            runner=self.built.runner,
            fingerprint=self.built.fingerprint,
            vocab_size=self.built.model.vocab_size,
            sink=sink,
            exporter=exporter,
            importer=importer,
            pace=self.pace,
            measuring=Measuring(lives, nans=config.compute_nans_in_logits),
        )


def load(context: Context) -> Loaded:
    """Read the weights and run a first small prompt. Raises PdserveError with a sentence."""
    settings = context.settings
    config = EngineConfig(
        block_size=settings.block_size,
        kv_cache_memory=settings.kv_cache_memory,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        device=settings.device,
        load_format=settings.load_format,
        quantization=settings.quantization,
        logprobs_mode=settings.logprobs_mode,
        batch_invariant=settings.batch_invariant,
        compute_nans_in_logits=settings.compute_nans_in_logits,
        kv_cache_metrics_sample=(
            settings.kv_cache_metrics_sample if settings.kv_cache_metrics else 0.0
        ),
        seed=settings.seed,
        threads=settings.threads or len(os.sched_getaffinity(0)),
    )
    folder = resolve_model(settings.model)
    context.progress(0.0, "loading weights")
    built = build_runner(folder, config, lambda share: context.progress(share, "loading weights"))
    context.progress(1.0, "warming up")
    pace = Pace(LEAST_ON_CUDA_S if built.config.device == "cuda" else LEAST_S)
    tokens = built.runner.warm_up(built.config.max_model_len)
    pace.turn()
    pace.compute(tokens)
    built.runner.warm_up(built.config.max_model_len)  # the first one set up libraries: no measure
    pace.turn()
    built.runner.progress = pace.advance
    family = built.fingerprint.family(converts=settings.kv_convert)
    return Loaded(built, Grammars(folder, built.model.vocab_size), pace, family)
