"""Settings: where a value comes from, and what is said about bad ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster import options
from pdserve.cluster.cores import Share
from pdserve.cluster.foreign_options import FOREIGN
from pdserve.cluster.operate import DrainSettings, RoleSettings
from pdserve.cluster.plan import plan_cluster
from pdserve.cluster.records import Role
from pdserve.cluster.settings import (
    RouterSettings,
    UpSettings,
    WorkerSettings,
    arguments,
    options_of,
    router_settings,
    up_settings,
    up_table,
    worker_settings,
)
from pdserve.cluster.status import StatusSettings

ALL = (WorkerSettings, RouterSettings, UpSettings, StatusSettings, DrainSettings, RoleSettings)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("PDSERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PDSERVE_SECRET", "s")


def refusal(call: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says before it leaves with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


# precedence


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("block-size: 32\nmax_num_seqs: 5\nport: 81\nserved-model-name: [a, b]\n")
    assert up_settings([]).worker.block_size == 16
    settings = up_settings(["--config", str(file)])
    assert settings.worker.block_size == 32
    assert settings.worker.max_num_seqs == 5
    assert settings.router.port == 81
    assert settings.router.served_model_name == settings.worker.served_model_name == ("a", "b")
    monkeypatch.setenv("PDSERVE_BLOCK_SIZE", "64")
    monkeypatch.setenv("PDSERVE_SERVED_MODEL_NAME", "c,d")
    settings = up_settings(["--config", str(file)])
    assert settings.worker.block_size == 64
    assert settings.router.served_model_name == ("c", "d")
    settings = up_settings(["--config", str(file), "--block-size", "8"])
    assert settings.worker.block_size == 8
    monkeypatch.setenv("PDSERVE_CONFIG", str(file))
    assert up_settings([]).router.port == 81


def test_worker_settings() -> None:
    settings = worker_settings(["--cpus", "1", "3", "--kv-cache-memory", "2GB"], "prefill")
    assert settings.role is Role.PREFILL
    assert settings.worker_id.startswith("prefill-")
    assert settings.cpus == (1, 3)
    assert settings.kv_cache_memory == 2_000_000_000
    assert settings.secret == "s"


def test_lists_can_be_repeated_or_follow() -> None:
    again = router_settings(["--api-key", "a", "--api-key", "b"])
    assert again.api_key == router_settings(["--api-key", "a", "b"]).api_key == ("a", "b")


@pytest.mark.parametrize(
    ("argv", "counts"),
    [
        ([], (1, 1, 0)),
        (["--colocated", "2"], (0, 0, 2)),
        (["--colocated", "1", "--prefill", "2"], (2, 1, 1)),
        (["--colocated", "0"], (1, 1, 0)),
        (["--prefill", "1", "--decode", "0", "--colocated", "1"], (1, 0, 1)),
    ],
)
def test_how_many_workers(argv: list[str], counts: tuple[int, int, int]) -> None:
    settings = up_settings(argv)
    assert (settings.prefill, settings.decode, settings.colocated) == counts


def test_up_passes_every_setting_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher gives to a child arrives there, for every option there is."""
    samples: dict[type[Any], Any] = {int: 3, float: 2.5}
    for settings_class, parse in (
        (RouterSettings, router_settings),
        (WorkerSettings, lambda argv: worker_settings(argv, Role.DECODE)),
    ):
        changes: dict[str, Any] = {}
        for name, row in options_of(settings_class).items():
            default = next(
                field.default for field in dataclasses.fields(settings_class) if field.name == name
            )
            if row.choices:
                changes[name] = row.choices[-1]
            elif row.many:
                changes[name] = (1, 2) if row.parse is options.cores else ("-x", "y")
            elif isinstance(default, bool):
                changes[name] = not default
            elif row.parse is options.share:
                changes[name] = 0.5
            else:
                changes[name] = samples.get(type(default), f"-{name}, with a comma")
        if settings_class is WorkerSettings:
            changes["role"] = Role.DECODE
        sent = settings_class(**changes)
        argv, environment = arguments(sent)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert parse(argv) == sent
        assert not any(sent.secret in word or sent.redis in word for word in argv)


