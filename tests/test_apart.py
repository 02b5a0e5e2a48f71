"""Long work apart: connections, limits and a name of its own (COMPATIBILITY 36)."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.orm import Session, sessionmaker

import dbscope
from dbscope import ConfigurationError, Database, SelfBlockedError, scope
from dbscope.testing import sandbox
from tests.support import needs
from tests.support.kits import Account, Kit, Payment, SyncKit, make_kit, twice

COLOURS = pytest.mark.parametrize("colour", ["sync", "async"])
ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}  # whoever needs a second connection fails at once
NAMED = text("SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()")


async def settings(kit: Kit, session: Any, *names: str) -> list[str]:
    """What the server has for a session."""
    columns = ", ".join(f"current_setting('{name}')" for name in names)
    return [*(await kit.done(session.execute(text(f"SELECT {columns}")))).one()]


# -- connections of its own -------------------------------------------------------------------------------------------


async def both_at_once(kit: Kit) -> None:
    """Work apart while the application's one connection is out, and the other way round."""
    kit.database(**ONE)
    async with kit.block(kit.db.apart("back-fill")) as beside:
        async with kit.scope("request"), kit.reader() as session:
            assert (await kit.done(session.scalars(select(Payment)))).all() == []
            assert kit.checked_out() == 1
            async with kit.transaction(beside) as working:
                working.add(Payment(amount=7))
                await kit.done(working.flush())
                assert (kit.checked_out(), kit.checked_out(beside)) == (1, 1)
        async with kit.transaction(beside) as working:
            await kit.done(working.scalars(select(Payment)))
            assert (kit.checked_out(), kit.checked_out(beside)) == (0, 1)
            async with kit.scope("another request"), kit.reader() as session:
                assert (await kit.done(session.scalar(select(Payment.amount)))) == 7
        assert (kit.checked_out(), kit.checked_out(beside)) == (0, 0)
    assert kit.amounts() == [7]


@twice
async def test_apart_work_takes_no_connection_of_the_applications(kit: Kit) -> None:
    """With a pool of one, requests and the work apart run at the same time, each on its own connection."""
    await both_at_once(kit)


@twice
async def test_apart_work_takes_no_connection_of_the_applications_on_postgresql(server_kit: Kit) -> None:
    """The same on PostgreSQL."""
    await both_at_once(server_kit)


@twice
async def test_apart_has_as_many_connections_as_were_asked_for(kit: Kit) -> None:
    """One, if nothing is said: work that needs two on its way is refused; whatever size the application's pool has."""
    kit.database(pool_size=5)

    for connections in (1, 2):
        async with kit.block(kit.db.apart("report", connections=connections)) as beside, kit.scope():
            await kit.done(kit.session(beside).scalars(select(Payment)))
            async with kit.scope():
                if connections == 1:
                    with pytest.raises(SelfBlockedError, match=r"apart for 'report' .* the pool's only one is held"):
                        await kit.done(kit.session(beside).scalars(select(Payment)))
                else:
                    await kit.done(kit.session(beside).scalars(select(Payment)))


@twice
async def test_apart_is_disposed_of_at_the_end_of_its_block_alone(kit: Kit) -> None:
    """Its connections are closed when its block ends, those of the application's stay."""
    closed: list[Any] = []
    async with kit.reader() as session:
        await kit.done(session.scalars(select(Payment)))
    async with kit.block(kit.db.apart("report")) as beside:
        event.listen(beside._sync_engine.pool, "close", lambda *_: closed.append("apart"))
        event.listen(kit.db._sync_engine.pool, "close", lambda *_: closed.append("application's"))
        async with kit.reader(beside) as session:
            await kit.done(session.scalars(select(Payment)))
        assert closed == []
    assert closed == ["apart"]


