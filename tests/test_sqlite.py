"""SQLite: a BEGIN of our own, sane settings, databases in memory. DESIGN's Transactions 10."""

import contextvars
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from dbscope import Database, NotTheOwnerError, SelfBlockedError, scope
from tests.support.kits import Base, Kit, Payment, SyncKit, twice
from tests.support.lines import marked

ALL = select(Payment.amount).order_by(Payment.amount)


def write(amount: int) -> Any:
    """An INSERT that goes to the database at once."""
    return insert(Payment).values(amount=amount)


def traced(db: Any) -> list[str]:
    """What the driver is told from now on."""
    seen: list[str] = []

    @event.listens_for(db.engine, "checkout")
    def trace(connection: Any, record: object, proxy: object) -> None:
        connection.set_trace_callback(lambda sql: seen.append(" ".join(sql.split()[:2])))

    return seen


# -- which BEGIN -------------------------------------------------------------------------------------------------------


def test_transactions_10_a_transaction_begins_immediate(sync_kit: SyncKit) -> None:
    """`transaction()` takes the write lock with its first statement, a read too, and sends one BEGIN."""
    seen = traced(sync_kit.db)
    with sync_kit.db.transaction() as session:
        assert seen == []
        session.execute(ALL)
        session.execute(write(1))
    assert seen == ["BEGIN IMMEDIATE", "SELECT payments.amount", "INSERT INTO", "COMMIT"]


@pytest.mark.parametrize(("writes", "begin"), [(True, "BEGIN IMMEDIATE"), (False, "BEGIN")])
def test_transactions_10_an_on_success_scope_says_if_it_writes(sync_kit: SyncKit, writes: bool, begin: str) -> None:
    """An on-success scope takes the write lock, too, unless it was opened with `writes=False`."""
    seen = traced(sync_kit.db)
    with scope(commit="on-success", writes=writes):
        sync_kit.db.session.execute(ALL)
    assert seen[0] == begin
    with scope(commit="on-success", writes=False):
        sync_kit.db.session.execute(write(1))
    assert sync_kit.amounts() == [1]


def test_transactions_10_readers_and_plain_scopes_are_deferred(sync_kit: SyncKit) -> None:
    """Readers, and plain scopes that read first, take no write lock."""
    seen = traced(sync_kit.db)
    with sync_kit.db.reader() as session:
        session.execute(ALL)
    with scope():
        sync_kit.db.session.execute(ALL)
    assert seen == ["BEGIN", "SELECT payments.amount", "ROLLBACK"] * 2


@pytest.mark.parametrize("how", ["core", "flush"])
def test_transactions_10_a_plain_scope_that_writes_first_takes_the_lock(sync_kit: SyncKit, how: str) -> None:
    """A plain scope whose first statement writes begins with the write lock."""
    seen = traced(sync_kit.db)
    with scope():
        if how == "core":
            sync_kit.db.session.execute(write(1))
        else:
            sync_kit.db.session.add(Payment(amount=1))
        sync_kit.db.session.commit()
    assert seen == ["BEGIN IMMEDIATE", "INSERT INTO", "COMMIT"]


def test_transactions_10_a_block_after_a_read_begins_anew(sync_kit: SyncKit) -> None:
    """FAILURES 32: a block on a session that read ends the read transaction, and takes the write lock."""
    seen = traced(sync_kit.db)
    with scope():
        sync_kit.db.session.execute(ALL)
        with sync_kit.db.transaction() as session:
            session.execute(write(1))
    assert seen == ["BEGIN", "SELECT payments.amount", "COMMIT", "BEGIN IMMEDIATE", "INSERT INTO", "COMMIT"]


def test_transactions_10_a_savepoint_comes_first(sync_kit: SyncKit) -> None:
    """FAILURES 33: a savepoint as the first statement is one inside of a transaction, and can be rolled back alone."""
    seen = traced(sync_kit.db)
    with scope():
        session = sync_kit.db.session()
        session.begin_nested()
        session.execute(write(1))
        session.get_nested_transaction().rollback()
        session.execute(write(2))
        session.commit()
    assert seen[0] == "BEGIN"
    assert sync_kit.amounts() == [2]


def test_transactions_10_a_transaction_that_begins_with_a_savepoint_begins_immediate(sync_kit: SyncKit) -> None:
    """`transaction()` takes the write lock with a savepoint, too."""
    seen = traced(sync_kit.db)
    with sync_kit.db.transaction(), sync_kit.db.transaction(nested=True) as session:
        session.execute(ALL)
    assert seen[:2] == ["BEGIN IMMEDIATE", "SAVEPOINT sa_savepoint_1"]


