"""Databases: what they are made from, their sessions, several side by side, and their end."""

import gc
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, func, insert, make_url, select, text
from sqlalchemy.orm import Session, sessionmaker

from dbscope import ConfigurationError, Database, ScopeWarning, fork, scope
from tests.support import needs
from tests.support.kits import Account, AsyncKit, Base, Kit, Payment, SyncKit, make_kit, twice

ALL = select(Payment.amount).order_by(Payment.amount)


def engine_of(kit: Kit) -> Any:
    """An engine of the kit's colour that the user made."""
    Base.metadata.create_all(kit.outside)
    if kit.colour == "sync":
        return create_engine(kit.url)
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine(kit.url.set(drivername=kit.drivers[kit.url.get_backend_name()]))


def maker_of(kit: Kit, engine: Any, **options: Any) -> Any:
    """A session maker of the kit's colour."""
    if kit.colour == "sync":
        return sessionmaker(engine, **options)
    from sqlalchemy.ext.asyncio import async_sessionmaker

    return async_sessionmaker(engine, **options)


@pytest.mark.parametrize("target", ["string", "URL", "engine", "sessionmaker"])
@twice
async def test_scopes_a_database_takes(kit: Kit, target: str) -> None:
    """A URL as a string or `URL`, an engine, and a configured session maker each make a database that works."""
    Base.metadata.create_all(kit.outside)
    url = kit.url.set(drivername=kit.drivers["sqlite"])
    if target in ("string", "URL"):
        db = kit.database(url.render_as_string(hide_password=False) if target == "string" else url)
    else:
        engine = engine_of(kit)
        db = kit.database(engine if target == "engine" else maker_of(kit, engine))
        assert db.engine is engine
    async with kit.transaction(db) as session:
        session.add(Payment(amount=1))
    assert kit.amounts() == [1]


@twice
async def test_scopes_session_options_are_taken_with_a_url(kit: Kit) -> None:
    """Options of the session and of the engine are given side by side."""
    db = kit.database(autoflush=False, expire_on_commit=True, info={"who": "test"}, echo=False, pool_timeout=7)
    async with kit.scope():
        session = kit.session(db)
        sync = getattr(session, "sync_session", session)
        assert (sync.autoflush, sync.expire_on_commit, session.info) == (False, True, {"who": "test"})
    assert getattr(db.engine, "sync_engine", db.engine).pool._timeout == 7


@twice
async def test_scopes_async_sessions_keep_loaded_state_by_default(kit: Kit) -> None:
    """`expire_on_commit` is SQLAlchemy's default in sync, and False in async: an expired attribute cannot load."""
    async with kit.scope():
        sync = getattr(kit.session(), "sync_session", kit.session())
        assert sync.expire_on_commit is (kit.colour == "sync")


@twice
async def test_scopes_a_session_maker_may_be_configured_later(kit: Kit) -> None:
    """`configure()` on the user's session maker counts for sessions made after it."""
    maker = maker_of(kit, engine_of(kit), autoflush=False)
    db = kit.database(maker)
    async with kit.scope():
        assert kit.session(db).autoflush is False
    maker.configure(autoflush=True)
    async with kit.scope():
        assert kit.session(db).autoflush is True


