"""Libraries that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from gsa.errors import UsageError


def need(module: str, extra: str) -> Any:
    """The module, imported. UsageError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"This needs {module.split('.')[0]} ({error}): pip install 'gsa-rl[{extra}]'.") from None
