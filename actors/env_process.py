"""One environment as a process: what it runs, and how it speaks with the process that started it.

    python -m actors.env_process FD          started by actors.hosting.Isolated; FD is its end of a socket pair

A message is its kind (1 byte and 3 empty ones), the length of the rest (4 bytes, little-endian) and the rest:

    to the environment    M  JSON [task, render, imports, timeout_s]      R  seed, 8 bytes      S  action [A] float32
    from it               M  JSON {task, spec}                            O  observation
                          T  reward, discount, success, last; action [A]; observation           E  JSON [error, text]

O has the length of T, with nothing before the observation.

Arrays are their bytes, observations in the order of the spec. It has one thread, and imports numpy and the simulator.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from actors import rendering
from actors.environment import Environment, Observation, Step, make
from gsa import errors
from gsa.errors import EnvironmentFault, GsaError
from gsa.schema import Spec

HEADER = struct.Struct("<c3xI")
OUTCOME = struct.Struct("<dd?d?6x")  # reward, discount, whether success is told, success, last; what follows is aligned
LONGEST = 1 << 28  # of a message, in bytes: more is no message
START_S = 120.0  # to import the simulator and build it
EXIT_S = 5.0  # to close it


def message(kind: bytes, content: bytes) -> bytes:
    return HEADER.pack(kind, len(content)) + content


def receive(
    source: socket.socket, expected: int = 0, wait: Callable[[], object] = lambda: None
) -> tuple[bytes, memoryview]:
    """The next message, in a buffer of its own; by one call of the system if `expected` bytes follow its header.

    EOFError where the other side has ended, ValueError for what is no message. `wait` is called when a socket that does
    not block has nothing yet. With `expected`, no other message may be under way behind this one.
    """
    data = memoryview(bytearray(HEADER.size + expected))
    done = _fill(source, data, 0, HEADER.size, wait)
    kind, length = HEADER.unpack_from(data)
    whole = HEADER.size + length
    if length > LONGEST or done > whole:
        raise ValueError(f"a message of {length} bytes")
    if whole > len(data):
        data = memoryview(bytearray(data) + bytes(whole - len(data)))
    _fill(source, data[:whole], done, whole, wait)
    return kind, data[HEADER.size : whole]


class Layout:
    """How observations and steps of one spec lie in a message: all of one length, so that one buffer serves all."""

    def __init__(self, spec: Spec) -> None:
        self._action_dim = spec.action_dim
        self._arrays = []
        at = OUTCOME.size + 4 * spec.action_dim
        for name, array in spec.observation.items():
            dtype = np.dtype(array.dtype)
            self._arrays.append((name, array.shape, dtype, at))
            at += int(np.prod(array.shape)) * dtype.itemsize
        self.size = at

    def unpack_observation(self, data: memoryview) -> Observation:
        """Views of `data`, which is theirs alone."""
        return {name: np.ndarray(shape, dtype, data, at) for name, shape, dtype, at in self._arrays}

    def unpack_step(self, data: memoryview) -> Step:
        """As above."""
        reward, discount, told, success, last = OUTCOME.unpack_from(data)
        action = np.ndarray((self._action_dim,), np.float32, data, OUTCOME.size)
        return Step(self.unpack_observation(data), action, reward, discount, last, success if told else None)


class Writer:
    """Whole messages of one layout, each in the buffer of the one before it."""

    def __init__(self, spec: Spec) -> None:
        layout = Layout(spec)
        self._message = bytearray(HEADER.size + layout.size)
        content = memoryview(self._message)[HEADER.size :]
        self._places = layout.unpack_observation(content)
        self._action = np.ndarray((spec.action_dim,), np.float32, content, OUTCOME.size)

    def observation(self, observation: Observation, kind: bytes = b"O") -> bytearray:
        HEADER.pack_into(self._message, 0, kind, len(self._message) - HEADER.size)
        for name, place in self._places.items():
            place[...] = observation[name]
        return self._message

    def step(self, step: Step) -> bytearray:
        told = step.success is not None
        OUTCOME.pack_into(
            self._message, HEADER.size, step.reward, step.discount, told, step.success or 0.0, step.last
        )  # fmt: skip
        self._action[...] = step.action
        return self.observation(step.observation, b"T")


def pack_error(error: Exception) -> bytes:
    """Errors of our own keep their kind; any other is the environment's fault."""
    if isinstance(error, GsaError):
        return json.dumps([type(error).__name__, str(error)]).encode()
    said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".: ")
    return json.dumps([EnvironmentFault.__name__, f"The environment cannot be made: {said}."]).encode()


def unpack_error(data: memoryview) -> GsaError:
    name, text = json.loads(bytes(data))
    kind = getattr(errors, str(name), EnvironmentFault)
    return kind(str(text)) if isinstance(kind, type) and issubclass(kind, GsaError) else EnvironmentFault(str(text))


def serve(link: socket.socket) -> None:
    """Answers until the other side has ended. An answer that takes too long ends the process, whatever hangs in it."""
    served = Served()
    while True:
        try:
            kind, data = receive(link, served.expected)
        except (EOFError, OSError):
            break
        signal.setitimer(signal.ITIMER_REAL, served.timeout_s)  # the kernel's: it needs no turn of Python
        try:
            reply = served.reply(kind, data)
        except Exception as error:
            reply = message(b"E", pack_error(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            link.sendall(reply)
        except OSError:  # nobody waits for it any more
            break
    signal.setitimer(signal.ITIMER_REAL, EXIT_S)
    served.close()


class Served:
    """The environment of this process, once M has come."""

    def __init__(self) -> None:
        self._environment: Environment | None = None
        self.timeout_s, self.expected = START_S, 0

    def reply(self, kind: bytes, data: memoryview) -> bytes | bytearray:
        """The answer to a message, valid until the next."""
        if kind == b"M":
            return self._make(data)
        environment = self._environment
        assert environment is not None, "M comes first"
        if kind == b"R":
            return self._writer.observation(environment.reset(int.from_bytes(data, "little")))
        return self._writer.step(environment.step(np.frombuffer(data, np.float32)))

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()

    def _make(self, data: memoryview) -> bytes:
        task, render, imports, self.timeout_s = json.loads(bytes(data))
        self._environment = made = make(task, render, tuple(imports))
        self._writer, self.expected = Writer(made.spec), 4 * made.spec.action_dim
        return message(b"M", json.dumps({"task": asdict(made.task), "spec": made.spec.to_json()}).encode())


def _fill(source: socket.socket, data: memoryview, done: int, enough: int, wait: Callable[[], object]) -> int:
    """Reads into `data` from `done` on until there are `enough` bytes. Returns how many there are."""
    while done < enough:
        try:
            got = source.recv_into(data[done:])
        except BlockingIOError:
            wait()
            continue
        if not got:
            raise EOFError("the other side has ended")
        done += got
    return done


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is interrupted, and ends it
    rendering.limit_threads()
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # says where it hangs, then ends
    with socket.socket(fileno=int(sys.argv[1])) as link:
        serve(link)


if __name__ == "__main__":
    main()
