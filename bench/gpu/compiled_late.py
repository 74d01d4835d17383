"""What a worker still compiles after its start, which a request then waits for: a model with random
weights is started as a worker does it, then computes steps of all kinds, and moves blocks. The last
line says how many kernels were compiled meanwhile; exit code 1 if any was.

    python -P bench/gpu/compiled_late.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from pdserve import kernels
from pdserve.engine.build import Built, build_runner
from pdserve.engine.config import EngineConfig
from pdserve.engine.grammar import Matcher
from pdserve.engine.ports import Chunk
from pdserve.engine.request import Request
from pdserve.kv_transfer.cuda_ipc import open_ipc
from pdserve.kv_transfer.device import device_memory
from pdserve.kv_transfer.device_sums import index_of
from pdserve.kv_transfer.nccl import open_nccl
from pdserve.protocol.grammar import Constraint
from pdserve.protocol.sampling import SamplingParams

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
BLOCKS, BLOCK, LONGEST = 4096, 16, 1024
STEPS = 120
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {},
    {"top_k": 50, "top_p": 0.9},
    {"min_p": 0.1, "logprobs": 0},
    {"temperature": 0.0, "logprobs": 5},
    {"logprobs": 20, "presence_penalty": 0.5},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {5: 1.0}},
    {"prompt_logprobs": 3},
    {"constraint": Constraint(allowed=(1, 2, 3))},
    {"min_tokens": 9000, "eos_token_ids": (7,)},
)


class Compiled:
    """Notes what Triton compiles, or loads for the first time, from now on."""

    def __init__(self) -> None:
        self.names: list[str] = []
        triton.knobs.runtime.jit_post_compile_hook = self._note

    def _note(self, **told: Any) -> None:
        self.names.append(told["repr"])


def started(device: str, **options: Any) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        config = EngineConfig(
            device=device,
            num_blocks=BLOCKS,
            block_size=BLOCK,
            max_model_len=LONGEST,
            max_num_seqs=16,
            load_format="dummy",
            **options,
        )
        built = build_runner(Path(folder), config)
    for _ in range(2):  # as the start of a worker does
        built.runner.warm_up(built.config.max_model_len)
    return built


def steps(seed: int) -> Iterator[list[Chunk]]:
    """Some single tokens and some parts of prompts each, in all ways of drawing."""
    dice = random.Random(seed)
    for step in range(STEPS):
        singles, parts = dice.randrange(0, 14), dice.choice((0, 0, 1, 1, 2, 3))
        chunks, free = [], 0
        for number in range(max(1, singles + parts)):
            length = 1 if number < singles else dice.randrange(2, 300)
            start = dice.randrange(0, LONGEST - length)
            tokens = [dice.randrange(SHAPE["vocab_size"]) for _ in range(start + length)]
            way = WAYS[(step + number) % len(WAYS)]
            params = SamplingParams(seed=number, max_tokens=9999, **way)
            needed = -(-(start + length) // BLOCK)
            request = Request(
                request_id=f"{step}-{number}",
                token_ids=tokens,
                prompt_len=max(1, len(tokens) - dice.randrange(3)),
                sampling=params,
                deadline=0.0,
                root=b"",
                matcher=Matcher(params, None) if params.constraint else None,
                block_table=list(range(free, free + needed)),
            )
            free += needed
            chunks.append(Chunk(request, start, length, samples=length == 1 or step % 2 == 0))
        yield chunks


def move(pool: torch.Tensor, counts: Sequence[int]) -> None:
    """What transports between devices launch, for odd and even numbers of blocks."""
    memory = device_memory(pool)
    if memory is None:
        return
    words = memory.blocks.view(torch.int64)
    for count in counts:
        theirs, mine = index_of([range(count), range(count, 2 * count)], pool.device)
        kernels.copy_blocks_summed(words, theirs, words, mine)
        kernels.sum_blocks(words, mine)
        kernels.scatter_blocks(kernels.gather_blocks(memory.blocks, mine), memory.blocks, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    late: list[str] = []
    early, compiled = 0, Compiled()
    for options in ({}, {"batch_invariant": True}):
        built = started(args.device, **options)
        memory = device_memory(built.pool.tensor)
        opened = open_ipc(memory, "auto"), open_nccl(memory, "auto")
        early += len(compiled.names)
        compiled.names.clear()
        for chunks in steps(seed=1):
            built.runner.execute(chunks)
        if all(opened):
            move(built.pool.tensor, (1, 2, 3, 64))
        late += compiled.names
        compiled.names.clear()
        built.pool.close()
    for name in late:
        print(name[:400])
    if args.device == "cuda" and not early:
        sys.exit("the start compiled nothing: Triton does not tell, so nothing is known")
    print(
        f"{len(late)} kernels were compiled after the start ({early} by it), in {2 * STEPS} steps"
    )
    sys.exit(bool(late))


if __name__ == "__main__":
    main()
