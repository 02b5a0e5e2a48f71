"""Sandboxes: what a test does is undone, in every form, and what it leaves open is found."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool, StaticPool

import dbscope
from dbscope import Database
from dbscope.testing import CapturedHook, LeftOpenError, capture_on_commit, sandbox
from tests.support import needs
from tests.support.kits import LIMIT, Account, Base, Kit, Payment, make_kit, twice

BACKENDS = [
    *(
        pytest.param((colour, kind), id=f"{kind}-{colour}")
        for kind in ("file", "memory")
        for colour in ("sync", "async")
    ),
    *(pytest.param((c, "server"), id=f"server-{c}", marks=pytest.mark.postgres) for c in ("sync", "async", "psycopg")),
]


class PsycopgKit:
    """Makes an async kit speak psycopg instead of asyncpg."""

    drivers = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite+aiosqlite"}


@pytest.fixture(params=BACKENDS)
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    """A kit of each colour over each kind of database; in memory it has no view from outside."""
    colour, kind = request.param
    url = request.getfixturevalue("postgres_url") if kind == "server" else f"sqlite:///{tmp_path / 'test.db'}"
    made = make_kit("sync" if colour == "sync" else "async", url)
    if colour == "psycopg":
        made.drivers = PsycopgKit.drivers
    if kind == "memory":
        made.memory(own=True)
    return made


async def ready(kit: Kit) -> None:
    """Make the tables of a database in memory; the others have them."""
    if "mode=memory" in str(kit.db.engine.url):
        async with kit.transaction() as session:
            for table in Base.metadata.sorted_tables:
                await kit.done(session.execute(text(f"CREATE TABLE {table.name} ({COLUMNS[table.name]})")))


COLUMNS = {
    "accounts": "id INTEGER PRIMARY KEY, name VARCHAR UNIQUE, balance INTEGER",
    "payments": "id INTEGER PRIMARY KEY, amount INTEGER, account_id INTEGER REFERENCES accounts",
}


async def pay(kit: Kit, amount: int, **options: bool) -> None:
    """Book a payment in a managed transaction."""
    async with kit.transaction(**options) as session:
        session.add(Payment(amount=amount))


async def amounts(kit: Kit) -> list[int]:
    """What work of its own sees in the database."""
    async with kit.reader() as session:
        return sorted(await kit.done(session.scalars(select(Payment.amount))))


# -- undone ----------------------------------------------------------------------------------------------------------


@twice
async def test_what_is_committed_is_seen_inside_and_gone_afterwards(kit):
    """Commits of every form stay inside the sandbox: seen by all work in it, by nobody after it."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        await pay(kit, 1)
        async with kit.scope():
            kit.session().add(Payment(amount=2))
            await kit.done(kit.session().commit())
            async with kit.transaction():
                await pay(kit, 3)
                await pay(kit, 4, nested=True)
        async with kit.scope(commit="on-success"):
            kit.session().add(Payment(amount=5))
        session = kit.db.new_session()
        session.add(Payment(amount=6))
        await kit.done(session.commit())
        await kit.done(session.close())
        assert await amounts(kit) == [1, 2, 3, 4, 5, 6]
    assert await amounts(kit) == []


@twice
async def test_nothing_reaches_the_database(kit):
    """Not even for a moment does anybody outside of the sandbox see what is committed in it."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        await pay(kit, 1)
        if "mode=memory" not in str(kit.db.engine.url):
            assert kit.count() == 0


@twice
async def test_failure_30_a_rollback_of_the_code_under_test_keeps_the_rows_of_the_fixture(kit):
    """FAILURES 30: a helper that rolls back its session undoes its own work, and not what the fixture committed."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        await pay(kit, 1)
        async with kit.scope():
            kit.session().add(Payment(amount=2))
            await kit.done(kit.session().flush())
            await kit.done(kit.session().rollback())
            assert list(await kit.done(kit.session().scalars(select(Payment.amount)))) == [1]
        with pytest.raises(ZeroDivisionError):
            async with kit.transaction() as session:
                session.add(Payment(amount=3))
                await kit.done(session.flush())
                raise ZeroDivisionError
        assert await amounts(kit) == [1]


@twice
async def test_failure_30_rows_do_not_leak_from_one_test_to_the_next(kit):
    """FAILURES 30: a second sandbox starts from what was there before the first."""
    await ready(kit)
    await pay(kit, 1)
    for _ in range(2):
        async with kit.block(sandbox(kit.db)):
            await pay(kit, 2)
            assert await amounts(kit) == [1, 2]
    assert await amounts(kit) == [1]


