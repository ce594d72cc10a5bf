"""Suites with every real part: over Ray Tune, killed and gone on with; what is wrong is said before anything starts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from deploy import suite as suites
from deploy import suite_progress
from deploy.cli import main as gsa
from deploy.suite_config import Speed, SuiteConfig
from deploy.trial import SUITE, run_trial
from gsa import config as configs
from reports.suite_page import write_suite_report
from tests.processes import children, collected, wait_for
from tests.suite_results import fill

SUITES = Path("suites")
NAMES = ("scratch", "gsa", "prior")
COMMAND = [sys.executable, "-m", "deploy.cli", "suite", "run"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.getcwd()}
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


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Ray keeps the first token of a process for all clusters that it starts."""
    command = [*COMMAND, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500, check=False)


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
def test_a_suite_that_is_stopped_and_whose_every_process_is_killed_goes_on_to_the_same_results(whole, tmp_path):
    """First a trial's own process is killed, which is tried again from its checkpoint; the next trial is stopped by
    SIGTERM and then killed with all there is. A trial that always fails is named, and stops no other."""
    out, log = tmp_path / "suite", tmp_path / "log"
    all_of_it = [str(write(tmp_path / "small.yaml")), "--out", str(out)]
    two = [*COMMAND, *all_of_it, "--only", "*scratch*", "*gsa*"]
    first, second = (out / "trials" / f"gym-SlowCounting-v0--{name}--seed0" for name in ("scratch", "gsa"))

    def killed(process: subprocess.Popen) -> bool:
        assert wait_for(process, lambda: collected(first) >= 60, 300), log.read_text()[-3000:]
        (trial,) = children(process.pid, "deploy.trial")
        os.kill(trial, signal.SIGKILL)
        return wait_for(process, lambda: collected(second) >= 40, 300)

    assert watched(two, log, killed, lambda process: process.terminate()) == 143, log.read_text()[-3000:]
    assert "Trials: 2;" in log.read_text() and not children(os.getpid(), "deploy.trial")
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert list(kept) == ["gym-SlowCounting-v0--scratch--seed0.json"]
    assert list((second / "checkpoints").iterdir())

    watched(two, log, lambda process: wait_for(process, lambda: collected(second) >= 80, 300), kill_all)
    ended = run(all_of_it)
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "failed: gym-SlowCounting-v0--naive--seed0: The guide failed in step 0" in ended.stderr
    assert all((out / "results" / name).stat().st_mtime_ns == at for name, at in kept.items())
    ours, theirs = results(out), results(whole)
    assert {name: same(ours[name]) for name in ours} == {name: same(theirs[name]) for name in theirs}
    assert [ours[name]["attempts"] for name in sorted(ours)] == [3, 1, 2]  # gsa, prior, scratch
    assert len((out / "trials/gym-SlowCounting-v0--naive--seed0/attempts.jsonl").read_text().splitlines()) == 2


