"""Rewards of DMControl tasks as functions of a few named features, for one state or for arrays of states.

The tasks in CUSTOM are those the stock suite lacks; environments and the planner read the same functions. The others
restate the stock rewards for the planner, which sees states only through sensors; a test holds them to the suite's.
Heights and distances in metres, speeds in metres a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from dm_control.utils.rewards import tolerance

Features = Mapping[str, np.ndarray]  # name → [...]; of one state a scalar
Reward = Callable[[Features], np.ndarray]

INFINITY = float("inf")

CHEETAH_HEIGHT = 1.2
CHEETAH_RUN, CHEETAH_BACKWARDS, CHEETAH_ONE_FOOT, CHEETAH_STILL = 10.0, 8.0, 6.0, 0.5

WALKER_STAND_HEIGHT = 1.2
WALKER_WALK, WALKER_RUN = 1.0, 8.0
WALKER_FEET_HEIGHT, WALKER_THIGH_HEIGHT, WALKER_FLIP = 1.1, 1.0, 6.0

QUADRUPED_WALK, QUADRUPED_RUN, QUADRUPED_JUMP_HEIGHT = 0.5, 5.0, 1.0


def at_least(x: np.ndarray, bound: float, margin: float) -> np.ndarray:
    """1 from `bound` up, falling as a Gaussian to 0.1 at `margin` below."""
    return tolerance(x, (bound, INFINITY), margin)


def at_speed(x: np.ndarray, speed: float, margin: float, value_at_margin: float) -> np.ndarray:
    """1 from `speed` on, in its direction, falling linearly to `value_at_margin` at `margin` short of it."""
    bounds = (speed, INFINITY) if speed > 0 else (-INFINITY, speed)
    return tolerance(x, bounds, margin, "linear", value_at_margin)


def _cheetah_stand_on_one_foot(f: Features, raised: str) -> np.ndarray:
    height = at_least((f["torso_height"] + f[raised]) / 2, CHEETAH_HEIGHT, CHEETAH_HEIGHT / 2)
    still = tolerance(f["speed"], (-CHEETAH_STILL, CHEETAH_STILL), CHEETAH_STILL, "linear", 0)
    return (5 * height + still) / 6


def _cheetah_jump(f: Features) -> np.ndarray:
    return (_cheetah_stand_on_one_foot(f, "back_foot") + _cheetah_stand_on_one_foot(f, "front_foot")) / 2


def _cheetah_run_on_one_foot(f: Features, raised: str) -> np.ndarray:
    foot = at_least(f[raised], CHEETAH_HEIGHT, CHEETAH_HEIGHT / 2)
    torso = at_least(f["torso_height"], CHEETAH_HEIGHT, CHEETAH_HEIGHT / 2)
    up = (3 * foot + 2 * torso) / 5
    return up * (5 * at_speed(f["speed"], CHEETAH_ONE_FOOT, CHEETAH_ONE_FOOT, 0) + 1) / 6


def _walker_stand(f: Features) -> np.ndarray:
    standing = at_least(f["torso_height"], WALKER_STAND_HEIGHT, WALKER_STAND_HEIGHT / 2)
    return (3 * standing + (1 + f["upright"]) / 2) / 4


def _walker_move(f: Features, speed: float) -> np.ndarray:
    return _walker_stand(f) * (5 * at_speed(f["speed"], speed, abs(speed) / 2, 0.5) + 1) / 6


def _walker_backflip(f: Features) -> np.ndarray:
    feet = at_least((f["left_foot"] + f["right_foot"]) / 2, WALKER_FEET_HEIGHT, WALKER_FEET_HEIGHT / 2)
    thighs = at_least((f["left_thigh"] + f["right_thigh"]) / 2, WALKER_THIGH_HEIGHT, WALKER_THIGH_HEIGHT / 2)
    return (3 * feet + 2 * thighs) / 5 * (5 * at_speed(f["speed"], -WALKER_FLIP, WALKER_FLIP / 2, 0.5) + 1) / 6


def _quadruped_upright(f: Features) -> np.ndarray:
    return tolerance(f["upright"], (1.0, INFINITY), 2.0, "linear", 0)


def _quadruped_move(f: Features, speed: float) -> np.ndarray:
    return _quadruped_upright(f) * at_speed(f["forward_speed"], speed, speed, 0.5)


def _quadruped_jump(f: Features) -> np.ndarray:
    height = tolerance(f["mass_height"], (QUADRUPED_JUMP_HEIGHT, INFINITY), QUADRUPED_JUMP_HEIGHT, "linear", 0.5)
    return _quadruped_upright(f) * height


def _quadruped_roll(f: Features, speed: float) -> np.ndarray:
    return _quadruped_upright(f) * at_speed(f["torso_speed"], speed, speed, 0.5)


def _cartpole_balance(f: Features) -> np.ndarray:
    centred = (1 + tolerance(f["cart_position"], margin=2)) / 2
    gentle = (4 + tolerance(f["control"], margin=1, value_at_margin=0, sigmoid="quadratic")) / 5
    slow = (1 + tolerance(f["pole_speed"], margin=5)) / 2
    return (f["upright"] + 1) / 2 * gentle * slow * centred


def _acrobot_swingup(f: Features, margin: float) -> np.ndarray:
    return tolerance(f["tip_to_target"], (0, 0.2), margin)


CUSTOM: dict[str, Reward] = {
    "cheetah-run-backwards": lambda f: at_speed(f["speed"], -CHEETAH_BACKWARDS, CHEETAH_BACKWARDS, 0),
    "cheetah-jump": _cheetah_jump,
    "cheetah-run-front": lambda f: _cheetah_run_on_one_foot(f, "back_foot"),
    "cheetah-run-back": lambda f: _cheetah_run_on_one_foot(f, "front_foot"),
    "walker-walk-backwards": lambda f: _walker_move(f, -WALKER_WALK),
    "walker-run-backwards": lambda f: _walker_move(f, -WALKER_RUN),
    "walker-backflip": _walker_backflip,
    "quadruped-stand": _quadruped_upright,
    "quadruped-jump": _quadruped_jump,
    "quadruped-roll": lambda f: _quadruped_roll(f, QUADRUPED_WALK),
    "quadruped-roll-fast": lambda f: _quadruped_roll(f, QUADRUPED_RUN),
}
STOCK: dict[str, Reward] = {
    "cartpole-balance": _cartpole_balance,
    "acrobot-swingup": lambda f: _acrobot_swingup(f, 1.0),
    "acrobot-swingup-sparse": lambda f: _acrobot_swingup(f, 0.0),
    "cheetah-run": lambda f: at_speed(f["speed"], CHEETAH_RUN, CHEETAH_RUN, 0),
    "walker-stand": _walker_stand,
    "walker-walk": lambda f: _walker_move(f, WALKER_WALK),
    "walker-run": lambda f: _walker_move(f, WALKER_RUN),
    "quadruped-walk": lambda f: _quadruped_move(f, QUADRUPED_WALK),
    "quadruped-run": lambda f: _quadruped_move(f, QUADRUPED_RUN),
}
MODEL_OF = {"cheetah": "run", "walker": "walk", "quadruped": "walk"}  # the stock task whose model a custom one takes


def cheetah_features(physics: Any) -> Features:
    height = physics.named.data.xpos[["torso", "ffoot", "bfoot"], "z"]
    return {"speed": physics.speed(), "torso_height": height[0], "front_foot": height[1], "back_foot": height[2]}


def walker_features(physics: Any) -> Features:
    names = ("left_foot", "right_foot", "left_thigh", "right_thigh")
    height = physics.named.data.xpos[list(names), "z"]
    return {
        "speed": physics.horizontal_velocity(), "torso_height": physics.torso_height(),
        "upright": physics.torso_upright(), **dict(zip(names, height, strict=True)),
    }  # fmt: skip


def quadruped_features(physics: Any) -> Features:
    velocity = physics.torso_velocity()
    return {
        "upright": physics.torso_upright(), "forward_speed": velocity[0],
        "torso_speed": np.linalg.norm(velocity), "mass_height": physics.named.data.sensordata["center_of_mass"][2],
    }  # fmt: skip


_FEATURES = {"cheetah": cheetah_features, "walker": walker_features, "quadruped": quadruped_features}


def plan(domain: str, task: str) -> tuple[str, Callable[[Any], float] | None]:
    """The stock task to load for `task`, and the reward of its physics; None means the stock task's own."""
    reward = CUSTOM.get(f"{domain}-{task}")
    if reward is None:
        return task.replace("-", "_"), None
    features = _FEATURES[domain]
    return MODEL_OF[domain], lambda physics: float(reward(features(physics)))
