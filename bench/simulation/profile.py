"""How long things take at one kind of worker: what `pdserve bench profile` writes, as JSON."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import msgspec

from pdserve.bench.arrivals import BenchError

FORMAT = "pdserve-profile/2"


class StepTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one engine step, from the step's contents. All weights are ≥ 0.

        decode   base(n) + context(n) × Σ context                n chunks of one token
        mixed    base + token × p + pair × pairs                 p tokens of prompts
                      + request × n + context × Σ context        beside n chunks of one token
        loop     base + chunk × chunks                           between two steps

    pairs = Σ length × (start + length / 2) over the prompts' chunks: the queries and keys that
    attention looks at. base(n) and context(n) are given at some n, ascending, and lie on straight
    lines between them: a step takes another way through the engine, or no longer fits a cache, from
    some number of requests on.
    """

    decode: tuple[tuple[int, float, float], ...]
    """(n, base, context)."""
    mixed: tuple[float, float, float, float, float]
    loop: tuple[float, float] = (0.0, 0.0)

    def decode_s(self, requests: int, context: int, steps: int = 1) -> float:
        """Of `steps` steps one after the other, at the first of which the requests together have
        `context` tokens."""
        base, token = self._decode(requests)
        pause, chunk = self.loop
        each = base + pause + chunk * requests + token * context
        return steps * each + token * requests * steps * (steps - 1) / 2

    def _decode(self, requests: int) -> tuple[float, float]:
        """base and context at so many requests."""
        knots = self.decode
        if len(knots) == 1 or requests <= knots[0][0]:
            return knots[0][1:]
        place = min(bisect.bisect_left(knots, (requests,)), len(knots) - 1)
        low, high = knots[place - 1], knots[place]
        part = (requests - low[0]) / (high[0] - low[0])
        base, token = low[1] + part * (high[1] - low[1]), low[2] + part * (high[2] - low[2])
        return max(0.0, base), max(0.0, token)

    def mixed_s(
        self, tokens: int, pairs: float, prompts: int = 1, requests: int = 0, context: int = 0
    ) -> float:
        """Of a step with `prompts` chunks of prompts, `tokens` long together."""
        base, token, pair, request, other = self.mixed
        pause, chunk = self.loop
        computed = base + token * tokens + pair * pairs + request * requests + other * context
        return computed + pause + chunk * (prompts + requests)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of worker, and what lies around it."""

    format: str = FORMAT
    model: str
    device: str
    dtype: str
    block_size: int
    num_blocks: int
    """Of one worker."""
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    step: StepTimes
    front_s: float
    """From a request's arrival at the router to its worker, and from a token to the client."""
    hand_over: tuple[float, float]
    """Seconds from the order to fetch to the blocks' arrival: base, and per token."""
    errors: dict[str, float] = {}
    """How far the fits are from what was measured: mean of |fitted / measured - 1|."""
    measured: dict[str, Any] = {}
    """What the fits were made from."""
    circumstances: dict[str, Any] = {}

    def transfer_s(self, tokens: int) -> float:
        return self.hand_over[0] + self.hand_over[1] * tokens

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def prompt_s(self, length: int) -> float:
        """Seconds to compute a prompt alone, chunk by chunk."""
        spent, start = 0.0, 0
        while start < length:
            size = min(length - start, self.max_num_batched_tokens)
            spent += self.step.mixed_s(size, size * (start + size / 2))
            start += size
        return spent

    def alone_s(self, length: int, output: int) -> tuple[float, float]:
        """TTFT and time per token of a request that has a worker to itself."""
        middle = length + output // 2
        return self.front_s + self.prompt_s(length), self.step.decode_s(1, middle)


def load(path: Path) -> Profile:
    """Raises BenchError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise BenchError(f"--profile: {path} cannot be read: {error.strerror}.") from None
    except msgspec.MsgspecError as error:
        raise BenchError(f"--profile: {path} is no profile: {error}.") from None
    if found.format != FORMAT:
        raise BenchError(f"--profile: {path} has format {found.format!r}, not {FORMAT!r}.")
    return found
