"""The weight broadcast: one contract for both twins, then what only a real server can do to us."""

import itertools
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import redis

from gsa import packing, redis_link, redis_wire
from gsa.broadcast import MemoryBroadcast, RedisPublisher, RedisSubscriber
from gsa.errors import FormatError, SpecMismatch, StaleError, Unavailable, UsageError
from gsa.node_share import Memory
from gsa.redis_link import Head, RedisLink
from gsa.schema import BFLOAT16, WeightSnapshot
from tests.broadcasting import SOON_S, assert_whole, closing, eventually, snapshot

# The contract


class Twin:
    """How a test makes the two faces of one group."""

    def __init__(self, publisher, subscriber):
        self.publisher, self.subscriber = publisher, subscriber


@pytest.fixture(params=["redis", "memory"])
def twin(request, run):
    made = []

    def kept(part):
        made.append(part)
        return part

    if request.param == "redis":
        url = request.getfixturevalue("server").url
        yield Twin(lambda **o: kept(RedisPublisher(url, run, **o)), lambda: kept(RedisSubscriber(url, run)))
    else:
        memory = MemoryBroadcast()
        yield Twin(lambda **o: kept(memory.publisher(**o)), lambda: kept(memory.subscriber()))
    for part in made:
        part.close()


class TestContract:
    def test_what_is_published_arrives_once_and_whole(self, twin):
        publisher, subscriber = twin.publisher(), twin.subscriber()
        assert subscriber.poll() is None
        assert publisher.publish(snapshot(3, architecture="abc"))
        received = subscriber.wait(3, SOON_S)
        assert_whole(received, 3)
        assert received.meta["architecture"] == "abc"
        assert received.meta["epoch"] == publisher.epoch
        assert subscriber.poll() is None

    def test_poll_hands_over_the_newest(self, twin):
        publisher, subscriber = twin.publisher(), twin.subscriber()
        for version in range(5):
            publisher.publish(snapshot(version))
        assert publisher.flush(SOON_S)
        deadline = time.monotonic() + SOON_S
        seen = []
        while 4 not in seen and time.monotonic() < deadline:
            if (received := subscriber.poll()) is not None:
                assert_whole(received)
                seen.append(received.version)
        assert seen == sorted(set(seen))
        assert seen[-1] == 4

    def test_version_only_rises(self, twin):
        publisher, subscriber = twin.publisher(), twin.subscriber()
        assert publisher.publish(snapshot(5))
        assert not publisher.publish(snapshot(5))
        assert not publisher.publish(snapshot(4))
        assert publisher.flush(SOON_S)
        assert subscriber.wait(0, SOON_S).version == 5
        assert publisher.publish(snapshot(6))
        assert subscriber.wait(6, SOON_S).version == 6

    def test_late_joiner_gets_the_newest(self, twin):
        publisher = twin.publisher()
        publisher.publish(snapshot(1))
        publisher.publish(snapshot(2))
        assert publisher.flush(SOON_S)
        assert_whole(twin.subscriber().wait(0, SOON_S), 2)

    def test_many_subscribers_each_get_it(self, twin):
        publisher, subscribers = twin.publisher(), [twin.subscriber() for _ in range(3)]
        publisher.publish(snapshot(1))
        for subscriber in subscribers:
            assert_whole(subscriber.wait(1, SOON_S), 1)

    def test_the_learner_may_change_its_weights_at_once(self, twin):
        publisher, subscriber = twin.publisher(), twin.subscriber()
        weights = snapshot(1)
        publisher.publish(weights)
        for tensor in weights.tensors.values():
            tensor[...] = 99
        assert_whole(subscriber.wait(1, SOON_S), 1)

    def test_what_was_lent_is_published_and_may_not_be_what_is_sent_next(self, twin):
        """Each version is written to what the publisher lends, while those before are on their way or kept."""
        publisher, subscriber = twin.publisher(), twin.subscriber()
        assert publisher.lend() is None
        publisher.publish(snapshot(0))
        for version in range(1, 30):
            new = snapshot(version)
            lent = publisher.lend() or {name: tensor.copy() for name, tensor in new.tensors.items()}
            for name, tensor in new.tensors.items():
                lent[name][...] = tensor
            publisher.publish(WeightSnapshot(version, lent, new.meta))
            if version % 7 == 0:
                assert publisher.flush(SOON_S)
            if version % 5 == 0:
                assert_whole(subscriber.wait(version, SOON_S), version)
        assert_whole(subscriber.wait(29, SOON_S), 29)

    def test_received_tensors_cannot_be_changed(self, twin):
        publisher, subscriber = twin.publisher(), twin.subscriber()
        publisher.publish(snapshot(1))
        for tensor in subscriber.wait(1, SOON_S).tensors.values():
            with pytest.raises(ValueError, match="read-only"):
                tensor[...] = 0

    def test_stale_learner_is_fenced_off(self, twin):
        stale, subscriber = twin.publisher(), twin.subscriber()
        stale.publish(snapshot(10))
        assert stale.flush(SOON_S)
        fresh = twin.publisher()
        assert fresh.epoch > stale.epoch
        assert fresh.latest == 10
        with pytest.raises(StaleError, match="taken over"):
            stale.publish(snapshot(11)) and stale.flush(SOON_S)
        with pytest.raises(StaleError):
            stale.publish(snapshot(12))
        assert fresh.publish(snapshot(11))
        received = subscriber.wait(11, SOON_S)
        assert received.meta["epoch"] == fresh.epoch

    def test_learner_back_from_an_older_checkpoint_is_followed(self, twin):
        first, subscriber = twin.publisher(), twin.subscriber()
        first.publish(snapshot(10))
        assert subscriber.wait(10, SOON_S).version == 10
        first.close()
        again = twin.publisher()
        assert again.publish(snapshot(7))
        assert again.flush(SOON_S)
        deadline = time.monotonic() + SOON_S
        while (received := subscriber.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert_whole(received, 7)

    def test_numbered_learners(self, twin):
        assert twin.publisher(epoch=5).epoch == 5
        with pytest.raises(StaleError):
            twin.publisher(epoch=4)
        assert twin.publisher().epoch > 5

    def test_wait_says_what_is_missing(self, twin):
        with pytest.raises(Unavailable, match="Version 3 of the weights did not come"):
            twin.subscriber().wait(3, 0.01)

    def test_stats_count(self, twin):
        publisher, subscriber = twin.publisher(), twin.subscriber()
        publisher.publish(snapshot(1))
        publisher.flush(SOON_S)
        subscriber.wait(1, SOON_S)
        assert publisher.stats()["broadcast/published"] == 1
        assert subscriber.stats()["broadcast/received"] == 1
        assert subscriber.stats()["broadcast/version"] == 1


# The bytes


def unpack(manifest, get, head=(1, 1, 1)):
    """What a subscriber makes of the manifest and of get(i), the chunks, which come in pieces."""
    memory, count = Memory(), itertools.count()

    def fetch():
        if (chunk := get(next(count))) is None:
            return None
        return len(chunk), [memoryview(chunk)[i : i + 5000] for i in range(0, len(chunk), 5000)]

    description = packing.receive(manifest, head, fetch, memory)
    return None if description is None else memory.seal(description)


def through_the_wire(weights):
    packed = packing.pack(weights)
    return unpack(packed.manifest(1), lambda i: bytes(packed.chunks[i]), (1, 1, len(packed.chunks)))


def test_every_dtype_and_shape_survives():
    rng = np.random.default_rng(0)
    tensors = {
        f"{dtype}{shape}": rng.integers(0, 2, shape).astype(dtype)
        for dtype in ("float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool")
        for shape in ((), (1,), (0, 3), (5, 7, 2))
    }
    tensors["transposed"] = rng.integers(0, 100, (3, 4)).astype(np.float32).T
    for shape in ((), (0, 3), (5, 7, 2)):
        tensors[f"bfloat16{shape}"] = rng.integers(0, 1 << 16, shape).astype(np.uint16).view(BFLOAT16)
    received = through_the_wire(WeightSnapshot(1, tensors))
    assert list(received.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert received.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(received.tensors[name], tensor)


def test_damaged_bytes_are_refused():
    packed = packing.pack(snapshot(1))
    manifest, chunk = packed.manifest(1), bytes(packed.chunks[0])
    flipped = bytearray(chunk)
    flipped[100] ^= 1
    for wrong in (bytes(flipped), chunk[:-1], chunk + b"\0", b""):
        with pytest.raises(FormatError, match="Chunk 0 of version 1 is damaged"):
            unpack(manifest, lambda i, wrong=wrong: wrong)
    assert unpack(manifest, lambda i: None) is None
    for head in ((1, 2, 1), (2, 1, 1), (1, 1, 2)):
        with pytest.raises(FormatError, match=f"The manifest of version {head[1]} is that of 1"):
            unpack(manifest, lambda i: chunk, head)


@pytest.mark.parametrize(
    "wrong",
    [
        b"", b"[]", b"null", b"\xff", b'{"format": 1}', b"[" * 100_000,
        b'"version": 1|"version": -1', b'"version": 1|"version": 1.5', b'"version": 1|"version": true',
        b'"bytes": 12160|"bytes": 99999999999999', b'"bytes": 12160|"bytes": 12000',
        b'"chunk_bytes": 8388608|"chunk_bytes": 0',
        b'"float32"|"object"', b'"float32"|"O"', b"[1000, 3]|[1000, -3]", b"[1000, 3]|[100000, 3]",
        b"[1000, 3]|[1000, 3.0]",
        b"[1000, 3]|[0, 99999999999999999999]", b"[1000, 3]|[" + b"0, " * 99 + b"3]",
        b"[7], 12032|[7], 12031", b"[7], 12032|[7], 99968", b'"core/bias"|7',
        b"[7], 12032|[700], 0",  # overlaps another, so that the sum of all is more than there is
        b'"meta": {|"meta": 1, "x": {',
    ],
)  # fmt: skip
def test_manifests_without_sense_are_refused(wrong):
    good = packing.pack(snapshot(1)).manifest(1)
    before, bar, after = wrong.partition(b"|")
    assert not bar or good.count(before) >= 1
    with pytest.raises(FormatError, match=r"manifest|format"):
        unpack(good.replace(before, after) if bar else wrong, lambda i: pytest.fail("asked for data"))


def test_what_cannot_be_published_is_refused_at_once(server, run):
    publisher = RedisPublisher(server.url, run)
    with pytest.raises(FormatError, match="dtype object"):
        publisher.publish(WeightSnapshot(1, {"a": np.array([None])}))
    with pytest.raises(FormatError, match="plain data"):
        publisher.publish(WeightSnapshot(1, {}, {"a": object()}))
    publisher.close()


# A real server


def restarted(server):
    """Kills the server and starts it again, empty, at the same address with the same password."""
    server._process.kill()
    server._process.wait()
    assert server._start(server.port)


def test_in_many_chunks(server, run, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1000)
    with closing(RedisPublisher(server.url, run), RedisSubscriber(server.url, run)) as (publisher, subscriber):
        publisher.publish(snapshot(1))
        assert_whole(subscriber.wait(1, SOON_S), 1)
        client = redis.Redis.from_url(server.url)
        assert len(client.keys(f"gsa:{run}:policy:*:1:*")) == 14


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda client, manifest, chunk: (client.delete(chunk), client.rpush(chunk, "a")), "WRONGTYPE"),
        (lambda client, manifest, chunk: client.append(chunk, "a"), "Chunk 0 of version 1 is damaged"),
        (lambda client, manifest, chunk: client.setrange(chunk, 5000, "a"), "Chunk 0 of version 1 is damaged"),
        (
            lambda client, manifest, chunk: client.set(manifest, bytes(redis_link.MAX_MANIFEST_BYTES + 1)),
            "A manifest of",
        ),
        (lambda client, manifest, chunk: client.set(manifest, b"x" * 400_000), "Not a manifest"),
    ],
    ids=["no-value", "longer", "changed", "endless-manifest", "no-manifest"],
)
def test_what_was_spoilt_on_the_server_is_refused_and_the_next_version_comes(server, run, spoil, said):
    client = redis.Redis.from_url(server.url)
    with closing(RedisPublisher(server.url, run)) as (publisher,):
        publisher.publish(snapshot(1))
        assert publisher.flush(SOON_S)
        spoil(client, *(f"gsa:{run}:policy:{publisher.epoch}:1:{part}" for part in ("manifest", "0")))
        with closing(RedisSubscriber(server.url, run)) as (subscriber,):
            eventually(lambda: said in subscriber.trouble, subscriber.trouble)
            assert subscriber.poll() is None
            publisher.publish(snapshot(2))
            assert_whole(subscriber.wait(2, SOON_S), 2)


