"""From stores to batches: draw the addresses of sequences, cut them into arrays. The one place where an action
becomes a previous action.

Row t of a sequence that starts at observation row s holds

    observation o_s+t     previous_action a_s+t−1     reward r_s+t−1     discount d_s+t−1

with zeros for the action at t=0, where the latent starts anew. Rows past the end of a short trajectory are zero
and not `valid`.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from gsa.errors import FormatError, SpecMismatch, UsageError
from gsa.schema import ArraySpec, Batch, SequenceRef, Spec
from retrieval.shard import Copy
from retrieval.store import TrajectoryStore


class SequenceSampler:
    """Draws sequences of one store, uniform over start positions. Grows and forgets at a cost that stays flat.

    A trajectory of T agent steps has T+1 observation rows and so T+2−length start positions; a shorter one has one.
    """

    def __init__(self, store: str, length: int) -> None:
        self.store, self.length = store, length
        self.steps = 0  # agent steps of the trajectories drawn from
        self._first = self._end = 0
        self._row = np.empty(64, np.int64)
        self._steps = np.empty(64, np.int64)
        self._starts = np.zeros(65, np.int64)  # start positions before the i-th trajectory

    def __len__(self) -> int:
        """Trajectories drawn from."""
        return self._end - self._first

    @property
    def positions(self) -> int:
        return int(self._starts[self._end] - self._starts[self._first])

    def extend(self, rows: Iterable[int] | np.ndarray, steps: Iterable[int] | np.ndarray) -> None:
        """Adds trajectories: catalog rows and their agent steps, both [N]."""
        rows, steps = np.asarray(rows, np.int64), np.asarray(steps, np.int64)
        end = self._end + len(rows)
        if end > len(self._row):
            room = max(end, 2 * len(self._row))
            self._row, self._steps = (np.resize(a, room) for a in (self._row, self._steps))
            self._starts = np.resize(self._starts, room + 1)
        self._row[self._end : end], self._steps[self._end : end] = rows, steps
        positions = np.maximum(steps + 2 - self.length, 1)
        self._starts[self._end + 1 : end + 1] = self._starts[self._end] + np.cumsum(positions)
        self._end, self.steps = end, self.steps + int(steps.sum())

    def forget_beyond(self, steps: int) -> None:
        """Stops drawing from the oldest trajectories while there are more than `steps` agent steps; keeps one."""
        while self.steps > steps and len(self) > 1:
            self.steps -= int(self._steps[self._first])
            self._first += 1

    def draw(self, n: int, rng: np.random.Generator) -> list[SequenceRef]:
        """`n` sequences, with replacement."""
        if n and not len(self):
            raise UsageError(f"No trajectories to draw from in the {self.store}.")
        position = rng.integers(self._starts[self._first], self._starts[self._end], size=n)
        index = np.searchsorted(self._starts[: self._end + 1], position, side="right") - 1
        start = position - self._starts[index]
        stop = np.minimum(start + self.length, self._steps[index] + 1)
        return [
            SequenceRef(self.store, *address)
            for address in zip(self._row[index].tolist(), start.tolist(), stop.tolist(), strict=True)
        ]


def specs_of(store: TrajectoryStore, rows: np.ndarray) -> list[Spec]:
    """The specs of the embodiments that `rows` [N] are of."""
    _, first = np.unique(store.catalog.embodiment[rows], return_index=True)
    return [store.spec(int(rows[i])) for i in first]


def shared_observation(specs: Iterable[Spec], max_action_dim: int) -> dict[str, ArraySpec]:
    """The observations that all embodiments have and have alike. SpecMismatch where nothing is left."""
    specs = list(specs)
    for spec in specs:
        if spec.action_dim > max_action_dim:
            raise SpecMismatch(f"{spec.embodiment} has {spec.action_dim} actions; the model takes {max_action_dim}.")
    shared = set.intersection(*(set(s.observation.items()) for s in specs)) if specs else set()
    if not shared:
        have = "; ".join(f"{s.embodiment} has {', '.join(s.observation)}" for s in specs) or "an empty store has none"
        raise SpecMismatch(f"No observation of one name and size is common to all embodiments: {have}.")
    return dict(sorted(shared))


def empty_batch(batch: int, length: int, observation: Mapping[str, ArraySpec], max_action_dim: int) -> Batch:
    """Arrays for `cut` to fill."""
    bt = (batch, length)
    return Batch(
        {k: np.empty((*bt, *spec.shape), spec.dtype) for k, spec in observation.items()},
        np.empty((*bt, max_action_dim), np.float32), np.empty((batch, max_action_dim), np.float32),
        reward=np.empty(bt, np.float32), reward_mask=np.empty(bt, bool), discount=np.empty(bt, np.float32),
        is_first=np.empty(bt, bool), valid=np.empty(bt, bool), refs=(),
    )  # fmt: skip


def cut(
    stores: Mapping[str, TrajectoryStore],
    refs: Sequence[SequenceRef],
    length: int,
    max_action_dim: int,
    reward_from: Collection[str] = (),
    out: Batch | None = None,
    helper: Executor | None = None,
) -> Batch:
    """The batch of `refs`, in their order.

    Rewards are read only from the stores named in `reward_from`. With `out`, its arrays are overwritten and
    shared with the batch returned. A `helper` copies, too: one core does it at half the speed of the memory.
    """
    if out is None:
        specs = [stores[ref.store].spec(ref.trajectory) for ref in refs]
        out = empty_batch(len(refs), length, shared_observation(specs, max_action_dim), max_action_dim)
    for array in (out.previous_action, out.action_mask, out.reward, out.reward_mask, out.discount, out.is_first):
        array[:] = 0
    out.is_first[:, 0] = True
    out.discount[:, 0] = 1
    out.valid[:] = np.arange(length) < np.array([[len(ref)] for ref in refs])
    # First all that Python has to do, then all copies: they push the one out of the processor's cache.
    rows = [_cut_row(stores[ref.store], ref, ref.store in reward_from, out, b) for b, ref in enumerate(refs)]
    _call([copy for row in rows for copy in row], helper)
    return dataclasses.replace(out, refs=tuple(refs))


def helping_thread() -> Executor | None:
    """A thread that takes some of the work on each batch, if there is a second core for it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(1, thread_name_prefix="cut") if cores > 1 else None


