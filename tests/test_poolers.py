"""Through PgBouncer in transaction mode, where each transaction may get another server connection: FAILURES 34."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import text

from dbscope import ConfigurationError
from tests.support import needs
from tests.support.kits import Kit, Payment, make_kit, twice
from tests.support.pgbouncer import PgBouncer, PgBouncerNotFound
from tests.support.postgres import Postgres
from tests.test_settings import ALL, TOLD, shown

# What the drivers need, because they prepare statements, which stay on one server connection.
DRIVER_OPTIONS = {
    "sync": {"prepare_threshold": None},
    "async": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
}


@pytest.fixture(scope="module")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    """A pooler before the server, with one server connection for each database."""
    with ExitStack() as stack:
        try:
            pooler = stack.enter_context(PgBouncer(postgres.url()))
        except PgBouncerNotFound as error:
            needs.missing(str(error))
        yield pooler


@pytest.fixture(params=["sync", "async"])
def server_kit(request: pytest.FixtureRequest, pgbouncer: PgBouncer, postgres_database: str) -> Kit:
    """A kit whose database is behind the pooler."""
    kit = make_kit(request.param, f"postgresql+psycopg://postgres@127.0.0.1:{pgbouncer.port}/{postgres_database}")
    kit.database(connect_args=DRIVER_OPTIONS[kit.colour])
    return kit


async def everybody_else(kit: Kit) -> dict[str, str]:
    """What another client of the pooler finds."""
    columns = ", ".join(f"current_setting('{name}')" for _, name, _ in TOLD.values())
    with kit.outside.connect() as connection:
        return dict(zip(TOLD, connection.execute(text(f"SELECT {columns}")).one(), strict=True))


@twice
async def test_transactions_7_what_a_block_asks_for_stays_on_no_server_connection(server_kit: Kit) -> None:
    """The pooler's one server connection is as before for whoever gets it next, after a commit and after an error."""
    kit = server_kit
    before = await everybody_else(kit)
    writing: dict[str, Any] = {name: value for name, value in ALL.items() if name not in ("read_only", "deferrable")}
    for options in (ALL, writing):
        async with kit.transaction(**options) as session:
            told = await shown(kit, session)
            assert all(told[name] != before[name] for name in options)
            if options is writing:
                session.add(Payment(amount=5))
        assert await everybody_else(kit) == before
        with pytest.raises(KeyError):
            async with kit.transaction(**options) as session:
                await shown(kit, session)
                raise KeyError
        assert await everybody_else(kit) == before
    async with kit.scope():
        assert await shown(kit, kit.session()) == before
    assert kit.amounts() == [5]


@twice
async def test_reads_autocommit_is_refused_before_anything_is_set(server_kit: Kit) -> None:
    """A setting that outlives its transaction would reach the pooler's other clients; the plain reader works."""
    kit = server_kit
    before = await everybody_else(kit)
    for _ in range(3):
        with pytest.raises(ConfigurationError, match="there is a pooler between, such as PgBouncer"):
            async with kit.reader(autocommit=True) as session:
                await kit.done(session.execute(text("SELECT 1")))
    assert await everybody_else(kit) == before
    async with kit.reader() as session:
        assert (await shown(kit, session))["read_only"] == "on"
    assert await everybody_else(kit) == before
    async with kit.transaction() as session:
        session.add(Payment(amount=6))
    assert kit.amounts() == [6]


@twice
async def test_apart_is_refused_before_anything_is_set(server_kit: Kit) -> None:
    """Its limits would reach the other clients of the pooler: nothing is set, and the error says what to do."""
    kit = server_kit
    before = await everybody_else(kit)
    async with kit.block(kit.db.apart("migration")) as beside:
        for _ in range(3):
            with pytest.raises(ConfigurationError, match=r"(?s)apart\('migration'\) needs .*pooler.*the server's own"):
                async with kit.transaction(beside) as session:
                    await kit.done(session.execute(text("SELECT 1")))
    assert await everybody_else(kit) == before
    assert kit.checked_out(beside) == 0
