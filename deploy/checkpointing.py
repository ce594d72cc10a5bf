"""When a run is saved, and that a run goes on with what it began with."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from deploy.config import FinetuneConfig
from gsa.errors import FormatError, Unavailable
from gsa.metrics import Meter
from learner.checkpoint import Checkpoints, Restored

FOLDER = "checkpoints"
INPUTS = ("architecture.json", "rehearsal.json", "prior/*")  # what a run begins with and never changes
WRITE_S = 900.0  # for a checkpoint to get to disk
_log = logging.getLogger(__name__)


class RunCheckpoints:
    """Owns a run's checkpoints: every so many frames or seconds, written by a thread beside the run.

    A save waits for the one before it. One that fails is counted and told, and tried again when the next is due:
    a full disk does not end a run.
    """

    def __init__(self, run: Path, config: FinetuneConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._checkpoints = Checkpoints(run / FOLDER, config.keep_checkpoints)
        self._inputs = inputs_digest(run)
        self._every_frames, self._every_s = config.checkpoint_every_frames, config.checkpoint_every_s
        self._clock = clock
        self._saved_frames, self._saved_at = 0, clock()
        self._copy: Any = None  # of the state saved last: the next is copied into it, as fresh memory is slow
        self._writer: threading.Thread | None = None
        self._to_write: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._written = threading.Event()  # all that was saved
        self._written.set()
        weakref.finalize(self, self._to_write.put, None)
        self._meter = Meter("checkpoint")

    def due(self, frames: int) -> bool:
        """Whether it is time to save a run of so many frames."""
        new = frames - self._saved_frames
        return new >= self._every_frames or (new > 0 and self._clock() - self._saved_at >= self._every_s)

    def save(self, frames: int, state: Mapping[str, Any], score: float | None = None) -> None:
        """Takes a copy of `state` and writes it beside the run. `score`: of an evaluation of just this state."""
        started = time.perf_counter()
        self.flush()
        self._copy = copied({**state, "inputs": self._inputs}, self._copy)
        if self._writer is None or not self._writer.is_alive():
            self._writer = threading.Thread(target=_in_turn, args=(self._to_write,), name="checkpoint", daemon=True)
            self._writer.start()
        self._written.clear()
        self._to_write.put(partial(self._write, frames, self._copy, score))
        self._saved_frames, self._saved_at = frames, self._clock()
        self._meter.gauge("pause_ms", 1e3 * (time.perf_counter() - started))

    def flush(self) -> None:
        """Waits until what was saved is on disk."""
        if not self._written.wait(WRITE_S):
            raise Unavailable(f"A checkpoint is not on disk after {WRITE_S:g} s: is the disk there?")

    def load(self) -> Restored | None:
        """The newest whole checkpoint. FormatError where the run's folder is no longer what it was saved with."""
        restored = self._checkpoints.load()
        if restored is not None:
            self._saved_frames = restored.step
            if restored.state.get("inputs") != self._inputs:
                raise FormatError(f"{restored.path} is of another run, or {', '.join(INPUTS)} beside it have changed.")
        return restored

    def stats(self) -> dict[str, float]:
        """Checkpoints written and failed, how long the run paused for the last and how long it took to write."""
        return self._meter.stats()

    def _write(self, frames: int, state: Mapping[str, Any], score: float | None) -> None:
        started = time.perf_counter()
        try:
            self._checkpoints.save(frames, state, score)
            self._meter.count("written")
            self._meter.gauge("write_s", time.perf_counter() - started)
        except Unavailable as error:
            _log.warning("%s It is tried again when the next is due.", error)
            self._meter.count("errors")
        finally:
            self._written.set()


def _in_turn(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    """Makes the calls that come, until None does. All in one thread: freed memory is kept apart for each thread, and
    a new thread for each checkpoint takes that of several in the end."""
    while (call := calls.get()) is not None:
        call()
        del call  # and with it what is written


def inputs_digest(run: Path) -> str:
    """A hash of the files that a run begins with."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in INPUTS for path in run.glob(pattern)):
        digest.update(f"{path.relative_to(run)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def copied(state: Any, room: Any = None) -> Any:
    """The state with tensors of its own, on the CPU: the live ones go on changing. `room` is an earlier copy that is no
    longer needed: its tensors are written to where they fit."""
    if isinstance(state, Mapping):
        rooms = room if isinstance(room, Mapping) else {}
        return {key: copied(value, rooms.get(key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [copied(value) for value in state]
    if isinstance(state, torch.Tensor):
        if isinstance(room, torch.Tensor) and (room.shape, room.dtype) == (state.shape, state.dtype):
            return room.copy_(state.detach())
        return state.detach().to("cpu", copy=True)
    return state.copy() if hasattr(state, "copy") else state
