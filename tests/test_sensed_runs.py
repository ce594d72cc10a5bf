"""Whole runs of a robot with a camera and joints: seen by both, or by its joints alone."""

import dataclasses

import numpy as np
import pytest

import gsa
from actors.environment import make
from deploy import run as runs
from deploy import stages
from deploy.config import FinetuneConfig
from gsa.agent.sizes import ObservationConfig, preset
from gsa.agent.world_model import WorldModel
from gsa.errors import SpecMismatch
from gsa.metrics import read_log
from gsa.schema import Trajectory
from learner.config import CloneConfig, ComputeConfig, LearnerConfig, PretrainConfig
from retrieval.store import TrajectoryStore
from tests.gym_counting import STEPS

IMPORTS = ("tests.gym_counting",)
CPU = ComputeConfig("cpu", threads=1)


def make_pool(path, task):
    rng = np.random.default_rng(0)
    with TrajectoryStore.create(path) as store, make(task, imports=IMPORTS) as env:
        for i in range(3):
            seen, actions = [env.reset(i)], rng.uniform(-1, 1, (STEPS, 2)).astype(np.float32)
            seen += [env.step(action).observation for action in actions]
            observation = {k: np.stack([o[k] for o in seen]) for k in env.spec.observation}
            store.append(Trajectory(env.spec.embodiment, observation, actions, np.ones(STEPS, np.float32)), env.spec)


def config(tmp_path, task):
    return FinetuneConfig(
        task=task, imports=IMPORTS, store=tmp_path / "pool", world_model=tmp_path / "model", out=tmp_path / "run",
        local=True, budget_frames=80, warmup_frames=40, warmup_episodes=1, batch=4, length=8, train_ratio=2.0,
        retrieve_k=2, eval_every_frames=1000, final_episodes=1, imagination_starts=8,
        clone=CloneConfig(steps=2, batch=8), learner=LearnerConfig(compute=CPU),
    )  # fmt: skip


@pytest.mark.parametrize("task", ["gym/Sensed-v0", "gym/Sensed-v0@joints"])
def test_a_robot_with_joints_goes_the_whole_way(task, tmp_path):
    make_pool(tmp_path / "pool", task)
    settings = PretrainConfig(model="tiny", updates=2, batch=2, length=8, log_every=1, compute=CPU)
    stages.pretrain(tmp_path / "pool", settings, tmp_path / "model")
    run = runs.finetune(config(tmp_path, task))
    assert (run / "video.mp4").exists() == (task == "gym/Sensed-v0")
    metrics = {name for row in read_log(run) for name in row}
    assert ("learner/world_model_vector_error" in metrics) == (task == "gym/Sensed-v0")
    policy = gsa.load_policy(run / "agent")
    with make(task, imports=IMPORTS) as env:
        first = env.reset(0)
        assert np.abs(policy.act(first)).max() <= 1
        assert policy._policy.model.observation.names == tuple(sorted(first))
    with pytest.raises(SpecMismatch, match=r"The policy sees .*joints.*the observation has nothing"):
        policy.act({})


def test_a_task_that_lacks_what_the_model_sees_is_refused_before_anything_is_written(tmp_path):
    make_pool(tmp_path / "pool", "gym/Sensed-v0")
    settings = PretrainConfig(model="tiny", updates=1, batch=2, length=8, compute=CPU)
    stages.pretrain(tmp_path / "pool", settings, tmp_path / "model")
    with pytest.raises(
        SpecMismatch, match=r"The world model sees camera .*joints .*the task gym/Counting-v0 has pixels"
    ):
        runs.finetune(config(tmp_path, "gym/Counting-v0"))
    assert not (tmp_path / "run").exists()
    scratch = dataclasses.replace(config(tmp_path, "gym/Sensed-v0"), method="scratch", model="tiny")
    assert (runs.finetune(scratch) / "agent").exists()


def test_a_pool_or_a_model_that_does_not_fit_the_task_is_one_sentence_with_both_sides(tmp_path):
    task = "gym/Sensed-v0"
    with make(task, imports=IMPORTS) as env:
        spec = env.spec
    seen = ObservationConfig.of(spec.observation)
    sizes = preset("tiny").world_model
    WorldModel.create(dataclasses.replace(sizes, observation=seen), 0).save(tmp_path / "model")
    WorldModel.create(dataclasses.replace(sizes, observation=seen, max_action_dim=1), 0).save(tmp_path / "narrow")
    camera = {"camera": spec.observation["camera"]}
    for name, other in {
        "blind": dataclasses.replace(spec, observation=camera), "wide": dataclasses.replace(spec, action_dim=3),
    }.items():  # fmt: skip
        with TrajectoryStore.create(tmp_path / name) as store:
            store.add_spec(other)
    for changes, says in (
        ({"store": tmp_path / "blind"}, r"The world model sees camera .*joints \[2\] float; the store .*has camera"),
        ({"store": tmp_path / "wide"}, r"The store .* and the task gym/Sensed-v0 do not fit: action_dim: 3 / 2"),
        (
            {"store": tmp_path / "wide", "world_model": tmp_path / "narrow"},
            r"The world model takes at most 1 actions; the task gym/Sensed-v0 has 2",
        ),
    ):
        with pytest.raises(SpecMismatch, match=says):
            runs.finetune(dataclasses.replace(config(tmp_path, task), **changes))
        assert not (tmp_path / "run").exists()
