"""Readers that begin no transaction, and the connections they read on: DESIGN's Reads."""

import gc
import time
from typing import Any
from weakref import ref

import pytest
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import sessionmaker

from dbscope import ConfigurationError, Database, ReadOnlyError
from dbscope.engines import Engines
from dbscope.settings import Settings
from tests.support.kits import Account, Kit, Payment, SyncKit, twice

STATES = text("SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")


def settles(kit: Kit, *states: str) -> bool:
    """Whether the server's connections come to these states; one that was closed is seen for a moment longer."""
    deadline = time.monotonic() + 10
    with kit.outside.execution_options(isolation_level="AUTOCOMMIT").connect() as other:
        while sorted(other.scalars(STATES)) != [*states]:
            if time.monotonic() > deadline:
                return False
    return True


# -- what it sees, and what it spares ---------------------------------------------------------------------------------


@twice
async def test_reads_autocommit_begins_nothing_on_the_server(server_kit: Kit) -> None:
    """Each statement is a transaction, with a snapshot of its own, and between them none is open."""
    kit = server_kit
    kit.database()
    async with kit.reader(autocommit=True) as session:
        first = await kit.done(session.scalar(text("SELECT now()")))
        assert settles(kit, "idle")
        with kit.outside.begin() as other:
            other.execute(insert(Payment).values(amount=3))
        assert await kit.done(session.scalar(select(Payment.amount))) == 3
        assert await kit.done(session.scalar(text("SELECT now()"))) > first
    async with kit.reader() as session:
        await kit.done(session.scalar(select(Payment.amount)))
        assert settles(kit, "idle", "idle in transaction")


@twice
async def test_reads_autocommit_begins_nothing_on_sqlite(kit: Kit) -> None:
    """A reader sees one snapshot; with `autocommit` each statement sees what is committed when it runs."""
    kit.database()
    for options, seen in (({}, 0), ({"autocommit": True}, 2)):
        async with kit.reader(**options) as session:
            before = len((await kit.done(session.scalars(select(Payment)))).all())
            with kit.outside.begin() as other:
                other.execute(insert(Payment).values(amount=3))
            session.expire_all()
            after = len((await kit.done(session.scalars(select(Payment)))).all())
        assert (before, after) == ((0, 0) if not seen else (1, seen))


@twice
async def test_reads_autocommit_objects_stay_readable(server_kit: Kit) -> None:
    """After the block they are as from every reader."""
    kit = server_kit
    async with kit.transaction() as session:
        session.add(Payment(amount=4))
    async with kit.reader(autocommit=True) as session:
        payment = await kit.done(session.scalar(select(Payment)))
    assert payment.amount == 4
    assert kit.checked_out() == 0


@twice
async def test_reads_one_in_another(server_kit: Kit) -> None:
    """One that begins nothing may join a reader with a snapshot; one with a snapshot does not join one without."""
    kit = server_kit
    async with kit.reader() as outer, kit.reader(autocommit=True) as inner:
        assert inner is outer
    async with kit.reader(autocommit=True) as outer:
        async with kit.reader(autocommit=True) as inner:
            assert inner is outer
        async with kit.reader() as inner:
            await kit.done(inner.scalar(text("SELECT 1")))
            assert settles(kit, "idle in transaction")


# -- what it refuses --------------------------------------------------------------------------------------------------


@twice
async def test_reads_autocommit_refuses_writes_of_every_kind(server_kit: Kit) -> None:
    """The session refuses what it can tell, the server the functions that write; the next reader is no worse off."""
    kit = server_kit
    with kit.outside.begin() as other:
        kit.database(pool_size=1, max_overflow=0)
        other.execute(
            text(
                "CREATE FUNCTION book() RETURNS int LANGUAGE sql AS "
                "'INSERT INTO payments (amount) VALUES (1) RETURNING amount'"
            )
        )
    for statement in (insert(Payment).values(amount=1), text("DELETE FROM payments"), text("CREATE TABLE t (i int)")):
        with pytest.raises(ReadOnlyError, match=r"inside the reader .begun at"):
            async with kit.reader(autocommit=True) as session:
                await kit.done(session.execute(statement))
    with pytest.raises(ReadOnlyError):
        async with kit.reader(autocommit=True) as session:
            session.add(Payment())
            await kit.done(session.flush())
    for function in ("book()", "nextval('payments_id_seq')"):
        with pytest.raises(DBAPIError, match="read-only transaction"):
            async with kit.reader(autocommit=True) as session:
                await kit.done(session.execute(text(f"SELECT {function}")))
    assert kit.count() == 0
    async with kit.transaction() as session:
        assert await kit.done(session.scalar(text("SELECT book()"))) == 1


@twice
async def test_reads_autocommit_on_sqlite_refuses_writes(kit: Kit) -> None:
    """There, too."""
    for statement in (insert(Payment).values(amount=1), text("PRAGMA user_version = 3")):
        with pytest.raises(ReadOnlyError):
            async with kit.reader(autocommit=True) as session:
                await kit.done(session.execute(statement))
    assert kit.count() == 0


@pytest.mark.parametrize("setting", ["SET search_path = pg_catalog", "RESET ALL", "LISTEN news", "DISCARD ALL"])
@twice
async def test_reads_autocommit_refuses_settings(server_kit: Kit, setting: str) -> None:
    """No rollback would undo them, and the connection's next user would find them."""
    kit = server_kit
    with pytest.raises(ReadOnlyError, match="the next user of the connection would find it"):
        async with kit.reader(autocommit=True) as session:
            await kit.done(session.execute(text(setting)))


