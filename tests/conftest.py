"""What several test files use."""

import pytest

from actors.environment import make


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
