"""`gsa shift`: how far what a run rehearses is from what it meets, in the latent space of its world model."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy import models
from deploy.config import config_of
from deploy.progress import bar, console
from deploy.stages import load_world_model
from gsa.errors import SpecMismatch, UsageError
from gsa.schema import SequenceRef
from replay_service.batches import SequenceSampler, cut
from reports import shift as distances
from reports.shift import Sample
from retrieval.files import replace_file
from retrieval.retriever import RehearsalSet, random_rehearsal
from retrieval.store import TrajectoryStore

if TYPE_CHECKING:
    from deploy.data_commands import Shift
    from gsa.agent.world_model import TensorBatch, WorldModel

ENCODED_SEQUENCES = 8  # at a time
STATES_A_SEQUENCE = 16
SPACES = ("encoder features", "posterior states")


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the data is."""

    online: Path
    pool: Path
    world_model: Path
    rehearsal: Path | None  # None: the run rehearsed nothing
    expert: Path | None
    out: Path


def shift(command: Shift) -> int:
    """Measures, prints, and writes shift.json and shift.png."""
    if min(command.sequences, command.states, command.repeats) < 2 or command.length < 1:
        raise UsageError("--sequences, --states and --repeats must be at least 2, --length at least 1.")
    distances.require_pot()
    sources = find(command)
    model = load_world_model(models.folder(sources.world_model))
    with ExitStack() as stack:
        groups = _groups(sources, model, command.seed, stack)
        samples = _sampled(model, groups, command)
    found = _compared(samples, command)
    _write(sources.out, command, sources, groups, found, samples)
    _print(found)
    console.print(f"Look at {sources.out / 'shift.png'}; the numbers are in shift.json.", soft_wrap=True)
    return 0


def _compared(samples: Mapping[str, tuple[Sample, Sample]], command: Shift) -> dict[str, list[distances.Distances]]:
    """Latent space → the distances of everything else from the online and, if given, the expert data."""
    references = [name for name in ("online", "expert") if name in samples]
    found: dict[str, list[distances.Distances]] = {space: [] for space in SPACES}
    done, total = itertools.count(1), len(SPACES) * len(references) * command.repeats
    with bar("distances") as progress:
        for i, space in enumerate(SPACES):
            others = {name: pair[i] for name, pair in samples.items() if name not in references}
            for name in references:
                found[space] += distances.compare(
                    name, samples[name][i], others, command.states, command.repeats, command.seed,
                    lambda: progress(next(done), total, {}),
                )  # fmt: skip
    return found


def find(command: Shift) -> Sources:
    """What the flags name; what they do not name, from the run's folder."""
    config, run = None, command.run
    if run is not None:
        config = config_of(run)
    rehearsed = command.rehearsal or (run / "rehearsal.json" if run is not None else None)
    if command.rehearsal is None and rehearsed is not None and not rehearsed.exists():
        rehearsed = None
    places = {
        "online": command.online or (run / "online" if run is not None else None),
        "pool": command.pool or (config.store if config is not None else None),
        "world-model": command.world_model or (config.world_model if config is not None else None),
        "out": command.out or run,
    }
    for name, place in places.items():
        if place is None:
            raise UsageError(f"Give the folder of a run, or --{name}.")
    online, pool, world_model, out = (Path(str(place)) for place in places.values())
    return Sources(online, pool, world_model, rehearsed, command.expert, out)


Group = tuple[TrajectoryStore, np.ndarray]  # a store and the rows of it that are compared


def _groups(sources: Sources, model: WorldModel, seed: int, stack: ExitStack) -> dict[str, Group]:
    """What is compared, by name: online, expert if given, retrieved if anything was, random, pool."""
    online, pool = (stack.enter_context(TrajectoryStore.open(path)) for path in (sources.online, sources.pool))
    groups = {"online": (online, online.rows())}
    if sources.expert is not None:
        expert = stack.enter_context(TrajectoryStore.open(sources.expert))
        groups["expert"] = (expert, expert.rows())
    embodiments = [name for name, entry in online.info().items() if entry["trajectories"]]
    if len(embodiments) != 1:
        raise UsageError(
            f"{sources.online} has trajectories of {', '.join(embodiments) or 'no robot'}; the online data of a run is "
            "of one."
        )
    k = len(pool.rows(embodiments[0]))
    if sources.rehearsal is not None:
        found = RehearsalSet.load(sources.rehearsal)
        found.require(pool)
        k = len(found)
        if found.kind == "nearest":
            groups["retrieved"] = (pool, np.array(found.rows, np.int64))
    if k == 0:
        raise UsageError(f"{sources.pool} has no trajectories of {embodiments[0]}: there is nothing to compare.")
    groups["random"] = (pool, np.array(random_rehearsal(pool, k, embodiments[0], seed).rows, np.int64))
    groups["pool"] = (pool, _seen(pool, model))
    return groups


def _seen(store: TrajectoryStore, model: WorldModel) -> np.ndarray:
    """The rows of embodiments that the world model can take."""
    fits = []
    for name, spec in store.specs.items():
        try:
            model.config.observation.require(spec.observation, "The world model", name)
        except SpecMismatch:
            continue
        if spec.action_dim <= model.config.max_action_dim:
            fits.append(store.rows(name))
    return np.sort(np.concatenate(fits)) if fits else np.zeros(0, np.int64)


