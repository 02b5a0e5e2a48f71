"""Who holds a lock that was not had in time is named: FAILURES 31."""

import contextlib
import json
import re
import threading
import time
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

import dbscope
from dbscope import holders, scope
from tests.support import needs
from tests.support.kits import LIMIT, Base, Kit, Payment, SyncKit, twice
from tests.support.lines import marked

ALTER = text("ALTER TABLE payments ADD COLUMN note text")
READ = text("SELECT amount FROM payments")
QUICK = 1.0  # seconds, for a lock that nobody gives back: a busy machine has to look at it meanwhile


def notes(error: BaseException) -> str:
    """What was added to an error."""
    return "\n".join(getattr(error, "__notes__", ()))


async def alter(kit: Kit, beside: Any) -> None:
    """A migration without a session, as Alembic runs it."""
    async with kit.block(beside.engine.begin()) as connection:
        await kit.done(connection.execute(ALTER))


@twice
async def test_failures_31_an_idle_transaction_of_this_process_is_named(server_kit: Kit) -> None:
    """The error is SQLAlchemy's; its note has backend, state, times, statement, and the scope and line that hold it."""
    kit = server_kit
    kit.database()
    async with kit.scope("GET /orders"), kit.block(kit.db.apart("migration", lock_timeout=QUICK)) as beside:
        pid = await kit.done(kit.session().scalar(text("SELECT pg_backend_pid()")))  # taken
        await kit.done(kit.session().execute(READ))
        with pytest.raises(DBAPIError, match="lock timeout") as raised:
            await alter(kit, beside)
        note = notes(raised.value)
        assert "It waited for payments (AccessExclusiveLock), held by:\n- backend" in note
        assert re.search(
            rf"backend {pid} \(postgres\), idle in transaction for \d\.\d s, in a transaction of \d\.\d s", note
        )
        assert "its last statement: 'SELECT amount FROM payments'" in note
        assert "in this process: scope 'GET /orders' (opened at tests/" in note
        assert f"taken at tests/{marked('taken')}, " in note
        assert "which waits itself: that could never end" in note
        assert note.count("backend") == 2  # once, and in the advice
        await kit.done(kit.session().rollback())
        await alter(kit, beside)


@twice
async def test_failures_31_whoever_else_holds_it_is_named(server_kit: Kit) -> None:
    """Another program's connection is named as the server knows it; in a session's block, too, with its own limit."""
    kit = server_kit
    kit.database()
    other = create_engine(kit.url, connect_args={"application_name": "psql of Ada"})
    with other.connect() as holder:
        holder.execute(READ)
        async with kit.block(kit.db.apart("migration", lock_timeout=60)) as beside:
            with pytest.raises(DBAPIError, match="lock timeout") as raised:
                async with kit.transaction(beside, lock_timeout=QUICK) as session:
                    await kit.done(session.execute(ALTER))
    other.dispose()
    note = notes(raised.value)
    assert "(psql of Ada), idle in transaction for " in note
    assert "in this process" not in note
    assert f"This is lock_timeout={QUICK} of the transaction (begun at tests/" in note


async def test_failures_31_with_psycopgs_async_side(postgres_url: str) -> None:
    """psycopg on a loop, as asyncpg."""
    needs.module("greenlet", extra="async")
    async with dbscope.AsyncDatabase(postgres_url) as db, db.apart("migration", lock_timeout=QUICK) as beside:
        async with db.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with scope("GET /orders"):
            await db.session.execute(READ)
            with pytest.raises(DBAPIError) as raised:
                async with beside.transaction() as session:
                    await session.execute(ALTER)
        assert "in this process: scope 'GET /orders'" in notes(raised.value)


def test_failures_31_the_one_that_others_wait_for_is_named_first(sync_server_kit: SyncKit) -> None:
    """Of two before it in the queue, the one that holds the lock comes before the one that waits for it itself."""
    kit = sync_server_kit
    db = kit.database()
    with kit.outside.connect() as holder, kit.outside.connect() as waiter:
        holder.execute(READ)
        pid = waiter.scalar(text("SELECT pg_backend_pid()"))
        thread = threading.Thread(target=lambda: waiter.execute(ALTER))
        thread.start()
        with db.engine.connect() as watcher:
            deadline = time.monotonic() + LIMIT
            while not watcher.scalar(text(f"SELECT cardinality(pg_blocking_pids({pid}))")):
                assert time.monotonic() < deadline
        with db.apart("migration", lock_timeout=QUICK) as beside, pytest.raises(DBAPIError) as raised:
            with beside.transaction() as session:
                session.execute(READ)
        holder.rollback()
        thread.join()
    first, second = (line for line in notes(raised.value).splitlines() if line.startswith("- backend"))
    assert "idle in transaction" in first
    assert f"- backend {pid} (postgres), waiting for a lock itself, active for" in second
    assert "; its statement: 'ALTER TABLE payments" in second


