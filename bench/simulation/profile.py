"""How long things take at one kind of worker: what `pdserve bench profile` writes, as JSON."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pdserve.bench.arrivals import BenchError

FORMAT = "pdserve-profile/4"
TYPICAL = (4, 1024)
"""Requests and context of the step by whose times profiles are compared."""
_SAME = ("model", "device", "dtype", "block_size", "num_blocks", "max_num_batched_tokens",
         "max_num_seqs", "max_model_len", "workers")  # fmt: skip


class StepTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds from the beginning of one engine step to the next one's, from the step's contents.

        decode   base(n) + context(n) × Σ context     n chunks of one token
        mixed    base + token × p + pair × pairs      p tokens of prompts
                      + share × (decode(n) - loop)    beside n chunks of one token
                      + loop                          until the next step
        loop     pause + chunk × chunks               is in decode(n) already

    pairs = Σ length × (start + length / 2) over the prompts' chunks: the queries and keys that
    attention looks at. base(n) and context(n) are given at some n, ascending, and lie on straight
    lines between them: a step takes another way through the engine, or no longer fits a cache, from
    some number of requests on.
    """

    decode: tuple[tuple[int, float, float], ...]
    """(n, base, context)."""
    prompt: tuple[float, float, float]
    """(base, token, pair)."""
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """Of the time of single tokens, what they take beside prompts: all where prompts leave nothing
    idle and weights are read anew, little on a GPU that waits for memory meanwhile."""
    loop: tuple[float, float] = (0.0, 0.0)

    def decode_s(self, requests: int, context: int, steps: int = 1) -> float:
        """Of `steps` steps one after the other, at the first of which the requests together have
        `context` tokens."""
        base, token = self._decode(requests)
        each = base + token * context
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

    def towards(self, other: StepTimes, share: float) -> StepTimes:
        """`share` (0 to 1) of the way from these times to `other`, which know the same n."""

        def between(one: float, two: float) -> float:
            return one + share * (two - one)

        def each(ones: Sequence[float], twos: Sequence[float]) -> list[float]:
            return [between(one, two) for one, two in zip(ones, twos, strict=True)]

        pairs = zip(self.decode, other.decode, strict=True)
        knots = [(one[0], *each(one[1:], two[1:])) for one, two in pairs]
        return msgspec.convert(
            {"decode": knots, "prompt": each(self.prompt, other.prompt),
             "share": between(self.share, other.share),
             "loop": each(self.loop, other.loop)}, StepTimes,
        )  # fmt: skip

    def scaled(self, steps: float, prompts: float) -> StepTimes:
        """With so many times longer steps of single tokens and of prompts."""
        return StepTimes(
            decode=tuple((n, steps * base, steps * token) for n, base, token in self.decode),
            prompt=(prompts * self.prompt[0], prompts * self.prompt[1], prompts * self.prompt[2]),
            share=self.share,
            loop=(steps * self.loop[0], steps * self.loop[1]),
        )  # fmt: skip

    def mixed_s(
        self, tokens: int, pairs: float, prompts: int = 1, requests: int = 0, context: int = 0
    ) -> float:
        """Of a step with `prompts` chunks of prompts, `tokens` long together."""
        base, token, pair = self.prompt
        pause, chunk = self.loop
        loop = pause + chunk * (prompts + requests)
        spent = base + token * tokens + pair * pairs + loop
        if requests:
            spent += self.share * max(0.0, self.decode_s(requests, context) - loop)
        return spent


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
    workers: Annotated[int, msgspec.Meta(ge=1)]
    """That share a machine, and slow each other down: memory, caches, and the cores that router and
    client need, too."""
    alone: StepTimes
    """While the machine's other workers have nothing to do."""
    beside: StepTimes
    """While all of them compute."""
    request_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """What a request costs a decode worker beside steps, its hand-over among it: those whose
    answers it writes meanwhile wait for so long, once. Colocated workers show no such cost."""
    jitter: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How much the time per token of equal requests differs by itself: the deviation of its
    logarithm."""
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

    def paces(self) -> tuple[StepTimes, ...]:
        """How long steps take, by how many of the machine's other workers compute meanwhile."""
        others = max(1, self.workers - 1)
        return tuple(self.alone.towards(self.beside, n / others) for n in range(self.workers))

    def at_pace(self, steps: float, prompts: float) -> Profile:
        """Of the same machine while its steps take so many times as long."""
        return msgspec.structs.replace(
            self,
            alone=self.alone.scaled(steps, prompts),
            beside=self.beside.scaled(steps, prompts),
            request_s=self.request_s * steps,
            front_s=self.front_s * steps,
            hand_over=(self.hand_over[0] * steps, self.hand_over[1] * steps),
        )

    def prompt_s(self, length: int, times: StepTimes) -> float:
        """Seconds to compute a prompt without others beside it, chunk by chunk."""
        spent, start = 0.0, 0
        while start < length:
            size = min(length - start, self.max_num_batched_tokens)
            spent += times.mixed_s(size, size * (start + size / 2))
            start += size
        return spent

    def alone_s(self, length: int, output: int) -> tuple[float, float]:
        """TTFT and time per token of a request that has a machine to itself."""
        middle = length + output // 2
        first = self.front_s + self.prompt_s(length, self.alone)
        return first, self.alone.decode_s(1, middle)


class _Named(msgspec.Struct, frozen=True):
    format: str


def mean(profiles: Sequence[Profile]) -> Profile:
    """Of profiles of the same machine at several times, between which its own speed changes; what
    they differ by counts as jitter. Raises BenchError."""
    found = profiles[0]
    for number, other in enumerate(profiles[1:], 1):
        for name in _SAME:
            if getattr(found, name) != getattr(other, name):
                raise BenchError(
                    f"--profile: they are of different things: {name} is {getattr(found, name)} "
                    f"in the first and {getattr(other, name)} in another."
                )
        if [knot[0] for knot in found.alone.decode] != [knot[0] for knot in other.alone.decode]:
            raise BenchError("--profile: they know steps of different numbers of requests.")
        share = 1 / (number + 1)
        base, token = found.hand_over, other.hand_over
        found = msgspec.structs.replace(
            found,
            alone=found.alone.towards(other.alone, share),
            beside=found.beside.towards(other.beside, share),
            request_s=found.request_s + share * (other.request_s - found.request_s),
            front_s=found.front_s + share * (other.front_s - found.front_s),
            hand_over=(base[0] + share * (token[0] - base[0]),
                       base[1] + share * (token[1] - base[1])),
            errors={name: max(off, other.errors.get(name, off)) for name, off in
                    found.errors.items()},
            measured={},
            circumstances={"several": [one.circumstances for one in profiles]},
        )  # fmt: skip
    paces = [math.log(one.beside.decode_s(*TYPICAL)) for one in profiles]
    spread = statistics.pvariance(paces) + statistics.fmean(one.jitter**2 for one in profiles)
    return msgspec.structs.replace(found, jitter=math.sqrt(spread))


def load(path: Path) -> Profile:
    """Raises BenchError."""
    try:
        content = path.read_bytes()
        named = msgspec.json.decode(content, type=_Named)
        if named.format != FORMAT:
            raise BenchError(
                f"--profile: {path} has format {named.format!r}, not {FORMAT!r}: make a new one."
            )
        return msgspec.json.decode(content, type=Profile)
    except OSError as error:
        raise BenchError(f"--profile: {path} cannot be read: {error.strerror}.") from None
    except msgspec.MsgspecError as error:
        raise BenchError(f"--profile: {path} is no profile: {error}.") from None
