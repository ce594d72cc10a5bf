"""How good a policy is: whole episodes by the mean action, with intervals; the last evaluation of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.environment import Profile
from actors.hosting import Isolated
from actors.worker import WeightLink
from deploy import parts
from deploy.config import FinetuneConfig
from gsa.errors import SpecMismatch, Unavailable, UsageError
from gsa.metrics import Progress, bootstrap_interval
from gsa.schema import Trajectory
from retrieval.files import replace_file

BATCH = 5  # environments stepped together
SEED = 1_000_000  # evaluation's episodes are none of training's, and the same for every policy and method


def summary(played: Sequence[Trajectory]) -> dict[str, float]:
    """Mean score and return over episodes, and the score's 95 % bootstrap interval."""
    scores = [t.stats["score"] for t in played]
    low, high = bootstrap_interval(scores)
    returns = float(np.mean([t.stats["return"] for t in played]))
    return {"score": float(np.mean(scores)), "score_low": low, "score_high": high, "return": returns}


class Evaluator:
    """Plays whole episodes with the newest published weights, beside a run. Plain; a launcher may wrap it."""

    def __init__(self, config: FinetuneConfig, about: parts.Architecture, weights: WeightLink) -> None:
        self._weights = weights
        self._policy = parts.guided_policy(about, 1, prior=False)
        self._rollout = parts.evaluation_rollout(partial(parts.host, config), 1, self._policy, config.seed + SEED)
        self._version = -1

    def evaluate(self, episodes: int) -> dict[str, float]:
        """Mean score and return of the newest policy's mean action; always the same episodes."""
        if (snapshot := self._weights.poll()) is not None:
            self._policy.load_tensors(snapshot.tensors)
            self._version = snapshot.version
        if self._version < 0:
            raise Unavailable("No weights have been published yet.")
        played = parts.play(self._rollout, "policy", episodes)
        return {**{f"eval/{k}": v for k, v in summary(played).items()}, "eval/policy_version": float(self._version)}

    def close(self) -> None:
        self._rollout.close()


def final_evaluation(config: FinetuneConfig, run: Path, progress: Progress, tuned: bool = True) -> dict[str, Any]:
    """Random policy, prior alone and fine-tuned policy on the same episodes; writes evaluation.json and video.mp4.

    Without `tuned` the run is only prepared, and there is no fine-tuned policy.
    """
    from gsa.agent.agent import Agent
    from gsa.video import side_by_side, write_mp4

    batch = min(BATCH, config.final_episodes)
    policy = parts.guided_policy(parts.Architecture.load(run), batch)
    agent = Agent.load(run / "agent") if tuned else parts.fine_tuner(config, run).agent
    policy.load_tensors(agent.acting_tensors())
    if config.guides:
        policy.load_prior(parts.prior_tensors(run))
    who = (
        {"random": "random"}
        | ({"prior": "prior"} if config.guides else {})
        | ({"finetuned": "policy"} if tuned else {})
    )
    rollout = parts.evaluation_rollout(partial(parts.host, config), batch, policy, config.seed + SEED)
    results: dict[str, Any] = {}
    films: dict[str, np.ndarray] = {}
    try:
        for name, controller in who.items():
            progress(len(results) * config.final_episodes, len(who) * config.final_episodes, {})
            played = parts.play(rollout, controller, config.final_episodes)
            if (film := filmed(played[0])) is not None:
                films[name] = film
            results[name] = {
                "returns": [t.stats["return"] for t in played], "scores": [t.stats["score"] for t in played],
                "frames": config.budget_frames if name == "finetuned" else 0,
            }  # fmt: skip
        progress(len(who) * config.final_episodes, len(who) * config.final_episodes, {})
    finally:
        rollout.close()
    if films:
        write_mp4(run / "video.mp4", side_by_side(films), fps=20)
    with replace_file(run / "evaluation.json") as file:
        file.write(json.dumps({"task": config.task, "policies": results}, indent=1).encode())
    return results


def filmed(played: Trajectory) -> np.ndarray | None:
    """What the cameras saw of an episode, side by side: uint8 [T+1, H, W, 3]; None where there are none."""
    images = [np.asarray(value) for _, value in sorted(played.observation.items()) if value.ndim == 4]
    return np.concatenate(images, 2) if images else None


def evaluate_agent(
    folder: Path, task: str, episodes: int, seed: int, render: Profile, video: Path | None, imports: Sequence[str] = ()
) -> dict[str, float]:
    """The policy of an agent's folder on `episodes` episodes of a task."""
    from gsa.agent.agent import Agent
    from gsa.agent.policy import GuidedPolicy
    from gsa.video import write_mp4

    agent = Agent.load(folder)
    envs = min(BATCH, episodes)
    policy = GuidedPolicy(agent.world_model.config, agent.config, agent.action_dim, envs)
    policy.load_tensors(agent.acting_tensors())
    with closing(
        parts.evaluation_rollout(lambda: Isolated(task, render, imports), envs, policy, seed + SEED)
    ) as rollout:
        if (has := rollout.hosts[0].spec.action_dim) != agent.action_dim:
            raise SpecMismatch(f"The agent in {folder} has {agent.action_dim} actions, {task} has {has}.")
        seen = agent.world_model.config.observation
        seen.require(rollout.hosts[0].spec.observation, f"The agent in {folder}", f"the task {task}")
        played = parts.play(rollout, "policy", episodes)
    if video is not None:
        film = filmed(played[0])
        if film is None:
            raise UsageError(f"{task} gives no images, so there is nothing to film: leave out --video.")
        write_mp4(video, film, fps=20)
    return summary(played)
