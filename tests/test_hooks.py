"""Hooks: DESIGN's Transactions 8."""

import asyncio
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.util import await_only

from dbscope import ConfigurationError, NoTransactionError, RollbackOnlyError, current_scope
from tests.support.kits import AsyncKit, Kit, Payment, SyncKit, twice

LIMIT = 30  # seconds, for what happens at once


def write(amount: int) -> Any:
    """An INSERT that goes to the database at once."""
    return insert(Payment).values(amount=amount)


@twice
async def test_transactions_8_hooks_run_after_the_commit_in_their_order(kit: Kit) -> None:
    """`on_commit` hooks run once each, in order, with their arguments, after the commit, with nothing checked out."""
    seen: list[Any] = []

    def hook(name: str, *, key: int = 0) -> None:
        seen.append((name, key, kit.amounts(), kit.checked_out()))

    async with kit.transaction() as session:
        kit.db.on_commit(hook, "first")
        session.add(Payment(amount=1))
        kit.db.on_commit(hook, "second", key=2)
        kit.db.on_rollback(hook, "never")
        assert seen == []
    assert seen == [("first", 0, [1], 0), ("second", 2, [1], 0)]


@twice
async def test_transactions_8_hooks_of_a_transaction_in_a_scope_run_at_its_end(kit: Kit) -> None:
    """In a scope the hooks run when the transaction has ended, not when the scope does, and once."""
    seen: list[int] = []
    async with kit.scope():
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.on_commit(lambda: seen.append(kit.checked_out()))
        assert seen == [0]
        async with kit.transaction() as session:
            session.add(Payment(amount=2))
        assert seen == [0]
    assert seen == [0]


@twice
async def test_transactions_8_hooks_of_a_rollback(kit: Kit) -> None:
    """Where the block fails, `on_commit` hooks are dropped and `on_rollback` ones run, after the connection is back."""
    seen: list[Any] = []
    for in_scope in (False, True):
        seen.clear()
        async with kit.scope() if in_scope else kit.block(_Nothing()):
            with pytest.raises(KeyError):
                async with kit.transaction() as session:
                    await kit.done(session.execute(write(1)))
                    kit.db.on_commit(seen.append, "never")
                    kit.db.on_rollback(lambda: seen.append(kit.checked_out()))
                    raise KeyError
            assert seen == [0]


class _Nothing:
    """A block of either colour that does nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *error: object) -> None: ...


@twice
async def test_transactions_8_hooks_of_a_joined_block_wait_for_the_outer(kit: Kit) -> None:
    """A hook given in a joined block runs after the outermost commit."""
    seen: list[int] = []
    async with kit.transaction() as session:
        async with kit.transaction():
            session.add(Payment(amount=1))
            kit.db.on_commit(lambda: seen.append(kit.count()))
        assert seen == []
    assert seen == [1]


@pytest.mark.parametrize("opened_by", ["nested", "begin_nested"])
@twice
async def test_transactions_8_hooks_know_savepoints(kit: Kit, opened_by: str) -> None:
    """Hooks of a savepoint that rolled back are dropped (and its `on_rollback` runs); of a released one they stay."""
    seen: list[str] = []

    def savepoint(session: Any) -> Any:
        return kit.transaction(nested=True) if opened_by == "nested" else kit.block(session.begin_nested())

    async with kit.transaction() as session:
        kit.db.on_commit(seen.append, "outer")
        async with savepoint(session):
            session.add(Payment(amount=1))
            kit.db.on_commit(seen.append, "released")
            kit.db.on_rollback(seen.append, "rollback of the released")
            with pytest.raises(KeyError):
                async with savepoint(session):
                    kit.db.on_commit(seen.append, "inner of the rolled back")
                    async with savepoint(session):
                        session.add(Payment(amount=2))
                        kit.db.on_commit(seen.append, "innermost")
                        kit.db.on_rollback(seen.append, "rollback of the innermost")
                    await kit.done(session.flush())
                    raise KeyError
            kit.db.on_commit(seen.append, "released, later")
        kit.db.on_commit(seen.append, "outer, later")
        assert seen == []
    assert seen == ["outer", "released", "rollback of the innermost", "released, later", "outer, later"]
    assert kit.amounts() == [1]


@twice
async def test_transactions_8_a_released_savepoints_hooks_go_with_the_outer(kit: Kit) -> None:
    """Where the outer transaction rolls back, hooks of a released savepoint go the way of the outer's."""
    seen: list[str] = []
    with pytest.raises(KeyError):
        async with kit.transaction():
            async with kit.transaction(nested=True) as session:
                session.add(Payment())
                kit.db.on_commit(seen.append, "never")
                kit.db.on_rollback(seen.append, "rolled back")
            raise KeyError
    assert seen == ["rolled back"]


