"""Processes that are told to stop, and one training in several of them: which one failed, and why."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from gsa import errors
from gsa.errors import GsaError, Unavailable

GRACE_S = 15.0  # for the others to end by themselves once one has failed
KILLED_S = 10.0  # for a process that was killed to be gone
SAY_S = 1.0  # for a last sentence
PR_SET_PDEATHSIG = 1


def launch(target: Callable[..., None], arguments: tuple[Any, ...], processes: int, stop: threading.Event) -> None:
    """Runs target(*arguments) in so many processes, which find each other by learner.ranks, and waits for all.

    Where one fails or dies the others are ended, and its error is raised, or a GsaError that says how it died. With
    `stop` set they are told to stop; Stopped is raised.
    """
    with tempfile.TemporaryDirectory(prefix="gsa-ranks-") as folder, _environment(folder, processes):
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(target, arguments, Path(folder), rank), name=f"Process {rank}")
            for rank in range(processes)
        ]
        failed: list[SpawnProcess] = []
        try:
            for rank in ranks:
                rank.start()
            failed = _wait(ranks, stop)
        finally:
            causes = [_cause(rank, len(ranks), Path(folder)) for rank in failed]
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join(KILLED_S)
    if causes:  # one that was left alone by another is not to blame
        raise min(causes, key=lambda error: isinstance(error, Unavailable))


class Budget:
    """The time from the signal to stop to the end of this process, whatever it then does. `cancel` once it has ended
    in order. What a run needs to go on is on disk at any moment, so that a hard end costs no more than a kill."""

    def __init__(self, seconds: float, run: Path) -> None:
        self._seconds, self._run = seconds, run
        self._begun, self._over = False, threading.Event()

    def begin(self) -> None:
        """Also from a signal's handler, again and again: a thread of the low level takes no lock to start."""
        if not self._begun:
            self._begun = True
            _thread.start_new_thread(self._watch, ())

    def cancel(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        if not self._over.wait(self._seconds):
            speaker = threading.Thread(target=self._say, daemon=True)  # who reads this may be gone, or stopped
            speaker.start()
            speaker.join(SAY_S)
            os._exit(128 + signal.SIGTERM)

    def _say(self) -> None:
        said = f"Stopped without saving: that took longer than {self._seconds:g} s"
        with contextlib.suppress(OSError):
            sys.stderr.write(f"gsa: {said}; to go on: gsa finetune --resume {self._run}\n")
            sys.stderr.flush()


@contextmanager
def stop_on(*signals: signal.Signals, begin: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """An event that these signals set, instead of ending the process; `begin` is called besides. Outside the main
    thread nobody sets it."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def told(*_: object) -> None:
        begin()
        stop.set()

    before = {each: signal.signal(each, told) for each in signals}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def end_with_parent(by: signal.Signals) -> None:
    """This process gets that signal when the thread that started it ends, however it does. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)


@contextmanager
def _environment(folder: str, processes: int) -> Iterator[None]:
    """What the processes inherit: loopback alone, a meeting place in the file system, their share of the cores."""
    ours = {
        "WORLD_SIZE": str(processes),
        "GSA_RENDEZVOUS": f"file://{folder}/rendezvous",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait(ranks: list[SpawnProcess], stop: threading.Event) -> list[SpawnProcess]:
    """Until all have ended, or GRACE_S after the first failed: those that failed. Once `stop` is set it tells them."""
    told, deadline = False, float("inf")
    while alive := [rank for rank in ranks if rank.exitcode is None]:
        wait([rank.sentinel for rank in alive], timeout=0.2)
        if stop.is_set() and not told:
            told = True
            for rank in alive:
                rank.terminate()
        if deadline == float("inf") and any(rank.exitcode for rank in ranks):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            break
    return [rank for rank in ranks if rank.exitcode]


def _cause(rank: SpawnProcess, processes: int, folder: Path) -> GsaError:
    """Why one failed: its own words, or how it ended."""
    told = folder / f"{rank.name}.json"
    if told.exists():
        error = json.loads(told.read_text())
        return getattr(errors, error["type"], GsaError)(error["message"])
    code = rank.exitcode or 0
    how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    hint = ", as the kernel does where memory runs out" if code == -signal.SIGKILL else ""
    return GsaError(
        f"{rank.name} of {processes} {how}{hint}; the others were ended. The same command goes on from the last "
        "checkpoint."
    )


def _rank(target: Callable[..., None], arguments: tuple[Any, ...], folder: Path, rank: int) -> None:
    """The life of one process. Ctrl-C is the parent's to hear; it ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGTERM)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        target(*arguments)
    except Exception as error:
        if not isinstance(error, GsaError):
            traceback.print_exc()
        known = type(error).__name__ if isinstance(error, GsaError) else "GsaError"
        message = str(error) if isinstance(error, GsaError) else f"{type(error).__name__}: {error}"
        (folder / f"Process {rank}.json").write_text(json.dumps({"type": known, "message": message}))
        sys.exit(1)