def test_lent_arrays_are_sent_from_where_they_are(server, run):
    with closing(RedisPublisher(server.url, run)) as (publisher,):
        publisher.publish(snapshot(0))
        lent = publisher.lend()
        publisher.publish(WeightSnapshot(1, lent))
        assert np.shares_memory(publisher._last.memory, lent["encoder.weight"])
        other = publisher.lend()
        assert not any(np.shares_memory(other[name], lent[name]) for name in lent if lent[name].size)
        publisher.publish(WeightSnapshot(2, dict(reversed(other.items()))))  # another order: as any other snapshot
        assert not np.shares_memory(publisher._last.memory, other["steps"])


def test_superseded_versions_expire_in_a_minute_and_the_newest_in_a_day(server, run):
    client = redis.Redis.from_url(server.url)
    with closing(RedisPublisher(server.url, run)) as (publisher,):
        for version in range(3):
            publisher.publish(snapshot(version))
            assert publisher.flush(SOON_S)
        for version in range(3):
            keys = client.keys(f"gsa:{run}:policy:{publisher.epoch}:{version}:*")
            assert len(keys) == 2
            for key in keys:
                ttl = client.ttl(key)
                assert (0 < ttl <= redis_link.GRACE_S) if version < 2 else (ttl > redis_link.KEPT_S - SOON_S)
        again = RedisPublisher(server.url, run)
        again.publish(snapshot(3))
        assert again.flush(SOON_S)
        assert all(client.ttl(key) > 0 for key in client.keys(f"gsa:{run}:policy:{publisher.epoch}:2:*"))
        again.close()


