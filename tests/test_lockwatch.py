"""An independent transaction is refused where it would wait for its own work."""

import asyncio
import threading

import pytest
from sqlalchemy import text

import dbscope
from dbscope import Database, SelfBlockedError, lockwatch, scope
from dbscope.lifecycle import life_of
from tests.support import needs

ROW = "UPDATE account SET balance = balance + :amount WHERE id = 1"


@pytest.fixture
def url(postgres_url):
    """A PostgreSQL database with one row to fight over."""
    with Database(postgres_url) as db, db.engine.begin() as connection:
        connection.execute(text("CREATE TABLE account (id int PRIMARY KEY, balance int)"))
        connection.execute(text("INSERT INTO account VALUES (1, 0)"))
    return postgres_url


def test_waiting_for_the_row_of_the_outer_transaction_is_refused(url):
    """An independent transaction that waits for a row its outer has changed raises, and the outer can go on."""
    with Database(url) as db:
        with db.transaction() as outer:
            outer.execute(text(ROW), {"amount": 1})
            with pytest.raises(SelfBlockedError, match=r"held since .*test_lockwatch.py"):
                with db.transaction(new=True) as inner:
                    inner.execute(text(ROW), {"amount": 10})
        with db.reader() as session:
            assert session.scalar(text("SELECT balance FROM account")) == 1
        assert db.engine.pool.checkedout() == 0


def test_the_connection_that_waits_is_the_one_that_is_watched(url):
    """A session's next transaction may have another connection: it is that one whose wait is seen."""
    with Database(url, connect_args={"options": "-c lock_timeout=10s"}) as db:
        with db.transaction() as outer:
            outer.execute(text(ROW), {"amount": 1})
            with scope("inner"):
                inner = db.session()
                first = inner.scalar(text("SELECT pg_backend_pid()"))
                inner.commit()
                with scope("other"):
                    assert db.session.scalar(text("SELECT pg_backend_pid()")) == first
                    assert inner.scalar(text("SELECT pg_backend_pid()")) != first
                    with pytest.raises(SelfBlockedError):
                        inner.execute(text(ROW), {"amount": 10})
                    inner.rollback()


def test_the_part_of_a_fan_out_that_waits_for_its_caller_is_refused(url):
    """A part of a fan-out that waits for a row its caller has changed raises, for the caller waits for the part."""
    with Database(url) as db:

        def part(amount):
            with db.transaction() as session:
                session.execute(text(ROW), {"amount": amount})

        with pytest.raises(SelfBlockedError):
            with db.transaction() as outer:
                outer.execute(text(ROW), {"amount": 1})
                db.fan_out(part, [10])
        with db.reader() as session:
            assert session.scalar(text("SELECT balance FROM account")) == 0


def test_nothing_is_watched_where_a_savepoint_ends(url):
    """The end of a savepoint, which waits for no lock, leaves no watch behind that nobody would stop."""
    with Database(url) as db:
        with db.transaction() as outer:
            outer.execute(text(ROW), {"amount": 1})
            with db.transaction(new=True) as inner:
                savepoint = inner.begin_nested()
                inner.execute(text("INSERT INTO account VALUES (2, 0)"))
                assert life_of(inner).watch is None
                savepoint.rollback()
                assert life_of(inner).watch is None


def test_waiting_for_somebody_else_is_waited_for(url, monkeypatch):
    """A lock that another work holds is waited for as ever, although the outer transaction was asked meanwhile."""
    asked = threading.Event()
    ask = lockwatch.ask

    def watched(connection, question):
        answer = ask(connection, question)
        if "pg_blocking_pids" in question:
            asked.set()
        return answer

    monkeypatch.setattr(lockwatch, "ask", watched)
    with Database(url) as db:
        holder = db.new_session()
        holder.execute(text(ROW), {"amount": 100})

        def give_way():
            asked.wait()
            holder.commit()

        helper = threading.Thread(target=give_way)
        helper.start()
        with db.transaction() as outer:
            outer.execute(text("SELECT 1"))
            with db.transaction(new=True) as inner:
                inner.execute(text(ROW), {"amount": 10})
        helper.join()
        holder.close()
        with db.reader() as session:
            assert session.scalar(text("SELECT balance FROM account")) == 110


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_waiting_for_the_row_of_the_outer_transaction_is_refused_async(url, driver):
    """The same on a loop, where the outer's connection is asked by a task."""
    needs.module(driver, extra="asyncpg" if driver == "asyncpg" else "postgresql")
    async with dbscope.AsyncDatabase(url.replace("psycopg", driver)) as db:
        async with db.transaction() as outer:
            await outer.execute(text(ROW), {"amount": 1})
            with pytest.raises(SelfBlockedError, match=r"held since .*test_lockwatch.py"):
                async with db.transaction(new=True) as inner:
                    await inner.execute(text(ROW), {"amount": 10})
        async with db.reader() as session:
            assert await session.scalar(text("SELECT balance FROM account")) == 1
        assert db.engine.pool.checkedout() == 0


async def test_a_task_of_its_own_may_wait_for_the_one_that_started_it(url):
    """A task that nobody waits for is no part of the work that started it: it waits until that commits."""
    needs.module("asyncpg", extra="asyncpg")
    async with dbscope.AsyncDatabase(url.replace("psycopg", "asyncpg")) as db:

        async def background():
            async with scope("background"), db.transaction() as session:
                started.set()
                await session.execute(text(ROW), {"amount": 10})

        started = asyncio.Event()
        async with db.transaction() as outer:
            await outer.execute(text(ROW), {"amount": 1})
            task = asyncio.create_task(background())
            await started.wait()
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            while not task.done() and not await outer.scalar(waiting):
                pass
        await task
        async with db.reader() as session:
            assert await session.scalar(text("SELECT balance FROM account")) == 11


def test_waiting_behind_somebody_who_waits_for_the_outer_transaction_is_refused(url):
    """A row's second waiter waits for the first, who waits for the outer transaction: that could never end either."""

    def another():
        with db.transaction() as session:
            session.execute(text(ROW), {"amount": 100})

    with Database(url) as db:
        with db.transaction() as outer:
            outer.execute(text(ROW), {"amount": 1})
            thread = threading.Thread(target=another)
            thread.start()
            while not outer.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
                assert thread.is_alive()
            with pytest.raises(SelfBlockedError):
                with db.transaction(new=True) as inner:
                    inner.execute(text(ROW), {"amount": 10})
        thread.join()
        with db.reader() as session:
            assert session.scalar(text("SELECT balance FROM account")) == 101
