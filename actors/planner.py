"""Sampling-based control of DMControl bodies: a quick source of trajectories of middling to good quality.

At each decision a few candidate plans are drawn around the last one, simulated from the present state on a copy of
the model, and averaged with weights that favour the higher returns (MPPI). A plan is a row of knots, interpolated.
It is made to collect pools, not to set records: it plans over half a second to a second with a few dozen candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mujoco
import numpy as np
from dm_control.suite import common
from dm_control.utils.rewards import tolerance
from mujoco.rollout import rollout

from actors.dmc import DMControl
from actors.dmc_rewards import CUSTOM, STOCK, Features, Reward
from actors.environment import Observation

MIN_SAMPLES = 2
TEMPERATURE = 0.1  # of the weights, in units of the spread of the candidates' returns
NOISE_AT_ZERO = 0.6  # standard deviation of the noise on executed actions at quality 0; none at 1
FULL_STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS


@dataclass(frozen=True)
class Horizon:
    """How far and how finely a domain is planned, so that an episode takes one to a few seconds on a core."""

    samples: int  # candidates a plan at quality 1
    steps: int  # agent steps looked ahead
    knots: int  # of a plan
    replan: int  # agent steps between plans
    substeps: int  # simulator steps a frame: fewer than the environment's own are coarser and quicker
    spread: float  # standard deviation of the candidates around the last plan


HORIZONS = {
    "cartpole": Horizon(16, 50, 8, 2, 1, 0.4),
    "acrobot": Horizon(16, 50, 8, 2, 1, 0.6),
    "cheetah": Horizon(32, 24, 8, 2, 1, 0.5),
    "walker": Horizon(24, 16, 6, 3, 4, 0.5),
    "quadruped": Horizon(16, 12, 4, 4, 4, 0.5),
}

# feature → what a sensor of the planning model reads: (sensor, object, name, component)
Sensor = tuple[str, str, str, int | None]
SENSORS: dict[str, dict[str, Sensor]] = {
    "cartpole": {
        "cart_position": ("JOINTPOS", "JOINT", "slider", 0), "upright": ("FRAMEZAXIS", "XBODY", "pole_1", 2),
        "pole_speed": ("JOINTVEL", "JOINT", "hinge_1", 0), "control": ("ACTUATORFRC", "ACTUATOR", "slide", 0),
    },
    "acrobot": {
        "tip": ("FRAMEPOS", "SITE", "tip", None), "target": ("FRAMEPOS", "SITE", "target", None),
        "spin": ("JOINTVEL", "JOINT", "shoulder", 0),
    },
    "cheetah": {
        "speed": ("SUBTREELINVEL", "BODY", "torso", 0), "torso_height": ("FRAMEPOS", "XBODY", "torso", 2),
        "front_foot": ("FRAMEPOS", "XBODY", "ffoot", 2), "back_foot": ("FRAMEPOS", "XBODY", "bfoot", 2),
        "spin": ("FRAMEANGVEL", "XBODY", "torso", 1),
    },
    "walker": {
        "speed": ("SUBTREELINVEL", "BODY", "torso", 0), "torso_height": ("FRAMEPOS", "XBODY", "torso", 2),
        "upright": ("FRAMEZAXIS", "XBODY", "torso", 2), "spin": ("FRAMEANGVEL", "XBODY", "torso", 1),
        **{n: ("FRAMEPOS", "XBODY", n, 2) for n in ("left_foot", "right_foot", "left_thigh", "right_thigh")},
    },
    "quadruped": {
        "upright": ("FRAMEZAXIS", "XBODY", "torso", 2), "velocity": ("VELOCIMETER", "SITE", "torso", None),
        "mass_height": ("SUBTREECOM", "BODY", "torso", 2), "spin": ("FRAMEANGVEL", "XBODY", "torso", 2),
    },
}  # fmt: skip

# feature → range from which random objectives draw their targets: metres, metres a second, radians a second
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    "cartpole": {"cart_position": (-1.5, 1.5), "upright": (-1, 1), "pole_speed": (-5, 5)},
    "acrobot": {"tip_to_target": (0, 4), "spin": (-6, 6)},
    "cheetah": {
        "speed": (-6, 8), "torso_height": (0.2, 1.2), "front_foot": (0, 1.2), "back_foot": (0, 1.2), "spin": (-8, 8),
    },
    "walker": {
        "speed": (-4, 5), "torso_height": (0.1, 1.3), "upright": (-1, 1), "left_foot": (0, 1.2), "right_foot": (0, 1.2),
        "spin": (-8, 8),
    },
    "quadruped": {
        "upright": (-1, 1), "forward_speed": (-2, 3), "torso_speed": (0, 5), "mass_height": (0.1, 1.0), "spin": (-4, 4),
    },
}  # fmt: skip
POSE = "pose"  # the feature that a pose is: the angles of all joints with limits, each 0…1 within them


def task_objective(task: str) -> Reward:
    """The reward of "walker-walk" and its like; that of a `-hard` variant is the plain task's."""
    return {**STOCK, **CUSTOM}[task.removesuffix("-hard")]


