"""Pixels: the profiles, renderers beside each other, the OpenGL backend."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from actors import rendering
from actors.environment import make
from gsa.errors import UsageError


def test_faithful_dmc_pixels_are_the_suites(environment):
    faithful = environment("dmc/walker-walk", render="faithful")
    image = faithful.reset(0)["pixels"]
    np.testing.assert_array_equal(image, faithful.simulation.physics.render(64, 64, camera_id=0))


@pytest.mark.parametrize(
    "name", ["cartpole-balance", "acrobot-swingup", "cheetah-run", "walker-walk", "quadruped-walk"]
)
def test_faithful_dmc_episodes_are_those_of_the_pixels_wrapper(name, environment):
    """Bit for bit, reset and steps, against an environment of dm_control's own."""
    from dm_control import suite
    from dm_control.suite.wrappers import pixels

    ours = environment(f"dmc/{name}", render="faithful")
    domain, task = name.split("-", 1)
    stock = suite.load(domain, task, task_kwargs={"random": 3})
    camera = 2 if domain == "quadruped" else 0
    theirs = pixels.Wrapper(stock, render_kwargs={"width": 64, "height": 64, "camera_id": camera})
    np.testing.assert_array_equal(ours.reset(3)["pixels"], theirs.reset().observation["pixels"])
    rng = np.random.default_rng(0)
    for _ in range(3):
        action = rng.uniform(-1, 1, ours.task.action_dim).astype(np.float32)
        stock.step(action)
        expected = theirs.step(action).observation["pixels"]
        np.testing.assert_array_equal(ours.step(action).observation["pixels"], expected)
    stock.physics.free()


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


def test_thinned_meshes_move_pixels_by_little(monkeypatch):
    with make("metaworld/coffee-pull-v3") as one:
        thinned = one.reset(0)["pixels"].astype(int)
    monkeypatch.setattr(rendering, "thin_meshes", lambda model, cell_m: None)
    with make("metaworld/coffee-pull-v3") as one:
        whole = one.reset(0)["pixels"].astype(int)
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


def test_environments_of_one_task_share_what_they_draw_with(environment):
    first = environment("metaworld/reach-v3")
    alone = [first.reset(seed)["pixels"] for seed in (0, 1)]
    second = environment("metaworld/reach-v3")
    np.testing.assert_array_equal(second.reset(1)["pixels"], alone[1])
    assert len(rendering._canvases) == 1
    np.testing.assert_array_equal(first.reset(0)["pixels"], alone[0])
    first.close()
    np.testing.assert_array_equal(second.reset(0)["pixels"], alone[0])
    assert len(environment("metaworld/reach-v3", render="faithful").reset(0)) == 1
    assert len(rendering._canvases) == 2  # other profiles, and other models, have their own
    second.close()
    assert len(rendering._canvases) == 1


def test_a_gym_environment_that_is_closed_leaves_the_images_of_others_as_they_are(environment):
    """Its MjrContext was freed by the garbage collector, in the OpenGL context of another, whose meshes were gone."""
    gym = make("gym/InvertedPendulum-v5@pixels")
    gym.reset(0)
    gym.close()
    one = environment("dmc/walker-walk")
    image = one.reset(0)["pixels"]
    del gym
    gc.collect()
    np.testing.assert_array_equal(one.reset(0)["pixels"], image)


def test_gym_environments_beside_others_draw_their_own(environment):
    names = ("gym/InvertedPendulum-v5@pixels", "gym/Reacher-v5@pixels", "dmc/cheetah-run")
    alone = []
    for name in names:
        with make(name) as one:
            alone.append(one.reset(0)["pixels"])
    several = [environment(name) for name in names]
    for _ in range(2):
        for one, image in zip(several, alone, strict=True):
            np.testing.assert_array_equal(one.reset(0)["pixels"], image)


def test_a_renderer_dropped_unclosed_is_freed_with_the_next_one_opened(environment):
    make("dmc/walker-walk").reset(0)
    gc.collect()
    environment("dmc/cheetah-run").reset(0)
    assert len(rendering._canvases) == 1


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


@pytest.mark.parametrize("tasks", [["dmc/cartpole-balance"], ["metaworld/reach-v3", "dmc/cartpole-balance"]])
def test_a_program_that_closes_nothing_ends_quietly(tasks):
    """Also where the second simulator has an exit handler of its own, registered after the first was drawn."""
    code = f"""
from actors.environment import make
opened = []
for task in {tasks}:
    opened.append(make(task))
    opened[-1].reset(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_check_rendering_draws_and_explains():
    assert rendering.check_rendering().startswith(os.environ["MUJOCO_GL"])


def test_the_backend_is_explained():
    code = "from actors.rendering import explain_backend; print(explain_backend())"
    for set_to, said in ((None, "egl, as libEGL is installed"), ("egl", "egl, as MUJOCO_GL says")):
        environ = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"} | ({"MUJOCO_GL": set_to} if set_to else {})
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
        assert done.stdout.strip() == said


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
