"""Fixtures and profiles for the whole suite."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings

from tests.support import needs
from tests.support.kits import AsyncKit, Kit, SyncKit, make_kit
from tests.support.postgres import Postgres, PostgresNotFound

# No deadlines: a machine with two cores runs other workers at the same time.
settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, print_blob=True)
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
