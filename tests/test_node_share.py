"""One fetch a node: what the server sends does not depend on how many follow, whoever dies or hangs among them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import redis

from gsa import node_share, packing
from gsa.broadcast import RedisPublisher, RedisSubscriber
from gsa.node_share import Memory, NodeShare
from gsa.schema import WeightSnapshot
from tests.broadcasting import SOON_S, assert_whole, closing, snapshot

SIZE = 1_000_000  # numbers in the largest tensor's first axis: 12 MB


FOLLOW = """
import sys, time
from gsa.broadcast import RedisSubscriber
from tests.broadcasting import assert_whole
subscriber = RedisSubscriber(sys.argv[1], sys.argv[2])
print("ready", flush=True)
while True:
    if (received := subscriber.poll()) is not None:
        assert_whole(received)
        print(received.version, int(subscriber.stats().get("broadcast/fetched", 0)), flush=True)
    time.sleep(0.001)
"""


class Follower:
    """A subscriber in a process of its own, that checks all it gets."""

    def __init__(self, url, run):
        command = [sys.executable, "-c", FOLLOW, url, run]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"
        self.version, self.fetched = -1, 0

    def follow(self, version):
        """Reads until it has that version."""
        while self.version < version:
            line = self.process.stdout.readline()
            assert line, "it ended: a snapshot was not whole"
            version_before, (self.version, self.fetched) = self.version, map(int, line.split())
            assert self.version > version_before

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def followers(server, run):
    """followers(n): as many as are missing are started; all n."""
    made = []

    def alive():
        return [f for f in made if f.process.poll() is None]

    def make(n):
        made.extend(Follower(server.url, run) for _ in range(n - len(alive())))
        return alive()

    yield make
    for follower in made:
        if follower.process.poll() is None:
            follower.kill()


def sent_bytes(server):
    return redis.Redis.from_url(server.url).info("stats")["total_net_output_bytes"]


def test_bytes_from_the_server_do_not_depend_on_how_many_follow(server, run, followers):
    with closing(RedisPublisher(server.url, run)) as (publisher,):
        for n, version in ((1, 1), (4, 2)):
            all_of_them = followers(n)
            before = sent_bytes(server)
            publisher.publish(snapshot(version, SIZE))
            for follower in all_of_them:
                follower.follow(version)
            assert 12e6 < sent_bytes(server) - before < 12.2e6
        assert sum(follower.fetched for follower in all_of_them) == 2


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_who_leads_is_killed_at_any_moment(server, run, followers, kills):
    """The others go on with whole snapshots, and somebody leads again."""
    with closing(RedisPublisher(server.url, run)) as (publisher,):
        version = 0
        for _ in range(kills):
            following = followers(3)
            version += 1
            publisher.publish(snapshot(version, 200_000))
            for follower in following:
                follower.follow(version)
            leader = max(following, key=lambda f: f.fetched)
            assert leader.fetched
            publisher.publish(snapshot(version := version + 1, 200_000))
            time.sleep(random.uniform(0, 0.03))
            leader.kill()
            for follower in following:
                if follower is not leader:
                    follower.follow(version)


def test_nothing_is_left_of_killed_processes(server, run, followers):
    def ours(table):
        return [line for line in table.splitlines() if share._address[1:] in line]

    share = NodeShare(f"{server.url} gsa:{run}:policy")
    shm = set(os.listdir("/dev/shm"))
    with closing(RedisPublisher(server.url, run)) as (publisher,):
        publisher.publish(snapshot(1))
        for follower in followers(2):
            follower.follow(1)
        assert ours(Path("/proc/net/unix").read_text())
        for follower in followers(0):
            follower.kill()
    assert not ours(Path("/proc/net/unix").read_text())
    assert set(os.listdir("/dev/shm")) <= shm


def test_a_leader_that_hangs_is_not_waited_for(server, run, followers, monkeypatch):
    monkeypatch.setattr(node_share, "SILENCE_S", 0.3)
    (leader,) = followers(1)
    with closing(RedisPublisher(server.url, run), RedisSubscriber(server.url, run)) as (publisher, subscriber):
        publisher.publish(snapshot(1))
        leader.follow(1)
        assert_whole(subscriber.wait(1, SOON_S), 1)
        os.kill(leader.process.pid, signal.SIGSTOP)
        publisher.publish(snapshot(2))
        assert_whole(subscriber.wait(2, SOON_S), 2)
        os.kill(leader.process.pid, signal.SIGCONT)
        leader.follow(2)


IMPOSTOR = """
import os, socket, sys, time
os.setuid(65534)
listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listening.bind("\\0" + sys.argv[1])
listening.listen()
print("ready", flush=True)
while True:
    sock, _ = listening.accept()
    sock.send(b"." * 32)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_another_users_leader_is_not_believed(server, run):
    address = NodeShare(f"{server.url} gsa:{run}:policy")._address[1:]
    process = subprocess.Popen([sys.executable, "-c", IMPOSTOR, address], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        with closing(RedisPublisher(server.url, run), RedisSubscriber(server.url, run)) as (publisher, subscriber):
            publisher.publish(snapshot(1))
            assert_whole(subscriber.wait(1, SOON_S), 1)
            assert subscriber.stats()["broadcast/fetched"] == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_where_the_system_shares_no_memory_everyone_fetches(server, run, monkeypatch):
    monkeypatch.setattr(node_share, "SUPPORTED", False)
    monkeypatch.delattr(os, "memfd_create")
    parts = [RedisSubscriber(server.url, run) for _ in range(2)]
    with closing(RedisPublisher(server.url, run), *parts) as (publisher, *subscribers):
        publisher.publish(snapshot(1))
        for subscriber in subscribers:
            assert_whole(subscriber.wait(1, SOON_S), 1)
            assert subscriber.stats()["broadcast/fetched"] == 1


def filled(version):
    """Sealed memory of a snapshot."""
    packed, memory = packing.pack(WeightSnapshot(version, {"a": np.arange(5)})), Memory()

    def fetch():
        return packed.size, packed.chunks

    received = memory.seal(packing.receive(packed.manifest(1), (1, version, 1), fetch, memory))
    return memory, received


def test_shared_memory_cannot_be_changed_by_anyone():
    memory, received = filled(3)
    for change in (lambda: os.pwrite(memory.fd, b"x", 0), lambda: os.ftruncate(memory.fd, 1)):
        with pytest.raises(PermissionError):
            change()
    assert received.tensors["a"].tolist() == [0, 1, 2, 3, 4]
    memory.close()
    assert received.tensors["a"].tolist() == [0, 1, 2, 3, 4]


def test_memory_that_could_still_change_is_refused():
    memory, _ = filled(3)
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.write(fd, os.pread(memory.fd, 10_000, 0))
    with pytest.raises(ValueError, match="not the sealed memory"):
        Memory(fd, memory.size, memory._described).read()
    with pytest.raises(ValueError, match="not the sealed memory"):
        Memory(memory.fd, memory.size + 1, memory._described).read()
    os.close(fd)


def test_who_follows_first_can_lead_later():
    """With what it had from the one before: a late joiner need not wait for the next version."""
    first, second, third = (NodeShare("a secret") for _ in range(3))
    assert first.lead()
    assert not second.lead()
    memory, _ = filled(3)
    first.offer((1, 3), memory)
    order, received = second.ask((1, 2), lambda: False)
    assert (order, received.version) == ((1, 3), 3)
    first.close()
    assert third.ask((1, 2), lambda: False) is None
    assert second.lead()
    order, received = third.ask((1, 2), lambda: False)
    assert received.tensors["a"].tolist() == [0, 1, 2, 3, 4]
    for share in (second, third):
        share.close()
