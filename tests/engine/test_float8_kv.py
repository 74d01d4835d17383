"""--kv-cache-dtype fp8: the same tokens on one worker and across two, scales, what it weighs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stepping import Stepper

from pdserve.engine.build import Built
from pdserve.engine.config import ModelError

MakeModel = Callable[..., Path]
Build = Callable[..., Built]
PROMPTS = [random.Random(seed).choices(range(3, 590), k=length) for seed, length in
           enumerate((1, 15, 16, 17, 50))]  # fmt: skip
NEW_TOKENS = 10


def alone(built: Built, budget: int = 10**6) -> list[list[int]]:
    stepper = Stepper(built)
    return stepper.run([stepper.add(prompt) for prompt in PROMPTS], NEW_TOKENS, budget)


def handed_over(prefill: Built, decode: Built) -> list[list[int]]:
    """The prompts and first tokens on one, the rest on the other, the KV moved as bytes."""
    first, second = Stepper(prefill, seed=1), Stepper(decode, seed=2)
    source = [first.add(prompt) for prompt in PROMPTS]
    first.run(source, 1)
    moved = []
    for request in source:
        twin = second.add(request.token_ids[: request.prompt_len])
        count = -(-request.num_computed // prefill.pool.block_size)
        for mine, theirs in zip(request.block_table[:count], twin.block_table[:count], strict=True):
            decode.pool.view(theirs)[:] = prefill.pool.view(mine)
        twin.token_ids.append(request.token_ids[-1])
        twin.num_computed = request.num_computed
        moved.append(twin)
    return second.run(moved, NEW_TOKENS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_worker_and_two_give_the_same_tokens(
    dtype: str, make_model: MakeModel, build: Build
) -> None:
    folder = make_model("qwen3")
    options: dict[str, Any] = {"dtype": dtype, "kv_cache_dtype": "fp8", "batch_invariant": True}
    one, other = build(folder, **options), build(folder, **options)
    assert handed_over(one, other) == alone(build(folder, **options))


def test_tokens_are_near_those_of_wide_kv(make_model: MakeModel, build: Build) -> None:
    folder = make_model("llama")
    narrow, wide = build(folder, kv_cache_dtype="fp8_e4m3"), build(folder)
    assert narrow.pool.block_nbytes * 4 == wide.pool.block_nbytes
    assert narrow.fingerprint.dtype == "float8_e4m3fn"
    assert "dtype" in str(narrow.fingerprint.difference(wide.fingerprint))
    steppers = [Stepper(narrow), Stepper(wide)]
    logprobs = []
    for stepper in steppers:
        request = stepper.add(PROMPTS[4], prompt_logprobs=0)
        stepper.run([request], 1, budget=7)
        entries = [entry for result in stepper.results[request] for entry in result.prompt_logprobs]
        logprobs.append(torch.tensor([entry.logprob for entry in entries]))
    error = (logprobs[0] - logprobs[1]).abs().mean()
    assert 0 < error < 0.2  # of about 6: e4m3 has a relative error of up to 6 %


def with_scales(folder: Path, target: Path, scales: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with further tensors."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("names", ["self_attn.{}_scale", "self_attn.{}_proj.{}_scale"])
def test_scales_come_from_the_checkpoint(
    names: str, make_model: MakeModel, build: Build, tmp_path: Path
) -> None:
    folder = make_model("llama")
    scales = {
        f"model.layers.{layer}.{names.format(kind, kind)}": torch.tensor(0.5**layer / 2)
        for layer in (0, 1)
        for kind in "kv"
    }
    scaled = with_scales(folder, tmp_path / "scaled", scales)
    built = build(scaled, kv_cache_dtype="fp8")
    found = [(layer.attention.k_scale, layer.attention.v_scale)
             for layer in built.runner._decoder.layers]  # fmt: skip
    assert found == [(1 / 2, 1 / 2), (1 / 4, 1 / 4)]
    plain = build(folder, kv_cache_dtype="fp8")
    # Powers of two change nothing but what is tiny: the same answers, other bytes.
    assert alone(built) == alone(plain)
    assert not torch.equal(built.pool.tensor.view(torch.uint8), plain.pool.tensor.view(torch.uint8))
    assert "weights" in str(built.fingerprint.difference(plain.fingerprint))
    unused = build(scaled).runner._decoder.layers[0].attention
    assert (unused.k_scale, unused.v_scale) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ({"self_attn.k_scale": torch.tensor(0.0)}, "k_scale must be a positive number"),
        ({"self_attn.attn.v_scale": torch.ones(2)}, r"has the shape \[2\]; a KV cache has one"),
        (
            {"self_attn.k_scale": torch.ones(1), "self_attn.k_proj.k_scale": torch.ones(1)},
            "both are the K scale of layer 0",
        ),
    ],
    ids=["zero", "per head", "twice"],
)
def test_scales_that_make_no_sense_are_refused(
    scales: dict[str, torch.Tensor],
    sentence: str,
    make_model: MakeModel,
    build: Build,
    tmp_path: Path,
) -> None:
    named = {f"model.layers.0.{name}": tensor for name, tensor in scales.items()}
    folder = with_scales(make_model("llama"), tmp_path / "scaled", named)
    with pytest.raises(ModelError, match=sentence):
        build(folder, kv_cache_dtype="fp8")


def test_an_unknown_format_is_refused(make_model: MakeModel, build: Build) -> None:
    with pytest.raises(ModelError, match="auto, fp8 or fp8_e4m3, not 'int8'"):
        build(make_model("llama"), kv_cache_dtype="int8")
