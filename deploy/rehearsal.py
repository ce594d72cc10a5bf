"""From a task to its rehearsal set: index the pool, look for what starts like the task, show it. What `gsa index`,
`gsa retrieve` and a run do alike."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy import models
from deploy.progress import bar, console
from deploy.stages import load_world_model, require_embodiment, require_fits
from gsa.errors import UsageError
from retrieval.index import FeatureIndex
from retrieval.nearest import Approximate
from retrieval.retriever import RehearsalSet, random_rehearsal
from retrieval.retriever import retrieve as nearest
from retrieval.store import TrajectoryStore

if TYPE_CHECKING:
    from actors.hosting import Host
    from deploy.data_commands import Retrieve
    from gsa.agent.world_model import WorldModel

QUERY_SEED = 2_000_000  # resets that give the queries are none of training's or evaluation's
FAULTS_FOUND = 1


def index(path: Path, world_model: Path) -> int:
    """Builds or updates the feature index of a store under a world model. 1 where trajectories are damaged."""
    world_model = models.folder(world_model)
    with TrajectoryStore.open(path) as store:
        built = open_index(store, world_model, load_world_model(world_model))
        for line in (*built.unseen, *built.unread):
            console.print(f"  left out: {line}", soft_wrap=True)
        console.print(f"{len(built)} of {len(store)} trajectories are indexed in {built.path}", soft_wrap=True)
    return FAULTS_FOUND if built.unread else 0


def retrieve(command: Retrieve) -> int:
    """Retrieves a task's rehearsal set, draws its contact sheet, and says how precise it is."""
    from actors.hosting import Isolated

    if command.k < 1 or command.queries < 1:
        raise UsageError("--k and --queries must be at least 1.")
    with (
        TrajectoryStore.open(command.store) as store,
        closing(Isolated(command.task, command.render, command.imports)) as env,
    ):
        folder = models.folder(command.world_model)
        model = load_world_model(folder)
        require_fits(model, env.spec, f"the task {env.task.name}")
        require_embodiment(store, env, model)
        kind = "random" if command.random else "nearest"
        found = rehearse(
            store, folder, model, env, kind, command.k, command.queries, command.seed, command.out, command.search
        )
    _print(found, command.task)
    console.print(f"{len(found)} of {command.k} asked for; look at {command.out / 'contact_sheet.png'}", soft_wrap=True)
    return 0


def index_path(world_model: Path, store: TrajectoryStore) -> Path:
    """Where the index of a store under a world model lies: with the model, as its features are the model's."""
    return world_model / "index" / store.id


def open_index(store: TrajectoryStore, folder: Path, model: WorldModel) -> FeatureIndex:
    """The index of a store, built if there is none and extended by what is new."""
    with bar("index") as progress:
        return FeatureIndex.update(store, model.features, model.encoder_hash(), index_path(folder, store), progress)


def first_observations(env: Host, queries: int, seed: int) -> dict[str, np.ndarray]:
    """What the task begins with, in as many episodes: {name: [queries, …]}."""
    firsts = [env.reset(QUERY_SEED + seed * 1000 + i) for i in range(queries)]
    return {name: np.stack([first[name] for first in firsts]) for name in env.spec.observation}


def rehearse(
    store: TrajectoryStore,
    folder: Path,
    model: WorldModel,
    env: Host,
    kind: str,
    k: int,
    queries: int,
    seed: int,
    out: Path,
    search: str = "exact",
) -> RehearsalSet:
    """The rehearsal set of a task, with rehearsal.json and contact_sheet.png in `out`."""
    from reports.sheets import contact_sheet

    embodiment, task = env.spec.embodiment, env.task.name
    seen = first_observations(env, queries, seed)
    if kind == "random":
        found = random_rehearsal(store, k, embodiment, seed, task)
    else:
        index = open_index(store, folder, model)
        found = nearest(index, model.features(seen), k, embodiment, task, _approximate(index, embodiment, k, search))
    if len(found) < k:
        console.print(
            f"The store has {len(found)} trajectories of {embodiment}, fewer than the {k} asked for.", soft_wrap=True
        )
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "rehearsal.json")
    contact_sheet(out / "contact_sheet.png", seen, store, found)
    return found


def _approximate(index: FeatureIndex, embodiment: str, k: int, search: str) -> Approximate | None:
    if search == "exact":
        return None
    with bar(search) as progress:
        made = Approximate(index.features(embodiment)[1], search, k, progress=progress)  # type: ignore[arg-type]
    console.print(f"{search} finds {made.recall:.1%} of the {k} nearest (measured on first frames of the pool).")
    return made


def _print(found: RehearsalSet, task: str) -> None:
    names, counts = np.unique(np.asarray(found.sources), return_counts=True)
    for count, name in sorted(zip(counts.tolist(), names.tolist(), strict=True), reverse=True):
        print(f"{count:6}  {name or 'unknown source'}")
    for at in found.precision:
        embodiment = "" if at.embodiment is None else f", {at.embodiment:.0%} of {found.embodiment} without the filter"
        of_task = f"unknown, as no source in the pool is {task}" if at.task is None else f"{at.task:.0%}"
        print(f"precision at {at.k}: {of_task}{embodiment}")
    if found.task_share is not None:
        print(f"chance: {found.task_share:.0%} of the pool's trajectories of {found.embodiment} are of {task}")
