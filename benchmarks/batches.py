"""Cutting a training batch from a store against copying the same bytes in memory.

A store of random pixel trajectories (64×64 RGB, 250 agent steps), uncompressed, mapped, in the page cache. In turns:
`cut` draws 16 sequences of 64 rows, uniform over start positions, and cuts them into a reused batch; `memcpy` copies as
many bytes from a large array in memory, sequence by sequence, from random places. The goal is half of memcpy's speed.

    python -m benchmarks.batches [--quick] [--save]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import harness
from gsa.schema import ArraySpec, Spec, Trajectory
from replay_service.batches import SequenceSampler, cut, empty_batch
from retrieval.store import TrajectoryStore

BATCH, LENGTH, STEPS, ACTIONS = 16, 64, 250, 4
SPEC = Spec("bench/arm", {"pixels": ArraySpec((64, 64, 3), "uint8")}, ACTIONS)


def main() -> int:
    options = harness.arguments(__doc__)
    trajectories, rounds = (20, 20) if options.quick else (400, 200)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, TrajectoryStore.create(Path(folder) / "store") as store:
        with store.batch():
            for _ in range(trajectories):
                store.append(_trajectory(rng), SPEC)
        sampler = SequenceSampler("pool", LENGTH)
        sampler.extend(store.rows(), store.catalog.length[store.rows()])
        batch = empty_batch(BATCH, LENGTH, SPEC.observation, ACTIONS)
        flat = np.concatenate([store.read(row).observation["pixels"] for row in store.rows()])
        into = np.empty((BATCH, LENGTH, 64, 64, 3), np.uint8)

        def ours() -> None:
            cut({"pool": store}, sampler.draw(BATCH, rng), LENGTH, ACTIONS, out=batch)

        def memcpy() -> None:
            for b, start in enumerate(rng.integers(0, len(flat) - LENGTH, BATCH)):
                into[b] = flat[start : start + LENGTH]

        seconds = harness.interleaved({"cut": ours, "memcpy": memcpy}, rounds)
    share = harness.ratio(seconds["cut"], seconds["memcpy"])
    result = {f"{name}_ms": 1e3 * float(np.median(s)) for name, s in seconds.items()} | {"bytes": into.nbytes}
    return harness.finish("batches", result, {"speed_over_memcpy": harness.at_least(share, 0.5)}, options)


def _trajectory(rng: np.random.Generator) -> Trajectory:
    return Trajectory(
        SPEC.embodiment,
        {"pixels": rng.integers(0, 256, (STEPS + 1, 64, 64, 3), np.uint8)},
        rng.uniform(-1, 1, (STEPS, ACTIONS)).astype(np.float32),
        np.ones(STEPS, np.float32),
    )


if __name__ == "__main__":
    sys.exit(main())
