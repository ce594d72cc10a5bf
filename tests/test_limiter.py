"""The rate limiter: neither side waits for ever, and the ratio comes out exactly."""

import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gsa.errors import UsageError
from replay_service.limiter import RateLimiter


@st.composite
def runs(draw):
    """A run's numbers: budget, longest insert, sample, samples per insert, min_size, slack."""
    ratio = draw(st.sampled_from([0.1, 0.25, 1.0, 1 / 3, 4.0, 7.3, 256.0]))
    insert, sample = draw(st.integers(1, 50)), draw(st.integers(1, 200)) * math.ceil(ratio)
    budget = draw(st.integers(1, 400))
    min_size = draw(st.integers(1, budget))
    slack = RateLimiter.least_slack(insert, sample, ratio) * draw(st.sampled_from([1.0, 1.0, 1.5, 20.0]))
    return budget, insert, sample, ratio, min_size, slack


@settings(max_examples=300, deadline=None)
@given(runs(), st.integers(0, 2**32), st.integers(1, 5))
@example((1, 1, 200, 0.1, 1, 200.0), 0, 1)
def test_never_a_deadlock_and_the_ratio_is_exact(run, seed, workers):
    """Any interleaving of workers that begin, finish early or late, or vanish, and of a learner."""
    budget, longest, sample, ratio, min_size, slack = run
    limiter, rng = RateLimiter(min_size, ratio, slack), random.Random(seed)
    due = limiter.samples_due(budget, sample)
    open_inserts: list[int] = []
    while True:
        pending = sum(open_inserts)
        n = min(longest, budget - limiter.inserted - pending)
        can = {
            "begin": len(open_inserts) < workers and n > 0 and limiter.can_insert(n, pending),
            "end": bool(open_inserts),
            "sample": limiter.sampled < due and limiter.can_sample(sample),
        }
        possible = [name for name, yes in can.items() if yes]
        if not possible:
            break
        choice = rng.choice(possible)
        if choice == "begin":
            open_inserts.append(n)
        elif choice == "end":
            promised = open_inserts.pop(rng.randrange(len(open_inserts)))
            limiter.insert(rng.choice([0, rng.randint(0, promised), promised]))
        else:
            limiter.sample(sample)
        debt = (limiter.inserted - min_size) * ratio - limiter.sampled
        assert limiter.inserted + sum(open_inserts) <= budget
        # Inserts begun before min_size was reached may, together, cross it.
        assert limiter.inserted < min_size or -slack - 1e-6 <= debt
        assert debt <= max(slack, workers * longest * ratio) + 1e-6
        assert limiter.sampled == 0 or limiter.inserted >= min_size
    assert limiter.inserted == budget, "collection waits for a learner that waits for it"
    assert limiter.sampled == due == math.floor((budget - min_size) * ratio / sample) * sample


def test_less_slack_does_deadlock():
    """The bound is tight: with less, some sizes stop both sides."""
    stuck = 0
    for sampled in range(2000):
        limiter = RateLimiter(10, 4.0, RateLimiter.least_slack(25, 100, 4.0) - 1, inserted=200, sampled=sampled)
        stuck += not limiter.can_insert(25) and not limiter.can_sample(100)
        enough = RateLimiter(10, 4.0, RateLimiter.least_slack(25, 100, 4.0), inserted=200, sampled=sampled)
        assert enough.can_insert(25) or enough.can_sample(100)
    assert stuck


def test_who_waits():
    limiter = RateLimiter(min_size=100, samples_per_insert=4, slack=100)
    assert not limiter.can_sample(1)  # nothing there yet
    limiter.insert(100)
    assert limiter.can_sample(100)
    assert not limiter.can_sample(101)
    assert limiter.can_insert(25)
    assert not limiter.can_insert(26)
    assert not limiter.can_insert(25, pending=1)  # what is on its way counts
    limiter.sample(100)
    assert limiter.can_insert(50)
    assert not limiter.can_sample(1)
    assert limiter.can_insert(10_000) is False


def test_all_may_be_collected_that_the_first_sample_needs():
    limiter = RateLimiter(min_size=1000, samples_per_insert=256, slack=1024)
    assert limiter.can_insert(500)
    assert limiter.can_insert(500, pending=999)
    assert not limiter.can_insert(500, pending=1000)


@pytest.mark.parametrize(
    "numbers", [(0, 1, 1), (1, 0, 1), (1, -1, 1), (1, 1, -1), (1, math.inf, 1), (1, math.nan, 1), (1, 1, math.inf)]
)
def test_refuses_numbers_without_sense(numbers):
    with pytest.raises(UsageError, match="rate limiter"):
        RateLimiter(*numbers)
