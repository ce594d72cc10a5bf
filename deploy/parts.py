"""The parts of a run, built from its config and its folder alone: the same in one process and in many.

Run folder: config.yaml, architecture.json, rehearsal.json, contact_sheet.png, prior/, online/ (store), metrics.jsonl,
tensorboard/, checkpoints/, agent/ (the result), evaluation.json, video.mp4, report.html.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.environment import make
from actors.guidance import GuidanceConfig, find_guide
from actors.hosting import Host, InProcess, Isolated
from actors.rollout import ActingPolicy, Rollout
from actors.worker import EnvWorker, ReplayLink, WeightLink
from deploy.config import FinetuneConfig
from gsa import config as configs
from gsa.agent.sizes import BehaviourConfig, PriorConfig, WorldModelConfig
from gsa.errors import Stopped
from gsa.schema import Batch, Lease, Trajectory, WeightSnapshot
from replay_service.service import ReplayService
from retrieval.files import replace_file
from retrieval.retriever import RehearsalSet
from retrieval.store import TrajectoryStore

if TYPE_CHECKING:
    from gsa.agent.policy import GuidedPolicy
    from gsa.broadcast import Publisher
    from learner.finetune import FineTuner
    from learner.loop import LearnerLoop

WAIT_S = 1.0  # for environments that are all being reset, before looking again


ARCHITECTURE = "architecture.json"


def limit_threads(n: int) -> None:
    """Numeric threads of this process: workers keep to one, else they fight the learner at barriers."""
    import torch

    torch.set_num_threads(n)


def host(config: FinetuneConfig) -> Host:
    """The run's environment: in this process if the run is local, else in one of its own."""
    if config.local:
        return InProcess(partial(make, config.task, config.render, config.imports), config.env_timeout_s)
    return Isolated(config.task, config.render, config.imports, config.env_timeout_s)


@dataclass(frozen=True)
class Architecture:
    """What a process must know to build the run's networks; their weights come by broadcast or from files."""

    run: str  # its name on Redis and in the ids of its trajectories: no other run's, whatever its folder is called
    model: WorldModelConfig
    behaviour: BehaviourConfig
    prior: PriorConfig | None  # None: the method has no prior actor
    action_dim: int

    @classmethod
    def load(cls, run: Path) -> Architecture:
        return configs.load(cls, run / ARCHITECTURE)

    def save(self, run: Path) -> None:
        with replace_file(run / ARCHITECTURE) as file:
            file.write(json.dumps(configs.to_dict(self), indent=1).encode())


def unique_name(run: Path) -> str:
    """A name for a new run: its folder's, as Redis keys allow, and a random part."""
    return re.sub(r"[^\w.+-]", "-", run.name) + "-" + secrets.token_hex(4)


def replay_service(config: FinetuneConfig, run: Path) -> ReplayService:
    """The service over the run's online store, created if it is not there, and the pool's rehearsal set.

    A batch of it is good until the next `sample` in the same thread: over Ray, until it is in the object store.
    """
    online = run / "online"
    store = TrajectoryStore.open(online, write=True) if online.exists() else TrajectoryStore.create(online)
    with closing(host(config)) as env:
        spec, steps = env.spec, env.task.episode_steps
    pool = rows = None
    if config.rehearses:
        assert config.store is not None
        pool = TrajectoryStore.open(config.store)
        rows = np.array(RehearsalSet.load(run / "rehearsal.json").rows, np.int64)
    settings = config.replay(spec.action_repeat, steps)
    max_action_dim = Architecture.load(run).model.max_action_dim
    return ReplayService(settings, store, spec, pool, rows, max_action_dim, config.seed, buffers=1)


def fine_tuner(config: FinetuneConfig, run: Path) -> FineTuner:
    """The learner's state at the start of the run."""
    from gsa.agent.agent import Agent
    from gsa.agent.world_model import WorldModel
    from learner.finetune import FineTuner

    about = Architecture.load(run)
    if config.uses_pool:
        assert config.world_model is not None
        world_model = WorldModel.load(config.world_model)
    else:
        world_model = WorldModel.create(about.model, config.seed)
    agent = Agent.create(world_model, about.behaviour, about.action_dim, config.seed)
    return FineTuner(agent, config.learner, config.seed)


