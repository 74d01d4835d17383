"""What a request asks of admission: read off its headers and its parsed body."""

from __future__ import annotations

import hashlib

from starlette.requests import Request

from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.admission import Demand, Limits
from pdserve.router.errors import BadRequest
from pdserve.router.requests import GenerateRequest

TTFT_HEADER = "x-slo-ttft-ms"
ITL_HEADER = "x-slo-itl-ms"
TENANT_HEADER = "x-tenant-id"
LONGEST_MS = 3_600_000.0


def limits_of(settings: RouterSettings) -> Limits:
    return Limits(
        in_flight=settings.max_queue,
        waiting=settings.max_waiting,
        ttft_s=settings.max_ttft_ms / 1000,
        itl_s=settings.max_itl_ms / 1000,
    )


def demand_of(request: Request, parsed: GenerateRequest, guarded: bool) -> Demand:
    """Raises BadRequest for a target that is none. `guarded`: clients present keys."""
    return Demand(
        answers=len(parsed.answers),
        tokens=max(len(prompt.token_ids) for prompt in parsed.prompts),
        key=_key(request, guarded),
        priority=parsed.answers[0].priority,
        ttft_s=_target_s(request, TTFT_HEADER),
        itl_s=_target_s(request, ITL_HEADER),
    )


def _key(request: Request, guarded: bool) -> str:
    """Whose turn it is: the digest of the API key, or of x-tenant-id where there are no keys."""
    if guarded:
        named = request.headers.get("authorization") or request.headers.get("x-api-key", "")
    else:
        named = request.headers.get(TENANT_HEADER, "")
    return hashlib.sha256(named.encode()).hexdigest()[:16] if named else ""


def _target_s(request: Request, name: str) -> float:
    """A target in seconds; 0 without the header."""
    text = request.headers.get(name)
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= LONGEST_MS:
        raise BadRequest(
            f"The header {name} must be a number of milliseconds above 0, at most "
            f"{LONGEST_MS:.0f}; given: {text!r:.50}."
        )
    return value / 1000
