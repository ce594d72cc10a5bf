"""A world small enough to learn in seconds: a white square that the first action moves left and right."""

import numpy as np

from gsa.schema import ArraySpec, Spec, Trajectory
from retrieval.store import TrajectoryStore

PIXELS = {"pixels": ArraySpec((64, 64, 3), "uint8")}


def image(place):
    """Of squares around columns `place` [...]: uint8 [..., 64, 64, 3]."""
    near = np.abs(np.arange(64) - np.asarray(place)[..., None]) <= 4
    pixels = np.zeros((*near.shape[:-1], 64, 64, 3), np.uint8)
    pixels[..., 24:40, :, :] = 255 * near[..., None, :, None]
    return pixels


def spec(action_dim):
    return Spec(f"dots/{action_dim}", PIXELS, action_dim)


def expert_action(place):
    """What the cloned actor is to find: towards the middle."""
    return np.clip((32 - place) / 16, -1, 1)


def trajectory(rng, steps, action_dim=2, expert=False, with_reward=False):
    """Places follow the actions; the reward is the place arrived at, of 64."""
    places = [int(rng.integers(8, 56))]
    action = rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32)
    for t in range(steps):
        if expert:
            action[t] = expert_action(places[-1])
        places.append(int(np.clip(places[-1] + round(8 * float(action[t, 0])), 4, 59)))
    reward = np.array(places[1:], np.float32) / 64
    return Trajectory(
        f"dots/{action_dim}", {"pixels": image(np.array(places))}, action, np.ones(steps, np.float32),
        reward=reward if with_reward else None, id=f"{rng.integers(1 << 62):016x}",
    )  # fmt: skip


def make_store(path, seed=0, count=6, steps=12, action_dims=(2,), **options):
    """A writable store of `count` trajectories of each embodiment."""
    rng, store = np.random.default_rng(seed), TrajectoryStore.create(path)
    for action_dim in action_dims:
        for _ in range(count):
            store.append(trajectory(rng, steps, action_dim, **options), spec(action_dim))
    return store
