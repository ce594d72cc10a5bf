"""Pre-training: one world model on a whole pool, from images and actions alone (method, section 3).

<out>/config.yaml          as it was asked for
<out>/checkpoints/         what continues it exactly
<out>/metrics.jsonl        losses; "frames" counts updates
<out>/world_model.*        the result, with the specs it was trained on
<out>/open_loop.png        what it foresees beside what came
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsa import config as configs
from gsa.agent import storage
from gsa.agent.sizes import ObservationConfig
from gsa.agent.world_model import TensorBatch, WorldModel
from gsa.errors import UsageError
from gsa.metrics import Meter, Progress, RunLog
from gsa.schema import Batch
from learner.checkpoint import Checkpoints
from learner.compute import generator_for, set_up, to_floats
from learner.config import PretrainConfig
from learner.optimiser import Optimiser
from learner.strip import save_strip
from replay_service.batches import PoolBatches, shared_observation, specs_of
from retrieval.store import TrajectoryStore

MAY_CHANGE = ("updates", "compute", "log_every", "checkpoint_every", "keep", "strip_context")  # on a resume


def pretrain(
    store: TrajectoryStore,
    config: PretrainConfig,
    out: str | Path,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> WorldModel:
    """Trains until `config.updates` updates are done or `stop` is set; saves the model to `out` either way.

    A folder that has a pre-training continues it, exactly as if it had not stopped: on the pool as it was then, with
    the same config but for what `MAY_CHANGE` lists. Raises UsageError where config or store are others.
    """
    training = Pretraining(store, config, Path(out))
    try:
        if training.run(progress, stop) or not (training.out / "world_model.json").exists():
            training.finish()
    finally:
        training.close()
    return training.model


class Pretraining:
    """Owns a pre-training and its folder: model, optimiser, batches, checkpoints, log."""

    def __init__(self, store: TrajectoryStore, config: PretrainConfig, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        _require_same(out, config)
        self.store, self.config, self.out = store, config, out
        self.device = set_up(config.compute)
        self._checkpoints = Checkpoints(out / "checkpoints", config.keep)
        restored = self._checkpoints.load()
        rows = store.rows() if restored is None else self._rows_as_they_were(restored.state)
        observation = what_is_seen(store, rows, config)
        self.model = WorldModel.create(config.world_model(observation), config.seed, self.device)
        self.updates = 0
        self._optimiser = Optimiser("world_model", self.model.named_parameters(), config.optimiser)
        if restored is not None:
            self._restore(restored.state)
        self._trajectories = len(rows)
        self._batches = PoolBatches(
            store, config.batch, config.length, config.max_action_dim, config.seed, rows, 2, observation.specs()
        )
        if restored is not None:
            self._batches.restore(restored.state["batches"])
        self._saved = self.updates if restored is not None else None
        self._log = RunLog(out, resume_frames=self.updates)
        self._meter = Meter("pretrain")

    def run(self, progress: Progress | None = None, stop: threading.Event | None = None) -> int:
        """Trains to the end, or until `stop` is set; leaves a checkpoint of where it got to. The updates done now."""
        config, before = self.config, self.updates
        while self.updates < config.updates and not (stop is not None and stop.is_set()):
            metrics = self.update()
            if self.updates % config.log_every == 0 or self.updates == config.updates:
                self._log.write(self.updates, self._meter.stats())
            if self.updates % config.checkpoint_every == 0:
                self.save()
            if progress is not None:
                progress(self.updates, config.updates, {"loss": metrics["loss"], "recon": metrics["recon"]})
        self.save()
        return self.updates - before

    def update(self) -> dict[str, float]:
        """One update on the next batch."""
        batch = next(self._batches)
        data = TensorBatch.from_batch(batch, self.device)
        generator = generator_for(self.device, self.config.seed, self.updates)
        loss, _, watched = self.model.loss(data, generator, self._embodiments(batch))
        step = self._optimiser.step(loss)
        metrics = to_floats("", watched) | {"grad_norm": step["world_model_grad_norm"]}
        self.updates += 1
        self._meter.mean(metrics)
        self._meter.gauge("skipped_steps", self._optimiser.skips)
        self._meter.count("updates", rate=True)
        return metrics

    def save(self) -> None:
        """A checkpoint, unless there is one of this update."""
        if self._saved != self.updates:
            self._checkpoints.save(self.updates, self._state())
            self._saved = self.updates

    def finish(self) -> None:
        """Saves the model as it is, and the strip."""
        specs = {name: spec.to_json() for name, spec in self.store.specs.items()}
        store = {"id": self.store.id, "trajectories": self._trajectories, "specs": specs}
        self.model.save(self.out, {"updates": self.updates, "stores": [store]})
        error = save_strip(
            self.out / "open_loop.png", self.model, self.store, self.config.length, self.config.strip_context
        )
        self._log.write(self.updates, {"pretrain/open_loop_error": error})

    def close(self) -> None:
        self._batches.close()
        self._log.close()

    def _embodiments(self, batch: Batch) -> dict[str, Tensor]:
        """The sequences of each embodiment, name → bool [B], so that its losses are told; none where there is one."""
        if len(self.store.specs) < 2:
            return {}
        names = np.array([self.store.spec(ref.trajectory).embodiment for ref in batch.refs])
        return {str(name): torch.as_tensor(names == name, device=self.device) for name in np.unique(names)}

    def _state(self) -> dict[str, Any]:
        return {
            "store": self.store.id,
            "trajectories": self._trajectories,
            "updates": self.updates,
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state(),
            "batches": self._batches.state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        storage.fill(self.model, state["model"], "The checkpoint's world model")
        self._optimiser.restore(state["optimiser"])
        self.updates = int(state["updates"])

    def _rows_as_they_were(self, state: dict[str, Any]) -> np.ndarray:
        """The rows the pre-training began with: a pool only grows, and what came since would change the draws."""
        if state["store"] != self.store.id:
            raise UsageError(
                f"{self.out} is a pre-training on store {state['store']}; {self.store.path} is {self.store.id}. "
                f"Continue on its own store, or give another folder."
            )
        return self.store.rows()[: int(state["trajectories"])]


def what_is_seen(store: TrajectoryStore, rows: np.ndarray, config: PretrainConfig) -> ObservationConfig:
    """Of what all embodiments observe under one name and in one size: what is asked for, or all of it."""
    if not len(rows):
        raise UsageError(f"The store {store.path} has no trajectories to train on; ingest some first.")
    return ObservationConfig.of(shared_observation(specs_of(store, rows), config.max_action_dim), config.observe)


def _require_same(out: Path, config: PretrainConfig) -> None:
    """Writes the config, or compares it with the one the folder was begun with."""
    path = out / "config.yaml"
    if path.exists():
        before, now = configs.to_dict(configs.load(PretrainConfig, path)), configs.to_dict(config)
        different = [f"{k} {before[k]} → {now[k]}" for k in now if k not in MAY_CHANGE and before[k] != now[k]]
        if different:
            raise UsageError(
                f"{out} holds a pre-training with other settings ({'; '.join(different)}): "
                f"continue it with its own, or give another folder."
            )
    configs.save(config, path)
