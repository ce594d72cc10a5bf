"""Cloning the prior actor from the rehearsal set (method, section 5): stacked frames, and vectors where the world
model sees any, to the action taken there.

<cache>/prior-<hash>/prior_actor.*    the result; the hash is of trajectories and settings
<cache>/prior-<hash>/metrics.jsonl    training and validation loss; "frames" counts steps
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsa import config as configs
from gsa.agent import storage
from gsa.agent.precision import autocast
from gsa.agent.prior_actor import PriorActor, cameras, frame_stack, random_shift
from gsa.agent.sizes import PIXELS, ObservationConfig, PriorConfig
from gsa.errors import FormatError, SpecMismatch, Unavailable, UsageError
from gsa.metrics import Meter, Progress, RunLog
from gsa.schema import SequenceRef, Spec
from learner.checkpoint import Checkpoints, Restored
from learner.compute import generator_for, set_up
from learner.config import CloneConfig, OptimiserConfig
from learner.optimiser import Optimiser
from replay_service.batches import SequenceSampler
from retrieval.store import TrajectoryStore

_log = logging.getLogger(__name__)
VERSION = 1  # of this training: a prior cached by another version is not taken
VALIDATION_STEPS = 2048  # of the held-out trajectories, at most
SPLIT, VALIDATION = 1 << 40, (1 << 40) + 1  # where their random draws stand among those of the training steps


def clone_prior(
    store: TrajectoryStore,
    rows: Sequence[int] | np.ndarray,
    network: PriorConfig,
    config: CloneConfig,
    cache: str | Path,
    progress: Progress | None = None,
    observation: ObservationConfig = PIXELS,
) -> PriorActor:
    """The prior actor of these trajectories: trained, or taken from `cache` where it was trained before.

    An interrupted training continues. The weights with the best validation loss, on trajectories held out, are the
    result; what the config leaves open is the paper's. Raises UsageError without trajectories, SpecMismatch where they
    are of several embodiments or lack an observation, Unavailable where the cache cannot be written.
    """
    rows, config = _by_id(store, rows), config.for_size()
    folder = prior_folder(store, rows, network, config, cache, observation)
    device = set_up(config.compute)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"Cannot keep the prior actor in {folder}: {error.strerror}.") from None
    with _alone(folder):
        try:
            return PriorActor.load(folder, device)
        except UsageError:
            pass  # never trained
        except FormatError as error:
            _log.warning("%s It is trained anew.", error)
        Cloning(store, rows, network, config, folder, device, observation).run(progress)
        return PriorActor.load(folder, device)


def prior_folder(
    store: TrajectoryStore,
    rows: Sequence[int] | np.ndarray,
    network: PriorConfig,
    config: CloneConfig,
    cache: str | Path,
    observation: ObservationConfig = PIXELS,
) -> Path:
    """Where the prior actor of these trajectories and settings is kept. The order of the rows does not matter, nor do
    the machine, its threads and how often a checkpoint is kept."""
    settings = configs.to_dict(config.for_size())
    settings["compute"] = {"precision": config.compute.precision}
    del settings["checkpoint_every_s"]
    content = [(store.catalog.id(row), int(store.catalog.crc[row])) for row in _by_id(store, rows).tolist()]
    networks = [configs.to_dict(network), configs.to_dict(observation)]
    key = json.dumps([VERSION, networks, settings, content], sort_keys=True)
    return Path(cache) / f"prior-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


class Steps(NamedTuple):
    """N steps to clone. What the prior actor does not see has a last dimension of 0."""

    frames: Tensor  # uint8 [N, 64, 64, 3·cameras·frames] up to the step
    vectors: Tensor  # float32 [N, V] at the step
    action: Tensor  # float32 [N, A] chosen there


class Cloning:
    """Owns one training of a prior actor, and its folder while it lasts."""

    def __init__(
        self, store: TrajectoryStore, rows: np.ndarray, network: PriorConfig, config: CloneConfig, folder: Path,
        device: torch.device, observation: ObservationConfig = PIXELS,
    ) -> None:  # fmt: skip
        self.store, self.network, self.config, self.folder, self.device = store, network, config, folder, device
        spec = _spec(store, rows)
        observation.require(spec.observation, "The prior actor", f"the embodiment {spec.embodiment}")
        self.prior = PriorActor.create(network, spec.action_dim, config.seed, device, observation)
        self.held_out, self.rows = split(rows, config.holdout, config.seed)
        self._sampler = SequenceSampler("pool", 2)  # two observations and the action between them
        self._sampler.extend(self.rows, store.catalog.length[self.rows])
        self._validation = self._validation_set()
        settings = OptimiserConfig(learning_rate=config.learning_rate, epsilon=1e-8, weight_decay=0.0)
        self._optimiser = Optimiser("prior", self.prior.named_parameters(), settings)
        self.step, self.best_step, self.best_loss, self.stale = 0, 0, float("inf"), 0
        self._best = self.prior.state_dict()
        self._checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        if (restored := self._restored()) is not None:
            self._restore(restored.state)
        self._meter = Meter("prior")

    def run(self, progress: Progress | None = None) -> None:
        """Trains to the end and writes the result."""
        config, log, saved_at = self.config, RunLog(self.folder, resume_frames=self.step), time.monotonic()
        batches = _ahead(self._batch, self.step)
        try:
            while self.step < config.steps and not self._stops_early():
                loss = self._update(next(batches))
                if self.step % config.evaluate_every == 0 or self.step == config.steps:
                    self._evaluate()
                    log.write(self.step, self._meter.stats())
                    if time.monotonic() - saved_at >= config.checkpoint_every_s:
                        self._checkpoints.save(self.step, self._state())
                        saved_at = time.monotonic()
                if progress is not None:
                    progress(self.step, config.steps, {"loss": loss, "validation_loss": self.best_loss})
        finally:
            batches.close()
            log.close()
        self._finish()

    def validation_loss(self) -> float:
        """Of the present weights on the held-out steps, images not shifted; nan where nothing was held out."""
        if self._validation is None:
            return float("nan")
        total, count = 0.0, len(self._validation.action)
        with torch.no_grad():
            for chunk in torch.arange(count).split(self.config.batch):
                frames, vectors, action = (x[chunk].to(self.device) for x in self._validation)
                total += cloning_loss(self._act(frames, vectors), action).item() * len(chunk)
        return total / count

    def _update(self, steps: Steps) -> float:
        generator = generator_for(self.device, self.config.seed, self.step)
        frames, vectors, action = (x.to(self.device) for x in steps)
        predicted = self._act(random_shift(frames, self.network.shift, generator), vectors)
        metrics = self._optimiser.step(cloning_loss(predicted, action))
        self.step += 1
        self._meter.mean({"loss": metrics["prior_loss"], "grad_norm": metrics["prior_grad_norm"]})
        self._meter.count("steps", rate=True)
        return metrics["prior_loss"]

    def _act(self, frames: Tensor, vectors: Tensor) -> Tensor:
        with autocast(self.device, self.config.compute.precision):
            return self.prior(frames, vectors)

    def _evaluate(self) -> None:
        """Measures, and keeps the weights if they are the best so far (or if nothing can tell)."""
        loss = self.validation_loss()
        self._meter.gauge("validation_loss", loss)
        if self._validation is None or loss < self.best_loss:
            self._best = copy.deepcopy(self.prior.state_dict())
            self.best_step, self.best_loss, self.stale = self.step, loss, 0
        else:
            self.stale += 1

    def _stops_early(self) -> bool:
        return self.config.patience > 0 and self.stale >= self.config.patience

    def _finish(self) -> None:
        storage.fill(self.prior, self._best, "The best prior")
        self.prior.save(self.folder, {
            "step": self.best_step, "validation_loss": _number(self.best_loss), "trajectories": len(self.rows),
            "held_out": len(self.held_out), "constant_loss": _number(self._constant_loss()),
        })  # fmt: skip
        shutil.rmtree(self._checkpoints.folder, ignore_errors=True)

    def _constant_loss(self) -> float:
        """What always answering with the mean action would score on the held-out steps: to judge the other by."""
        if self._validation is None:
            return float("nan")
        actions = self._validation.action
        return cloning_loss(actions.mean(0).expand_as(actions), actions).item()

    def _batch(self, step: int) -> Steps:
        rng = np.random.default_rng([self.config.seed, step])
        return self._cut(self._sampler.draw(self.config.batch, rng))

    def _cut(self, refs: Sequence[SequenceRef]) -> Steps:
        return cut_steps(self.store, refs, self.network.frames, self.prior.observation)

    def _validation_set(self) -> Steps | None:
        """All held-out steps or, where there are many, some of them, each once."""
        if not len(self.held_out):
            return None
        ends = np.cumsum(self.store.catalog.length[self.held_out], dtype=np.int64)
        rng = np.random.default_rng([self.config.seed, VALIDATION])
        chosen = np.sort(rng.choice(ends[-1], min(VALIDATION_STEPS, int(ends[-1])), replace=False))
        index = np.searchsorted(ends, chosen, side="right")
        starts = chosen - np.concatenate([[0], ends])[index]
        pairs = zip(self.held_out[index].tolist(), starts.tolist(), strict=True)
        return self._cut([SequenceRef("pool", row, start, start + 2) for row, start in pairs])

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step, "weights": self.prior.state_dict(), "optimiser": self._optimiser.state(),
            "best": self._best, "best_step": self.best_step, "best_loss": self.best_loss, "stale": self.stale,
        }  # fmt: skip

    def _restored(self) -> Restored | None:
        """The newest checkpoint. Where all are damaged it begins anew: a cache is not worth an error."""
        try:
            return self._checkpoints.load()
        except FormatError as error:
            _log.warning("%s The prior actor is trained from the start.", error)
            return None

    def _restore(self, state: dict[str, Any]) -> None:
        storage.fill(self.prior, state["weights"], "The checkpoint's prior actor")
        self._optimiser.restore(state["optimiser"])
        self._best = state["best"]
        self.step, self.best_step, self.stale = int(state["step"]), int(state["best_step"]), int(state["stale"])
        self.best_loss = float(state["best_loss"])


def cloning_loss(predicted: Tensor, actions: Tensor) -> Tensor:
    """Squared error, mean over steps and the embodiment's own action dimensions: [N, A] twice → a scalar.

    Both sides are of one embodiment, unpadded, so that the mask of the padded dimensions is all ones.
    """
    return (predicted.float() - actions).square().mean()


def cut_steps(
    store: TrajectoryStore, refs: Sequence[SequenceRef], frames: int, observation: ObservationConfig = PIXELS
) -> Steps:
    """The step at each ref's first observation."""
    stacks, vectors, actions = [], [], []
    for ref in refs:
        first = max(ref.start - frames + 1, 0)
        views = store.slice(ref.trajectory, first, ref.start + 2)
        stacks.append(frame_stack(cameras(views, observation), np.array([ref.start - first]), frames)[0])
        vectors.append(np.concatenate([np.zeros(0, np.float32), *(views[k][-2] for k, _ in observation.vectors)]))
        actions.append(views["action"][-1])
    return Steps(*(torch.from_numpy(np.stack(x)) for x in (stacks, vectors, actions)))


