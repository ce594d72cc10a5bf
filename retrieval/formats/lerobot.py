"""LeRobot's datasets of version 3: tables in parquet, cameras in mp4, many episodes a file.

    meta/info.json                                       codebase_version, fps, robot_type, features
    meta/episodes/chunk-<c>/file-<f>.parquet             a row an episode: its length, files, times in the videos
    meta/stats.json                                      least and greatest actions
    data/chunk-<c>/file-<f>.parquet                      a row a frame: action, observation.state, timestamp, …
    videos/<camera>/chunk-<c>/file-<f>.mp4

    row          0    1    …    N−1
    observation  o0   o1        oN−1
    action       a0   a1        aN−1    taken at the observation of its row
    next.reward  r0   r1        rN−1    of that action

What the last action led to was not recorded, so it and its reward are left out: T = N − 1. `next.done` marks where a
recording ends, not where a task does: the discount is 1. A frame of a video belongs to the row whose timestamp it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gsa.errors import FormatError, UsageError
from gsa.schema import Spec
from retrieval.formats import images
from retrieval.formats.lerobot_meta import (
    UNREADABLE,
    Episode,
    Feature,
    action_bounds,
    episodes,
    features,
    info_of,
    is_observation,
    number,
    require_size,
)  # fmt: skip
from retrieval.formats.source import (
    Entry,
    Kind,
    Loaded,
    Options,
    adapt,
    bounds_from,
    choose,
    identify,
    make,
    slug,
    stored_bytes,
)  # fmt: skip
from retrieval.formats.video import frames_at

ROWS_AT_A_TIME = 256


class LeRobot:
    """The episodes of one dataset."""

    def __init__(self, path: Path, options: Options) -> None:
        self._path, self._options = path, options
        info = info_of(path)
        self._fps = number(info, "fps")
        self._features = features(info)
        if "action" not in self._features or self._features["action"].kind is None:
            raise FormatError(f"{path} has no action that can be stored.")
        kinds = {f.key: f.kind for f in self._features.values() if is_observation(f)}
        self._names, notes = choose({k: kind for k, kind in kinds.items() if kind}, options, path.name)
        cameras = [key for key in self._names.values() if self._features[key].dtype == "video"]
        self._episodes = episodes(path, cameras)
        size = math.prod(self._features["action"].shape)
        self._bounds = bounds_from(options, action_bounds(path, size))
        self.notes: Sequence[str] = notes
        if self._bounds is not None:
            self.notes = [*notes, f"Actions are scaled to [-1, 1] from {self._bounds} ({self._bounds.origin})."]
        robot = info.get("robot_type")
        if not robot and not options.embodiment:
            raise UsageError(f"{path} does not say which robot it is of: give --embodiment, such as mylab/arm.")
        observation = {n: self._kind(key).array_spec(options.resize) for n, key in self._names.items()}
        self._spec = adapt(Spec(f"lerobot/{slug(robot)}", observation, size, control_hz=self._fps), options)
        self._table = lru_cache(1)(self._read_table)

    def __len__(self) -> int:
        return len(self._episodes)

    def name(self, index: int) -> str:
        return f"episode {self._episodes[index].index}"

    def entry(self, index: int) -> Entry:
        episode = self._episodes[index]
        size = stored_bytes(self._spec, episode.rows - 1)
        return Entry(self.name(index), self._id(episode), size)

    def load(self, index: int) -> Loaded:
        episode = self._episodes[index]
        steps = episode.rows - 1
        stored_bytes(self._spec, steps)
        action = self._column(episode, "action").reshape(episode.rows, -1)[:steps]
        reward = None
        if "next.reward" in self._features and not self._options.drop_rewards:
            reward = self._column(episode, "next.reward").reshape(-1)[:steps]
        return make(
            self._spec, {name: self._observed(episode, key) for name, key in self._names.items()}, action,
            np.ones(steps, np.float32), reward, source="/".join(filter(None, (f"lerobot/{self._path.resolve().name}",
            episode.task))), id=self._id(episode), options=self._options, bounds=self._bounds,
        )  # fmt: skip

    def close(self) -> None:
        pass

    def _kind(self, key: str) -> Kind:
        kind = self._features[key].kind
        assert kind is not None
        return kind

    def _id(self, episode: Episode) -> str:
        """FormatError unless the rows are the episode's, in order."""
        frames, owners = self._column(episode, "frame_index"), self._column(episode, "episode_index")
        if not (np.array_equal(frames, np.arange(episode.rows)) and np.all(owners == episode.index)):
            raise FormatError(f"{self._data(episode.data)} does not have the rows of episode {episode.index} in order.")
        numbers = [self._column(episode, k) for k in sorted(self._numeric()) if k not in ("index", "task_index")]
        return identify(self._spec, "lerobot", episode.index, *numbers)

    def _numeric(self) -> list[str]:
        """The columns that are read of every episode: they are small beside the images."""
        observed = [key for key in self._names.values() if not self._kind(key).is_image]
        return ["action", "timestamp", "frame_index", "episode_index", *observed] + (
            ["next.reward"] if "next.reward" in self._features else []
        )

    def _observed(self, episode: Episode, key: str) -> np.ndarray:
        """[rows, …] of one observation."""
        if self._features[key].dtype == "video":
            chunk, file, start = episode.videos[key]
            path = self._path / "videos" / key / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4"
            times = start + self._column(episode, "timestamp").astype(np.float64)
            return frames_at(path, times.tolist(), 0.5 / self._fps, self._options.resize)
        if self._features[key].dtype == "image":
            return images.stack(map(images.decoded, self._pictures(episode, key)), episode.rows, self._options.resize)
        values = self._column(episode, key)
        if self._kind(key).is_image:
            return images.stack(values.reshape(-1, *self._features[key].shape), episode.rows, self._options.resize)
        return values.reshape(episode.rows, -1).astype(np.float32)

    def _column(self, episode: Episode, key: str) -> np.ndarray:
        """A numeric column of the episode: [rows, …]."""
        table = self._table(episode.data)
        part = table[key][episode.offset : episode.offset + episode.rows] if key in table else np.zeros(0)
        if len(part) != episode.rows:
            raise FormatError(f"{self._data(episode.data)} has {len(part)} rows of {key} for {episode.rows}.")
        return part

    def _data(self, data: tuple[int, int]) -> Path:
        return self._path / "data" / f"chunk-{data[0]:03d}" / f"file-{data[1]:03d}.parquet"

    def _read_table(self, data: tuple[int, int]) -> dict[str, np.ndarray]:
        """The numeric columns of a data file."""
        path = self._data(data)
        try:
            with pq.ParquetFile(path) as file:
                columns = [key for key in self._numeric() if key in file.schema_arrow.names]
                require_size(file, columns, path)
                table = file.read(columns=columns)
            table.validate(full=True)
            return {key: _numbers(table[key], self._features[key]) for key in columns}
        except UNREADABLE as error:
            raise FormatError(f"{path} cannot be read: {error}.") from None

    def _pictures(self, episode: Episode, key: str) -> Any:
        """The encoded images of a column, a few rows at a time."""
        path, at, stop = self._data(episode.data), 0, episode.offset + episode.rows
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[key]):
                    start, end = max(episode.offset - at, 0), min(stop - at, len(batch))
                    if start < end:
                        for value in batch.column(0)[start:end]:
                            yield value.as_py()["bytes"]
                    at += len(batch)
                    if at >= stop:
                        return
        except UNREADABLE as error:
            raise FormatError(f"{path} cannot be read: {error}.") from None


def _numbers(column: pa.ChunkedArray, feature: Feature) -> np.ndarray:
    """[rows, …]: plain numbers, or lists of equal lengths, as the feature says."""
    array, size = column.combine_chunks(), math.prod(feature.shape)
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        raise FormatError(f"{feature.key} is {column.type}; numbers are needed.")
    if array.null_count or len(array) != len(column) * size:
        raise FormatError(f"{feature.key} has {len(array)} values for {len(column)} rows of {size}, or gaps.")
    return array.to_numpy(zero_copy_only=False).reshape(len(column), *(feature.shape if feature.shape != (1,) else ()))
