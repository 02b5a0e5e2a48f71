"""A sync session on a running event loop is seen and named: FAILURES 42."""

import asyncio
import logging
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dbscope import GuardError, guards, scope
from dbscope.events import SyncOnLoop
from dbscope.guards import policy
from tests.support.kits import AsyncKit, SyncKit


@pytest.fixture(autouse=True)
def as_if_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line has been told yet."""
    monkeypatch.setattr(policy._guards["sync_on_loop"], "_told", set())


async def select(kit: SyncKit) -> None:
    """A handler that is `async def`, with a sync session."""
    async with scope("GET /orders"):
        kit.db.session.scalar(text("SELECT 42"))


def test_failures_42_a_sync_session_on_the_loop_is_named(
    sync_kit: SyncKit, found: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """By default: its scope, its line, its task, and what to do; once for each line, however often it runs."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task
        task.set_name("the handler")
        for _ in range(3):
            await select(sync_kit)

    with caplog.at_level(logging.WARNING, "dbscope.guards"):
        asyncio.run(main())
    (fact,) = found
    assert (fact.guard, fact.database) == ("sync_on_loop", sync_kit.db)
    for part in ("scope 'GET /orders'", "task 'the handler'", f"{__file__.rpartition('/')[2]}:", "running event loop"):
        assert part in fact.message
    for remedy in ("AsyncDatabase", "asyncio.to_thread", "`def`"):
        assert remedy in fact.message
    assert len(caplog.records) == 1


def test_failures_42_raise_refuses_it_each_time(sync_kit: SyncKit) -> None:
    """And the connection is back afterwards."""
    guards.configure(sync_on_loop="raise")
    for _ in range(2):
        with pytest.raises(GuardError, match="running event loop"):
            asyncio.run(select(sync_kit))
        assert sync_kit.checked_out() == 0


def test_failures_42_off_for_everybody_asks_nothing(sync_kit: SyncKit, found: list[Any]) -> None:
    """The core then tells no such fact."""
    guards.configure(sync_on_loop="off")
    assert not SyncOnLoop.observers
    asyncio.run(select(sync_kit))
    assert not found


def test_failures_42_a_pool_that_runs_dry_on_the_loop_says_that_it_stopped_all_tasks(sync_kit: SyncKit) -> None:
    """The task that holds the one connection could not give it back meanwhile."""
    kit = sync_kit
    kit.database(pool_size=1, max_overflow=0, pool_timeout=0.05)

    async def main() -> PoolTimeout:
        taken = asyncio.Event()

        async def holder() -> None:
            async with scope("the holder"):
                kit.db.session.scalar(text("SELECT 41"))
                taken.set()
                await asyncio.sleep(0)

        async def waiter() -> PoolTimeout:
            await taken.wait()
            with pytest.raises(PoolTimeout) as caught:
                await select(kit)
            return caught.value

        return (await asyncio.gather(holder(), waiter()))[1]

    assert "on the running event loop: no task could give one back" in "\n".join(asyncio.run(main()).__notes__)


def test_failures_42_threads_and_async_sessions_are_as_they_should_be(
    sync_kit: SyncKit, async_kit: AsyncKit, found: list[Any]
) -> None:
    """So is a sync session in a worker thread of the loop's, a scope's end included."""

    async def work() -> None:
        async with scope("request"):
            await asyncio.to_thread(lambda: sync_kit.db.session.scalar(text("SELECT 42")))
            await async_kit.db.session.scalar(text("SELECT 42"))

    with sync_kit.db.reader() as session:
        session.scalar(text("SELECT 42"))
    async_kit.run(work())
    assert not found


def test_failures_42_a_notebook_has_its_loop_for_itself(
    sync_kit: SyncKit, found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So has SQLite in memory nothing to wait for."""

    async def main() -> None:
        with scope():
            db.session.scalar(text("SELECT 42"))

    db = sync_kit.memory()
    asyncio.run(main())
    db = sync_kit.db
    monkeypatch.setattr("dbscope.guards.sync_on_loop.in_ipython", lambda: True)
    asyncio.run(main())
    assert not found
