import numpy as np
import pytest

from actors.guidance import GuidanceConfig, episode_plan
from gsa.errors import UsageError
from gsa.schedule import schedule_value
from gsa.schema import Controller, Lease

STEPS = 100


def plans(config, n=4000, guide=Controller.PRIOR, **lease):
    rng = np.random.default_rng(0)
    lease = {"episode": 0, "max_steps": STEPS, "agent_steps": 0, "warmup": False, **lease}
    return np.stack([episode_plan(config, Lease(**lease), STEPS, guide, rng) for _ in range(n)])


def test_schedules_are_linear_between_their_points_and_constant_outside():
    assert [schedule_value("linear(1,0,100)", s) for s in (0, 25, 100, 1000)] == [1, 0.75, 0, 0]
    assert schedule_value("constant(0.3)", 10**9) == 0.3
    assert [schedule_value("piecewise(10:1,20:0.5,40:0)", s) for s in (0, 15, 30, 99)] == [1, 0.75, 0.25, 0]


@pytest.mark.parametrize("text", ["linear(1,0)", "linear(2,0,10)", "cosine(1)", "piecewise(5:1,5:0)", "constant(x)"])
def test_a_schedule_that_is_none_says_what_one_looks_like(text):
    with pytest.raises(UsageError, match="schedule"):
        GuidanceConfig(schedule=text)


def test_the_share_of_guided_episodes_follows_the_schedule():
    guided = (plans(GuidanceConfig("linear(1,0,1000)"), agent_steps=700) == Controller.PRIOR).any(1)
    assert abs(guided.mean() - 0.3) < 0.03


def test_a_guided_stretch_is_one_piece_with_uniform_length_and_start():
    plan = plans(GuidanceConfig("constant(1)"), n=20_000) == Controller.PRIOR
    lengths = plan.sum(1)
    assert (np.diff(plan.astype(int), axis=1) == 1).sum(1).max() <= 1  # one piece
    counts = np.bincount(lengths, minlength=STEPS + 1)[10::10]
    assert counts.sum() == len(plan)  # only 10 %, 20 % … 100 %
    expected = len(plan) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    starts = plan[lengths == 50].argmax(1)
    observed = np.bincount(starts, minlength=51)
    expected = len(starts) / 51
    assert ((observed - expected) ** 2 / expected).sum() < 86.7  # 50 degrees, p = 0.001


def test_warm_up_is_the_prior_alone_or_random_without_one():
    assert (plans(GuidanceConfig(), n=3, warmup=True) == Controller.PRIOR).all()
    assert (plans(GuidanceConfig(), n=3, warmup=True, guide=None) == Controller.RANDOM).all()


def test_without_a_prior_the_policy_acts_alone():
    assert (plans(GuidanceConfig("constant(1)"), n=10, guide=None) == Controller.POLICY).all()


def test_jsrl_gives_the_prior_the_beginning():
    plan = plans(GuidanceConfig("linear(1,0,100)", placement="prefix"), n=2, agent_steps=40)
    assert (plan[:, :60] == Controller.PRIOR).all()
    assert (plan[:, 60:] == Controller.POLICY).all()


def test_a_shortened_episode_keeps_the_plan_of_a_whole_one():
    lease = Lease(3, STEPS, 0, False)
    short = Lease(3, 30, 0, False)
    config = GuidanceConfig("constant(1)")
    whole = episode_plan(config, lease, STEPS, Controller.PRIOR, np.random.default_rng(5))
    assert (episode_plan(config, short, STEPS, Controller.PRIOR, np.random.default_rng(5)) == whole[:30]).all()
