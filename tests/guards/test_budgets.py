"""Idle in transaction, a long transaction, a long scope: statement 36, FAILURES 4, 26, 35."""

import threading
import time
from typing import Any

import pytest
from sqlalchemy import text

from dbscope import GuardError, guards, lifecycle
from dbscope.events import observe
from dbscope.guards import budgets
from dbscope.guards.policy import Found
from tests.support.kits import LIMIT, Kit, SyncKit, twice
from tests.support.web import wait_for


def look(seconds: float) -> None:
    """Let the watcher look, so many seconds from now, as if its thread did."""
    budgets._watcher.look(time.monotonic() + seconds)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread does not look; the test does."""
    monkeypatch.setattr(budgets._Watcher, "wake", lambda self: None)
    own = budgets._Watcher()  # a thread that an earlier test has woken looks with the other
    own._guards = [*budgets._watcher._guards]
    monkeypatch.setattr(budgets, "_watcher", own)


def names(found: list[Found]) -> list[str]:
    """Which guards found something."""
    return [fact.guard for fact in found]


@twice
async def test_failures_4_idle_in_transaction_is_named_with_its_line(kit: Kit, alone: None, found: list[Found]) -> None:
    """Once for each transaction: the scope, the worker, the line that took the connection, the last statement."""
    async with kit.scope("slow"):
        await kit.done(kit.session().scalar(text("SELECT 41")))
        look(0)
        look(4.9)
        assert not names(found)
        look(5.1)
        assert names(found)[0] == "idle_in_transaction"
        before = len(found)
        look(60)
        assert names(found)[before:].count("idle_in_transaction") == 0
    for part in ("scope 'slow'", "idle in transaction for 5.", "SELECT 41", __file__.rpartition("/")[2]):
        assert part in found[0].message
    look(0)
    assert not budgets._watcher._seen


@twice
async def test_failures_4_a_statement_makes_it_busy_again(kit: Kit, alone: None, found: list[Found]) -> None:
    """What counts is the time without one."""
    guards.configure(long_transaction="off")
    async with kit.scope():
        session = kit.session()
        await kit.done(session.scalar(text("SELECT 1")))
        look(0)
        look(4)
        await kit.done(session.scalar(text("SELECT 1")))
        look(8)
        look(12)
        assert not found
        look(13.5)
        assert names(found) == ["idle_in_transaction"]


@twice
async def test_failures_35_a_long_transaction_is_told_with_its_age(kit: Kit, alone: None, found: list[Found]) -> None:
    """However busy it is."""
    guards.configure(idle_in_transaction="off")
    async with kit.transaction() as session:
        for second in range(0, 7, 2):
            await kit.done(session.scalar(text("SELECT 1")))
            look(second)
    assert names(found) == ["long_transaction"]
    assert "in one transaction for 6." in found[0].message


@twice
async def test_statement_36_work_apart_may_take_long(kit: Kit, alone: None, found: list[Found]) -> None:
    """It is in a context of its own, with limits of its own."""
    async with kit.scope():
        apart = kit.db.apart("back-fill")
        kit.databases.append(apart)
        async with kit.transaction(apart) as session:
            await kit.done(session.scalar(text("SELECT 1")))
            look(0)
            look(3600)
    assert not found


@twice
async def test_statement_36_a_scope_that_took_too_long_is_told_at_its_end(kit: Kit, found: list[Found]) -> None:
    """If it used a database; by its name, and the line that opened it."""
    guards.configure(budget=1e-9, idle_in_transaction="off", long_transaction="off")
    async with kit.scope("empty"):
        pass
    async with kit.scope("slow"):
        await kit.done(kit.session().scalar(text("SELECT 1")))
    assert names(found) == ["long_scope"]
    assert "scope 'slow' (opened at " in found[0].message


@twice
@pytest.mark.parametrize("following", ["INSERT INTO payments (amount) VALUES (1)", "SELECT 2"])
@pytest.mark.parametrize("managed", [False, True], ids=["plain", "managed"])
async def test_raise_refuses_the_next_statement(kit: Kit, alone: None, following: str, managed: bool) -> None:
    """Be it a read: the watcher is no part of the work, and cannot raise in it; the transaction cannot go on."""
    guards.configure(idle_in_transaction="raise")
    with pytest.raises(GuardError, match="idle in transaction for"):
        async with kit.transaction() if managed else kit.scope():
            session = kit.session()
            await kit.done(session.scalar(text("SELECT 1")))
            look(0)
            look(6)
            await kit.done(session.execute(text(following)))
    assert (kit.count(), kit.checked_out()) == (0, 0)
    async with kit.transaction() as session:
        await kit.done(session.execute(text("INSERT INTO payments (amount) VALUES (2)")))
    assert kit.amounts() == [2]


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "reset"])
@twice
async def test_raise_refuses_no_later_transaction(kit: Kit, alone: None, end: str) -> None:
    """What was found about one that has ended by itself is no matter of the session's next one."""
    guards.configure(idle_in_transaction="raise")
    async with kit.scope():
        session = kit.session()
        await kit.done(session.scalar(text("SELECT 1")))
        look(0)
        look(6)
        await kit.done(getattr(session, end)())
        assert await kit.done(session.scalar(text("SELECT 2"))) == 2


