"""Responses that were made, and those being made in the background, in Redis for every router.

    {pdserve}:response:<id>         hash  status, body, history, input, background, stream, lease
    {pdserve}:response-events:<id>  list  frames of a background stream, by number
    {pdserve}:responses             zset  ids, scored by when they expire (ms, Redis' clock)
    {pdserve}:response-sizes        hash  id → bytes; the total under the empty name

All expire a time to live after they were last written, and the oldest make room when there are too
many or too much. A response that is open (queued or in_progress) has an owner, which renews its
lease; once that has ended, the response has failed, whoever looks first. Every operation is one
script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from redis.exceptions import RedisError

from pdserve.cluster.membership import client_of, unavailable

Json = dict[str, Any]

KEEP = 10_000
"""Most responses."""
KEEP_BYTES = 256 * 2**20
"""Most bytes of all together."""
MAX_BYTES = 4 * 2**20
"""Longest response: its body and the conversation before it."""
MAX_EVENTS_BYTES = 16 * 2**20
"""Longest log of one stream's events."""
LEASE_S = 5.0
"""An owner that has not been heard of for so long is gone."""
TIMEOUT_S = 1.0
OPEN = ("queued", "in_progress")
LOST = "lost"
"""Why a response failed whose owner is gone."""

_COMMON = """
local index, sizes = KEYS[1], KEYS[2]
local record, log = ARGV[1] .. ARGV[3], ARGV[2] .. ARGV[3]
local id, ttl = ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local function drop(one)
  redis.call('UNLINK', ARGV[1] .. one, ARGV[2] .. one)
  local size = tonumber(redis.call('HGET', sizes, one) or '0')
  redis.call('HINCRBY', sizes, '', -size)
  redis.call('HDEL', sizes, one)
  redis.call('ZREM', index, one)
end
local function written(bytes)
  redis.call('EXPIRE', record, ttl)
  redis.call('EXPIRE', log, ttl)
  redis.call('ZADD', index, string.format('%.0f', now + ttl * 1000), id)
  redis.call('HINCRBY', sizes, id, bytes)
  redis.call('HINCRBY', sizes, '', bytes)
  for _, one in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', string.format('%.0f', now))) do
    drop(one)
  end
  while redis.call('ZCARD', index) > tonumber(ARGV[5])
     or tonumber(redis.call('HGET', sizes, '')) > tonumber(ARGV[6]) do
    local oldest = redis.call('ZRANGE', index, 0, 0)[1]
    if not oldest or oldest == id then break end
    drop(oldest)
  end
  redis.call('EXPIRE', index, ttl)
  redis.call('EXPIRE', sizes, ttl)
end
local function status()
  local found = redis.call('HMGET', record, 'status', 'lease')
  if (found[1] == 'queued' or found[1] == 'in_progress') and tonumber(found[2]) < now then
    redis.call('HSET', record, 'status', 'failed', 'reason', 'lost')
    return 'failed'
  end
  return found[1] or ''
end
local function is_open(word)
  return word == 'queued' or word == 'in_progress'
end
local function extend(lease)
  redis.call('HSET', record, 'lease', string.format('%.0f', now + tonumber(lease)))
end
local function append(number, first)
  local bytes, there = 0, redis.call('LLEN', log)
  for i = first + math.max(0, there - tonumber(number)), #ARGV do
    redis.call('RPUSH', log, ARGV[i])
    bytes = bytes + #ARGV[i]
  end
  return bytes
end
"""
"""ARGV, of all: prefix of records, prefix of logs, id, time to live, most responses, most bytes."""

# ARGV[7:]: lease in ms, status, body, history, input, background, stream
_CREATE = """
if redis.call('EXISTS', record) == 1 then return 0 end
redis.call('HSET', record, 'status', ARGV[8], 'body', ARGV[9], 'history', ARGV[10],
           'input', ARGV[11], 'background', ARGV[12], 'stream', ARGV[13])
extend(ARGV[7])
written(#ARGV[9] + #ARGV[10] + #ARGV[11])
return 1
"""

# ARGV[7:]: lease in ms, status, number of the first frame, frames …
_RENEW = """
if not is_open(status()) then return 0 end
redis.call('HSET', record, 'status', ARGV[8])
extend(ARGV[7])
written(append(ARGV[9], 10))
return 1
"""

# ARGV[7:]: status, body, number of the first frame, frames …
_FINISH = """
if not is_open(status()) then return 0 end
local before = #redis.call('HGET', record, 'body')
redis.call('HSET', record, 'status', ARGV[7], 'body', ARGV[8])
written(append(ARGV[9], 10) + #ARGV[8] - before)
return 1
"""

_FIND = """
local word = status()
if word == '' then return false end
local found = redis.call('HMGET', record, 'body', 'history', 'input', 'background', 'stream',
                         'reason')
return {word, found[1], found[2], found[3], found[4], found[5], found[6] or ''}
"""