def _call(calls: Sequence[Callable[[], None]], helper: Executor | None) -> None:
    """Each of them, by whichever of the two threads is free."""
    left = iter(calls)

    def some() -> None:
        for call in left:
            call()

    helped = None if helper is None else helper.submit(some)
    try:
        some()
    finally:
        if helped is not None and not helped.cancel():  # it has begun, and writes to the same arrays
            wait([helped])
    if helped is not None and not helped.cancelled():
        helped.result(0)


def _cut_row(store: TrajectoryStore, ref: SequenceRef, with_reward: bool, out: Batch, b: int) -> list[Copy]:
    """Fills row b but for what remains to be copied."""
    n, start = len(ref), ref.start
    dim = store.spec(ref.trajectory).action_dim
    wanted = {name: (start, rows[b, :n]) for name, rows in out.observation.items()}
    if n < out.valid.shape[1]:
        for rows in out.observation.values():
            rows[b, n:] = 0
    if n > 1:
        wanted["action"] = start, out.previous_action[b, 1:n, :dim]
        wanted["discount"] = start, out.discount[b, 1:n]
    out.action_mask[b, :dim] = 1
    if with_reward and store.catalog.has(ref.trajectory, "reward"):
        first = 1 - min(start, 1)  # the reward that led to row 0 is one step earlier, if there is one
        wanted["reward"] = start + first - 1, out.reward[b, first:n]
        out.reward_mask[b, first:n] = True
    return store.copies(ref.trajectory, wanted)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of a run's batches: plain data, so that another process can cut them."""

    batch: int  # sequences
    length: int  # observation rows
    observation: Mapping[str, ArraySpec]
    max_action_dim: int

    def empty(self) -> Batch:
        return empty_batch(self.batch, self.length, self.observation, self.max_action_dim)