def watched(command: list[str], log: Path, wait, end) -> int:
    """Starts a suite, waits for what is to come of it, ends it; its exit code."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)
        try:
            assert wait(process), log.read_text()[-3000:]
            end(process)
            return process.wait(300)
        finally:
            kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    for pid in (process.pid, *children(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


BAD = {
    "an unknown key": ({"task": ["dmc/walker-walk"]}, "Unknown setting in .*'task'. Did you mean tasks"),
    "an unknown task": ({"tasks": ["dmc/walker-wlak"]}, "Unknown task 'dmc/walker-wlak'. Did you mean dmc/walker-walk"),
    "an unknown method": ({"methods": ["gsaa"]}, "Unknown .*methods 'gsaa'. Did you mean gsa"),
    "a method twice": ({"methods": ["gsa", "gsa"]}, "methods names one twice"),
    "no seed": ({"seeds": []}, "seeds must name at least one"),
    "an unknown setting": ({"finetune": {"budget": 3}}, "--scratch--seed0: Unknown setting in finetune 'budget'"),
    "a wrong type": ({"finetune": {"budget_frames": "many"}}, "budget_frames must be of type int, not 'many'"),
    "the suite's own setting": ({"finetune": {"seed": 3}}, "seed is the suite's to set"),
    "a budget within the warm-up": ({"finetune": {"budget_frames": 20}}, "ends within the warm-up"),
    "settings of a task that is not there": ({"per_task": {"dmc/acrobot-swingup": {}}}, "Unknown task in per_task"),
    "no pool": ({"methods": ["naive"], "pool": {}}, "naive--seed0 needs a pool"),
    "no world model": ({"methods": ["naive"], "world_model": {}}, "naive--seed0 needs a world model"),
    "a pool twice": ({"pool": {"sources": ["a:1"], "store": "b"}}, "both sources and a store"),
    "a wrong source": ({"pool": {"sources": ["gym/Counting-v0"]}}, "is not SOURCE:EPISODES"),
    "a foreign pool": (
        {"methods": ["gsa"], "pool": {"sources": ["gym/Place-v0/noise-1:3"]}},
        "rehearses, and the pool has nothing of its embodiment gym/Counting-v0, only of gym/Place-v0",
    ),
    "no such store": ({"methods": ["naive"], "pool": {"store": "nowhere"}}, "nowhere"),
    "no such world model": ({"methods": ["naive"], "world_model": {"folder": "nowhere"}}, "no world model in .*where"),
    "a variant without a change": ({"variants": [{"name": "k5"}]}, "a name and other finetune settings go together"),
    "a variant under a name that is taken": (
        {"variants": [{"methods": ["scratch"]}]},
        "scratch--seed0 is there twice",
    ),
    "a scale upside down": ({"scale": {"gym/Counting-v0": {"score": [3, 2]}}}, "from a lower to a higher"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(fault, tmp_path, capsys):
    changes, sentence = BAD[fault]
    defaults = {"tasks": ["gym/Counting-v0"], "methods": ["scratch"], "per_method": {}, "scale": {}}
    finetune = plain()["finetune"] | changes.pop("finetune", {})
    file = write(tmp_path / "bad.yaml", **{**defaults, "finetune": finetune, **changes})
    assert gsa(["suite", "run", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_trials_are_in_the_order_of_their_seeds_and_each_has_its_settings(tmp_path):
    """Whatever ends early leaves whole comparisons; later layers of settings are over earlier ones."""
    file = write(
        tmp_path / "small.yaml", seeds=[3, 1], tasks=["gym/Counting-v0", "gym/Place-v0"],
        per_task={"gym/*": {"batch": 3}, "gym/P*": {"batch": 5, "guidance": {"schedule": "constant(1)"}}},
        per_method={"gsa": {"batch": 6}}, scale={},
        variants=[
            {"name": "prefix", "tasks": ["gym/Place-v0"], "methods": ["gsa"], "seeds": [1, 2],
             "finetune": {"guidance": {"placement": "prefix"}}},
            {"tasks": ["gym/Place-v0"], "methods": ["jsrl"]},
        ],
    )  # fmt: skip
    trials = {t.name: t for t in configs.load(SuiteConfig, file).trials(tmp_path)}
    assert [t.seed for t in trials.values()] == [3] * 9 + [1] * 10 + [2]
    assert [t.task for t in trials.values()][:8] == ["gym/Counting-v0"] * 4 + ["gym/Place-v0"] * 4
    batches = {m: trials[f"gym-Place-v0--{m}--seed3"].config.batch for m in ("scratch", "gsa", "naive")}
    assert batches == {"scratch": 5, "gsa": 6, "naive": 5}
    assert trials["gym-Counting-v0--naive--seed3"].config.batch == 3
    prefix = trials["gym-Place-v0--gsa--prefix--seed2"]
    assert (prefix.config.guidance.schedule, prefix.config.guidance.placement) == ("constant(1)", "prefix")
    assert {
        t.rehearsal for t in trials.values() if t.task == "gym/Place-v0" and t.method in ("gsa", "jsrl", "prior")
    } == {prefix.rehearsal}


def test_another_file_cannot_go_on_with_what_a_folder_has(whole, tmp_path, capsys):
    folder = tmp_path / "suite"
    shutil.copytree(whole, folder)
    longer = plain()["finetune"] | {"budget_frames": 140}
    assert gsa(["suite", "run", str(write(tmp_path / "a.yaml", finetune=longer)), "--out", str(folder)]) == 2
    assert "has other settings (budget_frames 120 → 140)" in capsys.readouterr().err
    pool = {"sources": ["gym/SlowCounting-v0/noise-2:3"]}
    file = write(tmp_path / "b.yaml", pool=pool, speed={"update_s": 1, "step_s": 1})
    assert gsa(["suite", "run", str(file), "--out", str(folder)]) == 2
    assert "was begun with another pool" in capsys.readouterr().err


def test_status_and_report_of_a_folder_with_a_part_of_the_trials(whole, tmp_path, capsys):
    folder = tmp_path / "suite"
    shutil.copytree(whole, folder)
    (folder / "results" / "gym-SlowCounting-v0--gsa--seed0.json").unlink()
    (folder / "failures").mkdir()
    told = {"name": "gym-SlowCounting-v0--naive--seed0", "reason": "The guide failed."}
    (folder / "failures" / "gym-SlowCounting-v0--naive--seed0.json").write_text(json.dumps(told))
    (folder / "results" / "gym-SlowCounting-v0--torn--seed0.json").write_text('{"task": ')
    assert gsa(["suite", "status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "Trials: 4; 2 done, 1 failed, 1 begun." in said
    assert "begun: gym-SlowCounting-v0--gsa--seed0: 120 of 120 frames" in said
    assert "failed: gym-SlowCounting-v0--naive--seed0: The guide failed." in said
    assert gsa(["suite", "report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.html")
    report = json.loads((folder / "report.json").read_text())
    assert report["trials"] == 2 and list(report["failed"]) == ["gym-SlowCounting-v0--naive--seed0"]
    assert any("torn" in note for note in report["notes"])


def test_the_table_has_more_rows_than_columns():
    suite = configs.load(SuiteConfig, SUITES / "evidence.yaml")
    now = [suite_progress.Standing(trial, "done", score=10.0 * trial.seed) for trial in suite.trials(Path("out"))]
    table = suite_progress.scores(now)
    assert [column.header for column in table.columns] == ["method", *suite.tasks]
    cells = {name: list(row) for name, *row in zip(*(column.cells for column in table.columns), strict=True)}
    assert cells["gsa"] == ["10.0 3/3"] * 4
    assert cells["gsa larger-budget"] == ["10.0 3/3", "", "", ""]
    few = [each for each in now if each.trial.method in ("scratch", "gsa") and not each.trial.variant]
    assert [column.header for column in suite_progress.scores(few).columns] == ["task", "scratch", "gsa"]


def test_there_is_nothing_to_tell_of_a_suite_that_was_not_begun(tmp_path, capsys):
    file = write(tmp_path / "small.yaml")
    for what in ("status", "report"):
        assert gsa(["suite", what, str(file), "--out", str(tmp_path / "out")]) == 2
    assert gsa(["suite", "status", str(tmp_path)]) == 2
    assert "lacks suite.yaml" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_suites_are_valid_and_say_what_they_take(path, tmp_path, capsys):
    suite = replace(configs.load(SuiteConfig, path), speed=Speed(0.5, 0.01))
    assert suites.run(suite, tmp_path / "out", (), 0.0, None, dry_run=True) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "hours of trials" in said or "minutes of trials" in said
    assert not (tmp_path / "out").exists()
    if path.stem == "paper72":
        assert len(suite.tasks) == 72 and "trials: 1296" in said


@pytest.mark.slow
def test_the_paper_suite_is_forecast_from_steps_of_its_own_model(tmp_path, capsys):
    """Takes 6 GB: the paper's model is timed on parts of a batch."""
    assert gsa(["suite", "run", str(SUITES / "paper72.yaml"), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "hours of trials" in said and "of disk" in said


def test_a_report_compares_methods_over_tasks(tmp_path):
    levels = {"scratch": 20, "naive": 25, "gsa": 60, "prior": 40, "gsa k50": 50}
    folder = fill(tmp_path / "suite", ["dmc/walker-walk", "metaworld/reach-v3", "gym/Counting-v0"], levels)
    page, said = write_suite_report(folder)
    found = json.loads((folder / "report.json").read_text())
    scores = found["aggregate"]["score"]
    assert "gsa has the highest mean" in said and list(scores) == ["scratch", "naive", "gsa", "prior"]
    assert scores["gsa"]["tasks"] == 2  # the gym task has no scale, which the page says
    assert "gym/Counting-v0 has no scale" in page.read_text()
    gain = scores["gsa"]["gain_over_scratch"]
    assert gain["low"] < gain["value"] < gain["high"] and 1 < gain["value"] < 3
    assert scores["gsa"]["probability_of_improvement"]["value"] == 1
    assert scores["gsa"]["iqm"]["low"] > scores["prior"]["iqm"]["high"]
    walker = found["per_task"]["dmc/walker-walk"]
    target = np.mean(walker["scratch"]["scores"])
    assert walker["gsa"]["frames_to_scratch"] == pytest.approx(
        8000 * target / np.mean(walker["gsa"]["scores"]), rel=1e-6
    )
    assert walker["scratch"]["frames_to_scratch"] == pytest.approx(8000)
    assert walker["gsa k50"]["score"]["value"] == pytest.approx(50, abs=5)
    assert list(found["aggregate"]["return"]["gsa"])  # DMControl's returns have a scale of their own
    assert found["aggregate"]["return"]["gsa"]["tasks"] == 1


def test_frames_are_counted_only_where_a_curve_gets_there(tmp_path):
    folder = fill(tmp_path / "suite", ["dmc/walker-walk"], {"scratch": 60, "naive": 20})
    write_suite_report(folder)
    rows = json.loads((folder / "report.json").read_text())["per_task"]["dmc/walker-walk"]
    assert rows["naive"]["frames_to_scratch"] is None


def test_out_of_time_it_ends_well_and_says_what_is_left(tmp_path):
    """So early that not even the pool is there; nothing is lost, and nothing failed."""
    file = write(tmp_path / "small.yaml", methods=["scratch", "gsa"], per_method={}, speed={"update_s": 1, "step_s": 1})
    ended = run([str(file), "--out", str(tmp_path / "out"), "--max-hours", "1e-5"])
    assert ended.returncode == 0, ended.stderr
    said = " ".join(ended.stderr.split())
    assert "Done: 0, failed: 0, left: 2. The time is over; the same command goes on" in said


def test_a_trial_that_no_node_has_room_for_is_said_before_anything_is_made(tmp_path):
    file = write(tmp_path / "small.yaml", resources={"gpus": 8}, speed={"update_s": 1, "step_s": 1})
    ended = run([str(file), "--out", str(tmp_path / "out")])
    assert ended.returncode == 2
    assert "A trial takes 1 CPUs and 8 GPUs, and no node has them" in ended.stderr
    assert not (tmp_path / "out" / "pool").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_may_be_distributed_and_its_pool_and_model_another_suites(whole, tmp_path):
    """Over a Ray and Redis of its own, below Tune's."""
    file = write(
        tmp_path / "small.yaml", methods=["gsa"], per_method={}, pool={"store": str(whole / "pool")},
        world_model={"folder": str(whole / "world_model")},
        finetune=plain()["finetune"] | {"local": False, "workers": 2},
    )  # fmt: skip
    ended = run([str(file), "--out", str(tmp_path / "out")])
    assert ended.returncode == 0, ended.stderr
    assert results(tmp_path / "out")["gym-SlowCounting-v0--gsa--seed0"]["frames"] == 120


def test_the_time_left_is_held_to_how_the_forecast_has_fared(whole, monkeypatch):
    """Four trials of an hour each as foretold; each took two: half of them done after four hours leaves four."""
    trials = configs.load(SuiteConfig, whole / SUITE).trials(whole)
    hours, clock = {trial.name: 1.0 for trial in trials}, [0.0]
    monkeypatch.setattr(suite_progress.time, "monotonic", lambda: clock[0])
    states = [suite_progress.Standing(trial, "waiting") for trial in trials]
    left = suite_progress.TimeLeft(hours, states)
    assert left(states) == ""
    clock[0] = 4 * 3600
    states[:2] = [replace(each, state="done") for each in states[:2]]
    assert left(states) == "About 4.0 hours left."
    half = replace(states[2], state="running", frames=60)
    assert left([*states[:2], half, states[3]]) == "About 2.4 hours left."