@twice
async def test_a_failed_part_is_undone_alone(kit):
    """A savepoint of the code under test that fails takes back its own work, and the rest is committed."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            with pytest.raises(ZeroDivisionError):
                async with kit.transaction(nested=True):
                    session.add(Payment(amount=2))
                    raise ZeroDivisionError
        assert await amounts(kit) == [1]


@twice
async def test_a_statement_that_fails_can_be_rolled_back(kit):
    """After an error of the server a session that had only read rolls back, and the sandbox goes on."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        await pay(kit, 1)
        async with kit.scope():
            with pytest.raises(Exception, match="nowhere"):
                await kit.done(kit.session().execute(text("SELECT * FROM nowhere")))
        assert await amounts(kit) == [1]
        async with kit.scope():
            await kit.done(kit.session().scalars(select(Payment)))
            await pay(kit, 2, new=True)
            with pytest.raises(Exception, match="nowhere"):
                await kit.done(kit.session().execute(text("SELECT * FROM nowhere")))
        assert 1 in await amounts(kit)


@twice
async def test_a_session_that_only_read_does_not_undo_what_others_saved_meanwhile(kit):
    """A scope or reader around committed work ends by rolling back, as ever, and the work stays committed."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.reader() as session:
            assert list(await kit.done(session.scalars(select(Payment.amount)))) == []
            await pay(kit, 1, new=True)
        async with kit.scope("a test"):
            assert list(await kit.done(kit.session().scalars(select(Payment.amount)))) == [1]
            async with kit.scope("a request"):
                await pay(kit, 2)
            await kit.done(kit.session().rollback())
            assert sorted(await kit.done(kit.session().scalars(select(Payment.amount)))) == [1, 2]
        assert await amounts(kit) == [1, 2]


@twice
async def test_nor_do_several_that_only_read_one_around_the_other(kit):
    """What was saved inside of the innermost reader is kept by the readers around it, too."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        for amount in (1, 2):
            async with kit.scope():
                await kit.done(kit.session().scalars(select(Payment)))
                async with kit.scope():
                    await kit.done(kit.session().scalars(select(Payment)))
                    await pay(kit, amount, new=True)
        assert await amounts(kit) == [1, 2]


@twice
async def test_a_released_savepoint_is_undone_with_its_transaction(kit):
    """A session whose only writes were in a savepoint has written, whatever others saved inside of it before."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.scope():
            session = kit.session()
            await kit.done(session.scalars(select(Payment)))
            await pay(kit, 1, new=True)
            savepoint = await kit.done(session.begin_nested())
            session.add(Payment(amount=2))
            await kit.done(savepoint.commit())
            await kit.done(session.rollback())
        assert 2 not in await amounts(kit)


@pytest.mark.parametrize("end", ["commit", "rollback"])
@twice
async def test_a_savepoint_that_saved_nothing_makes_no_writer(kit, end):
    """A session whose savepoint only read, or was rolled back, has only read: what others saved meanwhile stays."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.scope():
            session = kit.session()
            await kit.done(session.scalars(select(Payment)))
            savepoint = await kit.done(session.begin_nested())
            await kit.done(session.scalars(select(Payment)))
            if end == "rollback":
                session.add(Payment(amount=2))
                await kit.done(session.flush())
            await kit.done(getattr(savepoint, end)())
            other = kit.db.new_session()
            other.add(Payment(amount=1))
            await kit.done(other.commit())
            await kit.done(other.close())
            await kit.done(session.rollback())
        assert await amounts(kit) == [1]


@twice
async def test_a_block_after_a_read_stays_inside(kit):
    """A transaction adopts what its session read before without ending the sandbox's own."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.scope():
            await kit.done(kit.session().scalars(select(Payment)))
            await pay(kit, 1)
        assert await amounts(kit) == [1]
    assert await amounts(kit) == []


@twice
async def test_work_in_other_threads_and_tasks_is_undone(kit):
    """The sandbox holds whichever thread or task does the work, with or without a scope that it inherited."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        await kit.together(lambda: pay(kit, 1))
        async with kit.scope():
            await kit.done(kit.session().scalars(select(Payment)))
            await kit.together(lambda: pay(kit, 2, new=True))
        assert await amounts(kit) == [1, 2]
    assert await amounts(kit) == []


