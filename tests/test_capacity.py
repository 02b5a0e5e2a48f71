"""Processes x pool against what the server gives, before it says `too many clients`: FAILURES 39."""

from typing import Any

import pytest
from sqlalchemy import NullPool, text

from dbscope import ConfigurationError, Database
from tests.support import needs
from tests.support.kits import Kit, SyncKit, twice
from tests.support.pgbouncer import PgBouncer, PgBouncerNotFound


@twice
async def test_failures_39_what_fits_is_told_in_figures(server_kit: Kit) -> None:
    """A superuser may have what is reserved, too."""
    kit = server_kit
    kit.database(pool_size=10, max_overflow=2)
    found = await kit.done(kit.db.check_capacity(16))
    assert (found.wanted, found.limit, found.fits) == (192, 200, True)
    assert str(found) == "16 processes x 12 = 192 of 200 connections (max_connections 200)"
    assert kit.checked_out() == 0


@twice
async def test_failures_39_what_does_not_fit_is_refused_at_start_up(server_kit: Kit) -> None:
    """The error has the arithmetic, and what to write instead."""
    kit = server_kit
    kit.database(pool_size=10, max_overflow=3)
    with pytest.raises(ConfigurationError, match=r"16 processes x 13 = 208 of 200 connections .*\n.*at most 12"):
        await kit.done(kit.db.check_capacity(16))
    with pytest.raises(ConfigurationError, match="Have fewer processes"):
        await kit.done(kit.db.check_capacity(201))
    assert kit.checked_out() == 0


@twice
async def test_failures_39_a_pool_of_readers_counts_from_its_first_use_on(server_kit: Kit) -> None:
    """It is as large as the database's own, beside which it stands."""
    kit = server_kit
    kit.database(pool_size=10, max_overflow=0)
    assert (await kit.done(kit.db.check_capacity(20))).fits
    async with kit.reader(autocommit=True) as session:
        await kit.done(session.scalar(text("SELECT 1")))
    with pytest.raises(ConfigurationError, match="20 processes x 20 = 400"):
        await kit.done(kit.db.check_capacity(20))


@pytest.mark.parametrize("options", [{"pool_size": 5, "max_overflow": -1}, {"poolclass": NullPool}])
def test_failures_39_a_pool_without_a_limit_fits_nowhere(sync_server_kit: SyncKit, options: Any) -> None:
    """It is told to have one."""
    sync_server_kit.database(**options)
    with pytest.raises(ConfigurationError, match=r"1 process x inf = inf of 200 .*\n.*limit: `pool_size=200"):
        sync_server_kit.db.check_capacity(1)


def test_failures_39_the_smallest_limit_counts(sync_server_kit: SyncKit) -> None:
    """What is reserved for superusers, a user's own limit, and the database's."""
    kit = sync_server_kit
    with kit.outside.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE ROLE shop LOGIN"))
        try:
            with Database(kit.url.set(username="shop")) as db:
                assert db.check_capacity(1).where_from == "max_connections 200, 3 reserved"
                connection.execute(text(f"ALTER DATABASE {kit.url.database} CONNECTION LIMIT 60"))
                assert db.check_capacity(1).where_from == "the database's CONNECTION LIMIT"
                connection.execute(text("ALTER ROLE shop CONNECTION LIMIT 40"))
                found = db.check_capacity(1)
                assert (found.limit, found.where_from) == (40, "the user's CONNECTION LIMIT")
        finally:
            connection.execute(text("DROP ROLE shop"))


def test_failures_39_behind_a_pooler_its_limits_count(sync_server_kit: SyncKit) -> None:
    """The server's own are no limit for the processes, and the figures say why."""
    url = sync_server_kit.url
    try:
        with (
            PgBouncer(url.render_as_string()) as pooler,
            Database(url.set(port=pooler.port), connect_args={"prepare_threshold": None}) as db,
        ):
            found = db.check_capacity(1000)
    except PgBouncerNotFound as error:
        needs.missing(str(error))
    assert (found.limit, found.fits) == (None, True)
    assert "a pooler is between" in str(found)


def test_sqlite_has_no_limit(sync_kit: SyncKit) -> None:
    """Nothing is refused there."""
    found = sync_kit.db.check_capacity(1000)
    assert (found.fits, found.limit) == (True, None)


@pytest.mark.parametrize("processes", [0, -1, True, 2.0, "4", None])
def test_bad_numbers_of_processes(sync_kit: SyncKit, processes: Any) -> None:
    """The error says what is meant."""
    with pytest.raises(ConfigurationError, match="on all hosts together, 1 or more"):
        sync_kit.db.check_capacity(processes)
