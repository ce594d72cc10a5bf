"""One trial of a suite, in a process of its own: python -m deploy.trial SUITE-FOLDER NAME.

Takes what the trials share from the suite's folder, or makes it where it is the first to need it; runs or goes on;
leaves its result in results/NAME.json, whole or not at all. Exit codes are those of `gsa`.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deploy.processes import end_with_parent
from deploy.suite_config import SuiteConfig, Trial
from gsa import config as configs
from gsa.errors import GsaError, Stopped
from gsa.metrics import read_log
from retrieval.files import replace_file

SUITE, INPUTS = "suite.yaml", "inputs.json"
STOP = "stop"  # a file in the suite's folder: running trials save and end
FORMAT = "gsa-suite-result/1"
ATTEMPTS = "attempts.jsonl"
REHEARSAL_FILES = ("rehearsal.json", "contact_sheet.png")


def run_trial(folder: Path, name: str) -> Path:
    """Runs the trial to its end, from wherever it stands; returns its result's file. Stopped where it was stopped."""
    suite = configs.load(SuiteConfig, folder / SUITE)
    trial = next(trial for trial in suite.trials(folder) if trial.name == name)
    result = folder / "results" / f"{name}.json"
    assert trial.config.out is not None
    run = trial.config.out
    run.mkdir(parents=True, exist_ok=True)
    with alone(run):
        if result.exists():  # made by a process that outlived its suite
            return result
        with (run / ATTEMPTS).open("a") as file:
            file.write(json.dumps({"started": time.time()}) + "\n")
        if trial.config.rehearses:
            take_rehearsal(folder, trial)
        _run(trial)
        write_json(result, outcome(folder, trial))
        _tidy(suite, run)
    return result


def take_rehearsal(folder: Path, trial: Trial) -> None:
    """Gives the run the rehearsal set that all trials with the same settings share, made by the first of them."""
    from deploy.run import stage, stages_done

    run = trial.config.out
    assert run is not None
    if "retrieve" in stages_done(run):
        return
    with stage(run, "retrieve"):
        shared = folder / "rehearsals" / trial.rehearsal
        shared.parent.mkdir(exist_ok=True)
        with alone(shared.parent, f"{shared.name}.lock"):
            if not shared.exists():
                _retrieve(trial, shared)
        for file in REHEARSAL_FILES:
            shutil.copyfile(shared / file, run / file)


def outcome(folder: Path, trial: Trial) -> dict[str, Any]:
    """The trial's result: plain data that tells everything of it."""
    from deploy.provenance import surroundings

    run = trial.config.out
    assert run is not None
    policies = json.loads((run / "evaluation.json").read_text())["policies"]
    final = policies["prior" if trial.method == "prior" else "finetuned"]
    log = read_log(run) if (run / "metrics.jsonl").exists() else []
    return {
        "format": FORMAT, "name": trial.name, "task": trial.task, "method": trial.method, "variant": trial.variant,
        "seed": trial.seed, "score": float(np.mean(final["scores"])), "return": float(np.mean(final["returns"])),
        "frames": final["frames"], "curve": _rows(log, "eval/"), "episodes": _rows(log, "episode/"),
        "policies": policies, "seconds": round(_seconds(run, log), 1), "attempts": len(_attempts(run)),
        "stages": json.loads((run / "stages.json").read_text()), "settings": trial.settings(),
        "inputs": json.loads((folder / INPUTS).read_text()), **surroundings(),
    }  # fmt: skip


@contextmanager
def alone(folder: Path, name: str = "lock") -> Iterator[None]:
    """Waits for whoever else holds the lock; it goes with its holder, however that ends."""
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode())


def _run(trial: Trial) -> None:
    from deploy import run as runs
    from deploy.evaluate import final_evaluation
    from deploy.progress import bar

    if trial.method != "prior":
        runs.finetune(trial.config, resume=True)
        return
    run = runs.prepare(trial.config, lambda: None, resume=True)
    if "evaluate" not in runs.stages_done(run):
        with runs.stage(run, "evaluate"), bar("evaluate") as progress:
            final_evaluation(trial.config, run, progress, tuned=False)


def _retrieve(trial: Trial, shared: Path) -> None:
    """Into a folder beside, which then takes its name: it is whole or not there."""
    from deploy import parts, rehearsal, stages
    from retrieval.store import TrajectoryStore

    config, new = trial.config, shared.with_name(f"{shared.name}.tmp")
    assert config.store is not None and config.world_model is not None
    shutil.rmtree(new, ignore_errors=True)
    with TrajectoryStore.open(config.store) as store, closing(parts.host(config)) as env:
        model = stages.load_world_model(config.world_model)
        stages.require_fits(model, env.spec, f"the task {trial.task}")
        stages.require_embodiment(store, env, model)
        kind = "random" if config.method == "random-rehearsal" else "nearest"
        rehearsal.rehearse(
            store, config.world_model, model, env, kind, config.retrieve_k, config.queries, 0, new
        )  # seed 0: shared by all seeds
    os.rename(new, shared)


def _rows(log: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """The log's rows with metrics of a part, and their frames."""
    found = []
    for row in log:
        if values := {k.removeprefix(part): v for k, v in row.items() if k.startswith(part)}:
            found.append({"frames": row["frames"], **values})
    return found


def _attempts(run: Path) -> list[float]:
    """When the trial was started and gone on with, as Unix times."""
    return [json.loads(line)["started"] for line in (run / ATTEMPTS).read_text().splitlines()]


def _seconds(run: Path, log: list[dict[str, Any]]) -> float:
    """How long the trial ran, all attempts together; of one that was killed, up to what it had logged."""
    starts = _attempts(run)
    total = time.time() - starts[-1]
    for start, end in itertools.pairwise(starts):
        logged = [row["time_s"] for row in log if start <= row["time_s"] < end]
        total += max(logged, default=start) - start
    return total


def _tidy(suite: SuiteConfig, run: Path) -> None:
    """Removes what a finished trial needs no more: checkpoints are the largest."""
    for name in {"checkpoints", "agent", "online"} - set(suite.keep):
        shutil.rmtree(run / name, ignore_errors=True)


def main(folder: Path, name: str) -> int:
    from deploy.cli import exit_code

    failure = folder / "failures" / f"{name}.json"
    try:
        run_trial(folder, name)
    except Exception as error:
        if not isinstance(error, GsaError):
            traceback.print_exc()
        if not isinstance(error, Stopped):
            said = str(error) if isinstance(error, GsaError) else f"{type(error).__name__}: {error}"
            write_json(failure, {"name": name, "reason": said})
        print(f"gsa: {error}", file=sys.stderr)
        return exit_code(error)
    failure.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
