"""The replay service and the learner as Ray actors: thin shells around the plain classes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy import parts
from deploy.checkpointing import RunCheckpoints
from deploy.config import FinetuneConfig
from deploy.evaluate import Evaluator
from deploy.faults import Warnings
from deploy.provenance import require_same_sources
from deploy.ray_links import BatchSource, RayBatchLink, where
from gsa.broadcast import RedisPublisher, RedisSubscriber
from gsa.errors import GsaError, Unavailable
from gsa.schema import Batch, Lease, NoLease, SequenceRef, Trajectory, WeightSnapshot
from retrieval.files import replace_file

DEADLINE_S = 60.0
LEARNER_RESTARTS = 100
PRIOR = "prior"  # the group of weights that the prior actor is published in


class ReplayActor:
    """Owns the run's ReplayService; restarted by Ray, it finds every acknowledged episode in the online store."""

    def __init__(self, config: FinetuneConfig, run: Path, sources: str) -> None:
        require_same_sources(sources, "The replay service")
        self._state, self._saving = run / "replay.json", threading.Lock()
        self._service = parts.replay_service(config, run)
        if self._state.exists():
            self._service.restore(json.loads(self._state.read_text()))

    def lease(self, worker: str, held: Collection[int]) -> Lease | NoLease:
        return self._service.lease(worker, held)

    def add(self, worker: str, episode: int, trajectory: Trajectory) -> bool:
        return self._service.add(worker, episode, trajectory)

    def release(self, worker: str, episode: int | None = None) -> int:
        return self._service.release(worker, episode)

    def about(self) -> BatchSource:
        here = ray.get_runtime_context().get_node_id()
        return BatchSource(here, self._service.stores, self._service.layout)

    def draw(self, n: int) -> list[tuple[SequenceRef, ...]]:
        """What the next batches are made of: `n`, or fewer where the service says wait."""
        drawn: list[tuple[SequenceRef, ...]] = []
        while len(drawn) < n and (refs := self._service.draw()) is not None:
            drawn.append(refs)
        return drawn

    def sample(self) -> Batch | None:
        return self._service.sample()

    def rewind(self, batches: int) -> None:
        self._service.rewind(batches)

    def report(self, cursor: int, living: Collection[str]) -> dict[str, Any]:
        """What the driver asks for once a round, and which workers answered it. Saves, on the way, what a restart
        cannot find in the store."""
        service = self._service
        service.renew(living)
        try:  # one after the other: a driver that had no answer asks again while this goes on
            with self._saving, replace_file(self._state) as file:
                file.write(json.dumps(service.state()).encode())
        except OSError as error:
            raise Unavailable(f"Cannot write {self._state}: {error.strerror}. Free some space.") from None
        complete = service.complete  # first: what is read after it holds all of a complete run
        episodes, cursor = service.drain_episodes(cursor)
        return {
            "complete": complete, "collected": service.collected, "frames": service.frames, "stats": service.stats(),
            "episodes": episodes, "cursor": cursor, "where": where(),
        }  # fmt: skip


class LearnerActor:
    """Owns the FineTuner, its publisher and its checkpoints; learns in a thread of its own, free of the driver.

    Restarted by Ray or with the run, it goes on from its newest checkpoint; what it had learned since is learned
    again, from other batches.
    """

    def __init__(self, config: FinetuneConfig, run: Path, replay: Any, redis_url: str, sources: str) -> None:
        require_same_sources(sources, "The learner")
        self._run = run
        self._config = config
        self._warnings = Warnings()
        about = parts.Architecture.load(run)
        self._weights = RedisPublisher(redis_url, about.run)
        self._prior = None
        if about.prior is not None:
            self._prior = RedisPublisher(redis_url, about.run, PRIOR)  # kept, as it republishes into an empty server
            self._prior.publish(WeightSnapshot(0, parts.prior_tensors(run)))
        self._tuner = parts.fine_tuner(config, run)
        self._checkpoints = RunCheckpoints(run, config)
        restored = self._checkpoints.load()
        if restored is not None:
            self._tuner.restore(restored.state["tuner"])
        ray.get(replay.rewind.remote(self._tuner.updates), timeout=DEADLINE_S)
        self._batches = RayBatchLink(replay)
        self._loop = parts.learner_loop(config, self._tuner, self._batches.sample, self._weights)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._learn, name="learner", daemon=True)
        self._thread.start()

    def report(self) -> dict[str, Any]:
        """What was counted; what is wrong with the broadcast, as a sentence, or ""; warnings since the last call.

        Raises what ended the learning, if anything did."""
        if self._error is not None:
            raise GsaError(f"The learner stopped: {self._error}") from self._error
        stats = {**self._loop.stats(), **self._weights.stats(), **self._checkpoints.stats()}
        told = {"trouble": self._weights.trouble, "warnings": self._warnings.take()}
        return {"stats": stats, **told, "where": where()}

    def save(self, frames: int, score: float | None, wait: bool) -> bool:
        """Saves what it has learned, if that is due; with `wait` in any case, and until it is on disk."""
        if wait or score is not None or self._checkpoints.due(frames):
            self._checkpoints.flush()  # the one before it, while the learning goes on
            with self._loop.turn:
                self._checkpoints.save(frames, {"tuner": self._tuner.state()}, score)
        if wait:
            self._checkpoints.flush()
        return True

    def finish(self) -> str:
        """Learns from what is drawn, stops, saves the agent and lets its weights on Redis expire.

        Returns the agent's folder."""
        if self._thread.is_alive():
            self._batches.finish(deadline_s=60)
        self._stop.set()
        self._thread.join(timeout=120)
        if self._thread.is_alive():
            raise GsaError("The learner did not end its update within 120 s.")
        self._checkpoints.flush()
        folder = parts.save_agent(self._tuner, self._config, self._run)
        for publisher in (self._weights, self._prior):
            if publisher is not None:
                publisher.retire()
        return str(folder)

    def _learn(self) -> None:
        try:
            self._loop.run(self._stop)
        except BaseException as error:
            self._error = error


