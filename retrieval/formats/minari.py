"""Minari's datasets: metadata.json with the spaces, and episodes in one HDF5 file, or a folder of Arrow or parquet
files each. Our alignment is theirs: observations have T+1 rows, what was done at them T.

    metadata.json      data_format, observation_space, action_space, jpeg_encoding, dataset_id, env_spec
    main_data.hdf5     episode_<i>/ observations, actions, rewards, terminations, truncations
    <i>/*.arrow        the same as columns of T+1 rows, padded at the end; <i>/metadata.json

Read without Minari itself, which would follow links and decode whatever is there. Discount is 0 where `terminations`
says so. A dataset that `gsa store export` wrote comes back as it was: its metadata tell spec, ids and sources.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.schema import Spec
from retrieval.formats import images
from retrieval.formats.arrow import ArrowEpisodes
from retrieval.formats.hdf5 import Array, Node
from retrieval.formats.source import (
    Bounds,
    Entry,
    Kind,
    Loaded,
    Options,
    adapt,
    bounds_from,
    choose,
    identify,
    kind_of,
    make,
    stored_bytes,
    text,
)  # fmt: skip

MAX_METADATA = 1 << 26
OURS = "gsa"  # key of what an export adds to the metadata of a dataset and of its episodes


@dataclass(frozen=True)
class Leaf:
    """One array of a space: how it is reached, and what it is at one step."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    encoded: bool = False  # each row is a JPEG

    @property
    def key(self) -> str:
        return "/".join(self.path) or "observation"


