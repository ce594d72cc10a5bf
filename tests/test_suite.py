"""Suites with every real part: over Ray Tune, killed and gone on with; what is wrong is said before anything starts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy import suite as suites
from deploy.suite_config import SuiteConfig
from deploy.trial import SUITE, run_trial
from gsa import config as configs
from tests.processes import children, collected, wait_for

SUITES = Path("suites")
NAMES = ("scratch", "gsa", "prior")
SAME = ("score", "return", "curve", "episodes", "policies", "settings", "frames")  # of a result: not its times


def plain(**changes) -> dict:
    """A suite of seconds. Its naive trials have a guide that fails at once, for whatever reason."""
    return {
        "name": "small", "tasks": ["gym/SlowCounting-v0"], "methods": ["naive", *NAMES],
        "pool": {"sources": ["gym/SlowCounting-v0/noise-1:3"]},
        "world_model": {"pretrain": {"model": "tiny", "updates": 2, "batch": 4, "length": 8, "strip_every": 0}},
        "finetune": {
            "imports": ["tests.gym_counting"], "budget_frames": 120, "warmup_frames": 20, "warmup_episodes": 1,
            "batch": 4, "length": 8, "train_ratio": 4, "retrieve_k": 3, "imagination_starts": 16,
            "eval_every_frames": 60, "eval_episodes": 1, "final_episodes": 1, "checkpoint_every_frames": 20,
            "clone": {"steps": 4, "batch": 8, "evaluate_every": 2},
        },
        "per_method": {"naive": {"guide": "tests.guides:broken"}},
        "resources": {"trials": 1, "retries": 1}, "scale": {"gym/SlowCounting-v0": {"score": [0, 20]}}, **changes,
    }  # fmt: skip


def write(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(plain(**changes)))
    return path


def results(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}


def same(result: dict) -> dict:
    return {key: result[key] for key in SAME}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The suite's trials, one after the other in this process, that nothing happened to."""
    folder = tmp_path_factory.mktemp("suite")
    suite = configs.load(SuiteConfig, write(folder / SUITE))
    trials = [t for t in suite.trials(folder) if t.method in NAMES]
    suites.share(suite, trials, folder)
    for trial in trials:
        run_trial(folder, trial.name)
    return folder


@pytest.mark.timeout(900)
def test_a_suite_whose_every_process_is_killed_goes_on_to_the_same_results(whole, tmp_path):
    """First a trial's own process is killed, which is tried again from its checkpoint; then all there is, in the midst
    of another trial. A trial that always fails is named, and stops no other."""
    out, file = tmp_path / "suite", write(tmp_path / "small.yaml")
    begin = [sys.executable, "-m", "deploy.cli", "suite", "run", str(file), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    first, second = (out / "trials" / f"gym-SlowCounting-v0--{name}--seed0" for name in ("scratch", "gsa"))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*begin, "--only", "*scratch*", "*gsa*"], env=environment, stdout=log, stderr=log)
        try:
            assert wait_for(process, lambda: collected(first) >= 60, 300)
            killed = children(process.pid, "deploy.trial")
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            assert wait_for(process, lambda: collected(second) >= 60, 300)
        finally:
            for pid in (process.pid, *children(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    assert len(killed) == 1, (tmp_path / "log").read_text()[-3000:]
    kept = {name: (out / "results" / name).stat().st_mtime_ns for name in os.listdir(out / "results")}
    assert list(kept) == ["gym-SlowCounting-v0--scratch--seed0.json"]

    ended = subprocess.run(begin, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "failed: gym-SlowCounting-v0--naive--seed0: The guide failed in step 0" in ended.stderr
    assert all((out / "results" / name).stat().st_mtime_ns == at for name, at in kept.items())
    ours, theirs = results(out), results(whole)
    assert {name: same(ours[name]) for name in ours} == {name: same(theirs[name]) for name in theirs}
    assert [ours[name]["attempts"] for name in sorted(ours)] == [2, 1, 2]  # gsa, prior, scratch
    assert len((out / "trials/gym-SlowCounting-v0--naive--seed0/attempts.jsonl").read_text().splitlines()) == 2
