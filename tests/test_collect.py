"""Collectors: sources, noise, scripted policies, the planner's model of the tasks, resumable and repeatable pools."""

import json
from dataclasses import replace

import mujoco
import numpy as np
import pytest

from actors import collect as collecting
from actors import dmc_rewards, sources
from actors.collect import CollectPlan, collect, run_episode
from actors.environment import make
from actors.planner import FULL_STATE, POSE, Planner, PlanningModel, random_objective, task_objective
from deploy import cli
from gsa.agent.agent import Agent
from gsa.agent.world_model import WorldModel
from gsa.errors import EnvironmentFault, SpecMismatch, UsageError
from gsa.schema import Controller
from retrieval.ingest import ingest
from retrieval.store import TrajectoryStore
from tests.agents import BEHAVIOUR, MODEL

SMALL = CollectPlan((("metaworld/reach-v3/scripted-0.5", 2), ("metaworld/drawer-close-v3/noise-1", 1)))


def blind(environment):
    """Without images, where a test does not look at them."""
    environment.simulation.render = lambda: np.zeros((64, 64, 3), np.uint8)
    return environment


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """The small plan, collected in this process."""
    out = tmp_path_factory.mktemp("pool")
    seen = []
    report = collect(SMALL, out, seed=7, progress=lambda done, total, numbers: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    return out, report


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.npz")}


# Sources


def test_sources_have_one_spelling():
    assert sources.parse("metaworld/reach-v3/scripted-0.50").name == "metaworld/reach-v3/scripted-0.5"
    assert sources.parse("dmc/walker-walk-hard/planner-1.0").name == "dmc/walker-walk-hard/planner-1"
    assert sources.parse("dmc/cheetah-run/noise-1").folder == "dmcontrol/cheetah/run/noise-1"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("metaworld/reach-v3", "is not a source"),
        ("metaworld/reach-v3/script-1", "Did you mean scripted"),
        ("dmc/walker-walk/scripted-1", "works on metaworld tasks only"),
        ("metaworld/reach-v3/planner-1", "works on dmc tasks only"),
        ("dmc/walker-walk/planner-1.5", "from 0 to 1"),
        ("dmc/walker-fly/noise-1", "Unknown task"),
        ("dmc/walker-walk/agent:nowhere", "no agent in nowhere"),
    ],
)
def test_wrong_sources_are_explained(name, complaint):
    with pytest.raises(UsageError, match=complaint):
        CollectPlan(((name, 1),))


def test_plans_are_checked():
    with pytest.raises(UsageError, match="twice"):
        CollectPlan((("dmc/walker-walk/noise-1", 1), ("dmc/walker-walk/noise-1.0", 2)))
    with pytest.raises(UsageError, match="at least 1"):
        CollectPlan((("dmc/walker-walk/noise-1", 0),))


def test_a_source_may_stand_for_many():
    assert sources.expand("dmc/walker-run/noise-1", 3) == [("dmc/walker-run/noise-1", 3)]
    everything = sources.expand("metaworld/*/mixed", 12)
    assert len(everything) == 50 * 5
    assert sum(n for _, n in everything) == 50 * 12
    assert len(CollectPlan(tuple(everything)).parsed()) == 250
    assert [name for name, _ in sources.expand("dmc/quadruped-roll*/agent:some/folder", 1)] == [
        "dmc/quadruped-roll/agent:some/folder", "dmc/quadruped-roll-fast/agent:some/folder",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="No task is like"):
        sources.expand("dmc/dog-*/mixed", 1)