def test_transactions_10_users_of_the_engine_get_the_same_begin(sync_kit: SyncKit) -> None:
    """Code that uses `db.engine.begin()` beside the sessions gets consistent transactions, too."""
    seen = traced(sync_kit.db)
    with sync_kit.db.engine.begin() as connection:
        connection.execute(ALL)
    with sync_kit.db.engine.begin() as connection:
        connection.execute(write(1))
    assert [sql for sql in seen if "BEGIN" in sql] == ["BEGIN", "BEGIN IMMEDIATE"]
    with pytest.raises(KeyError), sync_kit.db.engine.begin() as connection:
        connection.execute(write(2))
        raise KeyError
    assert sync_kit.amounts() == [1]


# -- what it is for ----------------------------------------------------------------------------------------------------


@twice
async def test_failure_33_reads_of_one_transaction_agree(kit: Kit) -> None:
    """FAILURES 33: two SELECTs of one transaction see the same data, whoever commits in between."""
    async with kit.scope():
        session = kit.session()
        assert list((await kit.done(session.execute(ALL))).scalars()) == []
        with kit.outside.begin() as other:
            other.execute(write(1))
        assert list((await kit.done(session.execute(ALL))).scalars()) == []
        await kit.done(session.rollback())
        assert list((await kit.done(session.execute(ALL))).scalars()) == [1]


@twice
async def test_transactions_10_an_upgrade_that_fails_names_the_read(kit: Kit) -> None:
    """Where a plain scope read, another wrote, and it writes, "database is locked" says which read came first."""
    with pytest.raises(OperationalError, match="locked") as caught:
        async with kit.scope():
            session = kit.session()
            await kit.done(session.execute(ALL))  # the first read
            with kit.outside.begin() as other:
                other.execute(write(1))
            await kit.done(session.execute(write(2)))
    notes = "\n".join(caught.value.__notes__)
    assert marked("the first read") in notes
    assert "db.transaction()" in notes
    assert kit.amounts() == [1]
    assert kit.checked_out() == 0


def test_transactions_10_an_upgrade_that_fails_in_an_on_success_scope_does_too(sync_kit: SyncKit) -> None:
    """An on-success scope with `writes=False` that writes all the same is told of its read, too."""
    with pytest.raises(OperationalError, match="locked") as caught:
        with scope(commit="on-success", writes=False):
            sync_kit.db.session.execute(ALL)  # its read
            with sync_kit.outside.begin() as other:
                other.execute(write(1))
            sync_kit.db.session.execute(write(2))
    assert marked("its read") in "\n".join(caught.value.__notes__)


@pytest.mark.parametrize("how", ["a write", "a block", "another error", "the next transaction"])
def test_transactions_10_other_errors_are_not_taken_for_it(sync_kit: SyncKit, how: str) -> None:
    """A lock that was waited for in vain, and an error of another kind after a read, do not blame the read."""
    db = sync_kit.database(connect_args={"timeout": 0})
    with scope():
        db.session.execute(ALL)  # it has a connection: to make one takes the lock, too
        db.session.rollback()
        with pytest.raises(OperationalError) as caught, sync_kit.outside.begin() as other:
            other.execute(write(1))
            if how == "a write":
                db.session.execute(write(2))
            elif how == "a block":
                with db.transaction() as session:
                    session.execute(ALL)
            elif how == "another error":
                db.session.execute(ALL)
                db.session.execute(text("SELECT nonsense FROM payments"))
            else:
                db.session.execute(text("VACUUM"))
        db.session.rollback()
    assert ("nonsense" if how == "another error" else "locked") in str(caught.value)
    assert not any("began by reading" in note for note in getattr(caught.value, "__notes__", ()))


def test_transactions_10_a_reader_inside_of_a_writer_is_in_nobodys_way(sync_kit: SyncKit) -> None:
    """What only reads, in a scope inside of the one that writes, needs no lock, and sees what was there before."""
    with sync_kit.db.transaction() as session:
        session.execute(write(1))
        with scope(), sync_kit.db.reader() as reader:
            assert reader.scalars(ALL).all() == []


def test_transactions_10_writers_wait_for_each_other(sync_kit: SyncKit) -> None:
    """A second `transaction()` waits for the first one's end, instead of failing."""
    db = sync_kit.db
    trying = threading.Event()
    failures: list[BaseException] = []

    @event.listens_for(db.engine, "checkout")
    def checked_out(*_: Any) -> None:
        if threading.current_thread() is second:
            trying.set()

    def work() -> None:
        try:
            with db.transaction() as session:
                session.execute(ALL)
                session.execute(write(2))
        except BaseException as error:
            failures.append(error)

    second = threading.Thread(target=contextvars.Context().run, args=(work,))
    with db.transaction() as session:
        session.execute(write(1))
        second.start()
        assert trying.wait(30)
    second.join()
    assert failures == []
    assert sync_kit.amounts() == [1, 2]


