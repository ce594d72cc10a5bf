"""What the commands around a run do: pre-train, index, retrieve, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import models
from deploy.progress import bar, console
from gsa.agent.sizes import PRESETS, preset
from gsa.errors import SpecMismatch, UsageError
from gsa.schema import Spec
from learner.config import PretrainConfig
from retrieval.index import FeatureIndex
from retrieval.retriever import RehearsalSet, random_rehearsal
from retrieval.retriever import retrieve as nearest
from retrieval.store import TrajectoryStore

if TYPE_CHECKING:
    from deploy.data_commands import Retrieve
    from gsa.agent.world_model import WorldModel

QUERY_SEED = 2_000_000  # resets that give the queries are none of training's or evaluation's


def pretrain(path: Path, config: PretrainConfig, out: Path) -> int:
    """Pre-trains a world model on a store."""
    preset(config.model)
    from learner.pretrain import pretrain as train

    with TrajectoryStore.open(path) as store, bar("pretrain") as progress:
        train(store, config, out, progress)
    console.print(f"World model: {out}")
    return 0


def index(path: Path, world_model: Path) -> int:
    """Builds or updates the feature index of a store under a world model."""
    world_model = models.folder(world_model)
    with TrajectoryStore.open(path) as store:
        built = open_index(store, world_model, load_world_model(world_model))
        console.print(f"{len(built)} of {len(store)} trajectories are indexed in {index_path(world_model, store)}")
    return 0


def retrieve(command: Retrieve) -> int:
    """Retrieves a task's rehearsal set and draws its contact sheet."""
    from actors.environment import make

    with TrajectoryStore.open(command.store) as store, make(command.task, command.render, command.imports) as env:
        folder = models.folder(command.world_model)
        model = load_world_model(folder)
        require_fits(model, env.spec, f"the task {env.task.name}")
        require_embodiment(store, env, model)
        kind = "random" if command.random else "nearest"
        command.out.mkdir(parents=True, exist_ok=True)
        found = rehearse(store, folder, model, env, kind, command.k, command.queries, command.seed, command.out)
    for source, count in _sources(found):
        print(f"{count:6}  {source}")
    console.print(f"{len(found.rows)} of {command.k} asked for; look at {command.out / 'contact_sheet.png'}")
    return 0


def evaluate(
    agent: Path, task: str, episodes: int, seed: int, render: str, video: Path | None, imports: Sequence[str]
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
    from gsa.agent.world_model import WorldModel

    return WorldModel.load(folder)


def size_of(world_model: WorldModel) -> str:
    """The named size nearest to a world model's width: actor, critic and prior take theirs from it."""
    return min(PRESETS, key=lambda name: abs(PRESETS[name].world_model.deter - world_model.config.deter))


def index_path(world_model: Path, store: TrajectoryStore) -> Path:
    """Where the index of a store under a world model lies: with the model, as its features are the model's."""
    return world_model / "index" / f"{store.id}.arrow"


def open_index(store: TrajectoryStore, folder: Path, model: WorldModel) -> FeatureIndex:
    """The index of a store, built if there is none and extended by what is new."""
    path = index_path(folder, store)
    path.parent.mkdir(exist_ok=True)
    with bar("index") as progress:
        return FeatureIndex.update(store, encoder(model), model.encoder_hash(), path, progress)


def encoder(model: WorldModel) -> Any:
    """First observations, name → [N, …], to features [N, D]."""
    import torch

    @torch.inference_mode()
    def encode(observation: dict[str, np.ndarray]) -> np.ndarray:
        seen = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in observation.items()}
        return model.encode(seen).float().cpu().numpy()

    return encode


def rehearse(
    store: TrajectoryStore,
    folder: Path,
    model: WorldModel,
    env: Any,
    kind: str,
    k: int,
    queries: int,
    seed: int,
    out: Path,
) -> RehearsalSet:
    """The rehearsal set of a task, with rehearsal.json and contact_sheet.png in `out`."""
    from reports.sheets import contact_sheet

    resets = [env.reset(QUERY_SEED + seed * 1000 + i) for i in range(queries)]
    first = {name: np.stack([reset[name] for reset in resets]) for name in resets[0]}
    if kind == "random":
        found = random_rehearsal(store, k, env.spec.embodiment, seed)
    else:
        features = encoder(model)(first)
        found = nearest(open_index(store, folder, model), features, k, env.spec.embodiment)
    if len(found.rows) < k:
        console.print(
            f"The store has {len(found.rows)} trajectories of {env.spec.embodiment}, fewer than the {k} asked for."
        )
    found.save(out / "rehearsal.json")
    contact_sheet(out / "contact_sheet.png", first["pixels"], store, found)
    return found


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


def _sources(found: RehearsalSet) -> list[tuple[str, int]]:
    names, counts = np.unique(np.asarray(found.sources), return_counts=True)
    return sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