@pytest.mark.parametrize(
    ("hold", "wait", "wanted"),
    [
        ("UPDATE payments SET amount = 1", "UPDATE payments SET amount = 2", "It waited for a row of payments, held"),
        ("SELECT pg_advisory_xact_lock(7)", "SELECT pg_advisory_xact_lock(7)", "a lock (advisory, ExclusiveLock)"),
    ],
)
def test_failures_31_what_was_waited_for_is_named(sync_server_kit: SyncKit, hold: str, wait: str, wanted: str) -> None:
    """A row with its table, an advisory lock; and the work goes on when the lock is free."""
    kit = sync_server_kit
    with kit.database().transaction() as session:
        session.add(Payment())
    with kit.db.apart("back-fill", lock_timeout=QUICK) as beside:
        with kit.outside.connect() as holder:
            holder.execute(text(hold))
            with pytest.raises(DBAPIError) as raised, beside.transaction() as session:
                session.execute(text(wait))
        with beside.transaction() as session:
            session.execute(text(wait))
    assert wanted in notes(raised.value)


def test_failures_31_a_prepared_transaction_is_named(sync_server_kit: SyncKit) -> None:
    """It holds its locks without a connection: the note says where to look."""
    kit = sync_server_kit
    kit.database()
    with kit.outside.connect() as holder:
        transaction = holder.begin_twophase("forgotten")
        holder.execute(text("LOCK TABLE payments"))
        transaction.prepare()
        with kit.db.apart("migration", lock_timeout=QUICK) as beside:
            with pytest.raises(DBAPIError) as raised, beside.transaction() as session:
                session.execute(ALTER)
        transaction.rollback()
    assert "a prepared transaction, which belongs to no connection: see pg_prepared_xacts" in notes(raised.value)


def test_failures_31_a_role_that_may_not_know_is_told_so(sync_server_kit: SyncKit) -> None:
    """Of another role's connections the server may tell the number alone."""
    kit = sync_server_kit
    kit.database()
    role = f"api_{kit.url.database}"
    with kit.outside.begin() as admin:
        admin.execute(text(f"CREATE ROLE {role} LOGIN"))
        admin.execute(text(f"GRANT ALL ON payments TO {role}"))
    with kit.outside.connect() as holder, kit.database(kit.url.set(username=role)).apart("x", lock_timeout=QUICK) as x:
        holder.execute(text("LOCK TABLE payments"))
        with pytest.raises(DBAPIError) as raised, x.transaction() as session:
            session.execute(READ)
    assert "(postgres), of which the server tells this role no more" in notes(raised.value)


def test_failures_31_who_held_a_lock_that_was_had_in_the_end_is_not_blamed(
    sync_server_kit: SyncKit, monkeypatch: Any
) -> None:
    """A statement that waited, went on, and was cancelled later, was not cancelled for what it had waited for."""
    kit = sync_server_kit
    kit.database()
    answers: list[dict[str, Any]] = []
    looked = threading.Condition()

    def ask(*question: Any) -> Any:
        answer = ask_anew(*question)
        with looked:
            answers.append(json.loads(answer))
            looked.notify_all()
        return answer

    ask_anew = holders.ask_anew
    monkeypatch.setattr(holders, "ask_anew", ask)
    slow = text("WITH had AS MATERIALIZED (SELECT pg_advisory_xact_lock(7)) SELECT pg_sleep(60) FROM had")
    raised: list[DBAPIError] = []

    def work() -> None:
        with pytest.raises(DBAPIError) as cancelled, beside.transaction() as session:
            session.execute(slow)
        raised.append(cancelled.value)

    with kit.db.apart("report", lock_timeout=4) as beside, kit.outside.connect() as holder:
        monkeypatch.setattr(holders, "SHARE", 400)
        holder.execute(text("SELECT pg_advisory_xact_lock(7)"))
        thread = threading.Thread(target=work)
        thread.start()
        with looked:
            assert looked.wait_for(lambda: answers and answers[-1]["holders"], LIMIT)
        holder.rollback()
        with looked:
            seen = len(answers)
            assert looked.wait_for(lambda: len(answers) > seen + 3, LIMIT)
        holder.execute(
            text("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'dbscope: report'")
        )
        thread.join()
    assert notes(raised[0]) == ""


