"""A whole run in one process: the same parts as function calls, without Ray and Redis, step-locked and deterministic.

Read this file to understand the system.
"""

from __future__ import annotations

from pathlib import Path

from actors.worker import WeightLink
from deploy import parts
from deploy.config import FinetuneConfig
from deploy.evaluate import Evaluator
from gsa.broadcast import MemoryBroadcast
from gsa.metrics import Progress, RunLog
from gsa.schema import WeightSnapshot


def run_local(config: FinetuneConfig, run: Path, progress: Progress) -> Path:
    """Collects and learns in turns until the budget is collected and learned from. Returns the agent's folder."""
    replay = parts.replay_service(config, run, buffers=2)
    tuner = parts.fine_tuner(config, run)
    weights = MemoryBroadcast()
    learner = parts.learner_loop(config, tuner, replay.sample, parts.publish_to(weights.publisher()))
    about = parts.Architecture.load(run)
    prior = _cloned(run) if about.prior else None
    worker = parts.env_worker(config, about, "local", replay, weights.subscriber(), prior)
    evaluator = Evaluator(config, about, weights.subscriber())
    log = RunLog(run)
    repeat = parts.task(config).action_repeat
    episodes = evaluated = 0

    def write_down() -> None:
        nonlocal episodes, evaluated
        rows, episodes = replay.drain_episodes(episodes)
        for row in rows:
            log.write(int(row["frames"]), parts.episode_metrics(row))
        frames = replay.collected * repeat
        values = {**replay.stats(), **learner.stats(), **worker.stats()}
        if frames - evaluated >= config.eval_every_frames:
            evaluated = frames - frames % config.eval_every_frames
            values |= evaluator.evaluate(config.eval_episodes)
        log.write(frames, values)
        progress(frames, config.budget_frames, parts.headline(values))

    learner.publish()
    while not replay.complete:
        collected = replay.collected
        worker.tick()  # one agent step in each environment
        while learner.step() is not None:  # as many updates as the rate limiter now allows
            pass
        if replay.collected > collected:
            write_down()
    write_down()
    worker.close()
    evaluator.close()
    log.close()
    return parts.save_agent(tuner, config, run)


def _cloned(run: Path) -> WeightLink:
    """The prior actor's weights as a worker receives them."""
    broadcast = MemoryBroadcast()
    broadcast.publisher().publish(WeightSnapshot(0, parts.prior_tensors(run)))
    return broadcast.subscriber()
