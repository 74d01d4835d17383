"""Options of vLLM's server that are not options here, and what to do instead.

Who brings a command line from there is told so by name; nothing is ignored in silence.
"""

from __future__ import annotations

_TEXT_ONLY = "models read text only here"
_ALWAYS = "that is always so here; leave it out"
_NO_LORA = "adapters are not served"
_NO_TOOLS = "the server itself calls no tools"
_NO_LOG = "there is no access log"

FOREIGN = {
    "--uvicorn-log-level": "use --log-level",
    "--disable-uvicorn-access-log": _NO_LOG,
    "--disable-access-log-for-endpoints": _NO_LOG,
    "--enable-request-id-headers": _ALWAYS,
    "--enable-prompt-tokens-details": _ALWAYS,
    "--enable-server-load-tracking": _ALWAYS,
    "--tool-strict-level": "arguments of required and named calls are always held to their schemas",
    "--scheduling-policy": "priority is always honoured",
    "--lora-modules": _NO_LORA,
    "--enable-lora": _NO_LORA,
    "--tool-parser-plugin": "parsers are part of the program (parsers/)",
    "--tool-server": _NO_TOOLS,
    "--reasoning-config": "use --reasoning-parser",
    "--structured-outputs-config": "llguidance is the only backend, and begins behind the thoughts",
    "--structured-outputs-config.backend": "llguidance is the only backend",
    "--tokens-only": "use --enable-scale-out",
    "--enable-prompt-embeds": "prompts are text or token ids",
    "--trust-request-mm-kwargs": _TEXT_ONLY,
    "--allowed-media-domains": _TEXT_ONLY,
    "--allowed-local-media-path": _TEXT_ONLY,
    "--limit-mm-per-prompt": _TEXT_ONLY,
    "--api-server-count": "use --routers",
    "--headless": "start `pdserve prefill` or `pdserve decode`",
    "--grpc": "there is no gRPC",
    "--max-num-queued-reqs": "use --max-queue or --max-waiting",
    "--max-num-queued-tokens": "use --max-ttft-ms",
    "--max-num-active-seqs": "use --max-num-seqs",
    "--enable-fault-tolerance": "failures of workers are always survived",
    "--watermark-config": "there are no watermarks",
    "--return-sampling-mask": "sampling masks are not kept",
    "--enable-return-routed-experts": "routed experts are not captured",
    "--profiler-config": "there is no profiler; see `pdserve bench`",
    "--enable-sleep-mode": "workers do not sleep",
    "--kv-transfer-config": "workers find each other by themselves; see --transport",
    "--tensor-parallel-size": "a worker computes on one device",
    "--pipeline-parallel-size": "a worker computes on one device",
    "--data-parallel-size": "use --prefill, --decode or --colocated",
    "--gpu-memory-utilization": "use --kv-cache-memory",
    "--enable-prefix-caching": _ALWAYS,
    "--no-enable-prefix-caching": "prefixes are always cached; cache_salt keeps requests apart",
    "--enable-chunked-prefill": _ALWAYS,
    "--trust-remote-code": "no code of checkpoints is run",
    "--swap-space": "blocks are computed again, not swapped",
    "--enforce-eager": "PDSERVE_KERNELS=reference is the plain way",
}


def explained(arguments: str) -> str:
    """A sentence for each of the unknown `arguments` that is an option of vLLM's."""
    flags = [word.partition("=")[0] for word in arguments.split() if word.startswith("--")]
    told = [f"{flag} is an option of vLLM's: {FOREIGN[flag]}." for flag in flags if flag in FOREIGN]
    return " ".join(told)
