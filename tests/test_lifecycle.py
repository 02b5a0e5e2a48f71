"""The life of sessions: on-success scopes, readers, and what is reported at the end."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ForeignKey, delete, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from dbscope import (
    ConfigurationError,
    NotTheOwnerError,
    PartialCommit,
    ReadOnlyError,
    RollbackOnlyError,
    ScopeEndedError,
    SelfBlockedError,
    UncommittedWrites,
    scope,
)
from dbscope.lifecycle import life_of
from dbscope.scope import PlacedScope
from tests.support.kits import AsyncKit, Kit, Payment, SyncKit, make_kit, twice

ALL = select(Payment.amount).order_by(Payment.amount)


def write(amount: int) -> Any:
    """An INSERT that goes to the database at once."""
    return insert(Payment).values(amount=amount)


async def amounts(kit: Kit, session: Any) -> list[int]:
    """The amounts as the session sees them."""
    return list((await kit.done(session.execute(ALL))).scalars())


def backends(kit: Kit) -> int:
    """How many connections of the application hold a transaction on the server."""
    with kit.outside.connect() as connection:
        return int(
            connection.scalar(
                text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
                )
            )
            or 0
        )


# -- on-success scopes -------------------------------------------------------------------------------------------------


@twice
async def test_scopes_7_on_success_commits_what_was_done(kit: Kit) -> None:
    """An on-success scope commits at its end what was pending, flushed or sent, and gives the connection back."""
    async with kit.scope(commit="on-success"):
        session = kit.session()
        session.add(Payment(amount=1))
        await kit.done(session.execute(write(2)))
        assert kit.amounts() == []
    assert kit.amounts() == [1, 2]
    assert kit.checked_out() == 0


@twice
async def test_scopes_7_on_success_is_lazy(kit: Kit) -> None:
    """Its transaction begins with the first use: an unused database is not touched, a session alone takes nothing."""
    async with kit.scope(commit="on-success"):
        assert kit.checked_out() == 0
        kit.session()
        assert kit.checked_out() == 0


@twice
async def test_scopes_7_on_success_rolls_back_on_error(kit: Kit) -> None:
    """An error that leaves the scope rolls everything back and reaches the caller as it was, without a warning."""
    failure = ValueError()
    with pytest.raises(ValueError) as caught:
        async with kit.scope(commit="on-success"):
            await kit.done(kit.session().execute(write(1)))
            raise failure
    assert caught.value is failure
    assert not hasattr(failure, "__notes__")
    assert kit.amounts() == []
    assert kit.checked_out() == 0


@twice
async def test_scopes_7_transactions_in_an_on_success_scope_join_it(kit: Kit) -> None:
    """A block inside joins the scope's transaction; a savepoint is undone alone."""
    async with kit.scope(commit="on-success"):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
        assert kit.amounts() == []
        with pytest.raises(KeyError):
            async with kit.transaction(nested=True):
                await kit.done(session.execute(write(2)))
                raise KeyError
    assert kit.amounts() == [1]


@twice
async def test_transactions_2_an_on_success_scope_owns_its_transaction(kit: Kit) -> None:
    """In an on-success scope `session.commit()` is refused, naming the scope, and its line once."""
    with pytest.raises(NotTheOwnerError, match=r"the transaction of scope 'request' \(begun at \S+\)\.\n"):
        async with kit.scope("request", commit="on-success"):
            session = kit.session()
            session.add(Payment(amount=1))
            await kit.done(session.commit())
    assert kit.amounts() == []


@twice
async def test_transactions_2_a_rollback_dooms_an_on_success_scope(kit: Kit) -> None:
    """After a helper's rollback in an on-success scope, its end raises and nothing is committed."""
    with pytest.raises(RollbackOnlyError):
        async with kit.scope(commit="on-success"):
            session = kit.session()
            await kit.done(session.execute(write(1)))
            await kit.done(session.rollback())
    assert kit.amounts() == []


@twice
async def test_scopes_7_finish_commits_before_the_block_ends(kit: Kit) -> None:
    """`finish()` (`await afinish()`) ends the work now: committed, released, and the sessions are dead."""
    async with kit.scope("request", commit="on-success") as work:
        session = kit.session()
        session.add(Payment(amount=1))
        await kit.done(work.finish() if kit.colour == "sync" else work.afinish())
        assert kit.amounts() == [1]
        assert kit.checked_out() == 0
        with pytest.raises(ScopeEndedError):
            await kit.done(session.execute(ALL))
        await kit.done(work.finish() if kit.colour == "sync" else work.afinish())  # harmless
    assert kit.amounts() == [1]


