"""A store for a person to look at: what is in it, and trajectories from start to end, as a page or as one picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsa.errors import FormatError, UsageError
from gsa.schema import ArraySpec, Controller, Spec
from reports import figures
from reports.html import Themed, document, fact_line, picture, section, source_table, text
from reports.sheets import frame_strip
from retrieval.files import replace_file
from retrieval.store import TrajectoryStore

FRAMES = 12  # of a trajectory in its strip
STRIP_HEIGHT = 96  # pixels, at least: small images are enlarged by a whole factor
GAP = 3  # pixels between frames
MOST_LINES = 16  # dimensions of a vector that are drawn


def choose(store: TrajectoryStore, count: int, embodiment: str = "", source: str = "", seed: int = 0) -> list[int]:
    """`count` rows of each embodiment (or of that one) drawn at random, ascending. `source`: only of sources whose
    name contains it. UsageError where there are none."""
    rng, chosen = np.random.default_rng(seed), []
    for name in [embodiment] if embodiment else sorted(store.specs):
        rows = store.rows(name)
        if source:
            fits = np.array([source in known for known in store.catalog.sources], bool)
            rows = rows[fits[store.catalog.source_code[rows]]] if len(fits) else rows[:0]
        chosen += rng.permutation(rows)[:count].tolist()
    if not chosen:
        of = f" of a source with '{source}' in its name" if source else ""
        raise UsageError(f"The store {store.path} has no trajectories{of} to show.")
    return sorted(chosen)


def write_store_page(path: str | Path, store: TrajectoryStore, rows: Sequence[int]) -> Path:
    """Writes a page (.html) or a picture (.png) of the trajectories in `rows`; returns `path`.

    UsageError for another ending, or for rows that the store does not have. A trajectory that cannot be read is said
    to be damaged on the page.
    """
    path = Path(path)
    if wrong := [row for row in rows if not 0 <= row < len(store)]:
        raise UsageError(f"The store {store.path} has rows 0 to {len(store) - 1}, not {wrong[0]}.")
    if path.suffix == ".png":
        films = _films(store, rows)
        notes = {label: store.catalog.source(int(label.split()[0])) or "no source" for label in films}
        return frame_strip(path, films, f"{store.path}", FRAMES, notes)
    if path.suffix != ".html":
        raise UsageError(f"What is shown is written as .html or .png, not as {path.name}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(store_page(store, rows).encode())
    return path


def store_page(store: TrajectoryStore, rows: Sequence[int]) -> str:
    """The whole document."""
    info = store.info()
    size = sum(entry["bytes"] for entry in info.values()) / 1e6
    facts = [
        ("trajectories", f"{len(store.rows()):,}"), ("agent steps", f"{store.steps:,}"),
        ("frames", f"{store.frames:,}"), ("megabytes", f"{size:,.1f}"), ("codec", store.codec),
    ]  # fmt: skip
    notes = "".join(f"<li>{text(note)}</li>" for note in store.recovery)
    parts = [
        f"<h1>{text(store.path.resolve().name)}</h1>",
        f'<p class="sub">trajectory store {text(store.id)}</p>',
        fact_line(facts),
        section("What opening it found", f"<ul>{notes}</ul>" if notes else "", "notes"),
    ]
    for name, spec in store.specs.items():
        shown = [row for row in rows if store.spec(row).embodiment == name]
        parts.append(_embodiment(store, spec, info[name], shown))
    return document(f"{store.path.resolve().name} · trajectory store", parts)


def _embodiment(store: TrajectoryStore, spec: Spec, info: Mapping[str, Any], rows: Iterable[int]) -> str:
    known = store.rows(spec.embodiment)
    lengths = store.catalog.length[known]
    facts = [("trajectories", f"{info['trajectories']:,}"), ("frames", f"{info['frames']:,}")]
    if len(known):
        low, middle, high = np.percentile(lengths, (0, 50, 100))
        facts.append(
            ("steps an episode", f"{low:,.0f}" if low == high else f"{low:,.0f} … {middle:,.0f} … {high:,.0f}")
        )
        facts.append(("with reward", f"{store.catalog.has_reward[known].mean():.0%}"))
    facts += [(name, _describe(seen)) for name, seen in spec.observation.items()]
    facts += [("action", f"{spec.action_dim} float32"), ("action repeat", f"{spec.action_repeat}")]
    facts += [("control rate", f"{spec.control_hz:g} Hz")] if spec.control_hz else []
    facts += [("rendered by", spec.renderer)] if spec.renderer else []
    body = fact_line(facts) + source_table(_by_number(info["sources"]))
    return section(spec.embodiment, body + "".join(_trajectory(store, row) for row in rows))


def _by_number(sources: Mapping[str, int]) -> dict[str, int]:
    return {name or "no source": n for name, n in sorted(sources.items(), key=lambda pair: -pair[1])}


def _describe(spec: ArraySpec) -> str:
    size = "×".join(map(str, spec.shape))
    return f"image {size} {spec.dtype}" if spec.is_image else f"vector {size} {spec.dtype}"


def _trajectory(store: TrajectoryStore, row: int) -> str:
    """Its images as strips, its vectors and its actions as lines."""
    try:
        columns = store.columns(row)
    except FormatError as error:
        return f'<p class="faint">{text(error)}</p>'
    observation = store.spec(row).observation
    shown: dict[str, Themed] = {
        name: (_strip(columns[name]), None) for name, spec in observation.items() if spec.is_image
    }
    vectors = [name for name in observation if name not in shown] + ([] if shown else ["action"])
    shown |= {name: _lines(name, columns[name]) for name in vectors}
    pictures = "".join(picture(each, name) for name, each in shown.items())
    id = f'<span class="faint">{text(store.catalog.id(row))}</span>'
    return f"<h3>{text(_caption(store, row, columns))} {id}</h3>{pictures}"


def _caption(store: TrajectoryStore, row: int, columns: Mapping[str, np.ndarray]) -> str:
    steps = int(store.catalog.length[row])
    parts = [f"row {row}", store.catalog.source(row) or "no source", f"{steps:,} steps"]
    if "reward" in columns:
        parts.append(f"return {columns['reward'].sum():,.1f}")
    if "controller" in columns:
        counts = np.bincount(columns["controller"], minlength=1)
        who = {c.value: c.name.lower() for c in Controller}
        parts += [f"{n / steps:.0%} {who.get(c, c)}" for c, n in enumerate(counts.tolist()) if n]
    if columns["discount"][-1] == 0:
        parts.append("ends")
    return " · ".join(parts)


def _films(store: TrajectoryStore, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Label → images, of each image observation of each row. UsageError where there are none."""
    films = {}
    for row in rows:
        images = [k for k, spec in store.spec(row).observation.items() if spec.is_image]
        for name in images:
            label = f"{row} {name}" if len(images) > 1 else f"{row}"
            films[label] = _rgb(store.columns(row)[name])
    if not films:
        raise UsageError("There are no images among these trajectories; write an .html page, which draws vectors too.")
    return films