def test_however_fast_versions_come_few_stay_on_the_server(server, run):
    """50 MB of them in a few seconds; who follows sees whole ones that rise, and the last."""
    client = redis.Redis.from_url(server.url)
    followers = [RedisSubscriber(server.url, run) for _ in range(3)]
    with closing(RedisPublisher(server.url, run), *followers) as (publisher, *_):
        seen, most = [[-1] for _ in followers], 0
        for version in range(200):
            publisher.publish(snapshot(version, size=20_000))
            assert publisher.flush(SOON_S)
            most = max(most, len(client.keys(f"gsa:{run}:policy:*:manifest")))
            for follower, versions in zip(followers, seen, strict=True):
                if (received := follower.poll()) is not None:
                    assert_whole(received)
                    versions.append(received.version)
        assert 3 < most <= redis_link.VERSIONS
        for follower, versions in zip(followers, seen, strict=True):
            assert_whole(follower.wait(199, SOON_S), 199)
            assert versions == sorted(set(versions))


def test_who_is_too_slow_for_every_version_still_gets_some(server, run, monkeypatch):
    """Each version it begins to fetch is gone before its last chunk, but for the anchors."""
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(redis_link, "ANCHOR_S", 1)
    with closing(RedisPublisher(server.url, run), RedisSubscriber(server.url, run)) as (publisher, subscriber):
        version, read, publish = 0, redis_wire.Values.next, publisher.publish

        def overtaken(values):
            nonlocal version
            found = read(values)
            if values._keys[0].endswith(f":{version}:manifest") and values._answered == 2 and not publisher._closed:
                for _ in range(redis_link.RECENT + 2):
                    version += 1
                    publish(snapshot(version))
                    publisher.flush(SOON_S)
            return found

        monkeypatch.setattr(redis_wire.Values, "next", overtaken)
        publish(snapshot(version))
        received = subscriber.wait(0, SOON_S)
        for _ in range(20):  # one in five becomes the anchor while it is being fetched
            received = subscriber.wait(received.version + 1, SOON_S)
            assert_whole(received)
            if subscriber.stats().get("broadcast/too_slow"):
                break
        assert subscriber.stats()["broadcast/too_slow"]