class Cutter:
    """Turns drawn refs into batches; rewards are those of the online store.

    With `buffers` = n, each thread that cuts reuses the arrays of n batches: one is overwritten by the n-th after it.
    Stores that another process writes to are read on when a ref is of a row they do not know yet.
    """

    def __init__(self, stores: Mapping[str, TrajectoryStore], layout: Layout, buffers: int = 0) -> None:
        self.stores, self.layout, self._buffers = stores, layout, buffers
        self._helper = helping_thread()
        self._thread = threading.local()  # .buffers, the next one first

    def __call__(self, refs: Sequence[SequenceRef]) -> Batch:
        for ref in refs:
            if ref.trajectory >= len(self.stores[ref.store]):
                self.stores[ref.store].refresh()
        layout, out = self.layout, self._next_buffer()
        return cut(self.stores, refs, layout.length, layout.max_action_dim, ("online",), out, self._helper)

    def _next_buffer(self) -> Batch:
        if not self._buffers:
            return self.layout.empty()
        if not hasattr(self._thread, "buffers"):
            self._thread.buffers = deque(self.layout.empty() for _ in range(self._buffers))
        self._thread.buffers.rotate(-1)
        return self._thread.buffers[-1]


class PoolBatches(Iterator[Batch]):
    """Endless batches from one store, uniform over start positions; the next one is cut while one is used.

    Batch i depends on the seed and i alone, so that `state()` is a number. With `buffers` = n ≥ 2 arrays are
    reused: a batch is overwritten when the (n−1)-th after it is asked for. Without an `observation` to read, what the
    embodiments share is read. With a `share` = (i, n) only the i-th of n equal parts of each batch is cut.
    """

    def __init__(
        self, store: TrajectoryStore, batch: int, length: int, max_action_dim: int, seed: int,
        rows: np.ndarray | None = None, buffers: int = 0, observation: Mapping[str, ArraySpec] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        if buffers == 1 or buffers < 0:
            raise UsageError("Batches need no buffers or at least 2: one is cut while one is used.")
        if batch % share[1]:
            raise UsageError(f"A batch of {batch} sequences does not divide into {share[1]} equal parts.")
        self.part = slice(share[0] * batch // share[1], (share[0] + 1) * batch // share[1])
        self.store, self.seed = store, seed
        self.batch, self.length, self.max_action_dim = batch, length, max_action_dim
        self._sampler = SequenceSampler("pool", length)
        rows = store.rows() if rows is None else np.asarray(rows, np.int64)
        if len(rows) == 0:
            raise UsageError(f"The store {store.path} has no trajectories to train on; ingest some first.")
        self._sampler.extend(rows, store.catalog.length[rows])
        shared = shared_observation(specs_of(store, rows), max_action_dim)
        self._observation = shared if observation is None else observation
        self._buffers = [self._empty() for _ in range(buffers)]
        self._thread, self._helper = ThreadPoolExecutor(1, thread_name_prefix="pool-batches"), helping_thread()
        self._cut = 0  # batches handed out
        self._next: Future[Batch] = self._thread.submit(self._make, 0)

    def __next__(self) -> Batch:
        batch = self._next.result()
        self._cut += 1
        self._next = self._thread.submit(self._make, self._cut)
        return batch

    def state(self) -> dict[str, Any]:
        """Plain data. What was cut ahead but not handed out is not counted."""
        return {"version": 1, "seed": self.seed, "batches": self._cut, "positions": self._sampler.positions}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues as the one that gave `state` would have. FormatError where the store or the seed differs."""
        for key, value in (self.state() | {"batches": state.get("batches")}).items():
            if state.get(key) != value:
                raise FormatError(f"Saved with {key} {state.get(key)}, now {value}: these batches cannot be continued.")
        self._next.result()
        self._cut = state["batches"]
        self._next = self._thread.submit(self._make, self._cut)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._helper is not None:
            self._helper.shutdown()

    def _make(self, i: int) -> Batch:
        refs = self._sampler.draw(self.batch, np.random.default_rng([self.seed, i]))
        out = self._buffers[i % len(self._buffers)] if self._buffers else self._empty()
        stores = {"pool": self.store}
        return cut(stores, refs[self.part], self.length, self.max_action_dim, out=out, helper=self._helper)

    def _empty(self) -> Batch:
        return empty_batch(self.part.stop - self.part.start, self.length, self._observation, self.max_action_dim)
