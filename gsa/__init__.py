"""GSA: generalist-to-specialist adaptation of world models, distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsa.agent.policy import load_policy

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    if name == "load_policy":  # torch is imported only where someone wants to act
        from gsa.agent.policy import load_policy

        return load_policy
    raise AttributeError(f"module 'gsa' has no attribute '{name}'")
