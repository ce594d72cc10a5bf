"""What the meta/ folder of a LeRobot dataset says: features, where each episode lies, bounds of actions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gsa.errors import FormatError
from retrieval.formats.source import MAX_BYTES, Bounds, Kind, image_size, kind_of, text

UNREADABLE = (
    pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
    OverflowError,
)  # fmt: skip
MAX_EPISODES = 1 << 24
BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


@dataclass(frozen=True)
class Feature:
    """One column of the dataset, or a camera."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> Kind | None:
        """What it is as an observation."""
        if self.dtype in ("video", "image"):
            size = image_size(self.shape)
            return Kind(size) if size else None
        try:
            return kind_of(self.shape or (1,), self.dtype)
        except TypeError:  # a text, or a dtype that numpy does not know
            return None


@dataclass(frozen=True)
class Episode:
    """Where an episode lies."""

    index: int
    rows: int
    data: tuple[int, int]  # chunk and file
    offset: int  # of its first row in the file
    videos: Mapping[str, tuple[int, int, float]]  # camera → chunk, file, time of its first frame
    task: str


def info_of(path: Path) -> Mapping[str, Any]:
    """meta/info.json, if it is one of version 3."""
    try:
        info = json.loads((path / "meta" / "info.json").read_bytes())
        version = str(info["codebase_version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path / 'meta' / 'info.json'} cannot be read: {error!r}.") from None
    if not version.startswith("v3."):
        raise FormatError(
            f"{path} is of LeRobot's version {text(version)}; version 3 is needed. "
            "LeRobot converts it: python -m lerobot.scripts.convert_dataset_v21_to_v30."
        )
    return info


def number(info: Mapping[str, Any], name: str) -> float:
    value = info.get(name)
    if not isinstance(value, int | float) or not 0 < value < 1e6:
        raise FormatError(f"meta/info.json has {name} {value!r}; a positive number is needed.")
    return float(value)


def features(info: Mapping[str, Any]) -> dict[str, Feature]:
    try:
        found = {}
        for key, told in info["features"].items():
            if "/" in key or "\0" in key or key in ("", ".", ".."):
                raise FormatError(f"meta/info.json names a feature {text(key)!r}, which cannot be.")
            found[key] = Feature(key, str(told["dtype"]), tuple(int(n) for n in told["shape"]))
        return found
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError(f"The features in meta/info.json are not what they should be: {error!r}.") from None


def is_observation(feature: Feature) -> bool:
    """Whether it is something seen, rather than done, said or counted."""
    if feature.key in BOOKKEEPING or feature.key.startswith(("action", "next.", "complementary_info", "annotation")):
        return False
    if feature.dtype in ("video", "image") and feature.kind is None:
        raise FormatError(f"The camera {feature.key} is {list(feature.shape)}; images of up to 4096 a side can be.")
    return feature.kind is not None


def episodes(path: Path, cameras: Sequence[str]) -> list[Episode]:
    """What meta/episodes says, by episode."""
    files = sorted((path / "meta" / "episodes").rglob("*.parquet"))
    keys = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index", "dataset_from_index"]
    for camera in cameras:
        keys += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                present = [key for key in keys if key in table.schema_arrow.names]
                require_size(table, present, file)
                rows += table.read(columns=present).to_pylist()
        except UNREADABLE as error:
            raise FormatError(f"{file} cannot be read: {error}.") from None
        if len(rows) > MAX_EPISODES:
            raise FormatError(f"{path} has more than {MAX_EPISODES} episodes.")
    try:
        first: dict[tuple[int, int], int] = {}
        for row in rows:
            data = int(row["data/chunk_index"]), int(row["data/file_index"])
            first[data] = min(first.get(data, 1 << 62), int(row["dataset_from_index"]))
        return sorted((_episode(row, cameras, first) for row in rows), key=lambda episode: episode.index)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path / 'meta' / 'episodes'} is not what it should be: {error!r}.") from None


def _episode(row: Mapping[str, Any], cameras: Sequence[str], first: Mapping[tuple[int, int], int]) -> Episode:
    def place(prefix: str) -> tuple[int, int]:
        chunk, file = int(row[f"{prefix}/chunk_index"]), int(row[f"{prefix}/file_index"])
        if not (0 <= chunk < 1 << 31 and 0 <= file < 1 << 31):
            raise ValueError(f"chunk {chunk}, file {file}")
        return chunk, file

    videos = {}
    for camera in cameras:
        start = float(row[f"videos/{camera}/from_timestamp"])
        if not 0 <= start < 1e9:
            raise ValueError(f"from_timestamp {start}")
        videos[camera] = (*place(f"videos/{camera}"), start)
    data, rows, tasks = place("data"), int(row["length"]), row.get("tasks") or [""]
    offset = int(row["dataset_from_index"]) - first[data]
    return Episode(int(row["episode_index"]), rows, data, offset, videos, text(tasks[0]))


def action_bounds(path: Path, size: int) -> Bounds | None:
    """The least and greatest actions of the dataset, if it tells them."""
    try:
        told = json.loads((path / "meta" / "stats.json").read_bytes())["action"]
        low, high = (tuple(np.asarray(told[k], np.float64).reshape(-1).tolist()) for k in ("min", "max"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path / 'meta' / 'stats.json'} cannot be read: {error!r}.") from None
    if (
        len(low) != size
        or len(high) != size
        or not all(-math.inf < a <= b < math.inf for a, b in zip(low, high, strict=True))
    ):
        raise FormatError(f"{path / 'meta' / 'stats.json'} has bounds of {len(low)} actions; {size} are needed.")
    return Bounds(low, high, "meta/stats.json")


def require_size(file: pq.ParquetFile, columns: Sequence[str], path: Path) -> None:
    """FormatError if those columns take more memory than an episode may."""
    meta, size = file.metadata, 0
    for group in (meta.row_group(i) for i in range(meta.num_row_groups)):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            size += chunk.total_uncompressed_size if chunk.path_in_schema.split(".list")[0] in columns else 0
    if size > MAX_BYTES or meta.num_rows > MAX_EPISODES:
        raise FormatError(f"{path} has {meta.num_rows} rows, {size} bytes unpacked: too much for one file.")
