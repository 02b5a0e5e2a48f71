"""`dbscope.watch`: engines and sessions that know nothing of dbscope get guards and the view: FAILURES 1, 4, 42."""

import asyncio
import gc
import inspect
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import dbscope
from dbscope import ConfigurationError, GuardError, fork, guards, watched
from dbscope.events import observe
from dbscope.guards import Found, budgets, policy
from dbscope.monitor import holdings
from tests.support.kits import Base, Kit, SyncKit, twice
from tests.test_fork import fork as fork_for

HERE = __file__.rpartition("/")[2]


class Application:
    """One that exists: an engine and a session maker, made without dbscope."""

    def __init__(self, kit: Kit) -> None:
        Base.metadata.create_all(kit.outside)
        url = kit.url.set(drivername=kit.drivers[kit.url.get_backend_name()])
        options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
        if kit.colour == "sync":
            self.engine: Any = create_engine(url, **options)
            self.sessions: Any = sessionmaker(self.engine)
        else:
            from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
            from sqlalchemy.pool import AsyncAdaptedQueuePool

            self.engine = create_async_engine(url, poolclass=AsyncAdaptedQueuePool, **options)
            self.sessions = async_sessionmaker(self.engine)

    async def close(self) -> None:
        """Dispose of the engine."""
        done = self.engine.dispose()
        if inspect.isawaitable(done):
            await done


def session_of(kit: Kit, application: Application) -> Any:
    """A session of the application's, as a block."""
    return kit.block(application.sessions())


@pytest.fixture
def found() -> Iterator[list[Found]]:
    """What is found while the test runs."""
    facts: list[Found] = []
    stop = observe(facts.append, Found)
    yield facts
    stop()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the budgets does not look; the test does."""
    monkeypatch.setattr(budgets._Watcher, "wake", lambda self: None)
    own = budgets._Watcher()  # a thread that an earlier test has woken looks with the other
    own._guards = [*budgets._watcher._guards]
    monkeypatch.setattr(budgets, "_watcher", own)


def look(seconds: float) -> None:
    """Let the watcher look, so many seconds from now, as if its thread did."""
    budgets._watcher.look(time.monotonic() + seconds)


@twice
async def test_failures_1_a_plain_session_that_holds_the_pool_is_named(kit: Kit) -> None:
    """By its line, its task or thread, its state and its last statement, in the error of whoever waits in vain."""
    application = Application(kit)
    with dbscope.watch(application.engine):
        async with session_of(kit, application) as session:
            await kit.done(session.scalar(text("SELECT 41")))
            with pytest.raises(PoolTimeout) as caught:
                async with session_of(kit, application) as other:
                    await kit.done(other.scalar(text("SELECT 42")))
    (note,) = caught.value.__notes__
    line = note.split("\n")[1]
    for part in ("idle in transaction", f"taken at tests/{HERE}:", "SELECT 41"):
        assert part in line.replace("\\", "/")
    assert ("task " if kit.colour == "async" else "thread ") in line
    await application.close()


@twice
async def test_a_server_is_watched_from_its_first_connection(server_kit: Kit) -> None:
    """The dialect asks that one what it can do before anybody has it: the watch stays out of the way, and then sees."""
    application = Application(server_kit)
    with dbscope.watch(application.engine):
        async with session_of(server_kit, application) as session:
            assert await server_kit.done(session.scalar(text("SELECT 42"))) == 42
            assert [held.statement for held in holdings()] == ["SELECT 42"]
        assert not holdings()
    await application.close()


@twice
async def test_the_view_shows_what_is_held_as_long_as_it_is(kit: Kit) -> None:
    """With the scope's name, if there is one around; a transaction that is over leaves the connection idle."""
    application = Application(kit)
    with dbscope.watch(application.engine):
        async with kit.scope("GET /orders"), session_of(kit, application) as session:
            connection = await kit.done(session.connection())
            await kit.done(session.execute(text("SELECT 41")))
            (held,) = holdings()
            assert (held.scope, held.state, held.statement) == ("GET /orders", "idle in transaction", "SELECT 41")
            assert HERE in held.taken
            await kit.done(connection.get_transaction().rollback())
            assert holdings()[0].state == "idle"
        assert not holdings()
    await application.close()


