"""Gymnasium environments that fail, each in its way: in a step, in a reset, in some episodes or in all of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

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
MOST_MB = 4_000
ALL = (*WAYS, "Shape", "NaN")
MIXTURES = {"Any": ALL, "Mild": ("Raises", "Shape", "NaN", "Hangs")}  # of half of all episodes


class Faulty(Counting):
    """Fails by `way` in step `at` (0: in reset); of a mixture the seed draws one."""

    def __init__(self, way: str, at: int = 7, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.way, self.at, self.now = way, at, way

    def reset(self, *, seed=None, options=None):
        if self.way in MIXTURES:
            ways = MIXTURES[self.way]
            self.now = "" if seed % 2 else ways[seed // 2 % len(ways)]
        observation, info = super().reset(seed=seed)
        return self._spoiled(observation, 0.0)[0], info

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return *self._spoiled(observation, reward), *rest

    def _spoiled(self, image, reward):
        if self.steps != self.at:
            return image, reward
        if self.now in WAYS:
            WAYS[self.now]()
        if self.now == "Shape":
            return np.zeros((63, 64, 3), np.uint8), reward
        return image, float("nan") if self.now == "NaN" else reward


class Unborn(Counting):
    """Cannot be made."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        raise RuntimeError("no licence for the simulator")


class Together(Counting):
    """A step returns once another environment is in its step, too; it fails if none comes."""

    def step(self, action):
        folder = Path(os.environ["GSA_TEST_MEETING"])
        (folder / f"{self.steps}-{os.getpid()}").touch()
        end = time.monotonic() + 30
        while len(list(folder.glob(f"{self.steps}-*"))) < 2:
            if time.monotonic() > end:
                raise RuntimeError("alone")
            time.sleep(0.002)
        return super().step(action)


class Hungry(Counting):
    """The first that comes to its seventh step takes memory until it is killed, 64 MB every 20 ms, up to MOST_MB."""

    def step(self, action):
        answer = super().step(action)
        if self.steps == 7:
            with contextlib.suppress(FileExistsError), open(os.environ["GSA_TEST_EATEN"], "x"):
                self.taken = []
                while len(self.taken) < MOST_MB // 64:
                    self.taken.append(np.ones(64 << 20, np.uint8))
                    time.sleep(0.02)
        return answer


class Large(gym.Env):
    """Observes more than a socket takes at once."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (500_000,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(500_000, np.float32), {}

    def step(self, action):
        return self.np_random.random(500_000, np.float32), float(action[0]), False, False, {}


class Babbles(Counting):
    """Writes where only answers belong: what begins like one, before it stops for good, or what is none."""

    def __init__(self, said: str = "", stops: bool = False, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.said, self.stops = said.encode(), stops

    def step(self, action):
        os.write(int(sys.argv[1]), self.said)
        if self.stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().step(action)


for _way in (*ALL, *MIXTURES):
    gym.register(f"{_way}-v0", Faulty, max_episode_steps=STEPS, kwargs={"way": _way})
    gym.register(f"{_way}InReset-v0", Faulty, max_episode_steps=STEPS, kwargs={"way": _way, "at": 0})
gym.register("Hungry-v0", Hungry, max_episode_steps=STEPS, kwargs={"pause_s": 0.05})
gym.register("Large-v0", Large, max_episode_steps=STEPS)
gym.register("BabblesAndStops-v0", Babbles, max_episode_steps=STEPS, kwargs={"said": "T\0\0", "stops": True})
gym.register("Babbles-v0", Babbles, max_episode_steps=STEPS, kwargs={"said": "no answer at all"})
gym.register("BabblesAnswers-v0", Babbles, max_episode_steps=STEPS, kwargs={"said": "T\0\0\0\4\0\0\0four"})
gym.register("BabblesErrors-v0", Babbles, max_episode_steps=STEPS, kwargs={"said": "E\0\0\0\4\0\0\0four"})
gym.register("Unborn-v0", Unborn, max_episode_steps=STEPS)
gym.register("Together-v0", Together, max_episode_steps=STEPS)
