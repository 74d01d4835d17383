"""What every process of a cluster can be told; `options.py` turns the fields into options.

CommonSettings
├── WorkerSettings   one prefill, decode or colocated worker
└── RouterSettings   one router
UpSettings           how many of them `pdserve up` starts, and a template of each
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.cluster.common_settings import PORT, CommonSettings
from pdserve.cluster.options import (
    ENVIRONMENT_PREFIX,
    Table,
    cores,
    fail,
    flag,
    integer,
    load,
    option,
    options_of,
    seconds,
    share,
    size,
)
from pdserve.cluster.records import Role
from pdserve.cluster.router_settings import RouterSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings(CommonSettings):
    """One worker."""

    role: Role = Role.COLOCATED
    """Chosen by the command, not by an option."""
    worker_id: str = option(
        "", "Name of this worker, unique in the cluster", shown="role, host name and process id"
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen on, and under which routers and other workers reach this one",
    )
    port: int = option(0, "Port for routers", parse=PORT, shown="0: any free port")
    http_port: int = option(
        0, "Port for /health, /metrics and /status", parse=PORT, shown="0: any free port"
    )
    transfer_port: int = option(
        0, "Port from which others fetch KV blocks", parse=PORT, shown="0: any free port"
    )
    transport: str = option(
        "auto",
        "How KV blocks travel between workers; auto takes CUDA IPC within a host and NCCL between "
        "GPUs, else shared memory within a host and TCP between hosts, or what proves faster",
        choices=("auto", "ipc", "nccl", "shm", "tcp"),
    )
    kv_wire_dtype: str = option(
        "auto",
        "How KV blocks travel: auto as they are, bit by bit; int8, fp8 with a scale per head and "
        "token, in half the bytes of bfloat16: off by at most 1/254 of a head's largest element, "
        "or 1/16 of each element, so answers may differ",
        choices=("auto", "int8", "fp8"),
    )
    kv_convert: bool = option(
        False,
        "KV blocks of workers with another --dtype are taken and converted, not exactly; for all "
        "workers or none",
    )
    device: str = option(
        "auto",
        "Where the model runs; auto takes a GPU if there is one",
        choices=("auto", "cpu", "cuda"),
    )
    dtype: str = option(
        "auto",
        "Number format of weights and KV cache; auto takes the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Number format of the KV cache: fp8 (fp8_e4m3 is the same) halves it against bfloat16 at "
        "some loss, with the scales of the checkpoint if it has them; auto is as --dtype",
        choices=("auto", "fp8", "fp8_e4m3"),
    )
    load_format: str = option(
        "auto",
        "auto reads the checkpoint's safetensors; dummy makes random weights from config.json",
        choices=("auto", "dummy"),
    )
    logprobs_mode: str = option(
        "raw_logprobs",
        "What logprobs of answers are: raw is before bias, penalties, grammar, temperature and "
        "filters, processed behind them; prompt_logprobs are always raw_logprobs",
        choices=("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"),
    )
    batch_invariant: bool = option(
        False,
        "Give a token the same bits in any batch, any chunk and on any worker, so that an answer "
        "does not depend on what else is served, nor on a worker that died; slower",
    )
    quantization: str = option(
        "none",
        "Round the linear layers of a full-precision checkpoint to 8 bits while loading, one scale "
        "per output; checkpoints that are quantised already need no option",
        choices=("none", "int8", "fp8"),
    )
    kv_cache_memory: int = option(
        0,
        "Memory for the KV cache of each worker",
        parse=size,
        unit="bytes",
        shown="0: 1GiB on the CPU, most of what is free on a GPU",
    )
    block_size: int = option(16, "Length of one KV block", parse=integer(1, 1024), unit="tokens")
    max_num_batched_tokens: int = option(
        0,
        "Most tokens that one engine step computes",
        parse=integer(0, 2**24),
        unit="tokens",
        shown="0: 2048 on a GPU, 512 on the CPU, where larger steps are no faster per token and "
        "first tokens wait for each other",
    )
    max_num_seqs: int = option(
        64, "Most requests that one engine step works on", parse=integer(1, 2**16), unit="requests"
    )
    kv_cache_metrics: bool = option(
        False,
        "Measure how long blocks live in the prefix cache (vllm:kv_block_... at the router's "
        "/metrics)",
    )
    kv_cache_metrics_sample: float = option(
        0.01,
        "Share of the blocks that --kv-cache-metrics follows, above 0 and up to 1",
        parse=share,
    )
    compute_nans_in_logits: bool = option(
        False,
        "Count requests with logits that are not numbers (vllm:corrupted_requests_total); a little "
        "slower",
    )
    lease_s: float = option(
        30.0,
        "How long a prefill worker keeps finished KV blocks that nobody fetches",
        parse=seconds(0.1),
        unit="seconds",
    )
    drain_timeout: float = option(
        25.0,
        "How long a worker that is told to stop by SIGTERM or SIGINT takes to finish what it has; "
        "a second signal ends it at once (Kubernetes gives 30 s by default)",
        parse=seconds(0.0),
        unit="seconds",
    )
    threads: int = option(
        0,
        "Threads that compute",
        parse=integer(0, 4096),
        shown="0: one per core in --cpus, or per core of the machine",
    )
    inject_faults: str = option(
        "",
        "Faults of KV transfers for tests, e.g. seed=7,flip=0.1,drop=0.05 (kv_transfer/faults.py)",
        hidden=True,
    )
    cpus: tuple[int, ...] = option(
        (), "Numbers of the cores to run on", parse=cores, many=True, shown="all"
    )


PARCEL_TRANSPORTS = ("auto", "shm", "tcp")
"""Settings of --transport under which blocks can also travel cut otherwise, or packed."""
_OF_BLOCKS: dict[str, Callable[[WorkerSettings, WorkerSettings], bool]] = {
    "kv_convert": lambda prefill, decode: False,
    "batch_invariant": lambda prefill, decode: False,
    "kv_cache_dtype": lambda prefill, decode: False,
    "quantization": lambda prefill, decode: False,
    "dtype": lambda prefill, decode: prefill.kv_convert and decode.kv_convert,
    "block_size": lambda prefill, decode: (
        {prefill.transport, decode.transport} <= set(PARCEL_TRANSPORTS)
    ),
}
"""What both ends of a hand-over must have alike, and when they need not."""
_REMEDIES = {
    "dtype": "; --kv-convert would let them.",
    "block_size": f"; --transport {', '.join(PARCEL_TRANSPORTS)} would let them.",
}


_PER_PROCESS = (
    "worker_id", "host", "port", "http_port", "transfer_port", "threads", "cpus", "drain_timeout",
)  # fmt: skip
"""Worker options that `pdserve up` chooses for each worker."""


_ALONE = ("uds", "shutdown_timeout")
"""Router options that `pdserve up` has no use for: its routers share a port that it watches, and
its workers stop when they do."""
_ONLY_WITH_WORKERS = (
    "redis", "cluster", "secret", "routing_policy", "disaggregate", "request_timeout_s",
    "enable_scale_out", "max_queue", "max_waiting", "max_ttft_ms", "max_itl_ms", "responses_ttl",
)  # fmt: skip
"""Router options that mean nothing to a server that only renders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpSettings:
    """A whole cluster on one machine."""

    prefill: int = option(
        1,
        "Prefill workers",
        parse=integer(0, 256),
        unit="processes",
        shown="1, or 0 if --colocated is given and --decode is not",
    )
    decode: int = option(
        1,
        "Decode workers",
        parse=integer(0, 256),
        unit="processes",
        shown="1, or 0 if --colocated is given and --prefill is not",
    )
    colocated: int = option(
        0,
        "Workers that prefill and decode in one process",
        parse=integer(0, 256),
        unit="processes",
    )
    routers: int = option(
        1,
        "Routers; they share the port, and what one of them knows lies in Redis",
        parse=integer(1, 64),
        unit="processes",
    )
    redis: str = option(
        "",
        "Redis to use: redis://[:PASSWORD@]HOST:PORT[/DB]",
        shown="a private one that is started and stopped with the cluster",
    )
    prefill_options: tuple[tuple[str, Any], ...] = option(
        (),
        "Options of the prefill workers alone, in one text: "
        "--prefill-options='--block-size 32 --max-num-batched-tokens 8192'",
        parse=lambda text: _role_options("--prefill-options", text),
        shown="as all workers",
    )
    decode_options: tuple[tuple[str, Any], ...] = option(
        (),
        "The same for the decode workers",
        parse=lambda text: _role_options("--decode-options", text),
        shown="as all workers",
    )
    start_timeout_s: float = option(
        1800.0,
        "Longest time until the cluster is ready, weights loaded",
        parse=seconds(1.0),
        unit="seconds",
    )
    log_dir: str = option(
        "", "Folder for the log files", shown="a temporary one, removed at the end"
    )
    router: RouterSettings = field(default_factory=RouterSettings)
    worker: WorkerSettings = WorkerSettings()
    """Template of all workers."""


