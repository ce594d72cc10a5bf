"""Whose code runs: a foreign package of the same top-level name would be imported by a worker without any error."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from gsa.errors import GsaError

PACKAGES = ("gsa", "retrieval", "replay_service", "actors", "learner", "reports", "deploy")


@cache
def source_hash() -> str:
    """Hash of the sources of all our packages as this process would import them."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(_folder(package).rglob("*.py")):
            digest.update(f"{package}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def require_own_packages() -> None:
    """Raises GsaError if one of our packages would be imported from elsewhere than the others."""
    home = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        if (found := _folder(package).parent) != home:
            raise GsaError(
                f"Package '{package}' would come from {found}, not {home}: another installed distribution has the same "
                "name. Install GSA into an environment of its own."
            )


def require_same_sources(expected: str, who: str) -> None:
    """Raises GsaError if this process runs other sources than the driver."""
    if source_hash() != expected:
        raise GsaError(f"{who} runs other sources than the driver: install the same version of gsa-rl on every node.")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise GsaError(f"Package '{package}' is missing: install gsa-rl again.")
    return Path(spec.origin).resolve().parent