def random_objective(model: PlanningModel, rng: np.random.Generator) -> Reward:
    """Bring one to three randomly chosen features to randomly drawn values: speeds, heights, spins, a pose."""
    ranges: dict[str, tuple[Any, Any]] = dict(TARGETS[model.domain])
    if model.joints:
        ranges[POSE] = np.zeros(len(model.joints)), np.ones(len(model.joints))
    count = int(rng.integers(1, min(3, len(ranges)) + 1))
    chosen = sorted(rng.choice(sorted(ranges), count, replace=False))
    targets = {name: rng.uniform(*ranges[name]) for name in chosen}
    margins = {name: (ranges[name][1] - ranges[name][0]) / 2 for name in chosen}

    def objective(features: Features) -> np.ndarray:
        return np.mean([_closeness((features[n] - t) / margins[n], n == POSE) for n, t in targets.items()], 0)

    return objective


def _closeness(distance: np.ndarray, is_vector: bool) -> np.ndarray:
    near = tolerance(distance, (0, 0), 1.0, "long_tail")
    return near.mean(-1) if is_vector else near


class PlanningModel:
    """A copy of a domain's model that reads the features of `dmc_rewards` through sensors."""

    def __init__(self, simulation: DMControl) -> None:
        self.domain, self.horizon = simulation.domain, HORIZONS[simulation.domain]
        spec = mujoco.MjSpec.from_string(*_model_xml(self.domain))
        for name, (kind, type_, object_, _) in SENSORS[self.domain].items():
            spec.add_sensor(
                name=f"feature_{name}", type=getattr(mujoco.mjtSensor, f"mjSENS_{kind}"),
                objtype=getattr(mujoco.mjtObj, f"mjOBJ_{type_}"), objname=object_,
            )  # fmt: skip
        limited = [joint for joint in spec.joints if joint.range[1] > joint.range[0]]
        for joint in limited:
            spec.add_sensor(
                name=f"joint_{joint.name}", type=mujoco.mjtSensor.mjSENS_JOINTPOS,
                objtype=mujoco.mjtObj.mjOBJ_JOINT, objname=joint.name,
            )  # fmt: skip
        self.model = spec.compile()
        self.joints = [joint.name for joint in limited]
        self.model.opt.timestep = simulation.environment.control_timestep() / self.horizon.substeps
        self.data = mujoco.MjData(self.model)
        self._frames = simulation.action_repeat

    def returns(self, state: np.ndarray, actions: np.ndarray, objective: Reward) -> np.ndarray:
        """Returns [N] under `objective` of `actions` [N, H, A] from the full physics `state`."""
        per_step = self._frames * self.horizon.substeps
        _, sensed = rollout(self.model, [self.data], state[None], np.repeat(actions, per_step, axis=1))
        rewards = objective(self.features(sensed[:, self.horizon.substeps - 1 :: self.horizon.substeps]))
        return np.nan_to_num(rewards.sum(1), nan=-np.inf)

    def features(self, sensed: np.ndarray) -> Features:
        """The features in sensor readings [..., S]."""
        read: dict[str, np.ndarray] = {}
        for name, (_, _, _, component) in SENSORS[self.domain].items():
            start = int(self.model.sensor(f"feature_{name}").adr[0])
            read[name] = sensed[..., start : start + 3] if component is None else sensed[..., start + component]
        if self.joints:
            addresses = [int(self.model.sensor(f"joint_{name}").adr[0]) for name in self.joints]
            low, high = np.array([self.model.joint(name).range for name in self.joints]).T
            read[POSE] = (sensed[..., addresses] - low) / (high - low)
        if self.domain == "quadruped":
            read["forward_speed"] = read["velocity"][..., 0]
            read["torso_speed"] = np.linalg.norm(read["velocity"], axis=-1)
        if self.domain == "acrobot":
            read["tip_to_target"] = np.linalg.norm(read["tip"] - read["target"], axis=-1)
        return read


