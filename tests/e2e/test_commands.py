"""What people do wrong at the command line: a sentence that names what to change, exit code 2."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, rewrite_config
from live_cluster import PDSERVE

pytestmark = pytest.mark.timeout(120)


def up(*options: object) -> subprocess.CompletedProcess[str]:
    command = [PDSERVE, "up", "--port", "0", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def assert_refused(done: subprocess.CompletedProcess[str], *needles: str) -> None:
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    assert "Traceback" not in text, text
    assert "ready http" not in text
    for needle in needles:
        assert needle in text, text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "good", "qwen3", "nano")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "broken"))


def test_truncated_weights(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(up("--model", broken), "model.safetensors")


def test_missing_and_left_over_tensors(broken: Path) -> None:
    rewrite_config(broken, num_hidden_layers=1)
    assert_refused(up("--model", broken), "model.layers.1.")
    rewrite_config(broken, num_hidden_layers=3)
    assert_refused(up("--model", broken), "model.layers.2.")


def test_unknown_architecture(broken: Path) -> None:
    rewrite_config(broken, architectures=["MambaForCausalLM"])
    assert_refused(up("--model", broken), "MambaForCausalLM", "Qwen3ForCausalLM")


def test_config_that_is_no_json(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    assert_refused(up("--model", broken), "config.json")


def test_tokenizer_missing(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    assert_refused(up("--model", broken), "tokenizer")


def test_no_such_model(tmp_path: Path) -> None:
    assert_refused(up("--model", tmp_path / "nowhere"), "nowhere")


def test_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(up("--model", model, "--port", port), str(port))


def test_redis_not_there(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert_refused(up("--model", model, "--redis", f"redis://:hush@127.0.0.1:{port}"), str(port))
    assert "hush" not in up("--redis", f"redis://:hush@127.0.0.1:{port}").stderr


def test_a_kv_cache_too_small(model: Path) -> None:
    assert_refused(
        up("--model", model, "--kv-cache-memory", "64KiB"), "--kv-cache-memory", "--max-model-len"
    )


def test_max_model_len_beyond_the_model(model: Path) -> None:
    assert_refused(up("--model", model, "--max-model-len", 10**6), "--max-model-len", "1000000")


def test_max_model_len_too_short_to_be_of_use(model: Path) -> None:
    assert_refused(up("--model", model, "--max-model-len", 3), "--max-model-len", "16")


def test_contradicting_limits(model: Path) -> None:
    done = up("--model", model, "--max-num-seqs", 64, "--max-num-batched-tokens", 32)
    assert_refused(done, "max_num_batched_tokens", "32", "64")


def test_unknown_options_and_values(tmp_path: Path) -> None:
    assert_refused(up("--transport", "pigeon"), "--transport", "pigeon", "shm")
    assert_refused(up("--no-such-option"), "--no-such-option")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"prefil": 1}))
    assert_refused(up("--config", config), "prefil", "prefill")


def test_workers_without_a_secret() -> None:
    done = subprocess.run([PDSERVE, "prefill"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "PDSERVE_SECRET" in done.stderr
