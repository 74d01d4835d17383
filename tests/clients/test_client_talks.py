"""Clients that others wrote hold a conversation with tools: the call is forced, the rest is free.

Each is a script in an environment of its own (`make clients`), run as a child process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_cluster import Cluster

FOLDER = Path(__file__).parent
PYTHON = FOLDER.parents[1] / ".clients" / "bin" / "python"
QUESTION = "Please start more workers."
TALK_S = 400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not PYTHON.with_name("litellm").exists(),
        reason="The clients are not installed; `make clients` does it.",
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("--prefill", 1, "--decode", 1, "--enable-auto-tool-choice") as cluster:
        cluster.until_serving()
        yield cluster
        cluster.wait_until_clean()


def talks_of(name: str, url: str, home: Path) -> dict[str, Any]:
    """What the script got. Nothing of this environment (keys, proxies) reaches it."""
    done = subprocess.run(
        [str(PYTHON), str(FOLDER / f"{name}_talk.py"), url],
        capture_output=True,
        text=True,
        timeout=TALK_S,
        env={"HOME": str(home), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def expected(url: str, call: list[Any], result: str) -> tuple[str, int]:
    """The final answer and its prompt's length when the same conversation is sent by hand."""
    name, arguments = call
    function = {"name": name, "arguments": json.dumps(arguments)}
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": result},
    ]  # fmt: skip
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 300}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("name", ["langchain", "litellm", "agents"])
def test_a_tool_is_called_and_its_result_is_read(
    cluster: Cluster, name: str, tmp_path: Path
) -> None:
    found = talks_of(name, cluster.url, tmp_path)
    assert len(found["talks"]) == 4
    for how, talk in found["talks"].items():
        (call,) = talk["calls"]
        tool, arguments = call
        assert tool == "scale" and set(arguments) == {"kind", "count"}, how
        assert arguments["kind"] in ("prefill", "decode") and 1 <= arguments["count"] <= 9, how
        (result,) = talk["results"]
        assert result == f"{arguments['count']} {arguments['kind']} workers run now.", how
        text, prompt_tokens = expected(cluster.url, call, result)
        assert talk["text"] == text != "", how
        assert talk["prompt_tokens"][1] == prompt_tokens > talk["prompt_tokens"][0], how
        if how.endswith("streamed"):
            begun, ended = talk["pieces"]
            assert begun >= 1 and ended > 2, how  # arguments may come as one delta
    if "form" in found:
        assert found["form"]["kind"] in ("prefill", "decode")
        assert isinstance(found["form"]["enough"], bool)
