"""Trajectories that count: every number says which trajectory and which step it is from, so no mix-up goes unseen."""

from __future__ import annotations

import numpy as np

from gsa.schema import ArraySpec, Spec, Trajectory

IMAGE = (4, 5, 3)


def counting_spec(embodiment: str = "toy/a", action_dim: int = 2, action_repeat: int = 2) -> Spec:
    return Spec(embodiment, {"pixels": ArraySpec(IMAGE, "uint8")}, action_dim, action_repeat)


def counting(index: int, steps: int, spec: Spec, with_reward: bool = True, ends: bool = False) -> Trajectory:
    """Trajectory number `index`: observation t is filled with t, but for its first two values, which are the index;
    action t is about (100·index + t) / 1e4, reward t is 1000·index + t + 1."""
    pixels = np.empty((steps + 1, *IMAGE), np.uint8)
    pixels[:] = (np.arange(steps + 1) % 256)[:, None, None, None]
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = divmod(index, 256)
    t = np.arange(steps)
    action = (((100 * index + t) % 10_000) / 1e4)[:, None] + np.arange(spec.action_dim) / 1e6
    discount = np.ones(steps, np.float32)
    discount[-1] = 0 if ends else 1
    reward = (1000 * index + t + 1).astype(np.float32) if with_reward else None
    return Trajectory(spec.embodiment, {"pixels": pixels}, action.astype(np.float32), discount, reward)