class MySession(Session):
    """A session class of the user's, with an option of its own."""

    def __init__(self, *args: Any, tenant: str = "none", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tenant = tenant


def test_scopes_a_session_class_of_the_users(sync_kit: SyncKit) -> None:
    """Sessions are of the class that was asked for, options of its own included, as is the registry's proxy."""
    db = sync_kit.database(session_class=MySession, tenant="acme")
    with db.transaction() as session:
        assert isinstance(session, MySession)
        assert type(session).__name__ == "MySession"
        assert session.tenant == "acme"
    with scope():
        assert db.session(tenant="other").tenant == "other"
        assert db.session().tenant == "other"
    with Database(sessionmaker(create_engine("sqlite://"), class_=MySession, tenant="x")) as other, scope():
        assert other.session().tenant == "x"


def test_scopes_sqlmodels_session(sync_kit: SyncKit) -> None:
    """SQLModel's `Session` is handed out as it is, `exec()` included."""
    sqlmodel = needs.module("sqlmodel", extra="test")
    db = sync_kit.database(session_class=sqlmodel.Session)
    with db.transaction() as session:
        assert isinstance(session, sqlmodel.Session)
        session.add(Payment(amount=1))
    with db.reader() as session:
        assert session.exec(sqlmodel.select(Payment.amount)).all() == [1]


async def test_scopes_sqlmodels_async_session(async_kit: AsyncKit) -> None:
    """SQLModel's `AsyncSession` is, too."""
    sqlmodel = needs.module("sqlmodel", extra="test")
    from sqlmodel.ext.asyncio.session import AsyncSession

    db = async_kit.database(session_class=AsyncSession)
    async with db.transaction() as session:
        assert isinstance(session, AsyncSession)
        session.add(Payment(amount=1))
    async with db.reader() as session:
        assert (await session.exec(sqlmodel.select(Payment.amount))).all() == [1]


@twice
async def test_scopes_several_databases_side_by_side(kit: Kit, tmp_path: Any) -> None:
    """One scope holds a session for each database; a transaction of one leaves the other's alone."""
    other = kit.file(tmp_path / "other.db")
    async with kit.scope():
        assert kit.session() is not kit.session(other)
        kit.session(other).add(Payment(amount=2))
        async with kit.transaction():
            kit.session().add(Payment(amount=1))
        assert kit.amounts() == [1]
        await kit.done(kit.session(other).rollback())
    assert kit.checked_out() == kit.checked_out(other) == 0


async def test_scopes_both_colours_in_one_scope(async_kit: AsyncKit, tmp_path: Any) -> None:
    """An async scope holds sessions of sync databases as well, and releases both."""
    other = make_kit("sync", f"sqlite:///{tmp_path / 'sync.db'}")
    async with scope():
        assert list((await async_kit.session().execute(ALL)).scalars()) == []
        assert other.session().scalars(ALL).all() == []
        assert (async_kit.checked_out(), other.checked_out()) == (1, 1)
    assert (async_kit.checked_out(), other.checked_out()) == (0, 0)
    other.db.dispose()


def test_scopes_binds_send_tables_to_their_engines(sync_kit: SyncKit, tmp_path: Any) -> None:
    """`binds` work: tables of another engine are read and written there, in the same transaction block."""
    other = create_engine(f"sqlite:///{tmp_path / 'accounts.db'}")
    Base.metadata.create_all(other)
    db = sync_kit.database(binds={Account: other})
    with db.transaction() as session:
        session.add_all([Payment(amount=1), Account(id=1, name="a")])
    assert sync_kit.amounts() == [1]
    assert sync_kit.count(Account) == 0
    with pytest.raises(KeyError), db.transaction() as session:
        session.add_all([Payment(amount=2), Account(id=2, name="b")])
        session.flush()
        raise KeyError
    with other.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Account)) == 1
    assert sync_kit.amounts() == [1]
    other.dispose()


def test_scopes_events_on_the_registry_and_on_the_engine(sync_kit: SyncKit) -> None:
    """`event.listen(db.session, …)` and the user's own listeners on the engine are called as with SQLAlchemy's."""
    seen: list[str] = []
    event.listen(sync_kit.db.session, "before_flush", lambda *_: seen.append("flush"))
    event.listen(sync_kit.db.session, "after_commit", lambda *_: seen.append("commit"))
    event.listen(sync_kit.db.engine, "before_cursor_execute", lambda *args: seen.append(args[2].split()[0]))
    with sync_kit.db.transaction() as session:
        session.add(Payment(amount=1))
    assert seen == ["flush", "INSERT", "commit"]


