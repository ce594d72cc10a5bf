"""The replay service: leases out the budget, keeps what was collected, gives batches. Wrapped as a Ray actor or
called directly."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.metrics import Meter
from gsa.schema import Batch, Lease, NoLease, SequenceRef, Spec, Trajectory
from replay_service.batches import Cutter, Layout, SequenceSampler, shared_observation, specs_of
from replay_service.config import ReplayConfig
from retrieval.store import TrajectoryStore

STATE_VERSION = 2
_log = logging.getLogger(__name__)


@dataclass
class _OpenLease:
    worker: str
    max_steps: int
    deadline: float  # on the service's clock

    def is_of(self, worker: str) -> bool:
        return self.worker == worker or self.worker.startswith(f"{worker}/")


class ReplayService:
    """Owns a run's online store and its budget. Every method may be called from any thread.

    Budget: steps inserted + max_steps of open leases ≤ budget, always. Steps that a lease did not use (an episode
    ended early, its worker released it or died, its time ran out) are leased again under a new episode number, so
    that exactly `budget` steps are inserted in the end.

    A worker that may be started anew calls itself place/incarnation: its successor gives back what the place has on
    lease, and what an incarnation that only seemed dead leases or delivers later is not kept open by the successor.

    What is in the online store counts as inserted, also after a crash: an episode whose append was durable is
    never lost and never counted twice, whatever state is restored.
    """

    def __init__(
        self,
        config: ReplayConfig,
        online: TrajectoryStore,
        spec: Spec,
        pool: TrajectoryStore | None = None,
        rehearsal_rows: np.ndarray | None = None,
        max_action_dim: int | None = None,
        seed: int = 0,
        buffers: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`online` is open for writing and belongs to this run alone. `rehearsal_rows` are rows
        of `pool`; without any, batches are all online. With `buffers` = n, each thread that samples reuses the
        arrays of n batches: one is overwritten by the n-th `sample()` after it.
        """
        online.add_spec(spec)
        self.config, self.spec, self.seed = config, spec, seed
        self._online, self._clock = online, clock
        self._lock = threading.Lock()
        self._meter = Meter("replay")
        self._leases: dict[int, _OpenLease] = {}
        self._next_episode = self._batches = 0
        self._ahead: deque[int] = deque()  # stored rows that a run which repeats itself has not come to again
        self._rehearsal = SequenceSampler("pool", config.length)
        specs = [spec]
        if pool is not None and rehearsal_rows is not None and len(rehearsal_rows):
            rows = np.asarray(rehearsal_rows, np.int64)
            self._rehearsal.extend(rows, pool.catalog.length[rows])
            specs += specs_of(pool, rows)
        dim = max_action_dim or spec.action_dim
        self.layout = Layout(config.batch, config.length, shared_observation(specs, dim), dim)
        stores = {"online": online} | ({"pool": pool} if len(self._rehearsal) and pool is not None else {})
        self._cut = Cutter(stores, self.layout, buffers)
        self._count_online(sampled=0)

    # ------------------------------------------------------------------ collecting

    def lease(self, worker: str, held: Collection[int] | None = None) -> Lease | NoLease:
        """Permission to collect one episode. WAIT: ask again, the learner is behind or others hold what is left of the
        budget. DONE: the budget is collected.

        `held`: all episodes that the worker has on lease and knows of. Others are given back: the answer that leased
        them never came to it.
        """
        with self._lock:
            self._expire()
            if held is not None:
                lost = [e for e, lease in self._leases.items() if lease.worker == worker and e not in held]
                if lost:
                    self._give_back(lost)
            if self.finished:
                return NoLease.DONE
            leased = self._leased
            steps = min(self.config.episode_steps, self.config.budget - self.collected - leased)
            if steps == 0 or not self._limiter.can_insert(steps, pending=leased):
                self._meter.count("lease_waits")
                return NoLease.WAIT
            begun = self.collected + leased
            episodes = len(self._counted_rows()) + len(self._leases)
            warmup = begun < self.config.warmup_steps or episodes < self.config.warmup_episodes
            lease = Lease(self._next_episode, steps, begun, warmup)
            self._leases[lease.episode] = _OpenLease(worker, steps, self._clock() + self.config.lease_timeout_s)
            self._next_episode += 1
            return lease

    def add(self, worker: str, episode: int, trajectory: Trajectory) -> bool:
        """Stores a leased episode. True: it is durable and counted. False: its lease is not, or no longer, open, or it
        is stored already; nothing has changed, drop the episode.

        A trajectory that does not fit raises SpecMismatch or FormatError and leaves the lease open.
        """
        with self._lock:
            self._expire()
            lease = self._leases.get(episode)
            row = self._online.find(trajectory.id)
            if lease is None or lease.worker != worker or (row is not None and not self._repeats(row, trajectory)):
                self._meter.count("rejected_episodes")
                return False
            trajectory.check(self.spec)
            if trajectory.reward is None or len(trajectory) > lease.max_steps:
                raise FormatError(
                    f"Episode {episode} of {worker} must have a reward and at most {lease.max_steps} steps, "
                    f"not {len(trajectory)}."
                )
            if row is None:
                stats = {**trajectory.stats, "episode": float(episode)}
                row = self._online.append(dataclasses.replace(trajectory, stats=stats))
            else:
                self._ahead.popleft()
            del self._leases[episode]
            self._limiter.insert(len(trajectory))
            self._draw_from(np.array([row]), np.array([len(trajectory)]))
            self._meter.count("episodes")
            self._meter.count("collected", len(trajectory), rate=True)
            return True

    def renew(self, workers: Collection[str]) -> None:
        """A sign of life of these workers: the time of their leases begins anew."""
        with self._lock:
            deadline = self._clock() + self.config.lease_timeout_s
            for lease in self._leases.values():
                if lease.worker in workers:
                    lease.deadline = deadline

    def release(self, worker: str, episode: int | None = None) -> int:
        """Gives back the open leases of a worker, or of all incarnations of its place, or one of them; returns how
        many. For episodes that failed and for workers that died."""
        with self._lock:
            gone = [e for e, lease in self._leases.items() if lease.is_of(worker) and episode in (None, e)]
            self._give_back(gone)
            return len(gone)

    def drain_episodes(self, cursor: int = 0) -> tuple[list[dict[str, float]], int]:
        """The collected episodes since `cursor`, in order of insertion, and the cursor to ask with next time.

        Of each its stats, `episode`, `steps`, and `agent_steps` and `frames` collected up to its end. The caller keeps
        the cursor (0 at first), so that an answer lost is asked for again and none is counted twice.
        """
        with self._lock:
            rows = self._counted_rows()
            ends = np.cumsum(self._online.catalog.length[rows], dtype=np.int64)
            new = zip(rows.tolist(), ends.tolist(), strict=True)
            end = int(rows[-1]) + 1 if len(rows) else 0
            return [self._episode_stats(row, steps) for row, steps in new if row >= cursor], max(cursor, end)

    # ------------------------------------------------------------------ learning

    def sample(self) -> Batch | None:
        """The next batch, or None: collection is behind, or the learner has replayed all that the budget pays for.

        Rewards are those of the online rows; rehearsed rows never have one.
        """
        started = time.perf_counter()
        if (refs := self.draw()) is None:
            return None
        batch = self._cut(refs)
        with self._lock:
            self._meter.mean({"sample_ms": (time.perf_counter() - started) * 1e3})
        return batch

    def draw(self) -> tuple[SequenceRef, ...] | None:
        """What the next batch is made of, counted as replayed; None as in `sample`. For who cuts it elsewhere."""
        with self._lock:
            steps = self.config.sample_steps
            if self.target_reached or not self._limiter.can_sample(steps):
                self._meter.count("sample_waits")
                return None
            rng = np.random.default_rng([self.seed, self._batches])
            rehearsed = 0
            if len(self._rehearsal):
                rehearsed = self.config.rehearsal_rows(self._batches, self.collected, self.spec.action_repeat)
            refs = self._recent.draw(self.config.batch - rehearsed, rng) + self._rehearsal.draw(rehearsed, rng)
            self._limiter.sample(steps)
            self._batches += 1
            self._meter.count("sampled", steps, rate=True)
            self._meter.mean({"rehearsal_rows": rehearsed})
            return tuple(refs)

    @property
    def stores(self) -> dict[str, Path]:
        """Where the trajectories lie that refs are addresses of."""
        return {name: store.path.resolve() for name, store in self._cut.stores.items()}

    @property
    def collected(self) -> int:
        """Agent steps inserted."""
        return self._limiter.inserted

    @property
    def frames(self) -> int:
        """Simulator frames inserted."""
        return self.collected * self.spec.action_repeat

    @property
    def finished(self) -> bool:
        """Whether the whole budget is inserted."""
        return self.collected >= self.config.budget

    @property
    def target_reached(self) -> bool:
        """Whether the learner has replayed, to the batch, what the whole budget pays for."""
        due = self._limiter.samples_due(self.config.budget, self.config.sample_steps)
        return self._limiter.sampled >= due

    @property
    def complete(self) -> bool:
        """Whether the budget is inserted and replayed. The learner alone may reach its target before."""
        return self.finished and self.target_reached

    def stats(self) -> dict[str, float]:
        with self._lock:
            leases = {"open_leases": len(self._leases), "leased": self._leased}
            now = {"collected": self.collected, "sampled": self._limiter.sampled, "drawn_from": self._recent.steps}
            flags = {"finished": self.finished, "target_reached": self.target_reached}
            for name, value in (leases | now | flags).items():
                self._meter.gauge(name, value)
            return self._meter.stats()

    def close(self) -> None:
        """Closes the online store: another may write to it then."""
        with self._lock:
            self._online.close()

    # ------------------------------------------------------------------ saving

    def state(self) -> dict[str, Any]:
        """Plain data that continues the run with the same online store."""
        with self._lock:
            leases = [[episode, lease.worker, lease.max_steps] for episode, lease in self._leases.items()]
            return {
                "version": STATE_VERSION, "seed": self.seed, "store": self._online.id,
                "rows": self._ahead[0] if self._ahead else len(self._online), "sampled": self._limiter.sampled,
                "batches": self._batches, "next_episode": self._next_episode, "leases": leases,
                "meter": self._meter.state(),
            }  # fmt: skip

    def blank_state(self) -> dict[str, Any]:
        """`state()` as it was before anything was collected."""
        begun = {"rows": 0, "sampled": 0, "batches": 0, "next_episode": 0, "leases": []}
        return {**self.state(), **begun, "meter": Meter("replay").state()}

    def restore(self, state: Mapping[str, Any], exact: bool = False) -> None:
        """Continues from `state`. Episodes that the online store has beyond it were acknowledged, and count.

        With `exact` the run is one that repeats itself: its open leases stay open, and what the store has beyond
        `state` counts when it is collected again, bit for bit. Where it is not, all of it counts at once.
        """
        with self._lock:
            if state.get("version") != STATE_VERSION:
                raise FormatError(f"Replay state of version {state.get('version')}; this is version {STATE_VERSION}.")
            if state["seed"] != self.seed:
                raise UsageError(f"The run was saved with seed {state['seed']}; it cannot go on with {self.seed}.")
            if state["store"] != self._online.id or state["rows"] > len(self._online):
                raise FormatError(
                    f"The online store {self._online.path} is not the one of the saved run, or has lost episodes: "
                    f"saved with {state['rows']}, it has {len(self._online)}."
                )
            self._leases.clear()
            self._batches, self._next_episode = int(state["batches"]), int(state["next_episode"])
            self._meter.restore(state["meter"])
            self._count_online(int(state["sampled"]), rows=int(state["rows"]) if exact else None)
            if exact:
                deadline = self._clock() + self.config.lease_timeout_s
                self._leases = {int(e): _OpenLease(str(w), int(n), deadline) for e, w, n in state["leases"]}

    def rewind(self, batches: int) -> None:
        """A learner begins that has learned from so many batches: what was drawn beyond them is drawn again."""
        with self._lock:
            self._batches = batches
            self._limiter.sampled = batches * self.config.sample_steps

    def _count_online(self, sampled: int, rows: int | None = None) -> None:
        """Sets what follows from the online store: steps inserted, what to draw from, episode numbers in use.

        Of its catalog only the first `rows` rows count, if given; the others are ahead.
        """
        self._ahead = deque(row for row in self._online.rows().tolist() if rows is not None and row >= rows)
        counted = self._counted_rows()
        steps = self._online.catalog.length[counted]
        self._limiter = self.config.limiter()
        self._limiter.insert(int(steps.sum()))
        self._limiter.sample(sampled)
        self._recent = SequenceSampler("online", self.config.length)
        self._draw_from(counted, steps)
        used = (int(self._online.catalog.stats(row).get("episode", -1)) for row in counted.tolist())
        self._next_episode = max(self._next_episode, 1 + max(used, default=-1))

    # ------------------------------------------------------------------ with the lock held

    def _counted_rows(self) -> np.ndarray:
        """The rows of the online store that count as inserted: all but those that are ahead."""
        rows = self._online.rows()
        return rows[: len(rows) - len(self._ahead)]

    def _repeats(self, row: int, trajectory: Trajectory) -> bool:
        """Whether `trajectory` is the stored row that comes next in a run that repeats itself."""
        if not self._ahead or row < self._ahead[0]:
            return False
        stored = self._online.read(row)
        if row == self._ahead[0] and _equal(stored, trajectory):
            return True
        _log.warning("Episode %s was not repeated bit for bit; what was stored of it and after it stays.", stored.id)
        self._meter.count("unrepeated_episodes", len(self._ahead))
        self._leases.clear()
        self._count_online(self._limiter.sampled)
        return False

    @property
    def _leased(self) -> int:
        return sum(lease.max_steps for lease in self._leases.values())

    def _give_back(self, episodes: Collection[int]) -> None:
        for episode in episodes:
            del self._leases[episode]
        self._meter.count("released_leases", len(episodes))

    def _expire(self) -> None:
        now = self._clock()
        for episode in [e for e, lease in self._leases.items() if lease.deadline <= now]:
            del self._leases[episode]
            self._meter.count("expired_leases")

    def _draw_from(self, rows: np.ndarray, steps: np.ndarray) -> None:
        self._recent.extend(rows, steps)
        if self.config.capacity is not None:
            self._recent.forget_beyond(self.config.capacity)

    def _episode_stats(self, row: int, agent_steps: int) -> dict[str, float]:
        steps = int(self._online.catalog.length[row])
        frames = agent_steps * self.spec.action_repeat
        return {**self._online.catalog.stats(row), "steps": steps, "agent_steps": agent_steps, "frames": frames}


def _equal(a: Trajectory, b: Trajectory) -> bool:
    """Whether two trajectories hold the same, bit for bit."""
    arrays = ("action", "discount", "reward", "controller", "policy_version")
    pairs = [(getattr(a, k), getattr(b, k)) for k in arrays] + [
        (a.observation[k], b.observation[k]) for k in b.observation
    ]
    return all(np.array_equal(x, y) for x, y in pairs)