@pytest.mark.parametrize("how", ["flush", "core", "read"])
@twice
async def test_transactions_10_an_independent_transaction_on_the_same_file_is_refused(kit: Kit, how: str) -> None:
    """Where the outer holds the one write lock, `new=True` on the same file is refused at once, naming the line."""
    async with kit.transaction() as outer:
        await kit.done(outer.execute(write(1)))  # the write lock
        with pytest.raises(SelfBlockedError) as caught:
            async with kit.transaction(new=True) as inner:
                if how == "flush":
                    inner.add(Payment(amount=2))
                else:
                    await kit.done(inner.execute(write(2) if how == "core" else ALL))
        assert marked("the write lock") in str(caught.value)
        assert "Waiting could never end" in str(caught.value)
        assert "on_commit" in str(caught.value)
        outer.add(Payment(amount=3))
    assert kit.amounts() == [1, 3]


@twice
async def test_transactions_10_so_is_any_writing_scope_inside(kit: Kit) -> None:
    """A plain scope inside that writes would wait for the same lock, and is refused; one that reads is not."""
    async with kit.transaction() as outer:
        await kit.done(outer.execute(ALL))  # takes the lock as well
        async with kit.scope():
            assert list((await kit.done(kit.session().execute(ALL))).scalars()) == []
            with pytest.raises(SelfBlockedError):
                await kit.done(kit.session().execute(write(2)))
        outer.add(Payment(amount=3))
    assert kit.amounts() == [3]


@twice
async def test_transactions_10_so_is_a_block_that_adopts_what_was_read(kit: Kit) -> None:
    """A plain scope inside that has read and then opens a block is refused at once, and can go on reading."""
    kit.database(connect_args={"timeout": 0})
    async with kit.transaction() as outer:
        await kit.done(outer.execute(write(1)))
        async with kit.scope():
            await kit.done(kit.session().execute(ALL))
            with pytest.raises(SelfBlockedError):
                async with kit.transaction():
                    pass
            assert list((await kit.done(kit.session().execute(ALL))).scalars()) == []
    assert kit.amounts() == [1]


@twice
async def test_transactions_2_a_block_that_began_anew_is_its_owners_alone(kit: Kit) -> None:
    """Where a block took over what was read, and began a writing transaction, a helper's commit is refused as ever."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.execute(ALL))
        async with kit.transaction():
            await kit.done(session.execute(write(1)))
            with pytest.raises(NotTheOwnerError):
                await kit.done(session.commit())
            assert kit.amounts() == []
    assert kit.amounts() == [1]


@twice
async def test_transactions_10_a_block_that_could_not_begin_anew_owns_nothing(kit: Kit) -> None:
    """Where it did not get the write lock, the session is its scope's again, and commits when the lock is free."""
    kit.database(connect_args={"timeout": 0})
    async with kit.scope():
        session = kit.session()
        await kit.done(session.execute(ALL))
        with kit.outside.begin() as other:
            other.execute(write(1))
            with pytest.raises(OperationalError, match="locked"):
                async with kit.transaction():
                    raise AssertionError("never entered")
        await kit.done(session.rollback())
        await kit.done(session.execute(write(2)))
        await kit.done(session.commit())
    assert kit.amounts() == [1, 2]


@twice
async def test_transactions_10_a_write_that_is_committed_holds_no_lock(kit: Kit) -> None:
    """A plain scope that wrote, committed and reads again is in nobody's way: what is inside of it may write."""
    async with kit.scope():
        await kit.done(kit.session().execute(write(1)))
        await kit.done(kit.session().commit())
        await kit.done(kit.session().execute(ALL))
        async with kit.transaction(new=True) as inner:
            await kit.done(inner.execute(write(2)))
    assert kit.amounts() == [1, 2]


@twice
async def test_transactions_10_a_savepoint_undone_gives_no_lock_back(kit: Kit) -> None:
    """SQLite keeps the write lock when the savepoint is rolled back in which it was taken: still refused at once."""
    kit.database(connect_args={"timeout": 0})
    async with kit.scope():
        savepoint = await kit.done(kit.session().begin_nested())
        await kit.done(kit.session().execute(write(1)))
        await kit.done(savepoint.rollback())
        with pytest.raises(SelfBlockedError):
            async with kit.transaction(new=True) as inner:
                await kit.done(inner.execute(write(2)))
        await kit.done(kit.session().rollback())
        async with kit.transaction(new=True) as inner:
            await kit.done(inner.execute(write(3)))
    assert kit.amounts() == [3]