@twice
async def test_a_fan_out_runs_its_parts_one_at_a_time(kit):
    """Parts of a fan-out follow one another on the one connection, those of a caller in a transaction, too."""
    await ready(kit)

    async def part(amount):
        await pay(kit, amount)

    def sync_part(amount):
        with kit.db.transaction() as session:
            session.add(Payment(amount=amount))

    function = part if kit.db.is_async else sync_part
    async with kit.block(sandbox(kit.db)):
        await kit.done(kit.db.fan_out(function, range(3)))
        async with kit.reader() as session:
            await kit.done(session.scalars(select(Payment)))
            await kit.done(kit.db.fan_out(function, range(3, 6)))
        assert await amounts(kit) == [0, 1, 2, 3, 4, 5]


@twice
async def test_nested_scopes_need_no_second_connection_of_the_pool(kit):
    """The pool is not asked, so a pool of one refuses nothing that would pass with more."""
    db = kit.db
    await ready(kit)
    small = kit.memory() if db.engine.url.get_backend_name() == "sqlite" else db
    async with kit.block(sandbox(small)):
        async with kit.scope():
            await kit.done(kit.session(small).scalar(text("SELECT 1")))
            async with kit.scope():
                assert await kit.done(kit.session(small).scalar(text("SELECT 1"))) == 1


@twice
async def test_a_sandbox_inside_another_undoes_its_own_part(kit):
    """What several tests share is kept until the outer sandbox ends."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        await pay(kit, 1)
        for _ in range(2):
            async with kit.block(sandbox(kit.db)):
                await pay(kit, 2)
                assert await amounts(kit) == [1, 2]
        assert await amounts(kit) == [1]
        await pay(kit, 3)
        assert await amounts(kit) == [1, 3]
    assert await amounts(kit) == []


@twice
async def test_after_a_sandbox_inside_the_outer_one_watches_on(kit):
    """What is left open after the inner sandbox is found by the outer one."""
    await ready(kit)
    with pytest.raises(LeftOpenError, match="test outer ended, but a session outside of every scope holds"):
        async with kit.block(sandbox(kit.db, name="test outer")):
            async with kit.block(sandbox(kit.db, name="test inner")):
                await pay(kit, 1)
            await kit.done(kit.db.new_session().scalars(select(Payment)))
    assert await amounts(kit) == []


@twice
async def test_what_is_left_open_in_a_sandbox_inside_another_is_found_at_its_end(kit):
    """The inner sandbox finds what was left open in it, and the outer one goes on."""
    await ready(kit)
    async with kit.block(sandbox(kit.db, name="test outer")):
        await pay(kit, 1)
        with pytest.raises(LeftOpenError, match="test inner ended, but a session outside of every scope holds"):
            async with kit.block(sandbox(kit.db, name="test inner")):
                left = kit.db.new_session()
                left.add(Payment(amount=2))
                await kit.done(left.flush())
        assert not left.in_transaction()
        assert await amounts(kit) == [1]


@twice
async def test_a_transaction_from_before_cannot_end_in_a_sandbox_inside_another(kit):
    """Its commit would take the inner sandbox's own beginning along: it is refused, and both undo their parts."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        await pay(kit, 1)
        before = kit.db.new_session()
        before.add(Payment(amount=2))
        await kit.done(before.flush())
        async with kit.block(sandbox(kit.db)):
            await pay(kit, 3)
            with pytest.raises(dbscope.OverlapError):
                await kit.done(before.commit())
            await kit.done(before.close())
        assert await amounts(kit) == [1]
    assert await amounts(kit) == []


@twice
async def test_a_scope_around_the_sandbox_goes_on_with_another_session(kit):
    """A session that a scope from before first opened in the sandbox ends with it, and is not found afterwards."""
    await ready(kit)
    async with kit.scope():
        async with kit.block(sandbox(kit.db)):
            inside = kit.session()
            await pay(kit, 1)
        assert kit.session() is not inside
        assert (await kit.done(kit.session().scalars(select(Payment)))).all() == []


