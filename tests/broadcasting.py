"""Snapshots in which every number tells the version, and what tests of the weight broadcast share."""

from __future__ import annotations

import time
from contextlib import contextmanager

import numpy as np

from gsa.schema import WeightSnapshot

SOON_S = 20


def snapshot(version, size=1000, **meta):
    """Every number in it says its version: a torn one shows."""
    tensors = {
        "encoder.weight": np.full((size, 3), version, np.float32),
        "core/bias": np.full(7, version, np.float32),
        "steps": np.array(version, np.int64),
    }
    return WeightSnapshot(version, tensors, {"updates": version, **meta})


def assert_whole(received, version=None):
    version = received.version if version is None else version
    assert received.version == version == received.meta["updates"]
    for name, tensor in snapshot(version).tensors.items():
        assert received.tensors[name].dtype == tensor.dtype
        assert (received.tensors[name] == version).all()
    assert received.tensors["steps"].shape == ()


@contextmanager
def closing(*parts):
    try:
        yield parts
    finally:
        for part in parts:
            part.close()


def eventually(condition, what):
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
