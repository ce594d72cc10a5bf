"""`gsa doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gsa.errors import GsaError

PACKAGES = ("torch", "ray", "mujoco", "dm_control", "metaworld", "gymnasium", "pyarrow", "redis", "faiss-cpu")
FREE_DISK_GB = 5


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    text: str


def examine() -> Iterator[Finding]:
    """Every check in turn, cheap ones first."""
    yield Finding("python", sys.version_info >= (3, 11), sys.version.split()[0])
    yield from (_package(name) for name in PACKAGES)
    yield _check("own packages", _own_packages)
    yield _check("compute", _compute)
    yield _check("rendering", _rendering)
    yield _check("redis", _redis)
    yield _disk()


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed: pip install 'gsa-rl[all]'")


def _check(name: str, call: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, call())
    except GsaError as error:
        return Finding(name, False, str(error))


def _own_packages() -> str:
    from deploy.provenance import require_own_packages, source_hash

    require_own_packages()
    return f"sources {source_hash()[:12]}"


def _compute() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return f"CPU, {os.cpu_count()} cores (no GPU that torch can use)"


def _redis() -> str:
    import redis

    from deploy.redis_server import EmbeddedRedis, find_binary

    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        version = client.info("server")["redis_version"]
    return f"{find_binary()} answers as {version}"


def _rendering() -> str:
    from actors.rendering import check_rendering, explain_backend

    driver = check_rendering()
    software = any(name in driver for name in ("llvmpipe", "softpipe", "swrast"))
    note = ": in software, as it found no GPU's driver (docs/environments.md)" if software else ""
    return f"{explain_backend()}; it drew by {driver}{note}"


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    return Finding("disk", free > FREE_DISK_GB, f"{free:.0f} GB free here")
