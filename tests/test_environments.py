"""Environments: the contract on diverse tasks, time and rewards against the suites themselves, pixels, gym tasks."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from actors import dmc_rewards, rendering, tasks
from actors.contract import ContractBroken, check_environment
from actors.environment import Environment, Frame, make
from gsa.errors import EnvironmentFault, UsageError

DIVERSE = (
    "dmc/cartpole-balance", "dmc/acrobot-swingup-hard", "dmc/cheetah-jump", "dmc/walker-backflip",
    "dmc/quadruped-roll-fast", "metaworld/reach-v3", "metaworld/door-open-v3", "metaworld/pick-place-wall-v3",
    "gym/InvertedPendulum-v5",
)  # fmt: skip


@pytest.fixture
def environment():
    """make(), with everything it made closed at the end."""
    made = []

    def make_and_keep(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    yield make_and_keep
    for one in made:
        one.close()


@pytest.mark.parametrize("name", DIVERSE)
def test_contract(name):
    check_environment(lambda: make(name), steps=8)


@pytest.mark.parametrize("name", ["metaworld/button-press-v3", "dmc/cartpole-balance"])
def test_contract_over_a_whole_episode(name):
    check_environment(lambda: make(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [task.name for task in tasks.ALL])
def test_contract_of_every_task(name, request):
    if "slow" not in request.config.getoption("-m"):
        pytest.skip("run with -m slow")
    check_environment(lambda: make(name))


# Tasks


def test_the_tasks_of_the_paper_are_known():
    assert len(tasks.DMC) == 23
    assert len(tasks.METAWORLD) == len({t.name for t in tasks.METAWORLD}) == 50
    dims = {t.embodiment: t.action_dim for t in tasks.ALL}
    assert dims == {
        "dmc/cartpole": 1, "dmc/acrobot": 1, "dmc/cheetah": 6, "dmc/walker": 6, "dmc/quadruped": 12,
        "metaworld/sawyer": 4,
    }  # fmt: skip


def test_metaworld_names_are_the_librarys():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {t.local_name for t in tasks.METAWORLD} == set(ALL_V3_ENVIRONMENTS)


def test_scores():
    assert tasks.find("dmc/walker-walk").score(940.0) == 94.0
    assert tasks.find("metaworld/reach-v3").score(1800.0, success=1.0) == 100.0
    assert tasks.find("metaworld/reach-v3").score(1800.0, success=0.0) == 0.0


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UsageError, match=r"Did you mean dmc/walker-walk"):
        make("dmc/walker-wlk")
    with pytest.raises(UsageError, match="render profile"):
        make("dmc/walker-walk", render="quick")


def test_finding_a_task_imports_no_simulator():
    code = "import sys; from actors import tasks; tasks.find('metaworld/reach-v3'); assert 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Time, with a simulator that counts


class Counter:
    """Shows its frame number; can end, fail or give NaN at a frame."""

    control_hz, renderer = 100.0, "none"

    def __init__(self, end=None, fail=None, nan=None):
        self.end, self.fail, self.nan = end, fail, nan
        self.count = self.renders = 0

    def reset(self, seed):
        self.count = self.renders = 0

    def frame(self, action):
        self.count += 1
        if self.count == self.fail:
            raise RuntimeError("the cable came loose")
        return Frame(np.nan if self.count == self.nan else float(self.count), 1.0, terminated=self.count == self.end)

    def render(self):
        self.renders += 1
        return np.full((64, 64, 3), self.count, np.uint8)

    def close(self):
        pass


def counting(frames=10, repeat=2, **kwargs):
    return Environment(tasks.Task("dmc/count", "dmc/counter", 1, frames, repeat, "return"), Counter(**kwargs))


def run(environment, seed=0):
    environment.reset(seed)
    steps = [environment.step(np.zeros(1))]
    while not steps[-1].last:
        steps.append(environment.step(np.zeros(1)))
    return steps


def test_a_step_sums_its_frames_and_shows_the_last():
    environment = counting()
    steps = run(environment)
    assert [s.reward for s in steps] == [1 + 2, 3 + 4, 5 + 6, 7 + 8, 9 + 10]
    assert [int(s.observation["pixels"][0, 0, 0]) for s in steps] == [2, 4, 6, 8, 10]
    assert [s.discount for s in steps] == [1.0] * 5  # a time limit is no end of the task
    assert environment.simulation.renders == 6  # once for each observation, not for each frame
    assert environment.spec.control_hz == 50.0


def test_an_odd_time_limit_is_kept_to_the_frame():
    environment = counting(frames=7, repeat=3)
    assert environment.episode_steps == 3
    assert [s.reward for s in run(environment)] == [1 + 2 + 3, 4 + 5 + 6, 7]


def test_a_task_that_ends_within_a_step_ends_with_discount_zero():
    steps = run(counting(end=3))
    assert [(s.reward, s.discount, s.last) for s in steps] == [(3.0, 1.0, False), (3.0, 0.0, True)]


@pytest.mark.parametrize("fault", [{"fail": 3}, {"nan": 4}])
def test_a_simulator_that_fails_is_a_fault_and_the_episode_is_over(fault):
    environment = counting(**fault)
    environment.reset(0)
    environment.step(np.zeros(1))
    with pytest.raises(EnvironmentFault, match="dmc/count failed in step"):
        environment.step(np.zeros(1))
    with pytest.raises(UsageError, match="reset"):
        environment.step(np.zeros(1))


def test_the_contract_catches_a_shared_buffer_and_a_seed_ignored():
    class Shared(Counter):
        buffer = np.zeros((64, 64, 3), np.uint8)

        def render(self):
            self.buffer[:] = self.count
            return self.buffer

    def sharing():
        environment = counting()
        environment.simulation = Shared()
        return environment

    with pytest.raises(ContractBroken, match="share one buffer"):
        check_environment(sharing)
    with pytest.raises(ContractBroken, match="seeds 0 and 1 give the same episode"):
        check_environment(counting)


# Rewards, against the suites and against the definitions


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


# Pixels


def test_faithful_dmc_pixels_are_the_suites(environment):
    faithful = environment("dmc/walker-walk", render="faithful")
    image = faithful.reset(0)["pixels"]
    np.testing.assert_array_equal(image, faithful.simulation.physics.render(64, 64, camera_id=0))


def test_faithful_metaworld_pixels_are_gymnasiums_turned_upright_from_the_moved_camera(environment):
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    faithful = environment("metaworld/reach-v3", render="faithful")
    image = faithful.reset(0)["pixels"]
    simulation = faithful.simulation
    np.testing.assert_allclose(simulation.data.camera("corner2").xpos, [0.75, 0.075, 0.7])
    faithful.close()
    simulation.model.vis.global_.offwidth = simulation.model.vis.global_.offheight = 64
    theirs = MujocoRenderer(simulation.model, simulation.data, None, 64, 64, camera_name="corner2")
    np.testing.assert_array_equal(image, theirs.render("rgb_array")[::-1])
    theirs.close()


def test_fast_pixels_show_the_same_scene(environment):
    """The arm is as red, the table as brown, in the same places; only shading may differ."""
    images = [environment("metaworld/reach-v3", render=p).reset(0)["pixels"].astype(int) for p in ("fast", "faithful")]
    red = [image[..., 0] > 2 * image[..., 1] for image in images]
    assert red[0].mean() > 0.05
    assert (red[0] != red[1]).mean() < 0.02
    assert np.abs(images[0] - images[1]).mean() < 20


def test_thinned_meshes_move_pixels_by_little(environment, monkeypatch):
    thinned = environment("metaworld/coffee-pull-v3").reset(0)["pixels"].astype(int)
    monkeypatch.setattr(rendering, "thin_meshes", lambda model, cell_m: None)
    whole = environment("metaworld/coffee-pull-v3").reset(0)["pixels"].astype(int)
    assert 0 < np.abs(thinned - whole).mean() < 0.5


def test_thinning_keeps_both_sides_of_a_plate_and_drops_what_vanishes():
    plate = np.array([[0, 1, 2], [0, 2, 1], [1, 2, 0], [3, 3, 4]])
    assert sorted(rendering._distinct_faces(plate)) == [0, 1]
    vertices = np.array([[0.001, 0, 0], [0.002, 0, 0], [0.004, 0, 0], [0.011, 0, 0]])
    assert list(rendering._nearest_to_cell_mean(vertices, 0.005)) == [1, 1, 1, 3]


def test_the_simulated_model_is_not_thinned(environment):
    simulation = environment("metaworld/reach-v3").simulation
    faces = simulation.model.mesh_facenum.copy(), simulation.model.mesh_face.copy()
    simulation.reset(0)
    simulation.render()
    np.testing.assert_array_equal(simulation.model.mesh_facenum, faces[0])
    np.testing.assert_array_equal(simulation.model.mesh_face, faces[1])


def test_renderers_of_one_process_do_not_disturb_each_other(environment):
    names = ("dmc/walker-walk", "metaworld/reach-v3", "dmc/cheetah-run")
    several = [environment(name) for name in names]
    alone = []
    for one in several:
        one.reset(0)
        alone.append(one.step(np.zeros(one.task.action_dim)).observation["pixels"])
    for one in several:
        one.reset(0)
    for one, image in zip(several, alone, strict=True):
        np.testing.assert_array_equal(one.step(np.zeros(one.task.action_dim)).observation["pixels"], image)
    several[0].close()
    several[1].reset(0)
    np.testing.assert_array_equal(several[1].step(np.zeros(4)).observation["pixels"], alone[1])


def test_another_thread_is_told_to_make_its_own(environment):
    one = environment("dmc/cartpole-balance")
    one.reset(0)
    errors = []

    def use():
        try:
            one.step(np.zeros(1))
        except UsageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "make one for each thread" in errors[0]


def test_a_program_that_closes_nothing_ends_quietly():
    code = "from actors.environment import make; e = make('dmc/cartpole-balance'); e.reset(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_check_rendering_draws_and_explains():
    assert rendering.check_rendering().startswith(os.environ["MUJOCO_GL"])


def test_check_rendering_explains_a_broken_backend(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(UsageError, match=r"MUJOCO_GL=nonsense failed \(.*nonsense.*\)"):
        rendering.check_rendering()


def test_the_order_of_imports_does_not_matter():
    code = """import mujoco; from actors.environment import make