@twice
async def test_apart_holders_are_named_when_it_is_disposed_of_too_early(kit: Kit) -> None:
    """The warning names the database apart and the line; the application's database reports none of it."""

    async def too_early() -> None:
        async with kit.scope("job"):
            async with kit.block(kit.db.apart("report")) as beside:
                await kit.done(kit.session(beside).scalars(select(Payment)))

    with pytest.warns(
        dbscope.ScopeWarning, match=r"apart for 'report' was disposed of while .* since tests.test_apart"
    ):
        await too_early()


# -- the same in all else ---------------------------------------------------------------------------------------------


class Audited(Session):
    """A session class of a user's."""

    def who(self) -> str:
        return "audited"


def test_apart_sessions_are_of_the_same_class_with_the_same_options(sync_kit: SyncKit) -> None:
    """Session class, its options, what it adds to the registry, and listeners of the application's sessions hold."""
    db = sync_kit.database(session_class=Audited, expire_on_commit=False, info={"team": "books"}, name="bank")
    flushed: list[Any] = []
    event.listen(db.session, "before_flush", lambda session, *_: flushed.append(session))
    with db.apart("back-fill") as beside, scope():
        assert str(beside) == "<Database bank apart for 'back-fill'>"
        session = beside.session()
        assert isinstance(session, Audited)
        assert (session.expire_on_commit, session.info, beside.session.who()) == (False, {"team": "books"}, "audited")
        assert session is not db.session()
        with beside.transaction():
            session.add(Payment())
        assert flushed == [session]
        event.listen(beside.session, "after_flush", lambda *_: pytest.fail("the application's sessions fire this"))
        with db.transaction() as other:
            other.add(Payment())
    assert sync_kit.count() == 2


@COLOURS
@pytest.mark.parametrize("target", ["an engine", "a session maker"])
def test_apart_of_an_engine_connects_as_that_one_does(colour: str, target: str, tmp_path: Any) -> None:
    """An engine of the user's, with listeners of its own: new connections are made and set up as there."""
    kit = make_kit(colour, f"sqlite:///{tmp_path / 'own.db'}")
    url = kit.url.set(drivername=kit.drivers["sqlite"])
    make: Callable[..., Any] = create_engine
    maker: Any = sessionmaker
    if colour == "async":
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        make, maker = create_async_engine, async_sessionmaker
    engine = make(url, connect_args={"timeout": 9})
    connected: list[Any] = []

    def listener(connection: Any, _: Any) -> None:
        connected.append(connection)
        connection.cursor().execute("PRAGMA busy_timeout = 1234")

    event.listen(getattr(engine, "sync_engine", engine), "connect", listener)

    async def test() -> None:
        db = kit.database(engine if target == "an engine" else maker(engine))
        async with kit.block(db.apart("back-fill", lock_timeout=2.5)) as beside:
            async with kit.transaction(beside) as session:
                assert await kit.done(session.scalar(text("PRAGMA busy_timeout"))) == 2500
                assert len(connected) == 1
            async with kit.transaction(db) as session:
                assert await kit.done(session.scalar(text("PRAGMA busy_timeout"))) == 1234

    kit.run(test())


@twice
async def test_apart_a_block_after_a_read_takes_the_write_lock_anew(kit: Kit) -> None:
    """On SQLite a block adopts nothing that would have to be turned into a writing transaction, apart as elsewhere."""
    kit.database()
    async with kit.block(kit.db.apart("back-fill")) as beside, kit.scope():
        await kit.done(kit.session(beside).scalars(select(Payment)))
        async with kit.transaction() as other:
            other.add(Payment(amount=1))
        async with kit.transaction(beside) as session:
            session.add(Payment(amount=2))
    assert kit.amounts() == [1, 2]


@twice
async def test_apart_in_a_sandbox_is_undone_with_it(kit: Kit) -> None:
    """In a test's sandbox the work apart is a part of what is rolled back after the test."""
    kit.database()
    async with kit.block(sandbox(kit.db)):
        async with kit.block(kit.db.apart("back-fill")) as beside:
            async with kit.transaction(beside) as session:
                session.add(Payment(amount=3))
        async with kit.reader() as session:
            assert await kit.done(session.scalar(select(Payment.amount))) == 3
    assert kit.count() == 0


