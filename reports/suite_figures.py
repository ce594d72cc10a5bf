"""The curves and intervals of a suite, drawn for a light and for a dark page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reports.figures import LIGHT, Palette, png
from reports.suite_record import SuiteRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, WIDTH, ROW_HEIGHT = 4, 2.9, 2.4  # plots in a row; inches
# Told apart by the colour-blind too (Okabe and Ito, 2008), light enough for a dark page.
COLOURS = {
    "scratch": "#818b98", "naive": "#e69f00", "rehearsal": "#009e73", "random-rehearsal": "#56b4e9", "gsa": "#0072d6",
    "prior": "#d55e00", "jsrl": "#cc79a7",
}  # fmt: skip


def curves(record: SuiteRecord, labels: Sequence[str], palette: Palette = LIGHT) -> bytes | None:
    """Score over frames, a plot for each task: the mean over seeds, shaded from the lowest to the highest of them. The
    prior, which learns nothing, is a line across. None without results."""
    if not record.results:
        return None
    figure, axes = _grid(len(record.tasks), palette)
    for one, task in zip(axes, record.tasks, strict=False):
        one.set_title(task, fontsize=8.5, color=palette.text, loc="left")
        for label in labels:
            _curve(one, record, label, task)
    handles = {str(line.get_label()): line for one in axes for line in one.get_lines()}
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper left", ncols=6, frameon=False, fontsize=8.5,
        labelcolor=palette.text,
    )  # fmt: skip
    return png(figure)


def intervals(rows: Mapping[str, Mapping[str, Any]], x: str, palette: Palette = LIGHT) -> bytes | None:
    """A line for each name: its value as a point, its 95 % interval as a bar. None without rows."""
    from matplotlib.figure import Figure

    if not rows:
        return None
    height = 0.7 + 0.3 * len(rows)
    figure = Figure(figsize=(8.6, height), dpi=150, facecolor=palette.background, layout="constrained")
    axes = figure.add_subplot(facecolor=palette.background)
    lines = list(rows.items())[::-1]
    for at, (name, row) in enumerate(lines):
        colour = colour_of(name)
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [at, at], color=colour, lw=6, alpha=0.45, solid_capstyle="butt")
        axes.plot([row["value"]], [at], "|", color=colour, markersize=13, mew=2.5)
    axes.set_yticks(list(range(len(lines))), [name for name, _ in lines], color=palette.text, fontsize=9)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(x, color=palette.faint)
    _plain(axes, palette)
    return png(figure)


def colour_of(label: str) -> str:
    return COLOURS.get(label.split()[0], "#818b98")


def _curve(axes: Axes, record: SuiteRecord, label: str, task: str) -> None:
    colour, runs = colour_of(label), record.of(label, task)
    frames, scores = record.curve(label, task)
    if not len(frames):
        if runs:  # nothing was learned, so there is nothing over time
            axes.axhline(float(np.mean([r.score for r in runs])), color=colour, lw=1.2, ls=(0, (4, 3)), label=label)
        return
    axes.plot(frames, scores.mean(0), color=colour, lw=1.6, label=label)
    axes.fill_between(frames, scores.min(0), scores.max(0), color=colour, alpha=0.15, lw=0)


def _grid(count: int, palette: Palette) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    size = (max(6.0, WIDTH * columns), ROW_HEIGHT * rows + 0.4)
    figure = Figure(figsize=size, dpi=120, facecolor=palette.background, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1, facecolor=palette.background) for i in range(count)]
    for one in axes:
        _plain(one, palette)
        one.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    return figure, axes


def _plain(axes: Axes, palette: Palette) -> None:
    axes.tick_params(axis="both", colors=palette.faint, labelsize=8, length=0)
    axes.grid(color=palette.grid, lw=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