def test_an_engine_of_the_users_own_is_undone_too(tmp_path):
    """SQLite without a BEGIN of dbscope's (an Engine that the user made) is held in a transaction all the same."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(engine)
    with Database(engine) as db:
        with sandbox(db):
            with db.transaction() as session:
                session.add(Payment(amount=1))
        with db.reader() as session:
            assert session.scalars(select(Payment)).all() == []


def test_one_sandbox_for_several_databases(tmp_path):
    """The work of each database given is undone."""
    databases = [Database(f"sqlite:///{tmp_path / name}.db") for name in "ab"]
    for db in databases:
        Base.metadata.create_all(db.engine)
    with sandbox(*databases):
        with dbscope.scope(commit="on-success"):
            for db in databases:
                db.session.add(Payment())
    for db in databases:
        with db.reader() as session:
            assert session.scalars(select(Payment)).all() == []
        db.dispose()


async def test_one_sandbox_for_both_colours(tmp_path):
    """With `async with`, sync databases may be given beside async ones, in a sandbox inside another, too."""
    needs.module("aiosqlite", extra="aiosqlite")
    db, adb = (
        Database(f"sqlite:///{tmp_path / 'a.db'}"),
        dbscope.AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'b.db'}"),
    )
    for name in "ab":
        outside = create_engine(f"sqlite:///{tmp_path / name}.db")
        Base.metadata.create_all(outside)
        outside.dispose()  # its pool would keep the connection open
    async with sandbox(db, adb):
        async with dbscope.scope(commit="on-success"):
            db.session.add(Payment())
            adb.session.add(Payment())
        async with sandbox(db, adb):
            with db.reader() as session:
                assert len(session.scalars(select(Payment)).all()) == 1
    with db.reader() as session:
        assert session.scalars(select(Payment)).all() == []
    async with adb.reader() as session:
        assert (await session.scalars(select(Payment))).all() == []
    db.dispose()
    await adb.dispose()


@twice
async def test_a_sandbox_that_cannot_begin_leaves_everything_as_it_was(kit, tmp_path):
    """Where the second database is locked, the first is out of the sandbox again, and no connection is kept."""
    await ready(kit)
    path = tmp_path / "locked.db"
    locked = kit.file(path, connect_args={"timeout": 0})
    async with kit.reader(locked) as session:
        await kit.done(session.scalars(select(Payment)))  # it has a connection, which is not what fails
    outside = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    async with kit.scope():
        before = kit.session()
        with outside.connect() as holder:
            holder.exec_driver_sql("BEGIN IMMEDIATE")
            with pytest.raises(OperationalError) as refused:  # whose traceback keeps what the sandbox forgot
                async with kit.block(sandbox(kit.db, locked)):
                    pytest.fail("it began")
        assert "locked" in str(refused.value)
        assert kit.session() is before
        assert kit.checked_out() == kit.checked_out(locked) == 0
    await pay(kit, 1)
    assert await amounts(kit) == [1]


@pytest.mark.parametrize("kind", ["aiosqlite", pytest.param("asyncpg", marks=pytest.mark.postgres)])
def test_each_test_may_have_a_loop_of_its_own(kind, request, tmp_path):
    """The connection does not go back to the pool, so that one database serves tests that have a loop each."""
    needs.module(kind, extra=kind)
    server = kind == "asyncpg"
    url = request.getfixturevalue("postgres_url") if server else f"sqlite:///{tmp_path / 'test.db'}"
    kit = make_kit("async", url)
    db = kit.db

    async def one_test():
        async with sandbox(db):
            await pay(kit, 1)
            assert await amounts(kit) == [1]
        assert kit.checked_out() == 0

    for _ in range(2):
        asyncio.run(one_test())
    asyncio.run(kit.aclose())


# -- side by side ----------------------------------------------------------------------------------------------------


@twice
async def test_two_that_write_side_by_side_are_refused_by_name(kit):
    """Where the work of two would undo each other's on the one connection, the error names both and the way out."""
    await ready(kit)
    first, second = kit.event(), kit.event()

    async def outer():
        async with kit.scope("import"), kit.transaction() as session:
            session.add(Payment(amount=1))
            await kit.done(session.flush())
            first.set()
            await second.wait()

    async def inner():
        await first.wait()
        async with kit.scope("report"):
            session = kit.session()
            session.add(Payment(amount=2))
            await kit.done(session.flush())
            second.set()
            await ended.wait()
            for use in (lambda: session.scalars(select(Payment)), session.commit):
                with pytest.raises(dbscope.OverlapError, match="scope 'import'"):
                    await kit.done(use())
            await kit.done(session.rollback())

    ended = kit.event()

    async def outer_and_tell():
        try:
            await outer()
        finally:
            ended.set()

    async with kit.block(sandbox(kit.db, name="test a")):
        await pay(kit, 3)
        error, none = await kit.together(outer_and_tell, inner)
        assert none is None
        assert isinstance(error, dbscope.OverlapError)
        for word in ("scope 'import'", "scope 'report'", "the sandbox of test a", "database of their own"):
            assert word in str(error)
        assert await amounts(kit) == [3]


