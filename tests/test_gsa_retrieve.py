"""`gsa index` and `gsa retrieve` as a user runs them: a real store, a real world model, a task that resets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.environment import make
from deploy import cli
from deploy import run as runs
from deploy.config import FinetuneConfig
from deploy.rehearsal import first_observations
from gsa.agent.sizes import PRESETS
from gsa.agent.world_model import WorldModel
from gsa.schema import Spec, Trajectory
from learner.config import CloneConfig
from retrieval.retriever import RehearsalSet
from retrieval.store import TrajectoryStore
from tests import dots

TASK, IMPORTS = "gym/Place-v0", ("tests.gym_counting",)
OTHER = Spec("toy/other", dots.PIXELS, 5)
PLACES = range(8, 56, 3)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Of the task's robot a trajectory from each place, odd ones not of the task; of another robot every place."""
    with make(TASK, imports=IMPORTS) as env, TrajectoryStore.create(tmp_path / "pool") as store, store.batch():
        for i, place in enumerate(PLACES):
            add(store, env.spec, place, "gym/Push-v0/noise" if i % 2 else f"{TASK}/noise")
        for place in range(8, 56):
            add(store, OTHER, place, "toy/other")
    WorldModel.create(PRESETS["tiny"].world_model, seed=0).save(tmp_path / "model")
    return tmp_path


def add(store: TrajectoryStore, spec: Spec, place: int, source: str) -> int:
    pixels = np.repeat(dots.image(place)[None], 6, 0)
    pixels[0, 0, 0] = len(store)  # no two alike
    action, discount = np.zeros((5, spec.action_dim), np.float32), np.ones(5, np.float32)
    return store.append(Trajectory(spec.embodiment, {"pixels": pixels}, action, discount, source=source), spec)


def retrieve(folder: Path, *more: object) -> RehearsalSet:
    arguments = ["retrieve", "--task", TASK, "--store", folder / "pool", "--world-model", folder / "model"]
    assert cli.main([str(a) for a in (*arguments, "--out", folder / "out", "--imports", *IMPORTS, *more)]) == 0
    return RehearsalSet.load(folder / "out" / "rehearsal.json")


def oracle(folder: Path, queries: int, k: int) -> tuple[list[int], list[float]]:
    """The k nearest of the task's robot, by hand in float64."""
    model = WorldModel.load(folder / "model")
    with make(TASK, imports=IMPORTS) as env, TrajectoryStore.open(folder / "pool") as store:
        wanted = model.features(first_observations(env, queries, seed=0)).astype(np.float64)
        rows = store.rows(TASK).tolist()
        frames = np.concatenate([store.read(row).observation["pixels"][:1] for row in rows])
    features = model.features({"pixels": frames}).astype(np.float64)
    distances = np.sqrt(((features[:, None] - wanted) ** 2).sum(-1)).min(1)
    order = np.argsort(distances, kind="stable")[:k]
    return [rows[i] for i in order], distances[order].tolist()


@pytest.mark.parametrize("queries", [1, 5])
def test_the_nearest_of_the_right_robot_each_once(pool: Path, queries: int) -> None:
    """Another robot starts nearer to every query: it must not take places from the k."""
    assert cli.main(["index", "--store", str(pool / "pool"), "--world-model", str(pool / "model")]) == 0
    found = retrieve(pool, "--k", 6, "--queries", queries)
    rows, distances = oracle(pool, queries, 6)
    assert list(found.rows) == rows
    np.testing.assert_allclose(found.distances, distances, rtol=1e-4, atol=1e-4)
    assert len(set(found.rows)) == 6
    assert found.precision[-1].embodiment < 0.9
    assert (pool / "out" / "contact_sheet.png").stat().st_size > 1000


