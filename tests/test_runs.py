"""Whole runs with every real part: in one process, and over Ray and Redis with a worker killed on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.environment import make
from deploy import run as runs
from deploy import stages
from deploy.config import FinetuneConfig
from deploy.redis_server import find_binary
from gsa import config as configs
from gsa.metrics import read_log
from gsa.schema import Controller, Trajectory
from learner.config import CloneConfig, PretrainConfig
from retrieval.store import TrajectoryStore
from tests.gym_counting import STEPS
from tests.processes import kill_at, start

IMPORTS = ("tests.gym_counting",)
TASK = "gym/Counting-v0"
BUDGET = 200


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> tuple[Path, Path]:
    """A store with trajectories of the task's embodiment and of a foreign one, and a world model trained on both."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    with TrajectoryStore.create(folder / "store") as store, make(TASK, imports=IMPORTS) as env:
        for i in range(6):
            observations, actions = [env.reset(i)], []
            for _ in range(STEPS):
                actions.append(np.float32([np.clip(0.5 + 0.1 * rng.standard_normal(), -1, 1), 0]))
                observations.append(env.step(actions[-1]).observation)
            store.append(
                _trajectory(env.spec.embodiment, observations, np.stack(actions), f"counting-{i % 2}"), env.spec
            )
        foreign = type(env.spec)("test/other", env.spec.observation, action_dim=5)
        for _ in range(3):
            other = _trajectory("test/other", observations, rng.uniform(-1, 1, (STEPS, 5)).astype(np.float32), "other")
            store.append(other, foreign)
    settings = PretrainConfig(model="tiny", updates=3, batch=4, length=8)
    stages.pretrain(folder / "store", settings, folder / "model")
    return folder / "store", folder / "model"


def config(out: Path, pool: tuple[Path, Path] | None = None, **changes) -> FinetuneConfig:
    store, model = pool or (None, None)
    defaults = {
        "task": TASK, "imports": IMPORTS, "store": store, "world_model": model, "out": out, "method": "gsa" if pool else
        "scratch", "model": "tiny", "budget_frames": BUDGET, "warmup_frames": 40, "warmup_episodes": 1, "batch": 4,
        "length": 8, "train_ratio": 4.0, "retrieve_k": 50, "eval_every_frames": 100, "eval_episodes": 1,
        "final_episodes": 2, "imagination_starts": 16, "clone": CloneConfig(steps=4, batch=8, evaluate_every=2),
    }  # fmt: skip
    return FinetuneConfig(**{**defaults, **changes})


def agent_weights(run: Path) -> dict[str, np.ndarray]:
    return {f"{f.stem}/{k}": v for f in (run / "agent").glob("*.safetensors") for k, v in load_file(f).items()}


def online(run: Path) -> list[Trajectory]:
    with TrajectoryStore.open(run / "online") as store:
        return [store.read(row) for row in range(len(store))]


def check_counts(run: Path, budget: int = BUDGET) -> None:
    """Every frame of the budget was collected once, every episode is whole and in order."""
    trajectories = online(run)
    assert sum(map(len, trajectories)) == budget
    assert len({t.id for t in trajectories}) == len(trajectories)
    for t in trajectories:
        assert (t.observation["pixels"][:, 0, 0, 0] == np.arange(len(t) + 1)).all()
        assert t.reward is not None
    last = [row for row in read_log(run) if "replay/collected" in row][-1]
    assert last["replay/collected"] == budget
    assert last["replay/target_reached"] == 1


def test_a_local_run_is_deterministic_and_exact(pool, tmp_path):
    one = runs.finetune(config(tmp_path / "one", pool, local=True))
    two = runs.finetune(config(tmp_path / "two", pool, local=True))
    check_counts(one)
    first, second = agent_weights(one), agent_weights(two)
    assert first.keys() == second.keys()
    assert all((first[k] == second[k]).all() for k in first)
    for a, b in zip(online(one), online(two), strict=True):
        assert (a.action == b.action).all()
        assert (a.policy_version == b.policy_version).all()
    losses = [[row.get("learner/world_model_loss") for row in read_log(run)] for run in (one, two)]
    assert losses[0] == losses[1]
    other = runs.finetune(config(tmp_path / "three", pool, local=True, seed=1))
    assert any((first[k] != v).any() for k, v in agent_weights(other).items())


