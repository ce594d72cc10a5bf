"""Pictures of what retrieval found, for a person to judge: the query, the nearest and the farthest taken."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from retrieval.retriever import RehearsalSet
    from retrieval.store import TrajectoryStore

THUMB_INCHES = 1.3
CAPTION_INCHES = 0.55


def contact_sheet(
    path: str | Path,
    query: np.ndarray,
    store: TrajectoryStore,
    rehearsal: RehearsalSet,
    columns: int = 8,
) -> Path:
    """Draws the first frames of the query and of the trajectories taken for it; returns `path`, a PNG.

    `query` [64, 64, 3] or [Q, 64, 64, 3] uint8; `rehearsal.rows` are rows of `store`, nearest first. With at most
    2·columns trajectories all are shown, in order; with more, the first and the last `columns`.
    """
    queries = np.asarray(query).reshape(-1, *np.shape(query)[-3:])
    taken = len(rehearsal.rows)
    near, far = _ends(taken, columns)
    random = rehearsal.kind == "random"
    rows = [("query" if len(queries) == 1 else "queries", [(frame, "") for frame in queries[:columns]])]
    for name, ranks in (("drawn first" if random else "nearest", near), ("drawn last" if random else "farthest", far)):
        if ranks:
            rows.append((name, [(_first_frame(store, rehearsal.rows[i]), _caption(rehearsal, i)) for i in ranks]))
    return _save(path, _grid(rows, columns, _title(rehearsal)))


def frame_strip(path: str | Path, rows: Mapping[str, np.ndarray], title: str = "", columns: int = 12) -> Path:
    """Draws films {label: [N, H, W, 3] uint8} as rows of at most `columns` evenly spaced frames; returns `path`."""
    grid = []
    for label, film in rows.items():
        picks = np.unique(np.linspace(0, len(film) - 1, min(columns, len(film))).round().astype(int))
        grid.append((label, [(film[i], f"{i}") for i in picks]))
    return _save(path, _grid(grid, max(len(cells) for _, cells in grid), title, caption_inches=0.2))


def _ends(taken: int, columns: int) -> tuple[Sequence[int], Sequence[int]]:
    """Ranks of the first and of the last row of the sheet; no trajectory is shown twice."""
    if taken <= columns:
        return range(taken), range(0)
    return range(columns), range(max(columns, taken - columns), taken)


def _title(rehearsal: RehearsalSet) -> str:
    taken = len(rehearsal.rows)
    how = "drawn at random" if rehearsal.kind == "random" else "nearest by distance between encoder features"
    if not taken:
        return f"{rehearsal.embodiment}: nothing in the pool fits"
    fewer = f" (only {taken} of the {rehearsal.k} asked for)" if taken < rehearsal.k else ""
    return f"{rehearsal.embodiment}: {taken} trajectories{fewer}, {how}"


def _caption(rehearsal: RehearsalSet, rank: int) -> str:
    source = rehearsal.sources[rank] or "unknown source"
    distances = rehearsal.distances
    distance = f"  d={distances[rank]:.3g}" if len(distances) > rank and np.isfinite(distances[rank]) else ""
    # The last parts of a source tell more than its first: keep them when it does not fit.
    lines = textwrap.wrap(source.replace("/", "/ "), 22, break_on_hyphens=False)
    return "\n".join([f"#{rank + 1}{distance}", *(line.replace("/ ", "/") for line in lines[-2:])])


def _first_frame(store: TrajectoryStore, row: int) -> np.ndarray:
    return np.asarray(store.slice(int(row), 0, 1)["pixels"][0])


Cells = Sequence[tuple[np.ndarray, str]]  # frame, caption


def _grid(
    rows: Sequence[tuple[str, Cells]], columns: int, title: str, caption_inches: float = CAPTION_INCHES
) -> Figure:
    from matplotlib.figure import Figure

    width, height = columns * THUMB_INCHES + 0.9, len(rows) * (THUMB_INCHES + caption_inches) + 0.45
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    figure.text(0.1 / width, 1 - 0.28 / height, title, fontsize=10, fontweight="bold", color="#1f2328")
    for i, (name, cells) in enumerate(rows):
        top = height - 0.45 - i * (THUMB_INCHES + caption_inches)
        figure.text(0.1 / width, (top - THUMB_INCHES / 2) / height, name, fontsize=9, va="center", color="#57606a")
        for j, (frame, caption) in enumerate(cells):
            left = 0.85 + j * THUMB_INCHES
            box = (left / width, (top - THUMB_INCHES) / height, (THUMB_INCHES - 0.08) / width, THUMB_INCHES / height)
            _thumb(figure.add_axes(box), frame, caption)
    return figure


def _thumb(axes: Axes, frame: np.ndarray, caption: str) -> None:
    axes.imshow(frame, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d7de")
    if caption:
        axes.text(
            0, -0.04, caption, transform=axes.transAxes, fontsize=6.5, va="top", color="#1f2328", linespacing=1.15
        )


def _save(path: str | Path, figure: Figure) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path
