import time
from collections import deque

import numpy as np
import pytest

from actors.guidance import GuidanceConfig
from actors.hosting import InProcess, Isolated
from actors.rollout import Rollout
from actors.worker import EnvWorker
from gsa.errors import GsaError
from gsa.schema import Controller, Lease, NoLease, WeightSnapshot
from tests import guides
from tests.counting import STEPS, counting, task


class EncodesStep:
    """Acts by its own count of steps since the episode began, so that a mix-up of slots shows."""

    def __init__(self, envs):
        self.steps = np.zeros(envs, int)
        self.loaded, self.acted = [], []

    def begin(self, slot):
        self.steps[slot] = 0

    def act(self, observation, controller, rngs, sample=True, slots=None):
        seen, steps = observation["pixels"][:, 0, 0, 0], self.steps[slots]
        assert (seen[seen > 0] == steps[seen > 0]).all()
        self.steps[slots] += 1
        self.acted.append(list(slots))
        self.controllers = controller.copy()
        return np.repeat((steps / 100)[:, None], 2, axis=1).astype(np.float32)

    def executed(self, action, slots=None):
        self.told = action.copy()

    def load_tensors(self, tensors):
        self.loaded.append(tensors)


class Replay:
    def __init__(self, leases):
        self.leases, self.added, self.released = deque(leases), [], []

    def lease(self, worker, held):
        return self.leases.popleft() if self.leases else NoLease.DONE

    def add(self, worker, episode, trajectory):
        self.added.append((episode, trajectory))

    def release(self, worker, episode):
        self.released.append(episode)


class Weights:
    def __init__(self, *versions):
        self.versions = deque(versions)

    def poll(self):
        return WeightSnapshot(self.versions.popleft(), {}) if self.versions else None


def worker(leases, environments, weights=(0,), guidance="constant(0)", has_prior=False, then=counting, guides=(),
           lockstep=True):  # fmt: skip
    """A worker of these environments; `then` makes those that replace them."""
    replay, made = Replay(leases), deque(environments)
    make = lambda: InProcess(lambda: made.popleft() if made else then())  # noqa: E731
    policy = EncodesStep(len(environments))
    rollout = Rollout(
        make, len(environments), policy, GuidanceConfig(guidance), has_prior, seed=3, run="test", guides=guides,
        lockstep=lockstep,
    )  # fmt: skip
    return EnvWorker("w", rollout, replay, Weights(*weights), None), replay


def leases(n, steps=STEPS, warmup=False):
    return [Lease(i, steps, i * steps, warmup) for i in range(n)]


@pytest.mark.parametrize("lockstep", [True, False])
def test_time_is_kept_from_simulator_to_trajectory_in_every_slot(lockstep):
    w, replay = worker(leases(5), [counting() for _ in range(3)], lockstep=lockstep)
    while w.tick():
        pass
    assert sorted(e for e, _ in replay.added) == [0, 1, 2, 3, 4]
    for episode, t in replay.added:
        assert len(t) == STEPS
        assert (t.observation["pixels"][:, 0, 0, 0] == np.arange(STEPS + 1)).all()
        assert np.allclose(t.action[:, 0], np.arange(STEPS) / 100)
        # the image after an action shows that action
        assert (t.observation["pixels"][1:, 0, 0, 2] == np.arange(STEPS) + 128).all()
        assert (t.reward == 1.0).all()
        assert t.stats["return"] == STEPS
        assert t.id == f"test-{episode:08d}"


def test_an_episode_depends_on_its_number_not_on_the_slot_or_worker():
    alone, one = worker(leases(4), [counting()])
    together, four = worker(leases(4), [counting() for _ in range(4)])
    for w in (alone, together):
        while w.tick():
            pass
    first, second = dict(one.added), dict(four.added)
    for episode in range(4):
        assert (first[episode].observation["pixels"] == second[episode].observation["pixels"]).all()


@pytest.mark.parametrize("lockstep", [True, False])
def test_controller_and_policy_version_are_recorded_for_every_step(lockstep):
    w, replay = worker(
        leases(1), [counting()], weights=(7, 8, 9), guidance="constant(1)", has_prior=True, lockstep=lockstep
    )
    while w.tick():
        pass
    trajectory = replay.added[0][1]
    assert trajectory.policy_version.tolist() == [7, 8] + [9] * (STEPS - 2)
    guided = trajectory.controller == Controller.PRIOR
    assert guided.any()
    assert trajectory.stats["guided_share"] == pytest.approx(guided.mean())


def test_a_shortened_lease_ends_the_episode_at_its_last_step():
    w, replay = worker(leases(1, steps=5), [counting()])
    while w.tick():
        pass
    assert len(replay.added[0][1]) == 5
    assert (replay.added[0][1].discount == 1).all()  # the budget ended, not the task


def test_no_step_before_the_first_weights():
    w, replay = worker(leases(1), [counting()], weights=())
    assert not w.tick()
    assert len(replay.leases) == 1


def test_no_step_before_the_prior_it_needs():
    w, _ = worker(leases(1), [counting()], guidance="constant(1)", has_prior=True)
    w._awaited_prior = Weights()
    assert not w.tick()
    w._awaited_prior.versions.append(0)
    w.rollout.policy.load_prior = w.rollout.policy.load_tensors
    assert w.tick()


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_broken_environment_loses_its_episode_only(lockstep):
    broken = counting(fail_at=9)
    w, replay = worker(leases(3), [broken, counting()], lockstep=lockstep)
    while w.tick():
        pass
    assert replay.released == [0]
    assert sorted(e for e, _ in replay.added) == [1, 2]
    assert w.rollout.hosts[0]._environment is not broken
    assert w.stats()["worker/faults"] == 1
    assert "the simulator broke" in w.faults()[0] and w.faults() == []


