"""Ending sync sessions from a loop, and waiting to the end although cancelled (DESIGN, Scopes 10)."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, select, text

from dbscope import current_scope, scope
from dbscope.plan import Call, finish, off_loop, to_completion
from tests.support import needs
from tests.support.kits import LIMIT, Account, Payment


def held_up(kit, name="before_commit"):
    """Two events: the next commit of the kit's database (or its connection's return to the pool) has begun; go on."""
    begun, go = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        assert go.wait(LIMIT)

    target = kit.db.engine if name == "checkin" else kit.db.session
    event.listen(target, name, wait, once=True)
    return begun, go


async def until(happened):
    """Wait for a thread's event on the loop."""
    assert await asyncio.to_thread(happened.wait, LIMIT)


async def test_scopes_10_two_tasks_that_wait_for_each_others_row(sync_server_kit):
    """Two tasks of one loop, the second's scope ending in a wait for the row that the first has locked: both finish."""
    kit = sync_server_kit
    kit.database(connect_args={"options": "-c lock_timeout=10s"})
    with kit.db.transaction() as session:
        session.add(Account(id=1, name="a"))
    locked = asyncio.Event()

    async def first():
        async with scope("first", commit="on-success"):
            kit.session().get(Account, 1).balance += 1
            kit.session().flush()
            locked.set()
            await asyncio.to_thread(waits_for_a_row, kit)

    async def second():
        await locked.wait()
        async with scope("second", commit="on-success"):
            kit.session().get(Account, 1).name = "b"  # flushed, and so blocked, when the scope ends

    await asyncio.gather(first(), second())
    with scope():
        account = kit.session().get(Account, 1)
        assert (account.balance, account.name) == (1, "b")