print(make('dmc/cartpole-balance').reset(0)['pixels'].mean())"""
    environ = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert float(done.stdout) > 10


# Gymnasium

MY_ENVS = '''
import gymnasium, numpy as np
from gymnasium.spaces import Box, Discrete

class Slider(gymnasium.Env):
    """Adds its action to its place; ends at 10. Seen as a grey level."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    def __init__(self, render_mode=None, sees=False, discrete=False):
        self.render_mode, self.sees = render_mode, sees
        self.action_space = Discrete(2) if discrete else Box(np.float32([0, -4]), np.float32([10, 4]))
        self.observation_space = Box(0, 255, (32, 48, 3), np.uint8) if sees else Box(-99, 99, (1,))
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = float(self.np_random.uniform(0, 1))
        return self.observe(), {}
    def observe(self):
        return self.render() if self.sees else np.float32([self.place])
    def step(self, action):
        self.place += float(action[0])
        return self.observe(), float(action[1]), self.place >= 10, False, {"is_success": self.place >= 10}
    def render(self):
        return np.full((32, 48, 3), int(np.clip(self.place, 0, 10) * 25), np.uint8)

for name, limit, kwargs in (
    ("Slider-v0", 5, {}), ("Seeing-v0", 5, {"sees": True}),
    ("Endless-v0", None, {}), ("Discrete-v0", 5, {"discrete": True}),
):
    gymnasium.register(name, Slider, max_episode_steps=limit, kwargs=kwargs)
