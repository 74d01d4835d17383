"""What routers and workers can be told alike."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.cluster.options import integer, option

DEFAULT_REDIS = "redis://127.0.0.1:6379"
PORT = integer(0, 65535)


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