def test_failures_31_a_server_that_cannot_be_asked(sync_server_kit: SyncKit, monkeypatch: Any) -> None:
    """If no connection is to be had for the question, the time-out's error comes as ever, and says so."""

    def refuse(*_: object) -> None:
        raise ConnectionError("too many clients")

    kit = sync_server_kit
    kit.database()
    monkeypatch.setattr(holders, "ask_anew", refuse)
    with kit.outside.connect() as holder:
        holder.execute(READ)
        with kit.db.apart("migration", lock_timeout=QUICK) as beside:
            with pytest.raises(DBAPIError, match="lock timeout") as raised, beside.transaction() as session:
                session.execute(ALTER)
    assert "Who held the lock could not be asked: ConnectionError('too many clients')" in notes(raised.value)


@twice
async def test_failures_31_other_errors_and_other_databases_are_left_alone(server_kit: Kit, monkeypatch: Any) -> None:
    """Statements of the application's are not watched, errors that are no time-out get no note, watches end."""
    kit = server_kit
    begun: list[Any] = []
    watch = holders.HolderWatch.__init__
    monkeypatch.setattr(
        holders.HolderWatch, "__init__", lambda self, *args: (begun.append(self), watch(self, *args))[1]
    )
    kit.database()
    async with kit.block(kit.db.apart("migration")) as beside:
        async with kit.transaction() as session:
            await kit.done(session.execute(READ))
        assert begun == []
        for statement in ("SELECT 1 / 0", "SELECT 1"):
            failed = pytest.raises(DBAPIError) if "/ 0" in statement else contextlib.nullcontext()
            with failed as raised:
                async with kit.transaction(beside) as session:
                    await kit.done(session.execute(text(statement)))
            assert raised is None or notes(raised.value) == ""
    assert [each.over for each in begun] == [True, True]
    async with kit.block(kit.db.apart("migration", lock_timeout=None)) as beside, kit.transaction(beside) as session:
        await kit.done(session.execute(READ))
    assert len(begun) == 2


# -- SQLite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waiter", ["the application", "work apart", "a block"])
@twice
async def test_failures_31_sqlite_names_the_session_that_holds_the_write_lock(kit: Kit, waiter: str) -> None:
    """ "database is locked", after its time-out, names scope, line and thread of whoever writes in this process."""
    options = {"connect_args": {"timeout": 0.05}} if waiter == "the application" else {}
    kit.database(**options)
    async with kit.block(kit.db.apart("back-fill", lock_timeout=0.05)) as beside:
        working, other = (kit.db, beside) if waiter != "the application" else (beside, kit.db)
        block = {"lock_timeout": 0.04} if waiter == "a block" else {}
        async with kit.scope("nightly"), kit.transaction(working) as session:
            session.add(Payment())
            await kit.done(session.flush())  # holds
            with pytest.raises(OperationalError, match="database is locked") as raised:
                async with kit.transaction(other, **block) as second:
                    second.add(Payment())
                    await kit.done(second.flush())
        note = notes(raised.value)
        assert "SQLite's one write lock is held by:\n- scope 'nightly' (opened at " in note
        assert f"taken at tests/{marked('holds')}, 0." in note
        assert note.count("nightly") == 1
    assert kit.count() == 1


@twice
async def test_failures_31_sqlite_blames_nobody_who_does_not_hold_the_lock(kit: Kit) -> None:
    """Readers, other files, and whoever is another program's are not named."""
    kit.database(connect_args={"timeout": 0.05})
    elsewhere = kit.file(kit.url.database + ".other")
    async with kit.scope("reading"), kit.transaction(elsewhere) as other:
        await kit.done(kit.session().execute(READ))
        other.add(Payment())
        await kit.done(other.flush())
        with kit.outside.connect() as holder:
            holder.exec_driver_sql("BEGIN IMMEDIATE")
            with pytest.raises(OperationalError, match="database is locked") as raised:
                async with kit.transaction(new=True) as session:
                    session.add(Payment())
    assert notes(raised.value) == ""