# bad values


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "x"], "--port must be a whole number from 0 to 65535; given: 'x'"),
        (["--port", "70000"], "--port must be a whole number from 0 to 65535; given: 70000"),
        (["--dtype", "int8"], "--dtype must be one of auto, float32, bfloat16, float16"),
        (["--kv-cache-memory", "lots"], "such as 1GiB"),
        (["--request-timeout-s", "nan"], "must be a number of seconds"),
        (["--api-key", "a,b"], "must not be empty nor hold blanks or commas"),
        (["--prefil", "2"], "unrecognized arguments: --prefil 2"),
        (["--prefill", "0"], "--decode 1 without --prefill"),
        (["--decode", "0"], "--prefill without --decode"),
        (["--prefill", "0", "--decode", "0"], "No workers"),
        (["--config", "/no/such/file"], "/no/such/file cannot be read: No such file"),
    ],
)
def test_bad_arguments(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(lambda: up_settings(argv), capsys)
    assert words in said
    assert said.startswith("pdserve up: error: ")
    assert "See `pdserve up --help`." in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "unknown key 'prot'; did you mean 'port'?"),
        ("port: 99999", "`port` in "),
        ("port: [1, 2]", "takes one value; given: 2"),
        ("port:", "must be text or a number; given: None"),
        ("- port", "must hold `option: value` lines; it holds a list"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_bad_files(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert words in refusal(lambda: up_settings(["--config", str(file)]), capsys)


def test_bad_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PDSERVE_PORT", "tcp://10.0.0.1:8000")
    assert "Kubernetes" in refusal(lambda: up_settings([]), capsys)
    monkeypatch.setenv("PDSERVE_PORT", "eighty")
    assert "PDSERVE_PORT must be a whole number" in refusal(lambda: up_settings([]), capsys)


def test_processes_need_the_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PDSERVE_SECRET")
    assert up_settings([]).router.secret == ""
    for call in (lambda: router_settings([]), lambda: worker_settings([], Role.DECODE)):
        assert "PDSERVE_SECRET is not set" in refusal(call, capsys)


def test_a_worker_must_be_reachable(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(lambda: worker_settings(["--host", "0.0.0.0"], Role.DECODE), capsys)
    assert "cannot be told to others" in said


@pytest.mark.parametrize(
    ("text", "value"),
    [("1GiB", 2**30), ("512MiB", 2**29), ("2 GB", 2 * 10**9), ("1.5KiB", 1536), ("77", 77)],
)
def test_sizes(text: str, value: int) -> None:
    assert options.size(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1XiB", "1e400GiB", "nanGiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        options.size(text)


# help


def test_every_field_is_an_option_with_help() -> None:
    chosen = {"role", "router", "worker"}
    for settings_class in ALL:
        table = options_of(settings_class)
        names = {field.name for field in dataclasses.fields(settings_class)}
        assert names - set(table) <= chosen
        for row in table.values():
            assert row.help
            assert row.shown


def test_help_lists_every_option_with_unit_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        up_settings(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, row in up_table().items():
        assert (options.flag(name) in text or row.secret) is not row.hidden
        assert (f"PDSERVE_{name.upper()}" in text) is not row.hidden
    assert "in tokens (default: 16; environment: PDSERVE_BLOCK_SIZE)" in text
    assert "in bytes (default: 0: 1GiB on the CPU, most of what is free on a GPU;" in text
    assert "environment: PDSERVE_KV_CACHE_MEMORY)" in text


def test_lists_can_be_json() -> None:
    """As other servers write them."""
    given = ["--allowed-origins", '["https://a", "*"]', "--served-model-name", "a", "[b", "c"]
    environment = {"PDSERVE_API_KEY": "k"}
    table = options.options_of(RouterSettings)
    found = options.load("test", "", table, given, environment)
    assert found["allowed_origins"] == ("https://a", "*")
    assert found["served_model_name"] == ("a", "[b", "c") and found["api_key"] == ("k",)


def test_workers_of_a_role_may_have_options_of_their_own(tmp_path: Path) -> None:
    argv = [
        "--prefill", "1", "--decode", "1", "--colocated", "1", "--block-size", "16",
        "--prefill-options=--block-size 32 --max-num-batched-tokens 8192",
        "--decode-options", "--dtype bfloat16",
    ]  # fmt: skip
    settings = up_settings(argv)
    shares = [Share(threads=1, cpus=())] * 3
    plan = plan_cluster(
        settings, shares, redis="r", secret="s", port=1, logs=tmp_path, environment={}
    )
    found = {}
    for command in plan.workers:
        role = command.name.partition("-")[0]
        given = command.argv[command.argv.index("-m") + 2 :]
        own = worker_settings([text for text in given if text != "--accept-prompts"], Role(role))
        found[role] = (own.block_size, own.max_num_batched_tokens, own.dtype)
    usual = WorkerSettings().max_num_batched_tokens
    assert found == {
        "prefill": (32, 8192, "auto"), "decode": (16, usual, "bfloat16"),
        "colocated": (16, usual, "auto"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--block-size none", "--block-size"),
        ("--model other", "--model"),
        ("--port 1", "--port"),
        ("'", "No closing quotation"),
    ],
)
def test_options_that_a_role_cannot_have(
    text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        up_settings([f"--decode-options={text}"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "--decode-options" in shown and says in shown


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--colocated", "1", "--prefill-options=--block-size 32"], "without --prefill"),
        (["--prefill-options=--dtype bfloat16", "--dtype", "float32"], "--kv-convert would"),
        (["--prefill-options=--kv-convert"], "--kv-convert is True"),
        (["--decode-options=--batch-invariant"], "--batch-invariant is False"),
        (["--transport", "nccl", "--decode-options=--block-size 32"], "--transport auto, shm"),
    ],
)
def test_roles_that_could_not_exchange_blocks(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refusal(lambda: up_settings(argv), capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["--decode-options=--block-size 32", "--transport", "tcp"],
        ["--prefill-options=--dtype bfloat16", "--dtype", "float32", "--kv-convert"],
    ],
)
def test_roles_whose_blocks_are_cut_or_converted(argv: list[str]) -> None:
    assert up_settings(argv).prefill == 1


# vLLM's options

FRONTEND = [
    "--host",
    "--port",
    "--uds",
    "--uvicorn-log-level",
    "--disable-uvicorn-access-log",
    "--disable-access-log-for-endpoints",
    "--allow-credentials",
    "--allowed-origins",
    "--allowed-methods",
    "--allowed-headers",
    "--api-key",
    "--ssl-keyfile",
    "--ssl-certfile",
    "--ssl-ca-certs",
    "--ssl-cert-reqs",
    "--ssl-ciphers",
    "--enable-ssl-refresh",
    "--root-path",
    "--middleware",
    "--h11-max-incomplete-event-size",
    "--h11-max-header-count",
    "--enable-request-id-headers",
    "--disable-fastapi-docs",
    "--enable-offline-docs",
    "--served-model-name",
    "--chat-template",
    "--chat-template-content-format",
    "--trust-request-chat-template",
    "--default-chat-template-kwargs",
    "--response-role",
    "--lora-modules",
    "--return-tokens-as-token-ids",
    "--max-logprobs",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "--tool-parser-plugin",
    "--exclude-tools-when-tool-choice-none",
    "--tool-server",
    "--reasoning-parser",
    "--reasoning-config",
    "--enable-prompt-tokens-details",
    "--enable-per-request-metrics",
    "--enable-force-include-usage",
    "--enable-server-load-tracking",
    "--enable-tokenizer-info-endpoint",
    "--enable-scale-out",
    "--tokens-only",
    "--fingerprint-mode",
    "--fingerprint-value",
    "--enable-prompt-embeds",
    "--trust-request-mm-kwargs",
    "--allowed-media-domains",
    "--allowed-local-media-path",
    "--limit-mm-per-prompt",
    "--generation-config",
    "--override-generation-config",
    "--structured-outputs-config.backend",
    "--stream-interval",
    "--scheduling-policy",
    "--api-server-count",
    "--headless",
    "--grpc",
    "--config",
    "--max-num-queued-reqs",
    "--max-num-queued-tokens",
    "--sse-keep-alive-interval",
    "--logprobs-mode",
    "--tool-strict-level",
    "--anthropic-disabled-thinking-effort",
    "--shutdown-timeout",
    "--enable-fault-tolerance",
    "--max-num-active-seqs",
    "--watermark-config",
    "--return-sampling-mask",
    "--enable-return-routed-experts",
]


@pytest.mark.parametrize("name", FRONTEND)
def test_each_of_vllms_options_is_taken_or_refused_with_a_reason(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {options.flag(row) for kind in ALL for row in options_of(kind)} | {"--config"}
    assert (name in known) != (name in FOREIGN)
    if name in FOREIGN:
        said = refusal(lambda: up_settings([name, "1"]), capsys)
        assert f"{name} is an option of vLLM's: {FOREIGN[name]}." in said


def test_vllms_other_options_are_none_of_ours() -> None:
    known = {options.flag(row) for kind in ALL for row in options_of(kind)}
    assert not known & FOREIGN.keys()
