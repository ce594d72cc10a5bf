"""Meta-World v3: random goals, the nearer corner camera, success of the last frame."""

from __future__ import annotations

import warnings
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from actors.environment import Frame, Observation, Profile
from actors.rendering import Renderer
from actors.tasks import Task

CAMERA = "corner2"
CAMERA_POSITION_M = (0.75, 0.075, 0.7)
# What Meta-World's resets write into the model. A reset restores them, or an episode would depend on the last one.
MODEL_FIELDS = ("body_pos", "body_quat", "site_pos", "geom_pos")


class MetaWorld:
    """One Meta-World task. `state` is its 39-number observation, which only the scripted policies read."""

    def __init__(self, task: Task, profile: Profile) -> None:
        environment: Any = ALL_V3_ENVIRONMENTS[task.local_name]()
        # The library's goal-observable twin freezes one goal; these switches are what it sets, with goals left random.
        environment._set_task_called = True
        environment._freeze_rand_vec = False
        environment._partially_observable = False
        environment.seeded_rand_vec = True
        del environment.sawyer_observation_space  # cached for the hidden goal
        self.environment, self.model, self.data = environment, environment.model, environment.data
        self.camera = self.model.camera(CAMERA).id
        self.field_of_view = float(self.model.cam_fovy[self.camera])  # degrees, vertical
        self.model.cam_pos[self.camera] = CAMERA_POSITION_M  # takes effect at the next mj_forward
        self._pristine = {name: getattr(self.model, name).copy() for name in MODEL_FIELDS}
        self._renderer = Renderer(self.model, self.camera, profile, upside_down=True)
        self.renderer = self._renderer.name
        self.control_hz = 1 / float(environment.dt)
        self.state = np.zeros(0)

    def reset(self, seed: int) -> None:
        for name, value in self._pristine.items():
            getattr(self.model, name)[:] = value
        self.environment.seed(seed)
        self.environment.reset()
        # The library moves bodies and goals after its own mj_forward; without one more, the first image and the first
        # state would show the goal and the object where they were before.
        mujoco.mj_forward(self.model, self.data)
        self.state = self.environment._get_obs()

    def frame(self, action: np.ndarray) -> Frame:
        self.state, reward, _, truncated, info = self.environment.step(action)
        return Frame(float(reward), success=float(info["success"]), truncated=truncated)

    def render(self) -> np.ndarray:
        return self._renderer.render(self.data)

    def close(self) -> None:
        self._renderer.close()


class Scripted:
    """Meta-World's own scripted policy for a task, with Gaussian noise on its actions."""

    def __init__(self, simulation: MetaWorld, task: Task, sigma: float) -> None:
        self._simulation, self._sigma = simulation, sigma
        self._policy_class: Any = ENV_POLICY_MAP[task.local_name]

    def begin(self, rng: np.random.Generator) -> None:
        self._rng, self._policy = rng, self._policy_class()  # some policies remember

    def act(self, observation: Observation) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its gains exceed the action space, which clips them
            action = np.clip(self._policy.get_action(self._simulation.state), -1, 1)
        return action + self._sigma * self._rng.standard_normal(len(action))
