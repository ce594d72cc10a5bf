"""Batches a second of 16×64 pixels, 12 rows online and 4 rehearsed, against other replay buffers; memory in a long run.

Two stores of random 64×64 RGB episodes of 250 agent steps, in the page cache. In turns, a burst of batches each, and a
pause after it so that nobody's workers run into the next one's turn:

    in-process      ReplayService.sample, into reused buffers
    ray             the same service in another process; the learner beside it cuts from the mapped files
    ray-other-node  the same, as a learner on another node has it: batches through Ray's object store
    memcpy          as many bytes from a large array in memory, sequence by sequence, from random places
    ncrl            the reference's DataLoaders, 4 workers each, one for 12 rows and one for 4 (GSA_PEER_NCRL)
    torchrl         two TensorDictReplayBuffers, memmap storage and slice sampler, for 12 and 4 slices
    rllib           one EpisodeReplayBuffer for all 16 rows

One thread copies sequences from mapped files as fast as from memory, with large pages or without: memcpy is the most
that one thread of ours can do, and Python's work on addresses and short arrays comes on top. Ours cut with two threads
where there are two cores, TorchRL samples two batches ahead in threads, the reference has eight processes; memcpy and
RLlib's buffer, which has no such setting, run in one thread. Peers give what they give: none of them masks short
episodes or tells where a row is from. Goals: twice the best peer in-process, and 60 % of in-process over Ray.

Memory: 10⁶ agent steps in episodes of 500, of 16×16 RGB images, are collected and one batch sampled for each
episode; the anonymous memory of the process (RssAnon) is fitted by a line over the second half. The goal, 32 bytes a
step, is what the catalog keeps of an episode (a few kilobytes) spread over its steps.

    python -m benchmarks.replay [--quick] [--save]
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from gsa.schema import ArraySpec, Lease, Spec, Trajectory
from replay_service.config import ReplayConfig
from replay_service.service import ReplayService
from retrieval.store import TrajectoryStore

BATCH, LENGTH, STEPS, ACTIONS = 16, 64, 250, 4
REHEARSED = 4
WORKERS = 4  # of each of the reference's loaders
SETTLE_S = 0.3
SPEC = Spec("bench/arm", {"pixels": ArraySpec((64, 64, 3), "uint8")}, ACTIONS)
Draw = Callable[[], object]  # one batch


def main() -> int:
    options = harness.arguments(__doc__)
    episodes, burst, rounds = (24, 10, 2) if options.quick else (120, 60, 12)
    slope = memory_slope(20_000 if options.quick else 1_000_000)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, rng = Path(name), np.random.default_rng(0)
        online = [_episode(rng, SPEC, STEPS) for _ in range(episodes)]
        pool = [_episode(rng, SPEC, STEPS) for _ in range(episodes // 2)]
        for side, played in (("online", online), ("pool", pool)):
            with TrajectoryStore.create(folder / side) as store, store.batch():
                for trajectory in played:
                    store.append(trajectory, SPEC)
        draws = {"memcpy": _memcpy(online, rng), **_ours(folder, stack), **_peers(folder, online, pool, stack)}
        rivals = {name: _burst(draw, burst) for name, draw in draws.items()}
        seconds = harness.interleaved(rivals, rounds, SETTLE_S)
    per_s = {name: burst / float(np.median(s)) for name, s in seconds.items()}
    peers = [name for name in per_s if name in ("ncrl", "torchrl", "rllib")]
    goals = {
        "ray_over_in_process": harness.at_least(harness.ratio(seconds["ray"], seconds["in-process"]), 0.6),
        "memory_bytes_a_step": harness.at_most(slope["bytes_a_step"], 32),
    }
    if peers:
        best = max(peers, key=per_s.__getitem__)
        goals[f"in_process_over_{best}"] = harness.at_least(harness.ratio(seconds["in-process"], seconds[best]), 2)
    result = {"batches_per_s": {k: round(v, 1) for k, v in per_s.items()}, "memory": slope}
    return harness.finish("replay", result, goals, options)


def settings(steps: int) -> ReplayConfig:
    """A limiter that never says wait."""
    return ReplayConfig(BATCH, LENGTH, REHEARSED / BATCH, samples_per_insert=1e6, min_size=1, budget=steps + 1)


def service(folder: Path, buffers: int) -> ReplayService:
    online, pool = TrajectoryStore.open(folder / "online", write=True), TrajectoryStore.open(folder / "pool")
    return ReplayService(settings(online.steps), online, SPEC, pool, pool.rows(), buffers=buffers)


def _ours(folder: Path, stack: contextlib.ExitStack) -> dict[str, Draw]:
    import ray

    from deploy import ray_links
    from deploy.ray_actors import ReplayActor

    class Replay(ReplayActor):
        def __init__(self, folder: Path) -> None:
            self._service = service(folder, buffers=1)

    shutil.copytree(folder, folder / "elsewhere", ignore=lambda at, names: {"elsewhere"} & set(names))
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    stack.callback(ray.shutdown)
    actor = ray.remote(Replay).options(max_concurrency=4).remote(folder / "elsewhere")
    beside = ray_links.RayBatchLink(actor)
    here, ray_links._here = ray_links._here, lambda: "another node"
    elsewhere = ray_links.RayBatchLink(actor)
    ray_links._here = here
    for link in (beside, elsewhere):
        stack.callback(link.close)
    return {
        "in-process": service(folder, buffers=1).sample,
        "ray": _until(beside.sample),
        "ray-other-node": _until(elsewhere.sample),
    }


def _until(sample: Draw) -> Draw:
    def draw() -> object:
        while (batch := sample()) is None:
            pass
        return batch

    return draw


def _memcpy(online: list[Trajectory], rng: np.random.Generator) -> Draw:
    flat = np.concatenate([t.observation["pixels"] for t in online])
    into = np.empty((BATCH, LENGTH, *flat.shape[1:]), np.uint8)

    def draw() -> None:
        for b, start in enumerate(rng.integers(0, len(flat) - LENGTH, BATCH)):
            into[b] = flat[start : start + LENGTH]

    return draw


def _peers(
    folder: Path, online: list[Trajectory], pool: list[Trajectory], stack: contextlib.ExitStack
) -> dict[str, Draw]:
    peers = {}
    for name, make in (("ncrl", _ncrl), ("torchrl", _torchrl), ("rllib", _rllib)):
        try:
            peers[name] = make(folder, online, pool, stack)
        except (ImportError, KeyError, OSError) as error:
            print(f"{name} is left out: {error!r}.", flush=True)
    return peers


def _ncrl(folder: Path, online: list[Trajectory], pool: list[Trajectory], stack: contextlib.ExitStack) -> Draw:
    path = Path(os.environ["GSA_PEER_NCRL"]) / "src" / "replay_buffer.py"
    found = importlib.util.spec_from_file_location("ncrl_replay_buffer", path)
    assert found is not None and found.loader is not None
    module: Any = importlib.util.module_from_spec(found)
    sys.modules["ncrl_replay_buffer"] = module  # its workers are forks
    found.loader.exec_module(module)
    Field = namedtuple("Field", ["name"])
    fields = [Field(name) for name in ("observation", "action", "reward", "discount")]
    loaders = []
    for side, played, rows in (("online", online, BATCH - REHEARSED), ("pool", pool, REHEARSED)):
        episodes = folder / f"ncrl-{side}"
        episodes.mkdir()
        for i, t in enumerate(played):
            pad = {"action": t.action, "reward": np.zeros((STEPS, 1), np.float32), "discount": t.discount[:, None]}
            arrays = {k: np.concatenate([np.zeros((1, v.shape[1]), np.float32), v]) for k, v in pad.items()}
            pixels = np.ascontiguousarray(t.observation["pixels"].transpose(0, 3, 1, 2))
            np.savez(episodes / f"0-{i:08x}-{i}-{STEPS}.npz", observation=pixels, **arrays)
        loader = module.make_replay_loader(episodes, fields, 10**7, rows, WORKERS, LENGTH, ACTIONS, True)
        loaders.append(iter(loader))
    stack.callback(loaders.clear)

    def draw() -> None:
        for loader in loaders:
            next(loader)

    return draw


def _torchrl(folder: Path, online: list[Trajectory], pool: list[Trajectory], stack: contextlib.ExitStack) -> Draw:
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

    buffers = []
    for side, played, rows in (("online", online, BATCH - REHEARSED), ("pool", pool, REHEARSED)):
        storage = LazyMemmapStorage(len(played) * STEPS, scratch_dir=str(folder / f"torchrl-{side}"))
        sampler = SliceSampler(slice_len=LENGTH, traj_key="episode", cache_values=True, strict_length=True)
        buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=rows * LENGTH, prefetch=2)
        for i, t in enumerate(played):
            columns = {
                "pixels": t.observation["pixels"][:-1], "action": t.action, "discount": t.discount,
                "reward": np.zeros(STEPS, np.float32), "episode": np.full(STEPS, i),
            }  # fmt: skip
            buffer.extend(TensorDict({k: torch.from_numpy(v.copy()) for k, v in columns.items()}, [STEPS]))
        buffers.append(buffer)

    def draw() -> None:
        for buffer in buffers:
            buffer.sample()

    return draw


def _rllib(folder: Path, online: list[Trajectory], pool: list[Trajectory], stack: contextlib.ExitStack) -> Draw:
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode
    from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer

    buffer = EpisodeReplayBuffer(10**7)
    for t in online + pool:
        buffer.add(
            SingleAgentEpisode(
                observations=list(t.observation["pixels"]), actions=list(t.action), rewards=[0.0] * STEPS,
                infos=[{}] * (STEPS + 1), truncated=True, len_lookback_buffer=0,
            ).to_numpy()
        )  # fmt: skip
    return lambda: buffer.sample(batch_size_B=BATCH, batch_length_T=LENGTH)


def _burst(draw: Draw, n: int) -> Draw:
    def call() -> None:
        for _ in range(n):
            draw()

    return call


def memory_slope(steps: int) -> dict[str, float]:
    """Collects and samples; how much anonymous memory each step adds in the second half, in bytes."""
    spec = Spec("bench/small", {"pixels": ArraySpec((16, 16, 3), "uint8")}, ACTIONS)
    length, rng = 500, np.random.default_rng(0)
    played = [_episode(rng, spec, length) for _ in range(16)]
    one_an_episode = BATCH * LENGTH / length
    config = ReplayConfig(BATCH, LENGTH, 0.0, one_an_episode, min_size=length, budget=steps, episode_steps=length)
    points = []
    with tempfile.TemporaryDirectory() as folder, TrajectoryStore.create(Path(folder) / "online") as online:
        replay = ReplayService(config, online, spec, buffers=2)
        while not replay.complete:
            if isinstance(lease := replay.lease("w"), Lease):
                t = played[lease.episode % len(played)]
                assert replay.add("w", lease.episode, dataclasses.replace(t, id=f"{lease.episode:032x}"))
                points.append((replay.collected, _anonymous_bytes()))
            replay.sample()
    half = np.array(points[len(points) // 2 :], np.float64)
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0]
    first, last = (round(points[i][1] / 1e6, 1) for i in (0, -1))
    return {"steps": replay.collected, "bytes_a_step": round(float(slope), 2), "mb_first": first, "mb_last": last}


def _anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _episode(rng: np.random.Generator, spec: Spec, steps: int) -> Trajectory:
    return Trajectory(
        spec.embodiment,
        {"pixels": rng.integers(0, 256, (steps + 1, *spec.observation["pixels"].shape), np.uint8)},
        rng.uniform(-1, 1, (steps, ACTIONS)).astype(np.float32),
        np.ones(steps, np.float32),
        np.zeros(steps, np.float32),
    )


if __name__ == "__main__":
    sys.exit(main())
