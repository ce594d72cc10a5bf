"""The trajectory store against its rivals: random sequences, size, memory, ingestion.

Data: images of the simulators (64×64 RGB), as a codec finds them. A few rendered episodes are played to and fro and
shifted sideways, each differently, into trajectories of 250 agent steps. Everything is in the page cache.

sequences   Batches of 16 sequences of 64 rows, uniform over start positions, in turns:
            ours       `cut` into a reused batch from stores without a codec, with lz4, with zstd
            memcpy     as many bytes from a large array in memory, sequence by sequence, from random places
            reference  the loader of the method's reference: GSA_PEER_NCRL names a checkout. As its pre-training has
                       it: all episodes unpacked in memory, no worker processes
            torchrl    LazyMemmapStorage and SliceSampler with cached values, if torchrl is installed
            ours, memcpy and the reference's loader take one thread, torchrl all cores.
size        What the number of rows costs, and nothing else: catalogs of 10³ and 10⁶ rows, all of which point to the
            bytes of the same 20 trajectories. A batch from either, in turns; in a process of its own opening the large
            one, and the anonymous memory (RssAnon) of drawing batches from it and of looking up ids.
files       What it is with the data there: 10³ and 20,000 different trajectories of 100 steps and 16×16 images, each in
            a place of its own, 1.6 GB in dozens of shards. A batch from either, in turns.
ingestion   Episodes as the reference writes them (npz, deflated): `ingest` into a new store, on disk when it returns,
            against np.load of every array of every file once, in one thread, in turns. Each store is removed before
            the next turn, so that the pages it is written to are such as the machine has in use.

    python -m benchmarks.store [--quick] [--save]
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from actors.environment import make
from benchmarks import harness
from gsa.schema import ArraySpec, Spec, Trajectory
from replay_service.batches import SequenceSampler, cut, empty_batch
from retrieval.ingest import ingest
from retrieval.layout import CODECS
from retrieval.store import TrajectoryStore

BATCH, LENGTH, STEPS, ACTIONS = 16, 64, 250, 4
TASKS = ("dmc/walker-walk", "metaworld/reach-v3")
SPEC = Spec("metaworld/sawyer", {"pixels": ArraySpec((64, 64, 3), "uint8")}, ACTIONS, 2)
TINY = Spec("toy/arm", {"pixels": ArraySpec((16, 16, 3), "uint8")}, ACTIONS)
MEMORY_MB = 300
Rival = Callable[[], object]


def main() -> int:
    options = harness.arguments(__doc__)
    trajectories, rounds = (24, 20) if options.quick else (200, 200)
    rows, episodes, repeats = (100_000, 8, 2) if options.quick else (1_000_000, 60, 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = Episodes(np.random.default_rng(0), 2 if options.quick else 4)
        result, goals = sequences(root, source, trajectories, rounds)
        parts = (
            size(root, source, rows, rounds), files(root, 2_000 if options.quick else 20_000, rounds),
            ingestion(root, source, episodes, repeats),
        )  # fmt: skip
        for part, more in parts:
            result, goals = result | part, goals | more
    return harness.finish("store", result, goals, options)


class Episodes:
    """Endless trajectories, made of a few rendered ones."""

    def __init__(self, rng: np.random.Generator, each: int) -> None:
        self.rng, self.films = rng, [film(task, seed) for task in TASKS for seed in range(each)]

    def __next__(self) -> Trajectory:
        played = self.films[self.rng.integers(len(self.films))]
        to_and_fro = np.resize(np.concatenate([played, played[-2:0:-1]]), (STEPS + 1, *played.shape[1:]))
        pixels = np.roll(to_and_fro, int(self.rng.integers(64)), axis=2)
        action = self.rng.uniform(-1, 1, (STEPS, ACTIONS)).astype(np.float32)
        return Trajectory(SPEC.embodiment, {"pixels": pixels}, action, np.ones(STEPS, np.float32))


def film(task: str, seed: int) -> np.ndarray:
    """The images of 100 steps under smooth random actions: [101, 64, 64, 3]."""
    rng = np.random.default_rng(seed)
    with make(task) as env:
        frames, action = [env.reset(seed)["pixels"]], np.zeros(env.spec.action_dim)
        for _ in range(100):
            action = np.clip(0.9 * action + rng.normal(0, 0.3, action.shape), -1, 1)
            frames.append(env.step(action.astype(np.float32)).observation["pixels"])
    return np.stack(frames)


# Sequences


def sequences(root: Path, source: Episodes, trajectories: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    pool = [next(source) for _ in range(trajectories)]
    flat = np.concatenate([t.observation["pixels"] for t in pool])
    with contextlib.ExitStack() as stack:
        stores = {codec: stack.enter_context(filled(root / codec, codec, pool)) for codec in CODECS}
        rivals: dict[str, Rival] = {f"ours_{codec}": batches(store) for codec, store in stores.items()}
        rivals["memcpy"] = memcpy(flat)
        peers = dict(available_peers(root, pool, flat))
        seconds = harness.interleaved(rivals | peers, rounds)
        megabytes = {codec: store.info()[SPEC.embodiment]["bytes"] / 1e6 for codec, store in stores.items()}
    best = min(peers, key=lambda peer: np.median(seconds[peer]), default=None)
    goals = {"speed_over_memcpy": harness.at_least(harness.ratio(seconds["ours_none"], seconds["memcpy"]), 0.5)}
    if best is not None:
        goals["speed_over_best_peer"] = harness.at_least(harness.ratio(seconds["ours_none"], seconds[best]), 2)
    result = {
        "batch_bytes": BATCH * LENGTH * 64 * 64 * 3,
        "batch_ms": {name: _ms(s) for name, s in seconds.items()},
        "best_peer": best,
        "speed_over_memcpy": {name: _times(seconds, name, "memcpy") for name in seconds if name != "memcpy"},
        "speed_over": {peer: {name: _times(seconds, name, peer) for name in rivals} for peer in peers},
        "megabytes": {codec: round(mb, 1) for codec, mb in megabytes.items()},
    }
    return result, goals


def filled(path: Path, codec: str, pool: list[Trajectory]) -> TrajectoryStore:
    store = TrajectoryStore.create(path, codec)
    with store.batch():
        for trajectory in pool:
            store.append(trajectory, SPEC)
    return store


def batches(store: TrajectoryStore, seed: int = 0, spec: Spec = SPEC) -> Rival:
    sampler, rng = SequenceSampler("pool", LENGTH), np.random.default_rng(seed)
    sampler.extend(store.rows(), store.catalog.length[store.rows()])
    out = empty_batch(BATCH, LENGTH, spec.observation, ACTIONS)
    return lambda: cut({"pool": store}, sampler.draw(BATCH, rng), LENGTH, ACTIONS, out=out)


def memcpy(flat: np.ndarray) -> Rival:
    into, rng = np.empty((BATCH, LENGTH, *flat.shape[1:]), np.uint8), np.random.default_rng(0)

    def copy() -> None:
        for b, start in enumerate(rng.integers(0, len(flat) - LENGTH, BATCH)):
            into[b] = flat[start : start + LENGTH]

    return copy


def available_peers(root: Path, pool: list[Trajectory], flat: np.ndarray) -> Iterator[tuple[str, Rival]]:
    for name, peer in (("reference", reference), ("torchrl", torchrl)):
        try:
            yield name, peer(root / name, pool, flat)
        except (ImportError, KeyError) as error:
            print(f"skipped: {name} ({error!r})", flush=True)


def reference(folder: Path, pool: list[Trajectory], flat: np.ndarray) -> Rival:
    """The reference's own loader over npz files in its layout."""
    sys.path.insert(0, str(Path(os.environ["GSA_PEER_NCRL"]) / "src"))
    from replay_buffer import make_replay_loader

    write_reference(folder, pool, deflate=False)
    specs = [types.SimpleNamespace(name=name) for name in ("observation", "action", "discount")]
    loader = make_replay_loader(folder, specs, 10**9, BATCH, 0, LENGTH, ACTIONS, True)
    endless = iter(loader)
    return lambda: next(endless)