def test_a_version_that_the_server_has_no_memory_for_leaves_nothing_behind(own_server, run):
    client = redis.Redis.from_url(own_server.url)
    with closing(RedisPublisher(own_server.url, run)) as (publisher,):
        client.config_set("maxmemory", client.info("memory")["used_memory"] + (12 << 20))
        publisher.publish(snapshot(1, size=2_000_000))
        eventually(lambda: publisher.trouble, "no trouble was told")
        eventually(lambda: not client.keys(f"gsa:{run}:policy:*:1:*"), "chunks were left")


def test_what_the_thread_makes_ready_is_handed_over(server, run):
    """And what it cannot make ready comes as it is, so that who takes it over says why."""
    with closing(RedisPublisher(server.url, run), RedisSubscriber(server.url, run)) as (publisher, subscriber):
        threads = []

        def stage(tensors):
            threads.append(threading.current_thread())
            if tensors["steps"] == 2:
                raise SpecMismatch("another architecture")
            return {"ready": tensors["steps"]}

        subscriber.stage = stage
        for version, names in ((1, {"ready"}), (2, set(snapshot(2).tensors)), (3, {"ready"})):
            publisher.publish(snapshot(version))
            assert set(subscriber.wait(version, SOON_S).tensors) == names
        assert threading.current_thread() not in threads


