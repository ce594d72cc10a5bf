"""What can be wrong with the server, and what we then say: memory, rights, TLS, a server that stops answering."""

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import redis

from gsa import redis_link
from gsa.broadcast import RedisPublisher, RedisSubscriber
from gsa.errors import UsageError
from gsa.schema import WeightSnapshot
from tests.broadcasting import SOON_S, assert_whole, closing, eventually, snapshot

DOCUMENTED = re.search(r"ACL SETUSER gsa on >PASSWORD (.*)", Path("docs/deploy.md").read_text())[1]
LEARNER = "+get +set +expire +exists +publish +eval +evalsha +script|load ~gsa:* &gsa:*"
WORKER = "+get +subscribe %R~gsa:* &gsa:*"


def random_weights(version, megabytes):
    data = np.random.default_rng(version).integers(0, 256, megabytes << 20, np.uint8)
    return WeightSnapshot(version, {"weights": data}, {"updates": version})


def test_a_server_without_memory_for_the_weights(own_server, run):
    """The last whole version stays, the sentence says how much is needed, and all goes on once it is there."""
    client = redis.Redis.from_url(own_server.url)
    parts = RedisPublisher(own_server.url, run), RedisSubscriber(own_server.url, run)
    with closing(*parts) as (publisher, subscriber):
        publisher.publish(random_weights(1, 2))
        assert subscriber.wait(1, SOON_S).version == 1
        client.config_set("maxmemory", client.info("memory")["used_memory"] + (4 << 20))
        publisher.publish(random_weights(2, 12))
        eventually(lambda: publisher.trouble, "no trouble was told")
        assert f"is out of memory: give it at least {12 * redis_link.VERSIONS} MB" in publisher.trouble
        assert f"127.0.0.1:{own_server.port}" in publisher.trouble
        assert subscriber.poll() is None
        late = RedisSubscriber(own_server.url, run)
        assert late.wait(1, SOON_S).version == 1
        late.close()
        client.config_set("maxmemory", 0)
        received = subscriber.wait(2, SOON_S)
        assert (received.tensors["weights"] == random_weights(2, 12).tensors["weights"]).all()
        eventually(lambda: not publisher.trouble, "the trouble is over")


def user(server, name, rights):
    """The URL of a user with exactly those rights."""
    redis.Redis.from_url(server.url).execute_command("ACL", "SETUSER", name, "on", ">secret", *rights.split())
    return f"redis://{name}:secret@127.0.0.1:{server.port}/0"


@pytest.mark.parametrize("rights", [(DOCUMENTED, DOCUMENTED), (LEARNER, WORKER)])
def test_the_rights_that_the_documentation_names_are_enough(server, run, rights):
    learner, worker = (user(server, f"{name}-{run}", rule) for name, rule in zip("lw", rights, strict=True))
    with closing(RedisPublisher(learner, run), RedisSubscriber(worker, run)) as (publisher, subscriber):
        for version in (1, 2):
            publisher.publish(snapshot(version))
            assert publisher.flush(SOON_S)
            assert_whole(subscriber.wait(version, SOON_S), version)
        assert not publisher.trouble
        assert not subscriber.trouble
        assert subscriber.stats().get("broadcast/fetch_errors", 0) == 0


@pytest.mark.parametrize(
    ("part", "rights"),
    [
        (RedisPublisher, WORKER), (RedisPublisher, LEARNER.replace("+set ", "").replace("~gsa:*", "~other:*")),
        (RedisSubscriber, WORKER.replace("+get ", "")), (RedisSubscriber, WORKER.replace("+subscribe ", "")),
        (RedisSubscriber, WORKER.replace("&gsa:*", "&other:*")), (RedisSubscriber, WORKER.replace("gsa", "other")),
    ],
)  # fmt: skip
def test_a_user_without_rights(server, run, part, rights):
    with pytest.raises(UsageError, match=r"Redis at 127.0.0.1:\d+ refuses us: .*rights that docs/deploy.md lists"):
        part(user(server, f"user-{run}", rights), run)