@twice
async def test_transactions_8_no_hook_runs_where_the_commit_fails(kit: Kit) -> None:
    """A commit that cannot be (a doomed block, a flush that fails) runs the `on_rollback` hooks, not the others."""
    seen: list[str] = []
    with pytest.raises(RollbackOnlyError):
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
            kit.db.on_commit(seen.append, "never")
            kit.db.on_rollback(seen.append, "rolled back")
            await kit.done(session.rollback())
    assert seen == ["rolled back"]


@twice
async def test_transactions_8_a_failing_hook_stops_no_other(kit: Kit) -> None:
    """One failing hook: the others run, the work stays, and its error is raised with a note that says so."""
    seen: list[str] = []

    def fail() -> None:
        raise ValueError("mail")

    with pytest.raises(ValueError, match="mail") as caught:
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.on_commit(fail)
            kit.db.on_commit(seen.append, "after")
    assert seen == ["after"]
    assert kit.amounts() == [1]
    [note] = caught.value.__notes__
    assert "on_commit hook" in note
    assert "fail" in note
    assert "the commit stands" in note


@twice
async def test_transactions_8_several_failing_hooks_are_a_group(kit: Kit) -> None:
    """Several failing hooks are raised together."""

    def fail(error: type[Exception]) -> None:
        raise error

    with pytest.raises(ExceptionGroup, match="2 hooks failed; the transaction stands") as caught:
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.on_commit(fail, ValueError)
            kit.db.on_commit(fail, KeyError)
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]
    assert kit.amounts() == [1]


