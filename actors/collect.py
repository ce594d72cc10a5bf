"""Generating pools locally: episodes of given sources, one npz file each, in the layout of the published pools.

    OUT/metaworld/reach-v3/scripted-0.5/spec.json
    OUT/metaworld/reach-v3/scripted-0.5/<time>-<hex>-<episode>-<agent steps>.npz
    OUT/episodes.jsonl    a row a finished episode, with the return that the file does not hold
    OUT/collect.json      the report

An episode depends on nothing but (seed, source, episode number), so an interrupted collection is continued by running
it again, and two machines make the same pool.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors import sources
from actors.environment import Environment, Profile, Step, make
from actors.sources import Behaviour, Source
from gsa.errors import EnvironmentFault, Unavailable, UsageError
from gsa.metrics import Progress
from gsa.schema import Controller, Trajectory
from retrieval.ingest import write_npz

RECORDS, REPORT, SPEC = "episodes.jsonl", "collect.json", "spec.json"
EPOCH = datetime.datetime(2000, 1, 1)
HISTOGRAM_BINS = 10
EPISODE_S = 1800.0  # for one episode, the slowest planner included: what takes longer hangs


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
        if len(dict(self.parsed())) < len(self.sources):
            raise UsageError("A source is named twice.")
        for name, episodes in self.sources:
            if episodes < 1:
                raise UsageError(f"{name}: the number of episodes must be at least 1, not {episodes}.")

    def parsed(self) -> list[tuple[str, int]]:
        """The sources in their canonical spelling."""
        return [(sources.parse(name, self.imports).name, episodes) for name, episodes in self.sources]


@dataclass(frozen=True)
class Job:
    """One episode to collect. Small: it crosses to another process."""

    source: str
    episode: int
    seed: int
    out: str
    with_reward: bool
    render: Profile
    imports: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Of the file's name, without the length."""
        when = EPOCH + datetime.timedelta(seconds=self.seed % 1_000_000_000)
        name = hashlib.blake2b(f"{self.seed}/{self.source}/{self.episode}".encode(), digest_size=16).hexdigest()
        return f"{when:%Y%m%dT%H%M%S}-{name}-{self.episode}"

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the environment and of the behaviour."""
        source = int.from_bytes(hashlib.blake2b(self.source.encode(), digest_size=8).digest(), "big")
        first, second = np.random.SeedSequence((self.seed, source, self.episode)).generate_state(2)
        return int(first >> 1), int(second)  # simulators take 31 bits


def mixed_plan(tasks: tuple[str, ...], episodes: int) -> CollectPlan:
    """`episodes` of each task, of mixed quality as in the published pools: from fair to aimless."""
    behaviours = {
        "metaworld": ("scripted-0.5", "scripted-1", "scripted-1.5", "scripted-2", "noise-1"),
        "dmc": ("planner-0.7", "planner-0.3", "objectives-0.5", "noise-1", "noise-2"),
        "gym": ("noise-0", "noise-1", "noise-2"),
    }
    named = []
    for task in tasks:
        kinds = behaviours.get(task.split("/", 1)[0], ("noise-1",))
        shares = [episodes // len(kinds) + (i < episodes % len(kinds)) for i in range(len(kinds))]
        named += [(f"{task}/{kind}", share) for kind, share in zip(kinds, shares, strict=True) if share]
    return CollectPlan(tuple(named))


def collect(
    plan: CollectPlan, out: str | Path, seed: int = 0, processes: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """Collects what `plan` names and is not yet in `out`. Returns the report, which is also OUT/collect.json.

    One process works in place; more are spawned, each with one thread. Progress counts episodes. An episode in which
    the simulator fails is left out and listed under "failed". Unavailable: a process died; run it again.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(name, episode, seed, str(out), plan.with_reward, plan.render, plan.imports)
        for name, episodes in plan.parsed()
        for episode in range(episodes)
    ]
    done = _finished(out)
    if any((r["with_reward"], r["render"]) != (plan.with_reward, plan.render) for r in done.values()):
        raise UsageError(f"{out} holds episodes with other settings of reward or render; choose another folder.")
    missing = [job for job in jobs if job.stem not in done]
    failed: list[str] = []
    frames = 0
    with (out / RECORDS).open("a", buffering=1) as records:
        for count, result in enumerate(_results(missing, processes), len(jobs) - len(missing) + 1):
            if isinstance(result, str):
                failed.append(result)
            else:
                records.write(json.dumps(result) + "\n")
                done[result["stem"]] = result
                frames += result["frames"]
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
    counts, edges = np.histogram([r["score"] for r in rows], bins=HISTOGRAM_BINS, range=span)
    successes = [r["success"] for r in rows if r["success"] is not None]
    return {
        "episodes": len(rows),
        "steps": int(sum(r["steps"] for r in rows)),
        "frames": int(sum(r["frames"] for r in rows)),
        "return": {
            "mean": float(returns.mean()), "std": float(returns.std()),
            "min": float(returns.min()), "median": float(np.median(returns)), "max": float(returns.max()),
        },
        "score_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "success": float(np.mean(successes)) if successes else None,
    }  # fmt: skip