class TlsFront:
    """Speaks TLS in front of a server that does not."""

    def __init__(self, port, certificate, key):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._behind, self._context = port, context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                plain, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=[plain], daemon=True).start()

    def _connect(self, plain):
        """One thread a connection: two on one TLS socket would be a race."""
        try:
            plain.settimeout(5)
            client = self._context.wrap_socket(plain, server_side=True)
            behind = socket.create_connection(("127.0.0.1", self._behind))
        except OSError:
            plain.close()
            return
        with client, behind:
            client.settimeout(0.001)
            behind.settimeout(0.001)
            while True:
                for source, sink in ((client, behind), (behind, client)):
                    try:
                        if not (data := source.recv(1 << 16)):
                            return
                        sink.settimeout(5)
                        sink.sendall(data)
                        sink.settimeout(0.001)
                    except TimeoutError:
                        continue
                    except OSError:
                        return

    def close(self):
        self._listening.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Name → (certificate, key), each its own CA: for our address, and for another host."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    folder, made = tmp_path_factory.mktemp("tls"), {}
    for name, where in (("ours", "IP:127.0.0.1"), ("elsewhere", "DNS:redis.example.org")):
        files = folder / f"{name}.pem", folder / f"{name}.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
             "2", "-subj", "/CN=test", "-addext", f"subjectAltName={where}", "-out", files[0], "-keyout", files[1]],
            check=True, capture_output=True,
        )  # fmt: skip
        made[name] = files
    return made


@pytest.fixture
def front(server, certificates):
    front = TlsFront(server.port, *certificates["ours"])
    yield front
    front.close()


def behind(server, port, certificate=None):
    options = f"?ssl_ca_certs={certificate}" if certificate else ""
    return server.url.replace("redis://", "rediss://").replace(str(server.port), str(port)) + options


def test_weights_over_tls(server, run, front, certificates):
    url = behind(server, front.port, certificates["ours"][0])
    with closing(RedisPublisher(url, run), RedisSubscriber(url, run)) as (publisher, subscriber):
        publisher.publish(random_weights(1, 9))
        received = subscriber.wait(1, SOON_S)
        assert (received.tensors["weights"] == random_weights(1, 9).tensors["weights"]).all()
        assert not publisher.trouble


@pytest.mark.parametrize("part", [RedisPublisher, RedisSubscriber])
def test_a_certificate_that_is_not_trusted(server, run, front, certificates, part):
    for trusted in (None, certificates["elsewhere"][0]):
        with pytest.raises(UsageError, match=r"do not agree on TLS: .*certificate.*ssl_ca_certs=FILE"):
            part(behind(server, front.port, trusted), run)


def test_a_certificate_for_another_host(server, run, certificates):
    front = TlsFront(server.port, *certificates["elsewhere"])
    with pytest.raises(UsageError, match=r"do not agree on TLS: .*use the host name that the certificate is for"):
        RedisSubscriber(behind(server, front.port, certificates["elsewhere"][0]), run)
    front.close()


def test_tls_to_a_server_that_speaks_none(server, run, monkeypatch):
    """It waits for more of what it takes for a command, so that all we know is its silence."""
    monkeypatch.setattr(redis_link, "SOCKET_TIMEOUT_S", 0.3)
    with closing(RedisPublisher(behind(server, server.port), run)) as (publisher,):
        publisher.publish(snapshot(1))
        eventually(lambda: "has not answered for 0.3 s. Does it speak TLS?" in publisher.trouble, publisher.trouble)


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_paused_server_holds_up_neither_side(own_server, run, monkeypatch, seconds):
    """It takes connections and never answers: the worst there is. What was missed arrives when it goes on."""
    if seconds < redis_link.SOCKET_TIMEOUT_S:
        monkeypatch.setattr(redis_link, "SOCKET_TIMEOUT_S", 1.0)
    parts = RedisPublisher(own_server.url, run), RedisSubscriber(own_server.url, run)
    with closing(*parts) as (publisher, subscriber):
        publisher.publish(snapshot(1))
        subscriber.wait(1, SOON_S)
        os.kill(own_server.pid, signal.SIGSTOP)
        slowest, began, version, told = 0.0, time.monotonic(), 2, set()
        while time.monotonic() < began + seconds:
            started = time.monotonic()
            assert subscriber.poll() is None
            publisher.publish(snapshot(version))
            slowest = max(slowest, time.monotonic() - started)
            told.update((publisher.trouble, subscriber.trouble))
            version += 1
            time.sleep(0.01)
        os.kill(own_server.pid, signal.SIGCONT)
        assert slowest < 0.5, "waited for the server"  # a loaded machine's scheduler, not a socket's timeout
        assert any("has not answered for" in trouble for trouble in told)
        assert_whole(subscriber.wait(version - 1, SOON_S), version - 1)
        eventually(lambda: not publisher.trouble and not subscriber.trouble, "the trouble is over")