def waits_for_a_row(kit):
    """Wait until a connection of the test's database waits for another's transaction to end."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with kit.outside.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _ in range(100_000):
            if connection.scalar(waiting):
                return
    raise AssertionError("nobody waits for a lock")


@pytest.mark.parametrize("commit", [None, "on-success"])
async def test_scopes_10_it_is_done_in_threads_of_dbscopes_own(sync_kit, commit):
    """A full default executor, as one full of requests that wait, does not keep a scope from ending."""
    free, full = threading.Event(), threading.Event()
    names = []
    event.listen(sync_kit.db.engine, "checkin", lambda *_: names.append(threading.current_thread().name))
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))

    def fill():
        full.set()
        return free.wait(LIMIT)

    blocked = loop.run_in_executor(None, fill)
    full.wait(LIMIT)
    async with scope(commit=commit):
        sync_kit.session().scalar(select(Payment.id))
    free.set()
    assert await blocked is True
    assert sync_kit.checked_out() == 0
    assert len(names) == 1
    assert names[0].startswith("dbscope")


async def test_scopes_10_the_loop_goes_on_meanwhile(sync_kit):
    """While a commit is held up in the thread, other tasks run."""
    begun, go = held_up(sync_kit)

    async def request():
        async with scope(commit="on-success"):
            sync_kit.session().add(Payment())

    task = asyncio.create_task(request())
    await until(begun)
    assert not task.done()
    async with scope():
        assert sync_kit.session().scalar(select(Payment.id)) is None
    go.set()
    await task
    assert sync_kit.count() == 1


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("at", ["before_commit", "checkin"])
async def test_scopes_10_cancelled_meanwhile(sync_kit, at, times):
    """A task that is cancelled, again and again, while its scope ends leaves nothing checked out; it ends cancelled."""
    begun, go = held_up(sync_kit, at)

    async def request():
        async with scope(commit="on-success"):
            sync_kit.session().add(Payment())

    task = asyncio.create_task(request())
    await until(begun)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()  # the thread holds the connection still
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sync_kit.checked_out() == 0
    assert current_scope() is None
    with sync_kit.db.transaction() as session:
        session.add(Payment())


@pytest.mark.parametrize("times", [1, 3])
async def test_transactions_9_a_cancel_does_not_hide_what_a_thread_committed(sync_kit, times):
    """A COMMIT in a thread cannot be cancelled: where it succeeds, the hooks of a commit run before the cancel."""
    begun, go = held_up(sync_kit)
    hooks = []

    def fail():
        raise ValueError("mail")

    async def request():
        async with scope(commit="on-success"):
            sync_kit.session().add(Payment())
            sync_kit.db.on_commit(hooks.append, "committed")
            sync_kit.db.on_commit(fail)
            sync_kit.db.on_rollback(hooks.append, "rolled back")

    task = asyncio.create_task(request())
    await until(begun)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert "ValueError('mail')" in "".join(caught.value.__notes__)
    assert sync_kit.count() == 1
    assert hooks == ["committed"]


async def test_transactions_9_a_cancel_while_a_hook_runs_in_a_thread(sync_kit):
    """A hook in a thread cannot be cancelled either: it and the next come to their end, and then the cancel."""
    begun, go = threading.Event(), threading.Event()
    hooks = []

    def hook():
        begun.set()
        assert go.wait(LIMIT)
        hooks.append("first")

    async def request():
        async with scope(commit="on-success"):
            sync_kit.session().add(Payment())
            sync_kit.db.on_commit(hook)
            sync_kit.db.on_commit(hooks.append, "second")

    task = asyncio.create_task(request())
    await until(begun)
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert hooks == ["first", "second"]


async def test_scopes_10_cancelled_by_anyio(async_kit, sync_kit):
    """AnyIO cancels at every await, until the block is left: sync and async sessions are given back all the same."""
    anyio = needs.module("anyio", extra="async")
    with anyio.CancelScope() as cancel:
        async with scope():
            sync_kit.session().add(Payment())
            sync_kit.session().flush()
            await async_kit.session().scalar(text("SELECT 1"))
            cancel.cancel()
            await anyio.lowlevel.checkpoint()
    assert cancel.cancelled_caught
    assert sync_kit.checked_out() == 0
    assert async_kit.checked_out() == 0


async def test_scopes_10_what_is_not_in_a_transaction_stays_on_the_loop(sync_kit, monkeypatch):
    """A session that holds nothing costs no thread."""
    names = []
    event.listen(sync_kit.db.session, "after_transaction_end", lambda *_: names.append(threading.current_thread().name))
    async with scope():
        sync_kit.session().add(Payment())
        sync_kit.session().commit()
    assert set(names) == {threading.current_thread().name}
    monkeypatch.delattr("dbscope.plan.off_loop")
    async with scope(commit="on-success"):
        sync_kit.session()


async def test_off_loop_runs_in_this_context():
    """Blocking work sees the scope of the task that waits for it, and its error comes out."""
    async with scope("here"):
        assert (await off_loop(current_scope)).name == "here"
        with pytest.raises(ZeroDivisionError):
            await off_loop(lambda: 1 // 0)


async def test_off_loop_has_a_thread_for_everybody():
    """As many pieces of work as there are wait at the same time: none waits for another's thread."""
    together = threading.Barrier(50)
    await asyncio.gather(*(off_loop(lambda: together.wait(LIMIT)) for _ in range(50)))


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("way", ["to_completion", "finish", "finish, forwarding"])
async def test_work_outlasts_every_cancel(times, way):
    """However often the waiting task is cancelled, the work comes to its end first; `forward` passes one cancel on."""
    begun, go, seen = asyncio.Event(), asyncio.Event(), []

    async def work():
        begun.set()
        try:
            await go.wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await go.wait()
        seen.append("done")
        return 42

    def plan():
        return (yield Call(work, blocking=False))

    async def waits():
        if way == "to_completion":
            return await to_completion(asyncio.ensure_future(work()))
        result, cancelled = await finish(plan(), forward=way != "finish")
        seen.append(result)
        raise cancelled

    task = asyncio.create_task(waits())
    await begun.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    expected = {"to_completion": ["done"], "finish": ["done", 42], "finish, forwarding": ["cancelled", "done", 42]}
    assert seen == expected[way]


async def test_to_completion_gives_the_result_and_the_error():
    """Uncancelled it is the work's result, or its error; of work that failed while we were cancelled, the cancel."""

    async def gives():
        return 42

    async def fails():
        await asyncio.sleep(0)
        raise KeyError("why")

    assert await to_completion(asyncio.ensure_future(gives())) == 42
    with pytest.raises(KeyError):
        await to_completion(asyncio.ensure_future(fails()))
    failing = asyncio.ensure_future(fails())
    task = asyncio.create_task(to_completion(failing))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__context__, KeyError)


async def test_to_completion_of_work_that_was_cancelled_itself():
    """Work that somebody else cancelled ends the waiting, as cancelled."""

    async def forever():
        await asyncio.Event().wait()

    work = asyncio.ensure_future(forever())
    task = asyncio.create_task(to_completion(work))
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
