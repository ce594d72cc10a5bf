"""Environments: the contract on diverse tasks, names and scores, time."""

import subprocess
import sys

import numpy as np
import pytest

from actors import tasks
from actors.contract import ContractBroken, check_environment
from actors.environment import Environment, Frame, make
from gsa.errors import EnvironmentFault, UsageError

DIVERSE = (
    "dmc/cartpole-balance", "dmc/acrobot-swingup-hard", "dmc/cheetah-jump", "dmc/walker-backflip",
    "dmc/quadruped-roll-fast", "metaworld/reach-v3", "metaworld/door-open-v3", "metaworld/pick-place-wall-v3",
    "gym/InvertedPendulum-v5", "gym/InvertedPendulum-v5@pixels+state",
)  # fmt: skip


@pytest.mark.parametrize("name", DIVERSE)
def test_contract(name):
    check_environment(lambda: make(name), steps=8)


@pytest.mark.parametrize("name", ["metaworld/button-press-v3", "dmc/cartpole-balance"])
def test_contract_over_a_whole_episode(name):
    check_environment(lambda: make(name))


def test_the_contract_sees_an_image_upside_down(environment):
    def turned():
        one = environment("dmc/cheetah-run")
        draw = one.simulation.render
        one.simulation.render = lambda: draw()[::-1].copy()
        return one

    with pytest.raises(ContractBroken, match="upside down"):
        check_environment(turned, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [task.name for task in tasks.ALL])
def test_contract_of_every_task(name):
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