def split(rows: np.ndarray, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(held out, trained on): whole trajectories, at least one on either side where there are two."""
    n = min(max(round(holdout * len(rows)), 1), len(rows) - 1) if holdout else 0
    mixed = np.random.default_rng([seed, SPLIT]).permutation(rows)
    return mixed[:n], mixed[n:]


def _by_id(store: TrajectoryStore, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The rows without repeats, in the order of their trajectories' ids: the same in every store that has them."""
    unique = sorted(set(np.asarray(rows, np.int64).tolist()), key=store.catalog.id)
    if not unique:
        raise UsageError(
            "There are no trajectories to clone a prior actor from: retrieve some, or go without guidance."
        )
    return np.array(unique, np.int64)


def _spec(store: TrajectoryStore, rows: np.ndarray) -> Spec:
    specs = {store.spec(row).embodiment: store.spec(row) for row in rows.tolist()}
    if len(specs) > 1:
        raise SpecMismatch(f"One prior actor cannot clone several embodiments: {', '.join(sorted(specs))}.")
    return next(iter(specs.values()))


def _ahead(make: Callable[[int], Any], first: int) -> Generator[Any, None, None]:
    """make(first), make(first + 1), …: each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="clone-batches") as thread:
        index, pending = first, thread.submit(make, first)
        while True:
            ready, index = pending.result(), index + 1
            pending = thread.submit(make, index)
            yield ready


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for any other process that works in the folder. The lock goes with its holder, however that ends."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _number(value: float) -> float | None:
    """JSON has no nan or infinity."""
    return value if np.isfinite(value) else None
