"""What the guards find."""

from collections.abc import Iterator

import pytest

from dbscope.events import observe
from dbscope.guards import Found


@pytest.fixture
def found() -> Iterator[list[Found]]:
    """What is found while the test runs."""
    facts: list[Found] = []
    stop = observe(facts.append, Found)
    yield facts
    stop()
