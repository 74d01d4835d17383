"""Who is in the cluster: one record per worker in Redis, under a lease.

Keys (one hash slot, so that the scripts also run on a Redis Cluster):

    {pdserve}:epochs      hash  worker id → newest epoch given out
    {pdserve}:workers     hash  worker id → WorkerRecord as JSON, without its condition
    {pdserve}:conditions  hash  worker id → the rest: load, transports in use
    {pdserve}:leases      zset  worker id, scored by the end of its lease (ms, Redis' clock)
    {pdserve}:changes     zset  worker id, scored by the version at which its record last changed,
                                or went away
    {pdserve}:versions    hash  "now": the newest version; "since": `changes` is whole from here on

Every operation is one script, hence atomic and one round trip. An epoch, like a version, is the
larger of the last one plus one and Redis' clock in milliseconds: it stays unique even if Redis
loses its memory. A lease is renewed each second, a record hardly ever changes, and who follows the
cluster reads what has changed: so nobody pays for the number of workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from pdserve.cluster.records import WorkerCondition, WorkerRecord
from pdserve.protocol.errors import PdserveError

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
"""How long one attempt to connect, or one answer, may take."""

_NOW_MS = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

_KEYS = (
    "epochs", "workers", "leases", "conditions", "changes", "versions", "loads", "charges",
)  # fmt: skip
"""KEYS of every script, in this order. The last two are those of `cluster.placement`: what a worker
that has gone said of its load, and what it was charged, goes with it."""

MOST_GONE = 1000
"""Workers that have gone and are remembered as such for those who follow; with more of them than of
living ones all read everything once."""

# Call `changed(id)` for a record that changes, `gone(id)` for one that goes.
_CHANGES = (
    _NOW_MS
    + f"""
local function changed(id)
  local last = tonumber(redis.call('HGET', KEYS[6], 'now') or '0')
  local version = string.format('%.0f', math.max(last + 1, now))
  if last == 0 then redis.call('HSET', KEYS[6], 'since', version) end
  redis.call('HSET', KEYS[6], 'now', version)
  redis.call('ZADD', KEYS[5], version, id)
end
local function gone(id)
  redis.call('HDEL', KEYS[2], id)
  redis.call('HDEL', KEYS[4], id)
  redis.call('ZREM', KEYS[3], id)
  redis.call('HDEL', KEYS[7], id)
  redis.call('HDEL', KEYS[8], id)
  changed(id)
  if redis.call('ZCARD', KEYS[5]) > 2 * redis.call('HLEN', KEYS[2]) + {MOST_GONE} then
    redis.call('DEL', KEYS[5])
    redis.call('HSET', KEYS[6], 'since', redis.call('HGET', KEYS[6], 'now'))
  end
end
local function expire()
  local late = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now))
  for _, id in ipairs(late) do gone(id) end
end
"""
)

_NEXT_EPOCH = (
    _NOW_MS
    + """
local last = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
local mine = tonumber(ARGV[2])
if mine > 0 and last > mine then return 0 end
last = math.max(last, mine)
local epoch = math.max(last + 1, now)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', epoch))
return epoch
"""
)

# ARGV: worker id, epoch, lease in ms, record, condition
_PUBLISH = (
    _CHANGES
    + """
local newest = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
local epoch = tonumber(ARGV[2])
if epoch < newest then return 0 end
if epoch > newest then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[4] then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
  changed(ARGV[1])
end
redis.call('HSET', KEYS[4], ARGV[1], ARGV[5])
redis.call('ZADD', KEYS[3], string.format('%.0f', now + tonumber(ARGV[3])), ARGV[1])
return 1
"""
)

# ARGV: worker id, epoch
_REMOVE = (
    _CHANGES
    + """
local record = redis.call('HGET', KEYS[2], ARGV[1])
if record and cjson.decode(record).epoch == tonumber(ARGV[2]) then gone(ARGV[1]) end
return 1
"""
)

_WORKERS = (
    _CHANGES
    + """
expire()
return {redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[4])}
"""
)

# ARGV: the version that is known. Returns the version, whether all records follow or those that
# have changed, and pairs of worker id and record, '' for one that has gone
_FOLLOW = (
    _CHANGES
    + """
expire()
local known = tonumber(ARGV[1])
local version = redis.call('HGET', KEYS[6], 'now')
local since = tonumber(redis.call('HGET', KEYS[6], 'since') or '0')
if not version then return {'0', 1, {}} end
if known < since or known > tonumber(version) then
  return {version, 1, redis.call('HGETALL', KEYS[2])}