@twice
async def test_scopes_7_a_veto_rolls_back(kit: Kit) -> None:
    """`finish(veto=True)` rolls back although nothing was raised, and reports nothing."""
    async with kit.scope(commit="on-success") as work:
        await kit.done(kit.session().execute(write(1)))
        await kit.done(work.finish(veto=True) if kit.colour == "sync" else work.afinish(veto=True))
        assert kit.checked_out() == 0
    assert kit.amounts() == []


@twice
async def test_scopes_7_a_failing_commit_raises_and_releases(kit: Kit) -> None:
    """A commit that fails at the scope's end reaches the caller, and the connection is given back."""
    async with kit.transaction() as session:
        session.add(Payment(id=1))
    with pytest.raises(IntegrityError):
        async with kit.scope(commit="on-success"):
            await kit.done(kit.session().execute(write(2)))
            kit.session().add(Payment(id=1))
    assert kit.amounts() == [500]
    assert kit.checked_out() == 0


def watch_commits(kit: Kit, db: Any, name: str, seen: list[str]) -> None:
    """Note the flushes and commits of a database in `seen`."""
    engine = getattr(db.engine, "sync_engine", db.engine)
    event.listen(engine, "commit", lambda _: seen.append(f"commit {name}"))
    event.listen(
        engine, "before_cursor_execute", lambda *args: seen.append(f"insert {name}") if "INSERT" in args[2] else None
    )


@twice
async def test_scopes_7_several_databases_flush_first_then_commit_in_the_order_of_use(kit: Kit, tmp_path: Any) -> None:
    """With several databases all sessions flush before the first commit; the commits follow the first uses."""
    one, two = kit.db, kit.file(tmp_path / "two.db")
    seen: list[str] = []
    watch_commits(kit, one, "one", seen)
    watch_commits(kit, two, "two", seen)
    async with kit.scope(commit="on-success"):
        kit.session(two).add(Payment(amount=2))
        kit.session(one).add(Payment(amount=1))
    assert seen == ["insert two", "insert one", "commit two", "commit one"]
    assert kit.checked_out(one) == kit.checked_out(two) == 0


@twice
async def test_scopes_7_a_flush_that_fails_commits_nothing_anywhere(kit: Kit, tmp_path: Any) -> None:
    """With several databases a flush that fails in the last one keeps the first from committing."""
    one, two = kit.db, kit.file(tmp_path / "two.db")
    async with kit.transaction(two) as session:
        session.add(Payment(id=1))
    with pytest.raises(IntegrityError) as caught:
        async with kit.scope(commit="on-success"):
            kit.session(one).add(Payment(amount=1))
            kit.session(two).add(Payment(id=1))
    assert not any("nobody committed" in note for note in getattr(caught.value, "__notes__", ()))  # the scope tried
    assert kit.amounts() == []


@twice
async def test_scopes_7_partial_commit_names_both_sides(kit: Kit, tmp_path: Any) -> None:
    """A commit that fails after another succeeded raises `PartialCommit` with both lists, and releases everything."""
    one, two, three = kit.database(name="one"), kit.file(tmp_path / "2.db", name="two"), None
    three = kit.file(tmp_path / "3.db", name="three")
    seen: list[str] = []

    @event.listens_for(getattr(two.engine, "sync_engine", two.engine), "commit")
    def fail(connection: Any) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(PartialCommit, match=r"committed one, and then the commit of two, three failed: the disk") as e:
        async with kit.scope(commit="on-success"):
            for db in (one, two, three):
                kit.session(db).add(Payment(amount=1))
                db.on_commit(seen.append, f"{db.name} committed")
                db.on_rollback(seen.append, f"{db.name} rolled back")
    assert e.value.committed == (one,)
    assert e.value.failed == (two, three)
    assert isinstance(e.value.__cause__, RuntimeError)
    assert seen == ["one committed", "two rolled back", "three rolled back"]
    assert kit.amounts() == [1]
    assert [kit.checked_out(db) for db in (one, two, three)] == [0, 0, 0]


@twice
async def test_scopes_7_the_first_commit_that_fails_is_raised_as_it_is(kit: Kit, tmp_path: Any) -> None:
    """Where nothing was committed yet, the commit's own error is raised."""
    one, two = kit.db, kit.file(tmp_path / "two.db")

    @event.listens_for(getattr(one.engine, "sync_engine", one.engine), "commit")
    def fail(connection: Any) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        async with kit.scope(commit="on-success"):
            kit.session(one).add(Payment(amount=1))
            kit.session(two).add(Payment(amount=2))
    assert kit.checked_out(one) == kit.checked_out(two) == 0


