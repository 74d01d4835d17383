"""Prefill and decode workers whose KV pools differ: the same tokens, and the blocks do travel."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster

pytestmark = pytest.mark.timeout(240)

OPTIONS = (
    "--served-model-name", "m", "--dtype", "float32", "--kv-cache-memory", "32MiB",
    "--max-num-batched-tokens", 64, "--disaggregate", "always",
)  # fmt: skip
PROMPTS = [
    random.Random(length).choices(range(10, 400), k=length) for length in (5, 16, 33, 100, 150)
]


def answers(cluster: Cluster) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        body = {"model": "m", "prompt": prompt, "max_tokens": 10, "temperature": 0}
        extra = {"return_token_ids": True, "ignore_eos": True}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body | extra, timeout=60).json()
        found.append(answer["choices"][0]["token_ids"])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "nano", "qwen3", "nano", seed=3)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with Cluster("--model", folder, *OPTIONS, "--colocated", 1) as cluster:
        return answers(cluster)


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [(16, 8, "shm"), (8, 32, "tcp")],
    ids=["16 to 8 over shm", "8 to 32 over tcp"],
)
def test_block_sizes_may_differ(
    folder: Path, expected: list[list[int]], prefill: int, decode: int, transport: str
) -> None:
    sizes = (
        f"--prefill-options=--block-size {prefill}", f"--decode-options=--block-size {decode}"
    )  # fmt: skip
    options = (*OPTIONS, "--prefill", 1, "--decode", 1, "--transport", transport, *sizes)
    with Cluster("--model", folder, *options) as cluster:
        assert answers(cluster) == expected
        cluster.wait_until_clean()
        worker = cluster.until_routed("decode")
    assert worker["routes"] == {"prefill-0": transport}
    assert worker["status"]["bytes_in"] > 0


def test_other_dtypes_are_converted_where_that_is_asked_for(folder: Path) -> None:
    options = [*OPTIONS, "--prefill", 1, "--decode", 1, "--kv-convert"]
    options.append("--prefill-options=--dtype bfloat16")
    with Cluster("--model", folder, *options) as cluster:
        assert all(len(tokens) == 10 for tokens in answers(cluster))
        cluster.wait_until_clean()
        worker = cluster.until_routed("decode")
    assert worker["status"]["bytes_in"] > 0


def test_a_prefill_worker_that_nobody_can_fetch_from_is_named(
    folder: Path, expected: list[list[int]]
) -> None:
    options = [*OPTIONS, "--prefill", 1, "--decode", 1, "--disaggregate", "auto"]
    options[options.index("float32")] = "auto"  # as the checkpoint, which is what cannot be told
    options.append("--prefill-options=--dtype bfloat16")
    with Cluster("--model", folder, *options) as cluster:
        assert answers(cluster) == expected
        cluster.wait_until_clean()
        log = (cluster.log_dir / "router.log").read_text()
    assert "No decode worker can fetch KV blocks from prefill-0" in log
