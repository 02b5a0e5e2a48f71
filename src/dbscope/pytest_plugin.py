"""Fixtures for pytest, and what guards know of the error of a test.

Nothing else happens, and `dbscope.testing` is not imported, until a test asks for a fixture.

`dbscope_databases` is yours to define; the others build on it, and serve sync databases. A sync fixture cannot await:
for an async database write a fixture of two lines around `dbscope.testing.sandbox`, as the page on tests shows.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from dbscope.events import WorkFailed, tell_failed

pytest.register_assert_rewrite("dbscope.conformance")  # its asserts are to say what was found, as a test's own do

if TYPE_CHECKING:
    from dbscope.scope import Scope
    from dbscope.testing import CapturedHook, sandbox


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Let guards add to the error of a test what they know of it."""
    outcome: Any = yield
    if outcome.excinfo is not None and WorkFailed.observers:
        tell_failed(outcome.excinfo[1])


@pytest.fixture
def dbscope_databases() -> Any:
    """The database that the other fixtures work on, or a list of several. Define it in your conftest.py."""
    raise pytest.UsageError(
        "dbscope does not know your database: define a fixture `dbscope_databases` in conftest.py that returns it, "
        "or a list of several."
    )


@pytest.fixture
def dbscope_sandbox(dbscope_databases: Any, request: pytest.FixtureRequest) -> "Iterator[sandbox]":
    """Undo what the test does to the databases, and fail it if it leaves a scope or a connection open."""
    from dbscope.testing import sandbox

    with sandbox(*_several(dbscope_databases), name=f"test {request.node.nodeid}") as box:
        yield box


@pytest.fixture
def dbscope_scope(request: pytest.FixtureRequest) -> "Iterator[Scope]":
    """A scope around the test, called as the test is, for code that expects to run in one."""
    from dbscope.scope import PlacedScope

    with PlacedScope(f"test {request.node.nodeid}", None) as work:
        yield work


@pytest.fixture
def dbscope_hooks(dbscope_databases: Any) -> "Iterator[list[CapturedHook]]":
    """The functions given to `on_commit` by what was committed in the test; they are kept instead of called."""
    from dbscope.testing import capture_on_commit

    with capture_on_commit(*_several(dbscope_databases)) as hooks:
        yield hooks


def _several(databases: Any) -> list[Any]:
    return list(databases) if isinstance(databases, list | tuple) else [databases]
