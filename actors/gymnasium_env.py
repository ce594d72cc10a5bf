"""Any Gymnasium environment with continuous actions, seen as its observation space says, or as the task's name asks.

gym/Pendulum-v1               all that the space holds: images, resized, and vectors
gym/Pendulum-v1@pixels        the rendered image
gym/Pendulum-v1@pixels+state  both; names are the space's keys, or "pixels" and "state" where it has none
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled

from actors.environment import Frame, Observation
from actors.rendering import HEIGHT, WIDTH
from actors.tasks import IMAGE_SHAPE, Task
from gsa.errors import UsageError, unknown
from gsa.schema import ArraySpec

MIN_IMAGE_SIDE = 8  # an array of bytes with a shorter one is no image


@dataclass(frozen=True)
class Sensor:
    """One observation of ours: where it is in Gymnasium's, and what becomes of it. The rendering has no space."""

    path: tuple[str, ...]  # of keys
    space: Any

    @functools.cached_property
    def is_image(self) -> bool:
        return self.space is None or _is_image(self.space)

    @property
    def spec(self) -> ArraySpec:
        if self.is_image:
            return ArraySpec(IMAGE_SHAPE, "uint8")
        return ArraySpec((int(spaces.flatdim(self.space)),), "float32")

    def read(self, observation: Any) -> np.ndarray:
        """The value in Gymnasium's `observation`, in a buffer of its own. ValueError if it is not of its space."""
        for key in self.path:
            observation = observation[key]
        if self.space.shape is not None and np.shape(observation) != self.space.shape:
            name = ".".join(self.path) or "the observation"
            raise ValueError(f"{name} has the shape {np.shape(observation)}, its space {self.space.shape}")
        if self.is_image:
            return to_image(np.asarray(observation))
        return np.array(spaces.flatten(self.space, observation), np.float32)


RENDERING = Sensor((), None)


class Gymnasium:
    """One registered environment; actions in [-1, 1] are scaled to the bounds of its space."""

    def __init__(self, task: Task) -> None:
        env_id, names = split(task.local_name)
        self._sensors = dict(choose(env_id, names))
        self.environment = create(env_id, RENDERING in self._sensors.values())
        space = self.environment.action_space
        self._shape, self._dtype = space.shape, space.dtype
        self._is_integer = np.issubdtype(space.dtype, np.integer)
        self._low, self._high = np.float64(space.low).ravel(), np.float64(space.high).ravel()
        self._span = self._high - self._low
        self.observation = {name: sensor.spec for name, sensor in self._sensors.items()}
        self._seen: Any = None
        self.control_hz = float(self.environment.metadata.get("render_fps") or 0)
        self.renderer = f"gymnasium {env_id}"

    def reset(self, seed: int) -> None:
        self._seen, _ = self.environment.reset(seed=seed)

    def frame(self, action: np.ndarray) -> Frame:
        self._seen, reward, terminated, truncated, info = self.environment.step(self._scaled(action))
        success = info.get("is_success", info.get("success"))
        return Frame(float(reward), None if success is None else float(success), bool(terminated), bool(truncated))

    def observe(self) -> Observation:
        return {n: self.render() if s is RENDERING else s.read(self._seen) for n, s in self._sensors.items()}

    def render(self) -> np.ndarray:
        for viewer in self._viewers():
            viewer.make_context_current()  # else it draws into whatever context was current last
        try:
            image = self.environment.render()
        except DependencyNotInstalled as error:
            raise UsageError(f"{self.renderer}: {str(error).rstrip('.')}.") from error
        if getattr(image, "ndim", 0) != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image must be [height, width, 3], not {getattr(image, 'shape', type(image))}")
        return to_image(np.asarray(image, np.uint8))

    def close(self) -> None:
        for viewer in self._viewers():
            # Gymnasium leaves it to the garbage collector, which frees its things in another's context.
            viewer.make_context_current()
            viewer.con.free()
        self.environment.close()

    def _viewers(self) -> list[Any]:
        """The offscreen viewers of Gymnasium's own MuJoCo environments."""
        renderer = getattr(self.environment.unwrapped, "mujoco_renderer", None)
        return list(getattr(renderer, "_viewers", {}).values())

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        scaled = self._low + (action + 1.0) / 2 * self._span
        scaled = np.minimum(np.maximum(scaled, self._low), self._high)
        if self._is_integer:
            scaled = np.rint(scaled)
        return scaled.reshape(self._shape).astype(self._dtype)


