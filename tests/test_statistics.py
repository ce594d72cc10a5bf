"""Aggregates and intervals against plain loops, against known cases, and against what rliable 1.2.0 printed."""

import itertools
import math

import numpy as np
import pytest

from gsa.errors import UsageError
from reports import statistics as st

# Two methods, four tasks, five and three runs; a tie in the first task.
X = {
    "a": [0.426, 0.417, 0.159, 0.128, 0.698], "b": [0.393, 0.248, 0.455, 0.51, 0.171],
    "c": [0.438, 0.849, 0.874, 0.521, 0.764], "d": [0.708, 0.846, 0.497, 0.491, 0.972],
}  # fmt: skip
Y = {
    "a": [0.426, 0.075, 0.222], "b": [0.286, 0.817, 0.521],
    "c": [0.507, 0.621, 0.241], "d": [0.667, 0.709, 0.662],
}  # fmt: skip


def test_aggregates_are_those_of_rliable():
    assert st.value(st.mean, X) == pytest.approx(0.52825)
    assert st.value(st.iqm, X) == pytest.approx(0.5161)
    assert st.value(st.iqm, Y) == pytest.approx(0.5038333333333332)
    assert st.value(st.probability_of_improvement, X, Y) == pytest.approx(0.5416666666666666)


@pytest.mark.parametrize(
    ("statistic", "groups", "rliable"),
    [
        (st.mean, (X,), (0.45039875, 0.6061)),
        (st.iqm, (X,), (0.4348, 0.6203)),
        (st.probability_of_improvement, (X, Y), (0.35, 0.7333333333333334)),
    ],
)
def test_intervals_are_those_of_rliable(statistic, groups, rliable):
    """rliable's by 20,000 draws; both are random in the third decimal."""
    assert st.interval(statistic, *groups, draws=20_000) == pytest.approx(rliable, abs=0.006)


@pytest.mark.parametrize("seed", range(20))
def test_aggregates_against_loops(seed):
    rng = np.random.default_rng(seed)
    tasks = [f"t{i}" for i in range(rng.integers(1, 6))]
    x, y = ({t: rng.integers(0, 8, rng.integers(1, 7)) / 7 for t in tasks} for _ in range(2))
    flat = sorted(itertools.chain.from_iterable(v.tolist() for v in x.values()))
    cut = len(flat) // 4
    middle = flat[cut : len(flat) - cut]
    wins = [np.mean([float(a > b) or 0.5 * (a == b) for a in x[t] for b in y[t]]) for t in tasks]
    assert st.value(st.mean, x) == pytest.approx(sum(sum(v) / len(v) for v in x.values()) / len(tasks))
    assert st.value(st.iqm, x) == pytest.approx(sum(middle) / len(middle))
    assert st.value(st.probability_of_improvement, x, y) == pytest.approx(sum(wins) / len(tasks))
    assert st.value(st.probability_of_improvement, y, x) == pytest.approx(1 - sum(wins) / len(tasks))


def test_the_bootstrap_is_that_of_every_possible_drawing():
    """Two tasks of two and three runs: all 2² · 3³ drawings, equally likely, give the exact percentiles."""
    x = {"a": [0.0, 1.0], "b": [0.2, 0.6, 0.9]}
    exact = [
        (np.mean(a) + np.mean(b)) / 2
        for a in itertools.product(x["a"], repeat=2)
        for b in itertools.product(x["b"], repeat=3)
    ]
    expected = np.quantile(exact, [0.1, 0.9])  # between steps of 0.012
    assert st.interval(st.mean, x, level=0.8, draws=40_000) == pytest.approx(tuple(expected), abs=0.015)
    assert st.interval(st.mean, x, seed=3) == st.interval(st.mean, x, seed=3)


def test_runs_are_drawn_within_their_task():
    """Tasks far apart, runs alike: the interval is a point, which drawing over all runs would make wide."""
    assert st.interval(st.mean, {"a": [0.0] * 4, "b": [1.0] * 4}) == (0.5, 0.5)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        low, high = st.interval(st.mean, dict(enumerate(rng.normal(size=(6, 8)))), seed=trial, draws=400)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_single_run_has_no_interval():
    assert all(map(math.isnan, st.interval(st.mean, {"a": [1.0, 2.0], "b": [1.0]})))


def test_relative_gain():
    assert st.value(st.relative_gain, {"a": [2.0], "b": [4.0]}, {"a": [1.0], "b": [2.0]}) == pytest.approx(1.0)
    assert math.isnan(st.value(st.relative_gain, {"a": [2.0]}, {"a": [0.0]}))
    low, high = st.interval(st.relative_gain, {"a": [2.0, 2.2]}, {"a": [1.0, 1.1]})
    assert 2 / 1.1 - 1 <= low < high <= 1.2 + 1e-9


def test_methods_are_compared_on_the_tasks_of_both():
    assert st.value(st.relative_gain, {"a": [2.0], "b": [9.0]}, {"a": [1.0]}) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="no task in common"):
        st.value(st.relative_gain, {"a": [2.0]}, {"b": [1.0]})
    with pytest.raises(UsageError, match="nothing to compare"):
        st.value(st.mean, {"a": []})


def test_normalisation_is_linear_and_not_clipped():
    assert st.normalised([10, 20, 40, 0], 10, 30).tolist() == [0, 0.5, 1.5, -0.5]
    with pytest.raises(UsageError, match="normalised"):
        st.normalised(1, 2, 2)


def test_frames_to_reach_a_score():
    frames, scores = [1000, 2000, 3000, 4000], [0, 10, 5, 30]
    assert st.frames_to_reach(frames, scores, 5) == 1500
    assert st.frames_to_reach(frames, scores, 10) == 2000
    assert st.frames_to_reach(frames, scores, 20) == pytest.approx(3600)
    assert st.frames_to_reach(frames, scores, 31) is None
    assert st.frames_to_reach(frames, scores, -1) == 1000


def test_a_curve_on_other_frames_does_not_go_beyond_its_ends():
    curve = st.curve_on([0, 1000, 1500, 2001], [1000, 2000], [0, 10])
    assert math.isnan(curve[0]) and math.isnan(curve[3])
    assert curve[1:3].tolist() == [0, 5]
    assert np.isnan(st.curve_on([1, 2], [], [])).all()
