"""What a router can be told."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.cluster.common_settings import PORT, CommonSettings
from pdserve.cluster.options import integer, option, seconds, size, word


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSettings(CommonSettings):
    """One router."""

    host: str = option("127.0.0.1", "Address on which clients are served; 0.0.0.0 means all")
    port: int = option(8000, "Port on which clients are served", parse=PORT)
    uds: str = option(
        "", "Serve clients on this Unix socket instead of --host and --port", shown="no such socket"
    )
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
    shutdown_timeout: float = option(
        2.0,
        "How long answers may still take when the router is told to stop; then they are ended",
        parse=seconds(0.0),
        unit="seconds",
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
    disable_fastapi_docs: bool = option(False, "Serve neither /docs nor /redoc nor /openapi.json")
    enable_offline_docs: bool = option(
        False, "Let the pages /docs and /redoc load nothing from other hosts"
    )
    fingerprint_mode: str = option(
        "full",
        "system_fingerprint of answers: full (release and a hash of the model), hash alone, custom "
        "(--fingerprint-value), or none",
        choices=("full", "hash", "custom", "none"),
    )
    fingerprint_value: str = option("", "The system_fingerprint of --fingerprint-mode custom")
    anthropic_disabled_thinking_effort: str = option(
        "auto",
        "reasoning_effort of /v1/messages with thinking disabled; auto is none, or low where the "
        "chat template cannot turn thinking off",
        choices=("auto", "none", "minimal", "low", "medium", "high"),
    )
    response_role: str = option(
        "assistant",
        "Role of answers of chat (unless they continue the last message, whose role "
        "they have then)",
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
    return_tokens_as_token_ids: bool = option(
        False, "Write the tokens in logprobs as token_id:N, unless a request says otherwise"
    )
    enable_force_include_usage: bool = option(
        False, "Count tokens in every chunk of every stream, as if all requests asked for it"
    )
    enable_per_request_metrics: bool = option(
        False, "Tell the times of a request in the member metrics of its answer"
    )
    stream_interval: int = option(
        1,
        "Send a stream's chunks with so many tokens each, the first and the last one at once; "
        "requests can say otherwise",
        parse=integer(1, 2**20),
        unit="tokens",
    )
    sse_keep_alive_interval: float = option(
        0.0,
        "Send a comment when a stream of completions or chat has been silent for so long",
        parse=seconds(0.0),
        unit="seconds",
        shown="0: never",
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
    middleware: tuple[str, ...] = option(
        (),
        "What requests go through behind the check of keys: import paths of ASGI classes, or of "
        "functions (request, call_next); the last one is the outermost",
        many=True,
    )
    h11_max_incomplete_event_size: int = option(
        4 * 2**20,
        "Longest head of a request (its first line and headers); vLLM's name",
        parse=size,
        unit="bytes",
        shown="4MiB",
    )
    h11_max_header_count: int = option(
        256,
        "Most headers of a request; vLLM's name",
        parse=integer(1, 2**20),
        unit="headers",
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
    allowed_methods: tuple[str, ...] = option(
        ("*",), "Methods that browsers may call with (CORS)", many=True
    )
    allowed_headers: tuple[str, ...] = option(
        ("*",), "Headers that browsers may send (CORS)", many=True
    )
    allow_credentials: bool = option(False, "Let browsers send cookies and keys (CORS)")
