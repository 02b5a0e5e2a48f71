"""Fixtures and profiles for the whole suite."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support import needs
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