@twice
async def test_apart_blocks_work_as_on_any_database(server_kit: Kit) -> None:
    """Blocks with options, savepoints, hooks, readers and fan-outs."""
    kit = server_kit
    said: list[str] = []
    async with kit.block(kit.db.apart("back-fill", connections=2)) as beside:
        async with kit.transaction(beside, isolation="SERIALIZABLE", lock_timeout=0.25) as session:
            assert await settings(kit, session, "transaction_isolation", "lock_timeout") == ["serializable", "250ms"]
            with pytest.raises(KeyError):
                async with kit.transaction(beside, nested=True):
                    session.add(Payment(amount=1))
                    raise KeyError
            session.add(Payment(amount=2))
            beside.on_commit(said.append, "committed")
        async with kit.reader(beside, autocommit=True) as session:
            assert await kit.done(session.scalar(select(Payment.amount))) == 2
            assert (await settings(kit, session, "lock_timeout")) == ["5s"]

        async def part(number: int) -> None:
            async with kit.transaction(beside) as session:
                session.add(Account(name=str(number)))

        if kit.colour == "async":
            await beside.fan_out(part, range(5))
    assert said == ["committed"]
    assert kit.amounts() == [2]
    assert kit.count(Account) == (5 if kit.colour == "async" else 0)


# -- limits and a name of its own -------------------------------------------------------------------------------------

LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout")
API = {"statement_timeout": "1500", "lock_timeout": "100", "idle_in_transaction_session_timeout": "2000"}
API["idle_session_timeout"] = "60000"


def of_the_application(kit: Kit, **options: str) -> dict[str, Any]:
    """Options of the engine, with which every connection of the application's has limits."""
    told = {**API, **options}
    if kit.colour == "async":
        return {"connect_args": {"server_settings": told}}
    return {"connect_args": {"options": " ".join(f"-c {name}={value}" for name, value in told.items())}}


