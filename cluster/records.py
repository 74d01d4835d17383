"""What a worker says about itself in Redis."""

from __future__ import annotations

import enum

import msgspec

from pdserve.protocol.messages import WorkerStatus
from pdserve.protocol.orders import Role as Role

ROUTER_HEADER = "x-pdserve-router"
"""In a router's answers to /health: its process id, as several may listen on one port."""


class WorkerState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model as this worker serves it."""

    architecture: str
    """For example "Qwen3ForCausalLM"."""
    dtype: str
    max_model_len: int
    """Tokens, prompt and answer together."""
    vocab_size: int
    block_size: int
    fingerprint: str
    """LayoutFingerprint.family(): workers with different ones cannot exchange blocks."""
    token_flops: int = 0
    """Floating-point operations for a token, about."""
    weight_nbytes: int = 0
    """What a step reads of the weights, at most."""
    token_nbytes: int = 0
    """KV bytes that a token leaves, all layers."""


class WorkerCondition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes all the time: kept apart in Redis, and not read by those who follow."""

    status: WorkerStatus | None = None
    routes: dict[str, str] = {}
    """Worker id of a source → the transport over which its blocks last came here."""
    speeds: dict[str, dict[str, float]] = {}
    """Worker id of a source → transport → bytes per second, where large fetches have shown it."""


class WorkerRecord(WorkerCondition, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker incarnation. Lives in Redis under a lease that the worker renews."""

    worker_id: str
    epoch: int
    role: Role
    state: WorkerState
    host: str
    """Where routers and other workers reach it."""
    port: int
    """The channel for routers (0 while loading)."""
    http_port: int
    """/health, /metrics and /status of this worker (0 while loading)."""
    pid: int
    progress: float = 0.0
    """Share of the weights loaded, 0 to 1."""
    detail: str = ""
    """What it is doing, for people: "loading weights"."""
    model: ModelInfo | None = None
    transports: tuple[str, ...] = ()
    """Those that it could use, best first."""
    cpus: tuple[int, ...] = ()
    """Cores that it is pinned to."""

    def parts(self) -> tuple[WorkerRecord, WorkerCondition]:
        """What hardly ever changes, and the rest."""
        condition = WorkerCondition(status=self.status, routes=self.routes, speeds=self.speeds)
        return msgspec.structs.replace(self, status=None, routes={}, speeds={}), condition

    def in_condition(self, condition: WorkerCondition) -> WorkerRecord:
        """The inverse of `parts`."""
        return msgspec.structs.replace(self, **msgspec.structs.asdict(condition))