@twice
async def test_transactions_8_a_failing_rollback_hook_hides_no_error(
    kit: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the work itself failed, its error is what is raised; the hook's is noted on it, and logged."""

    def fail() -> None:
        raise ValueError("mail")

    with caplog.at_level(logging.ERROR, "dbscope"), pytest.raises(KeyError) as caught:
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
            kit.db.on_rollback(fail)
            raise KeyError
    assert "ValueError('mail')" in "".join(caught.value.__notes__)
    assert "a hook failed" in caplog.text


@twice
async def test_transactions_8_outside_of_a_transaction(kit: Kit) -> None:
    """Outside of a transaction `on_commit` runs at once and `on_rollback` never, whether a scope is open or not."""
    seen: list[str] = []
    kit.db.on_commit(seen.append, "no scope")
    kit.db.on_rollback(seen.append, "never")
    assert seen == ["no scope"]
    async with kit.scope():
        kit.db.on_commit(seen.append, "scope")
        await kit.done(kit.session().execute(text("SELECT 1")))
        kit.db.on_commit(seen.append, "read")
        kit.db.on_rollback(seen.append, "never")
        assert seen == ["no scope", "scope", "read"]


@pytest.mark.parametrize("how", ["pending", "flushed", "core"])
@twice
async def test_transactions_8_a_plain_scopes_writes_are_a_transaction(kit: Kit, how: str) -> None:
    """In a plain scope with writes, the hook waits for the user's own commit, and runs after the connection is back."""
    seen: list[Any] = []
    async with kit.scope():
        session = kit.session()
        if how == "core":
            await kit.done(session.execute(write(1)))
        else:
            session.add(Payment(amount=1))
            await kit.done(session.flush() if how == "flushed" else None)
        kit.db.on_commit(lambda: seen.append((kit.amounts(), kit.checked_out())))
        kit.db.on_rollback(seen.append, "never")
        assert seen == []
        await kit.done(session.commit())
        assert seen == [([1], 0)]
        session.add(Payment(amount=2))
        await kit.done(session.commit())
    assert len(seen) == 1


@twice
async def test_transactions_8_after_a_close_over_writes_no_transaction_is_open(kit: Kit) -> None:
    """After a `close()` that dropped writes, `on_commit` runs at once: it belongs to no transaction any more."""
    kit.database(uncommitted="off")
    seen: list[str] = []
    async with kit.scope():
        await kit.done(kit.session().execute(write(1)))
        await kit.done(kit.session().close())
        kit.db.on_commit(seen.append, "at once")
        kit.db.on_rollback(seen.append, "never")
        assert seen == ["at once"]
    assert seen == ["at once"]


@pytest.mark.parametrize("how", ["rollback", "close", "error"])
@twice
async def test_transactions_8_a_plain_scopes_hooks_are_dropped_on_rollback(kit: Kit, how: str) -> None:
    """In a plain scope the user's rollback or close, or an error, drops `on_commit` hooks and runs `on_rollback`."""
    kit.database(uncommitted="off")
    seen: list[str] = []
    try:
        async with kit.scope():
            session = kit.session()
            await kit.done(session.execute(write(1)))
            kit.db.on_commit(seen.append, "never")
            kit.db.on_rollback(seen.append, "rolled back")
            if how == "error":
                raise KeyError
            await kit.done(getattr(session, how)())
            assert seen == ["rolled back"]
    except KeyError:
        assert how == "error"
    assert seen == ["rolled back"]


@twice
async def test_transactions_8_in_an_on_success_scope(kit: Kit) -> None:
    """In an on-success scope hooks run after its commit; before its first statement already, they wait."""
    seen: list[Any] = []
    async with kit.scope(commit="on-success"):
        kit.db.on_commit(lambda: seen.append((kit.amounts(), kit.checked_out(), current_scope() is None)))
        kit.session().add(Payment(amount=1))
        assert seen == []
    assert seen == [([1], 0, False)]
    with pytest.raises(KeyError):
        async with kit.scope(commit="on-success"):
            kit.session().add(Payment(amount=2))
            kit.db.on_commit(seen.append, "never")
            kit.db.on_rollback(seen.append, "rolled back")
            raise KeyError
    assert seen[1:] == ["rolled back"]


@twice
async def test_transactions_8_in_an_independent_transaction(server_kit: Kit) -> None:
    """A hook belongs to the transaction it was given in: that of `new=True` runs after the inner commit."""
    kit = server_kit
    seen: list[str] = []
    with pytest.raises(KeyError):
        async with kit.transaction() as outer:
            await kit.done(outer.execute(write(1)))
            kit.db.on_commit(seen.append, "never")
            async with kit.transaction(new=True) as inner:
                inner.add(Payment(amount=2))
                kit.db.on_commit(seen.append, "inner")
            assert seen == ["inner"]
            raise KeyError
    assert seen == ["inner"]


@twice
async def test_transactions_8_in_a_reader(kit: Kit) -> None:
    """A reader commits nothing: a hook given in one runs at once, or with the transaction around the reader."""
    seen: list[str] = []
    async with kit.reader():
        kit.db.on_commit(seen.append, "reader")
        assert seen == ["reader"]
    with pytest.raises(KeyError):
        async with kit.transaction():
            async with kit.reader():
                kit.db.on_commit(seen.append, "never")
            raise KeyError
    assert seen == ["reader"]


def test_transactions_8_in_a_reader_in_the_threads_implicit_scope(sync_kit: SyncKit) -> None:
    """The transaction around a reader is found in the thread's implicit scope, too."""
    db, seen = sync_kit.db, list[int]()
    db.session().execute(text("SELECT 1"))
    with db.transaction():
        with db.reader():
            db.on_commit(seen.append, 1)
        assert seen == []
    assert seen == [1]
    db.session.remove()


@twice
async def test_failure_37_a_hook_may_use_the_database(kit: Kit) -> None:
    """FAILURES 37: a hook has a scope of its own, and may read and write, also in a transaction of its own."""
    seen: list[str] = []
    outer: list[Any] = []

    def start(name: str) -> Any:
        async def read_and_write() -> None:
            assert current_scope() not in (None, *outer)
            assert (await kit.done(kit.session().execute(text("SELECT count(*) FROM payments")))).scalar() == 1
            async with kit.transaction() as session:
                session.add(Payment(amount=2))
                kit.db.on_commit(seen.append, name)

        return read_and_write()

    hook = _of_colour(kit, start)
    async with kit.scope() as outer_scope:
        outer.append(outer_scope)
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.on_commit(hook, "done")
        assert kit.amounts() == [1, 2]
        assert current_scope() is outer_scope
    assert seen == ["done"]
    assert kit.checked_out() == 0


@twice
async def test_failure_37_a_plain_scopes_hook_may_use_the_database(kit: Kit) -> None:
    """FAILURES 37: after the user's own `session.commit()` too, where SQLAlchemy's events refuse SQL."""

    def start() -> Any:
        async def write_more() -> None:
            async with kit.transaction() as session:
                session.add(Payment(amount=2))

        return write_more()

    async with kit.scope():
        session = kit.session()
        session.add(Payment(amount=1))
        kit.db.on_commit(_of_colour(kit, start))
        await kit.done(session.commit())
        assert kit.amounts() == [1, 2]
        assert kit.checked_out() == 0


def _of_colour(kit: Kit, start: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the kit's colour that runs what `start` makes."""
    from tests.support.kits import drive

    if kit.colour == "sync":
        return lambda *args: drive(start(*args))

    async def hook(*args: Any) -> None:
        await start(*args)

    return hook


async def test_transactions_8_async_hooks_are_awaited(async_kit: AsyncKit) -> None:
    """On an async database a hook may be a coroutine function (a partial of one too), and is awaited."""
    seen: list[str] = []

    async def hook(name: str) -> None:
        await asyncio.sleep(0)
        seen.append(name)

    async with async_kit.db.transaction() as session:
        session.add(Payment())
        async_kit.db.on_commit(hook, "coroutine")
        async_kit.db.on_commit(functools.partial(hook, "partial"))
        async_kit.db.on_commit(seen.append, "plain")
    assert seen == ["coroutine", "partial", "plain"]


async def test_transactions_8_an_async_hook_outside_of_a_transaction(async_kit: AsyncKit) -> None:
    """Outside of a transaction a coroutine function is started at once, and `await db.on_commit(…)` waits for it."""
    seen: list[str] = []

    async def hook() -> None:
        await asyncio.sleep(0)
        seen.append("done")

    await async_kit.db.on_commit(hook)
    assert seen == ["done"]
    await async_kit.db.on_commit(seen.append, "plain")
    assert seen == ["done", "plain"]
    async with async_kit.db.transaction() as session:
        session.add(Payment())
        await async_kit.db.on_commit(hook)  # need not wait, and does not
        assert seen == ["done", "plain"]
    assert seen == ["done", "plain", "done"]


@twice
async def test_transactions_8_hooks_of_a_plain_scope_come_after_its_last_session(kit: Kit, tmp_path: Path) -> None:
    """What a scope's end rolled back is followed by its hooks when every session is given back, not in between."""
    other = kit.file(tmp_path / "other.db")
    seen: list[int] = []

    async def work() -> None:
        async with kit.scope():
            kit.session().add(Payment())
            await kit.done(kit.session().flush())
            await kit.done(kit.session(other).execute(select(Payment)))
            kit.db.on_rollback(lambda: seen.append(kit.checked_out() + kit.checked_out(other)))
            raise KeyError("the work failed")

    with pytest.raises(KeyError):
        await work()
    assert seen == [0]


@twice
async def test_transactions_8_a_hook_before_the_commit_may_give_another_database_one(kit: Kit, tmp_path: Path) -> None:
    """In an on-success scope all hooks come before the first commit, whichever database's hook gave them."""
    other = kit.file(tmp_path / "other.db")
    seen: list[str] = []
    async with kit.scope(commit="on-success"):
        for db in (kit.db, other):
            kit.session(db).add(Payment(amount=1))
        other.before_commit(kit.db.before_commit, lambda: seen.append(f"{kit.count()} committed"))
    assert seen == ["0 committed"]


async def _cancelled_in_a_hook(work: Callable[[Callable[[], Any]], Any]) -> asyncio.Task[Any]:
    """Run `work`, which gives the hook it is handed to a transaction, and cancel it while that hook waits."""
    reached = asyncio.Event()

    async def waits() -> None:
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(work(waits))
    await asyncio.wait_for(reached.wait(), LIMIT)
    task.cancel()
    await asyncio.wait({task}, timeout=LIMIT)
    return task


async def _cancelled_in_the_first_of_two(kit: AsyncKit, second: Callable[[], Any]) -> asyncio.Task[Any]:
    """Commit a payment, and cancel the work in its first hook; `second` is the other one."""

    async def work(waits: Callable[[], Any]) -> None:
        async with kit.db.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.on_commit(waits)
            kit.db.on_commit(second)

    return await _cancelled_in_a_hook(work)


async def test_transactions_8_a_cancel_ends_one_hook_and_stops_no_other(async_kit: AsyncKit) -> None:
    """What follows from a commit does not depend on the moment of a cancel, which comes out after the last hook."""
    seen: list[str] = []

    async def later() -> None:
        await asyncio.sleep(0)
        seen.append("later")

    task = await _cancelled_in_the_first_of_two(async_kit, later)
    assert task.cancelled()
    assert seen == ["later"]
    assert async_kit.amounts() == [1]


async def test_transactions_8_a_cancelled_hook_is_on_top_of_a_failing_one(async_kit: AsyncKit) -> None:
    """Where one hook was cancelled and a later one fails, the cancel comes out, and the error is a note of its."""

    def fail() -> None:
        raise ValueError("mail")

    task = await _cancelled_in_the_first_of_two(async_kit, fail)
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert "ValueError('mail')" in "".join(caught.value.__notes__)
    assert async_kit.amounts() == [1]


@twice
async def test_transactions_8_a_hook_that_ends_as_cancelled_stops_no_other(kit: Kit) -> None:
    """A hook that waited for something cancelled ends so itself: the others run, and it comes out."""
    seen: list[str] = []

    def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.on_commit(cancelled)
            kit.db.on_commit(seen.append, "later")
    assert seen == ["later"]
    assert kit.amounts() == [1]


async def test_transactions_9_a_cancel_ends_a_commit_that_waits(async_kit: AsyncKit) -> None:
    """A cancel reaches the commit under way, which may wait for long; a second one ends none of the hooks."""
    committing, hooked, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
    seen: list[str] = []

    async def hook() -> None:
        hooked.set()
        await go.wait()
        seen.append("rolled back")

    async def work() -> None:
        async with async_kit.db.transaction() as session:
            session.add(Payment(amount=1))
            async_kit.db.on_rollback(hook)
            event.listen(session.sync_session, "before_commit", waits)

    def waits(_: Any) -> None:
        committing.set()
        await_only(asyncio.Event().wait())

    task = asyncio.ensure_future(work())
    await asyncio.wait_for(committing.wait(), LIMIT)
    task.cancel()
    await asyncio.wait_for(hooked.wait(), LIMIT)
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    await asyncio.wait({task}, timeout=LIMIT)
    assert task.cancelled()
    assert seen == ["rolled back"]
    assert async_kit.amounts() == []


async def test_transactions_9_a_cancel_ends_no_rollback(async_kit: AsyncKit) -> None:
    """A cancel while the block's failure is cleaned up waits for that, and the failure is what comes out."""
    begun, go = asyncio.Event(), asyncio.Event()
    seen: list[str] = []

    def waits(_: Any) -> None:
        begun.set()
        await_only(go.wait())
        seen.append("rolled back")

    async def work() -> None:
        async with async_kit.db.transaction() as session:
            await session.execute(write(1))
            event.listen(session.sync_session, "after_transaction_end", lambda session, _: waits(session))
            raise KeyError

    task = asyncio.ensure_future(work())
    await asyncio.wait_for(begun.wait(), LIMIT)
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    await asyncio.wait({task}, timeout=LIMIT)
    assert isinstance(task.exception(), KeyError)
    assert seen == ["rolled back"]


async def test_transactions_9_a_cancel_in_a_rollback_hook_hides_no_error(async_kit: AsyncKit) -> None:
    """The block failed, and then the task is cancelled while the hooks run: the failure is what comes out."""

    async def work(waits: Callable[[], Any]) -> None:
        async with async_kit.db.transaction() as session:
            await session.execute(write(1))
            async_kit.db.on_rollback(waits)
            raise KeyError

    assert isinstance((await _cancelled_in_a_hook(work)).exception(), KeyError)


async def test_transactions_9_a_cancel_hides_no_failed_commit(async_kit: AsyncKit) -> None:
    """The commit failed, and then the task is cancelled while the hooks run: the failure is what comes out."""

    async def work(waits: Callable[[], Any]) -> None:
        async with async_kit.db.transaction() as session:
            session.add(Payment(amount=1))
            async_kit.db.on_rollback(waits)
            event.listen(session.sync_session, "before_commit", fail)

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    task = await _cancelled_in_a_hook(work)
    assert isinstance(task.exception(), ZeroDivisionError)
    assert async_kit.amounts() == []


@twice
async def test_transactions_8_a_failing_rollback_hook_hides_no_failed_commit(kit: Kit) -> None:
    """Where the commit failed, its error is what is raised; the hook's is noted on it."""

    def fail() -> None:
        raise ValueError("mail")

    with pytest.raises(IntegrityError) as caught:
        async with kit.transaction() as session:
            kit.db.on_rollback(fail)
            session.add(Payment(account_id=7))
    assert "ValueError('mail')" in "".join(caught.value.__notes__)


def test_transactions_8_coroutine_functions_are_refused_on_a_sync_database(sync_kit: SyncKit) -> None:
    """A sync database has no loop to await a coroutine function on, and says so when the hook is given."""

    async def hook() -> None: ...

    for function in (hook, functools.partial(hook)):
        with pytest.raises(ConfigurationError, match="coroutine function"):
            sync_kit.db.on_commit(function)
        with pytest.raises(ConfigurationError, match="coroutine function"):
            sync_kit.db.on_rollback(function)


@twice
async def test_transactions_8_a_hook_is_a_function(kit: Kit) -> None:
    """What cannot be called is refused when it is given, not after the commit."""
    with pytest.raises(ConfigurationError, match="a hook is a function"):
        kit.db.on_commit("send")


async def test_transactions_8_a_sync_databases_hook_never_blocks_the_loop(tmp_path: Any) -> None:
    """Hooks of a sync database in an `async with scope()` run in a worker thread, where they may use the database."""
    import threading

    from dbscope import Database, scope
    from tests.support.kits import make_kit

    kit = make_kit("sync", f"sqlite:///{tmp_path / 'test.db'}")
    seen: list[Any] = []
    db: Database[Any] = kit.db

    def hook() -> None:
        with db.transaction() as session:
            session.add(Payment(amount=2))
        seen.append(threading.current_thread() is threading.main_thread())

    async with scope(commit="on-success"):
        db.session.add(Payment(amount=1))
        db.on_commit(hook)
    assert seen == [False]
    assert kit.amounts() == [1, 2]
    db.dispose()


# -- before the commit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["block", "block in a scope", "on-success scope"])
@twice
async def test_transactions_8_before_commit_is_a_part_of_the_transaction(kit: Kit, where: str) -> None:
    """`before_commit` hooks run in their order, with what they give themselves, and what they write is committed."""
    seen: list[str] = []

    def check(name: str, *, more: bool = False) -> None:
        seen.append(f"{name}: {len(kit.amounts())} committed")
        kit.session().add(Payment(amount=len(seen)))
        if more:
            kit.db.before_commit(check, "given by a hook")

    around = kit.scope(commit="on-success" if where == "on-success scope" else None)
    async with around if "scope" in where else kit.block(_Nothing()):
        async with kit.block(_Nothing()) if where == "on-success scope" else kit.transaction():
            kit.session()
            kit.db.before_commit(check, "first", more=True)
            kit.db.before_commit(check, "second")
            kit.db.on_commit(lambda: seen.append("committed"))
            assert seen == []
    assert seen == ["first: 0 committed", "second: 0 committed", "given by a hook: 0 committed", "committed"]
    assert kit.amounts() == [1, 2, 3]


@twice
async def test_transactions_8_a_failing_before_commit_rolls_back(kit: Kit) -> None:
    """Its error comes out, nothing is committed, no later one runs, and `on_rollback` hooks do."""
    seen: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.before_commit(fail)
            kit.db.before_commit(seen.append, "never")
            kit.db.on_rollback(seen.append, "rolled back")
    assert seen == ["rolled back"]
    assert kit.amounts() == []
    assert kit.checked_out() == 0


@twice
async def test_transactions_8_before_commit_knows_savepoints_and_rollbacks(kit: Kit) -> None:
    """One that was given in a savepoint goes with it; none runs before a rollback, asked for or not."""
    seen: list[str] = []
    async with kit.transaction():
        with pytest.raises(KeyError):
            async with kit.transaction(nested=True) as session:
                await kit.done(session.execute(write(1)))
                kit.db.before_commit(seen.append, "never")
                raise KeyError
        async with kit.transaction(nested=True) as session:
            await kit.done(session.execute(write(2)))
            kit.db.before_commit(seen.append, "of a savepoint that was kept")
    assert seen == ["of a savepoint that was kept"]
    async with kit.transaction():
        kit.db.before_commit(seen.append, "never")
        kit.db.set_rollback_only()
    with pytest.raises(KeyError):
        async with kit.transaction():
            kit.db.before_commit(seen.append, "never")
            raise KeyError
    async with kit.transaction() as session:
        session.add(Payment(amount=3))
        kit.db.before_commit(kit.db.set_rollback_only)
    assert seen == ["of a savepoint that was kept"]
    assert kit.amounts() == [2]


@twice
async def test_transactions_8_a_doom_in_before_commit_is_the_end(kit: Kit) -> None:
    """A hook may refuse the commit, and the hooks after it do not run."""
    seen: list[str] = []
    with pytest.raises(RollbackOnlyError, match="the books do not balance"):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            kit.db.before_commit(kit.db.doom, "the books do not balance")
            kit.db.before_commit(seen.append, "never")
    assert seen == []
    assert kit.amounts() == []


@twice
async def test_transactions_8_before_commit_needs_a_transaction(kit: Kit) -> None:
    """Outside of a managed transaction there is no commit of dbscope's to come before."""
    async with kit.scope():
        kit.session().add(Payment(amount=1))
        with pytest.raises(NoTransactionError, match=r"before_commit\(\) was called at .*test_hooks.py"):
            kit.db.before_commit(print)
        await kit.done(kit.session().rollback())


async def test_transactions_8_an_async_hook_before_the_commit(async_kit: AsyncKit) -> None:
    """A coroutine function is awaited before the commit, and may await the database."""

    async def check() -> None:
        await async_kit.session().execute(write(2))

    async with async_kit.transaction() as session:
        session.add(Payment(amount=1))
        async_kit.db.before_commit(check)
    assert async_kit.amounts() == [1, 2]


@twice
async def test_transactions_8_a_robust_hook_is_worth_no_error(kit: Kit, caplog: Any) -> None:
    """The error of a hook with `robust=True` is logged, with its name, and not raised; within a transaction or not."""

    def fail() -> None:
        raise ZeroDivisionError

    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        kit.db.on_commit(fail, robust=True)
    [record] = caplog.records
    assert "fail" in record.getMessage()
    assert record.exc_info[0] is ZeroDivisionError
    kit.db.on_commit(fail, robust=True)
    assert len(caplog.records) == 2
    with pytest.raises(KeyError):
        async with kit.transaction():
            kit.db.on_rollback(fail, robust=True)
            raise KeyError
    assert len(caplog.records) == 3


async def test_transactions_8_a_robust_coroutine_function(async_kit: AsyncKit, caplog: Any) -> None:
    """The same for a hook that is awaited."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async with async_kit.transaction() as session:
        session.add(Payment(amount=1))
        async_kit.db.on_commit(fail, robust=True)
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]