async def test_scopes_7_both_colours_in_one_scope(async_kit: AsyncKit, tmp_path: Any) -> None:
    """An `async with` on-success scope commits its sync and its async databases, or neither."""
    other = make_kit("sync", f"sqlite:///{tmp_path / 'sync.db'}")
    for fails in (True, False):
        try:
            async with scope(commit="on-success"):
                async_kit.session().add(Payment(amount=1))
                other.session().add(Payment(amount=2))
                await async_kit.session().flush()
                if fails:
                    raise KeyError
        except KeyError:
            assert (async_kit.amounts(), other.amounts()) == ([], [])
    assert (async_kit.amounts(), other.amounts()) == ([1], [2])
    assert other.checked_out() == 0
    other.db.dispose()


# -- readers -----------------------------------------------------------------------------------------------------------

WRITES: dict[str, Any] = {
    "core": insert(Payment).values(amount=1),
    "update": update(Payment).values(amount=1),
    "delete": delete(Payment),
    "text": text("INSERT INTO payments (amount) VALUES (1)"),
    "comment": text("/* SELECT */ -- SELECT\n DELETE FROM payments"),
    "ddl": text("CREATE TABLE more (id INTEGER)"),
    "drop": text("DROP TABLE payments"),
}


@pytest.mark.parametrize("how", [*WRITES, "flush", "autoflush", "cte"])
@twice
async def test_reads_a_reader_refuses_writes(kit: Kit, how: str) -> None:
    """A reader refuses the ORM's flush, Core, `text()`, DDL and writes in a CTE, and says the way out."""
    with pytest.raises(ReadOnlyError, match=r"inside the reader \(begun at") as caught:
        async with kit.reader() as session:
            if how == "cte":
                statement = text("WITH x AS (SELECT 1) INSERT INTO payments (amount) SELECT * FROM x")
            elif how in WRITES:
                statement = WRITES[how]
            else:
                session.add(Payment(amount=1))
                statement = ALL
            await kit.done(session.flush() if how == "flush" else session.execute(statement))
    assert "transaction()" in str(caught.value)
    assert kit.amounts() == []
    assert kit.checked_out() == 0


@twice
async def test_reads_a_cte_that_writes_is_refused(server_kit: Kit) -> None:
    """On PostgreSQL a SELECT whose CTE writes is refused."""
    kit = server_kit
    with pytest.raises(ReadOnlyError):
        async with kit.reader() as session:
            await kit.done(
                session.execute(
                    text("WITH x AS (INSERT INTO payments (amount) VALUES (1) RETURNING id) SELECT * FROM x")
                )
            )
    assert kit.amounts() == []


@twice
async def test_reads_the_server_refuses_what_the_text_hides(server_kit: Kit) -> None:
    """On PostgreSQL a function that writes, called by a SELECT, is refused by the server's READ ONLY."""
    kit = server_kit
    async with kit.transaction() as session:
        await kit.done(
            session.execute(
                text(
                    "CREATE FUNCTION pay() RETURNS integer LANGUAGE sql AS "
                    "'INSERT INTO payments (amount) VALUES (1) RETURNING 1'"
                )
            )
        )
    with pytest.raises(DBAPIError, match="read-only transaction"):
        async with kit.reader() as session:
            await kit.done(session.scalar(text("SELECT pay()")))
    assert kit.amounts() == []
    async with kit.transaction() as session:  # most likely the same connection
        assert await kit.done(session.scalar(text("SELECT pay()"))) == 1
    assert kit.amounts() == [1]
    assert kit.checked_out() == 0


@pytest.mark.parametrize("failing", [False, True])
@twice
async def test_transactions_2_after_a_block_the_session_is_its_scopes_again(kit: Kit, failing: bool) -> None:
    """What is written after a block, and not committed, is reported again; hooks follow the user's own commit again."""
    seen: list[str] = []
    with pytest.warns(UncommittedWrites):  # noqa: PT031
        async with kit.scope():
            session = kit.session()
            with pytest.raises(KeyError) if failing else contextlib.nullcontext():
                async with kit.transaction():
                    await kit.done(session.execute(insert(Payment).values(amount=1)))
                    if failing:
                        raise KeyError
            await kit.done(session.execute(insert(Payment).values(amount=2)))
            kit.db.on_commit(seen.append, "committed")
            await kit.done(session.commit())
            assert seen == ["committed"]
            await kit.done(session.execute(insert(Payment).values(amount=3)))
    assert kit.amounts() == ([2] if failing else [1, 2])