def test_too_few_is_an_answer_and_is_said(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = retrieve(pool, "--k", 500, "--queries", 3)
    assert (len(found), found.k) == (len(PLACES), 500)
    said = capsys.readouterr()
    assert f"{len(PLACES)} trajectories of {TASK}, fewer than the 500 asked for" in said.err
    assert f"precision at {len(PLACES)}: 50%" in said.out
    assert "chance: 50%" in said.out
    assert f"     8  {TASK}/noise" in said.out


def test_a_grown_pool_is_retrieved_from_at_once(pool: Path) -> None:
    before = retrieve(pool, "--k", 1)
    with make(TASK, imports=IMPORTS) as env, TrajectoryStore.open(pool / "pool", write=True) as store:
        query = first_observations(env, 1, 0)
        action, discount = np.zeros((1, env.spec.action_dim), np.float32), np.ones(1, np.float32)
        pixels = np.repeat(query["pixels"], 2, 0)
        row = store.append(Trajectory(TASK, {"pixels": pixels}, action, discount, source="me"))
    after = retrieve(pool, "--k", 1)
    assert before.rows != after.rows == (row,)
    assert after.distances[0] < 1e-3 < before.distances[0]


def test_the_random_control_says_that_it_is_one(pool: Path) -> None:
    found = retrieve(pool, "--k", 4, "--random", "--seed", 3)
    assert (found.kind, found.distances, len(set(found.rows))) == ("random", (), 4)
    assert set(found.sources) <= {f"{TASK}/noise", "gym/Push-v0/noise"}
    assert retrieve(pool, "--k", 4, "--random", "--seed", 3) == found
    assert retrieve(pool, "--k", 4, "--random", "--seed", 4) != found


def test_an_approximate_search_keeps_its_recall(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = retrieve(pool, "--k", 4, "--search", "ivf")
    assert found.search == "ivf"
    assert found.recall is not None and 0 <= found.recall <= 1
    assert f"ivf finds {found.recall:.1%} of the 4 nearest" in capsys.readouterr().err


def test_a_run_rehearses_what_the_command_retrieves(pool: Path) -> None:
    shown = retrieve(pool, "--k", 6, "--queries", 2, "--seed", 1)
    config = FinetuneConfig(
        task=TASK, imports=IMPORTS, store=pool / "pool", world_model=pool / "model", out=pool / "run", local=True,
        method="rehearsal", retrieve_k=6, queries=2, seed=1, clone=CloneConfig(steps=1), warmup_frames=20,
        warmup_episodes=1, budget_frames=60,
    )  # fmt: skip
    run = runs.prepare(config.resolved(), lambda: None)
    assert RehearsalSet.load(run / "rehearsal.json") == shown


@pytest.mark.parametrize("flags", [("--k", 0), ("--queries", 0)])
def test_numbers_that_make_no_sense_are_refused_and_leave_nothing(
    pool: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, int]
) -> None:
    arguments = ["retrieve", "--task", TASK, "--store", pool / "pool", "--world-model", pool / "model"]
    assert cli.main([str(a) for a in (*arguments, "--out", pool / "out", "--imports", *IMPORTS, *flags)]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert not (pool / "out").exists()


def test_a_damaged_trajectory_is_left_out_by_name(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrajectoryStore.create(pool / "packed", codec="lz4") as packed, TrajectoryStore.open(pool / "pool") as store:
        for row in range(4):
            packed.append(store.read(row), store.spec(row))
    with TrajectoryStore.open(pool / "packed") as packed:
        start, end = int(packed.catalog.column("start")[1]), int(packed.catalog.column("end")[1])
    (shard,) = (pool / "packed" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[start + (end - start) // 8 : end] = bytes(len(content[start + (end - start) // 8 : end]))
    shard.write_bytes(content)
    index = ["index", "--store", str(pool / "packed"), "--world-model", str(pool / "model")]
    assert cli.main(index) == 1
    assert "left out" in capsys.readouterr().err
    head = json.loads(next((pool / "model" / "index").glob("*/index.json")).read_text())
    assert len(head["unread"]) == 1