@pytest.mark.parametrize("handed_over", ["the outer's write", "the inner's write"])
@twice
async def test_transactions_10_work_that_was_handed_over_is_still_the_blocks(kit: Kit, handed_over: str) -> None:
    """Refused at once also where one of the two writes was made by a thread or task that its block waited for."""
    kit.database(connect_args={"timeout": 0})

    async def send(session: Any, amount: int) -> None:
        await kit.done(session.execute(write(amount)))

    async with kit.transaction() as outer:
        [failure] = [None] if handed_over == "the inner's write" else await kit.together(lambda: send(outer, 1))
        assert failure is None
        if handed_over == "the inner's write":
            await send(outer, 1)
            async with kit.transaction(new=True) as inner:
                [failure] = await kit.together(lambda: send(inner, 2))
        else:
            with pytest.raises(SelfBlockedError) as caught:
                async with kit.transaction(new=True) as inner:
                    await send(inner, 2)
            failure = caught.value
    assert isinstance(failure, SelfBlockedError)
    assert kit.amounts() == [1]


@twice
async def test_transactions_10_who_wrote_and_is_over_gives_no_lock_back(kit: Kit) -> None:
    """The write of a plain scope's thread or task that has ended stays open: refused at once, it would not go on."""
    kit.database(connect_args={"timeout": 0})
    async with kit.scope():
        session = kit.session()

        async def send() -> None:
            await kit.done(session.execute(write(1)))

        assert await kit.together(send) == [None]
        with pytest.raises(SelfBlockedError):
            async with kit.transaction(new=True) as inner:
                await kit.done(inner.execute(write(2)))
        await kit.done(session.commit())
    assert kit.amounts() == [1]


def test_transactions_10_an_engine_of_the_users_is_protected_too(sync_kit: SyncKit) -> None:
    """On an engine that the user made, where BEGIN is the driver's, the second writer is refused as well."""
    engine = create_engine(sync_kit.url)
    Base.metadata.create_all(engine)
    db = Database(engine)
    with db.transaction() as outer:
        outer.execute(write(1))
        with pytest.raises(SelfBlockedError):
            with db.transaction(new=True) as inner:
                inner.execute(write(2))
        with pytest.raises(SelfBlockedError):
            with db.transaction(new=True) as inner:
                inner.add(Payment(amount=2))
    assert sync_kit.amounts() == [1]
    db.dispose()


@twice
async def test_transactions_10_an_outer_that_only_read_blocks_nobody(kit: Kit) -> None:
    """Where the outer holds no write lock, an independent transaction commits."""
    async with kit.scope():
        await kit.done(kit.session().execute(ALL))
        async with kit.transaction(new=True) as inner:
            inner.add(Payment(amount=1))
    async with kit.transaction():  # has sent nothing yet
        async with kit.transaction(new=True) as inner:
            inner.add(Payment(amount=2))
    assert kit.amounts() == [1, 2]


# -- what must not begin, or begins by itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "VACUUM",
        "  \n            vacuum",
        "-- a\n/* b */ VACUUM",
        "ATTACH ':memory:' AS more",
        "PRAGMA journal_mode = WAL",
    ],
)
@twice
async def test_transactions_10_statements_that_need_no_transaction_get_none(kit: Kit, sql: str) -> None:
    """VACUUM, ATTACH and settings, which SQLite refuses or ignores inside of a transaction, work in a plain scope."""
    async with kit.scope():
        await kit.done(kit.session().execute(text(sql)))


def test_transactions_10_a_foreign_keys_pragma_works_between_transactions(sync_kit: SyncKit) -> None:
    """`PRAGMA foreign_keys`, a no-op inside of a transaction, takes effect."""
    with sync_kit.db.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 0
        connection.exec_driver_sql("ROLLBACK") if connection.connection.in_transaction else None
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")


@twice
async def test_transactions_10_autocommit_is_left_alone(kit: Kit) -> None:
    """A connection in AUTOCOMMIT gets no BEGIN: each statement stands for itself."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}))
        await kit.done(session.execute(ALL))
        await kit.done(session.execute(write(1)))
        assert kit.amounts() == [1]
        await kit.done(session.execute(text("VACUUM")))


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE", "begin exclusive"])
@twice
async def test_transactions_10_a_begin_of_the_users_is_the_begin(kit: Kit, begin: str) -> None:
    """In a plain scope a `text("BEGIN …")` of the user's gets no second one before it."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.execute(text(begin)))
        await kit.done(session.execute(write(1)))
        await kit.done(session.commit())
    assert kit.amounts() == [1]


