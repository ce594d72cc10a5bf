"""The curves of a run, drawn for a light and for a dark page."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reports.record import POLICIES, RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """Colours of a figure and of the policies in it."""

    background: str
    text: str
    faint: str
    grid: str
    random: str
    prior: str
    finetuned: str

    def policy(self, name: str) -> str:
        return {"random": self.random, "prior": self.prior, "finetuned": self.finetuned}.get(name, self.faint)


LIGHT = Palette("#ffffff", "#1f2328", "#59636e", "#e3e7ec", "#818b98", "#bc4c00", "#0969da")
DARK = Palette("#151a21", "#e6edf3", "#9198a1", "#2b323b", "#9198a1", "#f0883e", "#58a6ff")


def learning_curve(record: RunRecord, palette: Palette = LIGHT) -> bytes | None:
    """Score over frames as a PNG: evaluations with their intervals, single episodes, the policies compared with.

    Evaluations are the rows with eval/score (interval: eval/score_low, eval/score_high); None without any score.
    """
    evaluations, episodes = record.series("eval/score"), record.series("episode/score")
    if not len(evaluations) and not len(episodes):
        return None
    y = "score (0–100)" if record.score_ends_at_100 else "score (return)"
    figure, axes = _axes(palette, "environment frames", y, height=3.4)
    if len(episodes):
        label = f"collected episodes ({len(episodes)}, guided ones too)"
        axes.plot(
            episodes.frames, episodes.values, ".", color=palette.faint, alpha=0.7, markersize=6, mew=0, label=label
        )
    for name in ("random", "prior"):
        _reference(axes, record, name, palette)
    if len(evaluations):
        _evaluations(axes, record, evaluations, palette)
    _final(axes, record, palette)
    if record.score_ends_at_100:
        shown = [*evaluations.values, *episodes.values, *(p.score for p in record.policies)]
        axes.set_ylim(min(0.0, *shown) - 2, min(104.0, max(10.0, max(shown) * 1.25)))
    _legend(axes, palette)
    return png(figure)


def guided_share(record: RunRecord, palette: Palette = LIGHT) -> bytes | None:
    """Share of each episode's steps that the prior took, over frames, as a PNG; None without episodes."""
    share = record.series("episode/guided_share")
    if not len(share):
        return None
    figure, axes = _axes(palette, "environment frames", "prior's share", height=2.2)
    axes.plot(share.frames, share.values, ".", color=palette.prior, alpha=0.5, markersize=6, mew=0, label="episode")
    mean, window = _running_mean(share)
    axes.plot(mean.frames, mean.values, color=palette.prior, lw=1.8, label=f"mean of {window} episodes")
    axes.set_ylim(-0.05, 1.05)
    _legend(axes, palette)
    return png(figure)


def lines(values: np.ndarray, x: str, y: str, palette: Palette = LIGHT) -> bytes:
    """The columns of `values` [N, D] over their rows, as a PNG."""
    figure, axes = _axes(palette, x, y, height=1.9)
    axes.plot(values, lw=1)
    return png(figure)


def _running_mean(series: Series) -> tuple[Series, int]:
    """The mean over a centred window of about a tenth of the series, and the window's length."""
    order = np.argsort(series.frames, kind="stable")
    window = min(len(series), max(3, len(series) // 10))
    kernel = np.ones(window) / window
    smooth = [np.convolve(x[order], kernel, mode="valid") for x in (series.frames, series.values)]
    return Series(*smooth), window


def _reference(axes: Axes, record: RunRecord, name: str, palette: Palette) -> None:
    """A policy that does not learn: a level line with its interval."""
    if result := record.policy(name):
        axes.axhline(result.score, color=palette.policy(name), lw=1.4, ls=(0, (5, 3)), label=POLICIES[name])
        if np.isfinite(result.interval).all():
            axes.axhspan(*result.interval, color=palette.policy(name), alpha=0.13, lw=0)


def _evaluations(axes: Axes, record: RunRecord, points: Series, palette: Palette) -> None:
    color = palette.finetuned
    axes.plot(points.frames, points.values, "o-", color=color, markersize=4, lw=1.8, label="evaluations in the run")
    low, high = record.series("eval/score_low"), record.series("eval/score_high")
    if len(low) == len(high) == len(points):
        axes.fill_between(points.frames, low.values, high.values, color=color, alpha=0.18, lw=0)


def _final(axes: Axes, record: RunRecord, palette: Palette) -> None:
    """The final evaluation at the end of the curve."""
    if result := record.policy("finetuned"):
        low, high = np.nan_to_num(result.interval, nan=result.score)
        whiskers = np.maximum([[result.score - low], [high - result.score]], 0)
        axes.errorbar(
            [record.frames], [result.score], yerr=whiskers, fmt="D", color=palette.finetuned, markersize=6, capsize=4,
            elinewidth=1.6, label=f"final evaluation, {result.episodes} episodes", zorder=5,
        )  # fmt: skip


def _axes(palette: Palette, x: str, y: str, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, height), dpi=150, facecolor=palette.background, layout="constrained")
    axes = figure.add_subplot(facecolor=palette.background)
    axes.set_xlabel(x, color=palette.faint)
    axes.set_ylabel(y, color=palette.faint)
    axes.tick_params(colors=palette.faint, labelsize=9, length=0)
    axes.grid(color=palette.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _legend(axes: Axes, palette: Palette) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8.5, labelcolor=palette.text)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
