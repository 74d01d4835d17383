"""The sentence this project lives by: the same tokens on every topology, and as transformers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from live_cluster import Cluster, metrics
from openai import AsyncOpenAI
from quantised_checkpoints import quantise_checkpoint
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.timeout(300)

TOPOLOGIES = {
    "1P+1D over shared memory": ("--prefill", 1, "--decode", 1, "--transport", "shm"),
    "1P+1D over TCP": ("--prefill", 1, "--decode", 1, "--transport", "tcp"),
    "2P+2D": ("--prefill", 2, "--decode", 2),
    "colocated": ("--colocated", 1),
}
OPTIONS = (
    "--dtype", "float32", "--kv-cache-memory", "64MiB", "--block-size", 16,
    "--max-num-batched-tokens", 64, "--max-num-seqs", 32,
)  # fmt: skip
NEW_TOKENS = 12
VOCAB = 500
SHARED = random.Random(7).choices(range(10, VOCAB), k=70)


def prompts() -> list[list[int]]:
    """One token; a block and its neighbours; several chunks; a long shared prefix."""
    rng = random.Random(1)
    alone = [
        rng.choices(range(10, VOCAB), k=length) for length in (1, 15, 16, 17, 32, 150, 201, 330)
    ]
    return alone + [[*SHARED, *rng.choices(range(10, VOCAB), k=n)] for n in (1, 10, 11, 26)]


@torch.inference_mode()
def expected(model: Any, prompt: list[int]) -> list[int]:
    """Greedy by hand: `generate` has no way to run on past eos without touching the logits."""
    tokens, past, fed = list(prompt), None, list(prompt)
    for _ in range(NEW_TOKENS):
        out = model(torch.tensor([fed]), past_key_values=past, use_cache=True)
        past, fed = out.past_key_values, [int(out.logits[0, -1].argmax())]
        tokens += fed
    return tokens[len(prompt) :]


async def ask(client: AsyncOpenAI, prompt: list[int], **options: Any) -> list[int]:
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = await client.completions.create(
        model="m", prompt=prompt, max_tokens=NEW_TOKENS, extra_body=extra, **options
    )
    choice = answer.choices[0].model_dump()
    assert choice["finish_reason"] == "length"
    return choice["token_ids"]


async def everything(url: str) -> dict[str, list[list[int]]]:
    """Greedy one by one, greedy all at once, and seeded sampling all at once."""
    rng = random.Random(2)

    async def later(prompt: list[int], **options: Any) -> list[int]:
        await asyncio.sleep(rng.random() * 0.3)  # arrivals at random, not a wait for something
        return await ask(client, prompt, **options)

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        alone = [await ask(client, prompt, temperature=0) for prompt in prompts()]
        many = (prompts() * 2)[:16]
        together = await asyncio.gather(*(later(prompt, temperature=0) for prompt in many))
        seeded = await asyncio.gather(
            *(
                later(prompt, temperature=0.8, top_p=0.9, seed=index, frequency_penalty=0.3)
                for index, prompt in enumerate(many)
            )
        )
    return {"alone": alone, "together": list(together), "seeded": list(seeded)}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_topology_gives_the_tokens_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / architecture, architecture, "nano", seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = [expected(model, prompt) for prompt in prompts()]
    seeded: dict[str, list[list[int]]] = {}
    for name, topology in TOPOLOGIES.items():
        options = ("--model", folder, "--served-model-name", "m", *OPTIONS, *topology)
        with Cluster(*options) as cluster:
            answers = asyncio.run(everything(cluster.url))
            assert answers["alone"] == reference, name
            assert answers["together"] == (reference * 2)[:16], name
            seeded[name] = answers["seeded"]
            cluster.wait_until_clean()
            states = [metrics(w["host"], w["http_port"]) for w in cluster.workers()]
            moved, early = (
                sum(state[key] for state in states) for key in ("bytes_in", "tickets_early")
            )
            assert (moved > 0) is (name != "colocated"), f"{name} moved {moved} bytes of KV"
            assert (early > 0) is (name != "colocated"), f"{early} early tickets: {name}"
    first = seeded.pop("colocated")
    assert first != (reference * 2)[:16], "the seeded requests were greedy"
    for name, tokens in seeded.items():
        assert tokens == first, name


def test_layers_that_travel_early_give_the_same_tokens(tmp_path: Path) -> None:
    """Prompts of one step, whose KV is large: it leaves while later layers are computed."""
    wide = {"num_key_value_heads": 8, "num_attention_heads": 8, "head_dim": 256}
    folder = make_checkpoint(tmp_path / "wide", "qwen3", "tiny", seed=3, **wide)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [prompt for prompt in prompts() if len(prompt) >= 128]
    options = [*OPTIONS, "--served-model-name", "m", "--model", folder]
    options[options.index("64MiB")] = "256MiB"
    options[options.index(64)] = 512
    for transport in ("shm", "tcp"):
        topology = ("--prefill", 1, "--decode", 1, "--transport", transport)
        with Cluster(*options, "--max-model-len", 1024, *topology) as cluster:
            assert asyncio.run(greedy(cluster.url, asked)) == [expected(model, p) for p in asked]
            cluster.wait_until_clean()
            states = [metrics(w["host"], w["http_port"]) for w in cluster.workers()]
            assert sum(state["tickets_early"] for state in states) == len(asked)


@pytest.mark.slow
def test_batch_invariant_bfloat16_tokens_are_the_same_alone_together_and_apart(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path / "moe", "qwen3moe", "nano", seed=3, dtype="bfloat16")
    options = [*OPTIONS, "--served-model-name", "m", "--batch-invariant", "--model", folder]
    options[options.index("float32")] = "bfloat16"
    found = {}
    for name in ("1P+1D over shared memory", "colocated"):
        with Cluster(*options, *TOPOLOGIES[name]) as cluster:
            found[name] = asyncio.run(everything(cluster.url))
            assert found[name]["together"] == (found[name]["alone"] * 2)[:16], name
            cluster.wait_until_clean()
    apart, colocated = found.values()
    assert apart == colocated


async def greedy(url: str, asked: list[list[int]] | None = None) -> list[list[int]]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return await asyncio.gather(
            *(ask(client, prompt, temperature=0) for prompt in asked or prompts())
        )


@pytest.mark.slow
def test_float8_kv_gives_the_same_tokens_on_one_worker_and_on_two(tmp_path: Path) -> None:
    """Moved as the bytes that they are; invariant, as e4m3 turns a last bit into six per cent."""
    folder = make_checkpoint(tmp_path / "qwen3", "qwen3", "nano", seed=3)
    options = (*OPTIONS, "--served-model-name", "m", "--batch-invariant", "--model", folder)
    found = []
    for name in ("1P+1D over shared memory", "1P+1D over TCP", "colocated"):
        with Cluster(*options, "--kv-cache-dtype", "fp8", *TOPOLOGIES[name]) as cluster:
            found.append(asyncio.run(greedy(cluster.url)))
            cluster.wait_until_clean()
    assert found[0] == found[1] == found[2]


def test_a_quantised_checkpoint_gives_the_tokens_of_its_dequantised_twin(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "qwen3", "qwen3", "nano", seed=3)
    quantised, twin = quantise_checkpoint(folder, tmp_path, "gptq_v2 act-order")
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    reference = [expected(model, prompt) for prompt in prompts()]
    for topology in ("1P+1D over shared memory", "colocated"):
        options = ("--model", quantised, "--served-model-name", "m", *OPTIONS)
        with Cluster(*options, *TOPOLOGIES[topology]) as cluster:
            assert asyncio.run(greedy(cluster.url)) == reference, topology
            cluster.wait_until_clean()