@pytest.mark.parametrize("how", ["close", "remove"])
@twice
async def test_transactions_2_a_close_that_waited_is_done_once(kit: Kit, how: str) -> None:
    """Where a helper closed the scope's session inside of a block, it is closed when the block ends, and not again."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.execute(select(Payment)))
        for closes in (True, False):
            async with kit.transaction():
                payment = Payment(amount=1)
                session.add(payment)
                if closes:
                    await kit.done(session.close() if how == "close" else kit.db.session.remove())
                assert payment in session
            assert (payment in session) is not closes
    assert kit.amounts() == [1, 1]


@pytest.mark.parametrize(
    "lift",
    [
        "SET TRANSACTION READ WRITE",
        "set transaction read\n    write",
        "SET transaction_read_only = off",
        "SET LOCAL transaction_read_only TO off",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        "SET default_transaction_read_only = off",
        "RESET transaction_read_only",
        "COMMIT",
        "BEGIN READ WRITE",
    ],
)
@twice
async def test_reads_lifting_read_only_is_refused(server_kit: Kit, lift: str) -> None:
    """A reader's READ ONLY cannot be lifted by SQL."""
    with pytest.raises(ReadOnlyError):
        async with server_kit.reader() as session:
            await server_kit.done(session.execute(text(lift)))
    assert server_kit.checked_out() == 0


@pytest.mark.parametrize("lift", ["PRAGMA query_only = 0", "PRAGMA query_only(off)"])
@twice
async def test_reads_lifting_query_only_is_refused(kit: Kit, lift: str) -> None:
    """On SQLite neither can it be by a PRAGMA, whether or not a connection was made read-only by one."""
    with pytest.raises(ReadOnlyError):
        async with kit.reader() as session:
            await kit.done(session.execute(text(lift)))


@twice
async def test_reads_a_reader_may_change_other_settings(server_kit: Kit) -> None:
    """Settings that have nothing to do with writing can be set in a reader."""
    async with server_kit.reader() as session:
        await server_kit.done(session.execute(text("SET LOCAL work_mem = '8MB'")))
        assert await server_kit.done(session.scalar(text("SHOW work_mem"))) == "8MB"


@twice
async def test_reads_objects_stay_readable(kit: Kit) -> None:
    """After the block its objects can be read and open no transaction, although sessions expire theirs."""
    await objects_stay_readable(kit)


@twice
async def test_reads_objects_stay_readable_on_postgresql(server_kit: Kit) -> None:
    """On PostgreSQL, too."""
    await objects_stay_readable(server_kit)


async def objects_stay_readable(kit: Kit) -> None:
    """What both tests above do."""
    db = kit.database(expire_on_commit=True)
    async with kit.transaction(db) as session:
        session.add(Payment(id=1, amount=5))
    async with kit.reader(db) as session:
        payment = await kit.done(session.get(Payment, 1))
    assert payment.amount == 5
    assert payment not in session
    assert kit.checked_out(db) == 0
    with pytest.raises(InvalidRequestError):  # nobody reads for it any more
        await kit.done(session.refresh(payment))


class Tables(DeclarativeBase):
    """Tables with a relationship."""


class Person(Tables):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    pets: Mapped[list["Pet"]] = relationship(lazy="selectin")


class Pet(Tables):
    __tablename__ = "pets"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    person_id: Mapped[int] = mapped_column(ForeignKey("people.id"))


@twice
async def test_reads_loaded_relationships_stay_readable(kit: Kit) -> None:
    """What a reader loaded along stays loaded after it, without a transaction."""
    assert kit.db
    Tables.metadata.create_all(kit.outside)
    async with kit.transaction() as session:
        session.add(Person(id=1, pets=[Pet(name="Rex")]))
    async with kit.reader() as session:
        person = await kit.done(session.get(Person, 1))
    assert [pet.name for pet in person.pets] == ["Rex"]
    assert kit.checked_out() == 0


@twice
async def test_reads_nothing_is_left_open_on_the_server(server_kit: Kit) -> None:
    """After a reader PostgreSQL shows no open transaction, on success and on error."""
    kit = server_kit
    async with kit.reader() as session:
        await amounts(kit, session)
        assert backends(kit) == 1
    assert backends(kit) == 0
    with pytest.raises(KeyError):
        async with kit.reader() as session:
            await amounts(kit, session)
            raise KeyError
    assert backends(kit) == 0


