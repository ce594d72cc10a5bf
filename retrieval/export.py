"""Export: a store's trajectories as the reference's npz files or as Minari datasets. Ingesting gives them back."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gsa.errors import UsageError, unknown
from gsa.metrics import Progress
from gsa.schema import Spec, Trajectory
from retrieval.files import replace_file
from retrieval.formats.extras import need
from retrieval.formats.minari import OURS
from retrieval.formats.npz import write_npz
from retrieval.formats.npz_folder import IDS_IN_NAMES, name_part
from retrieval.formats.source import stored_bytes
from retrieval.store import TrajectoryStore

TIME = "19800101T000000"  # stores do not know when an episode was recorded
AT_A_TIME = 1 << 28  # bytes of episodes handed to Minari at once
VERSION = "-v0"


@dataclass
class ExportReport:
    """What an export did."""

    written: int = 0
    kept: int = 0  # were there already
    without_reward: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # (trajectory, reason)
    folders: list[Path] = field(default_factory=list)


def export(
    store: TrajectoryStore, out: str | Path, format: str, progress: Progress | None = None, embodiment: str = "",
    observation: str = "",
) -> ExportReport:  # fmt: skip
    """Writes the store's trajectories, or those of one embodiment, below the folder `out`.

    npz: a folder for each embodiment and source; what is there is kept, so that an export goes on where it stopped.
    `observation` is the one to write where there are several. minari: a dataset for each embodiment, whole or not at
    all. Raises UsageError for what the format cannot hold. Controllers and policy versions are not exported.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    rows = store.rows(embodiment or None)
    if not len(rows):
        raise UsageError(f"There is nothing to export in {store.path}.")
    return FORMATS[format](store, Path(out), rows.tolist(), progress, observation)


def _export_npz(
    store: TrajectoryStore, out: Path, rows: Sequence[int], progress: Progress | None, observation: str
) -> ExportReport:
    report, folders = ExportReport(), dict[tuple[str, str], Path]()
    for spec in {store.spec(row).embodiment: store.spec(row) for row in rows}.values():
        _one_observation(spec, observation)
    for done, row in enumerate(rows, 1):
        spec, source = store.spec(row), store.catalog.source(row)
        folder = folders.get((spec.embodiment, source))
        if folder is None:
            folder = _folder(out, spec.embodiment, source, set(folders.values()))
            folders[spec.embodiment, source] = folder
            _write_spec(folder, spec, _one_observation(spec, observation), source)
        path = folder / f"{TIME}-{name_part(store.catalog.id(row))}-{row}-{store.catalog.length[row]}.npz"
        if path.exists():
            report.kept += 1
        else:
            trajectory = store.read(row)
            name = _one_observation(spec, observation)
            one = replace(trajectory, observation={name: trajectory.observation[name]})
            write_npz(path, one, with_reward=one.reward is not None)
            report.written += 1
            report.without_reward += one.reward is None
        _tell(progress, done, len(rows), report)
    report.folders = list(folders.values())
    return report


def _one_observation(spec: Spec, asked: str) -> str:
    """The observation that an npz will hold."""
    if asked:
        if asked not in spec.observation:
            raise unknown("observation", asked, spec.observation)
        return asked
    if len(spec.observation) > 1:
        raise UsageError(
            f"{spec.embodiment} has the observations {', '.join(spec.observation)}, and an npz holds one: choose it "
            "with --observation, or an embodiment with --embodiment, or --format minari, which holds all."
        )
    return next(iter(spec.observation))


