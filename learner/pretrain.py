"""Pre-training: one world model on a whole pool, from images and actions alone (method, section 3).

<out>/config.yaml          as it was asked for
<out>/checkpoints/         what continues it exactly
<out>/metrics.jsonl        losses, of each embodiment too; "frames" counts updates
<out>/world_model.*        the result, with the specs it was trained on
<out>/open_loop.png, .mp4  what it foresees beside what came
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
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
from learner.compute import generator_for, set_up
from learner.config import PretrainConfig
from learner.optimiser import Optimiser
from learner.ranks import Ranks
from learner.strip import save_open_loop
from replay_service.batches import PoolBatches, shared_observation, specs_of
from retrieval.store import TrajectoryStore

MAY_CHANGE = (  # on a resume; with another optimiser or precision it is another training from there on
    "updates", "optimiser", "compute", "log_every", "checkpoint_every", "keep", "strip_context", "strip_every",
    "deadline_s",
)  # fmt: skip


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

    Where several processes were started (learner.ranks) each calls this, and each trains on its share of every batch:
    the same gradients as one process makes, up to rounding. They continue each other's checkpoints, and exactly so if
    they are as many. Rank 0 writes. Where one is lost the others raise Unavailable.
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
        self.store, self.config, self.out = store, config, out
        self.ranks = Ranks.join(config.compute, config.deadline_s)
        if self.ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            _require_same(out, config)
        self.device = set_up(config.compute)
        self._checkpoints = Checkpoints(out / "checkpoints", config.keep)
        restored = self._checkpoints.load()
        rows = store.rows() if restored is None else self._rows_as_they_were(restored.state)
        observation = what_is_seen(store, rows, config)
        self.model = WorldModel.create(config.world_model(observation), config.seed, self.device)
        self.updates = 0
        self._optimiser = Optimiser("world_model", self.model.named_parameters(), config.optimiser, self.ranks.add_up)
        if restored is not None:
            self._restore(restored.state)
        self._trajectories = len(rows)
        self._batches = PoolBatches(
            store, config.batch, config.length, config.max_action_dim, config.seed, rows, 2, observation.specs(),
            (self.ranks.rank, self.ranks.size),
        )  # fmt: skip
        if restored is not None:
            self._batches.restore(restored.state["batches"])
        for what, number in (("updates done", self.updates), ("trajectories of the store", len(rows))):
            self.ranks.require_same(f"the {what}", number, self.device)
        self._saved = self.updates if restored is not None else None
        self._log = RunLog(out, resume_frames=self.updates) if self.ranks.first else None
        self._meter = Meter("pretrain")

    def run(self, progress: Progress | None = None, stop: threading.Event | None = None) -> int:
        """Trains to the end, or until `stop` is set in any process; leaves a checkpoint of where it got to. The updates
        done now."""
        config, before, stopped = self.config, self.updates, self._stopped(stop)
        while self.updates < config.updates and not stopped:
            metrics = self.update()
            if self.updates % config.log_every == 0 or self.updates == config.updates:
                self.log(self._meter.stats())
            if self.updates % config.checkpoint_every == 0:
                self.save()
            if config.strip_every and self.updates % config.strip_every == 0 and self.updates < config.updates:
                self.draw()
            if progress is not None:
                progress(self.updates, config.updates, {"loss": metrics["loss"], "recon": metrics["recon"]})
            stopped = self._stopped(stop)
        self.save()
        return self.updates - before

    def update(self) -> dict[str, float]:
        """One update on the next batch; the metrics of the whole batch."""
        batch = next(self._batches)
        data, groups = TensorBatch.from_batch(batch, self.device), self._embodiments(batch)
        shares = self._shares(data.valid, groups)
        loss, _, watched = self.model.loss(data, self._noise(), groups)
        step = self._optimiser.step(loss * shares[""])
        means = torch.stack([v.float() * shares[name.partition("/")[2]] for name, v in watched.items()])
        self.ranks.add_up([means])
        metrics = dict(zip(watched, means.tolist(), strict=True)) | {"grad_norm": step["world_model_grad_norm"]}
        self.updates += 1
        self._meter.mean({k: v for k, v in metrics.items() if v or "/" not in k})  # 0: none of it in this batch
        self._meter.gauge("skipped_steps", self._optimiser.skips)
        self._meter.count("updates", rate=True)
        return metrics

    def _shares(self, valid: Tensor, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's share of the steps in the whole batch, "", and of each group's: a mean over all processes is
        the sum of their means so weighted."""
        chosen = {"": valid} | {name: valid & rows[:, None] for name, rows in groups.items()}
        own = torch.stack([rows.sum() for rows in chosen.values()]).float()
        whole = own.clone()
        self.ranks.add_up([whole])
        return dict(zip(chosen, own / whole.clamp(min=1), strict=True))

    def _noise(self) -> Tensor:
        """The random numbers of this process's sequences: the rows that one process alone would draw for them."""
        generator = generator_for(self.device, self.config.seed, self.updates)
        return self.model.draw((self.config.batch, self.config.length), generator)[self._batches.part]

    def save(self) -> None:
        """A checkpoint, unless there is one of this update."""
        if self._saved != self.updates:
            if self.ranks.first:
                self._checkpoints.save(self.updates, self._state())
            self._saved = self.updates

    def finish(self) -> None:
        """Saves the model as it is, and draws what it foresees."""
        if self.ranks.first:
            specs = {name: spec.to_json() for name, spec in self.store.specs.items()}
            store = {"id": self.store.id, "trajectories": self._trajectories, "specs": specs}
            self.model.save(self.out, {"updates": self.updates, "stores": [store]})
        self.draw()

    def draw(self) -> None:
        """Draws and logs what the model foresees now."""
        if self.ranks.first:
            c = self.config
            error = save_open_loop(self.out / "open_loop", self.model, self.store, c.length, c.strip_context)
            self.log({"pretrain/open_loop_error": error})

    def log(self, values: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write(self.updates, values)

    def close(self) -> None:
        self._batches.close()
        if self._log is not None:
            self._log.close()
        self.ranks.close()

    def _stopped(self, stop: threading.Event | None) -> bool:
        """Whether any process was told to stop: all of them must end at the same update."""
        told = torch.tensor([float(stop is not None and stop.is_set())], device=self.device)
        self.ranks.add_up([told])
        return bool(told.item())

    def _embodiments(self, batch: Batch) -> dict[str, Tensor]:
        """The sequences of each embodiment, name → bool [B], so that its losses are told; none where there is one."""
        if len(self.store.specs) < 2:
            return {}
        names = np.array([self.store.spec(ref.trajectory).embodiment for ref in batch.refs])
        return {name: torch.as_tensor(names == name, device=self.device) for name in sorted(self.store.specs)}

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
