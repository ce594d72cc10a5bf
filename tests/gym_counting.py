"""Gymnasium environments whose images tell their step or place: for whole runs that need no simulator."""

from __future__ import annotations

import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

from tests.dots import image

STEPS = 20


class Counting(gym.Env):
    """Rewards a first action near 0.5; the image brightens with every step, its corner tells the step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None, pause_s: float = 0.0) -> None:
        self.render_mode, self.pause_s, self.steps = render_mode, pause_s, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._image(), {}

    def step(self, action):
        self.steps += 1
        time.sleep(self.pause_s)
        return self._image(), 1.0 - abs(float(action[0]) - 0.5), False, False, {}

    def render(self):
        return self._image()

    def _image(self):
        image = np.full((64, 64, 3), 10 * self.steps, np.uint8)
        image[0, 0] = self.steps
        return image


class Place(Counting):
    """A white square at a place that the seed draws; it stays there."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(8, 56))
        return self._image(), {}

    def _image(self):
        return image(getattr(self, "place", 32))


class Sensed(Counting):
    """Seen by a camera, and by joints that stand where the actions moved them."""

    observation_space = gym.spaces.Dict({
        "camera": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), "joints": gym.spaces.Box(-99, 99, (2,), np.float32),
    })  # fmt: skip

    def reset(self, *, seed=None, options=None):
        self.joints = np.zeros(2, np.float32)
        camera, info = super().reset(seed=seed)
        return {"camera": camera, "joints": self.joints.copy()}, info

    def step(self, action):
        self.joints += action
        camera, *rest = super().step(action)
        return ({"camera": camera, "joints": self.joints.copy()}, *rest)


class Stamped(Counting):
    """Leaves the time of every step in a file of its process, in the folder that GSA_TEST_STAMPS names."""

    def step(self, action):
        with (Path(os.environ["GSA_TEST_STAMPS"]) / str(os.getpid())).open("ab", buffering=0) as file:
            file.write(np.float64(time.monotonic()).tobytes())
        return super().step(action)


gym.register("Stamped-v0", Stamped, max_episode_steps=STEPS, kwargs={"pause_s": 0.1})
gym.register("Sensed-v0", Sensed, max_episode_steps=STEPS)
gym.register("Place-v0", Place, max_episode_steps=STEPS)
gym.register("Counting-v0", Counting, max_episode_steps=STEPS)
gym.register("SlowCounting-v0", Counting, max_episode_steps=STEPS, kwargs={"pause_s": 0.05})
gym.register("LazyCounting-v0", Counting, max_episode_steps=STEPS, kwargs={"pause_s": 0.2})
