"""What a run says it will need before it starts, against what such a run takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from deploy.config import FinetuneConfig
from deploy.forecast import Forecast, forecast, pretrain_forecast
from deploy.stages import pretrain
from gsa.agent.sizes import preset
from gsa.agent.world_model import WorldModel
from gsa.errors import UsageError
from gsa.schema import ArraySpec, Spec, Trajectory
from learner.config import PretrainConfig
from retrieval.store import TrajectoryStore

SPEC = Spec("toy/arm", {"pixels": ArraySpec((64, 64, 3), "uint8"), "joints": ArraySpec((7,), "float32")}, 4, 2)


def predicted(tmp_path: Path, **settings) -> Forecast:
    config = FinetuneConfig(task="gym/Toy", method="scratch", model="tiny", out=tmp_path / "a" / "run", **settings)
    return forecast(config.resolved(), preset("tiny").world_model, "tiny", SPEC, episode_steps=50)


def test_the_online_store_is_as_large_as_was_said(tmp_path: Path) -> None:
    steps, budget = 50, 1000  # frames: two an agent step
    said = predicted(tmp_path, budget_frames=budget, warmup_frames=100, warmup_episodes=1).on_disk["episodes"]
    with TrajectoryStore.create(tmp_path / "online") as store:
        for _ in range(budget // 2 // steps):
            observation = {k: np.zeros((steps + 1, *v.shape), v.dtype) for k, v in SPEC.observation.items()}
            store.append(
                Trajectory(
                    SPEC.embodiment, observation, np.zeros((steps, 4), np.float32), np.ones(steps, np.float32),
                    np.zeros(steps, np.float32), np.zeros(steps, np.uint8), np.zeros(steps, np.int64),
                    stats={"return": 1.0, "score": 2.0},
                ),
                SPEC,
            )  # fmt: skip
    taken = sum(path.stat().st_size for path in (tmp_path / "online").rglob("*") if path.is_file())
    assert taken <= said <= 1.05 * taken


def test_more_workers_and_a_longer_run_need_more(tmp_path: Path) -> None:
    small = predicted(tmp_path, workers=1)
    assert predicted(tmp_path, workers=8).memory > small.memory + (2 << 30)
    assert predicted(tmp_path, budget_frames=10**6).disk > 5 * small.disk
    assert predicted(tmp_path, local=True).memory < small.memory


def test_pretraining_leaves_about_what_was_said(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    with TrajectoryStore.create(tmp_path / "pool") as store:
        observation = {k: rng.integers(0, 9, (21, *v.shape)).astype(v.dtype) for k, v in SPEC.observation.items()}
        store.append(
            Trajectory(SPEC.embodiment, observation, np.zeros((20, 4), np.float32), np.ones(20, np.float32)), SPEC
        )
    config = PretrainConfig(model="tiny", updates=3, batch=2, length=8, checkpoint_every=1, keep=2)
    pretrain(tmp_path / "pool", config, tmp_path / "model")
    told = capsys.readouterr().err
    assert "of disk" in told
    assert "of memory" in told
    world_model = WorldModel.load(tmp_path / "model")
    said = pretrain_forecast(config, world_model.config, tmp_path / "model")
    taken = sum(f.stat().st_size for f in (tmp_path / "model").rglob("*") if f.is_file())
    assert taken <= said.disk <= 2 * taken
    assert pretrain_forecast(config, world_model.config, tmp_path, 4).memory > said.memory + (900 << 20)


def test_pretraining_without_room_does_not_begin(tmp_path: Path) -> None:
    said = pretrain_forecast(PretrainConfig(model="tiny"), preset("tiny").world_model, tmp_path / "model")
    with pytest.raises(UsageError, match="--keep or --model"):
        dataclasses.replace(said, free=1000).say()


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path, capsys) -> None:
    said = predicted(tmp_path)
    said.say()
    assert "of disk" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="make room"):
        dataclasses.replace(said, free=1000).say()
    dataclasses.replace(said, available=1000).say()
    assert "Warning: 0 MB of memory" in " ".join(capsys.readouterr().err.split())