def _write_spec(folder: Path, spec: Spec, observation: str, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = replace(spec, observation={observation: spec.observation[observation]}).to_json()
    with replace_file(folder / "spec.json") as file:
        file.write(json.dumps(told | {"source": source, IDS_IN_NAMES: True}, indent=1).encode())


def _folder(out: Path, embodiment: str, source: str, taken: set[Path]) -> Path:
    """A folder of its own for an embodiment and source."""
    folder = out / _plain(embodiment) / (_plain(source) or "unknown")
    while folder in taken:
        folder = folder.with_name(f"{folder.name}_")
    return folder


# Minari


def _export_minari(
    store: TrajectoryStore, out: Path, rows: Sequence[int], progress: Progress | None, observation: str
) -> ExportReport:
    need("minari", "minari")
    if observation:
        raise UsageError("A Minari dataset holds all observations: --observation is for npz.")
    if out.exists():
        raise UsageError(f"{out} is there already: choose another --out, or delete it.")
    _require_room(store, out, rows)
    partial, report = out.with_name(f"{out.name}.partial"), ExportReport()
    shutil.rmtree(partial, ignore_errors=True)
    taken: set[str] = set()
    done = 0
    for embodiment in dict.fromkeys(store.spec(row).embodiment for row in rows):
        spec = store.specs[embodiment]
        name = _dataset_id(embodiment, taken)
        taken.add(name)
        storage = _new_dataset(partial / name / "data", name, spec)
        for group in _groups(store, [r for r in rows if store.spec(r).embodiment == embodiment], report):
            _add(storage, group, report)
            done += len(group)
            _tell(progress, done + len(report.failed), len(rows), report)
        report.folders.append(out / name)
    os.replace(partial, out)
    return report


def _new_dataset(path: Path, name: str, spec: Spec) -> object:
    """An empty dataset of the embodiment, images uncompressed: what comes back is what went in."""
    import gymnasium as gym
    import minari
    from minari.dataset.minari_storage import MinariStorage

    limits = {"uint8": (0, 255), "float32": (-np.inf, np.inf)}
    spaces: dict[str, gym.Space] = {
        key: gym.spaces.Box(*limits[a.dtype], a.shape, np.dtype(a.dtype).type) for key, a in spec.observation.items()
    }
    path.mkdir(parents=True)
    action = gym.spaces.Box(-1, 1, (spec.action_dim,), np.float32)
    storage = MinariStorage.new(path, gym.spaces.Dict(spaces), action, data_format="hdf5", jpeg_encoding=False)
    storage.update_metadata({
        "dataset_id": name, "minari_version": minari.__version__, OURS: spec.to_json(),
        "description": "Exported by gsa. Episodes that had no reward have zeros; their metadata say has_reward: false.",
    })  # fmt: skip
    return storage


def _add(storage, group: list[Trajectory], report: ExportReport) -> None:  # type: ignore[no-untyped-def]
    from minari.data_collector import EpisodeBuffer

    first = storage.total_episodes
    storage.update_episodes([_buffer(t, EpisodeBuffer) for t in group])
    told = [{"id": t.id, "source": t.source, "has_reward": t.reward is not None, "stats": dict(t.stats)} for t in group]
    storage.update_episode_metadata([{OURS: json.dumps(e)} for e in told], range(first, first + len(group)))
    report.written += len(group)
    report.without_reward += sum(t.reward is None for t in group)


def _buffer(trajectory: Trajectory, make: Callable) -> object:
    ends = trajectory.discount == 0
    cut = np.zeros(len(trajectory), bool)
    cut[-1] = not ends[-1]
    reward = trajectory.reward if trajectory.reward is not None else np.zeros(len(trajectory), np.float32)
    return make(
        observations=dict(trajectory.observation), actions=np.clip(trajectory.action, -1, 1), rewards=reward,
        terminations=ends, truncations=cut, infos={},
    )  # fmt: skip


def _groups(store: TrajectoryStore, rows: Sequence[int], report: ExportReport) -> Iterator[list[Trajectory]]:
    """Trajectories of bounded size together; those that Minari cannot hold are named."""
    group, size = list[Trajectory](), 0
    for row in rows:
        trajectory = store.read(row)
        if not np.all((trajectory.discount == 0) | (trajectory.discount == 1)):
            report.failed.append((trajectory.id, "Its discount is neither 0 nor 1, and Minari knows only ends."))
            continue
        group.append(trajectory)
        size += sum(v.nbytes for v in trajectory.observation.values())
        if size >= AT_A_TIME:
            yield group
            group, size = [], 0
    if group:
        yield group


def _dataset_id(embodiment: str, taken: set[str]) -> str:
    """A name that Minari takes: namespace/name-v0."""
    parts = [part for part in (_plain(p) for p in embodiment.split("/")) if part] or ["embodiment"]
    namespace = f"{'-'.join(parts[:-1])}/" if len(parts) > 1 and len("-".join(parts[:-1])) > 1 else ""
    name = namespace + parts[-1] if namespace else "-".join(parts)
    while name + VERSION in taken:
        name += "_"
    return name + VERSION


def _require_room(store: TrajectoryStore, out: Path, rows: Sequence[int]) -> None:
    needed = sum(stored_bytes(store.spec(row), int(store.catalog.length[row])) for row in rows)
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if needed > (free := shutil.disk_usage(place).free):
        raise UsageError(f"The export needs about {needed / 1e9:.1f} GB; {out}'s disk has {free / 1e9:.1f} GB free.")


def _plain(text: str) -> str:
    """As a part of a path."""
    return re.sub(r"[^\w-]+", "-", text).strip("-")[:100]


def _tell(progress: Progress | None, done: int, total: int, report: ExportReport) -> None:
    if progress is not None:
        progress(done, total, {"written": report.written, "failed": len(report.failed)})


FORMATS = {"npz": _export_npz, "minari": _export_minari}