def test_reads_autocommit_where_it_cannot_be_had(postgres_url: str) -> None:
    """On other databases it is refused; so is it where the engine sets an isolation level at each checkout."""
    with Database("sqlite://") as db:
        db._sync_engine.dialect.name = "mysql"
        with pytest.raises(ConfigurationError, match="known on PostgreSQL and SQLite; on mysql"):
            db.reader(autocommit=True)
        db._sync_engine.dialect.name = "sqlite"
    engine = create_engine(postgres_url).execution_options(isolation_level="SERIALIZABLE")
    with Database(engine) as db, pytest.raises(ConfigurationError, match="an isolation level among its execution"):
        with db.reader(autocommit=True) as session:
            session.scalar(text("SELECT 1"))


def test_reads_a_driver_that_does_not_tell_its_process(sync_server_kit: SyncKit, monkeypatch: Any) -> None:
    """It cannot be told from one behind a pooler, and is refused; the connection is not kept."""
    kit = sync_server_kit
    monkeypatch.setattr("dbscope.engines.told_pid", lambda driver: None)
    with pytest.raises(ConfigurationError, match="psycopg does not tell whether"):
        with kit.db.reader(autocommit=True) as session:
            session.scalar(text("SELECT 1"))
    assert settles(kit)


# -- its connections --------------------------------------------------------------------------------------------------


@twice
async def test_reads_autocommit_has_a_pool_of_its_own(server_kit: Kit) -> None:
    """A pool of one serves both, whichever is inside of the other; both pools go with the database."""
    kit = server_kit
    db = kit.database(pool_size=1, max_overflow=0)
    async with kit.transaction() as outer:
        outer.add(Payment(amount=1))
        await kit.done(outer.flush())
        async with kit.reader(autocommit=True) as session:
            assert await kit.done(session.scalar(text("SELECT count(*) FROM payments"))) == 0
    async with kit.reader(autocommit=True) as session:
        await kit.done(session.scalar(text("SELECT 1")))
        async with kit.transaction(new=True) as inner:
            inner.add(Payment(amount=2))
    assert kit.amounts() == [1, 2]
    assert settles(kit, "idle", "idle")
    await kit.done(db.dispose())
    kit.databases.remove(db)
    assert settles(kit)


def test_reads_autocommit_leaves_the_pool_to_a_fan_out(sync_server_kit: SyncKit) -> None:
    """What the reader holds is none of the connections that a fan-out counts on."""
    kit = sync_server_kit
    db = kit.database(pool_size=1, max_overflow=0)
    with db.reader(autocommit=True) as session:
        session.scalar(text("SELECT 1"))
        assert db.fan_out(lambda number: db.session.scalar(text(f"SELECT {number}")), [1, 2]) == [1, 2]


@twice
async def test_reads_autocommit_keeps_the_engine_s_listeners(server_kit: Kit) -> None:
    """Who listens to the database's engine, or prepares its connections, is not gone round."""
    kit = server_kit
    kit.database()
    engine = getattr(kit.db.engine, "sync_engine", kit.db.engine)
    seen: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SET application_name = 'prepared'")
        cursor.close()
        connection.commit()

    async with kit.reader(autocommit=True) as session:
        assert await kit.done(session.scalar(text("SHOW application_name"))) == "prepared"
    assert "SHOW application_name" in seen


def test_engines_are_made_once(postgres_url: str) -> None:
    """A thousand blocks with the same options share one engine, and a reader's pool is one."""
    engine = create_engine(postgres_url)
    engines = Engines()
    options = Settings(isolation="SERIALIZABLE", read_only=True).begin_options("postgresql")
    assert len({id(engines.shaping(dict(options))(engine)) for _ in range(9)}) == 1
    assert len({id(engines.committing_at_once(engine).pool) for _ in range(9)}) == 1
    assert [made.pool is engine.pool for made in engines.apart()] == [False]


def test_engines_for_every_bind(sync_server_kit: SyncKit) -> None:
    """A session that has an engine for each model gets each of them shaped."""
    kit = sync_server_kit
    kit.database()
    engine = create_engine(kit.url)
    db = Database(sessionmaker(kit.db.engine, binds={Account: engine}))
    with db.reader() as session, pytest.raises(DBAPIError, match="read-only"):
        session.connection(bind_arguments={"mapper": Account}).exec_driver_sql(
            "INSERT INTO accounts (name) VALUES ('')"
        )
    with db.transaction(isolation="SERIALIZABLE") as session:
        for model in (Account, Payment):
            connection = session.connection(bind_arguments={"mapper": model})
            assert connection.scalar(text("SHOW transaction_isolation")) == "serializable"
    db.dispose()
    engine.dispose()


def test_engines_what_is_bound_to_a_connection_begins_no_other_way(sync_server_kit: SyncKit) -> None:
    """Its transaction was begun by somebody else: that is said, instead of ignoring what was asked for."""
    kit = sync_server_kit
    with kit.db.engine.connect() as connection:
        db = Database(sessionmaker(connection))
        with pytest.raises(ConfigurationError, match="a connection that was taken for it"):
            with db.transaction(read_only=True) as session:
                session.scalar(text("SELECT 1"))
        with db.reader() as session:
            assert session.scalar(text("SELECT 1")) == 1


def test_engines_a_session_goes_without_the_collector(sync_server_kit: SyncKit) -> None:
    """What a reader's session is given instead of its `get_bind` does not keep it alive."""
    kit = sync_server_kit
    gc.collect()
    gc.disable()
    try:
        with kit.db.reader(autocommit=True) as session:
            session.scalar(text("SELECT 1"))
        gone = ref(session)
        del session
        assert gone() is None
    finally:
        gc.enable()
