"""Who holds which prefix, and how loaded everybody is: shared by all routers through Redis.

Keys, in the hash slot of the membership's (see there):

    {pdserve}:blocks:<worker>#<epoch>   set   route hashes that the worker's prefix cache holds
    {pdserve}:loads                     hash  worker → its last report, msgpack
    {pdserve}:charges                   hash  worker → what routers have sent it since, msgpack
    {pdserve}:last:<0 or 1>:<hash>      string  the option that was chosen for the prompt with this
                                        last route hash; in large clusters, expires after LAST_S

A worker reports changes in batches with sequence numbers. A batch that does not follow the last one
(Redis was away, or has lost its memory) is refused, and the worker sends everything it has. All of
it goes away by itself when the reports stop: within BLOCKS_TTL_S, and at once when a worker leaves.

A router chooses in one round trip (`choose`): match, score, choose and charge are one script. A
charge counts until the worker's second report after it, which contains the request.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from pdserve.cluster.membership import RedisUnavailable, masked
from pdserve.cluster.redis_line import LineError, ScriptLine, packed
from pdserve.protocol.blocks import ROUTE_BYTES, ROUTE_UNIT

BLOCKS_TTL_S = 10.0
"""What a silent worker reported is forgotten after so long; its lease is over long before."""
UNKNOWN = -1
CHARGE_S = 2.0
"""A charge is dropped after so long whatever the worker reports."""
LAST_S = 600.0
"""It is remembered for so long who was chosen for a prompt."""
LAST_LOOKS = 32
"""Route hashes of a prompt, the last ones, for which it is looked up who was chosen: four doublings
of its length."""


class Recall(enum.IntEnum):
    """What a choice makes of who was chosen for the beginning of a prompt."""

    NOTHING = 0
    """All workers are asked about anyway."""
    STORE = 1
    CONSIDER = 2
    """Store, and ask about the one that was chosen last, too."""


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """A worker's load. The scripts below know the order of the fields."""

    queued_tokens: int
    """Prompt tokens not yet computed."""
    requests: int
    """Running, waiting and fetching."""
    free_tokens: int
    """Room in the KV cache, evictable blocks included; UNKNOWN before the first step."""
    waiting: int = 0
    """Of the requests, those that have not been started."""


ANY_NUMBER = 2**31
"""More requests than there will ever be."""


class Price(msgspec.Struct, frozen=True, array_like=True):
    """What a prompt costs at one worker, in any unit that all options of a choice share.

        missing = tokens - cached prefix
        before = cached prefix + missing / 2
        own = base + length × tokens + queued × queued tokens + request × requests
              + missing × (token + context × before)
        others = later + harm × requests × (token + context × tokens / 2)
        cost = max(own, floor) + missing × others

    It does not depend on the prompt, so it can be kept from one choice to the next.

    The scripts below know the order of the fields.
    """

    token: float = 1.0
    """A token whose KV is missing there."""
    context: float = 0.0
    """And each token before it: attention looks at all of them."""
    queued: float = 1.0
    """A prompt token that waits there already."""
    request: float = 64.0
    """A request that is there."""
    base: float = 0.0
    """Whatever the load and the cache."""
    harm: float = 0.0
    """How much each request that is there minds the time that a missing token takes."""
    most_requests: int = ANY_NUMBER
    """With so many there, it counts as full."""
    later: float = 0.0
    """What it costs those who come later that a missing token is computed once more: it displaces
    another one from a cache, and its prefix lies in one place more."""
    length: float = 0.0
    """Each token of the prompt, cached or not: its KV goes on to another worker."""


class Option(msgspec.Struct, frozen=True, array_like=True):
    """A worker that may be chosen. The scripts below know the order of the fields."""

    worker_id: str
    epoch: int
    floor: float = 0
    """It costs at least so much: what lies behind it (a decode worker) is so busy."""
    price: Price = Price()


class Score(msgspec.Struct, frozen=True, array_like=True):
    """The numbers that went into one option's cost."""

    cached_tokens: int
    """Longest prefix of the prompt that its cache holds, as far as route hashes tell."""
    queued_tokens: int
    """Charges included, like in the following."""
    requests: int
    free_tokens: int
    """UNKNOWN if the worker has not said."""
    cost: int
    full: bool


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """What a script chose: an index into the options, and a score for each of them."""

    index: int
    packed_scores: msgspec.Raw
    recalled: tuple[str, int] | None = None
    """Worker and epoch of one more option behind those that were given, with the last score."""

    @property
    def scores(self) -> list[Score]:
        """Unpacked for whoever asks: nobody does until the choice is told of, and they are long."""
        return _SCORES.decode(self.packed_scores)


