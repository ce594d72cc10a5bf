"""Worker → replay service → learner, in one process and over Ray, watched by an environment that counts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import ray

from actors.guidance import GuidanceConfig
from actors.hosting import InProcess
from actors.rollout import Rollout
from actors.worker import EnvWorker
from deploy import ray_actors, ray_links
from deploy.ray_actors import ReplayActor
from gsa.schema import ArraySpec, Spec, Trajectory, WeightSnapshot
from replay_service.config import ReplayConfig
from replay_service.service import ReplayService
from retrieval.store import TrajectoryStore
from tests.counting import STEPS, counting
from tests.gym_faulty import hang_without_a_turn_for_python
from tests.processes import alive
from tests.trajectories import counting as counting_trajectory

EPISODES = 6
CONFIG = ReplayConfig(
    batch=8, length=6, rehearsal_share=0.25, samples_per_insert=32, min_size=2 * STEPS, budget=EPISODES * STEPS,
    episode_steps=STEPS, warmup_steps=0, warmup_episodes=0,
)  # fmt: skip
UPDATES = (EPISODES - 2) * STEPS * 32 // (8 * 6)
POOL_SPEC = Spec("test/pool", {"pixels": ArraySpec((64, 64, 3), "uint8")}, 3)
POOL_ROWS = np.array([0, 2])
SOON_S = 60


def service(folder) -> ReplayService:
    """Over an online store in `folder`, new or found there, and the pool beside it."""
    online = TrajectoryStore.open(folder / "o", write=True) if (folder / "o").exists() else None
    with counting() as env:
        spec = env.spec
    pool = TrajectoryStore.open(folder / "pool")
    return ReplayService(CONFIG, online or TrajectoryStore.create(folder / "o"), spec, pool, POOL_ROWS, 4, buffers=1)


class Actor(ReplayActor):
    """The run's own, over the stores of this test."""

    def __init__(self, folder):
        self._state, self._saving, self._service = folder / "replay.json", threading.Lock(), service(folder)
        if self._state.exists():
            self._service.restore(json.loads(self._state.read_text()))

    def pid(self):
        return os.getpid()


class ActsByStep:
    """Action t of every episode is t/100."""

    step = 0

    def begin(self, slot):
        self.step = 0

    def act(self, observation, controller, rngs, sample=True, slots=None):
        self.step += 1
        return np.full((1, 2), (self.step - 1) / 100, np.float32)

    def load_tensors(self, tensors):
        pass


class FirstWeights:
    def poll(self):
        return WeightSnapshot(0, {})


def worker(replay) -> EnvWorker:
    rollout = Rollout(lambda: InProcess(counting), 1, ActsByStep(), GuidanceConfig("constant(0)"), False, 3, "test")
    return EnvWorker("w", rollout, replay, FirstWeights(), None)


def check(batch) -> None:
    """Every row says where it is from: image, action and reward must agree with its address."""
    assert [ref.store for ref in batch.refs] == ["online"] * 6 + ["pool"] * 2
    assert not batch.reward_mask[6:].any()
    for b, ref in enumerate(batch.refs):
        n, t = len(ref), np.arange(ref.start, ref.stop)
        assert batch.valid[b].tolist() == [True] * n + [False] * (6 - n)
        if ref.store == "pool":
            assert ref.trajectory in POOL_ROWS
            assert (batch.observation["pixels"][b, :n, 1, 1, 1] == t).all()
            continue
        pixels = batch.observation["pixels"][b, :n, 0, 0]
        assert (pixels[:, 0] == t).all()
        assert len(set(pixels[:, 1])) == 1
        assert np.allclose(batch.previous_action[b, 1:n, 0], (t[1:] - 1) / 100)
        assert (pixels[1:, 2] == t[1:] - 1 + 128).all()
        assert (batch.reward[b, :n] == (t > 0)).all()


@pytest.fixture
def folder(tmp_path):
    with TrajectoryStore.create(tmp_path / "pool") as pool:
        for i in range(4):
            trajectory = counting_trajectory(i, 9, POOL_SPEC)
            pixels = np.zeros((10, 64, 64, 3), np.uint8)
            pixels[:] = np.arange(10)[:, None, None, None]
            pool.append(type(trajectory)(POOL_SPEC.embodiment, {"pixels": pixels}, trajectory.action,
                                         trajectory.discount, trajectory.reward), POOL_SPEC)  # fmt: skip
    return tmp_path


def learn(sample, stop) -> list[tuple]:
    """Checks every batch while it is good; returns their refs."""
    seen = []
    while not stop():
        if (batch := sample()) is not None:
            check(batch)
            seen.append(batch.refs)
    return seen


def test_in_one_process(folder):
    replay = service(folder)
    working = worker(replay)
    seen = []
    while not replay.complete:
        working.tick()
        if (batch := replay.sample()) is not None:
            check(batch)
            seen.append(batch.refs)
    assert len(seen) == UPDATES
    assert {ref.trajectory for refs in seen for ref in refs if ref.store == "online"} == set(range(EPISODES))


