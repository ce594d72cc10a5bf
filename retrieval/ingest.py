"""Ingestion: other people's episodes into a store. Streaming, resumable; a bad file is named and skipped."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gsa.errors import FormatError, SpecMismatch, UsageError
from gsa.metrics import Progress
from retrieval.formats.isolated import Isolated
from retrieval.formats.npz import write_npz
from retrieval.formats.registry import open_source
from retrieval.formats.source import Entry, Loaded, Options, Source
from retrieval.layout import Layout, arrays_of
from retrieval.scales import Scales
from retrieval.store import TrajectoryStore

__all__ = ["IngestReport", "Options", "Plan", "forecast", "ingest", "open_source", "plan", "run", "write_npz"]

Decoded = tuple[Entry, Future[tuple[Loaded, int]]]  # with the checksum of its content
AHEAD_BYTES = 1 << 29  # of episodes decoded and not yet written
COMMIT_S = 5.0  # what a kill can cost
SPARE = 1.02  # of the forecast: headers and catalog


@dataclass
class IngestReport:
    """What an ingestion did."""

    added: int = 0  # trajectories
    skipped_known: int = 0  # were in the store already
    failed: list[tuple[str, str]] = field(default_factory=list)  # (file or episode, reason)
    steps: int = 0  # agent steps added
    bytes: int = 0  # added, uncompressed
    clipped: int = 0  # trajectories with actions outside their bounds: clipped, as simulators do


@dataclass
class Plan:
    """What an ingestion will do: the episodes that the store does not have yet."""

    source: Source
    entries: list[tuple[int, Entry]] = field(default_factory=list)  # (index in the source, entry)
    known: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """That it will add at most, about: without a codec."""
        return sum(entry.bytes for _, entry in self.entries)

    def require_room(self, store: TrajectoryStore) -> None:
        """UsageError if the store's disk has no room for it. With a codec it may take less, so nothing is refused."""
        free, needed = shutil.disk_usage(store.path).free, int(self.bytes * SPARE)
        if store.codec == "none" and needed > free:
            raise UsageError(
                f"Ingesting needs about {needed / 1e9:.1f} GB, and the disk of {store.path} has {free / 1e9:.1f} GB "
                "free: make room, or choose a smaller --resize or a new store with --codec zstd."
            )


def ingest(
    source: str | Path, store: TrajectoryStore, format: str = "auto", progress: Progress | None = None,
    options: Options | None = None, jobs: int = 0,
) -> IngestReport:  # fmt: skip
    """Adds the episodes of `source` (a file or folder) that the store does not have yet.

    `jobs` episodes are decoded at a time; 0: what this machine does best, four at most. An interrupted ingestion is
    continued by calling it again. Raises UsageError where there is nothing to ingest, the user must say more or the
    disk is too small; Unavailable where the disk refuses. Episodes that are not what they should be end up in `failed`.
    """
    with contextlib.closing(open_source(source, format, options)) as episodes:
        return run(plan(episodes, store), store, progress, jobs, str(source))


def forecast(source: str | Path, format: str = "auto", options: Options | None = None) -> Plan:
    """What ingesting `source` into an empty store would add, from the files' directories alone."""
    with contextlib.closing(open_source(source, format, options)) as episodes:
        return plan(episodes, None)


def plan(source: Source, store: TrajectoryStore | None, progress: Progress | None = None) -> Plan:
    """Looks at every episode of the source, without reading it, and which of them the store has."""
    found = Plan(source)
    for index in range(len(source)):
        try:
            entry = source.entry(index)
            if store is not None and store.find(entry.id) is not None:
                found.known += 1
            else:
                found.entries.append((index, entry))
        except FormatError as error:
            found.failed.append((source.name(index), str(error)))
        if progress is not None:
            progress(index + 1, len(source), {"new": len(found.entries), "bad": len(found.failed)})
    return found


def run(
    planned: Plan, store: TrajectoryStore, progress: Progress | None = None, jobs: int = 0, origin: str = ""
) -> IngestReport:
    """Carries the plan out; `origin` is what the store's log calls the source. Errors as `ingest`."""
    planned.require_room(store)
    report = IngestReport(skipped_known=planned.known, failed=list(planned.failed))
    scales, done = Scales(store.path), planned.known + len(planned.failed)
    total, episodes, added = done + len(planned.entries), _decoded(planned, jobs), set[str]()
    try:
        while done < total:
            with store.batch():
                for entry, future in _for_a_while(episodes):
                    try:
                        if entry.id in added:  # the same episode twice in one source
                            report.skipped_known += 1
                        else:
                            _add(*future.result(), store, report, scales)
                            added.add(entry.id)
                    except (FormatError, SpecMismatch) as error:
                        report.failed.append((entry.name, str(error)))
                    done += 1
                    _tell(progress, done, total, report)
    finally:
        episodes.close()
        _log(scales, origin, report)
    if not planned.entries:
        _tell(progress, done, total, report)
    return report


def _tell(progress: Progress | None, done: int, total: int, report: IngestReport) -> None:
    if progress is not None:
        progress(done, total, {"added": report.added, "failed": len(report.failed), "steps": report.steps})


def _for_a_while(episodes: Iterator[Decoded]) -> Iterator[Decoded]:
    """What comes within COMMIT_S, and the one after."""
    until = time.monotonic() + COMMIT_S
    for episode in episodes:
        yield episode
        if time.monotonic() > until:
            return


def _decoded(planned: Plan, jobs: int) -> Generator[Decoded, None, None]:
    """The episodes in their order, some of them being decoded ahead in threads."""
    jobs = jobs or _jobs(planned.source)
    pool, ahead, waiting = ThreadPoolExecutor(jobs), deque[Decoded](), deque(planned.entries)
    try:
        while waiting or ahead:
            while waiting and len(ahead) <= jobs and _fits(ahead, waiting[0][1]):
                index, entry = waiting.popleft()
                ahead.append((entry, pool.submit(_load, planned.source, index)))
            yield ahead.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(source: Source) -> int:
    """Readers in processes of their own get a core each. Threads share the interpreter with whoever writes, who gets a
    core too."""
    cores = os.cpu_count() or 1
    return min(4, cores if isinstance(source, Isolated) else max(1, cores - 1))


def _load(source: Source, index: int) -> tuple[Loaded, int]:
    """An episode and its checksum, which is half of what is left to do for it."""
    loaded = source.load(index)
    return loaded, Layout.of(loaded.spec).checksum(arrays_of(loaded.trajectory))


def _fits(ahead: Sequence[Decoded], entry: Entry) -> bool:
    return not ahead or sum(e.bytes for e, _ in ahead) + entry.bytes <= AHEAD_BYTES


def _add(loaded: Loaded, content: int, store: TrajectoryStore, report: IngestReport, scales: Scales) -> None:
    trajectory = loaded.trajectory
    scales.require(trajectory.embodiment, loaded.bounds)
    try:
        store.append(trajectory, loaded.spec, content)
    except UsageError as error:  # the store has another trajectory with its id
        raise FormatError(str(error)) from None
    arrays = (*trajectory.observation.values(), trajectory.action, trajectory.discount, trajectory.reward)
    report.added += 1
    report.steps += len(trajectory)
    report.bytes += sum(a.nbytes for a in arrays if a is not None)
    report.clipped += loaded.clipped


def _log(scales: Scales, origin: str, report: IngestReport) -> None:
    if report.added or report.failed:
        scales.log({
            "source": origin, "added": report.added, "known": report.skipped_known, "clipped": report.clipped,
            "failed": report.failed,
        })  # fmt: skip
