"""robomimic's HDF5: data/demo_<i>/ with obs/<key> and actions, a row a step; often next_obs, rewards and dones.

    row        0    1    …    T−1
    obs        o0   o1        oT−1
    actions    a0   a1        aT−1    taken at the observation of its row
    next_obs   o1   o2        oT      may be absent: then oT is not known, and the last action is left out
    rewards    r0   r1        rT−1

`dones` marks success or the end of a demonstration, as the file's maker liked: it says nothing of the task's end, so
the discount is 1. Images are [H, W, 3] uint8.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.schema import ArraySpec, Spec
from retrieval.formats import images
from retrieval.formats.hdf5 import Array, Node
from retrieval.formats.source import (
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
    slug,
    stored_bytes,
    text,
)  # fmt: skip

DEMO = re.compile(r"demo_(\d+)", re.ASCII)


class Robomimic:
    """The demonstrations of one file or several."""

    def __init__(self, files: Sequence[Path], path: Path, options: Options) -> None:
        self._options, self._bounds = options, bounds_from(options, None)
        self._root = path.parent if path.is_file() else path
        self._demos: list[tuple[Path, str]] = []
        self._faults: dict[int, str] = {}  # files without demonstrations, each in the place of one
        for file in files:
            try:
                self._demos += [(file, name) for name in _demos(file)]
            except FormatError as error:
                self._faults[len(self._demos)] = str(error)
                self._demos.append((file, ""))
        self._open = lru_cache(1)(Node.open)
        whole = next((i for i in range(len(self._demos)) if i not in self._faults), None)
        if whole is None:
            raise FormatError(f"There is no robomimic demonstration at {path}. {' '.join(self._faults.values())}")
        self._names, self.notes = choose(self._kinds(whole), options, self._demos[whole][0].name)

    def __len__(self) -> int:
        return len(self._demos)

    def name(self, index: int) -> str:
        file, demo = self._demos[index]
        return f"{file.relative_to(self._root)} {demo}".rstrip()

    def entry(self, index: int) -> Entry:
        spec, _, actions, steps = self._look(index)
        return Entry(self.name(index), self._id(index, spec, actions), stored_bytes(spec, steps))

    def load(self, index: int) -> Loaded:
        spec, source, actions, steps = self._look(index)
        stored_bytes(spec, steps)
        demo, whole = self._demo(index), steps == len(actions)
        observation = {
            name: _rows(demo, key, whole, spec.observation[name], self._options.resize)
            for name, key in self._names.items()
        }
        reward = None
        if "rewards" in demo and not self._options.drop_rewards:
            reward = demo.array("rewards").read().reshape(-1)[:steps]
        return make(
            spec, observation, actions[:steps], np.ones(steps, np.float32), reward, source=source,
            id=self._id(index, spec, actions), options=self._options, bounds=self._bounds,
        )  # fmt: skip

    def close(self) -> None:
        pass

    def _id(self, index: int, spec: Spec, actions: np.ndarray) -> str:
        return identify(spec, "robomimic", self._demos[index][1], actions.shape, actions)

    def _demo(self, index: int) -> Node:
        file, name = self._demos[index]
        return self._open(file).node("data").node(name)

    def _kinds(self, index: int) -> dict[str, Kind]:
        obs = self._demo(index).node("obs")
        kinds = {}
        for key in obs.names():
            if not obs.is_group(key):
                array = obs.array(key)
                if (kind := kind_of(array.shape[1:] or (1,), array.dtype)) is not None:
                    kinds[key] = kind
        return kinds

    def _look(self, index: int) -> tuple[Spec, str, np.ndarray, int]:
        """Spec, source, all recorded actions, and the steps that can be stored."""
        if index in self._faults:
            raise FormatError(self._faults[index])
        demo, kinds = self._demo(index), self._kinds(index)
        if missing := [key for key in self._names.values() if key not in kinds]:
            raise FormatError(f"It has no observation {', '.join(missing)}.")
        actions = demo.array("actions").read()
        if actions.ndim != 2:
            raise FormatError(f"actions is {list(actions.shape)}; [T, A] is needed.")
        whole = "next_obs" in demo and all(key in demo.node("next_obs") for key in self._names.values())
        robot, source, hz = self._told(self._demos[index][0])
        spec = Spec(
            robot, {name: kinds[key].array_spec(self._options.resize) for name, key in self._names.items()},
            actions.shape[1], control_hz=hz,
        )  # fmt: skip
        return adapt(spec, self._options), source, actions, len(actions) - (not whole)

    def _told(self, file: Path) -> tuple[str, str, float]:
        """Embodiment, source and control rate by the file's env_args."""
        try:
            told = json.loads(self._open(file).node("data").attribute("env_args") or "{}")
            kwargs = told.get("env_kwargs") or {}
            robots = kwargs.get("robots") or []
            hz = float(kwargs.get("control_freq") or 0)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise FormatError(f"The env_args of {file.name} are not what they should be.") from None
        robots = [robots] if isinstance(robots, str) else robots
        task = text(told.get("env_name") or file.stem)
        if not robots and not self._options.embodiment:
            raise UsageError(f"{file.name} does not say which robot it is of: give --embodiment, such as mylab/arm.")
        robot = "-".join(slug(r) for r in robots) if isinstance(robots, list) else slug(robots)
        return f"robomimic/{robot or 'robot'}", f"robomimic/{task}/{file.stem}", hz if 0 <= hz < 1e6 else 0.0


def _demos(file: Path) -> list[str]:
    root = Node.open(file)
    try:
        names = [name for name in root.node("data").names() if DEMO.fullmatch(name)]
        if not names:
            raise FormatError(f"{file.name} has no data/demo_0.")
    finally:
        root.close()
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def _rows(demo: Node, key: str, whole: bool, kind: ArraySpec, resize: int) -> np.ndarray:
    """The observations and, if they are `whole`, the last of those that followed: [T+1, …]."""
    obs, blocks = demo.node("obs").array(key), demo.node("obs").array(key).blocks()
    if whole:
        following = demo.node("next_obs").array(key)
        _require_sequence(obs, following)
        blocks = itertools.chain(blocks, [following.tail()])
    if kind.is_image:
        return images.stack(itertools.chain.from_iterable(blocks), obs.shape[0] + whole, resize)
    return np.concatenate([b.reshape(len(b), -1).astype(np.float32) for b in blocks])


def _require_sequence(obs: Array, following: Array) -> None:
    """What followed a step is what the next one saw. Vectors are compared whole, of images only the first two."""
    if (following.shape, following.dtype) != (obs.shape, obs.dtype):
        raise FormatError(f"{following.path} is {list(following.shape)}, {obs.path} {list(obs.shape)}.")
    last = None if obs.row_bytes * obs.shape[0] < 1 << 22 else 2
    seen, followed = (np.concatenate(list(a.blocks(last))) for a in (obs, following))
    if not np.array_equal(seen[1:], followed[:-1], equal_nan=seen.dtype.kind == "f"):
        raise FormatError(f"{following.path} is not what {obs.path} has a row later: the steps are not in sequence.")
