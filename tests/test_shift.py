"""Distribution shift: distances against slow oracles, and `gsa shift` on a run whose answer is known."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import ot
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from actors.environment import make
from deploy import cli
from deploy import run as runs
from deploy.config import FinetuneConfig
from deploy.shift import STATES_A_SEQUENCE, latents
from gsa.agent.sizes import PRESETS
from gsa.agent.world_model import WorldModel
from gsa.errors import UsageError
from gsa.schema import Spec, Trajectory
from reports.shift import Sample, compare, directions, exact_wasserstein, sliced_wasserstein
from retrieval.retriever import RehearsalSet
from retrieval.store import TrajectoryStore
from tests import dots

TASK, IMPORTS = "gym/Place-v0", ("tests.gym_counting",)


# Distances


@pytest.mark.parametrize("seed", range(20))
def test_the_exact_distance_is_the_cheapest_assignment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, dim = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    a, b = rng.normal(size=(2, n, dim)).astype(np.float32)
    cost = np.linalg.norm(a[:, None].astype(np.float64) - b, axis=-1)
    every = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
    np.testing.assert_allclose(exact_wasserstein(a, b), every / n, rtol=1e-6, atol=1e-7)


def test_the_exact_distance_of_many_states() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200, 12)).astype(np.float32)
    cost = np.linalg.norm(a[:, None].astype(np.float64) - b, axis=-1)
    np.testing.assert_allclose(exact_wasserstein(a, b), cost[linear_sum_assignment(cost)].mean(), rtol=1e-6)
    np.testing.assert_allclose(exact_wasserstein(a, a + np.float32(3)), 3 * np.sqrt(12), rtol=1e-5)
    assert exact_wasserstein(a, a[::-1]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_in_one_dimension_all_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 57, 1)).astype(np.float32)
    by_cdf = wasserstein_distance(a[:, 0], b[:, 0])
    np.testing.assert_allclose(exact_wasserstein(a, b), by_cdf, rtol=1e-5)
    np.testing.assert_allclose(sliced_wasserstein(a, b), by_cdf, rtol=1e-5)
    np.testing.assert_allclose(exact_wasserstein(a, b[:19]), wasserstein_distance(a[:, 0], b[:19, 0]), rtol=1e-5)


def test_the_sliced_distance_is_the_mean_over_directions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 80, 9)).astype(np.float32)
    along = directions(9, 300, seed=4)
    np.testing.assert_allclose(np.linalg.norm(along, axis=0), 1, rtol=1e-6)
    slow = np.mean([wasserstein_distance(a @ u, b @ u) for u in along.T])
    np.testing.assert_allclose(sliced_wasserstein(a @ along, b @ along), slow, rtol=1e-5)
    library = ot.sliced_wasserstein_distance(a, b, p=1, projections=along)
    np.testing.assert_allclose(sliced_wasserstein(a @ along, b @ along), library, rtol=1e-5)


def normal(seed: int, shift: float, n: int = 400, trajectories: int = 20) -> Sample:
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(n, 6)).astype(np.float32)
    states[:, 0] += shift
    return Sample(states, np.arange(n) % trajectories)


def test_a_known_shift_is_found_with_intervals_that_exclude_chance() -> None:
    samples = {"same": normal(1, 0), "near": normal(2, 2), "pool": normal(3, 6)}
    rows = {row.sample: row for row in compare("online", normal(0, 0), samples, 150, 20, seed=0)}
    assert list(rows) == ["online", "same", "near", "pool"]
    for measure in ("exact", "sliced"):
        floor, same, near, pool = (getattr(row, measure) for row in rows.values())
        assert abs(same.mean - floor.mean) < 0.3 * floor.mean
        assert same.high < near.low < near.high < pool.low
        assert all(e.low <= e.mean <= e.high for e in (floor, same, near, pool))
    assert rows["pool"].exact.mean == pytest.approx(6, rel=0.1)
    assert rows["pool"].exact_ratio.mean == rows["pool"].exact_ratio.low == 1
    assert rows["near"].exact_ratio.high < 0.6


def test_equal_seeds_give_equal_numbers_and_samples_are_of_one_size() -> None:
    few = normal(1, 0, n=30, trajectories=3)
    one, two, three = (compare("online", normal(0, 0), {"few": few}, 500, 4, seed) for seed in (5, 5, 6))
    assert one == two != three
    same_size = compare("online", normal(0, 0, n=20, trajectories=2), {"few": few}, 500, 4, 5)
    assert same_size[1].exact.mean > 0


def test_one_trajectory_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="random data has fewer than 2"):
        compare("online", normal(0, 0), {"random": normal(1, 0, trajectories=1)}, 50, 2, 0)


# Latents


def add(store: TrajectoryStore, spec: Spec, place: int, steps: int = 5) -> int:
    pixels = np.repeat(dots.image(place)[None], steps + 1, 0)
    pixels[:, 0, 0] = len(store)
    action = np.full((steps, spec.action_dim), 0.1, np.float32)
    return store.append(Trajectory(spec.embodiment, {"pixels": pixels}, action, np.ones(steps, np.float32)), spec)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return WorldModel.create(PRESETS["tiny"].world_model, seed=0)


def test_latents_are_those_of_the_trajectories_they_are_said_to_be_of(tmp_path: Path, model: WorldModel) -> None:
    """Each trajectory shows one image throughout, so its features are known."""
    spec, other = dots.spec(2), Spec("toy/other", dots.PIXELS, 5)
    with TrajectoryStore.create(tmp_path / "s") as store:
        for i in range(8):
            add(store, (spec, other)[i % 2], 8 + 5 * i, steps=3 + 10 * (i % 3))
        features, states = latents(model, store, np.arange(8), 20, 10, [0])
        again, _ = latents(model, store, np.arange(8), 20, 10, [0])
        alone, _ = latents(model, store, np.array([3]), 20, 10, [0])
        frames = {"pixels": np.concatenate([store.read(row).observation["pixels"][:1] for row in range(8)])}
    wanted = model.features(frames)
    np.testing.assert_allclose(features.states, wanted[features.trajectory], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(features.trajectory, states.trajectory)
    np.testing.assert_array_equal(features.states, again.states)
    assert set(alone.trajectory.tolist()) == {3}
    assert states.states.shape[1] == model.config.deter + model.config.latent
    assert len(np.unique(states.states, axis=0)) > 20
    assert len(features) <= 20 * STATES_A_SEQUENCE


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: WorldModel) -> Path:
    """A run whose online episodes stay where its retrieved trajectories are: left, in a pool that is everywhere."""
    folder = tmp_path_factory.mktemp("shift")
    model.save(folder / "model")
    with make(TASK, imports=IMPORTS) as env, TrajectoryStore.create(folder / "pool") as store, store.batch():
        spec = env.spec
        left = [add(store, spec, place) for place in range(8, 20)]
        for place in (*range(30, 56), *range(30, 56)):
            add(store, spec, place)
        add(store, Spec("toy/blind", {"pixels": dots.PIXELS["pixels"]}, 50), 10)  # more actions than the model takes
    config = FinetuneConfig(
        task=TASK, imports=IMPORTS, store=folder / "pool", world_model=folder / "model", out=folder / "run", local=True,
        method="rehearsal", retrieve_k=12, warmup_frames=20, warmup_episodes=1, budget_frames=60,
    )  # fmt: skip
    runs.prepare(config.resolved(), lambda: None)
    found = RehearsalSet.load(folder / "run" / "rehearsal.json")
    changed = {"rows": tuple(left), "sources": ("",) * 12, "distances": (0.0,) * 12}
    RehearsalSet(**{**vars(found), **changed}).save(folder / "run" / "rehearsal.json")
    with TrajectoryStore.create(folder / "run" / "online") as online:
        for place in range(8, 20):
            add(online, spec, place)
    return folder / "run"


QUICK = ("--sequences", 24, "--length", 6, "--states", 60, "--repeats", 6)


def shift(*arguments: object) -> int:
    return cli.main(["shift", *map(str, arguments)])


def test_what_was_retrieved_is_nearer_to_what_the_run_met(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = run.parent / "expert"
    with make(TASK, imports=IMPORTS) as env, TrajectoryStore.create(expert) as store:
        for place in (12, 13, 14, 15):
            add(store, env.spec, place)
    assert shift(*QUICK, "--expert", expert, run) == 0
    report = json.loads((run / "shift.json").read_text())
    for rows in report["spaces"].values():
        by = {(row["reference"], row["sample"]): row for row in rows}
        assert {sample for _, sample in by} == {"online", "expert", "retrieved", "random", "pool"}
        for reference in ("online", "expert"):
            assert by[reference, "retrieved"]["exact"]["high"] < by[reference, "pool"]["exact"]["low"]
            assert by[reference, "retrieved"]["sliced"]["mean"] < by[reference, "random"]["sliced"]["mean"]
    assert report["trajectories"] == {"online": 12, "expert": 4, "retrieved": 12, "random": 12, "pool": 64}
    assert (run / "shift.png").read_bytes().startswith(b"\x89PNG")
    first = report["spaces"]
    assert shift(*QUICK, "--expert", expert, "--out", run.parent / "again", run) == 0
    assert json.loads((run.parent / "again" / "shift.json").read_text())["spaces"] == first


def test_stores_can_be_named_without_a_run(run: Path, tmp_path: Path) -> None:
    stores = ("--online", run / "online", "--pool", run.parent / "pool", "--world-model", run.parent / "model")
    assert shift(*QUICK, *stores, "--out", tmp_path / "out") == 0
    samples = {row["sample"] for row in json.loads((tmp_path / "out" / "shift.json").read_text())["spaces"][
        "encoder features"]}  # fmt: skip
    assert samples == {"online", "random", "pool"}


def test_wrong_use_is_one_sentence_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = ("--online", run / "online", "--pool", run / "online", "--world-model", run.parent / "model")
    for arguments, says in (
        ((), "--online"),
        ((tmp_path,), "config.yaml"),
        (("--repeats", 1, run), "--repeats"),
        ((*stores, "--rehearsal", run / "rehearsal.json"), "--out"),
        ((*stores, "--rehearsal", run / "rehearsal.json", "--out", tmp_path / "out"), "rehearsal set is of the store"),
        ((*stores[2:], "--online", tmp_path / "none", "--out", tmp_path / "out"), "none"),
    ):
        assert shift(*QUICK[:6], *arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("gsa: ") and says in said
    monkeypatch.setitem(sys.modules, "ot", None)
    assert shift(*QUICK, run, "--out", tmp_path / "out") == 2
    assert "gsa-rl[shift]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
