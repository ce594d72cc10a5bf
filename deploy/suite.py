"""`gsa suite run`: what all trials share is made once, then the trials run on Ray Tune, each in a process of its own.

    FOLDER/suite.yaml           what was asked for
    FOLDER/collected/, pool/    the pool: how it was made, its store
    FOLDER/world_model/         the pre-trained world model, its index of the pool, the priors cloned under it
    FOLDER/rehearsals/NAME/     a task's rehearsal set, for all trials with the same settings
    FOLDER/trials/NAME/         a run's folder, and trial.log: what it said
    FOLDER/results/NAME.json    a finished trial; never run again
    FOLDER/failures/NAME.json   why a trial failed the last time
    FOLDER/report.html, report.json

The folder alone says what is done: whatever is stopped or killed goes on when the same command is given again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import suite_forecast, suite_tune
from deploy.config import FinetuneConfig
from deploy.progress import console
from deploy.suite_config import SuiteConfig, Trial, chosen
from deploy.suite_progress import watching
from deploy.trial import INPUTS, STOP, SUITE, write_json
from gsa import config as configs
from gsa.errors import GsaError, Stopped, UsageError
from learner.config import PretrainConfig
from retrieval.files import WriterLock

STOPPED = "Stopped; what was running is saved, and the same command goes on."
EARLY_S = 60.0  # before --max-hours, to save in; a tenth of them where that is less


def run(
    suite: SuiteConfig, folder: Path, only: Sequence[str], max_hours: float, ray_address: str | None, dry_run: bool
) -> int:
    """Runs what is left of the suite. 1 where a trial failed."""
    folder, suite = folder.resolve(), _with_whole_paths(suite)
    trials = chosen(suite.trials(folder), only)
    check(suite, trials, folder)
    left = [trial for trial in trials if not result_path(folder, trial).exists()]
    console.print(f"{suite.name}: trials: {len(trials)}, done: {len(trials) - len(left)}.")
    hours = suite_forecast.forecast(suite, trials, left, folder, dry_run) if left else {}
    if dry_run:
        return 0
    if not left:
        return conclude(trials, folder, False)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = WriterLock(folder, "suite")
        stack.callback(lock.release)
        suite_tune.start(suite.resources, ray_address, stack)
        configs.save(suite, folder / SUITE)
        stopping = stack.enter_context(Stopping(folder).listening(max_hours))  # after Ray, which takes the signals
        try:
            share(suite, trials, folder)
            stopping.raises = False
            with watching(folder, trials, hours) as watch:
                suite_tune.run_trials(suite.resources, left, folder, stopping, watch)
        except Stopped:
            if not stopping.out_of_time:
                raise
    code = conclude(trials, folder, stopping.out_of_time)
    if stopping.told:
        raise Stopped(STOPPED)
    return code


def conclude(trials: Sequence[Trial], folder: Path, out_of_time: bool) -> int:
    """Says what came of the trials. 1 where one failed."""
    failed = {name: why for name, why in failures(folder).items() if name in {trial.name for trial in trials}}
    left = [t for t in trials if not result_path(folder, t).exists() and t.name not in failed]
    for trial in trials:
        if trial.name in failed:
            console.print(f"failed: {trial.name}: {failed[trial.name]}", soft_wrap=True, markup=False)
    console.print(f"Done: {len(trials) - len(left) - len(failed)}, failed: {len(failed)}, left: {len(left)}.")
    if left:
        why = "The time is over; the" if out_of_time else "The"
        console.print(f"{why} same command goes on with the rest: {folder}", soft_wrap=True)
    return 1 if failed else 0


def check(suite: SuiteConfig, trials: Sequence[Trial], folder: Path) -> None:
    """Raises UsageError for what cannot be, and where the folder holds results under other settings."""
    from actors import tasks

    embodiments = _embodiments(suite, trials)
    for trial in trials:
        if not trial.config.uses_pool:
            continue
        if not embodiments:
            raise UsageError(f"{trial.name} needs a pool: give it sources, or a store.")
        if suite.world_model.pretrain is None and suite.world_model.folder is None:
            raise UsageError(f"{trial.name} needs a world model: give world_model pretrain settings, or a folder.")
        needs = tasks.find(trial.task, trial.config.imports).embodiment
        if trial.config.rehearses and needs not in embodiments:
            raise UsageError(
                f"{trial.name} rehearses, and the pool has nothing of its embodiment {needs}, only of "
                f"{', '.join(sorted(embodiments))}."
            )
    _inputs(suite, trials, folder)
    for trial in trials:
        _require_same_settings(trial, folder)


def _embodiments(suite: SuiteConfig, trials: Sequence[Trial]) -> set[str]:
    """Of whom the pool has or will have trajectories; none without a pool. UsageError for a wrong source."""
    from actors.collect import CollectPlan
    from deploy.pool import source_counts
    from retrieval.store import TrajectoryStore

    if suite.pool.store is not None:
        with TrajectoryStore.open(suite.pool.store) as store:
            return set(store.specs)
    sources = tuple(pair for text in suite.pool.sources for pair in source_counts(text))
    plan = CollectPlan(sources, imports=trials[0].config.imports) if sources else None
    return {source.task.embodiment for source, _ in plan.parsed()} if plan else set()


def _with_whole_paths(suite: SuiteConfig) -> SuiteConfig:
    """So that the folder's copy of the suite means the same from anywhere."""
    store, model = suite.pool.store, suite.world_model.folder
    return replace(
        suite,
        pool=replace(suite.pool, store=None if store is None else store.resolve()),
        world_model=replace(suite.world_model, folder=None if model is None else model.resolve()),
    )