@twice
async def test_an_older_writer_that_goes_on_is_refused_where_it_writes(kit):
    """Where the younger of two that have written is in the middle, the older one's next write is the line refused."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        older, younger = kit.db.new_session(), kit.db.new_session()
        for session in (older, younger):
            await kit.done(session.execute(insert(Payment).values(amount=1)))
        with pytest.raises(dbscope.OverlapError, match="in the middle of a transaction that has written"):
            await kit.done(older.execute(insert(Payment).values(amount=2)))
        for session in (younger, older):
            await kit.done(session.close())
        assert await amounts(kit) == []


def test_two_threads_at_the_same_moment_are_refused_by_name(sync_kit):
    """The one connection serves one thread at a time, whosever session it is: the second is told who uses it."""
    reading, told = threading.Event(), threading.Event()
    with sandbox(sync_kit.db, name="test a"):
        one, other = sync_kit.db.new_session(), sync_kit.db.new_session()

        @event.listens_for(one, "do_orm_execute")
        def wait(_):
            reading.set()
            assert told.wait(LIMIT)

        with ThreadPoolExecutor(1, thread_name_prefix="first") as threads:
            first = threads.submit(one.scalars, select(Payment))
            assert reading.wait(LIMIT)
            try:
                with pytest.raises(dbscope.OverlapError, match=r"first_0' is using the one connection of .* of test a"):
                    other.scalars(select(Payment))
            finally:
                told.set()
            assert first.result().all() == []
        one.close()
        assert other.scalars(select(Payment)).all() == []
        other.close()


def test_what_is_done_with_the_connection_itself_counts_as_a_write(sync_kit):
    """Who asked for `session.connection()` may have written where nobody sees it: its rollback undoes that."""
    with sandbox(sync_kit.db):
        session, other = sync_kit.db.new_session(), sync_kit.db.new_session()
        session.connection().connection.cursor().execute("INSERT INTO payments (amount) VALUES (1)")
        other.add(Payment(amount=2))
        other.commit()
        session.rollback()
        assert 1 not in session.scalars(select(Payment.amount)).all()
        for each in (other, session):
            each.close()


@twice
async def test_one_may_write_inside_of_another(kit):
    """A session that writes and commits while another has written is through, and that one goes on and commits."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.transaction() as outer:
            outer.add(Payment(amount=1))
            await kit.done(outer.flush())
            inner = kit.db.new_session()
            inner.add(Payment(amount=2))
            await kit.done(inner.commit())
            await kit.done(inner.close())
            outer.add(Payment(amount=3))
        assert await amounts(kit) == [1, 2, 3]


@twice
async def test_those_that_only_read_are_in_nobodys_way(kit):
    """Readers may end in any order, and around a writer."""
    await ready(kit)
    wrote, began, saved = kit.event(), kit.event(), kit.event()

    async def writer():
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            await kit.done(session.flush())
            wrote.set()
            await began.wait()
        saved.set()

    async def reader():
        await wrote.wait()
        async with kit.scope():
            session = kit.session()
            await kit.done(session.scalars(select(Payment)))
            began.set()
            await saved.wait()
            assert list(await kit.done(session.scalars(select(Payment.amount)))) == [1]
            await kit.done(session.rollback())

    async with kit.block(sandbox(kit.db)):
        assert await kit.together(writer, reader) == [None, None]
        assert await amounts(kit) == [1]


@twice
async def test_a_reader_may_end_before_the_writer_that_began_after_it(kit):
    """The older of two ends first, having only read, and the younger one's work is kept."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        reader = kit.db.new_session()
        await kit.done(reader.scalars(select(Payment)))
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            await kit.done(session.flush())
            await kit.done(reader.rollback())
            await kit.done(reader.close())
        assert await amounts(kit) == [1]


@twice
async def test_a_savepoint_may_outlast_a_reader_that_began_before_it(kit):
    """A savepoint that is begun while another session reads is released after that one has ended."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.transaction() as session:
            await kit.done(session.scalars(select(Payment)))
            reader = kit.db.new_session()
            await kit.done(reader.scalars(select(Payment)))
            async with kit.transaction(nested=True):
                session.add(Payment(amount=1))
                await kit.done(session.flush())
                await kit.done(reader.rollback())
                await kit.done(reader.close())
            assert list(await kit.done(session.scalars(select(Payment.amount)))) == [1]
        assert await amounts(kit) == [1]


