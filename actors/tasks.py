"""The tasks: their names, embodiments, time limits and score rules. Plain data, no simulator is imported.

`dmc/<domain>-<task>`, `metaworld/<task>-v3` and `gym/<EnvId>`. A frame is a simulator step, an agent step is a
decision, which lasts `action_repeat` frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gsa.errors import unknown

IMAGE_SHAPE = (64, 64, 3)

DMC_EPISODE_FRAMES = 1000
METAWORLD_EPISODE_FRAMES = 200
ACTION_REPEAT = 2

ScoreRule = Literal["return/10", "100*success", "return"]


@dataclass(frozen=True)
class Task:
    """What is to be done, by which body, for how long, and how it is scored."""

    name: str  # "dmc/walker-walk"
    embodiment: str  # robot with its action space: "dmc/walker"; tasks of one embodiment share trajectories
    action_dim: int
    episode_frames: int  # at most; only gym tasks may end earlier
    action_repeat: int  # frames an agent step
    score_rule: ScoreRule

    @property
    def suite(self) -> str:
        return self.name.split("/", 1)[0]

    @property
    def local_name(self) -> str:
        """The name within its suite: "walker-walk"."""
        return self.name.split("/", 1)[1]

    @property
    def episode_steps(self) -> int:
        """Agent steps of a full episode; the last one has fewer frames where the repeat does not divide them."""
        return math.ceil(self.episode_frames / self.action_repeat)

    def score(self, episode_return: float, success: float | None = None) -> float:
        """The benchmark's score, 0…100 but for gym, of one episode; `success` is that of its last step."""
        if self.score_rule == "100*success":
            return 100.0 * float(success or 0.0)
        return float(episode_return) / 10 if self.score_rule == "return/10" else float(episode_return)


# domain → (action dimension, tasks), in the order of the paper. cheetah-run-hard is only in its figures.
DMC_DOMAINS: dict[str, tuple[int, tuple[str, ...]]] = {
    "cartpole": (1, ("balance",)),
    "acrobot": (1, ("swingup", "swingup-sparse", "swingup-hard")),
    "cheetah": (6, ("run", "run-backwards", "jump", "run-back", "run-front", "run-hard")),
    "walker": (6, ("stand", "walk", "walk-hard", "run", "walk-backwards", "run-backwards", "backflip")),
    "quadruped": (12, ("stand", "walk", "run", "jump", "roll", "roll-fast")),
}  # fmt: skip

METAWORLD_NAMES = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown",
    "button-press-topdown-wall", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn",
    "disassemble", "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open",
    "faucet-close", "faucet-open", "hammer", "hand-insert", "handle-press", "handle-press-side", "handle-pull",
    "handle-pull-side", "lever-pull", "peg-insert-side", "peg-unplug-side", "pick-out-of-hole", "pick-place",
    "pick-place-wall", "plate-slide", "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push",
    "push-back", "push-wall", "reach", "reach-wall", "shelf-place", "soccer", "stick-pull", "stick-push", "sweep",
    "sweep-into", "window-close", "window-open",
)  # fmt: skip


def _dmc_task(domain: str, task: str, action_dim: int) -> Task:
    return Task(f"dmc/{domain}-{task}", f"dmc/{domain}", action_dim, DMC_EPISODE_FRAMES, ACTION_REPEAT, "return/10")


def _metaworld_task(name: str) -> Task:
    return Task(f"metaworld/{name}-v3", "metaworld/sawyer", 4, METAWORLD_EPISODE_FRAMES, ACTION_REPEAT, "100*success")


DMC = tuple(_dmc_task(d, t, dim) for d, (dim, tasks) in DMC_DOMAINS.items() for t in tasks)
METAWORLD = tuple(_metaworld_task(name) for name in METAWORLD_NAMES)
ALL = (*DMC, *METAWORLD)
_BY_NAME = {task.name: task for task in ALL}


def find(name: str, imports: Iterable[str] = ()) -> Task:
    """The task of that name. UsageError for an unknown one lists the known.

    `imports` are modules that register Gymnasium environments; a gym task is made once to learn its action space.
    """
    if name.startswith("gym/"):
        from actors.gymnasium_env import describe

        return describe(name, tuple(imports))
    if name not in _BY_NAME:
        raise unknown("task", name, [*_BY_NAME, "gym/<EnvId>"])
    return _BY_NAME[name]