# -- settings ----------------------------------------------------------------------------------------------------------


@twice
async def test_scopes_sqlite_files_get_wal_and_foreign_keys(kit: Kit) -> None:
    """A database from a URL uses write-ahead logging, and enforces foreign keys."""
    async with kit.scope():
        session = kit.session()
        assert await kit.done(session.scalar(text("PRAGMA journal_mode"))) == "wal"
        assert await kit.done(session.scalar(text("PRAGMA foreign_keys"))) == 1
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        async with kit.transaction() as session:
            session.add(Payment(account_id=42))
    assert kit.amounts() == []


def test_scopes_an_engine_of_the_users_is_left_as_it_is(sync_kit: SyncKit) -> None:
    """An engine that the user made keeps the driver's BEGIN, its journal and its settings."""
    engine = create_engine(sync_kit.url)
    Base.metadata.create_all(engine)
    with Database(engine) as db:
        seen = traced(db)
        with scope():
            assert db.session.scalar(text("PRAGMA journal_mode")) == "delete"
            assert db.session.scalar(text("PRAGMA foreign_keys")) == 0
        with db.transaction() as session:
            session.execute(ALL)
            session.execute(write(1))
        assert [sql for sql in seen if sql.startswith("BEGIN")] == ["BEGIN"]
        assert seen.index("BEGIN") > seen.index("SELECT payments.amount")  # sqlite3's own, before the first write
    with Database(sessionmaker(engine)) as db, scope():
        assert db.session.scalar(text("PRAGMA foreign_keys")) == 0
    assert sync_kit.amounts() == [1]


# -- in memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true"])
def test_scopes_memory_is_shared_by_threads(url: str) -> None:
    """A database in memory is the same one in every thread."""
    with Database(url) as db:
        Base.metadata.create_all(db.engine)

        def work() -> None:
            with db.transaction() as session:
                session.add(Payment(amount=1))

        thread = threading.Thread(target=contextvars.Context().run, args=(work,))
        thread.start()
        thread.join()
        with db.reader() as session:
            assert session.scalars(ALL).all() == [1]


@twice
async def test_scopes_memory_survives_invalidation(kit: Kit) -> None:
    """A connection that had to be thrown away takes no data of a database in memory along."""
    db = kit.memory()
    async with kit.transaction(db) as session:
        connection = await kit.done(session.connection())
        await kit.done(connection.run_sync(Base.metadata.create_all) if kit.colour == "async" else None)
        if kit.colour == "sync":
            Base.metadata.create_all(connection)
        session.add(Payment(amount=1))
    async with kit.scope():
        session = kit.session(db)
        await kit.done(session.execute(ALL))
        await kit.done(session.invalidate())
        assert list((await kit.done(session.execute(ALL))).scalars()) == [1]


def test_scopes_databases_in_memory_are_each_their_own() -> None:
    """Two databases in memory share nothing, and the same URL may be used twice."""
    with Database("sqlite://") as one, Database("sqlite://") as two:
        Base.metadata.create_all(one.engine)
        with two.reader() as session, pytest.raises(OperationalError, match="no such table"):
            session.execute(ALL)


def test_scopes_memory_refuses_what_would_wait_for_itself() -> None:
    """A database in memory serves one transaction at a time: a second one of the same work is refused at once."""
    with Database("sqlite://") as db:
        with db.transaction() as session:
            session.execute(text("SELECT 1"))
            with pytest.raises(SelfBlockedError, match="connection"):
                with db.transaction(new=True) as inner:
                    inner.execute(text("SELECT 1"))


def test_scopes_memory_goes_with_dispose() -> None:
    """`dispose()` closes the connection that keeps the data."""
    db = Database("sqlite://")
    keeper = db._memory._keeper  # type: ignore[union-attr]
    db.dispose()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        keeper.execute("SELECT 1")


def test_scopes_a_named_memory_of_the_users_is_theirs(tmp_path: Path) -> None:
    """A `mode=memory` URL works, and its sessions are ordinary ones."""
    with Database("sqlite:///file:payments?mode=memory&cache=shared&uri=true") as db:
        Base.metadata.create_all(db.engine)
        with db.transaction() as session:
            assert isinstance(session, Session)
            session.add(Payment(amount=1))
        with db.reader() as session:
            assert session.scalars(ALL).all() == [1]
