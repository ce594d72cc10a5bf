"""What the commands around a pool do: collect episodes, ingest them, look into stores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.progress import bar, console
from gsa.errors import UsageError
from retrieval.manifest import Manifest
from retrieval.store import TrajectoryStore

if TYPE_CHECKING:
    from deploy.data_commands import Collect, StoreShow
    from retrieval.formats.source import Options

FAULTS_FOUND = 1


def collect(command: Collect) -> int:
    """Generates episodes as npz files or into a store, and a page about them. 1 where simulators failed."""
    from actors.collect import CollectPlan
    from actors.collect import collect as collect_all
    from reports.pool_page import write_pool_page

    named = tuple(pair for text in command.source for pair in source_counts(text))
    plan = CollectPlan(named, command.with_reward, command.render, command.imports)
    processes = command.processes or os.cpu_count() or 1
    with _collected_into(command.store, command.codec) as store, bar("collect") as progress:
        report = collect_all(plan, command.out, command.seed, processes, progress, store)
    for source, row in report["sources"].items():
        success = "" if row["success"] is None else f"  success {row['success']:.0%}"
        console.print(
            f"{source:44} {row['episodes']:4} episodes  return {row['return']['mean']:7.1f}{success}", soft_wrap=True
        )
    for failure in report["failed"]:
        console.print(f"  failed: {failure}", soft_wrap=True)
    console.print(f"What was collected: {write_pool_page(command.out / 'collect.html', report)}", soft_wrap=True)
    return FAULTS_FOUND if report["failed"] else 0


@contextlib.contextmanager
def _collected_into(path: Path | None, codec: str) -> Iterator[TrajectoryStore | None]:
    if path is None:
        yield None
        return
    with TrajectoryStore.open(path, write=True) if path.exists() else TrajectoryStore.create(path, codec) as store:
        yield store


def ingest(source: Path, path: Path, format: str, codec: str, options: Options | None = None, jobs: int = 0) -> int:
    """Reads episodes into a store, created if it is not there. 1 where files were bad."""
    from retrieval.ingest import open_source, plan, run

    with contextlib.closing(open_source(source, format, options)) as episodes:  # first: a wrong source makes no store
        for note in episodes.notes:
            console.print(note, soft_wrap=True)
        store = TrajectoryStore.open(path, write=True) if path.exists() else TrajectoryStore.create(path, codec=codec)
        with store:
            with bar("look") as progress:
                planned = plan(episodes, store, progress)
            size = f"{planned.bytes / 1e6:.0f} MB" if planned.bytes < 1e9 else f"{planned.bytes / 1e9:.1f} GB"
            size += "" if store.codec == "none" else f" before {store.codec}"
            console.print(f"{len(planned.entries)} trajectories to add, about {size}; {planned.known} known before.")
            with bar("ingest") as progress:
                report = run(planned, store, progress, jobs, str(source))
    console.print(f"{report.added} trajectories added, {report.skipped_known} known before, {len(report.failed)} bad.")
    if report.clipped:
        console.print(f"{report.clipped} had actions outside their bounds, which were clipped.")
    for file, reason in report.failed:
        console.print(f"  skipped {file}: {reason}", soft_wrap=True, markup=False)
    return FAULTS_FOUND if report.failed else 0


def store_info(path: Path) -> int:
    """Prints what a store holds."""
    with TrajectoryStore.open(path) as store:
        for line in store.recovery:
            console.print(line, soft_wrap=True, markup=False)
        print(f"{path}: {len(store)} trajectories, {store.steps} agent steps, codec {store.codec}")
        for embodiment, row in store.info().items():
            megabytes = row["bytes"] / 1e6
            print(f"  {embodiment}: {row['trajectories']} trajectories, {row['frames']} frames, {megabytes:.0f} MB")
            for source, count in row["sources"].items():
                print(f"    {count:6}  {source}")
    return 0


def store_verify(path: Path) -> int:
    """Checks every checksum; prints the damaged trajectories."""
    with TrajectoryStore.open(path) as store, bar("verify") as progress:
        damaged = store.verify(progress)
        count = len(store)
        recovery = store.recovery
    for reason in recovery:
        print(reason)
    for row, reason in damaged:
        print(reason if row is None else f"trajectory {row}: {reason}")
    print(f"{count - len({row for row, _ in damaged} - {None})} of {count} trajectories are whole.")
    return FAULTS_FOUND if damaged or recovery else 0


def store_show(command: StoreShow) -> int:
    """Writes a page or a picture of some of a store's trajectories."""
    from reports.store_page import choose, write_store_page

    with TrajectoryStore.open(command.store) as store:
        rows = command.rows or choose(store, command.count, command.embodiment, command.source, command.seed)
        print(write_store_page(command.out, store, rows))
    return 0


def store_merge(sources: Sequence[Path], into: Path, mix_renderers: bool) -> int:
    """Merges stores into one, created if it is not there. 1 where trajectories could not be taken."""
    from retrieval.merge import merge

    failed = 0
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(TrajectoryStore.open(store_of(path))) for path in sources]
        pool = TrajectoryStore.open(into, write=True) if into.exists() else TrajectoryStore.create(into)
        stack.enter_context(pool)
        for store in stores:
            with bar("merge") as progress:
                report = merge(store, pool, mix_renderers, progress)
            counts = f"{report.added} trajectories added, {report.known} known before, {len(report.failed)} not taken"
            console.print(f"{store.path}: {counts}.", soft_wrap=True, markup=False)
            for note in (*report.notes, *(f"{id}: {reason}" for id, reason in report.failed)):
                console.print(f"  {note}", soft_wrap=True, markup=False)
            failed += len(report.failed)
    return FAULTS_FOUND if failed else 0


def store_of(path: Path) -> Path:
    """The store at `path`, or the online store of the run there."""
    online = path / "online"
    return online if Manifest.exists(online) and not Manifest.exists(path) else path


def store_export(path: Path, out: Path, format: str, embodiment: str, observation: str) -> int:
    """Writes a store in another format. 1 where trajectories could not be written."""
    from retrieval.export import export

    with TrajectoryStore.open(path) as store, bar("export") as progress:
        report = export(store, out, format, progress, embodiment, observation)
    console.print(f"{report.written} trajectories written, {report.kept} were there, {len(report.failed)} were not.")
    if report.without_reward:
        said = "zeros were written, and marked has_reward: false" if format == "minari" else "their files have none"
        console.print(f"{report.without_reward} have no reward: {said}.")
    for folder in report.folders:
        print(folder)
    for id, reason in report.failed:
        console.print(f"  skipped {id}: {reason}", soft_wrap=True, markup=False)
    return FAULTS_FOUND if report.failed else 0


def source_counts(text: str) -> list[tuple[str, int]]:
    """ "metaworld/reach-v3/scripted-0.5:20" as source and episodes; several where it stands for several."""
    from actors.sources import expand

    source, colon, episodes = text.rpartition(":")
    if not colon or not episodes.isdigit() or int(episodes) < 1:
        raise UsageError(f"'{text}' is not SOURCE:EPISODES, such as metaworld/reach-v3/scripted-0.5:20.")
    return expand(source, int(episodes))
