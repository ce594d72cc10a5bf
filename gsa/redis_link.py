"""A group of a run's weights on the Redis server: every name, every lifetime, every change that must be atomic.

Under gsa:<run>:<group>:

    epoch                           the highest that a publisher has claimed
    head                            "<epoch> <version> <chunks>" of the newest whole version; set last, by a script
    notice                          channel: a version has become the head
    <epoch>:<version>:manifest      JSON: names, dtypes, shapes, offsets, checksums, meta
    <epoch>:<version>:<i>           chunk i, raw bytes

The head's version does not expire; a superseded one does after GRACE_S, one that was never finished after UNFINISHED_S.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.retry import Retry

from gsa.errors import FormatError, StaleError, UsageError
from gsa.packing import Packed, unpack
from gsa.schema import WeightSnapshot

GRACE_S = 120  # a superseded version stays readable this long: more than a fetch takes
UNFINISHED_S = 600  # longer than sending one takes
SOCKET_TIMEOUT_S = 5.0

# Keys: epoch, head. Arguments: the epoch wanted; 1 to get one above all before it, 0 for this one or none.
_CLAIM = """
local wanted, claimed = tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or '0')
local epoch = math.max(wanted, claimed + tonumber(ARGV[2]))
if ARGV[2] == '0' and epoch > wanted then return {'fenced', false} end
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return {string.format('%.0f', epoch), redis.call('GET', KEYS[2])}
"""
# Keys: epoch, head, then all of the version's. Arguments: epoch, version, notice, prefix, grace.
_FLIP = """
local epoch, version = tonumber(ARGV[1]), tonumber(ARGV[2])
if epoch < tonumber(redis.call('GET', KEYS[1]) or '0') then return 'fenced' end
local head, e, v, n = redis.call('GET', KEYS[2]), nil, nil, nil
if head then
  e, v, n = string.match(head, '^(%d+) (%d+) (%d+)$')
  if tonumber(e) > epoch then return 'fenced' end
  if tonumber(e) == epoch and tonumber(v) >= version then return 'not above the head' end
end
for i = 3, #KEYS do if redis.call('EXISTS', KEYS[i]) == 0 then return 'incomplete' end end
for i = 3, #KEYS do redis.call('PERSIST', KEYS[i]) end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. (#KEYS - 3))
redis.call('PUBLISH', ARGV[3], ARGV[2])
if head then
  local old = ARGV[4] .. ':' .. e .. ':' .. v .. ':'
  redis.call('EXPIRE', old .. 'manifest', ARGV[5])
  for i = 0, tonumber(n) - 1 do redis.call('EXPIRE', old .. i, ARGV[5]) end
end
return 'flipped'
"""


class Head(NamedTuple):
    """What the newest whole version is. Ordered by epoch, then version."""

    epoch: int
    version: int
    chunks: int


class RedisLink:
    """Owns the connections to one group. Methods raise redis.RedisError while the server is away."""

    def __init__(self, url: str, run: str, group: str) -> None:
        for name in (run, group):
            if not re.fullmatch(r"[\w.@+-]+", name):
                raise UsageError(f"A run or group is named by letters, digits and . @ + - _, not '{name}'.")
        self.prefix = f"gsa:{run}:{group}"
        self._epoch, self._head, self._notice = (f"{self.prefix}:{name}" for name in ("epoch", "head", "notice"))
        try:
            self._redis = redis.Redis.from_url(
                url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S,
                socket_read_size=1 << 20, retry=Retry(NoBackoff(), 0),
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(
                f"Not the URL of a server ({error}), which is like redis://:password@host:6379/0."
            ) from None
        self._claim, self._flip = self._redis.register_script(_CLAIM), self._redis.register_script(_FLIP)

    def head(self) -> Head | None:
        """None where nothing was published, or the server was emptied."""
        value = self._get(self._head)
        return None if value is None else _parse(value)

    def claim(self, epoch: int, at_least: bool) -> tuple[int, Head | None]:
        """Makes `epoch` the highest, or with `at_least` one above all before it; returns it and the head so far.

        StaleError where a higher one was claimed.
        """
        claimed, head = self._claim([self._epoch, self._head], [epoch, int(at_least)])
        if claimed == b"fenced":
            raise self.fenced(epoch)
        return int(claimed), None if head is None else _parse(head)

    def fetch(self, head: Head) -> WeightSnapshot | None:
        """The head's version; None where it was superseded and has expired since. FormatError where it is damaged."""
        manifest, *chunks = self._keys(head)
        described = self._get(manifest)
        snapshot = None if described is None else unpack(described, lambda i: self._get(chunks[i]))
        if snapshot is not None and (snapshot.meta["epoch"], snapshot.version) != head[:2]:
            raise FormatError(f"The manifest of version {head.version} is that of {snapshot.version}.")
        return snapshot

    def send(self, packed: Packed, epoch: int) -> None:
        """Puts the version on the server, then makes it the head. StaleError where a higher epoch was claimed."""
        keys = self._keys(head := Head(epoch, packed.version, len(packed.chunks)))
        for key, value in zip(keys, (packed.manifest(epoch), *packed.chunks), strict=True):
            self._redis.set(key, value, ex=UNFINISHED_S)  # type: ignore[arg-type]  # memoryview[int] in its stubs
        self.flip(head)

    def flip(self, head: Head) -> None:
        arguments: list[int | str] = [head.epoch, head.version, self._notice, self.prefix, GRACE_S]
        result = self._flip([self._epoch, self._head, *self._keys(head)], arguments)
        if result == b"fenced":
            raise self.fenced(head.epoch)
        if result != b"flipped":  # incomplete: the server was emptied meanwhile
            raise redis.RedisError(f"Version {head.version} did not become the head: {result.decode()}.")

    def notices(self) -> PubSub:
        """A subscription to be told of new heads. Close it."""
        notices = self._redis.pubsub(ignore_subscribe_messages=True)
        notices.subscribe(self._notice)
        return notices

    def fenced(self, epoch: int) -> StaleError:
        return StaleError(f"Another learner has taken over {self.prefix} (epoch {epoch} is stale); stop this one.")

    def raise_if_refused(self, error: redis.RedisError) -> None:
        """UsageError where the server is there but does not let us in, so that no waiting helps."""
        if isinstance(error, (redis.AuthenticationError, redis.exceptions.NoPermissionError)):
            at = self._redis.connection_pool.connection_kwargs
            where = f"{at['host']}:{at['port']}" if "host" in at else at.get("path")
            raise UsageError(f"Redis at {where} refuses us: {error}. Check user and password in the URL.") from None

    def close(self) -> None:
        self._redis.close()

    def _get(self, key: str) -> bytes | None:
        return self._redis.get(key)  # type: ignore[return-value]  # bytes, as responses are not decoded

    def _keys(self, head: Head) -> list[str]:
        """The manifest's, then the chunks'. The epoch is in them, so that a stale learner overwrites nothing."""
        return [f"{self.prefix}:{head.epoch}:{head.version}:{part}" for part in ("manifest", *range(head.chunks))]


def _parse(head: bytes) -> Head:
    if not (match := re.fullmatch(rb"(\d{1,18}) (\d{1,18}) (\d{1,6})", head)):
        raise FormatError(f"Not the head of a broadcast: {head[:80]!r}.")
    return Head(*map(int, match.groups()))
