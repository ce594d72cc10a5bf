"""A group of a run's weights on the Redis server: every name, every lifetime, every change that must be atomic.

Under gsa:<run>:<group>:

    epoch                           the highest that a publisher has claimed
    head                            "<epoch> <version> <chunks>" of the newest whole version; set last, by a script
    notice                          channel: the new head
    recent                          heads "… … …,… … …" that were superseded last and may still be fetched
    anchor                          one that was superseded and stays for GRACE_S: for who is too slow for the others
    <epoch>:<version>:manifest      of gsa.packing: names, dtypes, shapes, offsets, checksums, meta
    <epoch>:<version>:<i>           chunk i, raw bytes

The head's version goes KEPT_S after it came, and a publisher that still has it sends it again; a superseded one when
RECENT newer ones were superseded, but for one in each ANCHOR_S, or after GRACE_S; one that was never finished after
UNFINISHED_S. So there are never more than VERSIONS, however fast they come. When the run is over, all of the group
expire after GRACE_S.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import redis
from isal.isal_zlib import crc32
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.retry import Retry

from gsa import redis_wire
from gsa.errors import FormatError, StaleError, UsageError
from gsa.packing import Packed, Room, receive

GRACE_S = 60  # a superseded version stays readable this long at most
ANCHOR_S = 20  # one in so many seconds stays that long: a fetch may take GRACE_S - ANCHOR_S
RECENT = 3  # of the others so many stay
VERSIONS = 1 + RECENT + 1 + GRACE_S // ANCHOR_S + 1  # head, recent, anchors, and one that is being sent
UNFINISHED_S = 600  # longer than sending one takes
KEPT_S = 86_400  # what is left of a run that was killed, and that nobody goes on with
MAX_MANIFEST_BYTES = 64 << 20
SOCKET_TIMEOUT_S = 5.0
_GO_ON = "Workers act on with the weights they have."

# Keys: epoch, head. Arguments: the epoch wanted; 1 to get one above all before it, 0 for this one or none; KEPT_S.
_CLAIM = """
local wanted, claimed = tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or '0')
local epoch = math.max(wanted, claimed + tonumber(ARGV[2]))
if ARGV[2] == '0' and epoch > wanted then return {'fenced', false} end
redis.call('SET', KEYS[1], string.format('%.0f', epoch), 'EX', ARGV[3])
return {string.format('%.0f', epoch), redis.call('GET', KEYS[2])}
"""
# Keys: epoch, head, recent, anchor, then all of the version's. Arguments: epoch, version, notice, prefix, GRACE_S,
# ANCHOR_S, RECENT, KEPT_S.
_FLIP = """
local epoch, version = tonumber(ARGV[1]), tonumber(ARGV[2])
if epoch < tonumber(redis.call('GET', KEYS[1]) or '0') then return 'fenced' end
local head, e, v, n = redis.call('GET', KEYS[2]), nil, nil, nil
if head then
  e, v, n = string.match(head, '^(%d+) (%d+) (%d+)$')
  if tonumber(e) > epoch then return 'fenced' end
  if tonumber(e) == epoch and tonumber(v) >= version then return 'not above the head' end
end
for i = 5, #KEYS do if redis.call('EXISTS', KEYS[i]) == 0 then return 'incomplete' end end
for i = 5, #KEYS do redis.call('EXPIRE', KEYS[i], ARGV[8]) end
local new = ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. (#KEYS - 5)
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[8])
redis.call('SET', KEYS[2], new, 'EX', ARGV[8])
redis.call('PUBLISH', ARGV[3], new)
if not head then return 'flipped' end
local function expire(old, seconds)
  local e, v, n = string.match(old, '^(%d+) (%d+) (%d+)$')
  if not e then return end
  local prefix = ARGV[4] .. ':' .. e .. ':' .. v .. ':'
  redis.call('EXPIRE', prefix .. 'manifest', seconds)
  for i = 0, tonumber(n) - 1 do redis.call('EXPIRE', prefix .. i, seconds) end
