"""Generating pools locally: episodes of given sources, one npz file each in the layout of the published pools, or
straight into a store.

    OUT/metaworld/reach-v3/scripted-0.5/spec.json
    OUT/metaworld/reach-v3/scripted-0.5/<time>-<hex>-<episode>-<agent steps>.npz
    OUT/episodes.jsonl    a row a finished episode, with the return that the pool does not hold
    OUT/collect.json      the report

An episode depends on nothing but (seed, source, episode number), so an interrupted collection is continued by running
it again, and any number of processes, on any machine, makes the same pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from actors import sources
from actors.environment import Environment, Observation, Profile, Step, make
from actors.sources import Behaviour, Source
from gsa.errors import EnvironmentFault, Unavailable, UsageError
from gsa.metrics import Progress
from gsa.schema import Spec, Trajectory
from retrieval.ingest import write_npz
from retrieval.store import TrajectoryStore

RECORDS, REPORT, SPEC = "episodes.jsonl", "collect.json", "spec.json"
EPOCH = datetime.datetime(2000, 1, 1)
HISTOGRAM_BINS = 10
EPISODE_S = 1800.0  # for one episode, the slowest planner included: what takes longer hangs
AHEAD = 4  # episodes under way or waiting for an earlier one, for each process


@dataclass(frozen=True)
class CollectPlan:
    """What is to be collected."""

    sources: tuple[tuple[str, int], ...]  # (source, episodes), see actors.sources
    with_reward: bool = False  # a pool is reward-free unless asked for
    render: Profile = "fast"
    imports: tuple[str, ...] = ()  # modules that register Gymnasium environments

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("There is nothing to collect: name at least one source.")
        if len({source.name for source, _ in self.parsed()}) < len(self.sources):
            raise UsageError("A source is named twice.")
        for name, episodes in self.sources:
            if episodes < 1:
                raise UsageError(f"{name}: the number of episodes must be at least 1, not {episodes}.")

    def parsed(self) -> list[tuple[Source, int]]:
        """What the names mean. UsageError says what is wrong with one."""
        return [(sources.parse(name, self.imports), episodes) for name, episodes in self.sources]


@dataclass(frozen=True)
class Job:
    """One episode to collect. Small: it crosses to another process."""

    source: Source
    episode: int
    seed: int
    out: str  # folder for an npz; "": the trajectory is handed back
    with_reward: bool
    render: Profile
    imports: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Of the file's name, without the length."""
        when = EPOCH + datetime.timedelta(seconds=self.seed % 1_000_000_000)
        name = hashlib.blake2b(f"{self.seed}/{self.source.name}/{self.episode}".encode(), digest_size=16).hexdigest()
        return f"{when:%Y%m%dT%H%M%S}-{name}-{self.episode}"

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the environment and of the behaviour."""
        source = int.from_bytes(hashlib.blake2b(self.source.name.encode(), digest_size=8).digest(), "big")
        first, second = np.random.SeedSequence((self.seed, source, self.episode)).generate_state(2)
        return int(first >> 1), int(second)  # simulators take 31 bits


@dataclass(frozen=True)
class Collected:
    """One episode's record, and the trajectory with its spec where it goes into a store."""

    record: dict[str, Any]
    trajectory: Trajectory | None = None
    spec: Spec | None = None


