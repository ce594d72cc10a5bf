"""One environment as a process: what it runs, and how it speaks with the process that started it.

    python -m actors.env_process FD          started by actors.hosting.Isolated; FD is its end of a socket pair

A message is its kind (1 byte), the length of the rest (4 bytes, little-endian) and the rest:

    to the environment    M  JSON [task, render, imports, timeout_s]      R  seed, 8 bytes      S  action [A] float32
    from it               M  JSON {task, spec}                            O  observation
                          T  reward, discount, success, last; action [A]; observation           E  JSON [error, text]

Arrays are their bytes, observations in the order of the spec. It has one thread, and imports numpy and the simulator.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import socket
import struct
import sys
from dataclasses import asdict

import numpy as np

from actors import rendering
from actors.environment import Environment, Observation, Step, make
from gsa import errors
from gsa.errors import EnvironmentFault, GsaError
from gsa.schema import Spec

HEADER = struct.Struct("<cI")
OUTCOME = struct.Struct("<dd?d?")  # reward, discount, whether success is told, success, last
LONGEST = 1 << 28  # of a message, in bytes: more is no message
START_S = 120.0  # to import the simulator and build it
EXIT_S = 5.0  # to close it


def send(to: socket.socket, kind: bytes, *parts: bytes) -> None:
    to.sendall(b"".join((HEADER.pack(kind, sum(map(len, parts))), *parts)))


def receive(source: socket.socket) -> tuple[bytes, memoryview]:
    """The next message. EOFError where the other side has ended; TimeoutError by the socket's own timeout."""
    kind, length = HEADER.unpack(_exactly(source, HEADER.size))
    if length > LONGEST:
        raise EOFError(f"a message of {length} bytes")
    return kind, _exactly(source, length)


def pack_observation(observation: Observation, spec: Spec) -> list[bytes]:
    return [np.ascontiguousarray(observation[name]).tobytes() for name in spec.observation]


def unpack_observation(data: memoryview, spec: Spec) -> Observation:
    """Views of `data`, which is theirs alone."""
    observation, start = {}, 0
    for name, array in spec.observation.items():
        dtype, count = np.dtype(array.dtype), int(np.prod(array.shape))
        observation[name] = np.frombuffer(data, dtype, count, start).reshape(array.shape)
        start += count * dtype.itemsize
    return observation


def pack_step(step: Step, spec: Spec) -> list[bytes]:
    told = step.success is not None
    outcome = OUTCOME.pack(step.reward, step.discount, told, step.success or 0.0, step.last)
    return [outcome, step.action.tobytes(), *pack_observation(step.observation, spec)]


def unpack_step(data: memoryview, spec: Spec) -> Step:
    reward, discount, told, success, last = OUTCOME.unpack_from(data)
    action = np.frombuffer(data, np.float32, spec.action_dim, OUTCOME.size)
    observation = unpack_observation(data[OUTCOME.size + action.nbytes :], spec)
    return Step(observation, action, reward, discount, last, success if told else None)


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
    environment: Environment | None = None
    timeout_s = START_S
    while True:
        try:
            kind, data = receive(link)
        except (EOFError, OSError):
            break
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # the kernel's: it needs no turn of Python
        try:
            if kind == b"M":
                task, render, imports, timeout_s = json.loads(bytes(data))
                environment = make(task, render, tuple(imports))
            reply = _reply(environment, kind, data)
        except Exception as error:
            reply = [b"E", pack_error(error)]
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            send(link, *reply)
        except OSError:  # nobody waits for it any more
            break
    if environment is not None:
        signal.setitimer(signal.ITIMER_REAL, EXIT_S)
        environment.close()


def _reply(environment: Environment | None, kind: bytes, data: memoryview) -> list[bytes]:
    assert environment is not None, "M comes first"
    spec = environment.spec
    if kind == b"M":
        about = {"task": asdict(environment.task), "spec": spec.to_json()}
        return [b"M", json.dumps(about).encode()]
    if kind == b"R":
        return [b"O", *pack_observation(environment.reset(int.from_bytes(data, "little")), spec)]
    return [b"T", *pack_step(environment.step(np.frombuffer(data, np.float32)), spec)]


def _exactly(source: socket.socket, count: int) -> memoryview:
    """Exactly so many bytes, in a buffer of their own."""
    data = memoryview(bytearray(count))
    done = 0
    while done < count:
        if not (got := source.recv_into(data[done:])):
            raise EOFError("the other side has ended")
        done += got
    return data


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is interrupted, and ends it
    rendering.limit_threads()
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # says where it hangs, then ends
    with socket.socket(fileno=int(sys.argv[1])) as link:
        serve(link)


if __name__ == "__main__":
    main()