class _Known(msgspec.Struct, frozen=True, array_like=True):
    """A report as it is kept."""

    epoch: int
    number: int
    reports: int
    queued_tokens: int
    requests: int
    free_tokens: int
    at: int
    """Redis' clock, ms."""
    waiting: int


_NOW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

# KEYS: epochs, loads, charges, blocks. ARGV: worker, epoch, sequence number, whole set or changes,
# load (4), stored, removed, hash length, time to live in ms
_REPORT = (
    _NOW
    + """
local newest = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
if tonumber(ARGV[2]) < newest then return -1 end
local known = redis.call('HGET', KEYS[2], ARGV[1])
local number, ttl = tonumber(ARGV[3]), tonumber(ARGV[12])
local reports = 0
if known then
  known = cmsgpack.unpack(known)
  if known[1] == tonumber(ARGV[2]) then reports = known[3] end
end
if ARGV[4] == '1' then
  redis.call('UNLINK', KEYS[4])
elseif not known or known[1] ~= tonumber(ARGV[2]) or known[2] ~= number - 1
    or now - known[7] > ttl then
  return 0
end
local size = tonumber(ARGV[11])
local function each(command, text)
  local part = {}
  for first = 1, #text, size do
    part[#part + 1] = text:sub(first, first + size - 1)
    if #part == 1000 then redis.call(command, KEYS[4], unpack(part)) part = {} end
  end
  if #part > 0 then redis.call(command, KEYS[4], unpack(part)) end
end
each('SREM', ARGV[10])
each('SADD', ARGV[9])
redis.call('PEXPIRE', KEYS[4], ttl + 1000)
redis.call('HSET', KEYS[2], ARGV[1], cmsgpack.pack({tonumber(ARGV[2]), number, reports + 1,
  tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), now, tonumber(ARGV[8])}))
return 1
"""
)