def worker_settings(argv: Sequence[str], role: Role | str) -> WorkerSettings:
    """Settings of one worker; prints a sentence and exits with code 2 if they cannot be had."""
    program = f"pdserve {role}"
    values = load(program, _worker_story(Role(role)), options_of(WorkerSettings), argv)
    settings = WorkerSettings(role=Role(role), **values)
    if not settings.worker_id:
        name = f"{role}-{socket.gethostname()}-{os.getpid()}"
        settings = dataclasses.replace(settings, worker_id=name)
    if settings.host in ("0.0.0.0", "::", ""):
        fail(
            program,
            f"--host {settings.host or repr('')} cannot be told to others; give the address "
            "under which routers and other workers reach this host.",
        )
    _need_secret(program, settings.secret)
    return settings


def router_settings(argv: Sequence[str]) -> RouterSettings:
    """Settings of a router; prints a sentence and exits with code 2 if they cannot be had."""
    values = load("pdserve router", _ROUTER_STORY, options_of(RouterSettings), argv)
    settings = RouterSettings(**values)
    _need_secret("pdserve router", settings.secret)
    return settings


def render_settings(argv: Sequence[str]) -> RouterSettings:
    """Settings of a server without workers; prints a sentence and exits with code 2 if they cannot
    be had."""
    table = options_of(RouterSettings, _ONLY_WITH_WORKERS)
    return RouterSettings(**load("pdserve render", _RENDER_STORY, table, argv))


