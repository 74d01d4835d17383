"""What every process of a cluster can be told; `options.py` turns the fields into options.

CommonSettings
├── WorkerSettings   one prefill, decode or colocated worker
└── RouterSettings   one router
UpSettings           how many of them `pdserve up` starts, and a template of each
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    size,
    word,
)
from pdserve.cluster.records import Role

DEFAULT_REDIS = "redis://127.0.0.1:6379"
_PORT = integer(0, 65535)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonSettings:
    """What routers and workers have in common."""

    model: str = option(
        "",
        "Model: a folder with config.json, safetensors and tokenizer files, or a name on the "
        "Hugging Face hub",
        shown="the built-in demo model",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Names under which clients may ask for the model; the first one is put into answers",
        many=True,
        shown="the model's folder or hub name",
    )
    max_model_len: int = option(
        0,
        "Longest prompt and answer together; at most what the model was made for",
        parse=integer(0, 2**31),
        unit="tokens",
        shown="0: the model's own limit",
    )
    redis: str = option(
        DEFAULT_REDIS, "Redis where the cluster meets: redis://[:PASSWORD@]HOST:PORT[/DB]"
    )
    cluster: str = option("pdserve", "Name of the cluster; several can share one Redis")
    secret: str = option(
        "",
        "Secret that all processes of the cluster share and prove to each other",
        secret=True,
        shown="none; `pdserve up` draws one",
    )
    seed: int = option(
        0,
        "Seed of the random weights of --load-format dummy, and of the seeds that are drawn for "
        "requests without one",
        parse=integer(0, 2**64 - 1),
    )
    log_level: str = option(
        "info", "Least severe log lines to write", choices=("debug", "info", "warning", "error")
    )


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
    port: int = option(0, "Port for routers", parse=_PORT, shown="0: any free port")
    http_port: int = option(
        0, "Port for /health, /metrics and /status", parse=_PORT, shown="0: any free port"
    )
    transfer_port: int = option(
        0, "Port from which others fetch KV blocks", parse=_PORT, shown="0: any free port"
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
        2048, "Most tokens that one engine step computes", parse=integer(1, 2**24), unit="tokens"
    )
    max_num_seqs: int = option(
        64, "Most requests that one engine step works on", parse=integer(1, 2**16), unit="requests"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSettings(CommonSettings):
    """One router."""

    host: str = option("127.0.0.1", "Address on which clients are served; 0.0.0.0 means all")
    port: int = option(8000, "Port on which clients are served", parse=_PORT)
    share_port: bool = option(
        False,
        "Let other routers listen on the same port (SO_REUSEPORT); the kernel deals out "
        "connections",
    )
    api_key: tuple[str, ...] = option(
        (),
        "Keys of which every client must present one",
        parse=word,
        many=True,
        shown="none: open to all",
    )
    routing_policy: str = option(
        "prefix",
        "How workers are chosen: prefix (what they have cached against how busy they are), "
        "least-load, round-robin, or session (header x-session-id)",
        choices=("prefix", "least-load", "round-robin", "session"),
    )
    disaggregate: str = option(
        "auto",
        "Whether prompts go over a prefill worker to a decode worker: auto (when the times "
        "measured here predict that it costs less, and while there is a prefill worker), always, "
        "or never (decode workers compute their own prompts)",
        choices=("auto", "always", "never"),
    )
    request_timeout_s: float = option(
        600.0, "Longest life of a request", parse=seconds(0.1), unit="seconds"
    )
    root_path: str = option("", "Path under which a proxy in front publishes this server")
    chat_template: str = option(
        "",
        "Chat template: a Jinja file, the template itself, or the name of one of the model's own",
        shown="the model's own",
    )
    chat_template_content_format: str = option(
        "auto",
        "How message parts reach the chat template: joined into one string, or as a list of parts; "
        "auto reads it off the template",
        choices=("auto", "string", "openai"),
    )
    enable_scale_out: bool = option(
        False,
        "Serve tokens in, tokens out (/inference/v1), and rendering (/v1/.../render); without "
        "it they answer 403",
    )
    enable_tokenizer_info_endpoint: bool = option(
        False, "Serve /tokenizer_info, which shows the chat template to anybody who asks"
    )
    enable_offline_docs: bool = option(
        False, "Let the pages /docs and /redoc load nothing from other hosts"
    )
    trust_request_chat_template: bool = option(
        False, "Let requests bring their own chat template (it runs in a sandbox)"
    )
    default_chat_template_kwargs: str = option(
        "", 'Arguments for the chat template as JSON, e.g. {"enable_thinking": false}'
    )
    tool_call_parser: str = option(
        "auto",
        "How the model writes calls of tools; auto reads it off its chat template and vocabulary, "
        "none refuses tools",
        choices=(
            "auto",
            "none",
            "deepseek_v3",
            "hermes",
            "llama3_json",
            "mistral",
            "pythonic",
            "qwen3_coder",
        ),
    )
    enable_auto_tool_choice: bool = option(
        False, "Let the model decide whether it calls a tool (tool_choice auto)"
    )
    exclude_tools_when_tool_choice_none: bool = option(
        False, "Do not show tools to the chat template when tool_choice is none"
    )
    reasoning_parser: str = option(
        "none",
        "How the model marks its thoughts, which are then kept apart from the answer; auto reads "
        "it off its chat template and vocabulary",
        choices=("none", "auto", "deepseek_r1", "gpt_oss", "qwen3"),
    )
    generation_config: str = option(
        "auto",
        "Where sampling defaults come from: auto reads the model's generation_config.json, "
        "neutral (vllm is the same) uses none, anything else is a folder or file to read",
    )
    override_generation_config: str = option(
        "",
        'Sampling defaults as JSON, over those of --generation-config, e.g. {"temperature": 0.5}; '
        "max_new_tokens limits answers whose clients set no limit",
    )
    max_logprobs: int = option(
        20,
        "Most alternatives per token that a request may ask for; -1 is the whole vocabulary",
        parse=integer(-1, 2**31),
    )
    max_queue: int = option(
        1024,
        "Answers that one router takes on at once, those in line included; beyond it clients get "
        "429",
        parse=integer(1, 2**24),
        unit="answers",
    )
    max_waiting: int = option(
        0,
        "Answers of the whole cluster that may wait for their first token; beyond it clients get "
        "429",
        parse=integer(0, 2**24),
        unit="answers",
        shown="0: no limit of its own",
    )
    max_ttft_ms: float = option(
        0.0,
        "Clients whose first token is predicted to come later get 429",
        parse=seconds(0, "milliseconds"),
        unit="milliseconds",
        shown="0: no limit",
    )
    max_itl_ms: float = option(
        0.0,
        "Requests wait while one more is predicted to bring tokens further apart than this",
        parse=seconds(0, "milliseconds"),
        unit="milliseconds",
        shown="0: no limit",
    )
    responses_ttl: int = option(
        3600,
        "How long answers of /v1/responses are kept in Redis, for previous_response_id and "
        "background",
        parse=integer(0, 30 * 86400),
        unit="seconds",
        shown="3600; 0: none is kept",
    )
    max_body: int = option(
        32 * 2**20, "Longest request body", parse=size, unit="bytes", shown="32MiB"
    )
    ssl_certfile: str = option(
        "", "Certificate chain in PEM format; with it clients are served over https only"
    )
    ssl_keyfile: str = option(
        "", "Its private key in PEM format", shown="in the file of --ssl-certfile"
    )
    ssl_ca_certs: str = option("", "Certificates by which those of clients are checked")
    ssl_cert_reqs: str = option(
        "0",
        "Certificates of clients: 0 are not asked for, 1 are checked if they come, 2 are demanded",
        choices=("0", "1", "2"),
    )
    ssl_ciphers: str = option(
        "", "Ciphers for TLS 1.2, as OpenSSL writes them", shown="Python's choice"
    )
    enable_ssl_refresh: bool = option(
        False, "Watch the certificate and its key, and use new ones for new connections"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Origins from which browsers may call (CORS); * means any", many=True
    )


_PER_PROCESS = (
    "worker_id", "host", "port", "http_port", "transfer_port", "threads", "cpus", "drain_timeout",
)  # fmt: skip
"""Worker options that `pdserve up` chooses for each worker."""


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
    start_timeout_s: float = option(
        1800.0,
        "Longest time until the cluster is ready, weights loaded",
        parse=seconds(1.0),
        unit="seconds",
    )
    log_dir: str = option(
        "", "Folder for the log files", shown="a temporary one, removed at the end"
    )
    router: RouterSettings = RouterSettings()
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
    router_fields = options_of(RouterSettings, list(own))
    settings = UpSettings(
        **(_only(values, own) | counts),
        router=RouterSettings(**_only(values, router_fields)),
        worker=WorkerSettings(**_only(values, worker_fields)),
    )
    _check_counts(settings)
    return settings


def up_table() -> Table:
    """The options of `pdserve up`: its own, the router's, and those of the workers that are not
    chosen for each of them."""
    own = options_of(UpSettings)
    return own | {
        name: row
        for table in (options_of(RouterSettings), options_of(WorkerSettings, _PER_PROCESS))
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
