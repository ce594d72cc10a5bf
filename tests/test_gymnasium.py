"""Gymnasium environments: what is observed of them, scaled actions, why some cannot be used, gsa check-env."""

import sys

import numpy as np
import pytest

from actors.contract import check_environment
from actors.environment import make
from actors.gymnasium_env import to_image
from deploy import cli
from gsa.errors import EnvironmentFault, UsageError
from gsa.schema import ArraySpec

MY_ENVS = '''
import gymnasium, numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Sequence

class Slider(gymnasium.Env):
    """Adds its action to its place; ends at 10. Seen as a grey level, as a number, or as both and more."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    place_space = Box(-99, 99, (1,))
    image_space = Box(0, 255, (32, 48, 3), np.uint8)
    spaces = {
        "number": place_space,
        "image": image_space,
        "both": Dict({
            "front": image_space, "wrist": Dict({"grey": Box(0, 255, (80, 90), np.uint8)}), "place": place_space,
            "matrix": Box(-1, 1, (2, 3)), "mode": Discrete(3),
        }),
        "telling": Dict({"place": place_space, "told": Sequence(place_space)}),
    }
    def __init__(self, render_mode=None, sees="number", discrete=False, breaks=None):
        self.render_mode, self.sees, self.breaks = render_mode, sees, breaks
        self.action_space = Discrete(2) if discrete else Box(np.float32([0, -4]), np.float32([10, 4]))
        self.observation_space = self.spaces[sees]
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = float(self.np_random.uniform(0, 1))
        return self.observe(), {}
    def observe(self):
        number = np.float32([np.nan if self.breaks == "nan" else self.place])
        if self.breaks == "shape":
            number = np.zeros(2, np.float32)
        return {
            "number": number, "image": self.render(),
            "both": {
                "front": self.render(), "wrist": {"grey": np.full((80, 90), 7, np.uint8)}, "place": number,
                "matrix": np.arange(6).reshape(2, 3) / 10, "mode": 2,
            },
            "telling": {"place": number, "told": ()},
        }[self.sees]
    def step(self, action):
        self.place += float(action[0])
        return self.observe(), float(action[1]), self.place >= 10, False, {"is_success": self.place >= 10}
    def render(self):
        return np.full((32, 48, 3), int(np.clip(self.place, 0, 10) * 25), np.uint8)

class Whole(gymnasium.Env):
    """Takes whole numbers from -3 to 5, and pays them."""
    action_space, observation_space = Box(-3, 5, (1, 1), np.int64), Box(-1, 1, (2,))
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}
    def step(self, action):
        assert self.action_space.contains(action)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), float(action[0, 0]), False, False, {}

for name, limit, kwargs in (
    ("Slider-v0", 5, {}), ("Seeing-v0", 5, {"sees": "image"}), ("Both-v0", 5, {"sees": "both"}),
    ("Telling-v0", 5, {"sees": "telling"}), ("Endless-v0", None, {}), ("Discrete-v0", 5, {"discrete": True}),
    ("NaNState-v0", 5, {"breaks": "nan"}), ("WrongShape-v0", 5, {"breaks": "shape"}),
):
    gymnasium.register(name, Slider, max_episode_steps=limit, kwargs=kwargs)
gymnasium.register("Whole-v0", Whole, max_episode_steps=5)
'''
IMAGE = ArraySpec((64, 64, 3), "uint8")


def vector(size):
    return ArraySpec((size,), "float32")