@twice
async def test_scopes_new_session_is_outside_of_every_scope(kit: Kit) -> None:
    """`db.new_session()` is the caller's: no scope ends it, and it commits by itself."""
    async with kit.scope():
        loose = kit.db.new_session(autoflush=False)
        assert loose is not kit.session()
    loose.add(Payment(amount=1))
    await kit.done(loose.commit())
    await kit.done(loose.close())
    assert kit.amounts() == [1]
    assert kit.checked_out() == 0


@twice
async def test_scopes_dispose_with_open_scopes_says_which(kit: Kit) -> None:
    """`dispose()` while a scope holds a connection warns, naming the scope and the line that took it."""
    db = kit.db
    async with kit.scope("nightly"):
        await kit.done(kit.session().execute(ALL))
        connection = await kit.done(kit.session().connection())
        raw = connection.sync_connection if kit.colour == "async" else connection
        driver = raw.connection.driver_connection
        with pytest.warns(ScopeWarning, match=r"while connections were held by scope 'nightly' .* since .*\.py:\d+"):
            await kit.done(db.dispose())
    assert raw.closed
    with pytest.raises((sqlite3.ProgrammingError, ValueError), match=r"closed|no active connection"):
        await kit.done(driver.execute("SELECT 1"))  # the driver's connection, which the old pool would have kept
    await kit.done(db.dispose())  # nobody holds any now: no warning


@twice
async def test_scopes_a_database_is_a_context_manager(kit: Kit) -> None:
    """`with Database(…) as db` disposes of it at the end; the URL is free again, and the data was kept."""
    async with kit.block(kit.db) as db:
        assert db is kit.db
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
        assert getattr(db.engine, "sync_engine", db.engine).pool.checkedin() == 1
    assert getattr(db.engine, "sync_engine", db.engine).pool.checkedin() == 0
    again = kit.database()
    async with kit.reader(again) as session:
        assert list((await kit.done(session.execute(ALL))).scalars()) == [1]


def test_scopes_no_password_is_ever_shown() -> None:
    """The name, `repr()` and errors of a database hide its password."""
    needs.module("psycopg", extra="postgresql")
    db = Database("postgresql+psycopg://me:s3cret@127.0.0.1:1/x", connect_args={"connect_timeout": 1})
    assert "s3cret" not in repr(db) + db.name + repr(db.session)
    assert "me:***@" in repr(db)
    db.dispose()


@twice
async def test_scopes_a_name_is_what_errors_say(kit: Kit) -> None:
    """`name=` is what `repr()` and errors call the database."""
    assert "payments" in repr(kit.database(name="payments"))


def test_scopes_a_database_that_was_dropped_frees_its_url(sync_kit: SyncKit) -> None:
    """A database that nobody holds any more does not count as the second of its URL."""
    url = make_url(str(sync_kit.url) + "x")
    db = Database(url)
    db.engine.dispose()
    del db
    gc.collect()
    Database(url).dispose()


