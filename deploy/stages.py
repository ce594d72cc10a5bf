"""What the commands around a run do: pre-train, evaluate; what they check of a world model and a store."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.progress import bar, console
from gsa.agent.sizes import PRESETS, preset
from gsa.errors import SpecMismatch, Stopped, UsageError
from gsa.schema import Spec
from learner.config import PretrainConfig
from reports.card import write_world_model_card
from retrieval.store import TrajectoryStore

if TYPE_CHECKING:
    from actors.environment import Profile
    from gsa.agent.world_model import WorldModel


def pretrain(path: Path, config: PretrainConfig, out: Path, processes: int = 1) -> int:
    """Pre-trains a world model on a store, in so many processes of this machine. SIGTERM or Ctrl-C saves first."""
    from deploy.processes import launch, stop_on

    preset(config.model)
    if processes < 1 or config.batch % processes:
        raise UsageError(f"--batch {config.batch} does not divide into --processes {processes} equal parts.")
    with stop_on(signal.SIGTERM, signal.SIGINT) as stop:
        if processes > 1:
            launch(_pretrain, (path, config, out), processes, stop)
        else:
            _pretrain(path, config, out, stop)
    if os.environ.get("RANK", "0") == "0":
        console.print(f"World model: {out}")
    return 0


def _pretrain(path: Path, config: PretrainConfig, out: Path, stop: threading.Event | None = None) -> None:
    """In this process, which may be one of several."""
    from deploy.forecast import pretrain_forecast
    from deploy.processes import stop_on
    from learner.pretrain import pretrain as train
    from learner.pretrain import what_is_seen

    first = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on(signal.SIGTERM)) if stop is None else stop
        store = stack.enter_context(TrajectoryStore.open(path))
        observation = what_is_seen(store, store.rows(), config)
        seen = observation.names
        others = sorted({name for spec in store.specs.values() for name in spec.observation} - set(seen))
        left_out = f"; left out, as not asked for or not shared by all: {', '.join(others)}" if others else ""
        if first:
            console.print(f"The world model sees {', '.join(seen)}{left_out}.", soft_wrap=True)
            processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
            pretrain_forecast(config, config.world_model(observation), out, processes).say()
        progress = stack.enter_context(bar("pretrain")) if first else None
        train(store, config, out, progress, stop)
        if first:
            write_world_model_card(out)
    if stop.is_set():
        raise Stopped(f"Stopped and saved; the same command goes on from there: {out}")


def evaluate(
    agent: Path, task: str, episodes: int, seed: int, render: Profile, video: Path | None, imports: Sequence[str]
) -> int:
    """Evaluates an agent's policy and prints score and return."""
    from deploy.evaluate import evaluate_agent

    if episodes < 1:
        raise UsageError("--episodes must be at least 1.")
    result = evaluate_agent(agent, task, episodes, seed, render, video, imports)
    print(
        f"{task}: score {result['score']:.1f} [{result['score_low']:.1f}, {result['score_high']:.1f}], "
        f"return {result['return']:.1f} over {episodes} episodes"
    )
    return 0


def load_world_model(folder: Path) -> WorldModel:
    """A pre-trained world model, on the GPU if there is one."""
    from gsa.agent.world_model import WorldModel
    from learner.compute import set_up
    from learner.config import ComputeConfig

    return WorldModel.load(folder, set_up(ComputeConfig()))


def size_of(world_model: WorldModel) -> str:
    """The named size nearest to a world model's width: actor, critic and prior take theirs from it."""
    return min(PRESETS, key=lambda name: abs(PRESETS[name].world_model.deter - world_model.config.deter))


def require_embodiment(store: TrajectoryStore, env: Any, model: WorldModel) -> None:
    """Raises UsageError or SpecMismatch unless the store has trajectories that fit the task; warns of other pixels.

    What the world model does not see may differ.
    """
    spec = store.specs.get(env.spec.embodiment)
    if spec is None:
        raise UsageError(
            f"{store.path} has nothing of {env.spec.embodiment}, which {env.task.name} needs; it has "
            f"{', '.join(sorted(store.specs)) or 'nothing'}."
        )
    model.config.observation.require(spec.observation, "The world model", f"the store {store.path}")
    replace(spec, observation=env.spec.observation).require_same(
        env.spec, f"The store {store.path}", f"the task {env.task.name}"
    )
    if spec.renderer and spec.renderer != env.spec.renderer:
        console.print(
            f"Warning: the pool's images are by '{spec.renderer}', the task's by '{env.spec.renderer}'.",
            soft_wrap=True,
        )


def require_fits(model: WorldModel, spec: Spec, what: str) -> None:
    """Raises SpecMismatch if the world model has too few action dimensions, or sees what is not there."""
    if spec.action_dim > model.config.max_action_dim:
        raise SpecMismatch(
            f"The world model takes at most {model.config.max_action_dim} actions; {what} has {spec.action_dim}."
        )
    model.config.observation.require(spec.observation, "The world model", what)