@twice
async def test_failures_4_budgets_are_watched(kit: Kit, alone: None, found: list[Found]) -> None:
    """Idle in transaction, and a long transaction, with the line that took the connection."""
    application = Application(kit)
    with dbscope.watch(application.engine):
        async with session_of(kit, application) as session:
            await kit.done(session.scalar(text("SELECT 41")))
            look(0)
            look(4)
            assert not found
            look(6)
    assert [fact.guard for fact in found] == ["idle_in_transaction", "long_transaction"]
    assert all(HERE in fact.message and "SELECT 41" in fact.message for fact in found)
    await application.close()


@twice
async def test_failures_4_raise_refuses_the_next_statement(kit: Kit, alone: None) -> None:
    """Of this transaction, and of no later one."""
    application = Application(kit)
    with dbscope.watch(application.engine) as watch:
        guards.configure(watch, idle_in_transaction="raise")
        async with session_of(kit, application) as session:
            await kit.done(session.scalar(text("SELECT 41")))
            look(0)
            look(6)
            with pytest.raises(GuardError, match="idle in transaction for"):
                await kit.done(session.scalar(text("SELECT 42")))
            await kit.done(session.rollback())
            assert await kit.done(session.scalar(text("SELECT 43"))) == 43
    await application.close()


@twice
async def test_after_stop_nothing_is_left(kit: Kit) -> None:
    """Of the listeners, nor of what is held; an engine whose pool was replaced meanwhile included."""
    application = Application(kit)
    engine = getattr(application.engine, "sync_engine", application.engine)
    listeners = lambda: [len(engine.dialect.dispatch.do_execute), len(engine.pool.dispatch.checkout)]  # noqa: E731
    before = listeners()
    watch = dbscope.watch(application.engine)
    await application.close()
    assert listeners() != before
    async with session_of(kit, application) as session:
        await kit.done(session.scalar(text("SELECT 41")))
        assert len(holdings()) == 1
        watch.stop()
        watch.stop()
        assert not holdings()
    assert listeners() == before
    assert engine._connection_cls is Connection
    assert watch not in fork.databases
    await application.close()


@twice
async def test_watching_twice_is_harmless(kit: Kit) -> None:
    """It is the same watch, of engines on the same pool, too; and another one after its end."""
    application = Application(kit)
    watch = dbscope.watch(application.engine)
    assert dbscope.watch(application.engine) is watch
    assert dbscope.watch(application.engine.execution_options(schema_translate_map={})) is watch
    async with session_of(kit, application) as session:
        await kit.done(session.scalar(text("SELECT 41")))
        assert len(holdings()) == 1
    watch.stop()
    again = dbscope.watch(application.engine)
    async with session_of(kit, application) as session:
        await kit.done(session.scalar(text("SELECT 41")))
        assert len(holdings()) == 1
    again.stop()
    await application.close()


@twice
async def test_a_database_on_a_watched_engine_keeps_its_rules(kit: Kit) -> None:
    """Its sessions name themselves, once; those of others on its engine are named beside them."""
    application = Application(kit)
    for first in ("watch", "database"):
        watch = dbscope.watch(application.engine) if first == "watch" else None
        db = kit.database(application.engine)
        watch = watch or dbscope.watch(db)
        async with kit.reader(db) as session:
            await kit.done(session.scalar(text("SELECT 41")))
            (held,) = holdings()
            assert held.database == db.name
            with pytest.raises(dbscope.ReadOnlyError):
                await kit.done(session.execute(text("INSERT INTO payments (amount) VALUES (1)")))
        async with session_of(kit, application) as session:
            await kit.done(session.scalar(text("SELECT 42")))
            assert [held.statement for held in holdings()] == ["SELECT 42"]
        watch.stop()
    assert kit.count() == 0