# KEYS: loads, charges, prefixes of blocks and of those chosen last. ARGV: options; hashes; tokens,
# random number, tokens charged by each missing one (0 or 1) and what to recall
_CHOOSE = (
    _NOW
    + f"""
local size, unit, charge_ms = {ROUTE_BYTES}, {ROUTE_UNIT}, {CHARGE_S * 1000:.0f}
local looks, last_ms = {LAST_LOOKS}, {LAST_S * 1000:.0f}
"""
    + """
local options = cmsgpack.unpack(ARGV[1])
local tokens, random, charged, recall = unpack(cmsgpack.unpack(ARGV[3]))
local hashes, count, given = ARGV[2], #ARGV[2] / size, #options
local function hash(index) return hashes:sub((index - 1) * size + 1, index * size) end
local function last(index) return KEYS[4] .. charged .. ':' .. hash(index) end

local function chosen_last()
  local keys = {}
  for i = count, math.max(1, count - looks + 1), -1 do keys[#keys + 1] = last(i) end
  for _, text in ipairs(redis.call('MGET', unpack(keys))) do
    if text then return cmsgpack.unpack(text) end
  end
end
if recall == 2 and count > 0 then
  local known = chosen_last()
  for _, option in ipairs(options) do
    if known and option[1] == known[1] then known = nil end
  end
  local load = known and redis.call('HGET', KEYS[1], known[1])
  if load and cmsgpack.unpack(load)[1] == known[2] then
    -- What was this request's own then is that of this one now: floor, most requests.
    known[3], known[4][7] = options[1][3], options[1][4][7]
    options[given + 1] = known
  end
end

local ids = {}
for i, option in ipairs(options) do ids[i] = option[1] end
local loads = redis.call('HMGET', KEYS[1], unpack(ids))
local charges = redis.call('HMGET', KEYS[2], unpack(ids))

local function holds(key, index)
  return redis.call('SISMEMBER', key, hash(index)) == 1
end
local function covered(index)
  if index == 0 then return 0 end
  if index <= 15 then return index * unit end
  local doublings = math.floor((index - 8) / 8)
  return (8 + (index - 8) % 8) * 2 ^ doublings * unit
end
local function match(key)
  if count == 0 or not holds(key, 1) then return 0 end
  local low, high = 1, count
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if holds(key, middle) then low = middle else high = middle - 1 end
  end
  return math.min(covered(low), tokens)
end

local scores, kept, best, ties = {}, {}, nil, {}
for i, option in ipairs(options) do
  local cached, queued, requests, free = 0, 0, 0, -1
  local reports = 0
  local load = loads[i] and cmsgpack.unpack(loads[i])
  if load and load[1] == option[2] then
    reports, queued, requests, free = load[3], load[4], load[5], load[6]
    cached = match(KEYS[3] .. option[1] .. '#' .. string.format('%.0f', option[2]))
  end
  kept[i] = {}
  for _, charge in ipairs(charges[i] and cmsgpack.unpack(charges[i]) or {}) do
    if charge[1] == option[2] and reports < charge[2] and now < charge[5] then
      kept[i][#kept[i] + 1] = charge
      queued, requests = queued + charge[3], requests + 1
      if free >= 0 then free = math.max(0, free - charge[4]) end
    end
  end
  local missing = tokens - cached
  local token, context, waiting, request, base, harm, most, later, length = unpack(option[4])
  local cost = base + length * tokens + waiting * queued + request * requests
    + missing * (token + context * (cached + missing / 2))
  local others = later + harm * requests * (token + context * tokens / 2)
  cost = math.floor(math.max(cost, option[3]) + missing * others)
  local full = (free >= 0 and free < missing) or requests >= most
  scores[i] = {cached, queued, requests, free, cost, full}
  local rank = (full and 1e15 or 0) + cost
  if best == nil or rank < best then best, ties = rank, {i} elseif rank == best then
    ties[#ties + 1] = i
  end
end
local chosen = ties[random % #ties + 1]
local reports = loads[chosen] and cmsgpack.unpack(loads[chosen])[3] or 0
local missing = tokens - scores[chosen][1]
local list = kept[chosen]
list[#list + 1] = {options[chosen][2], reports + 2, missing * charged, missing,
  now + charge_ms}
redis.call('HSET', KEYS[2], ids[chosen], cmsgpack.pack(list))
if recall > 0 and count > 0 then
  redis.call('SET', last(count), cmsgpack.pack(options[chosen]), 'PX', last_ms)
end
local answer = {chosen - 1, scores}
if #options > given then answer[3] = {options[given + 1][1], options[given + 1][2]} end
return cmsgpack.pack(answer)
"""
)

# KEYS: loads, charges, blocks. ARGV: worker, epoch
_LEAVE = """
redis.call('UNLINK', KEYS[3])
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and cmsgpack.unpack(known)[1] == tonumber(ARGV[2]) then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
end
return 1
"""


def ask(
    options: bytes,
    hashes: Sequence[bytes],
    tokens: int,
    *,
    charge_tokens: bool,
    random: int,
    recall: Recall = Recall.NOTHING,
) -> Ask:
    """One question to `Placement.choose`: the option (see `pack_options`; at least one) with the
    least cost (see `Price`). Options that are full come last, that is those whose room is less than
    what is missing, or that have their most requests; `random` decides between equal ones.
    `hashes` are the prompt's route hashes; without them nothing counts as cached.
    `charge_tokens`: the missing tokens will be computed there. `recall`: where not all workers are
    among the options, whether the one that was chosen for the beginning of the prompt is another.
    """
    numbers = _ENCODE((tokens, random, int(charge_tokens), int(recall)))
    return options + packed(b"".join(hashes), numbers)


Ask = bytes
"""The arguments of one choice, made by `ask`."""
_ASK_PARTS = 3

_CHOICE = msgspec.msgpack.Decoder(Choice)
_SCORES = msgspec.msgpack.Decoder(list[Score])
_KNOWN = msgspec.msgpack.Decoder(_Known)
_ENCODE = msgspec.msgpack.Encoder().encode


def pack_option(option: Option) -> bytes:
    """One option, for `join_options`; callers keep it for as long as nothing changes."""
    return _ENCODE(option)


def join_options(packed_options: Sequence[bytes]) -> bytes:
    """At most 65,535 packed options as `ask` wants them: a msgpack array, as an argument."""
    return packed(b"\xdc%b%b" % (len(packed_options).to_bytes(2, "big"), b"".join(packed_options)))


def pack_options(options: Sequence[Option]) -> bytes:
    """Options as `ask` wants them."""
    return join_options([pack_option(option) for option in options])