@twice
async def test_raise_refuses_none_that_begins_while_it_is_found(
    kit: Kit, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread looks at one that ends at this moment."""
    guards.configure(idle_in_transaction="raise", long_transaction="off")
    async with kit.scope():
        session = kit.session()
        sync = getattr(session, "sync_session", session)
        await kit.done(session.scalar(text("SELECT 1")))
        look(0)
        found = budgets.Guard.found

        def too_late(guard: budgets.Guard, message: str, **about: Any) -> None:
            sync._dbscope.connection, kept[:] = None, [sync._dbscope.connection]
            found(guard, message, **about)

        kept: list[Any] = []
        with monkeypatch.context() as ending:
            ending.setattr(budgets.IdleInTransaction, "found", too_late)
            look(6)
        (sync._dbscope.connection,) = kept
        await kit.done(session.execute(text("INSERT INTO payments (amount) VALUES (1)")))
        await kit.done(session.commit())
    assert kit.amounts() == [1]


def test_the_thread_looks_while_something_is_open_and_sleeps_otherwise(sync_kit: SyncKit, found: list[Found]) -> None:
    """It is woken by the next connection that is taken."""
    kit = sync_kit
    guards.configure(budget=0.02, long_scope="off")
    for _ in range(2):
        told = threading.Event()
        ended = observe(lambda fact, told=told: told.set(), Found)
        with kit.db.transaction() as session:
            session.scalar(text("SELECT 1"))
            assert told.wait(LIMIT)
        ended()
        asleep()
    assert {"idle_in_transaction", "long_transaction"} >= set(names(found))


def test_a_thread_that_cannot_begin_is_no_matter_of_the_work(
    sync_kit: SyncKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has none to give, or the interpreter ends: the work is saved, and the next one wakes it."""
    own = budgets._Watcher()
    own._guards = [*budgets._watcher._guards]
    monkeypatch.setattr(lifecycle, "sleepers", [own.wake])

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", refuse)
        with sync_kit.db.transaction() as session:
            session.execute(text("INSERT INTO payments (amount) VALUES (1)"))
    assert sync_kit.amounts() == [1]
    with sync_kit.db.reader() as session:
        session.scalar(text("SELECT 1"))
    assert own._thread is not None
    own._guards = []
    own._awake.set()
    own._thread.join(LIMIT)


def test_statement_36_the_thread_sleeps_while_only_work_apart_is_open(
    sync_kit: SyncKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing for it to look at, for hours."""
    own = budgets._Watcher()
    own._guards = [*budgets._watcher._guards]
    looks = []

    def look(now: float) -> bool:
        looks.append(now)
        if len(looks) == 3:
            own._guards = []
        return budgets._Watcher.look(own, now)

    monkeypatch.setattr(own, "look", look)
    monkeypatch.setattr(own._awake, "wait", lambda *_: own._guards.clear())
    with sync_kit.db.apart("back-fill") as apart, apart.transaction() as session:
        session.scalar(text("SELECT 1"))
        own._run()
    lifecycle.sleepers.remove(own.wake)
    assert len(looks) == 1


def asleep() -> None:
    """Wait until the thread has nothing to look at, and the core is to wake it."""
    wait_for(lambda: budgets._watcher.wake in lifecycle.sleepers)


def test_a_thread_s_implicit_scope_may_last_as_long_as_the_thread(sync_kit: SyncKit, found: list[Found]) -> None:
    """It is no piece of work."""
    guards.configure(budget=1e-9, idle_in_transaction="off", long_transaction="off")

    def work() -> None:
        sync_kit.session().scalar(text("SELECT 1"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT)
    assert sync_kit.checked_out() == 0
    assert not found
