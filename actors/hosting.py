"""Where an environment runs: in this process, or in one of its own that may crash or hang and is then made anew.

Both kinds are asked first and answer later, so that the environments of a worker step at the same time: `ask_reset` or
`ask_step`, then `answer`. No answer is waited for longer than its deadline.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np

from actors import env_process
from actors.environment import Environment, Observation, Profile
from actors.tasks import Task
from gsa.errors import EnvironmentFault, GsaError
from gsa.schema import Spec

TIMEOUT_S = 60.0  # for a reset or an agent step
ALWAYS_READY = -1  # no file has this number
GRACE_S = 2.0  # an isolated environment first ends itself: it knows where it hangs


class Host(Protocol):
    """An environment, wherever it runs. One question at a time, and each is answered once."""

    @property
    def task(self) -> Task: ...

    @property
    def spec(self) -> Spec: ...

    def ask_reset(self, seed: int) -> None:
        """Asks for an episode to begin; the answer is observation 0."""

    def ask_step(self, action: np.ndarray) -> None:
        """Asks for one agent step under `action` [A]; the answer is a Step."""

    def ready(self, wait_s: float = 0.0, readable: bool = False) -> bool:
        """Whether `answer` will not block; waits for that, but no longer than `wait_s`. `readable`: its file is."""

    def fileno(self) -> int:
        """What becomes readable before there is an answer; ALWAYS_READY where one needs no waiting."""

    @property
    def due(self) -> float:
        """When the answer is overdue, by time.monotonic(); it is then ready, and a fault."""

    def answer(self) -> Any:
        """Raises EnvironmentFault if the environment failed, died or took too long; it is then of no more use."""

    def reset(self, seed: int) -> Observation:
        """Asks for an episode to begin, and waits for observation 0."""

    def close(self) -> None:
        """Ends it. May be called twice."""


class InProcess:
    """An environment in this process. A question is worked on when its answer is asked for."""

    def __init__(self, make: Callable[[], Environment], timeout_s: float = TIMEOUT_S) -> None:
        self._environment, self._timeout_s = make(), timeout_s
        self._question: Callable[[], Any] | None = None

    @property
    def task(self) -> Task:
        return self._environment.task

    @property
    def spec(self) -> Spec:
        return self._environment.spec

    def ask_reset(self, seed: int) -> None:
        self._question = lambda: self._environment.reset(seed)

    def ask_step(self, action: np.ndarray) -> None:
        self._question = lambda: self._environment.step(action)

    def ready(self, wait_s: float = 0.0, readable: bool = False) -> bool:
        return True

    def fileno(self) -> int:
        return ALWAYS_READY

    @property
    def due(self) -> float:
        return math.inf

    def answer(self) -> Any:
        """As Host has it. What hangs is interrupted in the main thread only, and only where Python gets a turn."""
        question, self._question = self._question, None
        assert question is not None, "nothing was asked"
        with _interrupted_after(self._timeout_s):
            return question()

    def reset(self, seed: int) -> Observation:
        self.ask_reset(seed)
        return self.answer()

    def close(self) -> None:
        self._environment.close()


class Isolated:
    """An environment in a process of its own, of one thread, without torch and Ray.

    Making one does not wait for it to come up; `task`, `spec` and the first answer do.
    """

    def __init__(
        self, task: str, render: Profile = "fast", imports: Iterable[str] = (), timeout_s: float = TIMEOUT_S
    ) -> None:
        self._name, self._timeout_s = task, timeout_s
        self._link, theirs = socket.socketpair()
        with theirs:
            self._process = _start(theirs)
        self._link.setblocking(False)  # what waits has a deadline
        self._readable = select.poll()
        self._readable.register(self._link, select.POLLIN)
        self._expected: deque[tuple[str, float]] = deque()  # what was asked and when the answer is due
        self._about: tuple[Task, Spec, env_process.Layout] | None = None
        described = json.dumps([task, render, list(imports), timeout_s]).encode()
        self._ask("start", env_process.START_S, b"M", described)

    @property
    def task(self) -> Task:
        return self._introduced()[0]

    @property
    def spec(self) -> Spec:
        return self._introduced()[1]

    def ask_reset(self, seed: int) -> None:
        self._ask("reset", self._timeout_s, b"R", int(seed).to_bytes(8, "little"))

    def ask_step(self, action: np.ndarray) -> None:
        self._ask("step", self._timeout_s, b"S", np.ascontiguousarray(action, np.float32).tobytes())

    def ready(self, wait_s: float = 0.0, readable: bool = False) -> bool:
        until = time.monotonic() + wait_s
        while readable or self._wait(until):
            if self._about is not None:
                return True
            self._introduced()
            readable = False
        return False

    def fileno(self) -> int:
        return self._link.fileno()

    @property
    def due(self) -> float:
        return self._expected[0][1] + GRACE_S

    def answer(self) -> Any:
        *_, layout = self._introduced()
        kind, data = self._receive(layout.size)
        return layout.unpack_step(data) if kind == b"T" else layout.unpack_observation(data)

    def reset(self, seed: int) -> Observation:
        self.ask_reset(seed)
        return self.answer()

    def close(self) -> None:
        self._link.close()
        _end(self._process)

    def _introduced(self) -> tuple[Task, Spec, env_process.Layout]:
        if self._about is None:
            about = json.loads(bytes(self._receive()[1]))
            spec = Spec.from_json(about["spec"])
            self._about = Task(**about["task"]), spec, env_process.Layout(spec)
        return self._about

    def _ask(self, what: str, within_s: float, kind: bytes, content: bytes) -> None:
        last = self._expected[-1][1] if self._expected else time.monotonic()  # asked while it still starts
        self._expected.append((what, last + within_s))
        with contextlib.suppress(OSError):  # it has ended: the answer will say so
            self._link.sendall(env_process.message(kind, content))

    def _wait(self, until: float) -> bool:
        """Whether an answer, or its deadline, has come by `until`."""
        remaining_ms = 1e3 * max(0.0, min(until, self.due) - time.monotonic())
        return bool(self._readable.poll(remaining_ms)) or time.monotonic() >= self.due

    def _receive(self, expected: int = 0) -> tuple[bytes, memoryview]:
        what, due = self._expected.popleft()

        def wait() -> None:
            if not self._readable.poll(1e3 * max(0.0, due + GRACE_S - time.monotonic())):
                raise TimeoutError

        try:
            kind, data = env_process.receive(self._link, expected, wait)
            error = env_process.unpack_error(data) if kind == b"E" else None
        except TimeoutError:
            self._hung(what)
        except (EOFError, OSError):
            self._died(what)
        except (ValueError, TypeError):
            self._babbled(what)
        if error is not None:
            raise error
        if expected and len(data) != expected:
            self._babbled(what)
        return kind, data

    def _died(self, what: str) -> NoReturn:
        code = _end(self._process)
        if code == -signal.SIGALRM:
            self._hung(what)
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        hint = " (killed from outside, or for want of memory)" if code == -signal.SIGKILL else ""
        raise EnvironmentFault(f"{self._name} failed in {what}: its process ended {how}{hint}.")

    def _babbled(self, what: str) -> NoReturn:
        self._process.kill()
        raise EnvironmentFault(
            f"{self._name} failed in {what}: it writes to a file that is not its own, the link to us."
        )

    def _hung(self, what: str) -> NoReturn:
        within_s = env_process.START_S if what == "start" else self._timeout_s
        raise EnvironmentFault(f"{self._name} failed in {what}: no answer within {within_s:g} s.")


def ready(hosts: Mapping[int, Host], wait_s: float) -> list[int]:
    """Keys of the hosts whose answer will not block. While there is none, waits, but no longer than `wait_s`."""
    waiting, keys, found = select.poll(), {}, set()
    until = time.monotonic() + wait_s
    for key, host in hosts.items():
        file = host.fileno()
        if file == ALWAYS_READY:
            found.add(key)
            continue
        keys[file] = key
        waiting.register(file, select.POLLIN)
        until = min(until, host.due)
    wait_ms = 0.0 if found or not keys else max(0.0, 1e3 * (until - time.monotonic()))
    readable = {keys[file] for file, _ in waiting.poll(wait_ms)}
    found |= readable
    if (now := time.monotonic()) >= until:
        found |= {key for key, host in hosts.items() if now >= host.due}
    return [key for key, host in hosts.items() if key in found and host.ready(readable=key in readable)]


def _start(link: socket.socket) -> subprocess.Popen[bytes]:
    """The process, which finds modules where this one does and keeps its numeric libraries to one thread."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", env_process.__name__, str(link.fileno())]
    try:
        return subprocess.Popen(command, pass_fds=[link.fileno()], env=variables, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise GsaError(f"No process can be started for an environment: {error.strerror}.") from None


def _end(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process that was told to end, kills one that does not. Returns its exit code."""
    try:
        return process.wait(env_process.EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(env_process.EXIT_S)


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer. Only the main thread is told of signals; elsewhere nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> NoReturn:
        raise TimeoutError(f"no answer within {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, others)  # whoever had the timer before goes on with it, a little later
