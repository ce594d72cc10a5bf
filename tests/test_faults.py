"""Whole runs whose environments fail on the way: the budget is collected to the frame, and what failed is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import faults
from deploy import run as runs
from gsa import config as configs
from gsa.errors import GsaError, UsageError
from gsa.metrics import read_log
from gsa.schema import Controller
from reports.record import read_run
from tests.gym_counting import STEPS
from tests.gym_faulty import MOST_MB
from tests.processes import alive, children, collected, start, wait_for
from tests.test_hosting import SAYS
from tests.test_runs import BUDGET, check_counts, config, online

IMPORTS = ("tests.gym_faulty",)
RUN_MB = 3_000  # of a run of two workers
PAUSE_S = 75.0  # longer than the minute after which a part is said not to answer


def faulty(out: Path, task: str, **changes):
    return config(out, task=f"gym/{task}-v0", imports=IMPORTS, env_timeout_s=1.0, **changes)


def check_collected(run: Path) -> None:
    trajectories = online(run)
    assert sum(map(len, trajectories)) == BUDGET
    for t in trajectories:
        assert (t.observation["pixels"][:, 0, 0, 0] == np.arange(len(t) + 1)).all()


def distributed(settings, folder: Path, program: tuple[str, ...] = ("-m", "deploy.cli")) -> subprocess.CompletedProcess:
    """A run over Ray and Redis, as a user starts it."""
    configs.save(settings, folder / "config.yaml")
    command = [sys.executable, *program, "finetune", "--config", str(folder / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.timeout(600)
def test_a_distributed_run_outlives_environments_that_hang_crash_raise_and_answer_nonsense(tmp_path):
    """Half of all episodes end in one of six ways, drawn by the seed; one way keeps the interpreter's lock for ever."""
    out = tmp_path / "run"
    done = distributed(faulty(out, "Any", workers=2, envs=2), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_collected(out)
    rows = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    sentences = {said.replace("2 s", "1 s") for said in SAYS.values()}
    told = Counter(said for row in rows for said in sentences if said in row["fault"])
    assert len(told) >= 3 and told.total() == len(rows), rows
    assert [row for row in read_log(out) if "driver/faults" in row][-1]["driver/faults"] == len(rows)
    assert max(row.get("driver/worker_restarts", 0) for row in read_log(out)) == 0  # environments, not workers
    assert "faults" in done.stderr and "the run goes on" in done.stderr  # the progress line, and a sentence a cause
    assert sum(read_run(out).faults.values()) == len(rows)


def test_a_local_run_outlives_them_too_unless_they_never_let_python_run(tmp_path):
    run = runs.finetune(faulty(tmp_path / "run", "Mild", local=True))
    check_collected(run)
    assert read_run(run).faults


@pytest.mark.parametrize("way", ["Raises", "NaN"])
def test_ten_in_a_row_end_a_run_with_their_cause(way, tmp_path):
    with pytest.raises(GsaError, match=f"10 times in a row for one cause: gym/{way}-v0 failed in step: .*"):
        runs.finetune(faulty(tmp_path / "run", way, local=True))


@pytest.mark.parametrize("way", ["Raises", "Hangs", "HangsInC", "Crashes"])
def test_a_task_whose_first_frame_does_not_come_is_refused_before_anything_is_written(way, tmp_path):
    local = way in ("Raises", "Hangs")
    settings = faulty(tmp_path / "run", f"{way}InReset", local=local)
    with pytest.raises(UsageError, match="cannot be begun"):
        runs.prepare(settings.resolved(), lambda: None)
    assert not (tmp_path / "run").exists()


def test_a_guide_may_play_a_whole_run(tmp_path):
    settings = config(tmp_path / "run", local=True, guide="tests.guides:third", final_episodes=1)
    run = runs.finetune(settings)
    controllers = np.concatenate([t.controller for t in online(run)])
    assert (controllers == Controller.HUMAN).mean() == pytest.approx(1 / 3, abs=0.05)
    assert [t.action[0].tolist() for t in online(run)] == [[0.25, 0.25]] * len(online(run))


@pytest.mark.timeout(600)
def test_a_guide_may_play_in_the_workers_of_a_distributed_run(tmp_path):
    settings = config(tmp_path / "run", workers=2, envs=2, guide="tests.guides:third", final_episodes=1)
    done = distributed(settings, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_collected(tmp_path / "run")
    for t in online(tmp_path / "run"):
        guided = t.controller == Controller.HUMAN
        assert (np.flatnonzero(guided) == np.arange(0, len(t), 3)).all()
        assert (t.action[guided] == 0.25).all() and not (t.action[~guided] == 0.25).all(1).any()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("deaths", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_worker_that_dies_again_and_again_ends_the_run_with_the_cause(deaths, tmp_path):
    program = f"import sys, actors.rollout as a; a.MAX_FAULTS = {deaths}; from deploy.cli import main; sys.exit(main())"
    settings = config(tmp_path / "run", workers=1, guide="tests.guides:deadly")
    done = distributed(settings, tmp_path, ("-c", program))
    assert done.returncode == 1, done.stderr[-3000:]
    said = f"gsa: Worker 1 died {deaths} times in a row before its first agent step: its process crashed or was killed."
    assert said in " ".join(done.stderr.split()), done.stderr[-3000:]
    assert (tmp_path / "run" / "faults.jsonl").read_text().count('"fault"') == deaths


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_outlives_services_that_hang(tmp_path):
    """The replay service, then the learner, are stopped, not killed; the evaluator hangs when the run ends. A worker of
    four environments has four episodes on their way to a service that does not answer: who waits does not hang."""
    out, log = tmp_path / "run", tmp_path / "log"
    changes = {"workers": 2, "envs": 4, "budget_frames": 3 * BUDGET, "env_timeout_s": 5.0}
    configs.save(config(out, task="gym/SlowCounting-v0", **changes), tmp_path / "config.yaml")
    process = start(log, "--config", str(tmp_path / "config.yaml"))

    def stop(title: str) -> int:
        enough = collected(out) + 5 * STEPS
        assert wait_for(process, lambda: collected(out) >= enough, 400), log.read_text()[-3000:]
        (hung,) = children(process.pid, f"ray::{title}")
        os.kill(hung, signal.SIGSTOP)
        return hung

    try:
        for title, part in (("ReplayActor", "the replay service"), ("LearnerActor", "the learner")):
            hung, began = stop(title), time.monotonic()
            assert wait_for(process, lambda: not alive(hung), 400), log.read_text()[-3000:]  # noqa: B023
            killed = time.monotonic() - began
            back = f"{part}: back after"
            assert wait_for(process, lambda: back in log.read_text(), 200), log.read_text()[-3000:]  # noqa: B023
            print({part: {"killed_s": round(killed), "back_s": round(time.monotonic() - began)}})
        hung = stop("EvaluatorActor")
        assert process.wait(600) == 0, log.read_text()[-3000:]
        assert wait_for(None, lambda: not alive(hung)), "an orphan is left"
    finally:
        process.kill()
    said = " ".join(log.read_text().split())
    assert said.count("It has not answered for 180 s. It is killed") >= 2, said
    assert "worker-" not in said, said
    check_counts(out, 3 * BUDGET)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("title", ["ReplayActor", "LearnerActor", "EvaluatorActor", "GSAEnvRunner", ""])
def test_a_run_goes_on_where_processes_of_it_or_all_were_paused(title, tmp_path):
    """For longer than their answers are waited for, and not so long that they are killed; all, driver and Ray too, as
    when a machine sleeps."""
    out, log = tmp_path / "run", tmp_path / "log"
    changes = {"workers": 2, "envs": 2, "budget_frames": 3 * BUDGET}
    configs.save(config(out, task="gym/SlowCounting-v0", **changes), tmp_path / "config.yaml")
    process = start(log, "--config", str(tmp_path / "config.yaml"))
    try:
        assert wait_for(process, lambda: collected(out) >= 5 * STEPS, 300), log.read_text()[-3000:]
        paused = children(process.pid, title)
        assert paused
        for pid in paused:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        for pid in reversed(paused):
            os.kill(pid, signal.SIGCONT)
        assert process.wait(400) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    print(log.read_text())
    check_counts(out, 3 * BUDGET)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_outlives_what_rays_memory_monitor_kills(tmp_path, monkeypatch):
    """An environment takes memory; Ray kills processes, any of the run's, until that is its worker."""
    about = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
    total, free = int(about["MemTotal"]) >> 10, int(about["MemAvailable"]) >> 10
    if free < RUN_MB + 1.5 * MOST_MB:
        pytest.skip(f"the environment takes up to {MOST_MB} MB, and {free} MB are free")
    monkeypatch.setenv("RAY_memory_usage_threshold", str(1 - (free - RUN_MB - MOST_MB / 2) / total))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setenv("GSA_TEST_EATEN", str(tmp_path / "eaten"))
    out, log = tmp_path / "run", tmp_path / "log"
    settings = config(out, task="gym/Hungry-v0", imports=IMPORTS, workers=2, budget_frames=2 * BUDGET)
    configs.save(settings, tmp_path / "config.yaml")
    process = start(log, "--config", str(tmp_path / "config.yaml"), RAY_BACKEND_LOG_LEVEL="info")
    try:
        assert process.wait(1500) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    print(log.read_text())
    assert (tmp_path / "eaten").exists()
    (said,) = Path(tempfile.gettempdir()).glob(f"ray/session_*_{process.pid}/logs/raylet.out")
    killed = re.findall(r"Ray killed \d+ worker.*|Selected to kill: .*", said.read_text())
    print(*killed, sep="\n")
    assert killed, "Ray's memory monitor killed nothing"
    check_counts(out, 2 * BUDGET)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_outlives_every_fault_of_the_matrix_in_turn_with_every_step(tmp_path):
    """docs/reliability.md, the rows of one machine; with a small disk to fill where that is permitted."""
    with faults.small_disk(tmp_path) as disk:
        result = faults.drill(tmp_path, disk, quick=False)
    broken = {name: goal for name, goal in faults.goals(result, {}).items() if not goal["holds"]}
    assert not broken, (broken, result)