@pytest.mark.parametrize("by", ["the engine", "the role", "a listener"])
@twice
async def test_apart_the_applications_limits_do_not_apply(server_kit: Kit, by: str) -> None:
    """Time-outs of the application's connections, wherever they come from, are not those of the work apart."""
    kit = server_kit
    role = f"api_{kit.url.database}"
    if by == "the role":
        with kit.outside.begin() as admin:
            admin.execute(text(f"CREATE ROLE {role} SUPERUSER LOGIN"))
            for name, value in API.items():
                admin.execute(text(f"ALTER ROLE {role} SET {name} = {value}"))
        kit.url = kit.url.set(username=role)
    kit.database(**(of_the_application(kit) if by == "the engine" else {}))
    if by == "a listener":

        @event.listens_for(kit.db._sync_engine, "connect")
        def connect(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            for name, value in API.items():
                cursor.execute(f"SET {name} = {value}")
            connection.commit()

    async with kit.scope():
        assert (await settings(kit, kit.session(), *LIMITS)) == ["1500ms", "100ms", "2s", "1min"]
    times = {"lock_timeout": timedelta(minutes=1), "statement_timeout": 0.5}
    for options, told in ({}, ["0", "5s", "0", "0"]), (times, ["500ms", "1min", "0", "0"]):
        async with kit.block(kit.db.apart("migration", **options)) as beside:
            for _ in range(2):  # the second user of the connection finds the same
                async with kit.transaction(beside) as session:
                    assert await settings(kit, session, *LIMITS) == told
                with pytest.raises(KeyError):
                    async with kit.transaction(beside) as session:
                        await settings(kit, session, *LIMITS)
                        raise KeyError
    async with kit.block(kit.db.apart("migration", lock_timeout=None)) as beside, kit.transaction(beside) as session:
        assert await settings(kit, session, *LIMITS) == ["0", "0", "0", "0"]
    async with kit.scope():
        assert (await settings(kit, kit.session(), *LIMITS)) == ["1500ms", "100ms", "2s", "1min"]


@pytest.mark.parametrize(
    ("application", "name", "shown"),
    [
        (None, "migration", "dbscope: migration"),
        ("payments-api", "nightly 'books' 100%", "payments-api: nightly 'books' 100%"),
        ("a" * 60, "back-fill of last year", "a" * 39 + ": back-fill of last year"),
    ],
)
@twice
async def test_apart_connections_say_what_they_are_for(
    server_kit: Kit, application: str | None, name: str, shown: str
) -> None:
    """`pg_stat_activity` has the work's name behind the application's own; what goes before is cut, if need be."""
    kit = server_kit
    kit.database(**(of_the_application(kit, application_name=application) if application else {}))
    async with kit.block(kit.db.apart(name)) as beside:
        async with kit.transaction(beside) as session:
            assert await kit.done(session.scalar(NAMED)) == shown
        async with kit.scope():
            assert await kit.done(kit.session().scalar(NAMED)) == (application or "")
            assert await kit.done(kit.session(beside).scalar(NAMED)) == shown


async def test_apart_works_with_psycopgs_async_side(postgres_url: str) -> None:
    """Limits and name are there with psycopg on a loop, too, after a rollback as before."""
    needs.module("greenlet", extra="async")
    async with dbscope.AsyncDatabase(postgres_url) as db, db.apart("migration") as beside:
        for _ in range(2):
            async with scope():
                assert await beside.session().scalar(NAMED) == "dbscope: migration"
                assert await beside.session().scalar(text("SHOW lock_timeout")) == "5s"


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connections": 0}, "connections is how many the work may use at once, 1 or more, not 0"),
        ({"connections": -1}, "not -1"),
        ({"connections": "2"}, "not '2'"),
        ({"connections": True}, "not True"),
        ({"lock_timeout": -1}, "lock_timeout is a number of seconds above 0 .*: -1"),
        ({"lock_timeout": 0}, "lock_timeout is a number"),
        ({"statement_timeout": timedelta(0)}, "statement_timeout is a number"),
        ({"statement_timeout": "5s"}, "statement_timeout is a number .*: '5s'"),
        ({"statement_timeout": 5}, "statement_timeout of work apart is not known on sqlite: say statement_timeout=Non"),
        ({"name": None}, "apart.. takes a name for the work, such as 'migration': .* not None"),
        ({"name": 7}, "not 7"),
        ({"name": " "}, "not ' '"),
        ({"name": "two\nlines"}, "on one line"),
        ({"name": "x" * 51}, "at most 50 bytes"),
    ],
)
@twice
async def test_apart_bad_input(kit: Kit, options: dict[str, Any], message: str) -> None:
    """What cannot be meant is refused at once, by one error that says what is taken."""
    with pytest.raises(ConfigurationError, match=message):
        kit.db.apart(**{"name": "migration", **options})


@COLOURS
def test_apart_of_a_database_in_memory_is_refused(colour: str, tmp_path: Any) -> None:
    """There is one connection to it, and none beside."""
    kit = make_kit(colour, f"sqlite:///{tmp_path / 'unused.db'}")

    async def test() -> None:
        with pytest.raises(ConfigurationError, match="a SQLite database in memory has one connection"):
            kit.memory().apart("migration")
        if colour == "sync":
            with Database(create_engine("sqlite://")) as own, pytest.raises(ConfigurationError, match="in memory"):
                own.apart("migration")

    kit.run(test())


def test_apart_a_second_database_of_one_url_points_here(sync_kit: SyncKit) -> None:
    """The refusal of a second `Database` names the way that is allowed."""
    sync_kit.database()
    with pytest.raises(ConfigurationError, match=r"use its `apart\(\)`"):
        Database(sync_kit.url)
