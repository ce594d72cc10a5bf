"""Gymnasium environments that fail in one way each, in their n-th reset or in a step of an episode."""

from __future__ import annotations

import ctypes
import os
import time

import gymnasium as gym
import numpy as np

from tests.gym_counting import STEPS, Counting


def hang() -> None:
    while True:
        time.sleep(60)


def hang_without_a_turn_for_python() -> None:
    """A sleep in C that keeps the interpreter's lock."""
    ctypes.PyDLL(None).sleep(3600)


def crash() -> None:
    os.kill(os.getpid(), 11)


def fail() -> None:
    raise RuntimeError("the simulator broke")


WAYS = {"Hangs": hang, "HangsInC": hang_without_a_turn_for_python, "Crashes": crash, "Raises": fail}


class Faulty(Counting):
    """Fails by `way` in step `at`, with `at` 0 in reset: in one of `of` episodes, as the seed says."""

    def __init__(self, way: str, at: int = 7, of: int = 1, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.way, self.at, self.of, self.bad = way, at, of, False

    def reset(self, *, seed=None, options=None):
        self.bad = seed % self.of == 0
        observation, info = super().reset(seed=seed)
        return self._spoiled(observation, 0.0)[0], info

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return *self._spoiled(observation, reward), *rest

    def _spoiled(self, image, reward):
        if not self.bad or self.steps != self.at:
            return image, reward
        if self.way in WAYS:
            WAYS[self.way]()
        if self.way == "Shape":
            return np.zeros((64, 63, 4), np.uint8), reward
        return image, float("nan")


for _way in (*WAYS, "Shape", "NaN"):
    gym.register(f"{_way}-v0", Faulty, max_episode_steps=STEPS, kwargs={"way": _way})
    gym.register(f"{_way}InReset-v0", Faulty, max_episode_steps=STEPS, kwargs={"way": _way, "at": 0})
    gym.register(f"{_way}Sometimes-v0", Faulty, max_episode_steps=STEPS, kwargs={"way": _way, "of": 4})