def write_reference(folder: Path, pool: list[Trajectory], deflate: bool) -> None:
    folder.mkdir()
    save = np.savez_compressed if deflate else np.savez
    for i, t in enumerate(pool):
        arrays = {
            "observation": t.observation["pixels"].transpose(0, 3, 1, 2),
            "action": np.concatenate([np.zeros((1, ACTIONS), np.float32), t.action]),
            "discount": np.ones((STEPS + 1, 1), np.float32),
        }
        save(folder / f"20260101T000000-{i:032x}-{i}-{STEPS}.npz", **arrays)


def torchrl(folder: Path, pool: list[Trajectory], flat: np.ndarray) -> Rival:
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

    torch.set_num_threads(os.cpu_count() or 1)
    rows = len(pool) * (STEPS + 1)
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(rows, scratch_dir=str(folder)),
        sampler=SliceSampler(slice_len=LENGTH, traj_key="episode", cache_values=True, truncated_key=None),
        batch_size=BATCH * LENGTH,
    )
    episode = np.repeat(np.arange(len(pool)), STEPS + 1)
    whole = {"pixels": flat, "action": np.zeros((rows, ACTIONS), np.float32), "discount": np.ones(rows, np.float32)}
    tensors = {name: torch.from_numpy(array) for name, array in (whole | {"episode": episode}).items()}
    buffer.extend(TensorDict(tensors, [rows]))
    return buffer.sample


# Size