end
expire(head, ARGV[5])
if redis.call('SET', KEYS[4], head, 'NX', 'EX', ARGV[6]) then return 'flipped' end
local recent = {}
for old in string.gmatch(redis.call('GET', KEYS[3]) or '', '[^,]+') do table.insert(recent, old) end
table.insert(recent, head)
while #recent > tonumber(ARGV[7]) do expire(table.remove(recent, 1), 0) end
redis.call('SET', KEYS[3], table.concat(recent, ','), 'EX', ARGV[5])
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
        names = ("epoch", "head", "recent", "anchor", "notice")
        self._epoch, self._head, self._recent, self._anchor, self._notice = (f"{self.prefix}:{name}" for name in names)
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
        self._buffer = memoryview(bytearray(redis_wire.PIECE_BYTES))  # the same each time: fresh memory is slow

    def head(self) -> Head | None:
        """None where nothing was published, or the server was emptied."""
        value = self._get(self._head)
        return None if value is None else _parse(value)

    def anchor(self) -> Head | None:
        """A superseded version that can be fetched for GRACE_S - ANCHOR_S at least; None where none was superseded of
        late."""
        value = self._get(self._anchor)
        return None if value is None else _parse(value)

    def claim(self, epoch: int, at_least: bool) -> tuple[int, Head | None]:
        """Makes `epoch` the highest, or with `at_least` one above all before it; returns it and the head so far.

        StaleError where a higher one was claimed.
        """
        claimed, head = self._claim([self._epoch, self._head], [epoch, int(at_least), KEPT_S])
        if claimed == b"fenced":
            raise self.fenced(epoch)
        return int(claimed), None if head is None else _parse(head)

    def fetch(self, head: Head, room: Room) -> bytes | None:
        """The head's version into `room`; returns its description for `packing.snapshot`.

        None where it was superseded and has expired since. FormatError where it is damaged.
        """
        with redis_wire.values(self._redis, self._keys(head), self._buffer) as values:
            if (described := values.next()) is None:
                return None
            size, pieces = described
            if size > MAX_MANIFEST_BYTES:
                raise FormatError(f"A manifest of {size} bytes; at most {MAX_MANIFEST_BYTES} are read.")
            return receive(b"".join(map(bytes, pieces)), head, values.next, room)

    def send(self, packed: Packed, epoch: int) -> None:
        """Puts the version on the server and makes it the head, all in one go. StaleError where a higher epoch was
        claimed."""
        head = Head(epoch, packed.version, len(packed.chunks))
        *replies, flipped = redis_wire.together(self._redis, self._sending(packed, head))
        refused = next((reply for reply in replies if isinstance(reply, redis.RedisError)), None)
        if isinstance(refused, redis.exceptions.OutOfMemoryError):
            for key in self._keys(head):
                self._redis.expire(key, 0)  # what fitted in would be in the way of the next
        if refused is not None:
            raise refused
        if isinstance(flipped, redis.exceptions.NoScriptError):
            self.flip(head)
        else:
            self._flipped(head, flipped)

    def _sending(self, packed: Packed, head: Head) -> Iterator[tuple[Any, ...]]:
        """The commands. Each chunk's checksum is computed while the server takes it in."""
        manifest, *chunks = self._keys(head)
        checksums = []
        for key, chunk in zip(chunks, packed.chunks, strict=True):
            yield "SET", key, chunk, "EX", UNFINISHED_S
            checksums.append(crc32(chunk))
        yield "SET", manifest, packed.manifest(head.epoch, checksums), "EX", UNFINISHED_S
        keys, arguments = self._flipping(head)
        yield "EVALSHA", self._flip.sha, len(keys), *keys, *arguments

    def flip(self, head: Head) -> None:
        """Makes a version that is on the server the head."""
        self._flipped(head, self._flip(*self._flipping(head)))

    def _flipping(self, head: Head) -> tuple[list[str], list[int | str]]:
        """Keys and arguments of the script."""
        keys = [self._epoch, self._head, self._recent, self._anchor, *self._keys(head)]
        return keys, [head.epoch, head.version, self._notice, self.prefix, GRACE_S, ANCHOR_S, RECENT, KEPT_S]

    def _flipped(self, head: Head, result: Any) -> None:
        if isinstance(result, redis.RedisError):
            raise result
        if result == b"fenced":
            raise self.fenced(head.epoch)
        if result != b"flipped":  # incomplete: the server was emptied meanwhile
            raise redis.RedisError(f"Version {head.version} did not become the head: {result.decode()}.")

    def retire(self) -> None:
        """Lets all keys of the group expire: its run is over."""
        head = self.head()
        for key in (self._epoch, self._head, *(self._keys(head) if head is not None else ())):
            self._redis.expire(key, GRACE_S)

    def notices(self) -> PubSub:
        """A subscription to be told of new heads. Close it."""
        notices = self._redis.pubsub(ignore_subscribe_messages=True)
        notices.subscribe(self._notice)
        return notices

    def told(self, notices: PubSub, timeout_s: float) -> Head | None:
        """The newest head among the notices that come; None where none does in time, or none that makes sense."""
        newest = None
        while (message := notices.get_message(timeout=timeout_s)) is not None:
            timeout_s = 0  # for the first; then what else is there
            with contextlib.suppress(FormatError, TypeError):
                newest = _parse(message["data"])
        return newest

    def fenced(self, epoch: int) -> StaleError:
        return StaleError(f"Another learner has taken over {self.prefix} (epoch {epoch} is stale); stop this one.")

    def check_subscriber(self) -> None:
        """Asks for all that a subscriber does, so that what is not allowed shows at once."""
        self.head()
        with self.notices() as notices:
            notices.get_message(timeout=SOCKET_TIMEOUT_S)

    def raise_if_refused(self, error: redis.RedisError) -> None:
        """UsageError where the server is there but does not let us in, so that no waiting helps."""
        refused = (redis.AuthenticationError, redis.exceptions.NoPermissionError)
        if isinstance(error, refused) or _about_tls(error):
            raise UsageError(self.explain(error)) from None

    def explain(self, error: Exception, size: int = 0) -> str:
        """What the error means and what helps, in a sentence. `size`: bytes that were to be sent."""
        at = self._redis.connection_pool.connection_kwargs
        where = f"Redis at {at['host']}:{at['port']}" if "host" in at else f"Redis at {at.get('path')}"
        said = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, redis.exceptions.NoPermissionError):
            return f"{where} refuses us: {said}. Give the user the rights that docs/deploy.md lists."
        if isinstance(error, redis.AuthenticationError):
            return f"{where} refuses us: {said}. Check user and password in the URL."
        if _about_tls(error):
            return (
                f"{where} and we do not agree on TLS: {said}. Name the CA of its certificate with ?ssl_ca_certs=FILE "
                f"in the URL, use the host name that the certificate is for, and rediss:// only where it speaks TLS."
            )
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            need = f"at least {-(-VERSIONS * size >> 20)} MB for these weights" if size else "more"
            return f"{where} is out of memory: give it {need} (maxmemory). {_GO_ON}"
        if isinstance(error, redis.TimeoutError):
            tls = issubclass(self._redis.connection_pool.connection_class, redis.SSLConnection)
            hint = "Does it speak TLS? " if tls else ""
            return f"{where} has not answered for {SOCKET_TIMEOUT_S:g} s. {hint}{_GO_ON}"
        if isinstance(error, redis.ConnectionError):
            return f"{where} cannot be reached: {said}. {_GO_ON}"
        return f"{where}: {said}."

    def close(self) -> None:
        self._redis.close()

    def _get(self, key: str) -> bytes | None:
        return self._redis.get(key)  # type: ignore[return-value]  # bytes, as responses are not decoded

    def _keys(self, head: Head) -> list[str]:
        """The manifest's, then the chunks'. The epoch is in them, so that a stale learner overwrites nothing."""
        return [f"{self.prefix}:{head.epoch}:{head.version}:{part}" for part in ("manifest", *range(head.chunks))]


def _about_tls(error: Exception) -> bool:
    """Whether the two ends fail to agree on TLS. The client wraps what the ssl module says."""
    return isinstance(error, redis.ConnectionError) and bool(re.search("SSL|CERTIFICATE|TLS", str(error)))


def _parse(head: bytes) -> Head:
    if not (match := re.fullmatch(rb"(\d{1,18}) (\d{1,18}) (\d{1,6})", head)):
        raise FormatError(f"Not the head of a broadcast: {head[:80]!r}.")
    return Head(*map(int, match.groups()))
