"""What a worker needs of RLlib, imported without what RLlib's wrappers would bring along wherever it is installed.

DMControl comes with an OpenGL display, and OpenCV with its codecs: 34 MB of a worker's own memory, 115 MB with what it
shares. Our environments are in processes of their own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Inside, importing one of `packages` is an ImportError, unless it was imported before."""
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


with absent("dm_control", "cv2"):
    from ray.rllib.env.env_runner import EnvRunner
    from ray.rllib.utils.checkpoints import Checkpointable

__all__ = ["Checkpointable", "EnvRunner"]
