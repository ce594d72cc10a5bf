"""Rewards, against the suites themselves and against their definitions."""

import mujoco
import numpy as np
import pytest

from actors import dmc_rewards
from actors.planner import _model_xml


@pytest.mark.parametrize("name", ["walker-walk", "cheetah-run", "quadruped-run"])
def test_dmc_frames_are_the_suites(name, environment):
    from dm_control import suite

    ours = environment(f"dmc/{name}")
    ours.reset(11)
    domain, task = name.split("-", 1)
    theirs = suite.load(domain, task, task_kwargs={"random": 11})
    theirs.reset()
    rng = np.random.default_rng(0)
    for _ in range(10):
        action = rng.uniform(-1, 1, ours.task.action_dim).astype(np.float32)
        expected = sum(theirs.step(action).reward for _ in range(2))
        assert ours.step(action).reward == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("name", "threshold"), [("acrobot-swingup", 0.6), ("walker-walk", 0.6), ("cheetah-run", 0.2)])
def test_hard_variants_cut_and_charge_each_frame(name, threshold, environment, monkeypatch):
    plain, hard = environment(f"dmc/{name}"), environment(f"dmc/{name}-hard")
    for one in (plain, hard):
        monkeypatch.setattr(one.simulation, "render", lambda: np.zeros((64, 64, 3), np.uint8))
        one.reset(5)
    action = np.full(plain.task.action_dim, 0.5, np.float32)
    for _ in range(30):
        frames = [plain.simulation.frame(action).reward for _ in range(2)]
        expected = sum((r if r >= threshold else 0.0) - 0.1 * np.linalg.norm(action) for r in frames)
        assert hard.step(action).reward == pytest.approx(expected, abs=1e-6)


def gaussian(x, low, margin):
    """tol(x; low, ∞; margin) with the default sigmoid: 0.1 at the margin."""
    return 1.0 if x >= low else 0.1 ** (((low - x) / margin) ** 2)


def linear(distance, margin, at_margin):
    """1 within the bounds, `at_margin` at the margin, never below 0."""
    if distance <= 0:
        return 1.0
    slope = distance / margin * (1 - at_margin)
    return 1 - slope if slope < 1 else 0.0


ORACLES = {
    "cheetah-run-backwards": lambda f: linear(f["speed"] + 8, 8, 0),
    "cheetah-jump": lambda f: np.mean([
        (5 * gaussian((f["torso_height"] + f[foot]) / 2, 1.2, 0.6) + linear(abs(f["speed"]) - 0.5, 0.5, 0)) / 6
        for foot in ("front_foot", "back_foot")
    ]),
    "cheetah-run-front": lambda f: (3 * gaussian(f["back_foot"], 1.2, 0.6) + 2 * gaussian(f["torso_height"], 1.2, 0.6))
    / 5 * (5 * linear(6 - f["speed"], 6, 0) + 1) / 6,
    "cheetah-run-back": lambda f: (3 * gaussian(f["front_foot"], 1.2, 0.6) + 2 * gaussian(f["torso_height"], 1.2, 0.6))
    / 5 * (5 * linear(6 - f["speed"], 6, 0) + 1) / 6,
    "walker-walk-backwards": lambda f: (3 * gaussian(f["torso_height"], 1.2, 0.6) + (1 + f["upright"]) / 2)
    / 4 * (5 * linear(f["speed"] + 1, 0.5, 0.5) + 1) / 6,
    "walker-run-backwards": lambda f: (3 * gaussian(f["torso_height"], 1.2, 0.6) + (1 + f["upright"]) / 2)
    / 4 * (5 * linear(f["speed"] + 8, 4, 0.5) + 1) / 6,
    "walker-backflip": lambda f: (3 * gaussian((f["left_foot"] + f["right_foot"]) / 2, 1.1, 0.55)
        + 2 * gaussian((f["left_thigh"] + f["right_thigh"]) / 2, 1.0, 0.5)) / 5
        * (5 * linear(f["speed"] + 6, 3, 0.5) + 1) / 6,
    "quadruped-stand": lambda f: linear(1 - f["upright"], 2, 0),
    "quadruped-jump": lambda f: linear(1 - f["upright"], 2, 0) * linear(1 - f["mass_height"], 1, 0.5),
    "quadruped-roll": lambda f: linear(1 - f["upright"], 2, 0) * linear(0.5 - f["torso_speed"], 0.5, 0.5),
    "quadruped-roll-fast": lambda f: linear(1 - f["upright"], 2, 0) * linear(5 - f["torso_speed"], 5, 0.5),
}  # fmt: skip


def random_features(rng):
    heights = ("torso_height", "front_foot", "back_foot", "left_foot", "right_foot", "left_thigh", "right_thigh")
    features = {name: rng.uniform(0, 1.6) for name in (*heights, "mass_height")}
    return features | {"speed": rng.uniform(-12, 12), "upright": rng.uniform(-1, 1), "torso_speed": rng.uniform(0, 7)}


