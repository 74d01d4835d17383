"""Which router carries which requests: small records of all that run, in Redis.

    {pdserve}:routers            zset  routers, scored by the end of their lease (ms, Redis' clock)
    {pdserve}:requests:<router>  hash  id of the answer → RequestRecord as JSON
    {pdserve}:aborts:<router>    set   ids that others want this router to end

A router writes all of its records with each heartbeat and nothing in between: no request waits for
it, nothing has to be taken back or rebuilt, and the records of a router that dies end with its
lease, as its requests do at the workers. Every operation is one script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from redis.exceptions import RedisError

from pdserve.cluster.membership import client_of, unavailable

ROUTER_LEASE_S = 10.0
"""A router from which nothing comes for so long is gone: frozen, or its host is. Workers then end
its requests (they hear of it each second), and its records here expire."""
TIMEOUT_S = 1.0
ABORTED_AT_ONCE = 100
"""Ids of one script, which looks at all routers for each: choices wait for it."""


class Holder(msgspec.Struct, frozen=True, array_like=True):
    """A worker that has a leg of a request: computes it, or holds its blocks."""

    worker: str
    epoch: int
    kind: str
    """"prefill", "decode", "full" or "moved"; see `router.leg`."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One running request, as of its router's last heartbeat."""

    id: str
    """Of the answer. Clients may choose equal ones: then one of them is told of."""
    request_id: str
    """x-request-id of the answer."""
    router: str
    received: float
    deadline: float
    """Unix times."""
    prompt_tokens: int
    """Of all its prompts, as is what follows of all its answers."""
    tokens: int
    """Generated so far."""
    holders: list[Holder]


_NOW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

# KEYS: routers, requests and aborts of the router. ARGV: router, lease in ms, then id and record of
# each request. Returns the ids to be ended.
_BEAT = (
    _NOW
    + """
local lease = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
redis.call('ZADD', KEYS[1], string.format('%.0f', now + lease), ARGV[1])
redis.call('DEL', KEYS[2])
for first = 3, #ARGV, 1000 do
  redis.call('HSET', KEYS[2], unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
redis.call('PEXPIRE', KEYS[2], lease)
local aborts = redis.call('SMEMBERS', KEYS[3])
redis.call('DEL', KEYS[3])
return aborts
"""
)

# KEYS: as above. ARGV: router
_LEAVE = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2], KEYS[3])
return 1
"""

# KEYS: routers. ARGV: beginning of the keys of requests, ids. Returns the first that is known.
_FIND = (
    _NOW
    + """
for _, router in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], string.format('%.0f', now), '+inf')) do
  for i = 2, #ARGV do
    local record = redis.call('HGET', ARGV[1] .. router, ARGV[i])
    if record then return record end
  end
end
return false
"""
)

# KEYS: routers. ARGV: beginning of the keys of requests and of aborts, lease in ms, who asks, ids.
# Requests that have just begun have no record yet: those ids go to all the other routers.
_ABORT = (
    _NOW
    + """
local routers = redis.call('ZRANGEBYSCORE', KEYS[1], string.format('%.0f', now), '+inf')
for i = 5, #ARGV do
  local carriers = {}
  for _, router in ipairs(routers) do
    if redis.call('HEXISTS', ARGV[1] .. router, ARGV[i]) == 1 then
      carriers[#carriers + 1] = router
    end
  end
  for _, router in ipairs(#carriers > 0 and carriers or routers) do
    if router ~= ARGV[4] then
      redis.call('SADD', ARGV[2] .. router, ARGV[i])
      redis.call('PEXPIRE', ARGV[2] .. router, ARGV[3])
    end
  end
end
return 1
"""
)

# KEYS: routers. ARGV: beginning of the keys of requests. Returns router, number of requests, …
_ROUTERS = (
    _NOW
    + """
local found = {}
for _, router in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], string.format('%.0f', now), '+inf')) do
  found[#found + 1] = router
  found[#found + 1] = redis.call('HLEN', ARGV[1] .. router)
end
return found
"""
)


class RequestRecords:
    """Those of one cluster. Methods raise RedisUnavailable."""

    def __init__(self, url: str, cluster: str = "pdserve") -> None:
        self._url = url
        slot = f"{{{cluster}}}:"
        self._routers = slot + "routers"
        self._requests = slot + "requests:"
        self._aborts = slot + "aborts:"
        self._redis = client_of(url, TIMEOUT_S)

    async def beat(
        self, router: str, records: Sequence[RequestRecord], lease_s: float = ROUTER_LEASE_S
    ) -> list[str]:
        """Renew the router's lease; `records` are all that it carries. Returns the ids that others
        want it to end, once."""
        flat: list[str | bytes] = []
        for record in records:
            flat += [record.id, msgspec.json.encode(record)]
        lease_ms = max(1, round(lease_s * 1000))
        ids = await self._run(_BEAT, self._keys_of(router), router, lease_ms, *flat)
        return [one.decode() for one in ids]

    async def leave(self, router: str) -> None:
        """The router ends: so do its records."""
        await self._run(_LEAVE, self._keys_of(router), router)

    async def find(self, *ids: str) -> RequestRecord | None:
        """The record of the first of these ids that some living router carries."""
        text = await self._run(_FIND, [self._routers], self._requests, *ids)
        return None if text is None else msgspec.json.decode(text, type=RequestRecord)

    async def abort(self, ids: Sequence[str], by: str) -> None:
        """Ask the other routers, but `by`, to end these; they hear of it with their next heartbeat.
        Ids that nobody carries are ignored by all."""
        lease_ms = round(ROUTER_LEASE_S * 1000)
        for first in range(0, len(ids), ABORTED_AT_ONCE):
            some = ids[first : first + ABORTED_AT_ONCE]
            await self._run(
                _ABORT, [self._routers], self._requests, self._aborts, lease_ms, by, *some
            )

    async def routers(self) -> Mapping[str, int]:
        """The living routers, and how many requests each carries."""
        flat = await self._run(_ROUTERS, [self._routers], self._requests)
        return {name.decode(): count for name, count in zip(flat[::2], flat[1::2], strict=True)}

    async def close(self) -> None:
        await self._redis.aclose()

    def _keys_of(self, router: str) -> list[str]:
        return [self._routers, self._requests + router, self._aborts + router]

    async def _run(self, script: str, keys: Sequence[str], *arguments: str | int | bytes) -> Any:
        try:
            return await self._redis.eval(script, len(keys), *keys, *arguments)
        except (RedisError, OSError) as error:
            raise unavailable(self._url, error) from error