def collect(
    plan: CollectPlan,
    out: str | Path,
    seed: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
    store: TrajectoryStore | None = None,
) -> dict[str, Any]:
    """Collects what `plan` names and is not yet there. Returns the report, which is also OUT/collect.json.

    Episodes become files in `out`, or trajectories of `store`, in the order of the plan. One process works in place;
    more are spawned, each with one thread. Progress counts episodes. An episode in which the simulator fails is left
    out and listed under "failed". Unavailable: a process died; run it again.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(source, episode, seed, str(out) if store is None else "", plan.with_reward, plan.render, plan.imports)
        for source, episodes in plan.parsed()
        for episode in range(episodes)
    ]
    done = _finished(out, store)
    if any((r["with_reward"], r["render"]) != (plan.with_reward, plan.render) for r in done.values()):
        raise UsageError(f"{out} holds episodes with other settings of reward or render; choose another folder.")
    missing = [job for job in jobs if job.stem not in done]
    failed: list[str] = []
    frames = 0
    with (out / RECORDS).open("a", buffering=1) as records, contextlib.closing(_results(missing, processes)) as results:
        for count, result in enumerate(results, len(jobs) - len(missing) + 1):
            if isinstance(result, str):
                failed.append(result)
            else:
                if store is not None and result.trajectory is not None:
                    store.append(result.trajectory, result.spec)
                records.write(json.dumps(result.record) + "\n")
                done[result.record["stem"]] = result.record
                frames += result.record["frames"]
            if progress:
                progress(count, len(jobs), {"frames": frames, "failed": len(failed)})
    report = summarise([done[job.stem] for job in jobs if job.stem in done]) | {"seed": seed, "failed": failed}
    _write_atomic(out / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per source: episodes, agent steps, frames, and how good the episodes were, which the files do not tell."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_source.setdefault(record["source"], []).append(record)
    return {"sources": {name: _quality(name, rows) for name, rows in by_source.items()}}


def _quality(source: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    returns = np.array([r["return"] for r in rows])
    span = None if source.startswith("gym/") else (0, 100)
    successes = [r["success"] for r in rows if r["success"] is not None]
    return {
        "episodes": len(rows),
        "steps": int(sum(r["steps"] for r in rows)),
        "frames": int(sum(r["frames"] for r in rows)),
        "return": {
            "mean": float(returns.mean()), "std": float(returns.std()),
            "min": float(returns.min()), "median": float(np.median(returns)), "max": float(returns.max()),
        },
        "return_histogram": _histogram(returns, None),
        "score_histogram": _histogram(np.array([r["score"] for r in rows]), span),
        "score": float(np.mean([r["score"] for r in rows])),
        "success": float(np.mean(successes)) if successes else None,
    }  # fmt: skip


def _histogram(values: np.ndarray, span: tuple[float, float] | None) -> dict[str, list]:
    """Of values over `span`, or over the range they reach."""
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS, range=span)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def run_episode(environment: Environment, behaviour: Behaviour, source: str, seeds: tuple[int, int]) -> Trajectory:
    """One whole episode; `seeds` are the environment's and the behaviour's. Return, success, score are in `stats`."""
    seen: list[Observation] = [environment.reset(seeds[0])]
    behaviour.begin(np.random.default_rng(seeds[1]))
    steps: list[Step] = []
    while not steps or not steps[-1].last:
        steps.append(environment.step(behaviour.act(seen[-1])))
        seen.append(steps[-1].observation)
    reward = np.array([s.reward for s in steps], np.float32)
    total, success = float(reward.sum(dtype=np.float64)), steps[-1].success
    return Trajectory(
        embodiment=environment.spec.embodiment,
        observation={name: np.stack([o[name] for o in seen]) for name in seen[0]},
        action=np.stack([s.action for s in steps]),
        discount=np.array([s.discount for s in steps], np.float32),
        reward=reward,
        source=source,
        stats={"return": total, "score": environment.score(total, success)}
        | ({} if success is None else {"success": success}),
    )


def _results(jobs: list[Job], processes: int) -> Generator[Collected | str, None, None]:
    """What came of each job, or why it failed, in their order."""
    if processes == 1 or len(jobs) < 2:
        try:
            yield from map(_work, jobs)
        finally:
            _release()
        return
    with _one_thread_each():
        pool = ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"))
        try:
            yield from _in_order(pool, jobs, AHEAD * processes)
        except BrokenProcessPool:
            raise Unavailable("A collecting process died or hung; run the same command again to continue.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, jobs: Iterable[Job], ahead: int) -> Iterator[Collected | str]:
    """Keeps `ahead` jobs with the pool: what is finished early waits in memory."""
    left = iter(jobs)
    futures: deque[Future[Collected | str]] = deque(pool.submit(_work, job) for job in islice(left, ahead))
    while futures:
        future = futures.popleft()
        yield future.result()
        futures.extend(pool.submit(_work, job) for job in islice(left, 1))


def _work(job: Job) -> Collected | str:
    """Collects one episode, and writes it if it goes into a file. What the simulator does wrong is a value, all else an
    error."""
    try:
        with _ended_after(EPISODE_S):
            environment, behaviour = _environment(job)
            trajectory = run_episode(environment, behaviour, job.source.name, job.seeds)
    except EnvironmentFault as error:
        _release()  # a simulator that failed is not used again
        return f"{job.source.name} episode {job.episode}: {error}"
    task, steps, stats = job.source.task, len(trajectory), trajectory.stats
    record = {
        "stem": job.stem, "source": job.source.name, "steps": steps,
        "frames": min(steps * task.action_repeat, task.episode_frames), "return": stats["return"],
        "score": stats["score"], "success": stats.get("success"), "with_reward": job.with_reward, "render": job.render,
    }  # fmt: skip
    if job.out:
        return Collected(record | {"file": _write(job, trajectory, environment.spec)})
    controller = job.source.controller
    stored = dataclasses.replace(
        trajectory,
        id=job.stem,
        reward=trajectory.reward if job.with_reward else None,
        stats=stats if job.with_reward else {},
        controller=None if controller is None else np.full(steps, controller, np.uint8),
    )
    return Collected(record, stored, environment.spec)


def _write(job: Job, trajectory: Trajectory, spec: Spec) -> str:
    """Writes an npz, and the spec of its folder; returns its path in `job.out`."""
    folder = Path(job.out) / job.source.folder
    if not (folder / SPEC).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomic(folder / SPEC, json.dumps(spec.to_json() | {"source": job.source.name}, indent=1) + "\n")
    path = folder / f"{job.stem}-{len(trajectory)}.npz"
    write_npz(path, trajectory, with_reward=job.with_reward)
    return str(path.relative_to(job.out))


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Lets the kernel end a collecting process whose simulator hangs; nothing where collecting is in place."""
    if multiprocessing.parent_process() is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if multiprocessing.parent_process() is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)