@twice
async def test_a_write_is_never_lost_with_a_reader_that_began_later(kit):
    """What the older session writes is not undone when the younger one, which had only read until then, rolls back."""
    await ready(kit)
    async with kit.block(sandbox(kit.db)):
        async with kit.scope():
            await kit.done(kit.session().scalars(select(Payment)))
            outside = kit.db.new_session()
            await kit.done(outside.scalars(select(Payment)))
            kit.session().add(Payment(amount=1))
            await kit.done(kit.session().flush())
            with pytest.raises(dbscope.OverlapError, match="which has gone on since"):
                await kit.done(outside.execute(text("UPDATE payments SET amount = 2")))
            await kit.done(outside.rollback())
            await kit.done(outside.close())
            await kit.done(kit.session().commit())
        assert await amounts(kit) == [1]


# -- the sandbox's own transaction -----------------------------------------------------------------------------------


@twice
@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK"])
async def test_sql_that_would_end_the_sandbox_is_refused(kit, sql):
    """Transaction control as text, which a plain scope allows, would end the test's transaction."""
    await ready(kit)
    async with kit.block(sandbox(kit.db, name="test a")):
        async with kit.scope():
            with pytest.raises(dbscope.NotTheOwnerError, match=f"'{sql}' was called .*the sandbox of test a"):
                await kit.done(kit.session().execute(text(sql)))


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
def test_the_connection_is_not_to_be_ended_by_anybody(sync_kit, method):
    """`session.connection().commit()` and its like would end the test's transaction."""
    with sandbox(sync_kit.db), dbscope.scope():
        with pytest.raises(dbscope.NotTheOwnerError, match="whose transaction ends with the test"):
            getattr(sync_kit.session().connection(), method)()
        sync_kit.session().add(Payment(amount=1))
        sync_kit.session().commit()  # the sandbox goes on
    assert sync_kit.count() == 0


@pytest.mark.parametrize("method", ["commit", "rollback"])
def test_the_connections_transaction_is_not_to_be_ended_either(sync_kit, method):
    """Nor by the transaction object of the connection."""
    with sandbox(sync_kit.db), dbscope.scope():
        with pytest.raises(dbscope.NotTheOwnerError, match="whose transaction ends with the test"):
            getattr(sync_kit.session().connection().get_transaction(), method)()


def test_a_lost_connection_is_explained(sync_kit):
    """When the one connection is gone, so is all the test did: the next use says so."""
    with sandbox(sync_kit.db, name="test a"):
        with dbscope.scope():
            sync_kit.session().connection().invalidate()
            sync_kit.session().close()
        with dbscope.scope(), pytest.raises(dbscope.ScopeEndedError, match="the sandbox of test a has lost"):
            sync_kit.session().scalars(select(Payment))


# -- left open -------------------------------------------------------------------------------------------------------


@twice
async def test_a_scope_left_open_fails_the_test(kit):
    """A scope that the test opened and did not leave is named with its line, ended, and current for nobody."""
    await ready(kit)
    with pytest.raises(
        LeftOpenError, match=r"(?s)test a ended, but scope 'job' \(opened at .*\d\) is still open"
    ) as found:
        async with kit.block(sandbox(kit.db, name="test a")):
            job = kit.scope("job")
            await job.__aenter__()
            await kit.done(kit.session().scalars(select(Payment)))
    assert str(found.value).count("scope 'job'") == 1
    assert dbscope.current_scope() is None


@twice
async def test_a_connection_left_open_fails_the_test(kit):
    """A session in the middle of a transaction is named with the line that began it, and closed."""
    await ready(kit)
    with pytest.raises(LeftOpenError, match=r"a session outside of every scope holds a connection of .* since .*py:\d"):
        async with kit.block(sandbox(kit.db, name="test a")):
            session = kit.db.new_session()
            await kit.done(session.scalars(select(Payment)))
    assert not session.in_transaction()
    assert await amounts(kit) == []


@twice
async def test_a_scope_of_another_thread_or_task_left_open_fails_the_test(kit):
    """Work that the test began and did not wait for is found, although it is in no scope of the test's."""
    await ready(kit)
    if not kit.db.is_async:
        going, go, errors = threading.Event(), threading.Event(), []

        def job():
            with dbscope.scope("job"):
                kit.session()
                going.set()
                go.wait(30)
                try:
                    kit.session().scalars(select(Payment))
                except dbscope.ScopeEndedError as error:
                    errors.append(str(error))

        with pytest.raises(LeftOpenError, match=r"test a ended, but scope 'job' \(opened at .*\) is still open"):
            with sandbox(kit.db, name="test a"):
                thread = threading.Thread(target=job, name="late")
                thread.start()
                going.wait(30)
        go.set()
        thread.join()
    else:
        going, go, errors = asyncio.Event(), asyncio.Event(), []

        async def ajob():
            async with dbscope.scope("job"):
                kit.session()
                going.set()
                await go.wait()
                try:
                    await kit.session().scalars(select(Payment))
                except dbscope.ScopeEndedError as error:
                    errors.append(str(error))

        with pytest.raises(LeftOpenError, match=r"test a ended, but scope 'job' \(opened at .*\) is still open"):
            async with sandbox(kit.db, name="test a"):
                task = asyncio.create_task(ajob(), name="late")
                await going.wait()
        go.set()
        await task
    assert len(errors) == 1
    assert "'late'" in errors[0]
    assert "but test a ended" in errors[0]


