"""Stores into one: a finished run's online store joins the pool, and the pool grows with every task."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import numpy as np

from gsa.errors import FormatError, SpecMismatch, UsageError
from gsa.metrics import Progress
from retrieval.files import is_locked
from retrieval.scales import Scales
from retrieval.store import TrajectoryStore

SPARE = 1.02  # of what is added: catalog and headers


@dataclass
class MergeReport:
    """What a merge did."""

    added: int = 0  # trajectories
    known: int = 0  # were in the pool already
    failed: list[tuple[str, str]] = field(default_factory=list)  # (id, reason)
    steps: int = 0  # agent steps added
    notes: list[str] = field(default_factory=list)


def merge(
    source: TrajectoryStore, pool: TrajectoryStore, mix_renderers: bool = False, progress: Progress | None = None
) -> MergeReport:
    """Adds the trajectories of `source` that `pool`, a writable store, does not have, known by their ids.

    Everything that could be refused is looked at first: UsageError (the same store, no room on the disk, an
    embodiment whose actions were scaled from other bounds when they were ingested), SpecMismatch
    (an embodiment with another spec, or rendered otherwise unless `mix_renderers`). A merge that was interrupted is
    continued by calling it again. Trajectories that are damaged, or another than the pool's of their id, end up in
    `failed`.
    """
    report = MergeReport(notes=list(source.recovery))
    _require_fitting(source, pool, mix_renderers)
    if is_locked(source.path) and not source.writable:
        report.notes.append(f"{source.path} is still written to: merge it again once it is finished.")
    rows = source.rows()
    new = [row for row in rows.tolist() if not _known(source, pool, row, report)]
    _require_room(source, pool, new)
    if progress is not None and not new:
        progress(len(rows), len(rows), {"added": 0, "known": report.known, "failed": len(report.failed)})
    scales = _require_same_scales(source, pool)
    with pool.batch():
        for done, row in enumerate(new, len(rows) - len(new) + 1):
            try:
                _add(source, pool, row, report)
            except (FormatError, UsageError) as error:
                report.failed.append((source.catalog.id(row), str(error)))
            if progress is not None:
                progress(done, len(rows), {"added": report.added, "known": report.known, "failed": len(report.failed)})
    if report.added:
        scales.log({"source": str(source.path), "added": report.added, "known": report.known, "failed": report.failed})
    return report


def _require_fitting(source: TrajectoryStore, pool: TrajectoryStore, mix_renderers: bool) -> None:
    if source.path.resolve() == pool.path.resolve():
        raise UsageError(f"{source.path} and {pool.path} are the same store.")
    for name, spec in source.specs.items():
        known = pool.specs.get(name)
        if known is None:
            continue
        known.require_same(spec, f"{name} in {pool.path}", f"{name} in {source.path}")
        if known.renderer != spec.renderer and not mix_renderers:
            raise SpecMismatch(
                f"{name} was rendered by '{known.renderer}' in {pool.path} and by '{spec.renderer}' in {source.path}: "
                "their pixels differ. Say --mix-renderers to merge them all the same."
            )


def _require_same_scales(source: TrajectoryStore, pool: TrajectoryStore) -> Scales:
    """The pool's. UsageError if actions of one embodiment were scaled from different bounds."""
    ours, theirs = Scales(pool.path), Scales(source.path)
    for name in source.specs:
        ours.require(name, theirs.of(name))
    return ours


def _known(source: TrajectoryStore, pool: TrajectoryStore, row: int, report: MergeReport) -> bool:
    """Whether the pool has the trajectory, or another one under its id: then it is reported."""
    id = source.catalog.id(row)
    there = pool.find(id)
    if there is None:
        return False
    if pool.catalog.crc[there] == source.catalog.crc[row]:
        report.known += 1
    else:
        report.failed.append((id, f"{pool.path} has another trajectory of this id in row {there}."))
    return True


def _require_room(source: TrajectoryStore, pool: TrajectoryStore, rows: list[int]) -> None:
    """UsageError if the pool's disk has no room for these rows as they lie in the source. Of a compressed pool less is
    known, and nothing refused."""
    sizes = (source.catalog.column("end") - source.catalog.column("start"))[np.array(rows, np.int64)]
    needed, free = int(sizes.sum() * SPARE), shutil.disk_usage(pool.path).free
    if pool.codec == "none" and needed > free:
        raise UsageError(
            f"Merging needs at least {needed / 1e9:.1f} GB, and the disk of {pool.path} has {free / 1e9:.1f} GB free: "
            "make room first."
        )


def _add(source: TrajectoryStore, pool: TrajectoryStore, row: int, report: MergeReport) -> None:
    trajectory, spec = source.read(row, checked=True), source.spec(row)
    if spec.embodiment not in pool.specs:
        pool.add_spec(spec)
    pool.append(trajectory)
    report.added += 1
    report.steps += len(trajectory)