class Episodes(Protocol):
    """How the episodes lie on disk. `leaf` and `column` read an array by its path in an episode."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def steps(self, index: int) -> int: ...

    def metadata(self, index: int) -> Mapping[str, Any]: ...

    def blocks(self, index: int, path: tuple[str, ...], leaf: Leaf, rows: int) -> Iterator[np.ndarray]:
        """The first `rows` rows, some at a time: [n, …] numbers, or an object with the bytes of an image a row."""


def open_minari(folder: Path, options: Options) -> Minari:
    """The dataset whose metadata.json is in `folder`."""
    path = folder / "metadata.json"
    try:
        if path.stat().st_size > MAX_METADATA:
            raise FormatError(f"{path} is too large.")
        metadata = json.loads(path.read_bytes())
        data_format = metadata["data_format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error!r}.") from None
    if data_format == "hdf5":
        return Minari(folder, metadata, Hdf5Episodes(folder / "main_data.hdf5"), options)
    if data_format in ("arrow", "parquet"):
        return Minari(folder, metadata, ArrowEpisodes(folder, data_format), options)
    raise FormatError(f"{folder} keeps its data as {text(data_format)}; hdf5, arrow and parquet can be read.")


class Minari:
    """The episodes of a dataset."""

    def __init__(self, folder: Path, metadata: Mapping[str, Any], episodes: Episodes, options: Options) -> None:
        self._episodes, self._options = episodes, options
        jpeg = bool(metadata.get("jpeg_encoding", True))
        leaves = list(_leaves(_space(metadata, "observation_space"), jpeg))
        kinds = {leaf.key: kind_of(leaf.shape or (1,), leaf.dtype) for leaf in leaves}
        taken = {key: kind for key, kind in kinds.items() if kind is not None}
        self._action = _action(_space(metadata, "action_space"), folder)
        self._ours = _ours(metadata)
        if self._ours is not None and not options.observations:
            self._names = _names_of(self._ours, taken)
            self.notes: Sequence[str] = ()
        else:
            self._names, self.notes = choose(taken, options, folder.name)
        self._leaves = {leaf.key: leaf for leaf in leaves}
        self._bounds = bounds_from(options, self._action.bounds)
        if self._bounds is not None:
            self.notes = [*self.notes, f"Actions are scaled to [-1, 1] from {self._bounds} ({self._bounds.origin})."]
        self._source = text(metadata.get("dataset_id") or folder.parent.name)
        kind_specs = {name: taken[key].array_spec(options.resize) for name, key in self._names.items()}
        base = self._ours or Spec(_robot(metadata, options), kind_specs, self._action.size)
        self._spec = adapt(replace(base, observation=kind_specs, action_dim=self._action.size), options)

    def __len__(self) -> int:
        return len(self._episodes)

    def name(self, index: int) -> str:
        return self._episodes.name(index)

    def entry(self, index: int) -> Entry:
        steps = self._steps(index)
        _, id = self._actions(index, steps)
        return Entry(self.name(index), id, stored_bytes(self._spec, steps))

    def load(self, index: int) -> Loaded:
        steps = self._steps(index)
        action, id = self._actions(index, steps)
        told = self._told(index)
        reward = None
        if told.get("has_reward", True) and not self._options.drop_rewards:
            reward = self._column(index, "rewards", steps)
        return make(
            self._spec, {name: self._observed(index, name, steps + 1) for name in self._names}, action,
            1 - self._column(index, "terminations", steps), reward, source=text(told.get("source") or self._source),
            id=id, options=self._options, bounds=self._bounds, stats=_stats(told),
        )  # fmt: skip

    def close(self) -> None:
        pass

    def _steps(self, index: int) -> int:
        steps = self._episodes.steps(index)
        stored_bytes(self._spec, steps)
        return steps

    def _told(self, index: int) -> Mapping[str, Any]:
        """What an export says of the episode; nothing for the datasets of others."""
        if self._ours is None:
            return {}
        try:
            told = json.loads(str(self._episodes.metadata(index).get(OURS, "{}")))
        except (ValueError, RecursionError):
            raise FormatError(f"The metadata of {self.name(index)} are damaged.") from None
        return told if isinstance(told, dict) else {}

    def _actions(self, index: int, steps: int) -> tuple[np.ndarray, str]:
        leaf = Leaf((), (self._action.size,), self._action.dtype)
        blocks = [b.reshape(len(b), -1) for b in self._episodes.blocks(index, ("actions",), leaf, steps)]
        action = np.concatenate(blocks)
        if action.shape != (steps, self._action.size):
            raise FormatError(f"actions is {list(action.shape)}, not {[steps, self._action.size]}.")
        known = self._told(index).get("id")
        return action, text(known) if known else identify(self._spec, "minari", index, action.shape, action)

    def _column(self, index: int, name: str, steps: int) -> np.ndarray:
        """[T] float32."""
        leaf = Leaf((), (), np.dtype(np.float64))
        return np.concatenate([b.reshape(-1) for b in self._episodes.blocks(index, (name,), leaf, steps)]).astype("f4")

    def _observed(self, index: int, name: str, rows: int) -> np.ndarray:
        leaf = self._leaves[self._names[name]]
        blocks = self._episodes.blocks(index, ("observations", *leaf.path), leaf, rows)
        if not self._spec.observation[name].is_image:
            return np.concatenate([np.asarray(b, np.float32).reshape(len(b), -1) for b in blocks])
        frames: Iterator[Any] = itertools.chain.from_iterable(blocks)
        if leaf.encoded:
            frames = map(images.decoded, frames)
        return images.stack(frames, rows, self._options.resize)


class Hdf5Episodes:
    """main_data.hdf5."""

    def __init__(self, path: Path) -> None:
        self._root = Node.open(path)
        numbers = [name.removeprefix("episode_") for name in self._root.names() if name.startswith("episode_")]
        self._numbers = sorted(int(n) for n in numbers if n.isascii() and n.isdigit())

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return f"{self._root.path} episode_{self._numbers[index]}"

    def steps(self, index: int) -> int:
        return self._episode(index).array("rewards").shape[0]

    def metadata(self, index: int) -> Mapping[str, Any]:
        return {OURS: self._episode(index).attribute(OURS) or "{}"}

    def blocks(self, index: int, path: tuple[str, ...], leaf: Leaf, rows: int) -> Iterator[np.ndarray]:
        node = self._episode(index)
        for part in path[:-1]:
            node = node.node(part)
        array = node.array(path[-1])
        self._require(array, leaf, rows)
        return array.blocks(rows)

    def _episode(self, index: int) -> Node:
        return self._root.node(f"episode_{self._numbers[index]}")

    def _require(self, array: Array, leaf: Leaf, rows: int) -> None:
        sound = array.shape[0] == rows and (leaf.encoded or array.shape[1:] in (leaf.shape, leaf.shape or (1,)))
        if not sound or array.ragged != (leaf.encoded and array.ragged):
            raise FormatError(f"{array.path} is {list(array.shape)} {array.dtype}, not {[rows, *leaf.shape]}.")


@dataclass(frozen=True)
class _Action:
    size: int
    dtype: np.dtype
    bounds: Bounds | None


def _space(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A serialised space. Datasets of old have only an env_spec, from which an environment would have to be made."""
    try:
        space = metadata[name]
        space = json.loads(space) if isinstance(space, str) else space
        if not isinstance(space["type"], str):
            raise TypeError("type")
        return space
    except (KeyError, TypeError, ValueError, RecursionError):
        raise FormatError(f"metadata.json has no {name}; load the dataset with Minari and save it anew.") from None