@twice
async def test_failure_30_a_session_used_after_its_test_says_which_test(kit):
    """FAILURES 30: work that outlives its test gets an error that names the test, and clean-up stays harmless."""
    await ready(kit)
    with pytest.raises(LeftOpenError):
        async with kit.block(sandbox(kit.db, name="test a")):
            session = kit.db.new_session()
            await kit.done(session.scalars(select(Payment)))
    with pytest.raises(dbscope.ScopeEndedError, match="but test a ended"):
        await kit.done(session.scalars(select(Payment)))
    await kit.done(session.rollback())
    await kit.done(session.commit())
    await kit.done(session.close())


def test_a_connection_of_the_engine_left_open_fails_the_test(sync_kit):
    """What was taken from the pool past dbscope is counted."""
    with pytest.raises(LeftOpenError, match=r"1 connection taken from the engine of .* is still checked out"):
        with sandbox(sync_kit.db):
            connection = sync_kit.db.engine.connect()
    connection.close()


@twice
async def test_scopes_that_were_there_before_are_not_the_tests(kit):
    """A scope around the sandbox may read in it; its session there ends with the sandbox, and it goes on."""
    await ready(kit)
    async with kit.scope():
        before = kit.session()
        async with kit.block(sandbox(kit.db)):
            assert kit.session() is not before
            await kit.done(kit.session().scalars(select(Payment)))
        assert kit.session() is before


@twice
async def test_what_a_scope_from_before_did_not_commit_is_reported(kit, tmp_path):
    """A scope around the sandbox that wrote in it, and did not commit, hears of it at the sandbox's end."""
    db = kit.file(tmp_path / "other.db", uncommitted="raise")
    async with kit.scope("a fixture"):
        with pytest.raises(dbscope.UncommittedWritesError, match="scope 'a fixture'"):
            async with kit.block(sandbox(db)):
                kit.session(db).add(Payment(amount=1))
                await kit.done(kit.session(db).flush())


@twice
async def test_a_session_that_holds_a_connection_before_is_refused(kit):
    """Its work would not be undone, and on SQLite would wait for the sandbox: the error says where it began."""
    await ready(kit)
    async with kit.scope("set-up"):
        await kit.done(kit.session().scalars(select(Payment)))
        with pytest.raises(
            dbscope.ScopeMisuseError, match=r"(?s)session of scope 'set-up' .* holds .*py:\d+.*inside of"
        ):
            async with kit.block(sandbox(kit.db)):
                pass
        await kit.done(kit.session().rollback())
    assert kit.checked_out() == 0


def test_the_threads_implicit_scope_is_no_leak_but_its_writes_are_reported(sync_kit):
    """The implicit scope lasts as long as its thread; its session goes with the test, with the usual warning."""
    box = sandbox(sync_kit.db)
    box.__enter__()
    sync_kit.db.session.add(Payment())
    sync_kit.db.session.flush()
    with pytest.warns(dbscope.UncommittedWrites, match="the first at tests/test_testing.py"):
        box.__exit__(None, None, None)
    with sandbox(sync_kit.db):
        assert sync_kit.db.session.scalars(select(Payment)).all() == []


@twice
async def test_the_tests_own_error_stays_on_top(kit):
    """What was left open is a note on the error that the test failed with."""
    await ready(kit)
    with pytest.raises(ZeroDivisionError) as failed:
        async with kit.block(sandbox(kit.db, name="test a")):
            session = kit.db.new_session()
            await kit.done(session.scalars(select(Payment)))
            raise ZeroDivisionError
    assert "test a ended, but a session outside of every scope" in failed.value.__notes__[0]
    assert await amounts(kit) == []


# -- hooks -----------------------------------------------------------------------------------------------------------