def test_unfinished_version_cannot_be_seen_and_expires(server, run):
    client = redis.Redis.from_url(server.url)
    with closing(RedisPublisher(server.url, run), RedisSubscriber(server.url, run)) as (publisher, subscriber):
        publisher.publish(snapshot(1))
        subscriber.wait(1, SOON_S)
        packed, head = packing.pack(snapshot(2)), Head(publisher.epoch, 2, 1)
        manifest = f"gsa:{run}:policy:{publisher.epoch}:2:manifest"
        client.set(manifest, packed.manifest(publisher.epoch), ex=redis_link.UNFINISHED_S)  # and there it was killed
        client.publish(f"gsa:{run}:policy:notice", 2)
        with pytest.raises(Unavailable):
            subscriber.wait(2, 0.3)
        with pytest.raises(redis.RedisError, match="incomplete"):
            publisher._link.flip(head)  # nor can it be made the head
        assert 0 < client.ttl(manifest) <= redis_link.UNFINISHED_S


PUBLISH_FOR_EVER = """
import sys
from gsa.broadcast import RedisPublisher
from tests.broadcasting import snapshot
publisher = RedisPublisher(sys.argv[1], sys.argv[2])
version = publisher.latest + 1
print(version, flush=True)
while True:
    publisher.publish(snapshot(version, size=100_000))
    version += 1
    publisher.flush(10)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_publisher_killed_at_any_moment_leaves_no_torn_snapshot(server, run, kills):
    """Killed while it publishes; its successor goes on above; what is received is always whole and rises."""
    with closing(RedisSubscriber(server.url, run)) as (subscriber,):
        order, torn, stop = [], [], threading.Event()

        def follow():
            while not stop.is_set():
                if (received := subscriber.poll()) is not None:
                    order.append((received.meta["epoch"], received.version))
                    try:
                        assert_whole(received)
                    except AssertionError as error:
                        torn.append(error)

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            for _ in range(kills):
                process = subprocess.Popen(
                    [sys.executable, "-c", PUBLISH_FOR_EVER, server.url, run], stdout=subprocess.PIPE
                )
                first = int(process.stdout.readline())
                subscriber.wait(first, SOON_S)
                time.sleep(random.uniform(0, 0.15))
                process.kill()
                process.wait()
                process.stdout.close()
        finally:
            stop.set()
            thread.join()
        print(f"{kills} kills, {len(order)} snapshots received, {len(torn)} torn")
        assert len(order) >= kills
        assert not torn
        assert order == sorted(set(order))
        assert [version for _, version in order] == sorted({version for _, version in order})
        assert subscriber.stats().get("broadcast/fetch_errors", 0) == 0


def test_server_back_and_empty_is_filled_again(own_server, run):
    """The learner publishes what it last had, without being asked; the subscribers go on."""
    with closing(RedisPublisher(own_server.url, run), RedisSubscriber(own_server.url, run)) as (publisher, subscriber):
        publisher.publish(snapshot(1))
        assert_whole(subscriber.wait(1, SOON_S), 1)
        restarted(own_server)
        late = RedisSubscriber(own_server.url, run)
        assert_whole(late.wait(1, SOON_S), 1)
        late.close()
        publisher.publish(snapshot(2))
        assert_whole(subscriber.wait(2, SOON_S), 2)
        assert publisher.stats()["broadcast/republished"] == 1
        assert subscriber.stats()["broadcast/fetch_errors"] >= 1


def test_stale_learner_cannot_return_through_an_emptied_server(own_server, run):
    with closing(RedisPublisher(own_server.url, run), RedisPublisher(own_server.url, run)) as (stale, fresh):
        fresh.publish(snapshot(1))
        assert fresh.flush(SOON_S)
        restarted(own_server)
        stale._last = packing.pack(snapshot(50))  # it believes it has something to say, and may well be first
        subscriber = RedisSubscriber(own_server.url, run)
        link = RedisLink(own_server.url, run, "policy")
        eventually(lambda: link.head() == Head(fresh.epoch, 1, 1), "not taken back")
        eventually(lambda: stale._fenced, "not fenced")
        eventually(lambda: subscriber._order == (fresh.epoch, 1), "not followed")
        subscriber.close()


def test_server_down_from_the_start(own_server, run):
    """Both sides can begin without it; they meet once it is there."""
    own_server._process.kill()
    own_server._process.wait()
    with closing(RedisPublisher(own_server.url, run), RedisSubscriber(own_server.url, run)) as (publisher, subscriber):
        assert publisher.publish(snapshot(1))
        assert not publisher.flush(0.3)
        assert subscriber.poll() is None
        assert own_server._start(own_server.port)
        assert_whole(subscriber.wait(1, SOON_S), 1)
        assert publisher.stats()["broadcast/publish_errors"] >= 1


def test_wrong_password_is_a_clear_error(server, run):
    for part in (RedisPublisher, RedisSubscriber):
        for user in ("", ":wrong@", "nobody:wrong@"):
            with pytest.raises(UsageError, match=r"Redis at 127.0.0.1:\d+ refuses us.*password in the URL") as caught:
                part(f"redis://{user}127.0.0.1:{server.port}/0", run)
            assert "wrong@" not in str(caught.value)
        with pytest.raises(UsageError, match="Not the URL"):
            part("127.0.0.1:6379", run)
        with pytest.raises(UsageError, match="named by letters"):
            part(server.url, "a run:*")


def test_groups_and_runs_do_not_mix(server, run):
    with closing(
        RedisPublisher(server.url, run), RedisPublisher(server.url, run, "prior"),
        RedisSubscriber(server.url, run), RedisSubscriber(server.url, run, "prior"),
        RedisSubscriber(server.url, run + "x"),
    ) as (policy, prior, to_policy, to_prior, to_other):  # fmt: skip
        policy.publish(snapshot(1))
        prior.publish(snapshot(2))
        assert to_policy.wait(1, SOON_S).version == 1
        assert to_prior.wait(1, SOON_S).version == 2
        assert to_other.poll() is None


def test_what_a_killed_run_leaves_expires_and_a_living_one_sends_its_weights_again(server, run, monkeypatch):
    monkeypatch.setattr(redis_link, "KEPT_S", 2)
    client = redis.Redis.from_url(server.url)
    publisher, late = RedisPublisher(server.url, run), RedisSubscriber(server.url, run)
    publisher.publish(snapshot(1))
    assert publisher.flush(SOON_S)
    eventually(lambda: publisher.stats().get("broadcast/republished", 0) >= 1, "sent nothing again")
    assert late.wait(1, SOON_S).version == 1
    publisher.close()  # as a process that ends without a word: nothing is retired
    assert client.keys(f"gsa:{run}:*")
    eventually(lambda: not client.keys(f"gsa:{run}:*"), "what a killed run leaves stays")
    late.close()


def test_a_run_that_is_over_leaves_no_lasting_key(server, run):
    client = redis.Redis.from_url(server.url)
    publisher, late = RedisPublisher(server.url, run), RedisSubscriber(server.url, run)
    publisher.publish(snapshot(1))
    assert publisher.flush(SOON_S)
    publisher.retire()
    keys = client.keys(f"gsa:{run}:*")
    assert len(keys) == 4
    assert all(0 < client.ttl(key) <= redis_link.GRACE_S for key in keys)
    assert late.wait(1, SOON_S).version == 1, "what is left can still be fetched"
    late.close()


def test_a_learner_whose_clock_was_set_back_is_followed(server, run, monkeypatch):
    with closing(RedisPublisher(server.url, run), RedisSubscriber(server.url, run)) as (before, subscriber):
        before.publish(snapshot(7))
        assert subscriber.wait(7, SOON_S).version == 7
        monkeypatch.setattr("gsa.broadcast.time.time_ns", lambda: 1)
        with closing(RedisPublisher(server.url, run)) as (after,):
            after.publish(snapshot(9))
            assert subscriber.wait(9, SOON_S).version == 9


def test_foreign_bytes_at_the_head_are_survived(server, run):
    client = redis.Redis.from_url(server.url)
    client.set(f"gsa:{run}:policy:head", b"9999999999999999999999999 nonsense")
    with closing(RedisSubscriber(server.url, run)) as (subscriber,):
        eventually(lambda: subscriber.stats().get("broadcast/fetch_errors", 0) > 0, "nothing noticed")
        client.delete(f"gsa:{run}:policy:head")
        with closing(RedisPublisher(server.url, run)) as (publisher,):
            publisher.publish(snapshot(1))
            assert_whole(subscriber.wait(1, SOON_S), 1)