class Placement:
    """Blocks and loads of one cluster's workers, in Redis. Methods raise RedisUnavailable."""

    def __init__(self, url: str, cluster: str = "pdserve", timeout_s: float = 2.0) -> None:
        """`timeout_s`: for one answer; whoever places requests cannot wait for long."""
        self._url = url
        self._slot = f"{{{cluster}}}:"
        self._digests: dict[str, str] = {}
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
            keys = self._keys("loads", "charges", "blocks:", "last:")
            self._line = ScriptLine(url, _CHOOSE, keys, timeout_s)
        except ValueError as error:
            raise RedisUnavailable(
                f"The Redis URL {masked(url)!r} cannot be used: {error}"
            ) from None

    async def report(
        self,
        worker_id: str,
        epoch: int,
        number: int,
        load: LoadReport,
        stored: Iterable[bytes],
        removed: Iterable[bytes] = (),
        *,
        whole: bool = False,
    ) -> bool:
        """A worker's batch `number`: its load, and route hashes that it has stored and removed.

        `whole`: `stored` is everything it has. False: the batch does not follow the last one that
        Redis knows, nothing was changed, and the whole set is wanted. A batch of an old epoch is
        dropped.
        """
        keys = [*self._keys("epochs", "loads", "charges"), self._blocks(worker_id, epoch)]
        answer = await self._eval(
            _REPORT, keys, worker_id, epoch, number, int(whole), *msgspec.structs.astuple(load),
            b"".join(stored), b"".join(removed), ROUTE_BYTES, round(BLOCKS_TTL_S * 1000),
        )  # fmt: skip
        return int(answer) != 0

    async def leave(self, worker_id: str, epoch: int) -> None:
        """Forget this incarnation."""
        keys = [*self._keys("loads", "charges"), self._blocks(worker_id, epoch)]
        await self._eval(_LEAVE, keys, worker_id, epoch)

    async def loads(self, epochs: Mapping[str, int]) -> dict[str, LoadReport]:
        """The last reports of these incarnations (worker → epoch), of those that have reported."""
        if not epochs:
            return {}
        try:
            texts: list[bytes | None] = await self._redis.execute_command(
                "HMGET", self._slot + "loads", *epochs
            )
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        found = {}
        for (worker_id, epoch), text in zip(epochs.items(), texts, strict=True):
            known = None if text is None else _KNOWN.decode(text)
            if known is not None and known.epoch == epoch:
                found[worker_id] = LoadReport(
                    known.queued_tokens, known.requests, known.free_tokens, known.waiting
                )
        return found

    async def choose(self, asks: Sequence[Ask]) -> list[Choice]:
        """Place requests, in order, each one charged before the next is looked at; one round trip
        for all of them."""
        try:
            return [_CHOICE.decode(text) for text in await self._line.run(asks, _ASK_PARTS)]
        except (OSError, LineError) as error:
            raise self._unavailable(error) from error

    async def close(self) -> None:
        self._line.close()
        await self._redis.aclose()

    def _keys(self, *names: str) -> list[str]:
        return [self._slot + name for name in names]

    def _blocks(self, worker_id: str, epoch: int) -> str:
        return f"{self._slot}blocks:{worker_id}#{epoch}"

    async def _eval(self, script: str, keys: Sequence[str], *arguments: str | int | bytes) -> Any:
        return (await self._run(script, keys, [arguments]))[0]

    async def _run(self, script: str, keys: Sequence[str], calls: Sequence[Sequence[Any]]) -> Any:
        """The answers of one script to some sets of arguments, in one round trip."""
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            while True:
                digest = self._digests.get(script)
                if digest is None:
                    self._digests[script] = digest = str(await self._redis.script_load(script))
                pipeline = self._redis.pipeline(transaction=False)
                for arguments in calls:
                    pipeline.evalsha(digest, len(keys), *keys, *arguments)
                try:
                    return await pipeline.execute()
                except NoScriptError:
                    del self._digests[script]  # Redis was restarted
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        finally:
            # See Membership._run: Python 3.11's wait_for may swallow a cancellation.
            if task.cancelling() > cancellations:
                raise asyncio.CancelledError

    def _unavailable(self, error: Exception) -> RedisUnavailable:
        reason = str(error).rstrip(".") or type(error).__name__
        return RedisUnavailable(f"Redis at {masked(self._url)} does not answer: {reason}.")
