"""A cluster whose KV blocks travel packed: smaller, and the answers come."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster

pytestmark = pytest.mark.timeout(240)

LENGTHS = (33, 100, 150)
SIZE = 16
OPTIONS = (
    "--prefill", 1, "--decode", 1, "--served-model-name", "m", "--dtype", "float32",
    "--kv-cache-memory", "16MiB", "--block-size", SIZE, "--transport", "tcp",
    "--kv-wire-dtype", "int8", "--disaggregate", "always",
)  # fmt: skip


def block_nbytes(folder: Path) -> int:
    """Of a whole block in float32."""
    config = json.loads((folder / "config.json").read_text())
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads: int = config["num_hidden_layers"] * 2 * config["num_key_value_heads"]
    return heads * SIZE * int(dim) * 4


def test_blocks_travel_packed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "nano", "llama", "nano")
    rng = random.Random(2)
    with Cluster("--model", folder, *OPTIONS) as cluster:
        for length in LENGTHS:
            body = {"model": "m", "prompt": rng.choices(range(10, 400), k=length), "max_tokens": 8}
            answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).json()
            assert answer["usage"]["completion_tokens"] >= 1, answer
        cluster.wait_until_clean(5.0)
        decode = cluster.until_routed("decode")
    blocks = sum(-(-length // SIZE) for length in LENGTHS)
    assert decode["routes"] == {"prefill-0": "tcp"}
    received = decode["status"]["bytes_in"]
    assert 0.25 < received / (blocks * block_nbytes(folder)) < 0.5