def up_settings(argv: Sequence[str]) -> UpSettings:
    """Settings of a cluster; prints a sentence and exits with code 2 if they cannot be had."""
    own = options_of(UpSettings)
    values = load("pdserve up", _UP_STORY, up_table(), argv)
    counts = {name: values[name] for name in ("prefill", "decode") if name in values}
    if values.get("colocated") and not counts:
        counts = {"prefill": 0, "decode": 0}
    worker_fields = options_of(WorkerSettings, [*_PER_PROCESS, *own])
    router_fields = options_of(RouterSettings, [*_ALONE, *own])
    settings = UpSettings(
        **(_only(values, own) | counts),
        router=RouterSettings(**_only(values, router_fields)),
        worker=WorkerSettings(**_only(values, worker_fields)),
    )
    _check_counts(settings)
    _check_roles(settings)
    return settings


def _role_options(name: str, text: str) -> tuple[tuple[str, Any], ...]:
    """What workers of one role shall have otherwise. Ends the program with a sentence for what is
    no option of a worker, or one that all processes of a cluster share."""
    common = [field.name for field in dataclasses.fields(CommonSettings)]
    table = options_of(WorkerSettings, [*_PER_PROCESS, *common])
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"must be options as on a command line: {error}") from None
    return tuple(load(f"pdserve up {name}", "", table, words, environment={}).items())


