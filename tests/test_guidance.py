import numpy as np
import pytest
from scipy import stats

from actors.guidance import GuidanceConfig, episode_plan, find_guide
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


UNLIKELY = 1e-4  # a true schedule fails a test of many by chance less often than this


@pytest.mark.parametrize("repeat", [1, 2])
def test_schedules_over_frames_count_the_action_repeat(repeat):
    assert schedule_value("linear(1,0,100) frames", 25, repeat) == 1 - 0.25 * repeat
    assert schedule_value("piecewise(10:1,20:0.5) frames", 20 // repeat, repeat) == 0.5
    assert schedule_value("linear(1,0,100) steps", 25, repeat) == 0.75
    framed = episode_plan(
        GuidanceConfig("linear(1,0,100) frames", "prefix"), Lease(0, STEPS, 25, False), STEPS, Controller.PRIOR,
        np.random.default_rng(0), repeat,
    )  # fmt: skip
    assert (framed == Controller.PRIOR).sum() == STEPS - 25 * repeat


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("linear(1,0,1000)", 0, 1.0), ("linear(1,0,1000)", 700, 0.3), ("linear(1,0,1000)", 1000, 0.0),
        ("linear(1,0.1,1000)", 5000, 0.1), ("constant(0.5)", 10**6, 0.5), ("piecewise(0:0.2,100:0.8)", 50, 0.5),
        ("linear(1,0,1000) frames", 700, 0.3),
    ],
)  # fmt: skip
def test_the_share_of_guided_episodes_is_the_schedule_s_over_many_seeds(schedule, step, share):
    """Each episode from a seed of its own, as in a run; the count is held to the exact binomial distribution."""
    config, n = GuidanceConfig(schedule), 3000
    guided = sum(bool((_plan(config, seed, step) == Controller.PRIOR).any()) for seed in range(n))
    assert stats.binomtest(guided, n, share).pvalue > UNLIKELY


def _plan(config, seed, step, episode_steps=STEPS):
    """The plan of one episode of a run of that seed."""
    lease = Lease(seed % 7, episode_steps, step, False)
    rng = np.random.default_rng((seed, lease.episode))
    return episode_plan(config, lease, episode_steps, Controller.PRIOR, rng)


@pytest.mark.parametrize("episode_steps", [100, 250])
def test_a_guided_stretch_is_one_piece_with_uniform_length_and_start_over_many_seeds(episode_steps):
    plan = np.stack([_plan(GuidanceConfig("constant(1)"), seed, 0, episode_steps) for seed in range(20_000)])
    plan = plan == Controller.PRIOR
    edges = np.diff(np.pad(plan.astype(int), ((0, 0), (1, 1))), axis=1)
    assert ((edges == 1).sum(1) == 1).all()  # one piece in each
    lengths, starts = plan.sum(1), plan.argmax(1)
    tenth = episode_steps // 10
    counts = np.bincount(lengths, minlength=episode_steps + 1)[tenth::tenth]
    assert counts.sum() == len(plan)  # only 10 %, 20 % … 100 %
    assert stats.chisquare(counts).pvalue > UNLIKELY
    for length in range(tenth, episode_steps + 1, tenth):
        places = np.bincount(starts[lengths == length], minlength=episode_steps - length + 1)
        assert len(places) == episode_steps - length + 1  # it ends within the episode
        assert len(places) == 1 or stats.chisquare(places).pvalue > UNLIKELY


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


@pytest.mark.parametrize(
    ("name", "says"),
    [("no_colon", "module:function"), ("no.such.module:f", "cannot be imported"), ("tests.guides:no", "cannot be"),
     ("tests.guides:NOT_A_FUNCTION", "must be a function")],
)  # fmt: skip
def test_a_guide_that_is_none_is_refused_in_a_sentence(name, says):
    with pytest.raises(UsageError, match=says):
        find_guide(name)
