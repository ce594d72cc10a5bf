"""Any Gymnasium environment with continuous actions, seen through its images."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled

from actors.environment import Frame
from actors.rendering import HEIGHT, WIDTH
from actors.tasks import Task
from gsa.errors import UsageError


class Gymnasium:
    """One registered environment. The image is the observation if that is one, else what `render` shows."""

    def __init__(self, task: Task) -> None:
        self.environment = create(task.local_name)
        space = self.environment.action_space
        self._shape, self._dtype = space.shape, space.dtype
        self._low, self._high = np.float64(space.low).ravel(), np.float64(space.high).ravel()
        observed = self.environment.observation_space
        self._sees = len(observed.shape or ()) == 3 and observed.shape[-1] == 3 and observed.dtype == np.uint8
        self._image = np.zeros(0)
        self.control_hz = float(self.environment.metadata.get("render_fps") or 0)
        self.renderer = f"gymnasium {task.local_name}"

    def reset(self, seed: int) -> None:
        self._image, _ = self.environment.reset(seed=seed)

    def frame(self, action: np.ndarray) -> Frame:
        scaled = self._low + (action + 1.0) / 2 * (self._high - self._low)
        self._image, reward, terminated, truncated, info = self.environment.step(
            scaled.reshape(self._shape).astype(self._dtype)
        )
        success = info.get("is_success", info.get("success"))
        return Frame(float(reward), None if success is None else float(success), bool(terminated), bool(truncated))

    def render(self) -> np.ndarray:
        image = self._image if self._sees else self._draw()
        if getattr(image, "ndim", 0) != 3 or image.shape[-1] != 3:
            raise UsageError(f"{self.renderer}: render() must give [height, width, 3] images, not {type(image)}.")
        return resize(np.asarray(image, np.uint8))

    def _draw(self) -> np.ndarray:
        try:
            return self.environment.render()
        except DependencyNotInstalled as error:
            raise UsageError(f"{self.renderer}: {str(error).rstrip('.')}.") from error

    def close(self) -> None:
        self.environment.close()


@functools.lru_cache(maxsize=64)
def describe(name: str, imports: tuple[str, ...] = ()) -> Task:
    """The task "gym/<EnvId>" after importing `imports`. UsageError if it is not one that can be learned from images."""
    for module in imports:
        import_module(module)
    environment = create(name.removeprefix("gym/"))
    try:
        space, limit = environment.action_space, environment.spec.max_episode_steps
        if not isinstance(space, gymnasium.spaces.Box) or not space.is_bounded():
            raise UsageError(f"{name} has the action space {space}; only bounded continuous (Box) ones are supported.")
        if limit is None:
            raise UsageError(f"{name} has no time limit: give max_episode_steps when you register it.")
        return Task(name, name, int(np.prod(space.shape)), int(limit), 1, "return")
    finally:
        environment.close()


def create(env_id: str) -> Any:
    """A Gymnasium environment that can show images, with its time limit. UsageError if there is no such one."""
    try:
        return gymnasium.make(env_id, render_mode="rgb_array")
    except DependencyNotInstalled as error:
        raise UsageError(f"gym/{env_id} needs a package that is not installed: {error}") from error
    except gymnasium.error.Error as error:
        remedy = "Register it in a module and name that with --import."
        raise UsageError(f"Gymnasium does not make '{env_id}' ({error}) {remedy}") from error
    except TypeError as error:
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


def resize(image: np.ndarray) -> np.ndarray:
    """An image [h, w, 3] uint8 as [64, 64, 3], each pixel the mean of the area it covers, in a buffer of its own."""
    from PIL import Image

    if image.shape[:2] == (HEIGHT, WIDTH):
        return image.copy()
    return np.array(Image.fromarray(image).resize((WIDTH, HEIGHT), Image.Resampling.BOX))
