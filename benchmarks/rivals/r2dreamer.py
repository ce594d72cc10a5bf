"""r2dreamer's update with its decoder loss (NM512/r2dreamer): GSA_PEER_R2DREAMER names a checkout.

Its sizes are its own; `deter` is set so that the number of trainable weights comes nearest to the one asked for. Its
half precision and its compiler are for CUDA: on a CPU it runs eagerly in float32.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.rivals import ACTIONS, Case, arrays

VARIABLE = "GSA_PEER_R2DREAMER"


def build(case: Case) -> tuple[Callable[[], object], int]:
    """A call per update, and the number of trainable weights."""
    root = Path(os.environ[VARIABLE])
    sys.path.insert(0, str(root))
    import dreamer

    dreamer.autocast = lambda *_, **__: contextlib.nullcontext()
    with contextlib.redirect_stdout(sys.stderr):
        deter = _deter(root, case.parameters)
        learner = _learner(root, deter)
    replay = _Replay(case, learner)
    return lambda: learner.update(replay), _weights(learner)


def _learner(root: Path, deter: int) -> Any:
    import dreamer
    import numpy as np
    import torch

    torch.manual_seed(0)
    image = SimpleNamespace(shape=(64, 64, 3))
    space = SimpleNamespace(spaces={"image": image})
    return dreamer.Dreamer(_config(root, deter), space, SimpleNamespace(shape=np.array([ACTIONS])))


def _config(root: Path, deter: int) -> Any:
    from omegaconf import OmegaConf

    base = OmegaConf.load(root / "configs" / "model" / "_base_.yaml")
    size = OmegaConf.load(root / "configs" / "model" / "size12M.yaml")
    env = OmegaConf.load(root / "configs" / "env" / "dmc_vision.yaml")
    model = OmegaConf.merge(base, size, {"deter": deter, "rep_loss": "dreamer", "compile": False})
    return OmegaConf.create({"device": "cpu", "seed": 0, "model": model, "env": env}).model


def _weights(learner: Any) -> int:
    return sum(p.numel() for p in learner._named_params.values())


def _deter(root: Path, parameters: int) -> int:
    """By bisection over multiples of its 8 blocks."""
    low, high = 8, 1024
    while high - low > 1:
        middle = (low + high) // 2
        if _weights(_learner(root, 8 * middle)) <= parameters:
            low = middle
        else:
            high = middle
    return 8 * low


class _Replay:
    """Hands out the same batch, as its replay buffer would."""

    def __init__(self, case: Case, learner: Any) -> None:
        import torch
        from tensordict import TensorDict

        data, bt = arrays(case), (case.batch, case.length)
        first = torch.zeros(bt, dtype=torch.bool)
        self._initial = learner.rssm.initial(case.batch)
        self._data = TensorDict(
            {
                "image": torch.from_numpy(data["pixels"]),
                "action": torch.from_numpy(data["action"]),
                "reward": torch.from_numpy(data["reward"])[..., None],
                "is_first": first,
                "is_last": first[..., None],
                "is_terminal": first[..., None],
            },
            batch_size=bt,
        )

    def sample(self) -> tuple[Any, None, Any]:
        return self._data.clone(False), None, self._initial

    def update(self, *_: Any) -> None: ...