def share(suite: SuiteConfig, trials: Sequence[Trial], folder: Path) -> None:
    """Makes what all trials share, as far as it is not there: pool, world model, index."""
    from actors.rendering import choose_backend
    from deploy import pool, rehearsal, stages
    from deploy.data_commands import Collect
    from deploy.run import stage, stages_done

    choose_backend()
    needed = [trial for trial in trials if trial.config.uses_pool]
    write_json(folder / INPUTS, _inputs(suite, trials, folder))
    if not needed:
        return
    first, done = needed[0].config, stages_done(folder)
    assert first.store is not None and first.world_model is not None
    if suite.pool.sources and "collect" not in done:
        with stage(folder, "collect"):
            command = Collect(
                suite.pool.sources, folder / "collected", first.store, suite.pool.codec, suite.pool.seed,
                render=first.render, imports=first.imports,
            )  # fmt: skip
            if pool.collect(command):
                raise GsaError("The pool is not whole: simulators failed. The same command goes on with it.")
    if suite.world_model.pretrain is not None and "pre-train" not in done:
        with stage(folder, "pre-train"):
            stages.pretrain(first.store, suite.world_model.pretrain, first.world_model, suite.world_model.processes)
    if any(t.config.rehearses for t in needed) and "index" not in done:
        with stage(folder, "index"):
            rehearsal.index(first.store, first.world_model)


def result_path(folder: Path, trial: Trial) -> Path:
    return folder / "results" / f"{trial.name}.json"


def failures(folder: Path) -> dict[str, str]:
    """Name → reason of the trials that failed the last time they ran."""
    found = {}
    for path in sorted((folder / "failures").glob("*.json")):
        if not (folder / "results" / path.name).exists():
            found[path.stem] = str(json.loads(path.read_text())["reason"])
    return found


class Stopping:
    """Whether nothing more is to be begun: after --max-hours, or on SIGTERM or Ctrl-C. Running trials are told by a
    file in the suite's folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / STOP
        self._file.unlink(missing_ok=True)
        self.out_of_time = self.told = False
        self.raises = True  # Stopped, as there is nobody to wait for

    @property
    def now(self) -> bool:
        return self.out_of_time or self.told

    @contextlib.contextmanager
    def listening(self, max_hours: float) -> Iterator[Stopping]:
        seconds = 3600 * max_hours
        timer = threading.Timer(seconds - min(EARLY_S, seconds / 10), self._time_is_over)
        timer.daemon = True
        if max_hours > 0:
            timer.start()
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _time_is_over(self) -> None:
        self.out_of_time = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _heard(self, number: int, _: Any) -> None:
        if self.told and number == signal.SIGINT:
            raise KeyboardInterrupt  # a person who does not want to wait
        self.told = self.told or not self.out_of_time
        self._file.touch()
        if self.raises:
            raise Stopped(STOPPED)


def _inputs(suite: SuiteConfig, trials: Sequence[Trial], folder: Path) -> dict[str, str]:
    """Hashes of what decides the pool and the world model. UsageError where the folder was begun with others."""
    path = folder / INPUTS
    known = json.loads(path.read_text()) if path.exists() else {}
    if not any(trial.config.uses_pool for trial in trials):
        return known
    pool: Any = [suite.pool.sources, suite.pool.seed]
    if suite.pool.store is not None:
        from retrieval.store import TrajectoryStore

        with TrajectoryStore.open(suite.pool.store) as store:
            pool = [store.id, len(store)]
    if suite.world_model.folder is not None:
        model: Any = [_digest(p.read_bytes()) for p in sorted(suite.world_model.folder.glob("world_model.*"))]
    else:
        model = _chosen(configs.to_dict(suite.world_model.pretrain), configs.to_dict(PretrainConfig()))
    inputs = {name: _digest(json.dumps(of).encode()) for name, of in (("pool", pool), ("world model", model))}
    if different := [name for name in inputs if known.get(name, inputs[name]) != inputs[name]]:
        raise UsageError(f"{folder} was begun with another {' and '.join(different)}: choose another --out.")
    return inputs


def _chosen(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as it is by default: a setting that came later does not make it another."""
    return {
        k: _chosen(v, defaults[k]) if isinstance(v, Mapping) else v for k, v in settings.items() if v != defaults[k]
    }


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _require_same_settings(trial: Trial, folder: Path) -> None:
    """Raises UsageError where the trial was begun, or ended, under other settings."""
    config, result = folder / "trials" / trial.name / "config.yaml", result_path(folder, trial)
    if result.exists():
        different = trial.unlike(json.loads(result.read_text())["settings"])
    elif config.exists():
        different = trial.unlike(replace(trial, config=configs.load(FinetuneConfig, config)).settings())
    else:
        return
    if different:
        raise UsageError(
            f"{trial.name} in {folder} has other settings ({'; '.join(different)}): choose another --out, or give the "
            "variant a name of its own."
        )