def _picked(frames: np.ndarray) -> np.ndarray:
    """At most FRAMES of them, evenly spaced, the first and the last among them."""
    picks = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    return frames[np.unique(picks)]


def _rgb(frames: np.ndarray) -> np.ndarray:
    """The first three channels, or the first one as grey."""
    return frames[..., :3] if frames.shape[-1] >= 3 else np.repeat(frames[..., :1], 3, axis=-1)


def _strip(frames: np.ndarray) -> bytes:
    """Frames [N, H, W, C] side by side as a PNG."""
    from PIL import Image

    shown = _rgb(_picked(frames))
    factor = max(1, -(-STRIP_HEIGHT // shown.shape[1]))
    shown = shown.repeat(factor, axis=1).repeat(factor, axis=2)
    shown = np.pad(shown, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(shown), axis=1)[:, :-GAP]).save(buffer, "PNG")
    return buffer.getvalue()


def _lines(name: str, values: np.ndarray) -> Themed:
    """The dimensions of a vector [N, …] over agent steps."""
    flat = values.reshape(len(values), -1)
    shown = flat[:, :MOST_LINES]
    label = name if shown.shape[1] == flat.shape[1] else f"{name}, first {MOST_LINES} of {flat.shape[1]}"
    return figures.lines(shown, "agent step", label), figures.lines(shown, "agent step", label, figures.DARK)
