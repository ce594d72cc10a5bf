"""Environments, the guidance schedule, rollouts, the environment worker and the offline collectors.

Importing it chooses the OpenGL backend, which mujoco reads once, when it is itself first imported.
"""

import contextlib

from actors.rendering import choose_backend
from gsa.errors import UsageError

with contextlib.suppress(UsageError):  # said again by whoever renders
    choose_backend()