def test_out_of_lockstep_each_forward_serves_half_of_the_environments_and_none_is_left_behind():
    w, replay = worker(leases(4, steps=20), [counting() for _ in range(4)], lockstep=False)
    while w.tick():
        steps = [len(e.action) for e in w.rollout.episodes if e is not None]
        assert not replay.added or len(steps) < 4
        assert not steps or max(steps) - min(steps) <= 2
    assert {len(slots) for slots in w.rollout.policy.acted} <= {1, 2}
    assert sorted(e for e, _ in replay.added) == [0, 1, 2, 3]


def test_out_of_lockstep_an_environment_that_hangs_stops_no_other():
    w, replay = worker(leases(5), [counting() for _ in range(4)])
    names = iter(["gym/Hangs-v0"] + ["gym/Counting-v0"] * 9)
    make = lambda: Isolated(next(names), imports=("tests.gym_faulty",), timeout_s=600.0)  # noqa: E731
    w.rollout = Rollout(make, 4, w.rollout.policy, GuidanceConfig("constant(0)"), False, seed=0, lockstep=False)
    end = time.monotonic() + 60
    w.run(lambda: len(replay.added) == 4 or time.monotonic() > end)
    assert sorted(e for e, _ in replay.added) == [1, 2, 3, 4]
    hung = w.rollout.hosts[0]
    hung._process.kill()
    w.close()


def test_ten_faults_of_one_cause_end_the_worker_with_that_cause():
    w, replay = worker(leases(20), [counting(fail_at=1)], then=lambda: counting(fail_at=1))
    with pytest.raises(GsaError, match="the simulator broke"):
        while w.tick():
            pass
    assert replay.released == list(range(9))


def guided_by(factory, guidance, has_prior=False, warmup=False):
    w, replay = worker(
        leases(1, warmup=warmup), [counting()], guidance=guidance, has_prior=has_prior, guides=[factory(task())]
    )
    controllers = []
    while w.tick():
        controllers.append(int(w.rollout.policy.controllers[0]))
    return w, replay.added[0][1], controllers


def test_a_guide_acts_where_the_schedule_says_and_the_filter_is_told():
    w, trajectory, asked = guided_by(guides.half, "constant(1)")
    taken = trajectory.controller == Controller.HUMAN
    assert taken.any() and (trajectory.controller[~taken] == Controller.POLICY).all()
    assert (trajectory.action[taken] == [0.5, -1.0]).all()  # as executed: clipped
    assert np.allclose(trajectory.action[~taken, 0], np.flatnonzero(~taken) / 100)
    assert trajectory.stats["guided_share"] == pytest.approx(taken.mean())
    assert Controller.HUMAN not in asked  # the policy is asked for an action of its own in every step
    assert (w.rollout.policy.told[0] == trajectory.action[-1]).all()


def test_a_guide_may_take_over_at_any_step():
    _, trajectory, _ = guided_by(guides.third, "constant(0)")
    assert (np.flatnonzero(trajectory.controller == Controller.HUMAN) == np.arange(0, STEPS, 3)).all()


@pytest.mark.parametrize(
    ("has_prior", "warmup", "acts"),
    [(True, False, Controller.PRIOR), (True, True, Controller.PRIOR), (False, True, Controller.RANDOM)],
)
def test_what_a_guide_leaves_is_done_by_who_would_have_done_it(has_prior, warmup, acts):
    idle = lambda task: lambda observation, step, scheduled: None  # noqa: E731
    _, trajectory, asked = guided_by(idle, "constant(1)", has_prior, warmup)
    assert int(acts) in asked and trajectory.controller.tolist() == asked


@pytest.mark.parametrize(
    ("factory", "says"), [(guides.wrong, "must give 2 finite numbers"), (guides.broken, "joystick is gone")]
)
def test_a_guide_that_fails_is_named_in_a_sentence(factory, says):
    with pytest.raises(GsaError, match=says):
        guided_by(factory, "constant(1)")


def test_ten_crashes_in_a_row_end_the_worker_with_that_cause():
    """Real processes: each crashes in its seventh step."""
    w, _ = worker(leases(20), [counting()])
    make = lambda: Isolated("gym/Crashes-v0", imports=("tests.gym_faulty",))  # noqa: E731
    w.rollout = Rollout(make, 1, w.rollout.policy, GuidanceConfig("constant(0)"), False, seed=0)
    with pytest.raises(GsaError, match=r"10 times in a row for one cause: .*SIGSEGV"):
        w.run(lambda: False)
    assert w.stats()["worker/faults"] == 9
    w.close()


def test_numbers_in_a_fault_make_it_no_other_cause():
    count = iter(range(100))

    def failing():
        environment = counting()
        environment.simulation.frame = lambda action: (_ for _ in ()).throw(RuntimeError(f"at {next(count)}.5 s"))
        return environment

    w, _ = worker(leases(20), [failing()], then=failing)
    with pytest.raises(GsaError, match=r"at 9\.5 s"):
        w.run(lambda: False)
