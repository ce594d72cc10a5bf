"""Ingestion: other people's episodes into a store. Streaming, resumable; a bad file is named and skipped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gsa.errors import FormatError, SpecMismatch, UsageError, unknown
from gsa.metrics import Progress
from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval import npz
from retrieval.manifest import Manifest
from retrieval.npz import write_npz
from retrieval.store import TrajectoryStore

__all__ = ["Forecast", "IngestReport", "forecast", "ingest", "write_npz"]


@dataclass
class IngestReport:
    """What an ingestion did."""

    added: int = 0  # trajectories
    skipped_known: int = 0  # were in the store already
    failed: list[tuple[str, str]] = field(default_factory=list)  # (file, reason)
    steps: int = 0  # agent steps added
    bytes: int = 0  # added, uncompressed
    clipped: int = 0  # trajectories with actions outside [-1, 1]: clipped, as their simulators did


@dataclass(frozen=True)
class Forecast:
    """What an ingestion would add at most."""

    files: int
    bytes: int  # uncompressed


@dataclass(frozen=True)
class Item:
    """One episode of a source: its name for messages, its id, its content and whether actions were clipped."""

    name: str
    identify: Callable[[], str]
    load: Callable[[], tuple[Trajectory, Spec, bool]]
    size: Callable[[], int]  # bytes in a store, about


def ingest(
    source: str | Path, store: TrajectoryStore, format: str = "auto", progress: Progress | None = None
) -> IngestReport:
    """Adds the episodes of `source` (a file or folder) that the store does not have yet.

    An interrupted ingestion is continued by calling it again. Raises UsageError where there is nothing to ingest,
    Unavailable where the disk refuses; episodes that are not what they should be end up in `failed`.
    """
    items, report, seen = _items(Path(source), format), IngestReport(), set[str]()
    with store.batch():
        for done, item in enumerate(items, 1):
            try:
                _ingest_one(item, store, report, seen)
            except (FormatError, SpecMismatch, UsageError) as error:
                report.failed.append((item.name, str(error)))
            if progress is not None:
                progress(done, len(items), {"added": report.added, "failed": len(report.failed), "steps": report.steps})
    return report


def forecast(source: str | Path, format: str = "auto") -> Forecast:
    """What ingesting `source` would add, from the files' directories alone; unreadable files count nothing."""
    files = size = 0
    for item in _items(Path(source), format):
        try:
            size += item.size()
            files += 1
        except FormatError:
            continue
    return Forecast(files, size)


def _ingest_one(item: Item, store: TrajectoryStore, report: IngestReport, seen: set[str]) -> None:
    id = item.identify()
    if id in seen or store.find(id) is not None:
        report.skipped_known += 1
        return
    trajectory, spec, clipped = item.load()
    store.append(trajectory, spec)
    seen.add(id)  # what is appended within a batch is not found before its end
    arrays = (*trajectory.observation.values(), trajectory.action, trajectory.discount, trajectory.reward)
    report.added += 1
    report.steps += len(trajectory)
    report.bytes += sum(a.nbytes for a in arrays if a is not None)
    report.clipped += clipped


def _items(source: Path, format: str) -> list[Item]:
    if format == "auto":
        format = "store" if Manifest.exists(source) else "npz"
    if format not in FORMATS:
        raise unknown("format", format, ("auto", *FORMATS))
    if not source.exists():
        raise UsageError(f"There is nothing to ingest at {source}: no such file or folder.")
    if not (items := FORMATS[format](source)):
        raise UsageError(f"There is nothing to ingest at {source}: no {format} in it.")
    return items


# The reference's npz


def _npz_items(source: Path) -> list[Item]:
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*.npz") if p.is_file())
    root = source.parent if source.is_file() else source
    descriptions: dict[Path, _Description | FormatError | None] = {}

    def describe(folder: Path) -> _Description | None:
        if folder not in descriptions:
            try:
                descriptions[folder] = _describe(folder, root)
            except FormatError as error:
                descriptions[folder] = error
        found = descriptions[folder]
        if isinstance(found, FormatError):
            raise found
        return found

    def item(path: Path) -> Item:
        return Item(
            str(path.relative_to(root)),
            lambda: npz.identity(path),
            lambda: _load_npz(path, describe(path.parent)),
            lambda: npz.unpacked_bytes(path),
        )

    return [item(path) for path in files]


@dataclass(frozen=True)
class _Description:
    """What a folder's spec.json says of its episodes."""

    spec: Spec
    source: str


def _describe(folder: Path, root: Path) -> _Description | None:
    """The nearest spec.json from `folder` up to `root`."""
    for place in (folder, *folder.parents):
        path = place / "spec.json"
        if path.is_file():
            try:
                data = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise FormatError(f"{path} cannot be read: {error}.") from None
            spec = Spec.from_json(data)
            return _Description(spec, str(data.get("source", spec.embodiment)))
        if place == root:
            break
    return None


def _load_npz(path: Path, description: _Description | None) -> tuple[Trajectory, Spec, bool]:
    episode = npz.read_npz(path)
    if description is None:
        description = _by_folder(path, episode)
    spec = description.spec
    if len(spec.observation) != 1:
        raise FormatError(f"An npz holds one observation; its spec.json has {', '.join(spec.observation)}.")
    (name,) = spec.observation
    trajectory = Trajectory(
        spec.embodiment, {name: episode.observation}, episode.action, episode.discount, episode.reward,
        source=description.source, id=npz.identity(path),
    )  # fmt: skip
    return trajectory, spec, episode.clipped


def _by_folder(path: Path, episode: npz.Episode) -> _Description:
    """What the folders dmcontrol/<domain>/ and metaworld/<task>/ of the paper's pools say."""
    folders = path.resolve().parent.parts
    pairs = [pair for pair in itertools.pairwise(folders) if pair[0] in ("dmcontrol", "metaworld")]
    if not pairs:
        raise FormatError(
            f"What robot {path.name} is of is not known: it is neither below dmcontrol/<domain> nor metaworld/<task>. "
            "Put a spec.json beside it."
        )
    benchmark, name = pairs[-1]
    source = f"dmc/{name}" if benchmark == "dmcontrol" else f"metaworld/{name}"
    embodiment = source if benchmark == "dmcontrol" else "metaworld/sawyer"
    image = episode.observation.ndim == 4
    observation = ArraySpec(episode.observation.shape[1:], str(episode.observation.dtype))
    spec = Spec(
        embodiment, {"pixels" if image else "state": observation}, episode.action.shape[1], action_repeat=2,
        renderer="faithful",
    )  # fmt: skip
    return _Description(spec, source)


# Another store


def _store_items(source: Path) -> list[Item]:
    other = TrajectoryStore.open(source)

    def item(row: int) -> Item:
        return Item(
            f"{source} row {row}",
            lambda: other.catalog.id(row),
            lambda: (other.read(row), other.spec(row), False),
            lambda: sum(v.nbytes for v in other.columns(row).values()),
        )

    return [item(row) for row in other.rows().tolist()]


FORMATS: dict[str, Callable[[Path], list[Item]]] = {"npz": _npz_items, "store": _store_items}
