"""A pool that runs dry names its holders: FAILURES 1, 20, 21."""

import logging
import threading
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dbscope import guards
from tests.support.kits import LIMIT, Kit, SyncKit, twice
from tests.support.lines import marked


async def exhausted(kit: Kit) -> PoolTimeout:
    """The error of work that finds the pool's one connection taken by another's."""
    kit.database(pool_size=1, max_overflow=0, pool_timeout=0.05)
    taken, over = kit.event(), kit.event()

    async def holder() -> None:
        async with kit.scope("the holder"):
            await kit.done(kit.session().scalar(text("SELECT 41")))
            taken.set()
            await over.wait()

    async def waiter() -> PoolTimeout:
        await taken.wait()
        try:
            with pytest.raises(PoolTimeout) as caught:
                async with kit.scope("the waiter"):
                    await kit.done(kit.session().scalar(text("SELECT 42")))
            return caught.value
        finally:
            over.set()

    _, error = await kit.together(holder, waiter)
    return error  # type: ignore[no-any-return]


@twice
async def test_failures_1_the_error_lists_the_holders(kit: Kit) -> None:
    """Scope, line that opened it, task or thread, age, state, line that took it, last statement."""
    error = await exhausted(kit)
    (note,) = error.__notes__
    head, line = note.split("\n")
    assert head == "The pool's connections are held by:"
    assert line.startswith("- scope 'the holder' (opened at ")
    for part in (__file__.rpartition("/")[2], "idle in transaction, taken at ", "SELECT 41", " s, "):
        assert part in line
    assert ("task " if kit.colour == "async" else "thread ") in line
    assert "SELECT 42" not in note


@twice
async def test_failures_1_off_leaves_the_error_as_it_is(kit: Kit) -> None:
    """Nothing is added."""
    guards.configure(pool_exhausted="off")
    error = await exhausted(kit)
    assert not getattr(error, "__notes__", [])


@twice
async def test_failures_1_log_says_it_besides(kit: Kit, caplog: pytest.LogCaptureFixture, found: list[Any]) -> None:
    """Where the error itself is swallowed."""
    guards.configure(pool_exhausted="log")
    with caplog.at_level(logging.WARNING, "dbscope.guards"):
        await exhausted(kit)
    assert "SELECT 41" in caplog.text
    assert [fact.guard for fact in found] == ["pool_exhausted"]


def test_failures_1_what_the_engine_gave_to_others_is_counted(sync_kit: SyncKit) -> None:
    """A connection that was taken without a session has no scope to be named by."""
    kit = sync_kit
    kit.database(pool_size=1, max_overflow=0, pool_timeout=0.05)
    with kit.db.engine.connect(), pytest.raises(PoolTimeout) as caught, kit.db.reader() as session:
        session.scalar(text("SELECT 42"))
    assert "1 taken from the engine itself, by no session" in caught.value.__notes__[0]


def test_failures_21_a_connection_of_the_engine_itself_is_waited_for_as_well(sync_kit: SyncKit) -> None:
    """Whoever waits gets the list."""
    kit = sync_kit
    kit.database(pool_size=1, max_overflow=0, pool_timeout=0.05)
    errors: list[PoolTimeout] = []

    def wait() -> None:
        with pytest.raises(PoolTimeout) as caught:
            kit.db.engine.connect()
        errors.append(caught.value)

    with kit.db.transaction() as session:
        session.scalar(text("SELECT 41"))
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(LIMIT)
    assert "SELECT 41" in errors[0].__notes__[0]


@twice
@pytest.mark.parametrize("by", ["new_session", "engine"])
async def test_failures_20_work_that_waits_for_itself_is_told_both_lines(kit: Kit, by: str) -> None:
    """A second connection for work that holds the pool's one: the line that took it, and the one that asks."""
    kit.database(pool_size=1, max_overflow=0, pool_timeout=0.05)
    async with kit.scope("GET /orders"):
        await kit.done(kit.session().scalar(text("SELECT 41")))  # taken
        with pytest.raises(PoolTimeout) as caught:
            if by == "engine":
                async with kit.block(kit.db.engine.connect()):  # asks by engine
                    pass
            async with kit.block(kit.db.new_session()) as session:
                await kit.done(session.scalar(text("SELECT 42")))  # asks by new_session
    last = caught.value.__notes__[0].split("\n")[-1]
    asks = marked(f"asks by {by}") if kit.colour == "async" or by == "new_session" else ""
    assert last.startswith(f"The one taken at tests/guards/{marked('taken')} was last used by t")
    assert f"{asks}: it waits for itself" in last