def _sampled(model: WorldModel, groups: Mapping[str, Group], command: Shift) -> dict[str, tuple[Sample, Sample]]:
    samples, done, total = {}, 0, command.sequences * len(groups)
    with bar("encode") as progress:
        for i, (name, (store, rows)) in enumerate(groups.items()):
            if len(rows) == 0:
                raise UsageError(f"There are no {name} trajectories in {store.path}.")

            def tell(n: int, before: int = done) -> None:
                progress(before + n, total, {})

            samples[name] = latents(model, store, rows, command.sequences, command.length, [command.seed, i], tell)
            done += command.sequences
    return samples


def latents(
    model: WorldModel, store: TrajectoryStore, rows: np.ndarray, sequences: int, length: int, seed: list[int],
    tell: Callable[[int], None] = lambda n: None,
) -> tuple[Sample, Sample]:  # fmt: skip
    """Encoder features [N, F] and posterior states [N, D + S·K] of sequences as training draws them.

    Uniform over start positions, `length` rows each, the latent starting anew. A state is the deterministic part and
    the probabilities of the stochastic one: its samples would add noise to every distance. Of each sequence up to 16
    states are kept: memory is that of 16·sequences states, whatever the stores' size.
    """
    import torch

    from gsa.agent.latents import log_probs

    rng, kept, done = np.random.default_rng(seed), [], 0
    refs = sorted(draw(store, rows, sequences, length, rng))
    generator = torch.Generator(model.device).manual_seed(int(rng.integers(1 << 62)))
    for lot, seen in lots(model, store, refs, length):
        with torch.inference_mode():
            features = model.encode(seen.observation).float()
            states = model.observe(features, seen.previous_action, seen.is_first, generator)
            belief = log_probs(states.logits, model.config.unimix).exp().flatten(-2)
            joined = torch.cat([states.deter.float(), belief], -1)
        for b, ref in enumerate(lot):
            keep = np.sort(rng.permutation(len(ref))[:STATES_A_SEQUENCE])
            kept.append((features[b, keep].cpu().numpy(), joined[b, keep].cpu().numpy(), ref.trajectory))
        tell(done := done + len(lot))
    trajectory = np.repeat([row for _, _, row in kept], [len(states) for states, _, _ in kept])
    return Sample(np.concatenate([k[0] for k in kept]), trajectory), Sample(
        np.concatenate([k[1] for k in kept]), trajectory
    )


def draw(
    store: TrajectoryStore, rows: np.ndarray, sequences: int, length: int, rng: np.random.Generator
) -> list[SequenceRef]:
    """Sequences of these trajectories as training draws them: uniform over start positions."""
    sampler = SequenceSampler("data", length)
    sampler.extend(rows, store.catalog.length[rows])
    return sampler.draw(sequences, rng)


def lots(
    model: WorldModel, store: TrajectoryStore, refs: Sequence[SequenceRef], length: int
) -> Iterator[tuple[Sequence[SequenceRef], TensorBatch]]:
    """What `draw` gave, cut for the model, a few at a time."""
    from gsa.agent.world_model import TensorBatch

    for start in range(0, len(refs), ENCODED_SEQUENCES):
        lot = refs[start : start + ENCODED_SEQUENCES]
        batch = cut({"data": store}, lot, length, model.config.max_action_dim)
        yield lot, TensorBatch.from_batch(batch, model.device)


def _write(
    out: Path, command: Shift, sources: Sources, groups: Mapping[str, Group],
    found: Mapping[str, list[distances.Distances]], samples: Mapping[str, tuple[Sample, Sample]],
) -> None:  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(command, name) for name in ("sequences", "length", "states", "repeats", "seed")}
    report = {
        "format": "gsa-shift", "version": 1, "distance": "Wasserstein-1, L2 cost",
        "sources": {k: None if v is None else str(v) for k, v in dataclasses.asdict(sources).items()},
        "settings": settings | {"projections": distances.PROJECTIONS},
        "trajectories": {name: len(rows) for name, (_, rows) in groups.items()},
        "spaces": {space: [dataclasses.asdict(row) for row in rows] for space, rows in found.items()},
    }  # fmt: skip
    with replace_file(out / "shift.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    states = {space: {name: pair[i] for name, pair in samples.items()} for i, space in enumerate(SPACES)}
    counted = ", ".join(f"{name} {len(rows)}" for name, (_, rows) in groups.items())
    with replace_file(out / "shift.png") as file:
        file.write(
            distances.draw(found, states, f"Distribution shift in the world model's latents (trajectories: {counted})")
        )


def _print(found: Mapping[str, list[distances.Distances]]) -> None:
    for space, rows in found.items():
        print(f"Wasserstein-1 distance between {space}: mean [95 % of repeats]")
        for row in rows:
            name = "other half" if row.sample == row.reference else row.sample
            exact, sliced, share = map(_short, (row.exact, row.sliced, row.exact_ratio))
            print(f"  {row.reference + ' → ' + name:20}  {exact:26}  sliced {sliced:28}  {share} of the pool's")


def _short(value: distances.Estimate) -> str:
    return f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"
