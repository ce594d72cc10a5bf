"""A whole run in one process: the same parts as function calls, without Ray and Redis, step-locked and deterministic.

Read this file to understand the system. A run that was stopped or killed goes on from its newest checkpoint, bit for
bit as if it had not been: what it had collected since is collected again, and found in the online store.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.worker import WeightLink
from deploy import parts
from deploy.checkpointing import RunCheckpoints
from deploy.config import FinetuneConfig
from deploy.evaluate import Evaluator
from deploy.faults import FaultLog, Warnings
from gsa.broadcast import MemoryBroadcast
from gsa.metrics import Progress, RunLog
from gsa.schema import WeightSnapshot


def run_local(config: FinetuneConfig, run: Path, progress: Progress, stop: threading.Event | None = None) -> Path:
    """Collects and learns in turns until the budget is collected and learned from. Returns the agent's folder.

    Goes on where the run in this folder stood. With `stop` set it saves, and raises Stopped.
    """
    local = LocalRun(config, run)
    try:
        local.resume()
        local.run_to_end(progress, stop or threading.Event())
        return parts.save_agent(local.tuner, config, run)
    finally:
        local.close()


class LocalRun:
    """Owns the parts of a run and the order in which they take turns."""

    def __init__(self, config: FinetuneConfig, run: Path) -> None:
        self.config, self.run = config, run
        self.replay = parts.replay_service(config, run)
        self.broadcast = MemoryBroadcast()
        self._publisher = self.broadcast.publisher()
        learner = dataclasses.replace(config.learner, publish_every_s=0.0, publish_bf16=False)
        by_count = dataclasses.replace(config, learner=learner)
        self.tuner = parts.fine_tuner(by_count, run)
        self.learner = parts.learner_loop(by_count, self.tuner, self.replay.sample, self._publisher)
        about = parts.Architecture.load(run)
        prior = _cloned(run) if about.prior else None
        self.worker = parts.env_worker(config, about, "local", self.replay, self.broadcast.subscriber(), prior)
        self.evaluator = Evaluator(config, about, self.broadcast.subscriber())
        self.checkpoints = RunCheckpoints(run, config)
        self._newest = self.broadcast.subscriber()
        self._published: WeightSnapshot | None = None
        self._log: RunLog | None = None
        self._faults, self._warnings = FaultLog(run), Warnings()
        self._written = self._cursor = self._evaluated = 0  # agent steps and episodes in the log, frames evaluated at
        self._saved = False  # whether it stands where it was saved last
        self._learned = False  # whether the learner has had its turn since the worker's last

    @property
    def frames(self) -> int:
        """Simulator frames collected."""
        return self.replay.frames

    def run_to_end(self, progress: Progress, stop: threading.Event) -> None:
        """Collects and learns until the budget is collected and replayed; saves at its end, and where it is stopped."""
        for _ in self.turns(progress):
            if stop.is_set():
                self._save_and_wait()
                raise parts.stopped(self.frames, self.run)
        self._save_and_wait()

    def turns(self, progress: Progress) -> Iterator[None]:
        """Turns of learner and worker, in order. At each yield `state()` is whole, and continues the run exactly."""
        while True:
            while not self._learned:
                yield
                self._learned = self.learner.step() is None  # as many updates as the rate limiter now allows
            self._saved = False
            if self.replay.collected > self._written:
                self._write_down(progress)
                yield
            if self.replay.complete:
                return
            self.worker.tick()  # one agent step in each environment
            self._learned = self._saved = False

    def resume(self) -> None:
        """Goes on from the newest checkpoint, or from the beginning where there is none."""
        restored = self.checkpoints.load()
        state = None if restored is None else restored.state
        if state is None:
            if self.replay.collected:  # killed before its first checkpoint
                self.replay.restore(self.replay.blank_state(), exact=True)
            self._log = RunLog(self.run, resume_rows=0)
            self.learner.publish()
            return
        self.tuner.restore(state["tuner"])
        self.replay.restore(state["replay"], exact=True)
        self._publish_again(state["published"])
        self.learner.restore(state["learner"])
        self.worker.restore(state["worker"])
        self._written, self._cursor, self._evaluated = (int(state[k]) for k in ("written", "cursor", "evaluated"))
        self._learned = bool(state["learned"])
        self._saved = True
        self._log = RunLog(self.run, resume_rows=int(state["log_rows"]))

    def state(self) -> dict[str, Any]:
        """All that continues the run exactly, between two turns. Tensors are the live ones."""
        assert self._log is not None, "resume() comes first"
        return {
            "tuner": self.tuner.state(), "replay": self.replay.state(), "learner": self.learner.state(),
            "worker": self.worker.state(), "published": self._published_state(), "written": self._written,
            "cursor": self._cursor, "evaluated": self._evaluated, "learned": self._learned, "log_rows": self._log.rows,
        }  # fmt: skip

    def save(self, score: float | None = None) -> None:
        """Saves the run, unless nothing has happened since it was saved last."""
        if not self._saved:
            self.checkpoints.save(self.frames, self.state(), score)
            self._saved = True

    def _save_and_wait(self) -> None:
        self.save()
        self.checkpoints.flush()

    def close(self) -> None:
        self.checkpoints.flush()
        self._tell()
        self._warnings.close()
        self.worker.close()
        self.evaluator.close()
        self.replay.close()
        if self._log is not None:
            self._log.close()

    def _write_down(self, progress: Progress) -> None:
        """Logs what was collected and learned, evaluates and saves where that is due."""
        assert self._log is not None
        rows, self._cursor = self.replay.drain_episodes(self._cursor)
        for row in rows:
            self._log.write(int(row["frames"]), parts.episode_metrics(row))
        self._tell()
        values = {**self.replay.stats(), **self.learner.stats(), **self.worker.stats(), **self.checkpoints.stats()}
        score = None
        if self.frames - self._evaluated >= self.config.eval_every_frames:
            self._evaluated = self.frames - self.frames % self.config.eval_every_frames
            values |= self.evaluator.evaluate(self.config.eval_episodes)
            score = values["eval/score"]
        self._log.write(self.frames, values)
        self._written = self.replay.collected
        if score is not None or self.checkpoints.due(self.frames):
            self.save(score)
        progress(self.frames, self.config.budget_frames, parts.headline(values))

    def _tell(self) -> None:
        for fault in self.worker.faults():
            self._faults.write(self.frames, "the run", fault)
        for warning in self._warnings.take():
            self._faults.write(self.frames, "the run", warning, "", aloud=True)

    def _published_state(self) -> dict[str, Any]:
        """The snapshot published last: its weights, unless they are the tuner's as they are."""
        self._published = self._newest.poll() or self._published
        assert self._published is not None, "resume() published the first"
        version = self._published.version
        return {"version": version, "tensors": {} if version == self.tuner.updates else dict(self._published.tensors)}

    def _publish_again(self, published: Mapping[str, Any]) -> None:
        version = int(published["version"])
        tensors = published["tensors"] or self.tuner.snapshot()
        self._publisher.publish(WeightSnapshot(version, tensors, {"updates": version}))


def _cloned(run: Path) -> WeightLink:
    """The prior actor's weights as a worker receives them."""
    broadcast = MemoryBroadcast()
    broadcast.publisher().publish(WeightSnapshot(0, parts.prior_tensors(run)))
    return broadcast.subscriber()
