"""Fixtures and profiles for the whole suite."""

import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings

from dbscope import database, events
from dbscope.guards import budgets, policy
from tests.support import needs
from tests.support.kits import AsyncKit, Kit, SyncKit, make_kit
from tests.support.postgres import Postgres, PostgresNotFound

collect_ignore = ["support/tasks.py"]  # a Celery application, which its workers import, and nobody else

# No deadlines: a machine with two cores runs other workers at the same time.
settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, print_blob=True)
# Tests of what answers `dbscope top` turn it on; elsewhere a thread and a file would be in the way of what is counted.
os.environ.setdefault("DBSCOPE_MONITOR", "0")
# A shell that runs the tests in the background has them ignore Ctrl-C; the programs that they start would do so, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the server, so that `-m "not postgres"` leaves them out."""
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.postgres)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell at how many points tests/test_interruption.py has cut work short."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    found = [
        value
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "points"
    ]
    if found:
        terminalreporter.write_line(f"work was cut short at {sum(found)} points, in {len(found)} tests")


@pytest.fixture(autouse=True)
def guards_as_before() -> Iterator[None]:
    """Set levels and budget of the guards back, whatever a test, or an example of a page, does to them."""
    levels, budget = dict(policy._levels), budgets._budget
    yield
    policy.set_levels(levels)
    budgets.set_budget(budget)


@pytest.fixture(autouse=True)
def others_as_before() -> Iterator[None]:
    """Set back what an example of a page, or a library, leaves for the next test: observers, databases, logging."""
    for name in ("dbscope", "dbscope.guards"):
        logging.getLogger(name).disabled = False
    logging.root.setLevel(logging.WARNING)  # a Celery worker in this process has set its own level
    cast("Any", policy._guards["engines_again"])._counts.clear()
    manager = logging.root.manager
    disabled = manager.disable
    loggers = {one: (one.disabled, one.level) for one in manager.loggerDict.values() if isinstance(one, logging.Logger)}
    observers = {kind: [*kind.observers] for kind in _kinds(events.Fact)}
    known = set(database._by_url)
    yield
    manager.disable = disabled
    for logger, (off, level) in loggers.items():
        logger.disabled = off
        logger.setLevel(level)
    for kind, before in observers.items():
        kind.observers[:] = [each for each in kind.observers if each in before]
    for key in set(database._by_url) - known:
        database._by_url.pop(key, None)


def _kinds(fact: type[events.Fact]) -> list[type[events.Fact]]:
    return [fact, *(deeper for kind in fact.__subclasses__() for deeper in _kinds(kind))]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; each xdist worker starts its own, when a test first asks for it."""
    needs.module("psycopg", extra="postgresql")
    try:
        server = Postgres()
    except PostgresNotFound as error:
        needs.missing(str(error))
    with server:
        yield server


@pytest.fixture
def postgres_database(postgres: Postgres) -> Iterator[str]:
    """The name of an empty database for one test, for `postgres.url(driver, database)`."""
    name = postgres.create_database()
    yield name
    postgres.drop_database(name)


@pytest.fixture
def postgres_url(postgres: Postgres, postgres_database: str) -> str:
    """The URL of an empty database for one test, by way of psycopg."""
    return postgres.url(database=postgres_database)


@pytest.fixture(params=["sync", "async"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    """A kit over a SQLite file, in each colour; for tests under `@twice`."""
    return make_kit(request.param, f"sqlite:///{tmp_path / 'test.db'}")


@pytest.fixture(params=["sync", "async"])
def server_kit(request: pytest.FixtureRequest, postgres_url: str) -> Kit:
    """A kit over PostgreSQL, in each colour; for tests under `@twice`."""
    return make_kit(request.param, postgres_url)


@pytest.fixture
def sync_kit(tmp_path: Path) -> Iterator[SyncKit]:
    """A sync kit over a SQLite file."""
    kit = cast("SyncKit", make_kit("sync", f"sqlite:///{tmp_path / 'test.db'}"))
    yield kit
    kit.close()


@pytest.fixture
async def async_kit(tmp_path: Path) -> AsyncIterator[AsyncKit]:
    """An async kit over a SQLite file, for async tests."""
    kit = cast("AsyncKit", make_kit("async", f"sqlite:///{tmp_path / 'test.db'}"))
    yield kit
    await kit.aclose()


@pytest.fixture
def sync_server_kit(postgres_url: str) -> Iterator[SyncKit]:
    """A sync kit over PostgreSQL."""
    kit = cast("SyncKit", make_kit("sync", postgres_url))
    yield kit
    kit.close()


@pytest.fixture
async def async_server_kit(postgres_url: str) -> AsyncIterator[AsyncKit]:
    """An async kit over PostgreSQL, for async tests."""
    kit = cast("AsyncKit", make_kit("async", postgres_url))
    yield kit
    await kit.aclose()