def _leaves(space: Mapping[str, Any], jpeg: bool, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """The arrays of a space. Tuples, texts, graphs and the like are passed over."""
    try:
        kind = space["type"]
        if len(path) > 8:
            raise FormatError("A space of metadata.json is nested too deep.")
        if kind == "Dict":
            for name, part in space["subspaces"].items():
                yield from _leaves(part, jpeg, (*path, str(name)))
        elif kind in ("Box", "Discrete"):
            shape, dtype = tuple(int(n) for n in space.get("shape") or ()), np.dtype(str(space["dtype"]))
            yield Leaf(path, shape, dtype, jpeg and kind == "Box" and _is_encoded(space, shape, dtype))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"The space of {'/'.join(path) or 'the observation'} is not what it should be.") from None


def _is_encoded(space: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether Minari writes observations of this space as JPEGs: bytes from 0 to 255, at least 32 a side."""
    if dtype != np.uint8 or len(shape) not in (2, 3) or min(shape[:2]) < 32:
        return False
    return bool(np.all(np.asarray(space["low"]) == 0) and np.all(np.asarray(space["high"]) == 255))


def _action(space: Mapping[str, Any], folder: Path) -> _Action:
    if space["type"] != "Box":
        raise UsageError(f"The actions of {folder} are {text(space['type'])}; only continuous ones (Box) can be taken.")
    try:
        shape = tuple(int(n) for n in space["shape"])
        dtype = np.dtype(str(space.get("dtype", "float32")))
        low, high = (np.broadcast_to(np.asarray(space[k], np.float64), shape).reshape(-1) for k in ("low", "high"))
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"The action space of {folder} is not what it should be.") from None
    if dtype.kind not in "fiub" or not 1 <= math.prod(shape) <= 4096:
        raise FormatError(f"The actions of {folder} are {list(shape)} {dtype}.")
    finite = bool(np.all(np.isfinite(low) & np.isfinite(high) & (low <= high)))
    bounds = Bounds(tuple(low.tolist()), tuple(high.tolist()), "the action space") if finite else None
    return _Action(math.prod(shape), dtype, bounds)


def _robot(metadata: Mapping[str, Any], options: Options) -> str:
    """gym/<EnvId>, as tasks of Gymnasium are called, if the dataset says which environment it is of."""
    try:
        spec = metadata.get("env_spec")
        id = json.loads(spec)["id"] if isinstance(spec, str) else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        id = ""
    if not id and not options.embodiment:
        raise UsageError("The dataset does not say which environment it is of: give --embodiment gym/<EnvId>.")
    return f"gym/{text(id)}"


def _ours(metadata: Mapping[str, Any]) -> Spec | None:
    """The spec that an export of ours put in."""
    return Spec.from_json(metadata[OURS]) if isinstance(metadata.get(OURS), dict) else None


def _stats(told: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {text(k): float(v) for k, v in dict(told.get("stats") or {}).items()}
    except (TypeError, ValueError, OverflowError):
        raise FormatError("The numbers in an episode's metadata are not what they should be.") from None


def _names_of(spec: Spec, kinds: Mapping[str, Kind]) -> dict[str, str]:
    if missing := [name for name in spec.observation if name not in kinds]:
        raise FormatError(f"The dataset has no {', '.join(missing)}, which its metadata promise.")
    return {name: name for name in spec.observation}
