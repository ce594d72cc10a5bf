"""What several test files use."""

import os
import random
import signal

import pytest

from actors.environment import make
from deploy.redis_server import EmbeddedRedis


@pytest.fixture
def environment():
    """make(), with everything it made closed at the end."""
    made = []

    def make_and_keep(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    yield make_and_keep
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def server():
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def run():
    """A run of its own on the shared server."""
    return f"run-{random.getrandbits(64):x}"


@pytest.fixture
def own_server():
    """A server that a test may hurt, and starts again itself."""
    with EmbeddedRedis(restart=False) as server:
        yield server
        if server._process.poll() is None:
            os.kill(server.pid, signal.SIGCONT)