class EvaluatorActor:
    """Owns an Evaluator with a subscription of its own."""

    def __init__(self, config: FinetuneConfig, about: parts.Architecture, redis_url: str, sources: str) -> None:
        require_same_sources(sources, "The evaluator")
        parts.limit_threads(1)
        self._evaluator = Evaluator(config, about, RedisSubscriber(redis_url, about.run))

    def evaluate(self, episodes: int) -> dict[str, float]:
        return self._evaluator.evaluate(episodes)

    def report(self) -> dict[str, Any]:
        """That it lives, also while it evaluates."""
        return {"where": where()}


def start_replay(config: FinetuneConfig, run: Path, name: str, sources: str) -> Any:
    """The replay service as a named actor that outlives its crashes, beside the driver, where the run folder is."""
    actor = ray.remote(ReplayActor).options(
        name=name, num_cpus=1, max_restarts=-1, max_concurrency=4, scheduling_strategy=_here(soft=False)
    )
    return actor.remote(config, run, sources)


def start_evaluator(config: FinetuneConfig, about: parts.Architecture, redis_url: str, sources: str) -> Any:
    """The evaluator, beside the driver if it can; Ray restarts it if it dies."""
    actor = ray.remote(EvaluatorActor).options(
        num_cpus=1, max_restarts=-1, max_concurrency=2, scheduling_strategy=_here(soft=True)
    )
    return actor.remote(config, about, redis_url, sources)


def start_learner(config: FinetuneConfig, run: Path, replay: Any, redis_url: str, sources: str) -> Any:
    """The learner, on a GPU if it is to use one: beside the driver if it can, else where the run folder is shared. Ray
    restarts it if it dies."""
    device = config.learner.compute.device
    gpus = 1 if device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1) else 0
    actor = ray.remote(LearnerActor).options(
        num_cpus=1,
        num_gpus=gpus,
        max_restarts=LEARNER_RESTARTS,
        max_concurrency=3,
        scheduling_strategy=_here(soft=True),
    )
    return actor.remote(config, run, replay, redis_url, sources)


def _here(soft: bool) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=soft)


def end_process(node: str, pid: int) -> None:
    """Kills a process of Ray's that hangs: ray.kill only asks it to end. Ray starts its actor again."""
    if node == ray.get_runtime_context().get_node_id():
        _end_process(pid)
        return
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(_end_process).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pid)


def _end_process(pid: int) -> None:
    with contextlib.suppress(OSError):  # it has ended
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():  # not another that has its number by now
            os.kill(pid, signal.SIGKILL)


def wait_until_alive(actors: Mapping[str, Any], deadline_s: float = 180.0) -> None:
    """Raises GsaError, naming the first actor that does not come up in time and what it said. One whose process is
    killed as it comes up is started again by Ray, and waited for."""
    end = time.monotonic() + deadline_s
    for name, actor in actors.items():
        try:
            _await_answer(actor, end)
        except ray.exceptions.GetTimeoutError:
            raise GsaError(f"{name} did not start within {deadline_s:.0f} s: is the cluster full?") from None
        except ray.exceptions.RayActorError as error:
            raise GsaError(f"{name} did not start: {str(error).strip().splitlines()[-1]}") from error


def _await_answer(actor: Any, end: float) -> None:
    while True:
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=max(1.0, end - time.monotonic()))
            return
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