def test_a_run_leaves_everything_its_report_needs(pool, tmp_path):
    run = runs.finetune(config(tmp_path / "run", pool, local=True))
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "rehearsal.json", "contact_sheet.png", "video.mp4", "report.html", "agent", "prior"} <= names
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert set(evaluation["policies"]) == {"random", "prior", "finetuned"}
    rehearsed = json.loads((run / "rehearsal.json").read_text())
    assert sorted(rehearsed["rows"]) == list(range(6))  # the foreign embodiment is never rehearsed
    guided = [t for t in online(run) if (t.controller == Controller.PRIOR).any()]
    assert guided
    import gsa

    policy = gsa.load_policy(run / "agent")
    policy.reset()
    assert policy.act(np.zeros((64, 64, 3), np.uint8)).shape == (2,)


@pytest.mark.parametrize("method", ["scratch", "naive", "rehearsal", "random-rehearsal", "jsrl"])
def test_every_method_runs(method, pool, tmp_path):
    ends = method == "scratch"  # one of them with a head for tasks that end
    run = runs.finetune(config(tmp_path / method, pool, method=method, local=True, final_episodes=1, learn_end=ends))
    check_counts(run)
    controllers = np.concatenate([t.controller for t in online(run)])
    assert (controllers == Controller.PRIOR).any() == (method == "jsrl")
    assert (run / "rehearsal.json").exists() == (method not in ("scratch", "naive"))


@pytest.mark.timeout(600)
def test_a_distributed_run_survives_the_death_of_its_workers_and_its_replay_service_with_every_step(pool, tmp_path):
    """Real Ray, Redis and processes. Both workers are killed by SIGKILL, so that only their successors can go on; then
    the replay service, in the midst of leases and deliveries."""
    out = tmp_path / "run"
    settings = config(out, pool, workers=2, task="gym/SlowCounting-v0", method="naive", budget_frames=BUDGET)
    configs.save(settings, tmp_path / "config.yaml")
    gone = "127.0.0.1:1"  # a cluster that is gone must not keep a run from starting its own
    process = start(tmp_path / "log", "--config", str(tmp_path / "config.yaml"), RAY_ADDRESS=gone)
    try:
        workers = kill_at(process, out, STEPS, "GSAEnvRunner")
        services = kill_at(process, out, 4 * STEPS, "ReplayActor")
        code = process.wait(400)
    finally:
        process.kill()
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    assert (workers, services) == (2, 1)
    check_counts(out)
    assert max(row.get("driver/worker_restarts", 0) for row in read_log(out)) >= 1
    versions = np.concatenate([t.policy_version for t in online(out)])
    assert versions.max() > 0  # weights reached the workers, and Redis is the only way


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_outlives_its_redis_twice_with_every_step(pool, tmp_path):
    """The run's own server is killed by SIGKILL, and the one that takes its place too. Weights go on arriving."""
    out = tmp_path / "run"
    settings = config(out, pool, workers=2, task="gym/SlowCounting-v0", method="naive", budget_frames=BUDGET)
    configs.save(settings, tmp_path / "config.yaml")
    server = Path(find_binary()).name
    process = start(tmp_path / "log", "--config", str(tmp_path / "config.yaml"))
    try:
        killed = [kill_at(process, out, steps, server) for steps in (2 * STEPS, 5 * STEPS)]
        code = process.wait(400)
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    assert code == 0, said[-3000:]
    assert killed == [1, 1]
    check_counts(out)
    assert said.count("was started again") == 2
    versions = [int(t.policy_version.max()) for t in online(out)]
    assert max(versions[-3:]) > max(versions[:5]), "no weights since the second death"


STARTS = """
import sys
from contextlib import ExitStack
from pathlib import Path
import ray._private.services as services

folder = Path(sys.argv[1])
script = folder / "raylet"
script.write_text(f'#!/bin/sh\\nmkdir {folder}/died 2>/dev/null && exit 1\\nexec {services.RAYLET_EXECUTABLE} "$@"\\n')
script.chmod(0o755)
services.RAYLET_EXECUTABLE = str(script)
from deploy.distributed import start_ray
import ray

with ExitStack() as stack:
    start_ray(None, 2, stack)
    print("answers", ray.get(ray.remote(lambda: 7).remote(), timeout=60))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_ray_that_dies_as_it_starts_is_started_again(tmp_path):
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    done = subprocess.run(
        [sys.executable, "-c", STARTS, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert "answers 7" in done.stdout, done.stderr
    assert "Ray did not start" in done.stderr and (tmp_path / "died").exists()


def _trajectory(embodiment: str, observations: list, actions: np.ndarray, source: str) -> Trajectory:
    pixels = np.stack([o["pixels"] for o in observations])
    return Trajectory(embodiment, {"pixels": pixels}, actions, np.ones(len(actions), np.float32), source=source)