end
local pairs = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[5], '(' .. ARGV[1], '+inf')) do
  pairs[#pairs + 1] = id
  pairs[#pairs + 1] = redis.call('HGET', KEYS[2], id) or ''
end
return {version, 0, pairs}
"""
)


class RedisUnavailable(PdserveError):
    """Redis did not answer, or its answer made no sense; `str()` names the URL, password masked."""


def masked(url: str) -> str:
    """A Redis URL fit for logs: the password replaced by ***."""
    parts = urlsplit(url)
    if not parts.password:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def client_of(url: str, timeout_s: float, retries: int = 0) -> Redis:
    """A client whose attempts to connect, and whose answers, take at most so long. Raises
    RedisUnavailable for a URL that is none."""
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), retries),
        )
    except ValueError as error:
        raise RedisUnavailable(f"The Redis URL {masked(url)!r} cannot be used: {error}") from None


def unavailable(url: str, error: Exception) -> RedisUnavailable:
    """What a client's error is to everybody else."""
    reason = str(error).rstrip(".") or type(error).__name__
    return RedisUnavailable(f"Redis at {masked(url)} does not answer: {reason}.")


class Membership:
    """The workers of one cluster, as Redis knows them. Every method raises RedisUnavailable."""

    def __init__(self, url: str, cluster: str = "pdserve") -> None:
        self._url = url
        self._keys = [f"{{{cluster}}}:{name}" for name in _KEYS]
        self._unreadable: set[str] = set()
        self._version = 0
        self._followed: dict[str, WorkerRecord] = {}
        """As of that version."""
        self.began_anew = False
        """The last `follow` could not tell what has changed: Redis may have lost its memory, and
        workers that are not listed may be about to publish themselves again."""
        self._redis = client_of(url, TIMEOUT_S, retries=1)

    async def next_epoch(self, worker_id: str, after: int = 0) -> int:
        """A number larger than every epoch that this worker id had before. `after`: the caller's
        present epoch; 0 comes back if a newer one exists: then it has been replaced."""
        return int(await self._run(_NEXT_EPOCH, worker_id, after))

    async def publish(self, record: WorkerRecord, lease_s: float = 3.0) -> bool:
        """Write the record and renew its lease. False if a newer epoch exists: then the caller has
        been replaced and must stop."""
        lease_ms = max(1, round(lease_s * 1000))
        parts = [msgspec.json.encode(part) for part in record.parts()]
        return bool(await self._run(_PUBLISH, record.worker_id, record.epoch, lease_ms, *parts))

    async def remove(self, worker_id: str, epoch: int) -> None:
        """Take this incarnation's record away; a newer one's stays."""
        await self._run(_REMOVE, worker_id, epoch)

    async def workers(self) -> list[WorkerRecord]:
        """The workers whose lease runs, by worker id, with their condition."""
        texts, conditions = map(_pairs, await self._run(_WORKERS))
        records = []
        for worker_id, record in self._readable(texts.items()).items():
            try:
                condition = msgspec.json.decode(
                    conditions[worker_id.encode()], type=WorkerCondition
                )
                record = record.in_condition(condition)
            except (KeyError, msgspec.DecodeError) as error:
                log.debug("The condition of %s cannot be read: %s", worker_id, error)
            records.append(record)
        return sorted(records, key=lambda record: record.worker_id)

    async def follow(self) -> dict[str, WorkerRecord]:
        """The workers whose lease runs, without their condition; what is read, decoded and paid for
        is what has changed since the last call. The caller must not change the result."""
        version, whole, changes = await self._run(_FOLLOW, self._version)
        texts = _pairs(changes)
        records = {} if whole else self._followed
        if texts or whole:
            records = {name: one for name, one in records.items() if name.encode() not in texts}
            records |= self._readable((name, text) for name, text in texts.items() if text)
        self.began_anew = bool(whole and self._version)
        self._version, self._followed = int(version), records
        return records

    def _readable(self, texts: Iterable[tuple[bytes, bytes]]) -> dict[str, WorkerRecord]:
        records = {}
        for name, text in texts:
            try:
                records[name.decode()] = msgspec.json.decode(text, type=WorkerRecord)
            except (UnicodeDecodeError, msgspec.DecodeError) as error:
                self._complain(text, error)
        return records

    async def close(self) -> None:
        await self._redis.aclose()

    async def _run(self, script: str, *arguments: str | int | bytes) -> Any:
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            return await self._redis.eval(script, len(self._keys), *self._keys, *arguments)
        except (RedisError, OSError) as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise RedisUnavailable(
                f"Redis at {masked(self._url)} does not answer: {reason}. "
                "Start it, or give another --redis URL."
            ) from error
        finally:
            # Python 3.11's wait_for, which the client uses, swallows a cancellation that comes
            # together with its result; a caller that polls would then go on for ever.
            if task.cancelling() > cancellations:
                raise asyncio.CancelledError

    def _complain(self, text: bytes, error: Exception) -> None:
        """Once per unreadable record: some worker runs another release."""
        shown = text[:120].decode(errors="replace")
        if shown not in self._unreadable:
            self._unreadable.add(shown)
            log.warning(
                "Ignored a worker's record that this release cannot read (%s): %s", error, shown
            )


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
