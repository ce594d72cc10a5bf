"""Environments that take their time: one sleeps, one computes. benchmarks.workers collects in them."""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium as gym
import numpy as np

LATENCY_S, COMPUTE_S, EPISODE = 0.02, 0.005, 500
TASKS = {"latency": "gym/BenchLatency-v0", "compute": "gym/BenchCompute-v0"}


class Slow(gym.Env):
    """An image of noise after a step that sleeps or computes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, sleep_s: float = 0.0, rounds: int = 0, render_mode: str | None = None) -> None:
        self.render_mode, self._sleep_s, self._rounds = render_mode, sleep_s, rounds
        self._image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self._image, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._rounds:
            compute(self._rounds)
        else:
            time.sleep(self._sleep_s)
        return self._image, 0.0, False, False, {}

    def render(self) -> np.ndarray:
        return self._image


def compute(rounds: int) -> None:
    """Work that stays in the core's own cache."""
    values = np.arange(2000.0)
    for _ in range(rounds):
        values = np.sqrt(values + 1.0)


def calibrated() -> int:
    """Rounds of `compute` that take COMPUTE_S on this machine."""
    rounds, spent = 100, []
    for _ in range(30):
        started = time.perf_counter()
        compute(rounds)
        spent.append(time.perf_counter() - started)
    return max(1, round(rounds * COMPUTE_S / float(np.median(spent))))


ROUNDS = int(os.environ.get("GSA_BENCH_ROUNDS", "1000"))  # of `compute` in a step, as the benchmark measured them
gym.register("BenchLatency-v0", Slow, max_episode_steps=EPISODE, kwargs={"sleep_s": LATENCY_S})
gym.register("BenchCompute-v0", Slow, max_episode_steps=EPISODE, kwargs={"rounds": ROUNDS})