def test_a_connection_that_is_dropped_is_given_back_all_the_same(sync_kit: SyncKit) -> None:
    """What watches keeps none of it alive."""
    application = Application(sync_kit)
    with dbscope.watch(application.engine):
        connection = application.engine.connect()
        connection.execute(text("SELECT 41"))
        del connection
        gc.collect()
        assert not holdings()
        assert application.engine.pool.checkedout() == 0
    application.engine.dispose()


def test_a_refusal_keeps_no_connection_that_is_dropped(sync_kit: SyncKit, alone: None) -> None:
    """An error's traceback knows the frames that it went through, and these know the session."""
    application = Application(sync_kit)

    def work() -> None:
        session = Session(application.engine)
        session.execute(text("SELECT 41"))
        look(0)
        look(6)
        session.execute(text("SELECT 42"))

    with dbscope.watch(application.engine) as watch:
        guards.configure(watch, idle_in_transaction="raise")
        with pytest.raises(GuardError) as caught:
            work()
        del caught
        gc.collect()
        assert application.engine.pool.checkedout() == 0
    application.engine.dispose()


def test_who_looks_at_a_lost_connection_leaves_it_alone(sync_kit: SyncKit) -> None:
    """It is held until its session ends; nobody connects again on its session's behalf, and the view goes on."""
    with dbscope.watch(sync_kit.db), dbscope.scope("unlucky"):
        connection = sync_kit.session().connection()
        connection.invalidate()
        assert [held.scope for held in holdings()] == ["unlucky"]
        connection.rollback()
        assert [held.scope for held in holdings()] == ["unlucky"]
        assert connection.invalidated


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_of_a_fork_may_watch_whatever_its_parent_was_doing() -> None:
    """Another thread of the parent's may have the lock, which is not in the child to give it back."""
    with watched._installing:
        assert fork_for(lambda: watched._installing.acquire(blocking=False))


def test_whoever_listens_to_statements_is_told_of_each(sync_kit: SyncKit) -> None:
    """Before and after the watch."""
    application = Application(sync_kit)
    told: list[str] = []
    event.listen(application.engine, "do_execute", lambda cursor, statement, *_: told.append(f"before {statement}"))
    with dbscope.watch(application.engine), Session(application.engine) as session:
        session.execute(text("SELECT 41"))
        event.listen(application.engine, "do_execute", lambda cursor, statement, *_: told.append(f"after {statement}"))
        session.execute(text("SELECT 42"))
        assert holdings()[0].statement == "SELECT 42"
    assert told == ["before SELECT 41", "before SELECT 42", "after SELECT 42"]
    application.engine.dispose()


def test_failures_42_a_plain_sync_session_on_the_loop_is_named(
    sync_kit: SyncKit, found: list[Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions of a `scoped_session`, too."""
    monkeypatch.setattr(policy._guards["sync_on_loop"], "_told", set())
    application = Application(sync_kit)
    registry = scoped_session(application.sessions)

    async def main() -> None:
        registry.scalar(text("SELECT 41"))
        registry.remove()

    with dbscope.watch(application.engine):
        asyncio.run(main())
    (fact,) = found
    assert fact.guard == "sync_on_loop"
    assert HERE in fact.message
    application.engine.dispose()


@pytest.mark.parametrize("given", ["sqlite:///shop.db", None, sessionmaker(), Session, 42])
def test_bad_input(given: Any) -> None:
    """The error says what is meant, and shows no URL, which may hold a password."""
    with pytest.raises(ConfigurationError, match=r"watch\(\) is given an Engine or an AsyncEngine, not") as caught:
        dbscope.watch(given)
    assert "shop" not in str(caught.value)