@twice
async def test_bad_input_one_sqlite_file_is_one_database_however_its_path_is_written(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pools for one file would wait for each other's locks."""
    monkeypatch.chdir(tmp_path)
    url = make_url(f"{kit.drivers['sqlite']}:///shop.db")
    first = kit.database(url)
    with pytest.raises(ConfigurationError, match=r"there is a database for .* already"):
        kit.database(url.set(database=str(tmp_path / "shop.db")))
    assert first.session is not None


def test_scopes_databases_are_made_while_others_look_at_them() -> None:
    """As the guards' thread does, which would end otherwise: FAILURES 1."""
    made = [Database("sqlite://"), Database("sqlite://")]
    seen = []
    for database in fork.databases:
        made.append(Database("sqlite://"))
        seen.append(database)
    assert set(made[:2]) <= set(seen)
    assert not set(made[2:]) & set(seen)
    for database in made:
        database.dispose()


# -- a lost connection -------------------------------------------------------------------------------------------------


@twice
async def test_failure_35_a_connection_lost_in_the_middle(server_kit: Kit) -> None:
    """FAILURES 35: the error says what is lost and what to do; nothing stays open, and the next unit is clean."""
    from sqlalchemy.exc import DBAPIError

    kit = server_kit
    with pytest.raises(DBAPIError) as caught:
        async with kit.transaction() as session:
            await kit.done(session.execute(insert(Payment).values(amount=1)))
            await terminate(kit, session)
            await kit.done(session.execute(insert(Payment).values(amount=2)))
    assert "The connection was lost in the middle" in "".join(caught.value.__notes__)
    assert "Repeat the whole piece of work" in "".join(caught.value.__notes__)
    assert kit.checked_out() == 0
    async with kit.transaction() as session:
        session.add(Payment(amount=3))
    assert kit.amounts() == [3]


@twice
async def test_failure_35_a_scope_goes_on_after_a_lost_connection(server_kit: Kit) -> None:
    """FAILURES 35: in a scope, the next block on the same session works after one that lost its connection."""
    from sqlalchemy.exc import DBAPIError

    kit = server_kit
    async with kit.scope():
        with pytest.raises(DBAPIError):
            async with kit.transaction() as session:
                await kit.done(session.execute(ALL))
                await terminate(kit, session)
                await kit.done(session.execute(ALL))
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
    assert kit.amounts() == [1]


@twice
async def test_failure_35_a_lost_connections_age_is_told(server_kit: Kit) -> None:
    """FAILURES 35: the error of a connection that died in the middle says which line took it, and how long ago."""
    from sqlalchemy.exc import DBAPIError

    kit = server_kit
    with pytest.raises(DBAPIError) as caught:
        async with kit.transaction() as session:
            await terminate(kit, session)
            await kit.done(session.execute(ALL))
    assert re.search(r"It was taken at tests/test_database.py:\d+, \d+\.\d s ago", "".join(caught.value.__notes__))


@twice
async def test_failure_26_a_loop_sees_what_others_commit(server_kit: Kit) -> None:
    """FAILURES 26: with a scope for each pass, polling under REPEATABLE READ sees each new row, as one would hope."""
    kit = server_kit
    kit.database(isolation_level="REPEATABLE READ")
    seen: list[int] = []
    for amount in range(3):
        async with kit.scope("a pass"):
            seen.append(len((await kit.done(kit.session().execute(ALL))).all()))
            with kit.outside.begin() as connection:
                connection.execute(insert(Payment).values(amount=amount))
            assert len((await kit.done(kit.session().execute(ALL))).all()) == seen[-1]  # one snapshot each
    assert seen == [0, 1, 2]


@twice
async def test_failure_35_a_connection_that_died_in_the_pool_is_not_handed_out(server_kit: Kit) -> None:
    """FAILURES 35: a connection that the server closed meanwhile is replaced at the next checkout."""
    kit = server_kit
    async with kit.transaction() as session:
        pid = await kit.done(session.scalar(text("SELECT pg_backend_pid()")))
    with kit.outside.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid, 30000)"), {"pid": pid})
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
    assert kit.amounts() == [1]


@twice
async def test_failure_35_a_swallowed_loss_is_never_a_commit(server_kit: Kit) -> None:
    """FAILURES 35: where the loss was swallowed, the block's end raises, and nothing is half-committed."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    from dbscope import DBScopeError

    kit = server_kit
    with pytest.raises((SQLAlchemyError, DBScopeError)):
        async with kit.transaction() as session:
            await kit.done(session.execute(insert(Payment).values(amount=1)))
            await terminate(kit, session)
            with pytest.raises(DBAPIError):
                await kit.done(session.execute(insert(Payment).values(amount=2)))
    assert kit.amounts() == []
    assert kit.checked_out() == 0


async def terminate(kit: Kit, session: Any) -> None:
    """Let the server end the session's connection."""
    pid = await kit.done(session.scalar(text("SELECT pg_backend_pid()")))
    with kit.outside.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid, 30000)"), {"pid": pid})
