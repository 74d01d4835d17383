"""The demo model behind a real cluster, through the official client, on both topologies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from live_cluster import PDSERVE, Cluster
from openai import BadRequestError, NotFoundError, OpenAI

from pdserve.demo.questions import QUESTIONS, answers

pytestmark = pytest.mark.timeout(180)

TOPOLOGIES = {"disaggregated": ("--prefill", 1, "--decode", 1), "colocated": ("--colocated", 1)}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(*TOPOLOGIES[request.param], "--kv-cache-memory", "256MiB") as cluster:
        yield cluster
        cluster.wait_until_clean()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: OpenAI, question: str) -> str:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": question}], temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


def test_answers_have_meaning(client: OpenAI) -> None:
    wrong = {
        question: answer
        for question, needles in QUESTIONS
        if not answers(answer := ask(client, question), needles)
    }
    assert not wrong


def test_streaming_gives_the_same_text_and_usage(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "What is a prefill worker?"}]
    whole = client.chat.completions.create(
        model="demo", messages=messages, temperature=0.7, seed=5, max_tokens=60
    )
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=messages, temperature=0.7, seed=5, max_tokens=60, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 5, "the answer came in one piece"


def test_logprobs_of_the_first_token_too(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello!"}], temperature=0,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) >= answer.usage.completion_tokens - 1
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_several_choices_differ_and_repeat(client: OpenAI) -> None:
    def texts() -> list[str]:
        answer = client.completions.create(
            model="demo", prompt="Once", n=3, temperature=1.5, seed=9, max_tokens=12
        )
        return [choice.text for choice in answer.choices]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_stop_strings_are_cut_wherever_they_come(client: OpenAI) -> None:
    whole = ask(client, "Count to 5.")
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Count to 5."}], temperature=0,
        stop=[middle],
    )  # fmt: skip
    assert answer.choices[0].message.content == whole[: whole.index(middle)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_repeated_prompt_is_cached(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about prefix caches. " * 12}]
    first, second = (
        client.chat.completions.create(model="demo", messages=messages, max_tokens=2).usage
        for _ in range(2)
    )
    stored = first.prompt_tokens_details.created_cache_tokens
    assert stored > 50 and first.prompt_tokens_details.cached_tokens < first.prompt_tokens - stored
    assert second.prompt_tokens_details.cached_tokens >= stored
    assert second.prompt_tokens_details.created_cache_tokens == 0


def test_bad_requests_name_their_field_and_the_cluster_goes_on(client: OpenAI) -> None:
    message = {"role": "user", "content": "x"}
    with pytest.raises(NotFoundError) as unknown:
        client.chat.completions.create(model="nope", messages=[message])
    assert unknown.value.param == "model"
    for field, bad in {
        "temperature": {"temperature": 3},
        "messages": {"messages": []},
        "max_tokens": {"max_tokens": -1},
        "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    }.items():
        with pytest.raises(BadRequestError) as refused:
            client.chat.completions.create(**{"model": "demo", "messages": [message], **bad})
        assert field in (refused.value.param or "") + str(refused.value)
    with pytest.raises(BadRequestError, match="4096"):
        client.completions.create(model="demo", prompt=[5] * 5000)
    assert ask(client, "Hello!")


def test_utilities(cluster: Cluster, client: OpenAI) -> None:
    with httpx.Client(base_url=cluster.url) as http:
        tokens = http.post("/tokenize", json={"model": "demo", "prompt": "Hello, wörld 🎈"}).json()
        text = http.post("/detokenize", json={"model": "demo", "tokens": tokens["tokens"]}).json()
        assert text["prompt"] == "Hello, wörld 🎈"
        assert http.get("/health").status_code == 200
        assert http.get("/ping").status_code == 200
        assert "version" in http.get("/version").json()
        assert "pdserve" in http.get("/metrics").text
        assert http.get("/docs").status_code == 200
    assert client.models.retrieve("demo").id == "demo"


def test_the_router_is_light(cluster: Cluster) -> None:
    for child in psutil.Process(cluster.process.pid).children():
        if any("pdserve.router" in word for word in child.cmdline()):
            assert child.memory_info().rss < 300 * 2**20
            assert not any("libtorch" in entry.path for entry in child.memory_maps())
            return
    raise AssertionError("no router among the launcher's children")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    """Processes, listening sockets, shared memory, temporary files: all gone within 5 s."""
    env = {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    shared_before = set(os.listdir("/dev/shm"))
    with Cluster("--kv-cache-memory", "64MiB", env=env) as cluster:
        family = [cluster.process.pid]
        family += [p.pid for p in psutil.Process(cluster.process.pid).children(recursive=True)]
        assert len(family) >= 5
        begun = time.monotonic()
        cluster.process.send_signal(number)
        assert cluster.process.wait(10) == 0
        assert time.monotonic() - begun < 5
        assert not [pid for pid in family if psutil.pid_exists(pid)]
    assert set(os.listdir("/dev/shm")) <= shared_before
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{cluster.url}/health")


def test_children_do_not_outlive_a_killed_launcher() -> None:
    with pytest.raises(AssertionError, match="ended with -9"), Cluster() as cluster:
        family = psutil.Process(cluster.process.pid).children(recursive=True)
        cluster.process.kill()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive


def test_status_speaks_to_people(cluster: Cluster) -> None:
    command = [PDSERVE, "status", "--pid", str(cluster.process.pid)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    for worker in cluster.workers():
        assert worker["worker_id"] in text
        assert str(worker["epoch"]) in text
