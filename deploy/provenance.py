"""Whose code runs, and on what: a foreign package of the same top-level name would be imported by a worker without any
error."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from gsa.errors import GsaError

LIBRARIES = ("numpy", "torch", "pyarrow", "ray", "redis", "mujoco", "dm_control", "metaworld")
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


def surroundings() -> dict[str, Any]:
    """What a result was made with: commit, machine, versions. The commit is "" where this is no checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {"processor": _processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    return {"commit": commit, "machine": machine, "python": sys.version.split()[0], "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise GsaError(f"Package '{package}' is missing: install gsa-rl again.")
    return Path(spec.origin).resolve().parent