@pytest.mark.parametrize("options", [{}, {"nested": True}])
@twice
async def test_reads_a_transaction_inside_a_reader_is_refused(kit: Kit, options: dict[str, Any]) -> None:
    """A reader cannot become a writer: a transaction inside is refused, and told the way out."""
    async with kit.reader():
        with pytest.raises(ReadOnlyError, match=r"A reader cannot become a writer.*\n.*around the reader"):
            async with kit.transaction(**options):
                raise AssertionError("never entered")


@twice
async def test_reads_an_independent_transaction_inside_a_reader(kit: Kit) -> None:
    """`transaction(new=True)` inside a reader is independent, and commits."""
    async with kit.reader() as reader:
        assert await amounts(kit, reader) == []
        async with kit.transaction(new=True) as session:
            assert session is not reader
            session.add(Payment(amount=1))
        assert await amounts(kit, reader) == []  # its snapshot is older
    assert kit.amounts() == [1]


@twice
async def test_reads_a_reader_in_a_transaction_sees_what_is_committed(kit: Kit) -> None:
    """A reader inside a transaction has a session of its own, and does not see the outer's uncommitted work."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        await kit.done(session.flush())
        async with kit.reader() as reader:
            assert reader is not session
            assert kit.session() is reader
            assert await amounts(kit, reader) == []
        assert kit.session() is session
    assert kit.amounts() == [1]


@twice
async def test_reads_a_reader_in_a_reader_joins(kit: Kit) -> None:
    """A reader inside a reader is the same one, and leaves it open."""
    async with kit.reader() as outer:
        async with kit.reader() as inner:
            assert inner is outer
        assert await amounts(kit, outer) == []


@pytest.mark.parametrize("call", ["commit", "begin", "invalidate", "reset"])
@twice
async def test_reads_ending_a_reader_from_inside_is_refused(kit: Kit, call: str) -> None:
    """`session.commit()` and its like inside a reader are refused, and say that there is nothing to commit."""
    async with kit.reader() as session:
        with pytest.raises(ReadOnlyError, match="nothing to commit"):
            answer = getattr(session, call)()
            await (answer.__aenter__() if call == "begin" and kit.colour == "async" else kit.done(answer))


@twice
async def test_reads_pending_objects_of_a_reader_are_reported(kit: Kit) -> None:
    """Objects that were added or changed in a reader, and never flushed, are not dropped in silence."""
    with pytest.warns(UncommittedWrites, match="Payment objects that were never flushed"):
        async with kit.reader() as session:
            session.add(Payment(amount=1))
    assert kit.amounts() == []


@twice
async def test_reads_a_transaction_after_a_reader_writes(server_kit: Kit) -> None:
    """The next user of a reader's connection can write."""
    kit = server_kit
    async with kit.reader() as session:
        pid = await kit.done(session.scalar(text("SELECT pg_backend_pid()")))
    async with kit.transaction() as session:
        assert await kit.done(session.scalar(text("SELECT pg_backend_pid()"))) == pid
        session.add(Payment(amount=1))
    assert kit.amounts() == [1]


# -- what nobody committed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["autocommit", "vacuum"])
def test_scopes_8_what_was_committed_at_once_is_not_reported(sync_kit: SyncKit, how: str) -> None:
    """Work on a connection in AUTOCOMMIT, or a VACUUM, is not reported as lost."""
    with scope():
        if how == "autocommit":
            sync_kit.db.session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            sync_kit.db.session.execute(write(1))
        else:
            sync_kit.db.session.execute(text("VACUUM"))
    assert sync_kit.amounts() == ([1] if how == "autocommit" else [])


@twice
async def test_transactions_1_a_connection_in_autocommit_is_refused(kit: Kit) -> None:
    """A write of a managed transaction on a connection in AUTOCOMMIT, which no rollback could undo, is refused."""
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT: it could not be rolled back"):
        async with kit.transaction() as session:
            await kit.done(session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}))
            session.add(Payment(amount=1))
    db = kit.file(Path(kit.url.database or "").with_name("2.db"), isolation_level="AUTOCOMMIT")
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT: it could not be rolled back"):
        async with kit.transaction(db) as session:
            await kit.done(session.execute(write(1)))
    assert kit.amounts() == []
    async with kit.scope():
        await kit.done(kit.session(db).execute(write(1)))
        assert await amounts(kit, kit.session(db)) == [1]


