"""`pdserve up --inject-faults`: transfers that go wrong change no answer and leave nothing."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx
import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster

pytestmark = pytest.mark.timeout(300)

OPTIONS = (
    "--prefill", 1, "--decode", 1, "--served-model-name", "m", "--dtype", "float32",
    "--kv-cache-memory", "64MiB", "--max-num-batched-tokens", 128,
)  # fmt: skip
FAULTS = "seed=11,drop=0.1,truncate=0.1,duplicate=0.1,reorder=0.1,flip=0.15,delay=0.1,delay_s=0.005"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_checkpoint(tmp_path_factory.mktemp("model") / "nano", "llama", "nano"))


def prompts(count: int) -> list[list[int]]:
    """Of many lengths, some with a prefix in common."""
    rng = random.Random(4)
    shared = rng.choices(range(10, 500), k=64)
    return [
        [*(shared if number % 3 == 0 else ()), *rng.choices(range(10, 500), k=rng.randint(1, 120))]
        for number in range(count)
    ]


async def answers(url: str, count: int) -> list[list[int]]:
    """The tokens of greedy answers, eight requests at a time."""
    gate = asyncio.Semaphore(8)

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
        body = {
            "model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        async with gate:
            answer = await client.post(f"{url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    async with httpx.AsyncClient(timeout=60) as client:
        return await asyncio.gather(*(ask(client, prompt) for prompt in prompts(count)))


def run(model: Path, count: int, *more: object) -> tuple[list[list[int]], str]:
    """The answers, and what the workers logged."""
    with Cluster("--model", model, *OPTIONS, *more) as cluster:
        got = asyncio.run(answers(cluster.url, count))
        cluster.wait_until_clean(3.0)
        logs = "".join(path.read_text() for path in cluster.log_dir.glob("*.log"))
    return got, logs


@pytest.mark.parametrize(
    "count", [60, pytest.param(400, marks=pytest.mark.slow)], ids=["60", "400"]
)
def test_faults_change_no_answer(model: Path, count: int) -> None:
    undisturbed, logs = run(model, count)
    assert "Injected faults" not in logs
    for transport in ("shm", "tcp"):
        disturbed, logs = run(model, count, "--transport", transport, "--inject-faults", FAULTS)
        assert disturbed == undisturbed, transport
        for fault in ("drop", "truncate", "duplicate", "reorder", "flip", "delay"):
            lines = [line for line in logs.splitlines() if "Injected faults" in line]
            assert any(fault in line for line in lines), f"{fault} never happened over {transport}"
