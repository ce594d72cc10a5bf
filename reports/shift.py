"""How far two sets of latent states are from each other: Wasserstein distances with intervals, and their picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gsa.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROJECTIONS = 256  # directions of the sliced distance
COLOURS = {
    "online": "#0969da", "expert": "#8250df", "retrieved": "#bc4c00", "random": "#818b98", "pool": "#1f883d",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sample:
    """States drawn from a set of trajectories."""

    states: np.ndarray  # [N, D] float32
    trajectory: np.ndarray  # [N] int64, which trajectory each is of

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Estimate:
    """The mean over repeats, and the interval that 95 % of them lie in."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        low, high = np.quantile(values, [0.025, 0.975])
        return cls(float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True)
class Distances:
    """How far one sample is from a reference."""

    reference: str
    sample: str  # the reference's own name: two halves of it, the least that can be told from noise
    exact: Estimate
    sliced: Estimate
    exact_ratio: Estimate  # over that of the whole pool in the same repeat; below 1 is nearer than the pool
    sliced_ratio: Estimate


def require_pot() -> ModuleType:
    """The optimal-transport library. UsageError where it is not installed."""
    try:
        import ot
    except ImportError:
        raise UsageError("Exact Wasserstein distances need POT: pip install 'gsa-rl[shift]'.") from None
    return ot


def exact_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """W1 between the uniform distributions on a [N, D] and b [M, D], by the network simplex; cost is the L2 norm."""
    ot = require_pot()
    cost = ot.dist(a.astype(np.float64), b.astype(np.float64), metric="euclidean")
    return float(ot.emd2([], [], cost, numItermax=10_000_000))


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """The mean of W1 over directions: a, b [N, P] are samples of one size projected on P directions."""
    return float(np.abs(np.sort(a, 0) - np.sort(b, 0)).mean())


def directions(dim: int, count: int, seed: int) -> np.ndarray:
    """Unit vectors drawn uniformly, as columns [dim, count] float32."""
    drawn = np.random.default_rng(seed).standard_normal((dim, count))
    return (drawn / np.linalg.norm(drawn, axis=0)).astype(np.float32)


def compare(
    name: str, reference: Sample, samples: Mapping[str, Sample], states: int, repeats: int, seed: int,
    tell: Callable[[], None] = lambda: None,
) -> list[Distances]:  # fmt: skip
    """The distances from the reference of its own other half, then of every sample.

    A repeat draws half of the trajectories of each without replacement, and of those at most `states` states, as many
    of each: distances of samples of unlike size cannot be compared. `tell` is called after each repeat.
    UsageError where one has fewer than two trajectories.
    """
    everything = {name: reference, **samples}
    for key, sample in everything.items():
        if len(np.unique(sample.trajectory)) < 2:
            raise UsageError(f"The {key} data has fewer than 2 trajectories: too few to tell a shift from chance.")
    along = directions(reference.states.shape[1], PROJECTIONS, seed)
    projected = {key: sample.states @ along for key, sample in everything.items()}
    exact: dict[str, list[float]] = {key: [] for key in everything}
    sliced: dict[str, list[float]] = {key: [] for key in everything}
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        ours, other = _halves(reference, rng)
        theirs = {name: other} | {key: _halves(sample, rng)[0] for key, sample in samples.items()}
        n = min(states, len(ours), *map(len, theirs.values()))
        ours = rng.choice(ours, n, replace=False)
        for key, half in theirs.items():
            drawn = rng.choice(half, n, replace=False)
            exact[key].append(exact_wasserstein(reference.states[ours], everything[key].states[drawn]))
            sliced[key].append(sliced_wasserstein(projected[name][ours], projected[key][drawn]))
        tell()
    against = "pool" if "pool" in samples else next(reversed(everything))
    return [
        Distances(
            name, key, Estimate.of(exact[key]), Estimate.of(sliced[key]),
            Estimate.of(np.divide(exact[key], exact[against])), Estimate.of(np.divide(sliced[key], sliced[against])),
        )
        for key in everything
    ]  # fmt: skip


def draw(found: Mapping[str, Sequence[Distances]], states: Mapping[str, Mapping[str, Sample]], title: str) -> bytes:
    """A PNG. Of each latent space a row: the distances from each reference with their intervals, and the states
    themselves along the first two principal components."""
    from matplotlib.figure import Figure

    columns = len({row.reference for rows in found.values() for row in rows}) + 1
    figure = Figure(figsize=(4.6 * columns, 3.6 * len(found)), dpi=130, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=11, color="#1f2328")
    grid = figure.subplots(len(found), columns, squeeze=False)
    for axes, (space, rows) in zip(grid, found.items(), strict=True):
        for i, reference in enumerate(dict.fromkeys(row.reference for row in rows)):
            _bars(axes[i], space, reference, [row for row in rows if row.reference == reference])
        _scatter(axes[-1], space, states[space])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _halves(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The states of a random half of the trajectories, and of the other half."""
    trajectories = rng.permutation(np.unique(sample.trajectory))
    first = np.isin(sample.trajectory, trajectories[: (len(trajectories) + 1) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


def _bars(axes: Axes, space: str, reference: str, rows: Sequence[Distances]) -> None:
    for i, row in enumerate(rows):
        whiskers = [[max(0.0, row.exact.mean - row.exact.low)], [max(0.0, row.exact.high - row.exact.mean)]]
        axes.barh(i, row.exact.mean, height=0.6, color=COLOURS.get(row.sample, "#57606a"), alpha=0.85)
        axes.errorbar(row.exact.mean, i, xerr=whiskers, color="#1f2328", capsize=4, lw=1.4)
        axes.text(row.exact.high, i, f"  {row.exact.mean:.3g}", va="center", fontsize=9, color="#1f2328")
    names = [f"{reference},\nother half" if row.sample == reference else row.sample for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(row.exact.high for row in rows))
    axes.set_title(f"W1 from {reference} data, {space}", fontsize=9.5)
    _tidy(axes)


def _scatter(axes: Axes, space: str, samples: Mapping[str, Sample]) -> None:
    every = np.concatenate([sample.states for sample in samples.values()]).astype(np.float64)
    mean = every.mean(0)
    few = every[:: max(1, len(every) // 2000)] - mean
    plane = np.linalg.svd(few, full_matrices=False)[2][:2]
    for name, sample in reversed(list(samples.items())):
        at = (sample.states[: 2000 : max(1, len(sample) // 500)] - mean) @ plane.T
        axes.scatter(at[:, 0], at[:, 1], s=7, alpha=0.55, lw=0, color=COLOURS.get(name, "#57606a"), label=name)
    axes.legend(fontsize=8, frameon=False, markerscale=2)
    axes.set_title(f"{space}: first two principal components", fontsize=9.5)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8.5, length=0, colors="#59636e")
    axes.grid(color="#e3e7ec", lw=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
