"""The router as a process: what it refuses to start with, what it weighs, how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PDSERVE_")},
    "PDSERVE_SECRET": "s",
}
COMMAND = [sys.executable, "-P", "-m", "pdserve.router"]


def refused(*options: str) -> str:
    done = subprocess.run(
        [*COMMAND, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "/nowhere"], "does not exist"),
        (["--chat-template", "/nope.jinja"], "looks like a file path, but it failed to be opened"),
        (["--chat-template", "{% for %}"], "malformed"),
        (["--default-chat-template-kwargs", "[1]"], "must be a JSON object"),
        (["--generation-config", "/nope.json"], "cannot be read"),
        (["--override-generation-config", '{"temperature": 9}'], "temperature must be in [0, 2]"),
        (["--redis", "http://x"], "Redis URL"),
        (["--max-queue", "0"], "--max-queue must be"),
        (["--uds", "/nowhere/socket"], "Cannot listen on /nowhere/socket: no such file"),
    ],
)
def test_what_it_cannot_start_with(options: list[str], sentence: str) -> None:
    assert sentence in refused(*options)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "tokenizer.json" in refused("--model", str(tmp_path))


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"Cannot listen on 127.0.0.1 port {port}" in refused("--port", str(port))


def test_a_server_without_workers() -> None:
    """It needs neither Redis nor a secret, and does not know what workers do."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PDSERVE_SECRET"}
    process = subprocess.Popen(
        [*COMMAND, "--render-only", "--port", "0", "--api-key", "k"],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "Serving on" in line)
        found = re.search(r"http://\S+", line)
        assert found is not None
        headers = {"authorization": "Bearer k"}
        with httpx.Client(base_url=found[0], headers=headers, trust_env=False) as client:
            for path in ("/health", "/ping", "/version", "/metrics", "/docs", "/v1/models"):
                assert client.get(path).status_code == 200, path
            hi = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
            rendered = client.post("/v1/chat/completions/render", json=hi).json()
            count = len(rendered["token_ids"])
            assert client.post("/tokenize", json=hi).json()["tokens"] == rendered["token_ids"]
            counted = client.post("/v1/messages/count_tokens", json=hi)
            assert counted.json()["input_tokens"] == count
            counted = client.post("/v1/responses/input_tokens", json={"input": "Hi"})
            assert counted.json()["input_tokens"] == count
            choice = {"token_ids": rendered["token_ids"][:3], "finish_reason": "length"}
            body = {
                "chat_request": hi,
                "prompt_tokens": count,
                "generate_response": {"request_id": "r", "choices": [choice]},
            }
            answer = client.post("/v1/chat/completions/derender", json=body).json()
            assert answer["usage"]["completion_tokens"] == 3
            for path in ("/v1/chat/completions", "/inference/v1/generate", "/v1/responses"):
                assert client.post(path, json=hi).status_code == 404, path
            body = {"input": "x", "previous_response_id": "resp_x"}
            assert client.post("/v1/responses/input_tokens", json=body).status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    process = subprocess.Popen(
        [*COMMAND, "--render-only", "--uds", str(path)],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert any(f"Serving on unix:{path}" in line for line in process.stderr)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://x/health").status_code == 200
        assert f"Cannot listen on {path}: address already in use" in refused("--uds", str(path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0 and not path.exists()
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_it_is_light_and_leaves_at_once(redis_url: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--redis", redis_url, "--cluster", "light"],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "Serving on" in line)
        url = re.search(r"http://\S+", line)
        assert url is not None
        assert httpx.get(url[0] + "/version", trust_env=False).status_code == 200
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert resident is not None and int(resident[1]) < 300_000
        loaded = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in loaded
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