@pytest.fixture
def my_envs(tmp_path, monkeypatch):
    (tmp_path / "my_envs_of_this_test.py").write_text(MY_ENVS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return ("my_envs_of_this_test",)


@pytest.mark.parametrize(
    ("name", "observation"),
    [
        ("gym/Slider-v0", {"state": vector(1)}),
        ("gym/Slider-v0@pixels", {"pixels": IMAGE}),
        ("gym/Slider-v0@pixels+state", {"pixels": IMAGE, "state": vector(1)}),
        ("gym/Seeing-v0", {"pixels": IMAGE}),
        (
            "gym/Both-v0",
            {"front": IMAGE, "wrist_grey": IMAGE, "place": vector(1), "matrix": vector(6), "mode": vector(3)},
        ),
        ("gym/Both-v0@front+place", {"front": IMAGE, "place": vector(1)}),
        ("gym/Telling-v0@place", {"place": vector(1)}),
        ("gym/Whole-v0", {"state": vector(2)}),
    ],
)
def test_a_users_gym_environment_keeps_the_contract(name, observation, my_envs, environment):
    assert environment(name, imports=my_envs).spec.observation == observation
    if "front" not in observation:  # whose second camera shows nothing that changes
        check_environment(lambda: make(name, imports=my_envs))


def test_every_sensor_reads_its_own(my_envs, environment):
    one = environment("gym/Both-v0", imports=my_envs)
    one.reset(0)
    seen = one.step(np.array([-0.6, 0])).observation
    place = seen["place"][0]
    assert (seen["front"] == int(place * 25)).all()
    assert (seen["wrist_grey"] == 7).all()
    np.testing.assert_allclose(seen["matrix"], np.arange(6) / 10, rtol=1e-6)
    np.testing.assert_array_equal(seen["mode"], [0, 0, 1])


def test_images_are_averaged_over_the_area_of_a_pixel():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (128, 192, 3), np.uint8)
    expected = image.reshape(64, 2, 64, 3, 3).mean((1, 3))
    assert np.abs(to_image(image) - expected).max() <= 1
    np.testing.assert_array_equal(to_image(image.transpose(2, 0, 1)), to_image(image))
    grey = to_image(image[..., 0])
    assert grey.shape == (64, 64, 3)
    np.testing.assert_array_equal(grey[..., 1], to_image(image[..., :1])[..., 2])


def test_gym_actions_are_scaled_and_termination_is_told(my_envs, environment):
    one = environment("gym/Slider-v0", imports=my_envs)
    assert (one.task.action_dim, one.episode_steps, one.spec.control_hz) == (2, 5, 20.0)
    one.reset(0)
    step = one.step(np.array([-1.0, 0.5]))  # the lowest of 0…10, and 2 of −4…4
    assert (step.reward, step.discount, step.last, step.success) == (2.0, 1.0, False, 0.0)
    step = one.step(np.array([1.0, 0.0]))
    assert (step.discount, step.last, step.success) == (0.0, True, 1.0)


def test_whole_numbered_actions_are_rounded(my_envs, environment):
    one = environment("gym/Whole-v0", imports=my_envs)
    one.reset(0)
    assert [one.step(np.array([a])).reward for a in (-1.0, 0.0, 0.24, 1.0)] == [-3, 1, 2, 5]


@pytest.mark.parametrize(
    ("name", "complaint"), [("NaNState-v0", "state has NaN"), ("WrongShape-v0", r"the shape \(2,\)")]
)
def test_what_is_not_of_its_space_is_a_fault(name, complaint, my_envs, environment):
    with pytest.raises(EnvironmentFault, match=complaint):
        environment(f"gym/{name}", imports=my_envs).reset(0)


def test_gym_tasks_that_cannot_be_used_say_why(my_envs):
    with pytest.raises(UsageError, match="time limit"):
        make("gym/Endless-v0", imports=my_envs)
    with pytest.raises(UsageError, match="continuous"):
        make("gym/Discrete-v0", imports=my_envs)
    with pytest.raises(UsageError, match="--import"):
        make("gym/NotThere-v0")
    with pytest.raises(UsageError, match="no_such_module"):
        make("gym/Slider-v0", imports=("no_such_module",))
    with pytest.raises(UsageError, match=r"observes told, .* leave it out: gym/Telling-v0@place"):
        make("gym/Telling-v0", imports=my_envs)
    with pytest.raises(UsageError, match="Known: pixels, state"):
        make("gym/Slider-v0@hearing", imports=my_envs)
    with pytest.raises(UsageError, match="no images"):
        make("gym/Whole-v0@pixels", imports=my_envs).reset(0)


def test_check_env_reports_what_it_found(my_envs, tmp_path, capsys):
    command = ["check-env", "gym/Slider-v0@pixels+state", "--import", *my_envs, "--image", str(tmp_path / "first.png")]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "pixels [64, 64, 3] uint8, state [1] float32" in said
    assert "FAIL" not in said
    assert (tmp_path / "first.png").stat().st_size > 100


def test_check_env_names_what_is_wrong(my_envs, capsys):
    assert cli.main(["check-env", "gym/NaNState-v0", "--import", *my_envs]) == 1
    said = capsys.readouterr().out
    assert "FAIL  time table" in said
    assert "state has NaN" in said
    assert cli.main(["check-env", "gym/Both-v0", "--import", *my_envs]) == 1
    assert "all images of wrist_grey" in capsys.readouterr().out
