"""The open-loop prediction strip: what a world model foresees beside what came, for people to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gsa.agent.rssm import State
from gsa.agent.world_model import TensorBatch, WorldModel
from gsa.schema import SequenceRef
from learner.compute import generator_for
from replay_service.batches import cut
from retrieval.store import TrajectoryStore

COLUMNS = 16  # frames shown of a sequence, evenly spaced
EMBODIMENTS = 8  # shown at most


@torch.no_grad()
def open_loop(world_model: WorldModel, batch: TensorBatch, context: int, generator: torch.Generator) -> np.ndarray:
    """uint8 [B, T, 64, 64, 3]: reconstructions of the first `context` frames, from there on predictions.

    The predictions see the actions and nothing else.
    """
    with world_model.autocast():
        features = world_model.encode(batch.pixels[:, :context])
        actions, later = batch.previous_action[:, :context], batch.previous_action[:, context:]
        seen = world_model.observe(features, actions, batch.is_first[:, :context], generator).state
        foreseen = world_model.imagine(State(seen.deter[:, -1], seen.stoch[:, -1]), later, generator)
        whole = State(*(torch.cat(halves, 1) for halves in zip(seen, foreseen, strict=True)))
        return world_model.decode(whole).cpu().numpy()


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


def save_strip(path: Path, world_model: WorldModel, store: TrajectoryStore, length: int, context: int) -> float:
    """Draws truth, model and error for each embodiment of the store into a PNG.

    Returns the mean squared error of the predicted pixels, in the encoder's scale of [-0.5, 0.5], a number of the
    whole image as in the training loss; nan where no trajectory is longer than `context` rows.
    """
    refs = strip_refs(store, length)
    batch = cut({"pool": store}, refs, length, world_model.config.max_action_dim)
    generator = generator_for(world_model.device, 0, 0)
    model = open_loop(world_model, TensorBatch.from_batch(batch, world_model.device), context, generator)
    truth = batch.observation["pixels"]
    _draw(path, truth, model, [store.spec(r.trajectory).embodiment for r in refs], context)
    error = np.square((truth.astype(np.float32) - model) / 255).sum((2, 3, 4))
    predicted = batch.valid & (np.arange(length) >= context)
    return float(error[predicted].mean()) if predicted.any() else float("nan")


def _draw(path: Path, truth: np.ndarray, model: np.ndarray, names: list[str], context: int) -> None:
    """truth, model uint8 [B, T, 64, 64, 3] → a figure with three rows for each of B sequences."""
    steps = np.unique(np.linspace(0, truth.shape[1] - 1, COLUMNS).round().astype(int))
    error = np.abs(truth.astype(np.int16) - model).astype(np.uint8)
    figure = Figure(figsize=(0.7 * len(steps) + 0.6, (2.1 + 0.45) * len(names)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for i, axes in enumerate(np.atleast_1d(figure.subplots(len(names), 1))):
        rows = [np.concatenate(kind[i, steps], 1) for kind in (truth, model, error)]
        axes.imshow(np.concatenate(rows, 0))
        axes.axvline(64 * int((steps < context).sum()) - 0.5, color="red", linewidth=1)
        axes.set_title(f"{names[i]}: predicted right of the red line", fontsize=8, loc="left")
        axes.set_xticks(64 * np.arange(len(steps)) + 32, steps, fontsize=6)
        axes.set_yticks(64 * np.arange(3) + 32, ("truth", "model", "error"), fontsize=7)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