@functools.lru_cache(maxsize=64)
def describe(name: str, imports: tuple[str, ...] = ()) -> Task:
    """The task "gym/<EnvId>" after importing `imports`. UsageError if it is not one that can be learned."""
    for module in imports:
        import_module(module)
    env_id, names = split(name.removeprefix("gym/"))
    choose(env_id, names)
    environment = create(env_id, rendered=False)
    try:
        space, limit = environment.action_space, environment.spec.max_episode_steps
        if not isinstance(space, spaces.Box) or not space.is_bounded():
            raise UsageError(f"{name} has the action space {space}; only bounded continuous (Box) ones are supported.")
        if limit is None:
            raise UsageError(f"{name} has no time limit: give max_episode_steps when you register it.")
        return Task(name, name, int(np.prod(space.shape)), int(limit), 1, "return")
    finally:
        environment.close()


def split(local_name: str) -> tuple[str, tuple[str, ...]]:
    """ "Pendulum-v1@pixels+state" as environment id and names of observations, none of which means its own."""
    env_id, _, names = local_name.partition("@")
    return env_id, tuple(names.split("+")) if names else ()


@functools.lru_cache(maxsize=64)
def choose(env_id: str, names: tuple[str, ...]) -> Mapping[str, Sensor]:
    """The observations `names` of an environment, or all that its space has. UsageError for those that cannot be."""
    environment = create(env_id, rendered=False)
    found = dict(_sensors(environment.observation_space))
    environment.close()
    if not names:
        unusable = [name for name, sensor in found.items() if not _is_usable(sensor)]
        if unusable:
            rest = "+".join(name for name in found if name not in unusable) or "pixels"
            raise UsageError(
                f"gym/{env_id} observes {', '.join(unusable)}, which is neither image nor vector; "
                f"leave it out: gym/{env_id}@{rest}."
            )
        return found
    found.setdefault("pixels", RENDERING)
    for name in names:
        if name not in found:
            raise unknown(f"observation of gym/{env_id}", name, found)
        if not _is_usable(found[name]):
            raise UsageError(f"gym/{env_id}: {name} is {found[name].space}, which is neither image nor vector.")
    return {name: found[name] for name in names}


def create(env_id: str, rendered: bool) -> Any:
    """A Gymnasium environment with its time limit; `rendered`: one that shows images. UsageError if there is none."""
    try:
        # Its own checker would warn at every step of what gsa check-env says once.
        options: dict[str, Any] = {"render_mode": "rgb_array"} if rendered else {}
        return gymnasium.make(env_id, disable_env_checker=True, **options)
    except DependencyNotInstalled as error:
        raise UsageError(f"gym/{env_id} needs a package that is not installed: {error}") from error
    except gymnasium.error.Error as error:
        remedy = "Register it in a module and name that with --import."
        raise UsageError(f"Gymnasium does not make '{env_id}' ({error}) {remedy}") from error
    except TypeError as error:
        if not rendered:
            raise
        raise UsageError(
            f"gym/{env_id} does not take render_mode='rgb_array', so it has no images: {error}."
        ) from error


def import_module(name: str) -> None:
    """Imports a module that registers environments, from the working directory too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ImportError as error:
        remedy = "put it in the working directory or install it"
        raise UsageError(f"Cannot import '{name}' ({error}): {remedy}.") from error


def to_image(image: np.ndarray) -> np.ndarray:
    """An image of bytes as [64, 64, 3], each pixel the mean of the area it covers, in a buffer of its own.

    [h, w, 3], [3, h, w], and [h, w], [h, w, 1], [1, h, w] in grey.
    """
    if image.shape == IMAGE_SHAPE:
        return np.array(image, order="C")
    from PIL import Image

    if image.ndim == 3 and image.shape[-1] not in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim == 2 or image.shape[-1] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, 2)
    if image.shape[:2] == (HEIGHT, WIDTH):
        return np.array(image, order="C")
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def _sensors(space: Any) -> Iterator[tuple[str, Sensor]]:
    """Every leaf of an observation space by its name. UsageError where two would have one name."""
    if not isinstance(space, spaces.Dict):
        yield (("pixels" if _is_image(space) else "state"), Sensor((), space))
        return
    seen: dict[str, tuple[str, ...]] = {}
    for where, leaf in _leaves(space, ()):
        name = re.sub(r"\W", "_", "_".join(where))
        if seen.setdefault(name, where) != where:
            raise UsageError(f"Two observations, {seen[name]} and {where}, would both be called {name}; rename one.")
        yield name, Sensor(where, leaf)


def _leaves(space: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in space.spaces.items():
        if isinstance(inner, spaces.Dict):
            yield from _leaves(inner, (*path, str(key)))
        else:
            yield (*path, str(key)), inner


def _is_image(space: Any) -> bool:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3):
        return False
    grey = len(space.shape) == 2
    has_channels = grey or bool({space.shape[0], space.shape[-1]} & {1, 3})
    return has_channels and sorted(space.shape)[-2] >= MIN_IMAGE_SIDE


def _is_usable(sensor: Sensor) -> bool:
    return sensor.is_image or (sensor.space.is_np_flattenable and spaces.flatdim(sensor.space) > 0)
