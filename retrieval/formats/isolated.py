"""A source read in a process of its own: C libraries parse files from anywhere there, and may crash or want memory.

    parent → child   {"name": 3}, {"entry": 3} or {"load": 3}: a length in four bytes, then JSON
    child → parent   the same, then the bytes of the arrays that it names

The child has bounded memory and no core dump. When it dies, the episode that it was reading is bad, and the next one
gets a new child. No pickle on the pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gsa import errors
from gsa.errors import FormatError, GsaError
from gsa.schema import Spec, Trajectory
from retrieval.formats.source import MAX_BYTES, Bounds, Entry, Loaded, Options, Source
from retrieval.layout import arrays_of

ADDRESS_SPACE = 6 << 30  # bytes of a child, its libraries among them
PATIENCE_S = 300.0  # without a byte from the child
KILLED_S = 10.0  # for a process that was killed to be gone
MAX_HEADER = 1 << 24


class Isolated:
    """The source of that format at that path, in as many child processes as threads use it at a time."""

    def __init__(self, path: Path, format: str, options: Options, patience_s: float = PATIENCE_S) -> None:
        self._command, self._patience_s = (path, format, options), patience_s
        self._mutex, self._idle = threading.Lock(), list[_Child]()
        with self._reader(str(path)) as child:
            hello = child.hello
        self._length, self.notes = int(hello["length"]), tuple(str(n) for n in hello["notes"])

    notes: Sequence[str]

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        try:
            return str(self._ask({"name": index})[0]["name"])
        except FormatError:
            return f"{self._command[0].name} number {index}"

    def entry(self, index: int) -> Entry:
        answer, _ = self._ask({"entry": index})
        return Entry(str(answer["name"]), str(answer["id"]), int(answer["bytes"]))

    def load(self, index: int) -> Loaded:
        answer, arrays = self._ask({"load": index})
        spec = Spec.from_json(answer["spec"])
        observation = {name: arrays.pop(name) for name in spec.observation}
        trajectory = Trajectory(
            spec.embodiment, observation, **arrays, source=str(answer["source"]), id=str(answer["id"]),
            stats=answer["stats"],
        )  # fmt: skip
        told = answer["bounds"]
        bounds = None if told is None else Bounds(tuple(told[0]), tuple(told[1]), str(told[2]))
        return Loaded(trajectory, spec, bool(answer["clipped"]), bounds)

    def close(self) -> None:
        with self._mutex:
            for child in self._idle:
                child.close()
            self._idle.clear()

    def _ask(self, question: dict[str, int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        (index,) = question.values()
        with self._reader(f"{self._command[0].name} number {index}") as child:
            return child.ask(question)

    @contextlib.contextmanager
    def _reader(self, what: str) -> Iterator[_Child]:
        """A child for this thread alone. One that dies is not used again; FormatError says what it died of."""
        try:
            with self._mutex:
                child = self._idle.pop() if self._idle else None
            child = child or _Child(*self._command, self._patience_s)
            try:
                yield child
            except GsaError:
                raise
            except BaseException:  # in the middle of an answer
                child.close()
                raise
            finally:
                if child.alive:
                    with self._mutex:
                        self._idle.append(child)
        except _Died as death:
            raise FormatError(f"{what} cannot be read: its reader {death}.") from None


class _Died(Exception):
    """A child ended or fell silent. Says how."""


class _Child:
    """One reading process."""

    def __init__(self, path: Path, format: str, options: Options, patience_s: float) -> None:
        setup = json.dumps({"path": str(path), "format": format, "options": dataclasses.asdict(options)})
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "HDF5_PLUGIN_PRELOAD": "::", "HDF5_USE_FILE_LOCKING": "FALSE"}
        self._patience_s, self.alive = patience_s, True
        self._process = subprocess.Popen(
            [sys.executable, "-m", "retrieval.formats.isolated", setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        try:
            self.hello, _ = self._answer()
        except GsaError:
            self.close()
            raise

    def ask(self, question: dict[str, int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            _send(self._in, question)
        except OSError:
            raise self._death() from None
        return self._answer()

    def close(self) -> None:
        self.alive = False
        self._process.kill()
        self._process.wait(KILLED_S)
        self._in.close()
        self._out.close()

    def _answer(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        size = struct.unpack("<I", self._read(4))[0]
        if size > MAX_HEADER:
            raise self._death("gave an answer that makes no sense")
        answer = json.loads(bytes(self._read(size)))
        if "error" in answer:
            raise _error(answer)
        described = {name: (tuple(shape), np.dtype(dtype)) for name, shape, dtype in answer.get("arrays", ())}
        if sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values()) > 2 * MAX_BYTES:
            raise self._death("gave an answer that makes no sense")
        return answer, {
            name: np.frombuffer(self._read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
            for name, (shape, dtype) in described.items()
        }

    def _read(self, size: int) -> np.ndarray:
        """Exactly that many bytes."""
        out, got = np.empty(size, np.uint8), 0
        view, poll = memoryview(out), select.poll()
        poll.register(self._out, select.POLLIN)
        while got < size:
            if not poll.poll(self._patience_s * 1000):
                raise self._death(f"said nothing for {self._patience_s:.0f} s")
            count = os.readv(self._out.fileno(), [view[got:]])
            if not count:
                raise self._death()
            got += count
        return out

    def _death(self, how: str = "") -> _Died:
        if how:
            self._process.kill()
        code = self._process.wait(KILLED_S)
        self.close()
        return _Died(how or (f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"))


def _error(answer: dict[str, Any]) -> GsaError:
    kind = getattr(errors, str(answer["error"]), FormatError)
    return (kind if isinstance(kind, type) and issubclass(kind, GsaError) else FormatError)(str(answer["message"]))


def _send(pipe: IO[bytes], message: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    content = json.dumps(message).encode()
    for part in (np.frombuffer(struct.pack("<I", len(content)) + content, np.uint8), *arrays):
        view = memoryview(part.reshape(-1).view(np.uint8))
        while view:
            view = view[pipe.write(view) or 0 :]


# In the child


def serve(setup: dict[str, Any], questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answers until there are no more questions."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in setup["options"].items()}
    options = Options(**given)
    source = _try(answers, lambda: _open(setup, options))
    if source is None:
        return
    _send(answers, {"length": len(source), "notes": list(source.notes)})
    while len(head := questions.read(4)) == 4:
        question = json.loads(questions.read(struct.unpack("<I", head)[0]))
        if "name" in question:
            _send(answers, {"name": source.name(question["name"])})
        elif "entry" in question:
            entry = _try(answers, lambda: source.entry(question["entry"]))  # noqa: B023
            if entry is not None:
                _send(answers, dataclasses.asdict(entry))
        else:
            loaded = _try(answers, lambda: source.load(question["load"]))  # noqa: B023
            if loaded is not None:
                _send_loaded(answers, loaded)


def _open(setup: dict[str, Any], options: Options) -> Source:
    from retrieval.formats.registry import formats

    return formats()[setup["format"]].open(Path(setup["path"]), options)


def _try(answers: IO[bytes], call: Any) -> Any:
    """What it returns; None where an error was sent instead."""
    try:
        return call()
    except GsaError as error:
        _send(answers, {"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        _send(answers, {"error": FormatError.__name__, "message": f"It needs more than {ADDRESS_SPACE >> 30} GiB."})


def _send_loaded(answers: IO[bytes], loaded: Loaded) -> None:
    trajectory, bounds = loaded.trajectory, loaded.bounds
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays_of(trajectory).items()}
    header = {
        "spec": loaded.spec.to_json(), "source": trajectory.source, "id": trajectory.id,
        "stats": dict(trajectory.stats), "clipped": loaded.clipped,
        "bounds": None if bounds is None else [bounds.low, bounds.high, bounds.origin],
        "arrays": [[name, array.shape, array.dtype.str] for name, array in arrays.items()],
    }  # fmt: skip
    _send(answers, header, list(arrays.values()))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print does not land between answers
    serve(json.loads(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