_held: dict[tuple[Source, Profile], tuple[Environment, Behaviour]] = {}  # at most one


def _environment(job: Job) -> tuple[Environment, Behaviour]:
    """A process keeps its environment from one episode to the next; jobs come sorted by source."""
    key = (job.source, job.render)
    if key not in _held:
        _release()
        environment = make(job.source.task.name, job.render, job.imports)
        if job.out and len(environment.spec.observation) > 1:
            environment.close()
            observed = ", ".join(environment.spec.observation)
            raise UsageError(f"{job.source.task.name} observes {observed}; an npz holds one: collect into a --store.")
        _held[key] = environment, sources.behaviour(job.source, environment)
    return _held[key]


def _release() -> None:
    while _held:
        _held.popitem()[1][0].close()


def _finished(out: Path, store: TrajectoryStore | None) -> dict[str, dict[str, Any]]:
    """The records, by stem, of the episodes that are there. A torn last line is an episode not recorded."""
    found = {}
    path = out / RECORDS
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            file = out / record["file"] if "file" in record else None
            in_folder = store is None and file is not None and file.exists()
            if in_folder or (store is not None and store.find(record["stem"]) is not None):
                found[record["stem"]] = record
    return found


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started in here have one thread for numbers and for drawing; libraries read this when imported."""
    limits = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    limits["LP_NUM_THREADS"] = os.environ.get("LP_NUM_THREADS", "0")
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