@twice
async def test_hooks_run_as_in_production(kit):
    """Without capturing, a hook runs when the outermost transaction of the code under test has ended well."""
    await ready(kit)
    ran = []
    async with kit.block(sandbox(kit.db)):
        async with kit.transaction():
            kit.db.on_commit(ran.append, "kept")
            with pytest.raises(ZeroDivisionError):
                async with kit.transaction(nested=True):
                    kit.db.on_commit(ran.append, "dropped")
                    raise ZeroDivisionError
            assert ran == []
        assert ran == ["kept"]
        with pytest.raises(ZeroDivisionError):
            async with kit.transaction():
                kit.db.on_commit(ran.append, "dropped")
                raise ZeroDivisionError
    assert ran == ["kept"]


@twice
async def test_captured_hooks_are_kept_instead_of_called(kit):
    """Capturing gives the hooks of what was committed, with their arguments, in order; the rest is dropped."""
    await ready(kit)
    ran = []
    async with kit.block(sandbox(kit.db)):
        async with kit.block(capture_on_commit(kit.db)) as hooks:
            async with kit.transaction():
                kit.db.on_commit(ran.append, 1)
                assert hooks == []
            with pytest.raises(ZeroDivisionError):
                async with kit.transaction():
                    kit.db.on_commit(ran.append, 2)
                    raise ZeroDivisionError
            kit.db.on_commit(ran.append, 3)
        assert [(hook.function, hook.args, hook.kwargs) for hook in hooks] == [(ran.append, (i,), {}) for i in (1, 3)]
        assert ran == []
        await kit.done(hooks[0]())
        assert ran == [1]
        async with kit.transaction():
            kit.db.on_commit(ran.append, 4)
        assert ran == [1, 4]


@twice
async def test_captured_hooks_are_executed_on_request(kit):
    """With execute=True they are called when the block ends well, and so are those that they give."""
    await ready(kit)
    ran = []

    def hook():
        ran.append("hook")
        kit.db.on_commit(ran.append, "its own")

    async with kit.block(capture_on_commit(kit.db, execute=True)) as hooks:
        async with kit.transaction():
            kit.db.on_commit(hook)
        assert ran == []
    assert ran == ["hook", "its own"]
    assert len(hooks) == 2
    with pytest.raises(ZeroDivisionError):
        async with kit.block(capture_on_commit(kit.db, execute=True)):
            kit.db.on_commit(hook)
            raise ZeroDivisionError
    assert len(ran) == 2


async def test_captured_coroutine_functions_are_awaited(async_kit):
    """Hooks that are coroutine functions are executed by `async with`, and `with` says so."""
    ran = []

    async def hook():
        ran.append(1)

    async with capture_on_commit(async_kit.db, execute=True):
        async with async_kit.db.transaction():
            async_kit.db.on_commit(hook)
    assert ran == [1]
    with pytest.raises(dbscope.ConfigurationError, match="async with capture_on_commit"):
        with capture_on_commit(async_kit.db, execute=True):
            async_kit.db.on_commit(hook)


def test_a_hook_given_while_capturing_and_due_afterwards_runs(sync_kit):
    """The block captures what is committed in it; a transaction around it runs its hooks as ever."""
    ran = []
    with sync_kit.db.transaction():
        with capture_on_commit(sync_kit.db) as hooks:
            sync_kit.db.on_commit(ran.append, 1)
        assert hooks == []
    assert ran == [1]


def test_a_captured_hook_can_be_read():
    """Its repr names the function and the arguments."""
    assert repr(CapturedHook(print, print, (1,), {"end": ""})).endswith("(1,) {'end': ''}>")


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(tmp_path):
    """What cannot be a sandbox is refused at once, with what to do."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    other = create_engine("sqlite://")
    with pytest.raises(dbscope.ConfigurationError, match="at least one database"):
        sandbox()
    with pytest.raises(dbscope.ConfigurationError, match="at least one database"):
        capture_on_commit()
    with pytest.raises(dbscope.ConfigurationError, match="takes a Database or an AsyncDatabase, not Engine"):
        sandbox(engine)
    with pytest.raises(dbscope.ConfigurationError, match="Make a Database for each engine"):
        sandbox(Database(sessionmaker(engine, binds={Account: other})))
    with Database(sessionmaker(engine, binds={Account: engine})) as db:
        box = sandbox(db)
        with box, dbscope.scope():
            Base.metadata.create_all(db.session.connection())
            assert db.session.scalars(select(Account)).all() == []
            db.session.rollback()
        with pytest.raises(dbscope.ScopeMisuseError, match="Make one for each test"):
            box.__enter__()


async def test_an_async_database_needs_async_with(async_kit):
    """A sandbox of an async database that is entered with `with` says what to write."""
    with pytest.raises(dbscope.ConfigurationError, match="async with sandbox"):
        with sandbox(async_kit.db):
            pass