def test_transactions_2_threads_may_hand_a_transaction_over(sync_kit: SyncKit) -> None:
    """A transaction is its block's, not its thread's: another thread may write in it while the first waits."""
    with sync_kit.db.transaction() as session:
        session.add(Payment(amount=1))
        thread = threading.Thread(target=lambda: session.execute(write(2)))
        thread.start()
        thread.join()
    assert sync_kit.amounts() == [1, 2]


@twice
@pytest.mark.parametrize("how", ["on-success", "transaction", "adopted", "by itself"])
async def test_scopes_9_a_refused_commit_leaves_no_transaction_in_the_pool(kit: Kit, how: str) -> None:
    """SQLite keeps a transaction open whose COMMIT failed: it is rolled back before its connection is given back."""
    deferred = "CREATE TABLE child (parent INTEGER REFERENCES payments(id) DEFERRABLE INITIALLY DEFERRED)"
    with kit.outside.begin() as connection:
        connection.execute(text(deferred.replace("payments", Payment.__tablename__)))
    orphan = text("INSERT INTO child VALUES (-1)")
    with pytest.raises(IntegrityError):
        async with kit.scope(commit="on-success" if how == "on-success" else None):
            if how in ("on-success", "by itself"):
                await kit.done(kit.session().execute(orphan))
                if how == "by itself":
                    await kit.done(kit.session().commit())
            else:
                if how == "adopted":
                    await kit.done(kit.session().execute(ALL))
                async with kit.transaction(new=how == "transaction") as session:
                    await kit.done(session.execute(orphan))
    with kit.outside.connect() as connection:
        connection.execute(text("PRAGMA busy_timeout = 0"))
        connection.execute(write(1))  # nobody holds the write lock
        connection.rollback()


@twice
async def test_scopes_9_a_refused_commit_is_told_although_its_rollback_fails(kit: Kit) -> None:
    """Where the rollback after a COMMIT that failed fails too, the first error is the one that comes out."""

    def fail(_: Any) -> None:
        raise RuntimeError("the disk is full")

    def fail_too(_: Any) -> None:
        raise ZeroDivisionError

    engine = getattr(kit.db.engine, "sync_engine", kit.db.engine)
    event.listen(engine, "commit", fail)
    event.listen(engine, "rollback", fail_too, once=True)
    with pytest.raises(RuntimeError, match="disk"):
        async with kit.scope(commit="on-success"):
            kit.session().add(Payment())
    assert kit.checked_out() == 0


def test_transactions_10_a_savepoint_takes_no_connection(sync_kit: SyncKit) -> None:
    """Errors that name the line which took a connection do not name a savepoint's."""
    with scope():
        session = sync_kit.session()
        session.scalar(text("SELECT 1"))
        taken = life_of(session).taken
        with session.begin_nested():
            session.scalar(text("SELECT 2"))
        assert life_of(session).taken == taken


def test_scopes_3_a_connection_is_held_where_no_line_of_the_users_took_it(sync_kit: SyncKit) -> None:
    """A thread that was given SQLAlchemy's own method has no line to name, and holds the write lock all the same."""
    with sync_kit.db.transaction() as session:
        thread = threading.Thread(target=session.execute, args=[write(1)])
        thread.start()
        thread.join()
        session.scalar(text("SELECT 1"))  # the block goes on here
        with pytest.raises(SelfBlockedError, match="an unknown line"):
            with sync_kit.db.transaction(new=True) as second:
                second.execute(write(2))
    assert sync_kit.amounts() == [1]


def test_scopes_8_a_write_is_reported_where_no_line_of_the_users_sent_it(sync_kit: SyncKit) -> None:
    """What a thread wrote that was given SQLAlchemy's own method is not dropped in silence."""
    with pytest.warns(UncommittedWrites, match="an unknown line"):  # noqa: PT031
        with scope():
            thread = threading.Thread(target=sync_kit.session().execute, args=[write(1)])
            thread.start()
            thread.join()
    assert sync_kit.amounts() == []


def test_a_session_of_a_scope_that_was_opened_nowhere_tells_no_place_of_it(sync_kit):
    """What is said of a session that is dropped in a scope without a line of the user's has to do without one."""
    home = PlacedScope("request 7", None)
    with home:
        sync_kit.db.session.scalar(text("SELECT 1"))
        (mark,) = sync_kit.db.holders
        assert mark.home == ("request 7", None)