# Coloured noise


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_noise_has_unit_variance_and_the_spectrum_asked_for(exponent):
    rng = np.random.default_rng(0)
    noise = np.concatenate([sources.coloured_noise(512, 50, exponent, rng) for _ in range(20)], 1)
    assert np.mean(noise**2) == pytest.approx(1.0, abs=0.05)
    windowed = (noise - noise.mean(0)) * np.hanning(len(noise))[:, None]
    power = (np.abs(np.fft.rfft(windowed, axis=0)) ** 2).mean(1)
    bins = np.arange(8, 129)
    slope = np.polyfit(np.log(bins), np.log(power[bins]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.1)


# Pools


def test_files_lie_where_the_published_pools_have_them_and_hold_no_reward(pool):
    out, _ = pool
    folder = out / "metaworld" / "reach-v3" / "scripted-0.5"
    files = sorted(folder.glob("*.npz"))
    assert len(files) == 2
    time, name, _, length = files[0].stem.split("-")
    assert (len(time), len(name), int(length)) == (15, 32, 100)
    assert {f.stem.split("-")[2] for f in files} == {"0", "1"}
    with np.load(files[0]) as arrays:
        assert set(arrays) == {"observation", "action", "discount"}
        assert arrays["observation"].shape == (101, 3, 64, 64)
    spec = json.loads((folder / "spec.json").read_text())
    assert spec["source"] == "metaworld/reach-v3/scripted-0.5"
    assert spec["embodiment"] == "metaworld/sawyer"
    assert spec["renderer"].startswith("fast mujoco-")


def test_what_is_ingested_is_what_was_executed(pool, tmp_path):
    """Images and actions come back in the time table's alignment, though the files store the action that led there."""
    out, _ = pool
    with TrajectoryStore.create(tmp_path / "store") as store:
        ingest(out, store)
        rows = [store.read(row) for row in range(len(store))]
        source = sources.parse("metaworld/drawer-close-v3/noise-1")
        job = collecting.Job(source, 0, 7, str(out), False, "fast", ())
        (stored,) = (row for row in rows if row.source == source.name)
        with make("metaworld/drawer-close-v3") as environment:
            behaviour = sources.behaviour(source, environment)
            again = run_episode(environment, behaviour, source.name, job.seeds)
        np.testing.assert_array_equal(stored.action, again.action)
        np.testing.assert_array_equal(stored.observation["pixels"], again.observation["pixels"])
        assert stored.reward is None
        assert np.abs(stored.action).max() == 1.0  # noise was clipped before it was executed


def test_the_report_tells_what_the_files_hide(pool):
    out, report = pool
    assert json.loads((out / "collect.json").read_text()) == report
    scripted = report["sources"]["metaworld/reach-v3/scripted-0.5"]
    assert (scripted["episodes"], scripted["steps"], scripted["frames"]) == (2, 200, 400)
    assert scripted["return"]["min"] > 1000 > report["sources"]["metaworld/drawer-close-v3/noise-1"]["return"]["min"]
    assert sum(scripted["score_histogram"]["counts"]) == 2
    returns = scripted["return_histogram"]
    assert sum(returns["counts"]) == 2 and returns["edges"][0] == scripted["return"]["min"]


def test_a_broken_off_collection_goes_on_where_it_was(pool, tmp_path):
    """Files without a record and records without a file are collected again, to the same bytes; others are not."""
    complete = contents(pool[0])
    collect(CollectPlan(SMALL.sources[:1]), tmp_path, seed=7)
    first, second = sorted(tmp_path.rglob("*.npz"))
    kept = json.loads((tmp_path / "episodes.jsonl").read_text().splitlines()[0])["file"]
    lost = first if str(first.relative_to(tmp_path)) != kept else second
    lost.unlink()
    with (tmp_path / "episodes.jsonl").open("a") as records:
        records.write('{"stem": "torn')
    untouched = (tmp_path / kept).stat().st_mtime_ns
    seen = []
    collect(SMALL, tmp_path, seed=7, progress=lambda done, total, numbers: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    assert (tmp_path / kept).stat().st_mtime_ns == untouched
    assert contents(tmp_path) == complete
    seen.clear()
    report = collect(SMALL, tmp_path, seed=7, progress=lambda done, total, numbers: seen.append((done, total)))
    assert seen == []
    assert report == json.loads((pool[0] / "collect.json").read_text())
    with pytest.raises(UsageError, match="other settings"):
        collect(CollectPlan(SMALL.sources, with_reward=True), tmp_path, seed=7)


def test_two_processes_make_the_same_pool(pool, tmp_path):
    report = collect(SMALL, tmp_path, seed=7, processes=2)
    assert contents(tmp_path) == contents(pool[0])
    assert report == pool[1]


def test_a_store_gets_the_same_episodes_in_the_plans_order_and_goes_on(pool, tmp_path):
    """Straight into a store: what the files hold, whatever the number of processes, and no word of how good it was."""
    (tmp_path / "records").mkdir()
    for name, processes in (("one", 1), ("two", 2)):
        with TrajectoryStore.create(tmp_path / name) as store:
            collect(CollectPlan(SMALL.sources[:1]), tmp_path / "records" / name, 7, processes, store=store)
            known = len(store)
            report = collect(SMALL, tmp_path / "records" / name, 7, processes, store=store)
            assert (known, len(store)) == (2, 3)
            assert report == pool[1]
    with (
        TrajectoryStore.open(tmp_path / "one") as one, TrajectoryStore.open(tmp_path / "two") as two,
        TrajectoryStore.create(tmp_path / "ingested") as from_files,
    ):  # fmt: skip
        ingest(pool[0], from_files)
        files = {row.action.tobytes(): row for row in map(from_files.read, range(3))}
        for row in range(3):
            first, second = one.read(row), two.read(row)
            assert (first.id, first.source, first.stats) == (second.id, second.source, {})
            assert first.reward is None
            for other in (second, files[first.action.tobytes()]):
                np.testing.assert_array_equal(first.observation["pixels"], other.observation["pixels"])
        assert [one.read(row).source for row in range(3)] == [name for name, n in SMALL.sources for _ in range(n)]


GYM = ("tests.gym_counting",)


@pytest.fixture
def agent(tmp_path):
    """A small agent's folder for gym/Counting-v0."""
    model = replace(MODEL, max_action_dim=2)
    Agent(WorldModel(model), BEHAVIOUR, 2).save(tmp_path / "agent")
    return tmp_path / "agent"


def test_an_agent_collects_by_sampling_or_by_its_mean(agent, tmp_path):
    names = [f"gym/Counting-v0/{kind}:{agent}" for kind in ("agent", "agent-mean")]
    plan = CollectPlan(tuple((name, 2) for name in names), imports=GYM)
    with TrajectoryStore.create(tmp_path / "store") as store:
        report = collect(plan, tmp_path / "out", store=store)
        rows = [store.read(row) for row in range(4)]
    moved = tmp_path / "moved"
    agent.rename(moved)
    again = CollectPlan(tuple((name.replace(str(agent), str(moved)), 2) for name in names), imports=GYM)
    with TrajectoryStore.create(tmp_path / "again") as store:
        assert collect(again, tmp_path / "out2", store=store) == report  # an agent is known by what it is
        np.testing.assert_array_equal(store.read(0).action, rows[0].action)
    assert all(str(tmp_path) not in name for name in report["sources"])
    assert all((row.controller == Controller.POLICY).all() for row in rows)
    assert np.abs(np.diff(rows[2].action, axis=0)).mean() < np.abs(np.diff(rows[0].action, axis=0)).mean()


def test_an_agent_for_other_actions_is_refused(agent, tmp_path):
    plan = CollectPlan(((f"dmc/walker-walk/agent:{agent}", 1),))
    with pytest.raises(SpecMismatch, match="has 2 actions, dmc/walker-walk has 6"):
        collect(plan, tmp_path / "out")


def test_collect_leaves_a_page_to_look_at(tmp_path):
    command = ["collect", "--source", "gym/Counting-v0/mixed:4", "--import", *GYM, "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--store", str(tmp_path / "store"), "--processes", "1"]) == 0
    page = (tmp_path / "out" / "collect.html").read_text()
    assert "gym/Counting-v0" in page and "noise-2" in page and "<svg" in page
    with TrajectoryStore.open(tmp_path / "store") as store:
        assert len(store) == 4


def test_an_episode_that_fails_is_left_out_and_said(tmp_path, monkeypatch):
    def fail(*_):
        raise EnvironmentFault("the solver diverged")

    monkeypatch.setattr(collecting, "run_episode", fail)
    report = collect(CollectPlan((("dmc/cartpole-balance/noise-0", 2),)), tmp_path)
    assert len(report["failed"]) == 2
    assert "the solver diverged" in report["failed"][0]
    assert not list(tmp_path.rglob("*.npz"))


# Scripted policies


def test_noise_makes_scripted_policies_worse():
    with make("metaworld/reach-v3") as environment:
        blind(environment)
        results = {}
        for sigma in (0, 2):
            policy = sources.behaviour(sources.parse(f"metaworld/reach-v3/scripted-{sigma}"), environment)
            results[sigma] = [run_episode(environment, policy, "test", (seed, seed)).stats for seed in range(4)]
        assert [stats["success"] for stats in results[0]] == [1.0] * 4
        means = {sigma: np.mean([stats["return"] for stats in stats]) for sigma, stats in results.items()}
        assert means[2] < 0.9 * means[0]


# The planner


@pytest.mark.parametrize("task", sorted(dmc_rewards.STOCK | dmc_rewards.CUSTOM))
def test_the_planning_model_sees_the_tasks_reward(task):
    """Features from sensors, through the restated rewards, give the suite's reward in states along a random episode."""
    with make(f"dmc/{task}") as environment:
        simulation, rng = blind(environment).simulation, np.random.default_rng(0)
        model = PlanningModel(simulation)
        environment.reset(3)
        for _ in range(15):
            action = rng.uniform(-1, 1, environment.task.action_dim)
            expected = simulation.frame(action.astype(np.float32)).reward
            mujoco.mj_setState(model.model, model.data, simulation.full_state(), FULL_STATE)
            model.data.ctrl[:] = simulation.physics.data.ctrl
            mujoco.mj_forward(model.model, model.data)
            planned = task_objective(task)(model.features(model.data.sensordata))
            assert float(planned) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("task", ["cartpole-balance", "cheetah-run"])
def test_planning_beats_noise_and_better_planning_beats_worse(task):
    with make(f"dmc/{task}") as environment:
        simulation, returns = blind(environment).simulation, {}
        for quality in (0.0, 0.3, 1.0):
            planner = Planner(simulation, quality, lambda model, rng: task_objective(task))
            environment.reset(0)
            planner.begin(np.random.default_rng(0))
            returns[quality] = sum(environment.step(planner.act()).reward for _ in range(100))
        assert returns[0.0] < returns[0.3] < returns[1.0]


@pytest.mark.parametrize("domain", ["cheetah-run", "walker-walk", "quadruped-walk"])
def test_a_pose_and_a_spin_are_what_the_physics_says(domain):
    with make(f"dmc/{domain}") as environment:
        simulation, rng = blind(environment).simulation, np.random.default_rng(0)
        model = PlanningModel(simulation)
        environment.reset(1)
        for _ in range(10):
            environment.step(rng.uniform(-1, 1, environment.task.action_dim))
        mujoco.mj_setState(model.model, model.data, simulation.full_state(), FULL_STATE)
        mujoco.mj_forward(model.model, model.data)
        features = model.features(model.data.sensordata)
        low, high = simulation.physics.named.model.jnt_range[model.joints].T
        angles = simulation.physics.named.data.qpos[model.joints]
        np.testing.assert_allclose(features[POSE], (angles - low) / (high - low), atol=1e-6)
        torso, vertical = simulation.physics.model.name2id("torso", "body"), domain.startswith("quadruped")
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(
            model.model, model.data, mujoco.mjtObj.mjOBJ_XBODY, torso, velocity, 0
        )  # angular first, in the world's axes
        assert features["spin"] == pytest.approx(velocity[2 if vertical else 1], abs=1e-6)
        assert abs(features["spin"]) > 1e-3


def test_random_objectives_differ_and_are_repeatable():
    with make("dmc/walker-walk") as environment:
        simulation = blind(environment).simulation
        planner = Planner(simulation, 0.3, random_objective)
        places = []
        for seed in (0, 1, 0):
            environment.reset(0)
            planner.begin(np.random.default_rng(seed))
            for _ in range(40):
                environment.step(planner.act())
            places.append(simulation.physics.data.qpos.copy())
        np.testing.assert_array_equal(places[0], places[2])
        assert np.abs(places[0] - places[1]).max() > 0.1
