"""What became of requests: records that routers write and `pdserve explain` reads, in Redis.

    {pdserve}:explain:<id of the answer>   string  a Record as JSON, expires after KEEP_S
    {pdserve}:explain:<x-request-id>       string  "=" and the id of the answer
    {pdserve}:explained                    list    the keys above, newest first, at most KEEP

Records help people, never the cluster: nothing is decided by them, and without Redis they are lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from redis.exceptions import RedisError

from pdserve.cluster.membership import client_of, unavailable
from pdserve.cluster.requests import RequestRecord
from pdserve.protocol.messages import LifeEvent

KEEP_S = 900
"""A record is kept for so long after it was last written."""
KEEP = 20_000
"""Keys kept in all; beyond them the oldest go first."""
MAX_BYTES = 64 * 1024
"""Longest record."""
TIMEOUT_S = 1.0


class Considered(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker that could have been chosen, with the numbers that went into its cost."""

    worker: str
    hand_off: bool = False
    """It would compute the prompt and hand it over; else it does, or goes on with, everything."""
    cached_tokens: int = 0
    queued_tokens: int = 0
    requests: int = 0
    free_tokens: int | None = None
    floor: int = 0
    """Least cost: how busy those are who must go on behind it."""
    cost: int | None = None
    """None: the policy does not count costs."""
    full: bool = False


class Chosen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice, with as many of its candidates as a record has room for."""

    how: str
    """"redis", "own view", "only one", or the policy's name."""
    worker: str
    tokens: int
    """Prompt and answer so far, which were to be placed."""
    among: int
    """Workers that could have been chosen; `candidates` are the best of them."""
    candidates: list[Considered] = []
    unit: str = "tokens"
    """Of the costs: tokens to be computed, or predicted µs."""
    why: str = ""
    """Why the prompt is handed over, or why not."""


class LegStory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One submission to one worker. Times: seconds since the router received the request."""

    kind: str
    worker: str
    epoch: int
    role: str
    submitted_s: float
    chosen: Chosen
    answered: bool = False
    error: str = ""
    """Why it ended badly."""
    events: tuple[LifeEvent, ...] = ()
    """Seconds since the worker received it."""


class AnswerStory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of a request's answers."""

    tokens: int
    """Generated so far."""
    finish_reason: str = ""
    legs: list[LegStory] = []


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, as its router knew it when the record was written."""

    id: str
    """Of the answer, e.g. chatcmpl-…"""
    request_id: str
    """x-request-id of the answer."""
    router: str
    state: str
    """"running", "finished", "failed" or "client left"."""
    received: float
    """Unix time."""
    elapsed_s: float
    tokenized_s: float
    """This and the next two since it was received; 0: not yet."""
    submitted_s: float = 0.0
    first_token_s: float = 0.0
    prompt_tokens: int = 0
    error: str = ""
    answers: list[AnswerStory] = []
    more_answers: int = 0
    """Answers that are not told of."""
    carried: RequestRecord | None = None
    """What its router said last of it, if it runs: younger than the rest. Not kept here."""


class Note(NamedTuple):
    """A record ready to be written."""

    names: tuple[str, ...]
    """Id of the answer, x-request-id."""
    text: bytes


# KEYS: list of keys, then pairs of keys and values follow in ARGV. ARGV: prefix, time to live,
# most keys, then name, value, name, value …
_WRITE = """
local prefix, ttl, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
for i = 4, #ARGV, 2 do
  local key = prefix .. ARGV[i]
  if not redis.call('SET', key, ARGV[i + 1], 'EX', ttl, 'GET') then
    redis.call('LPUSH', KEYS[1], key)
  end
end
redis.call('EXPIRE', KEYS[1], ttl)
local spare = redis.call('LLEN', KEYS[1]) - most
while spare > 0 do
  redis.call('UNLINK', redis.call('RPOP', KEYS[1]))
  spare = spare - 1
end
return 1
"""


class Journal:
    """The records of one cluster. Methods raise RedisUnavailable."""

    def __init__(self, url: str, cluster: str = "pdserve", keep: int = KEEP) -> None:
        self._url = url
        self._prefix = f"{{{cluster}}}:explain:"
        self._list = f"{{{cluster}}}:explained"
        self._keep = keep
        self._redis = client_of(url, TIMEOUT_S)

    async def write(self, notes: Sequence[Note]) -> None:
        """Write records in one round trip; one with a known id replaces what was known."""
        pairs: list[str | bytes] = []
        for names, text in notes:
            pairs += [names[0], text]
            for alias in names[1:]:
                if alias != names[0]:
                    pairs += [alias, f"={names[0]}"]
        try:
            await self._redis.eval(_WRITE, 1, self._list, self._prefix, KEEP_S, self._keep, *pairs)
        except (RedisError, OSError) as error:
            raise unavailable(self._url, error) from error

    async def find(self, name: str) -> Record | None:
        """The record of an answer's id or an x-request-id."""
        try:
            text = await self._get(name)
            if text is not None and text.startswith(b"="):
                text = await self._get(text[1:].decode())
        except (RedisError, OSError) as error:
            raise unavailable(self._url, error) from error
        return None if text is None else msgspec.json.decode(text, type=Record)

    async def _get(self, name: str) -> bytes | None:
        found: bytes | None = await self._redis.execute_command("GET", self._prefix + name)
        return found

    async def close(self) -> None:
        await self._redis.aclose()
