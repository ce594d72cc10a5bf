"""Open-loop predictions as pictures and a film: what a world model foresees beside what came, for people to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gsa.agent.rssm import State
from gsa.agent.world_model import TensorBatch, WorldModel
from gsa.schema import SequenceRef
from gsa.video import side_by_side, write_mp4
from learner.compute import generator_for
from replay_service.batches import cut
from retrieval.store import TrajectoryStore

COLUMNS = 16  # frames shown of a sequence, evenly spaced
EMBODIMENTS = 8  # shown at most
FPS = 10
PREDICTED = (255, 0, 0)  # the colour that says so


@torch.no_grad()
def open_loop(
    world_model: WorldModel, batch: TensorBatch, context: int, generator: torch.Generator
) -> dict[str, np.ndarray]:
    """name → [B, T, …], as WorldModel.decode: reconstructions of the first `context` steps, from there on predictions.

    The predictions see the actions and nothing else.
    """
    with world_model.autocast():
        features = world_model.encode({k: v[:, :context] for k, v in batch.observation.items()})
        actions, later = batch.previous_action[:, :context], batch.previous_action[:, context:]
        seen = world_model.observe(features, actions, batch.is_first[:, :context], generator).state
        foreseen = world_model.imagine(State(seen.deter[:, -1], seen.stoch[:, -1]), later, generator)
        whole = State(*(torch.cat(halves, 1) for halves in zip(seen, foreseen, strict=True)))
        return {name: value.cpu().numpy() for name, value in world_model.decode(whole).items()}


def strip_refs(store: TrajectoryStore, length: int) -> list[SequenceRef]:
    """One sequence of each embodiment: `length` rows in the middle of its longest trajectory, always the same."""
    refs = []
    for embodiment in sorted(store.specs)[:EMBODIMENTS]:
        rows = store.rows(embodiment)
        if len(rows):
            row = int(rows[np.argmax(store.catalog.length[rows])])
            start = max(int(store.catalog.length[row]) + 1 - length, 0) // 2
            refs.append(SequenceRef("pool", row, start, min(start + length, int(store.catalog.length[row]) + 1)))
    return refs


def save_open_loop(path: Path, world_model: WorldModel, store: TrajectoryStore, length: int, context: int) -> float:
    """Truth, model and error of a sequence of each embodiment of the store, as <path>.png and <path>.mp4, cameras side
    by side; nothing where there are none.

    Returns the mean squared error of what is predicted, summed over an observation as in the training loss: pixels in
    the encoder's scale of [-0.5, 0.5], vectors in symlog; nan where no trajectory is longer than `context` rows.
    """
    refs = strip_refs(store, length)
    batch = cut({"pool": store}, refs, length, world_model.config.max_action_dim)
    generator = generator_for(world_model.device, 0, 0)
    model = open_loop(world_model, TensorBatch.from_batch(batch, world_model.device), context, generator)
    if images := world_model.config.observation.images:
        truth, foreseen = (np.concatenate([which[k] for k in images], 3) for which in (batch.observation, model))
        names = [store.spec(r.trajectory).embodiment for r in refs]
        _draw(path.with_suffix(".png"), truth, foreseen, names, context)
        _film(path.with_suffix(".mp4"), truth, foreseen, names, context)
    error = sum(_error(batch.observation[name], value) for name, value in model.items())
    assert isinstance(error, np.ndarray)
    predicted = batch.valid & (np.arange(length) >= context)
    return float(error[predicted].mean()) if predicted.any() else float("nan")


def _film(path: Path, truth: np.ndarray, model: np.ndarray, names: list[str], context: int) -> None:
    """truth, model uint8 [B, T, 64, W, 3] → a film of T frames: a row for each of B sequences."""
    error = np.abs(truth.astype(np.int16) - model).astype(np.uint8)
    rows = [side_by_side({name: truth[i], "model": model[i], "error": error[i]}) for i, name in enumerate(names)]
    film = np.concatenate(rows, 1)
    film[context:, :2, :] = PREDICTED  # a line at the top, from where it predicts
    write_mp4(path, film, FPS)


def _error(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Of images or vectors [B, T, …], squared and summed over each: [B, T]."""
    a, b = (x / np.float32(255) if x.dtype == np.uint8 else np.sign(x) * np.log1p(np.abs(x)) for x in (truth, model))
    return np.square(a - b).sum(tuple(range(2, truth.ndim)))


def _draw(path: Path, truth: np.ndarray, model: np.ndarray, names: list[str], context: int) -> None:
    """truth, model uint8 [B, T, 64, W, 3] → a figure with three rows for each of B sequences."""
    steps = np.unique(np.linspace(0, truth.shape[1] - 1, COLUMNS).round().astype(int))
    error = np.abs(truth.astype(np.int16) - model).astype(np.uint8)
    width = truth.shape[3]
    size = (0.7 * len(steps) * width / 64 + 0.6, (2.1 + 0.45) * len(names))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for i, axes in enumerate(np.atleast_1d(figure.subplots(len(names), 1))):
        rows = [np.concatenate(kind[i, steps], 1) for kind in (truth, model, error)]
        axes.imshow(np.concatenate(rows, 0))
        axes.axvline(width * int((steps < context).sum()) - 0.5, color="red", linewidth=1)
        axes.set_title(f"{names[i]}: predicted right of the red line", fontsize=8, loc="left")
        axes.set_xticks(width * np.arange(len(steps)) + width // 2, steps, fontsize=6)
        axes.set_yticks(64 * np.arange(3) + 32, ("truth", "model", "error"), fontsize=7)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