_CANCEL = """
local open = is_open(status())
if open then redis.call('HSET', record, 'status', 'cancelled') end
return open and 1 or 0
"""

_DELETE = """
if redis.call('EXISTS', record) == 0 then return 0 end
drop(id)
return 1
"""

# ARGV[7:]: first event wanted, most events
_EVENTS = """
local first = tonumber(ARGV[7])
local word = status()
return {word, redis.call('LLEN', log),
        redis.call('LRANGE', log, first, first + tonumber(ARGV[8]) - 1)}
"""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    body: Json
    """The response object, with its status."""
    history: list[Json]
    """Items of the conversation before this request."""
    input: list[Json]
    """Items of this request."""
    background: bool
    stream: bool
    """Its events can be read."""

    @property
    def open(self) -> bool:
        return self.body["status"] in OPEN


class Events(NamedTuple):
    status: str
    """Empty: there is no such response."""
    length: int
    """Events so far."""
    frames: list[bytes]


class ResponseStore:
    """The responses of one cluster. Methods raise RedisUnavailable."""

    def __init__(
        self,
        url: str,
        cluster: str = "pdserve",
        *,
        ttl_s: int,
        keep: int = KEEP,
        keep_bytes: int = KEEP_BYTES,
        lease_s: float = LEASE_S,
    ) -> None:
        self._url = url
        self._records = f"{{{cluster}}}:response:"
        self._logs = f"{{{cluster}}}:response-events:"
        self._keys = [f"{{{cluster}}}:responses", f"{{{cluster}}}:response-sizes"]
        self._limits = (ttl_s, keep, keep_bytes)
        self._lease_ms = round(lease_s * 1000)
        self._redis = client_of(url, TIMEOUT_S)

    async def check(self) -> None:
        """Is Redis there?"""
        try:
            await self._redis.execute_command("PING")
        except (RedisError, OSError) as error:
            raise unavailable(self._url, error) from error

    async def create(self, response: StoredResponse) -> bool:
        """A new one, under a lease if it is open. False if its id is taken. Raises ValueError if it
        is too long."""
        body = response.body
        parts = [msgspec.json.encode(part) for part in (body, response.history, response.input)]
        _check_size(sum(map(len, parts)))
        flags = (int(response.background), int(response.stream))
        return bool(
            await self._run(_CREATE, body["id"], self._lease_ms, body["status"], *parts, *flags)
        )

    async def renew(
        self, response_id: str, status: str, first: int = 0, frames: Sequence[bytes] = ()
    ) -> bool:
        """Say that an open response is still worked at, and what it has said: events from number
        `first` on, of which some may be known. False if it is no longer open: nobody waits for
        it."""
        return bool(await self._run(_RENEW, response_id, self._lease_ms, status, first, *frames))

    async def finish(self, body: Json, first: int = 0, frames: Sequence[bytes] = ()) -> bool:
        """The end of an open response, with its last events. False if it was not open. Raises
        ValueError if it is too long."""
        text = msgspec.json.encode(body)
        _check_size(len(text))
        return bool(await self._run(_FINISH, body["id"], body["status"], text, first, *frames))

    async def find(self, response_id: str) -> StoredResponse | None:
        found = await self._run(_FIND, response_id)
        if found is None:
            return None
        status, body, history, given, background, stream, reason = found
        response = msgspec.json.decode(body)
        response["status"] = status.decode()
        if reason.decode() == LOST:
            message = "The router that made this response has ended or lost Redis."
            response["error"] = {"code": "server_error", "message": message}
        return StoredResponse(
            body=response,
            history=msgspec.json.decode(history),
            input=msgspec.json.decode(given),
            background=background == b"1",
            stream=stream == b"1",
        )

    async def cancel(self, response_id: str) -> bool:
        """Close an open response; its owner notices with its next `renew`. False if there is no
        open one."""
        return bool(await self._run(_CANCEL, response_id))

    async def delete(self, response_id: str) -> bool:
        """False if there is none."""
        return bool(await self._run(_DELETE, response_id))

    async def events(self, response_id: str, first: int, most: int) -> Events:
        """Up to `most` frames from number `first` on."""
        status, length, frames = await self._run(_EVENTS, response_id, first, most)
        return Events(status.decode(), length, frames)

    async def _run(self, script: str, response_id: str, *arguments: Any) -> Any:
        names = (*self._keys, self._records, self._logs, response_id)
        try:
            return await self._redis.eval(_COMMON + script, 2, *names, *self._limits, *arguments)
        except (RedisError, OSError) as error:
            raise unavailable(self._url, error) from error

    async def close(self) -> None:
        await self._redis.aclose()


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(
            f"The response and its conversation take {size} bytes; at most {MAX_BYTES} are stored."
        )