'''


@pytest.fixture
def my_envs(tmp_path, monkeypatch):
    (tmp_path / "my_envs_of_this_test.py").write_text(MY_ENVS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return ("my_envs_of_this_test",)


@pytest.mark.parametrize("name", ["gym/Slider-v0", "gym/Seeing-v0"])
def test_a_users_gym_environment_keeps_the_contract(name, my_envs):
    check_environment(lambda: make(name, imports=my_envs))


def test_gym_actions_are_scaled_and_termination_is_told(my_envs, environment):
    one = environment("gym/Slider-v0", imports=my_envs)
    assert (one.task.action_dim, one.episode_steps, one.spec.control_hz) == (2, 5, 20.0)
    one.reset(0)
    step = one.step(np.array([-1.0, 0.5]))  # the lowest of 0…10, and 2 of −4…4
    assert (step.reward, step.discount, step.last, step.success) == (2.0, 1.0, False, 0.0)
    step = one.step(np.array([1.0, 0.0]))
    assert (step.discount, step.last, step.success) == (0.0, True, 1.0)


def test_gym_tasks_that_cannot_be_used_say_why(my_envs):
    with pytest.raises(UsageError, match="time limit"):
        make("gym/Endless-v0", imports=my_envs)
    with pytest.raises(UsageError, match="continuous"):
        make("gym/Discrete-v0", imports=my_envs)
    with pytest.raises(UsageError, match="--import"):
        make("gym/NotThere-v0")
    with pytest.raises(UsageError, match="no_such_module"):
        make("gym/Slider-v0", imports=("no_such_module",))