DrawObjective = Callable[[PlanningModel, np.random.Generator], Reward]


class Planner:
    """Chooses actions for one DMControl simulation by planning. `quality` 0…1: candidates, and noise on top."""

    def __init__(
        self,
        simulation: DMControl,
        quality: float,
        draw_objective: Callable[[PlanningModel, np.random.Generator], Reward],
    ) -> None:
        self._simulation, self._draw_objective = simulation, draw_objective
        self._model = PlanningModel(simulation)
        self._samples = max(MIN_SAMPLES, round(self._model.horizon.samples * quality))
        self._noise = NOISE_AT_ZERO * (1 - quality)
        self._action_dim = self._model.model.nu

    def begin(self, rng: np.random.Generator) -> None:
        horizon = self._model.horizon
        self._rng, self._objective = rng, self._draw_objective(self._model, rng)
        self._plan = np.zeros((horizon.steps, self._action_dim))
        self._mix = _interpolation(horizon.knots, horizon.steps)
        self._step = 0

    def act(self, observation: Observation | None = None) -> np.ndarray:
        """The next action [A], not clipped, whatever is seen. The simulation must have executed the last one."""
        horizon = self._model.horizon
        since = self._step % horizon.replan
        if since == 0:
            if self._step:
                self._plan = np.concatenate(
                    [self._plan[horizon.replan :], np.repeat(self._plan[-1:], horizon.replan, 0)]
                )
            self._improve(self._simulation.full_state())
        self._step += 1
        return self._plan[since] + self._noise * self._rng.standard_normal(self._action_dim)

    def _improve(self, state: np.ndarray) -> None:
        horizon = self._model.horizon
        knots = horizon.spread * self._rng.standard_normal((self._samples, horizon.knots, self._action_dim))
        knots[0] = 0  # the last plan itself competes
        candidates = np.clip(self._plan + np.einsum("hk,nka->nha", self._mix, knots), -1, 1)
        returns = self._model.returns(state, candidates, self._objective)
        spread = max(float(returns.std()), 1e-6)
        weights = np.exp((returns - returns.max()) / (TEMPERATURE * spread))
        self._plan = np.einsum("n,nha->ha", weights / weights.sum(), candidates)


def _interpolation(knots: int, steps: int) -> np.ndarray:
    """[steps, knots] weights that interpolate linearly between evenly spaced knots."""
    at = np.linspace(0, knots - 1, steps)[:, None]
    return np.clip(1 - np.abs(at - np.arange(knots)), 0, 1)


def _model_xml(domain: str) -> tuple[str, dict[str, Any]]:
    module = import_module(f"dm_control.suite.{domain}")
    if domain == "quadruped":
        return _text(module.make_model(floor_size=10)), common.ASSETS
    xml, assets = module.get_model_and_assets()
    return _text(xml), assets


def _text(xml: str | bytes) -> str:
    return xml.decode() if isinstance(xml, bytes) else xml