@pytest.fixture(scope="module")
def ray_here():
    """Ray of this test alone. Without a token: whether there is one is settled when Ray is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
        )
        yield
        ray.shutdown()


def started(folder):
    actor = ray.remote(Actor).options(num_cpus=0, max_concurrency=4, max_restarts=-1).remote(folder)
    ray.get(actor.pid.remote())
    return actor


@pytest.mark.parametrize("beside", [True, False], ids=["same-node", "other-node"])
def test_over_ray(folder, ray_here, beside, monkeypatch):
    """The service in a process of its own; the learner cuts from the files, or takes batches from the object store.
    Every batch that was drawn is handed out in the end."""
    actor = started(folder)
    if not beside:
        monkeypatch.setattr(ray_links, "_here", lambda: "another node")
    batches = ray_links.RayBatchLink(actor)
    assert (batches._cut is not None) == beside
    link = ray_links.RayReplayLink(actor, "w")
    working, seen, done = worker(link), [], threading.Event()
    learner = threading.Thread(target=lambda: seen.extend(learn(batches.sample, done.is_set)))
    learner.start()
    try:
        end = time.monotonic() + SOON_S
        while not ray.get(actor.report.remote(0, ["w"]))["complete"] and time.monotonic() < end:
            working.tick()
        assert batches.finish(SOON_S)
    finally:
        done.set()
        learner.join()
        batches.close()
        ray.kill(actor)
    assert len(seen) == UPDATES
    assert {ref.trajectory for refs in seen for ref in refs if ref.store == "online"} == set(range(EPISODES))


def test_a_worker_waits_when_four_episodes_are_on_their_way(folder, ray_here):
    """The service is paused: a worker holds back instead of piling up episodes, and goes on with it."""
    actor = started(folder)
    pid, link = ray.get(actor.pid.remote()), ray_links.RayReplayLink(actor, "w")
    with counting() as env:
        spec = env.spec
    trajectory = one_episode(spec)
    os.kill(pid, signal.SIGSTOP)
    try:
        adding = threading.Thread(target=lambda: [link.add("w", i, trajectory) for i in range(6)])
        adding.start()
        adding.join(2)
        assert adding.is_alive()
        assert len(link._deliveries) == ray_links.IN_FLIGHT
    finally:
        os.kill(pid, signal.SIGCONT)
    adding.join(SOON_S)
    assert not adding.is_alive()
    assert link.flush(SOON_S)
    ray.kill(actor)


def test_a_service_that_was_paused_answers_all_who_asked_meanwhile(folder, ray_here):
    """A driver without an answer asks again: several reports then run, and save, at once."""
    actor = started(folder)
    pid = ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        asked = [actor.report.remote(0, ["w"]) for _ in range(100)]
        time.sleep(1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [report["collected"] for report in ray.get(asked, timeout=SOON_S)] == [0] * 100
    assert ray.get(actor.pid.remote(), timeout=SOON_S) == pid
    ray.kill(actor)


def test_a_lease_whose_answer_came_too_late_is_given_back(folder, ray_here, monkeypatch):
    """The service is paused for longer than its answer is waited for: the worker asks anew, and what the late answer
    took of the budget is collected all the same."""
    monkeypatch.setattr(ray_links, "DEADLINE_S", 0.5)
    actor = started(folder)
    pid = ray.get(actor.pid.remote())
    working, end, paused = worker(ray_links.RayReplayLink(actor, "w")), time.monotonic() + SOON_S, False
    while (collected := ray.get(actor.report.remote(0, ["w"]))["collected"]) < CONFIG.budget:
        assert time.monotonic() < end, f"{collected} of {CONFIG.budget} steps are collected"
        if collected == STEPS and not paused:
            os.kill(pid, signal.SIGSTOP)
            until = time.monotonic() + 3
            while time.monotonic() < until:
                working.tick()
            os.kill(pid, signal.SIGCONT)
            paused = True
        working.tick()
        ray.get(actor.sample.remote())
    assert paused
    with TrajectoryStore.open(folder / "o") as store:
        assert store.steps == CONFIG.budget
    ray.kill(actor)


def one_episode(spec):
    pixels = np.zeros((STEPS + 1, 64, 64, 3), np.uint8)
    action, ones = np.zeros((STEPS, spec.action_dim), np.float32), np.ones(STEPS, np.float32)
    return Trajectory(spec.embodiment, {"pixels": pixels}, action, ones, ones)


def test_the_service_is_killed_amid_draws_and_deliveries(folder, ray_here):
    """Three times. Every step of the budget is stored once, every batch is whole, the learner has its updates."""
    actor = started(folder)
    batches, link = ray_links.RayBatchLink(actor), ray_links.RayReplayLink(actor, "w")
    working, seen, done = worker(link), [], threading.Event()
    learner = threading.Thread(target=lambda: seen.extend(learn(batches.sample, done.is_set)))
    learner.start()
    kills, end = 0, time.monotonic() + SOON_S
    try:
        while time.monotonic() < end:
            working.tick()
            try:
                report = ray.get(actor.report.remote(0, ["w"]), timeout=5)
                if kills < 3 and report["collected"] >= (kills + 1) * STEPS:
                    os.kill(ray.get(actor.pid.remote(), timeout=5), signal.SIGKILL)
                    kills += 1
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                continue
            if report["complete"] and kills == 3:
                break
        assert batches.finish(SOON_S)
    finally:
        done.set()
        learner.join()
        batches.close()
        ray.kill(actor)
    assert kills == 3
    assert len(seen) >= UPDATES - 3 * 8  # what was drawn, but not yet handed out, when the service died
    with TrajectoryStore.open(folder / "o") as store:
        assert store.steps == CONFIG.budget
        assert len({store.catalog.id(row) for row in store.rows()}) == len(store.rows())


class Saver:
    """A learner whose saves take until they are allowed, and of which the first kills it if it is told so."""

    def __init__(self, folder):
        self._folder = folder

    def save(self, score):
        with (self._folder / "asked").open("a") as file:
            file.write(f"{score}\n")
        while not (self._folder / "allowed").exists():
            time.sleep(0.01)
        if (self._folder / "dies").exists():
            (self._folder / "dies").unlink()
            os._exit(1)
        return True


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_a_score_is_not_lost_where_a_save_is_still_under_way_or_its_learner_dies(dies, tmp_path, ray_here):
    if dies:
        (tmp_path / "dies").touch()
    learner = ray.remote(Saver).options(num_cpus=0, max_restarts=-1).remote(tmp_path)
    saves = ray_links.ScoredSaves(lambda score: learner.save.remote(score))

    def asked() -> list[str]:
        return (tmp_path / "asked").read_text().split() if (tmp_path / "asked").exists() else []

    def offer_until(condition) -> None:
        end = time.monotonic() + SOON_S
        while not condition():
            assert time.monotonic() < end, asked()
            saves.offer()
            time.sleep(0.01)

    saves.offer()
    offer_until(lambda: asked() == ["None"])
    saves.offer(12.5)  # an evaluation has ended while the save before it is under way
    assert asked() == ["None"]
    (tmp_path / "allowed").touch()
    offer_until(lambda: saves.score is None)
    assert asked().count("12.5") == 1
    ray.kill(learner)


def test_a_score_whose_own_save_died_is_offered_again(tmp_path, ray_here):
    (tmp_path / "dies").touch()
    (tmp_path / "allowed").touch()
    learner = ray.remote(Saver).options(num_cpus=0, max_restarts=-1).remote(tmp_path)
    saves, end = ray_links.ScoredSaves(lambda score: learner.save.remote(score)), time.monotonic() + SOON_S
    saves.offer(12.5)
    while saves.score is not None and time.monotonic() < end:
        saves.offer()
        time.sleep(0.01)
    assert saves.score is None
    assert (tmp_path / "asked").read_text().split()[:2] == ["12.5", "12.5"]
    ray.kill(learner)


class Hung:
    def pid(self):
        return os.getpid()

    def hang(self):
        hang_without_a_turn_for_python()


def test_a_process_that_hangs_is_replaced_once_it_is_killed(ray_here):
    """What the driver does with a part that does not answer. No thread of Python's gets a turn in it any more."""
    actor = ray.remote(Hung).options(num_cpus=0, max_concurrency=4, max_restarts=-1).remote()
    hung = ray.get(actor.pid.remote(), timeout=SOON_S)
    actor.hang.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        while True:  # until it does hang
            ray.get(actor.pid.remote(), timeout=1)
    ray_actors.end_process(ray.get_runtime_context().get_node_id(), hung)
    now, end = hung, time.monotonic() + 2 * SOON_S
    while now == hung and time.monotonic() < end:
        with contextlib.suppress(ray.exceptions.RayError):
            now = ray.get(actor.pid.remote(), timeout=5)
    assert now != hung
    assert not alive(hung)
    ray.kill(actor)


class Mortal:
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_while_it_is_waited_for_is_waited_for_again(ray_here):
    actor = ray.remote(Mortal).options(num_cpus=0, max_restarts=-1).remote()
    actor.die.remote()  # the question whether it is up comes after this
    ray_actors.wait_until_alive({"the part": actor}, SOON_S)
    ray.kill(actor)


def test_a_worker_imports_no_simulator_and_no_display():
    """RLlib's wrappers would import them into each."""
    names = "'dm_control', 'mujoco', 'OpenGL', 'cv2'"
    script = f"import sys, deploy.env_runner; print([m for m in ({names}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
