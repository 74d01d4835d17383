"""Compile every Triton kernel to machine code, without a GPU: run by test_triton_compiles.py in a
process of its own, because one process either interprets or compiles.

    python -P tests/kernels/compile_all.py 90
    python -P tests/kernels/compile_all.py 90 table    every configuration that may be measured
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pdserve.kernels import (
    configs,
    triton_activation,
    triton_blocks,
    triton_cache,
    triton_decode,
    triton_experts,
    triton_filters,
    triton_matmul,
    triton_norm,
    triton_prefill,
    triton_quantized,
    triton_sampling,
    triton_sums,
    triton_wire,
)
from pdserve.kernels.quantized_weight import QuantizedWeight

SCALARS = {
    "eps": "fp32",
    "scale": "fp32",
    "soft_cap": "fp32",
    "k_scale": "fp32",
    "v_scale": "fp32",
}
"""Types of arguments that are not pointers and not integers."""
POINTERS = {
    "slot_ptr": "*i64",
    "context_ptr": "*i64",
    "query_start_ptr": "*i64",
    "table_ptr": "*i64",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "zero_ptr": "*i32",
    "piece_ptr": "*fp32",
    "top_ptr": "*fp32",
    "sum_ptr": "*fp32",
    "above_ptr": "*i64",
    "logit_ptr": "*fp32",
    "expert_ptr": "*i64",
    "matrix_ptr": "*i64",
    "order_ptr": "*i64",
    "offset_ptr": "*i64",
    "row_ptr": "*i64",
    "token_ptr": "*i64",
    "count_ptr": "*i64",
    "presence_ptr": "*fp32",
    "frequency_ptr": "*fp32",
    "repetition_ptr": "*fp32",
    "mask_ptr": "*i32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i64",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "least_ptr": "*fp32",
    "seed_ptr": "*i64",
    "position_ptr": "*i64",
    "maximum_ptr": "*fp32",
    "list_ptr": "*i32",
    "winner_ptr": "*i64",
    "pool_ptr": "*i32",
    "buffer_ptr": "*i32",
    "id_ptr": "*i64",
    "scale_ptr": "*fp32",
    "source_id_ptr": "*i64",
    "target_id_ptr": "*i64",
    "total_ptr": "*i64",
}
"""Types of pointers; all others have the dtype under test."""

FLOAT8 = {"cache_ptr": "*fp8e4nv"}
SHAPE = {"HEADS": 32, "DIM": 128, "DIM_PAD": 128, "SIZE": 16, "KV_HEADS": 8}
MATMUL = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 128}
DECODE = {**SHAPE, "QUERIES": 1, "WINDOW": 0, "SPLIT": 256, "MOST_SPLITS": 32}


def quantized_case(
    kind: str, group: int, *, many: bool
) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The product with a 4096 × 4096 weight, by the tile that such a weight gets."""
    size = 4096
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kind, torch.int32)
    shape = {"awq": (size, size // 8), "gptq": (size // 8, size)}.get(kind, (size, size))
    small = stored != torch.int32
    weight = QuantizedWeight(
        packing="bytes" if small else kind,
        values=torch.empty(shape, dtype=stored, device="meta"),
        zeros=None if small else torch.empty(size // group, size // 8, device="meta").int(),
        scales=torch.empty(size // group, size, device="meta"),
        group=group,
        columns=size,
    )
    tile = triton_quantized.tile_for(weight, torch.bfloat16, many=many)
    constants = {
        "KIND": kind,
        "GROUP": group % size,
        "ZERO_OFFSET": int(kind == "gptq"),
        "ORDERED": kind == "gptq",
        "BIASED": many,
        "ROWS": tile.rows,
        "WIDTH": tile.width,
        "COLUMNS": tile.columns,
        "SPLITS": tile.splits,
    }
    absent = {"zero_ptr": small, "order_ptr": kind != "gptq", "bias_ptr": not many}
    constants |= {name: None for name, gone in absent.items() if gone}
    values = {"int8": "*i8", "fp8": "*u8"}.get(kind, "*i32")
    out = {"out_ptr": "*fp32"} if tile.splits > 1 else {}
    return triton_quantized.quantized_kernel, constants, {"value_ptr": values, **out}


CASES: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
    (triton_norm.rms_norm_kernel, {"WIDTH": 4096, "BLOCK": 4096, "ROWS": 1, "ADDS": True}, {}),
    *[
        (
            triton_sums.summing_kernel,
            {
                **{name: getattr(triton_sums, name) for name in ("C0", "C1", "C2", "C3")},
                "COPIES": copies,
                "BLOCK": triton_sums.BLOCK,
            },
            {"source_ptr": "*i64", "target_ptr": "*i64"},
        )
        for copies in (True, False)
    ],
    (triton_norm.rms_norm_kernel, {"WIDTH": 80, "BLOCK": 128, "ROWS": 32, "ADDS": False}, {}),
    *[
        (triton_activation.gated_kernel, {"KIND": kind, "BLOCK": 1024}, {})
        for kind in ("silu", "erf", "tanh")
    ],
    *[
        (
            triton_cache.rope_store_kernel,
            {
                "QUERY_HEADS": heads[0],
                "KV_HEADS": heads[1],
                "DIM": 128,
                "HALF": 64,
                "SIZE": 16,
                "QUERY_BLOCKS": heads[0] // 8,
                "HEADS": 8,
                "TURNS": turns,
                "INTERLEAVED": interleaved,
                "NORMED": turns and heads[1] > 0,
                "FLOAT8": float8,
            },
            {"key_ptr": "model", "value_ptr": "model", **(FLOAT8 if float8 else {})},
        )
        for heads, turns, interleaved, float8 in [
            ((32, 8), True, False, False),
            ((32, 8), True, False, True),
            ((32, 0), True, True, False),
            ((0, 8), False, False, False),
            ((0, 8), False, False, True),
        ]
    ],
    *[
        (
            triton_prefill.prefill_kernel,
            {
                **SHAPE,
                "GROUP": 4,
                "GROUP_PAD": 4,
                "TOKENS": 32,
                "ROWS": 128,
                "KEYS": 64,
                "WINDOW": window,
                "CAPPED": capped,
                "UNIFORM": uniform,
            },
            cache,
        )
        for window, capped, uniform, cache in [
            (0, False, False, {}),
            (0, False, True, {}),
            (100, True, False, {}),
            (0, False, False, FLOAT8),
        ]
    ],
    *[
        (
            triton_decode.decode_kernel,
            {**DECODE, "WINDOW": window, "GROUP": 4, "ROWS": 16, "KEYS": 64, "CAPPED": capped},
            cache,
        )
        for window, capped, cache in [(0, False, {}), (100, True, {}), (0, False, FLOAT8)]
    ],
    (
        triton_decode.combine_kernel,
        {
            **{key: DECODE[key] for key in DECODE if key not in ("SIZE", "KV_HEADS")},
            "SPLITS_PAD": 32,
        },
        {},
    ),
    *[
        (
            triton_blocks.copy_blocks_kernel,
            {
                "LOTS": 72,
                "SIZE": 16,
                "OTHER": other,
                "WIDTH": 512,
                "FIRST": 0,
                "TAKEN": taken,
                "TILE": 2048,
                "GATHERS": gathers,
            },
            {},
        )
        for other, taken, gathers in [(16, 512, True), (16, 256, False), (32, 512, True)]
    ],
    *[
        (
            triton_wire.wire_kernel,
            {
                "LOTS": 72,
                "SIZE": 16,
                "OTHER": 16,
                "POOL_HEADS": 8,
                "FIRST": 0,
                "HEADS": 8,
                "DIM": 128,
                "DIM_PAD": 128,
                "ROWS": 64,
                "DATA_BLOCK": 1216512,
                "SCALE_BLOCK": 304128,
                "LARGEST": 127.0 if rounds else 448.0,
                "ROUNDS": rounds,
                "PACKS": packs,
            },
            {"pool_ptr": "model", "data_ptr": "*i8" if rounds else "*fp8e4nv"},
        )
        for rounds in (True, False)
        for packs in (True, False)
    ],
    *[(triton_matmul.linear_kernel, {**MATMUL, "BIASED": biased}, {}) for biased in (False, True)],
    *[
        (triton_experts.grouped_kernel, {**MATMUL, "KIND": kind}, {})
        for kind in ("silu", "erf", "")
    ],
    (
        triton_experts.route_kernel,
        {"COUNT_PAD": 128, "ACTIVE": 8, "ACTIVE_PAD": 8, "RENORMALISE": True},
        {"logit_ptr": "model"},
    ),
    (triton_experts.combine_kernel, {"ACTIVE": 8, "BLOCK": 1024}, {}),
    (triton_sampling.penalties_kernel, {"BLOCK": 256}, {}),
    (triton_sampling.bitmask_kernel, {"CHUNK": 4096}, {}),
    (triton_sampling.statistics_kernel, {"CHUNK": 4096, "GROUP": 64}, {}),
    (triton_filters.maxima_kernel, {"CHUNK": 4096, "GROUP": 64}, {}),
    (
        triton_filters.threshold_kernel,
        {"CHUNKS_PAD": 64, "GROUPS_PAD": 4096, "GROUP": 64, "TILE": 4096, "WIDER": 16},
        {},
    ),
    (triton_sampling.near_race_kernel, {"CHUNK": 4096}, {"key_ptr": "*fp32"}),
    (
        triton_sampling.race_kernel,
        {
            "CHUNK": 4096,
            "CHUNKS_PAD": 64,
            "AHEAD": triton_sampling.AHEAD,
            "SLACK": triton_sampling.SLACK,
        },
        {"key_ptr": "*fp32"},
    ),
    *[
        quantized_case(kind, group, many=many)
        for kind, group, many in [
            ("int8", 4096, False),
            ("fp8", 128, True),
            ("awq", 128, False),
            ("awq", 128, True),
            ("gptq", 32, False),
        ]
    ],
    (
        triton_quantized.dequantize_kernel,
        {
            "KIND": "awq",
            "GROUP": 128,
            "ZERO_OFFSET": 0,
            "ORDERED": False,
            "order_ptr": None,
            "WIDTH": 128,
            "COLUMNS": 64,
        },
        {"value_ptr": "*i32"},
    ),
    (triton_quantized.combine_splits_kernel, {"SPLITS": 4, "BIASED": True, "BLOCK": 1024}, {}),
]


ALIGNED = {"query_token", "query_head", "cache_block", "cache_kind", "x_row", "weight_row"}
ALIGNED |= {"source_row", "width", "columns"}
"""Numbers that are multiples of 16 in real launches, as pointers are. Without saying so nothing
would be loaded ahead, and the shared memory would be that of no real launch."""
ANYWHERE = {"query_start_ptr", "context_ptr", "table_ptr", "id_ptr", "source_id_ptr"}
ANYWHERE |= {"target_id_ptr"}
"""Pointers into the middle of a step's or an order's numbers. Were a kernel specialised on how they
are aligned, it would be compiled again while requests wait."""


def table() -> list[tuple[Any, dict[str, Any], dict[str, str], str, dict[str, int]]]:
    """Every entry of configs.TABLE that has stages, with its kernel's first case."""
    kernels = {
        "attention_prefill": triton_prefill.prefill_kernel,
        "attention_decode": triton_decode.decode_kernel,
        "linear": triton_matmul.linear_kernel,
        "mixture": triton_experts.grouped_kernel,
    }
    found = []
    for operation, entries in configs.TABLE.items():
        public, _, wide = operation.partition(" ")
        if public not in kernels:
            continue
        constants, given = next(rest for kernel, *rest in CASES if kernel is kernels[public])
        for entry in entries:
            constants = {**constants, **{key: entry[key] for key in entry if key in constants}}
            if public == "attention_prefill":
                constants["TOKENS"] = constants["ROWS"] // constants["GROUP_PAD"]
            options = {
                key: entry[key] for key in ("num_warps", "num_stages", "maxnreg") if key in entry
            }
            found.append((kernels[public], constants, given, "fp32" if wide else "bf16", options))
    return found


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    given: dict[str, str],
    dtype: str,
    capability: int,
    options: dict[str, int] | None = None,
) -> int:
    """Compile for one dtype; returns the bytes of shared memory that it takes."""
    anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    missing = ANYWHERE.intersection(kernel.arg_names) - anywhere
    assert not missing, f"{kernel.__name__} is specialised on the alignment of {missing}."
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = given.get(name, POINTERS.get(name, "model"))
            signature[name] = f"*{dtype}" if kind == "model" else kind
        else:
            signature[name] = SCALARS.get(name, "i32")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants
        and name not in anywhere
        and (name.endswith("_ptr") or name in ALIGNED)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = options or {"num_warps": 8 if kernel.__name__ == "prefill_kernel" else 4}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


def main() -> None:
    capability = int(sys.argv[1])
    if sys.argv[2:] == ["table"]:
        for kernel, constants, given, dtype, options in table():
            shared = compile_kernel(kernel, constants, given, dtype, capability, options)
            name = f"{kernel.__name__} {dtype} {options}".replace(":", "")
            print(f"{name}: {shared} bytes of shared memory", flush=True)
        return
    for kernel, constants, given in CASES:
        for dtype in ("bf16", "fp16", "fp32") if len(sys.argv) > 2 else ("bf16",):
            shared = compile_kernel(kernel, constants, given, dtype, capability)
            print(f"{kernel.__name__} {dtype}: {shared} bytes of shared memory", flush=True)


if __name__ == "__main__":
    main()