def size(root: Path, source: Episodes, rows: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    pool = [next(source) for _ in range(20)]
    small = widened(root / "small", pool, 1000)
    large = widened(root / "large", pool, rows)
    with TrajectoryStore.open(small) as few, TrajectoryStore.open(large) as many:
        seconds = harness.interleaved({"few": batches(few), "many": batches(many)}, rounds)
    code = f"from benchmarks.store import open_and_draw; open_and_draw({str(large)!r})"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    alone = json.loads(run.stdout)
    slower = float(np.median(seconds["many"]) / np.median(seconds["few"]))
    result = {"rows": rows, "batch_ms_by_rows": {"1000": _ms(seconds["few"]), str(rows): _ms(seconds["many"])}, **alone}
    most = max(alone["anonymous_mb"].values())
    goals = {
        "batch_time_many_rows_over_few": harness.at_most(slower, 1.2),
        "open_s": harness.at_most(alone["open_s"], 5),
        "anonymous_mb": harness.at_most(most, MEMORY_MB),
    }
    return result, goals


def files(root: Path, trajectories: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rng, seconds = np.random.default_rng(1), {}
    with contextlib.ExitStack() as stack:
        stores = {n: stack.enter_context(tiny(root / f"tiny-{n}", n, rng)) for n in (1000, trajectories)}
        seconds = harness.interleaved({str(n): batches(store, spec=TINY) for n, store in stores.items()}, rounds)
        shards = len(list((root / f"tiny-{trajectories}" / "shards").iterdir()))
    few, many = seconds["1000"], seconds[str(trajectories)]
    result = {
        "different": trajectories,
        "shards": shards,
        "batch_ms_by_different": {k: _ms(s) for k, s in seconds.items()},
    }
    slower = float(np.median(many) / np.median(few))
    return result, {"batch_time_many_different_over_few": harness.at_most(slower, 1.2)}


def tiny(path: Path, trajectories: int, rng: np.random.Generator) -> TrajectoryStore:
    """A store of so many trajectories, no two alike, in shards of 32 MB."""
    store, shape = TrajectoryStore.create(path), (101, *TINY.observation["pixels"].shape)
    with mock.patch("retrieval.writer.SHARD_BYTES", 32 << 20):
        for begin in range(0, trajectories, 400):
            with store.batch():
                for _ in range(begin, min(begin + 400, trajectories)):
                    pixels = rng.integers(0, 256, shape, np.uint8)
                    action, discount = np.zeros((100, ACTIONS), np.float32), np.ones(100, np.float32)
                    store.append(Trajectory(TINY.embodiment, {"pixels": pixels}, action, discount), TINY)
    return store


def widened(path: Path, pool: list[Trajectory], rows: int) -> Path:
    """A store of `rows` rows that all lie where those of `pool` do, entered as a writer would have."""
    with filled(path, "none", pool) as store:
        names = list(store.specs)
        first = [store.catalog.record(row, names) for row in range(len(pool))]
        for begin in range(len(pool), rows, 50_000):
            new = (
                dataclasses.replace(first[row % len(pool)], row=row, id=f"{row:032x}", source=f"source-{row % 99}")
                for row in range(begin, min(begin + 50_000, rows))
            )
            store._log.append(b"".join(record.line() for record in new))
    with TrajectoryStore.open(path, write=True):
        pass  # leaves a snapshot
    return path


def open_and_draw(path: str) -> None:
    """Prints what opening a store takes and what it leaves in memory: a process of its own."""
    import time

    anonymous = {"at_start": anonymous_mb()}
    started = time.perf_counter()
    store = TrajectoryStore.open(path)
    opened = time.perf_counter() - started
    anonymous["opened"] = anonymous_mb()
    draw = batches(store)
    for _ in range(300):
        draw()
    anonymous["after_300_batches"] = anonymous_mb()
    store.find("nobody")
    anonymous["after_finding_an_id"] = anonymous_mb()
    print(json.dumps({"open_s": round(opened, 3), "anonymous_mb": anonymous}))


def anonymous_mb() -> float:
    """Memory of this process that is not a file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3, 1)


# Ingestion


def ingestion(root: Path, source: Episodes, episodes: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = root / "metaworld" / "reach-v3"
    folder.parent.mkdir()
    write_reference(folder, [next(source) for _ in range(episodes)], deflate=True)
    store_path = root / "ingested"

    def read() -> None:
        for path in sorted(folder.iterdir()):
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                for name in arrays.files:
                    arrays[name]

    def ours() -> None:
        with TrajectoryStore.create(store_path) as store:
            report = ingest(folder, store)
        assert (report.added, report.failed) == (episodes, [])

    rivals: dict[str, Rival] = {"read": read, "ingest": ours}
    seconds = harness.interleaved(rivals, repeats, clean=lambda: shutil.rmtree(store_path, ignore_errors=True))
    over = float(np.median(seconds["ingest"]) / np.median(seconds["read"]))
    megabytes = episodes * (STEPS + 1) * 64 * 64 * 3 / 1e6
    result = {
        "ingest_s": {name: round(float(np.median(s)), 3) for name, s in seconds.items()},
        "ingest_mb_per_s": round(megabytes / float(np.median(seconds["ingest"])), 1),
    }
    return result, {"ingest_over_read": harness.at_most(over, 1.5)}


def _ms(seconds: list[float]) -> float:
    return round(1e3 * float(np.median(seconds)), 3)


def _times(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    return round(harness.ratio(seconds[ours], seconds[theirs]), 3)


if __name__ == "__main__":
    sys.exit(main())
