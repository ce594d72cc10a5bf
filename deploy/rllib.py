"""What a worker needs of RLlib, imported without DMControl.

RLlib's wrappers import that wherever it is installed, and with it an OpenGL display: 30 MB of a worker's own memory,
100 MB with what it shares. Our environments are in processes of their own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def absent(package: str) -> Iterator[None]:
    """Inside, importing `package` is an ImportError, unless it was imported before."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with absent("dm_control"):
    from ray.rllib.env.env_runner import EnvRunner
    from ray.rllib.utils.checkpoints import Checkpointable

__all__ = ["Checkpointable", "EnvRunner"]