def learner_loop(
    config: FinetuneConfig, tuner: FineTuner, sample: Callable[[], Batch | None], publisher: Publisher
) -> LearnerLoop:
    """A snapshot's version is the number of updates it has seen."""
    from learner.loop import LearnerLoop

    def publish(tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        publisher.publish(WeightSnapshot(int(meta["updates"]), tensors, meta))

    every = config.learner.publish_every, config.learner.publish_every_s
    return LearnerLoop(tuner, sample, publish, *every, publisher.lend)


def headline(values: Mapping[str, float]) -> dict[str, float]:
    """What a progress bar shows of a run's metrics."""
    shown = {"learner/updates": "updates", "eval/score": "score", "worker/faults": "faults", "driver/faults": "faults"}
    numbers = {label: values[name] for name, label in shown.items() if name in values}
    return {label: value for label, value in numbers.items() if value or label != "faults"}


def stopped(frames: int, run: Path, saved: bool = True) -> Stopped:
    """What a run that was told to stop ends with. Not `saved`: its last checkpoint is what it goes on from."""
    left_out = "" if saved else ", too late to save what was learned since the last checkpoint"
    return Stopped(f"Stopped at {frames} frames{left_out}; to go on: gsa finetune --resume {run}")


def save_agent(tuner: FineTuner, config: FinetuneConfig, run: Path) -> Path:
    """The result of the run: what `gsa.load_policy` opens."""
    tuner.agent.save(run / "agent", {"task": config.task, "method": config.method, "updates": tuner.updates})
    return run / "agent"


def guided_policy(about: Architecture, envs: int, prior: bool = True) -> GuidedPolicy:
    """A policy that waits for its weights, with a prior actor if the method has one and it is wanted."""
    from gsa.agent.policy import GuidedPolicy
    from gsa.agent.prior_actor import PriorActor

    cloned = None
    if prior and about.prior is not None:
        cloned = PriorActor(about.prior, about.action_dim, about.model.observation)
    return GuidedPolicy(about.model, about.behaviour, about.action_dim, envs, cloned)


def prior_tensors(run: Path) -> dict[str, np.ndarray]:
    """The weights of the run's prior actor."""
    from gsa.agent.prior_actor import PriorActor

    return {k: v.numpy() for k, v in PriorActor.load(run / "prior").state_dict().items()}


def env_worker(
    config: FinetuneConfig,
    about: Architecture,
    name: str,
    replay: ReplayLink,
    weights: WeightLink,
    prior: WeightLink | None,
) -> EnvWorker:
    """A worker with its E environments. Needs no file of the run, so it may live on any node."""
    make_host = partial(host, config)
    policy = guided_policy(about, config.envs)
    rollout = Rollout(
        make_host, config.envs, policy, config.guidance, about.prior is not None, config.seed, about.run,
        lockstep=config.local,
    )  # fmt: skip
    if config.guide is not None:
        make_guide = find_guide(config.guide)
        rollout.guides = [make_guide(rollout.task) for _ in rollout.hosts]
    return EnvWorker(name, rollout, replay, weights, prior)


def evaluation_rollout(make_host: Callable[[], Host], envs: int, policy: ActingPolicy, seed: int) -> Rollout:
    """E environments to `play` in, each policy by its mean action."""
    return Rollout(make_host, envs, policy, GuidanceConfig("constant(0)"), False, seed, "evaluation", sample=False)


def play(rollout: Rollout, who: str, episodes: int) -> list[Trajectory]:
    """Whole episodes under one controller, for evaluation: "random", "prior" or "policy". One that a fault of the
    environment ends is left out, and the next number is played in its place."""
    rollout.has_prior = who == "prior"
    steps = rollout.task.episode_steps
    numbers = itertools.count()
    played: dict[int, Trajectory] = {}
    under_way = 0
    while len(played) < episodes:
        for slot in rollout.free_slots[: episodes - len(played) - under_way]:
            rollout.begin(slot, Lease(next(numbers), steps, 0, warmup=who != "policy"))
            under_way += 1
        for outcome in rollout.advance(WAIT_S):
            under_way -= outcome.fault is not None or outcome.trajectory is not None
            if outcome.trajectory is not None:
                played[outcome.lease.episode] = outcome.trajectory
    return [played[number] for number in sorted(played)]


def episode_metrics(row: Mapping[str, float]) -> dict[str, float]:
    """A collected episode as a row of the run's log."""
    return {f"episode/{k}": row[k] for k in ("return", "score", "guided_share", "steps") if k in row}
