"""Pictures of what retrieval found, for a person to judge: the query, the nearest and the farthest taken."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from retrieval.retriever import RehearsalSet
    from retrieval.store import TrajectoryStore

THUMB_INCHES = 1.3
CAPTION_INCHES = 0.55
TITLE_INCHES = 0.092  # of a letter, about


def contact_sheet(
    path: str | Path,
    query: Mapping[str, np.ndarray],
    store: TrajectoryStore,
    rehearsal: RehearsalSet,
    columns: int = 8,
) -> Path:
    """Draws the first observations of the task and of the trajectories taken for it; returns `path`, a PNG.

    `query`: observations {name: [Q, …]}; `rehearsal.rows` are rows of `store`, nearest first. With at most 2·columns
    trajectories all are shown, in order; with more, the first and the last `columns`. Several cameras are drawn side
    by side; where there is none, the observation's numbers are drawn as bars.
    """
    taken = len(rehearsal.rows)
    near, far = _ends(taken, columns)
    random = rehearsal.kind == "random"
    count = len(next(iter(query.values())))
    queries = [picture({name: values[i] for name, values in query.items()}) for i in range(min(count, columns))]
    rows = [("query" if count == 1 else f"{count} queries", [(frame, "") for frame in queries])]
    for name, ranks in (("drawn first" if random else "nearest", near), ("drawn last" if random else "farthest", far)):
        if ranks:
            rows.append((name, [(_first_frame(store, rehearsal.rows[i]), _caption(rehearsal, i)) for i in ranks]))
    return _save(path, _grid(rows, columns, _title(rehearsal)))


def picture(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """One observation {name: […]} as an image [H, W, 3] uint8: its images side by side, else its numbers as bars."""
    images = [np.asarray(value) for value in observation.values() if value.ndim == 3]
    if not images:
        return _bars(np.concatenate([np.ravel(value) for value in observation.values()]))
    height = max(len(image) for image in images)
    tiles = []
    for image in images:
        colours = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, -1)
        tiles.append(np.pad(colours, ((0, height - len(image)), (0, 0), (0, 0)), constant_values=255))
    return np.concatenate(tiles, 1)


def _bars(values: np.ndarray) -> np.ndarray:
    """Numbers as bars from the middle line, squashed so that any fits."""
    values, half = values[:64].astype(np.float64), 32
    heights = np.round(np.arctan(values) / (np.pi / 2) * (half - 1)).astype(int)
    image = np.full((2 * half, max(1, 64 // len(values)) * len(values), 3), 255, np.uint8)
    for i, part in enumerate(np.split(image, len(values), 1)):
        part[half - max(heights[i], 0) : half - min(heights[i], 0) + 1, : max(1, part.shape[1] - 1)] = (9, 105, 218)
    return image


def frame_strip(
    path: str | Path, rows: Mapping[str, np.ndarray], title: str = "", columns: int = 12,
    notes: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Draws films {label: [N, H, W, 3] uint8} as rows of at most `columns` evenly spaced frames, below each its `notes`
    {label: a line}; returns `path`."""
    grid = []
    for label, film in rows.items():
        picks = np.unique(np.linspace(0, len(film) - 1, min(columns, len(film))).round().astype(int))
        captions = [f"{i}" for i in picks]
        captions[0] += f"\n{notes[label]}" if notes else ""
        grid.append((label, [(film[i], caption) for i, caption in zip(picks, captions, strict=True)]))
    captions_inches = 0.32 if notes else 0.2
    return _save(path, _grid(grid, max(len(cells) for _, cells in grid), title, captions_inches))


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
    if rehearsal.recall is not None:
        how += f" ({rehearsal.search}, recall {rehearsal.recall:.0%})"
    right = rehearsal.precision[-1].task if rehearsal.precision else None
    of_task = "" if right is None else f"; {right:.0%} of the task itself (chance {rehearsal.task_share:.0%})"
    return f"{rehearsal.embodiment}: {taken} trajectories{fewer}, {how}{of_task}"


def _caption(rehearsal: RehearsalSet, rank: int) -> str:
    source = rehearsal.sources[rank] or "unknown source"
    distances = rehearsal.distances
    distance = f"  d={distances[rank]:.3g}" if len(distances) > rank and np.isfinite(distances[rank]) else ""
    # The last parts of a source tell more than its first: keep them when it does not fit.
    lines = textwrap.wrap(source.replace("/", "/ "), 22, break_on_hyphens=False)
    return "\n".join([f"#{rank + 1}{distance}", *(line.replace("/ ", "/") for line in lines[-2:])])


def _first_frame(store: TrajectoryStore, row: int) -> np.ndarray:
    first = store.slice(int(row), 0, 1)
    return picture({name: first[name][0] for name in store.spec(int(row)).observation})


Cells = Sequence[tuple[np.ndarray, str]]  # frame, caption


def _grid(
    rows: Sequence[tuple[str, Cells]], columns: int, title: str, caption_inches: float = CAPTION_INCHES
) -> Figure:
    from matplotlib.figure import Figure

    width = columns * THUMB_INCHES + 0.9
    lines = textwrap.wrap(title, max(1, int((width - 0.2) / TITLE_INCHES)))
    head = 0.27 + 0.18 * max(1, len(lines))
    height = len(rows) * (THUMB_INCHES + caption_inches) + head
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    style: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": "#1f2328", "va": "top"}
    figure.text(0.1 / width, 1 - 0.14 / height, "\n".join(lines), **style)
    for i, (name, cells) in enumerate(rows):
        top = height - head - i * (THUMB_INCHES + caption_inches)
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