def run_episode(environment: Environment, behaviour: Behaviour, source: str, seeds: tuple[int, int]) -> Trajectory:
    """One whole episode; `seeds` are the environment's and the behaviour's. Return, success, score are in `stats`."""
    observation = environment.reset(seeds[0])
    behaviour.begin(np.random.default_rng(seeds[1]))
    pixels: list[np.ndarray] = [observation["pixels"]]
    steps: list[Step] = []
    while not steps or not steps[-1].last:
        steps.append(environment.step(behaviour.act()))
        pixels.append(steps[-1].observation["pixels"])
    reward = np.array([s.reward for s in steps], np.float32)
    total, success = float(reward.sum(dtype=np.float64)), steps[-1].success
    return Trajectory(
        embodiment=environment.spec.embodiment,
        observation={"pixels": np.stack(pixels)},
        action=np.stack([s.action for s in steps]),
        discount=np.array([s.discount for s in steps], np.float32),
        reward=reward,
        controller=np.full(len(steps), Controller.RANDOM, np.uint8),
        source=source,
        stats={"return": total, "score": environment.score(total, success)}
        | ({} if success is None else {"success": success}),
    )


def _results(jobs: list[Job], processes: int) -> Iterator[dict[str, Any] | str]:
    """The record of each job, or why it failed, as they come."""
    if processes == 1 or len(jobs) < 2:
        try:
            yield from map(_work, jobs)
        finally:
            _release()
        return
    with _one_thread_each():
        pool = ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"))
        futures: list[Future[dict[str, Any] | str]] = []
        try:
            futures = [pool.submit(_work, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise Unavailable("A collecting process died or hung; run the same command again to continue.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _work(job: Job) -> dict[str, Any] | str:
    """Collects and writes one episode. What the simulator does wrong is a value, all else an error."""
    source = sources.parse(job.source, job.imports)
    try:
        with _ended_after(EPISODE_S):
            environment, behaviour = _environment(source, job)
            trajectory = run_episode(environment, behaviour, job.source, job.seeds)
    except EnvironmentFault as error:
        _release()  # a simulator that failed is not used again
        return f"{job.source} episode {job.episode}: {error}"
    folder = Path(job.out) / source.folder
    if not (folder / SPEC).exists():
        folder.mkdir(parents=True, exist_ok=True)
        spec = environment.spec.to_json() | {"source": job.source}
        _write_atomic(folder / SPEC, json.dumps(spec, indent=1) + "\n")
    path = folder / f"{job.stem}-{len(trajectory)}.npz"
    write_npz(path, trajectory, with_reward=job.with_reward)
    return {
        "stem": job.stem, "source": job.source, "file": str(path.relative_to(job.out)), "steps": len(trajectory),
        "frames": min(len(trajectory) * source.task.action_repeat, source.task.episode_frames),
        "return": trajectory.stats["return"], "score": trajectory.stats["score"],
        "success": trajectory.stats.get("success"), "with_reward": job.with_reward, "render": job.render,
    }  # fmt: skip


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


def _environment(source: Source, job: Job) -> tuple[Environment, Behaviour]:
    """A process keeps its environment from one episode to the next; jobs come sorted by source."""
    key = (source, job.render)
    if key not in _held:
        _release()
        environment = make(source.task.name, job.render, job.imports)
        _held[key] = environment, sources.behaviour(source, environment)
    return _held[key]


def _release() -> None:
    while _held:
        _held.popitem()[1][0].close()


def _finished(out: Path) -> dict[str, dict[str, Any]]:
    """The records, by stem, of the episodes whose files are there. A torn last line is an episode not recorded."""
    found = {}
    path = out / RECORDS
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if (out / record["file"]).exists():
                found[record["stem"]] = record
    return found


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started in here have one thread for numerical libraries, which read this when they are imported."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
