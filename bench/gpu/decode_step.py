"""What a decode step costs beside reading its weights once: a model with random weights, its steps
recorded as CUDA graphs, logits and the choice of a token included.

    python -P bench/gpu/decode_step.py --shape qwen3-8b --batches 1 64 --json OUT
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from pdserve.bench.kernel_cases import Run
from pdserve.bench.kernels import Clock, ceilings
from pdserve.engine.build import QUANTIZATIONS, quantized
from pdserve.engine.config import ModelConfig, model_config
from pdserve.engine.graphs import DecodeGraphs, cuda_capture
from pdserve.engine.models.checkpoint import EMBEDDING, quantized_layers, weight_specs
from pdserve.engine.models.decoder import Batch, Decoder
from pdserve.engine.pool import KVPool
from pdserve.engine.weights import Weights, assemble

BLOCK = 16
DTYPE = "bfloat16"
PROFILED, SHOWN = 5, 15
"""Steps of a profile, and lines of it."""
COMMON = {"dtype": DTYPE, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-30b-a3b": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "tiny": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="sizes of a step")
    parser.add_argument("--context", type=int, default=512, help="tokens cached per sequence")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeat", type=int, default=30, help="timed steps (default 30)")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--quantization", choices=("none", *QUANTIZATIONS), default="none")
    parser.add_argument("--profile", action="store_true",
                        help="print which kernels the step's time goes to")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("decode_step: error: torch finds no CUDA device here.", file=sys.stderr)
        sys.exit(2)
    raw = dict(SHAPES[args.shape])
    raw["num_hidden_layers"] = args.layers or raw["num_hidden_layers"]
    with torch.inference_mode():
        rows = measure(quantized(model_config(raw), args.quantization), args)
    if args.json is not None:
        args.json.write_text(json.dumps(rows))


def measure(model: ModelConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per batch size; prints each."""
    device, width = args.device, -(-args.context // BLOCK)
    weights = random_weights(model, device)
    decoder = Decoder(model, weights, args.context, device, invariant=args.batch_invariant)
    pool = KVPool(
        model,
        num_blocks=max(args.batches) * width,
        block_size=BLOCK,
        dtype=DTYPE,
        device=device,
    )
    try:
        pool.tensor.normal_()
        graphs = DecodeGraphs(
            decoder,
            [pool.layer(index) for index in range(model.num_layers)],
            sizes=sorted(args.batches),
            blocks=width,
            device=device,
            capture=cuda_capture() if device == "cuda" else as_it_is,
        )
        clock = Clock(device, args.repeat)
        copy, _ = ceilings(clock, device, torch.bfloat16, small=device == "cpu")
        rows = []
        for size in args.batches:
            batch = steps(size, args.context, width, device)
            seconds = clock.seconds(lambda batch=batch: token_of(decoder, graphs, batch))  # type: ignore[misc]
            nbytes = bytes_read(model, weights, size)
            floor = nbytes / copy / 1e9
            rows.append(
                {
                    "name": f"decode step {args.shape} x {model.num_layers} layers, batch {size}"
                    + (" invariant" if args.batch_invariant else "")
                    + (f" {args.quantization}" if model.quantization is not None else ""),
                    "milliseconds": seconds * 1e3,
                    "weight_bytes": nbytes,
                    "copy_gb_s": copy,
                    "ratio": seconds / floor,
                }
            )
            print(
                f"{rows[-1]['name']}: {seconds * 1e3:.3f} ms, {seconds / floor:.2f} x the time to "
                f"read {nbytes / 1e9:.2f} GB of weights at {copy:.0f} GB/s",
                flush=True,
            )
            if args.profile:
                profile(lambda batch=batch: token_of(decoder, graphs, batch), device)  # type: ignore[misc]
        return rows
    finally:
        pool.close()


def profile(run: Run, device: str) -> None:
    """The time of `PROFILED` runs by the name of the kernel (on a CPU: of the operation), as
    microseconds, calls and share of one; the rest of the wall time is between kernels."""
    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    run()
    with torch.profiler.profile(activities=[activity]) as found:
        begin = time.perf_counter()
        for _ in range(PROFILED):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - begin) / PROFILED * 1e6
    spent = [
        (item.self_device_time_total if on_gpu else item.self_cpu_time_total, item)
        for item in found.key_averages()
    ]
    spent.sort(key=lambda pair: pair[0], reverse=True)
    total = sum(microseconds for microseconds, _ in spent) / PROFILED
    print(f"  {'kernel':80} {'us':>9} {'calls':>7} {'share':>6}")
    for microseconds, item in spent[:SHOWN]:
        each = microseconds / PROFILED
        print(f"  {item.key[:80]:80} {each:9.1f} {item.count / PROFILED:7.1f} {each / total:6.1%}")
    print(f"  all kernels together {total:.1f} us of {wall:.1f} us, profiler included", flush=True)


def as_it_is(step: Any) -> Any:
    """No recording: for a dry run on the CPU."""
    return step


def token_of(decoder: Decoder, graphs: DecodeGraphs, batch: Batch) -> torch.Tensor:
    return decoder.logits(graphs.forward(batch)).argmax(-1)


def random_weights(model: ModelConfig, device: str) -> Weights:
    torch.manual_seed(0)
    tensors = {}
    for name, spec in weight_specs(model).items():
        shape = spec.shapes[0]
        tensors[name] = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if len(shape) > 1:
            tensors[name].normal_().mul_(0.02)
    if model.quantization is None:
        return Weights(tensors, {})
    return assemble(tensors, quantized_layers(model), model.quantization.scheme, device)


def steps(size: int, context: int, width: int, device: str) -> Batch:
    """`size` sequences whose newest token is the last of `context`, their blocks scattered."""
    table = torch.randperm(size * width, device=device).view(size, width)
    positions = torch.full((size,), context - 1, device=device)
    return Batch(
        token_ids=torch.randint(0, 1000, (size,), device=device),
        positions=positions,
        slots=table[:, (context - 1) // BLOCK] * BLOCK + positions % BLOCK,
        query_start=torch.arange(size + 1, device=device),
        context_lens=positions + 1,
        block_table=table,
        num_decodes=size,
    )


def bytes_read(model: ModelConfig, weights: Weights, size: int) -> float:
    """Of the weights, in one step: all but the embedding, and of the experts the share that
    `size` tokens with independent choices go to."""
    share = 1.0
    if model.experts is not None:
        share = 1 - math.pow(1 - model.experts.active / model.experts.count, size)
    tied = model.tie_word_embeddings
    plain = sum(
        tensor.nbytes * (share if ".experts." in name else 1.0)
        for name, tensor in weights.tensors.items()
        if tied or name != EMBEDDING
    )
    return plain + sum(weight.nbytes for weight in weights.quantized.values())


if __name__ == "__main__":
    main()
