"""An environment whose every image tells its episode's seed and step: any reordering on the way shows."""

from __future__ import annotations

import numpy as np

from actors.environment import Environment, Frame
from actors.tasks import IMAGE_SHAPE, Task

STEPS = 12


def task(steps: int = STEPS, name: str = "gym/Counting", action_dim: int = 2) -> Task:
    return Task(name, "test/counter", action_dim, steps * 2, 2, "return")


class Counting:
    """Pixel [0, 0, 0] is the agent step, [0, 0, 1] the seed's low byte, [0, 0, 2] the last action × 100 + 128."""

    control_hz = 20.0
    renderer = "counting"

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.frames, self.seed, self.action = fail_at, 0, 0, np.zeros(1)

    def reset(self, seed: int) -> None:
        self.frames, self.seed, self.action = 0, seed, np.zeros(1)

    def frame(self, action: np.ndarray) -> Frame:
        self.frames += 1
        self.action = action
        if self.fail_at is not None and self.frames == self.fail_at:
            raise RuntimeError("the simulator broke")
        return Frame(reward=0.5)

    def render(self) -> np.ndarray:
        image = np.zeros(IMAGE_SHAPE, np.uint8)
        image[0, 0] = self.frames // 2, self.seed % 256, round(float(self.action[0]) * 100) + 128
        return image

    def close(self) -> None:
        pass


def counting(steps: int = STEPS, fail_at: int | None = None) -> Environment:
    return Environment(task(steps), Counting(fail_at))
