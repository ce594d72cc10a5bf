"""The reference's world model (repository ncrl) beside ours: weights by formula, and what its own modules make of them.

    GSA_PEER_NCRL=<checkout> python -m tests.reference

writes tests/data/reference.npz anew: what the reference gives at a small size. No weights are kept; both sides make
them by a formula.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsa.agent import rssm
from gsa.agent.vision import OFFSET, from_patches
from gsa.agent.world_model import WorldModel

VARIABLE = "GSA_PEER_NCRL"
GOLDEN = Path(__file__).parent / "data" / "reference.npz"
SMALL = {"deter": 64, "hidden": 24, "stoch": 32, "classes": 4, "depth": 4}
BATCH, LENGTH, ACTIONS = 2, 6, 21
COMPARED = ("features", "deter", "posterior", "prior", "image")


def formula(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of the reference's name and shape: the same everywhere, and of a size that keeps signals alive."""
    rng = np.random.RandomState(sum(i * ord(c) for i, c in enumerate(name, 1)) % 2**31)  # a stream frozen for ever
    noise = rng.uniform(-1, 1, shape).astype(np.float32)
    if len(shape) == 1:
        norm = name.endswith("weight")
        return torch.from_numpy(1 + 0.3 * noise if norm else 0.3 * noise)
    taps = np.prod(shape[2:]) / (4 if name.startswith("decoder") else 1) if len(shape) == 4 else 1
    inputs = shape[0 if len(shape) == 4 and name.startswith("decoder") else 1] * taps
    return torch.from_numpy(noise * np.float32(np.sqrt(3 / inputs)))


def checkpoint(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the reference saves: {"wm": {"encoder": {name: tensor}, …}}, of names "encoder._conv_model.0.weight"."""
    parts: dict[str, Any] = {"encoder": {}, "rssm": {}, "decoder": {}}
    for name, shape in shapes.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = formula(name, tuple(shape))
    return {"wm": parts}


def golden_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the reference at the golden numbers' size."""
    with np.load(GOLDEN) as file:
        return {k.removeprefix("shape "): tuple(file[k].tolist()) for k in file.files if k.startswith("shape ")}


def inputs(stoch: int) -> dict[str, np.ndarray]:
    """Images, the actions that led to them, where a sequence starts anew, and the draws that latents are sampled by."""
    rng = np.random.RandomState(7)
    bt = (BATCH, LENGTH)
    is_first = np.zeros(bt, bool)
    is_first[:, 0] = is_first[1, 3] = True
    action = rng.uniform(-1, 1, (*bt, ACTIONS)).astype(np.float32)
    action[:, :, 6:] = 0
    return {
        "pixels": rng.randint(0, 256, (*bt, 64, 64, 3)).astype(np.uint8), "action": action, "is_first": is_first,
        "uniform": rng.uniform(size=(*bt, stoch)).astype(np.float32),
    }  # fmt: skip


def modules(deter: int, hidden: int, stoch: int, classes: int, depth: int) -> torch.nn.ModuleDict:
    """The reference's own encoder, rssm and decoder at these sizes; weights by formula."""
    source = str(Path(os.environ[VARIABLE]) / "src")
    if source not in sys.path:
        sys.path.insert(0, source)
    from dreamer import nets  # type: ignore[import-not-found]
    from dreamer import rssm as core  # type: ignore[import-not-found]

    shape = (3, 64, 64)
    parts = torch.nn.ModuleDict({
        "encoder": nets.Encoder(shape, act="SiLU", cnn_depth=depth),
        "rssm": core.RSSM(32 * depth, ACTIONS, deter, hidden, stoch, classes, act="SiLU"),
        "decoder": nets.Decoder(
            shape, deter, stoch * classes, hidden, act="SiLU", cnn_depth=depth, cnn_kernels=(5, 5, 6, 6)
        ),
    })  # fmt: skip
    parts.load_state_dict({name: formula(name, tuple(value.shape)) for name, value in parts.state_dict().items()})
    return parts


@torch.no_grad()
def outputs(parts: torch.nn.ModuleDict) -> dict[str, np.ndarray]:
    """The reference over the sequences of `inputs`, step by step through its own obs_step, except that latents are
    drawn by the given numbers: where the probabilities, summed up, pass them."""
    encoder, core, decoder = parts["encoder"], parts["rssm"], parts["decoder"]
    data = {k: torch.from_numpy(v) for k, v in inputs(core._stoch).items()}
    embed = encoder(data["pixels"].movedim(-1, -3).float() / 255 - 0.5)
    state, rows = core.initial(BATCH), []
    for t in range(LENGTH):
        reset, action = data["is_first"][:, t], data["action"][:, t]
        post, prior = core.obs_step(state, action, embed[:, t], reset, should_sample=True)
        probs = core._get_dist(post["logits"]).base_dist.probs
        index = (probs.cumsum(-1) <= data["uniform"][:, t, :, None]).sum(-1).clamp(max=core._classes - 1)
        state = {**post, "stoch": torch.nn.functional.one_hot(index, core._classes).float()}
        image = decoder(state["deter"][:, None], state["stoch"][:, None])[:, 0]
        rows.append((state["deter"], post["logits"], prior["logits"], index, image))
    deter, posterior, prior_logits, index, image = (torch.stack(x, 1) for x in zip(*rows, strict=True))
    found = {"features": embed, "deter": deter, "posterior": posterior, "prior": prior_logits, "image": image}
    return {k: v.numpy() for k, v in found.items()} | {"index": index.numpy().astype(np.uint8)}


@torch.no_grad()
def ours(model: WorldModel) -> dict[str, np.ndarray]:
    """What `outputs` gives, from this package's modules."""
    data = {k: torch.from_numpy(v) for k, v in inputs(model.config.stoch).items()}
    features = model.encode({"pixels": data["pixels"]})
    states = rssm.scan(
        model.cell, model.posterior, features, data["action"], data["is_first"], data["uniform"], model.config.unimix
    )
    assert model.decoder is not None
    image = from_patches(model.decoder(states.deter, states.stoch)) + OFFSET
    found = {
        "features": features, "deter": states.deter, "posterior": states.logits, "prior": model.prior(states.deter),
        "image": image.view(*states.deter.shape[:2], 64, 64, 3).movedim(-1, -3),
    }  # fmt: skip
    index = states.stoch.unflatten(-1, (model.config.stoch, -1)).argmax(-1)
    return {k: v.numpy() for k, v in found.items()} | {"index": index.numpy()}


def main() -> None:
    parts = modules(**SMALL)
    shapes = {name: np.array(value.shape) for name, value in parts.state_dict().items()}
    found = outputs(parts)
    found["image"] = found["image"][:, ::3, :, ::4, ::4]  # enough to tell a wrong decoder
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **found, **{f"shape {name}": shape for name, shape in shapes.items()})
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {sum(v.size for v in found.values())} numbers")


if __name__ == "__main__":
    main()