def up_table() -> Table:
    """The options of `pdserve up`: its own, the router's, and those of the workers that are not
    chosen for each of them."""
    own = options_of(UpSettings)
    return own | {
        name: row
        for table in (options_of(RouterSettings, _ALONE), options_of(WorkerSettings, _PER_PROCESS))
        for name, row in table.items()
        if name not in own
    }


def arguments(settings: WorkerSettings | RouterSettings) -> tuple[list[str], dict[str, str]]:
    """How to start a process with exactly these settings: its arguments, and the environment
    variables that carry what must not be seen in a list of processes."""
    argv: list[str] = []
    environment: dict[str, str] = {}
    for name, row in options_of(type(settings)).items():
        value = getattr(settings, name)
        texts = [str(item) for item in (value if row.many else (value,))]
        if row.secret or name in ("redis", "api_key"):
            environment[ENVIRONMENT_PREFIX + name.upper()] = ",".join(texts)
        elif value != _default(type(settings), name):
            argv += [f"{flag(name)}={text}" for text in texts]
    return argv, environment


def _default(settings: type[Any], name: str) -> Any:
    return next(field.default for field in dataclasses.fields(settings) if field.name == name)


def _only(values: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _need_secret(program: str, secret: str) -> None:
    if not secret:
        fail(
            program,
            f"{ENVIRONMENT_PREFIX}SECRET is not set; give every process of the cluster the same "
            "long random text in this environment variable.",
        )


def _check_roles(settings: UpSettings) -> None:
    """Options of one role must be somebody's, and must leave both roles able to exchange blocks."""
    roles = {"prefill": settings.prefill_options, "decode": settings.decode_options}
    for role, given in roles.items():
        if given and not getattr(settings, role):
            fail("pdserve up", f"--{role}-options without --{role}: there are no such workers.")
    if not settings.prefill or not settings.decode:
        return
    prefill, decode = (
        dataclasses.replace(settings.worker, **dict(given)) for given in roles.values()
    )
    for name, converted in _OF_BLOCKS.items():
        mine, theirs = getattr(prefill, name), getattr(decode, name)
        if mine != theirs and "auto" not in (mine, theirs) and not converted(prefill, decode):
            fail(
                "pdserve up",
                f"{flag(name)} is {mine} for prefill workers and {theirs} for decode workers, who "
                f"could not exchange KV blocks then{_REMEDIES.get(name, '.')}",
            )


def _check_counts(settings: UpSettings) -> None:
    prefill, decode, colocated = settings.prefill, settings.decode, settings.colocated
    if prefill + decode + colocated == 0:
        fail("pdserve up", "No workers: give --prefill and --decode, or --colocated.")
    if prefill and not decode and not colocated:
        fail("pdserve up", "--prefill without --decode: nobody would decode; give --decode 1.")
    if decode and not prefill:
        fail(
            "pdserve up",
            f"--decode {decode} without --prefill: no prompts would reach these workers; give "
            "--prefill 1, or use --colocated instead of --decode.",
        )


def _worker_story(role: Role) -> str:
    what = {
        Role.PREFILL: "computes prompts and hands their KV blocks over",
        Role.DECODE: "fetches prompts' KV blocks and generates the answers",
        Role.COLOCATED: "does both, prompts and answers",
    }[role]
    return f"Runs one {role} worker, which {what}, and joins the cluster at --redis."


_ROUTER_STORY = "Runs one router, which serves the HTTP APIs, and joins the cluster at --redis."
_RENDER_STORY = (
    "Serves what needs no workers: requests to token ids (/v1/.../render), token ids to answers "
    "(/v1/.../derender), counting, /tokenize and /detokenize. It joins no cluster."
)
_UP_STORY = "Starts a whole cluster on this machine: Redis, workers and a router; Ctrl-C stops it."