@pytest.mark.parametrize("name", dmc_rewards.CUSTOM)
def test_custom_rewards_follow_their_definition(name):
    rng = np.random.default_rng(0)
    states = [random_features(rng) for _ in range(300)]
    expected = [ORACLES[name](f) for f in states]
    assert np.std(expected) > 0.01
    together = {key: np.array([f[key] for f in states]) for key in states[0]}
    np.testing.assert_allclose(dmc_rewards.CUSTOM[name](together), expected, atol=1e-9)


def test_features_are_read_from_the_right_bodies(environment):
    walker = environment("dmc/walker-backflip").simulation
    walker.reset(0)
    data = walker.physics.data
    position = {
        name: data.xpos[walker.physics.model.name2id(name, "body")] for name in ("torso", "left_foot", "right_thigh")
    }
    features = dmc_rewards.walker_features(walker.physics)
    assert features["torso_height"] == position["torso"][2]
    assert features["left_foot"] == position["left_foot"][2]
    assert features["right_thigh"] == position["right_thigh"][2]
    cheetah = environment("dmc/cheetah-jump").simulation
    cheetah.reset(0)
    back = cheetah.physics.data.xpos[cheetah.physics.model.name2id("bfoot", "body")]
    assert dmc_rewards.cheetah_features(cheetah.physics)["back_foot"] == back[2]


def test_metaworld_frames_are_the_librarys(environment):
    ours = environment("metaworld/drawer-close-v3")
    ours.reset(3)
    theirs = environment("metaworld/drawer-close-v3").simulation
    theirs.reset(3)
    action = np.array([0.2, 1.0, -0.6, 0.5], np.float32)
    successes = []
    for _ in range(60):
        frames = [theirs.environment.step(action) for _ in range(2)]
        step = ours.step(action)
        assert step.reward == pytest.approx(sum(f[1] for f in frames), rel=1e-9)
        assert step.success == frames[-1][4]["success"]
        successes.append(step.success)
    assert successes[0] == 0.0


def test_metaworld_goals_are_random_and_seen_in_the_first_image(environment):
    simulation = environment("metaworld/reach-v3").simulation
    goals = []
    for seed in (0, 1):
        simulation.reset(seed)
        goals.append(simulation.environment._target_pos.copy())
        np.testing.assert_allclose(simulation.data.site("goal").xpos, goals[-1], atol=1e-6)
        np.testing.assert_allclose(simulation.state[-3:], goals[-1], atol=1e-6)
    assert np.linalg.norm(goals[0] - goals[1]) > 0.01


class Oracle:
    """Quantities of a body from positions and velocities alone: kinematics and Jacobians of a model of its own."""

    def __init__(self, domain):
        self.model = mujoco.MjModel.from_xml_string(*_model_xml(domain))
        self.data = mujoco.MjData(self.model)

    def see(self, position, velocity):
        self.data.qpos[:], self.data.qvel[:] = position, velocity
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        return self

    def centre(self):
        mass = self.model.body_mass
        return (mass[:, None] * self.data.xipos).sum(0) / mass.sum()

    def centre_velocity(self):
        total, jacobian = np.zeros(3), np.zeros((3, self.model.nv))
        for body, mass in enumerate(self.model.body_mass):
            mujoco.mj_jacBodyCom(self.model, self.data, jacobian, None, body)
            total += mass * (jacobian @ self.data.qvel)
        return total / self.model.body_mass.sum()

    def site_speed(self, name):
        jacobian = np.zeros((3, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, jacobian, None, self.model.site(name).id)
        return float(np.linalg.norm(jacobian @ self.data.qvel))

    def features(self):
        height = {self.model.body(b).name: self.data.xpos[b, 2] for b in range(self.model.nbody)}
        torso = self.model.body("torso").id
        found = {
            "speed": self.centre_velocity()[0], "torso_height": height["torso"],
            "upright": self.data.xmat[torso].reshape(3, 3)[2, 2], "mass_height": self.centre()[2],
            "front_foot": height.get("ffoot"), "back_foot": height.get("bfoot"), **height,
        }  # fmt: skip
        if self.model.nsite and any(self.model.site(i).name == "torso" for i in range(self.model.nsite)):
            found["torso_speed"] = self.site_speed("torso")
        return found


@pytest.mark.parametrize("name", dmc_rewards.CUSTOM)
def test_custom_rewards_along_an_episode_follow_from_the_physics_state(name, environment):
    """Each frame's reward from its positions and velocities, in float64, by other means than the environment's."""
    one = environment(f"dmc/{name}")
    simulation, oracle, rng = one.simulation, Oracle(name.split("-")[0]), np.random.default_rng(1)
    simulation.reset(4)
    for _ in range(60):
        action = rng.uniform(-1, 1, one.task.action_dim)
        reward = simulation.frame(action).reward
        data = simulation.physics.data
        features = oracle.see(data.qpos, data.qvel).features()
        assert reward == pytest.approx(ORACLES[name](features), abs=1e-9)
