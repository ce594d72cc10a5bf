"""DMControl: the stock suite's tasks, the ones of `dmc_rewards`, and their `-hard` variants."""

from __future__ import annotations

import mujoco
import numpy as np
from dm_control import suite

from actors import dmc_rewards
from actors.environment import Frame, Profile
from actors.rendering import Renderer
from actors.tasks import Task

CAMERA = {"quadruped": 2}  # of others 0
HARD_SUFFIX = "-hard"
HARD_THRESHOLD = {"cheetah": 0.2}  # reward below it counts as none; of others 0.6
HARD_ACTION_COST = 0.1


class DMControl:
    """One dm_control task. `environment` is the library's own; only its frames are counted here, not its time."""

    def __init__(self, task: Task, profile: Profile) -> None:
        self.domain, name = task.local_name.split("-", 1)
        self.action_repeat = task.action_repeat
        self._hard = name.endswith(HARD_SUFFIX)
        self._threshold = HARD_THRESHOLD.get(self.domain, 0.6)
        stock, reward = dmc_rewards.plan(self.domain, name.removesuffix(HARD_SUFFIX))
        self.environment = suite.load(self.domain, stock, task_kwargs={"random": 0})
        self._reward = reward or self.environment.task.get_reward
        self.physics = self.environment.physics
        self._substeps = round(self.environment.control_timestep() / self.physics.timestep())
        self.data = self.physics.data.ptr
        self.camera = CAMERA.get(self.domain, 0)
        self.field_of_view = float(self.physics.model.cam_fovy[self.camera])  # degrees, vertical
        self._renderer = Renderer(self.physics.model.ptr, self.camera, profile)
        self.renderer = self._renderer.name
        self.control_hz = 1 / self.environment.control_timestep()

    def reset(self, seed: int) -> None:
        self.environment.task.random.seed(seed % 2**32)
        self.environment.reset()

    def frame(self, action: np.ndarray) -> Frame:
        # What environment.step does, without the state observation that nobody reads.
        task = self.environment.task
        task.before_step(action, self.physics)
        self.physics.step(self._substeps)
        task.after_step(self.physics)
        reward = float(self._reward(self.physics))
        if self._hard:
            reward = (reward if reward >= self._threshold else 0.0) - HARD_ACTION_COST * float(np.linalg.norm(action))
        return Frame(reward, terminated=task.get_termination(self.physics) == 0.0)

    def full_state(self) -> np.ndarray:
        """Time, positions, velocities and activations, in MuJoCo's order."""
        return self.physics.get_state(mujoco.mjtState.mjSTATE_FULLPHYSICS)

    def render(self) -> np.ndarray:
        return self._renderer.render(self.data)

    def close(self) -> None:
        self._renderer.close()
        self.physics.free()
