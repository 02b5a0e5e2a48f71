"""Scopes by id: for frameworks that signal the start and the end of their work."""

import asyncio
import threading

import pytest
from sqlalchemy import text

from dbscope import (
    ConfigurationError,
    ScopeEndedError,
    ScopeMisuseError,
    UncommittedWrites,
    aend_scope,
    begin_scope,
    current_scope,
    end_scope,
    scope,
)
from dbscope.ids import _open
from tests.support.kits import LIMIT, Payment, twice
from tests.test_scope import Pause, in_thread


@pytest.fixture(autouse=True)
def nothing_is_left():
    """The table holds open scopes only: after each test it is empty."""
    yield
    assert _open == {}


async def end(kit, *args):
    """End a scope by id, in the kit's colour."""
    await aend_scope(*args) if kit.colour == "async" else end_scope(*args)


@twice
async def test_ids_begin_and_end(kit):
    """What `begin_scope` opens is current and named after its id, and `end_scope` releases it."""
    work = begin_scope("request 7")
    assert current_scope() is work
    assert work.name == "request 7"
    session = kit.session()
    await kit.done(session.scalar(text("SELECT 1")))
    await end(kit, "request 7")
    assert current_scope() is None
    assert kit.checked_out() == 0
    with pytest.raises(ScopeEndedError, match=r"'request 7'.*test_ids\.py"):
        await kit.done(session.scalar(text("SELECT 1")))


@twice
async def test_ids_begin_again_joins(kit):
    """The same id in another thread or task is the same work, as long as it is open; then it is new work."""
    first = begin_scope(7, "job")
    session = kit.session()

    async def another():
        assert begin_scope(7) is first
        return kit.session() is session

    assert await kit.together(another) == [True]
    await end(kit, 7)
    second = begin_scope(7)
    assert second is not first
    assert kit.session() is not session
    await end(kit, 7)


@twice
async def test_ids_unknown_and_repeated_ends_are_harmless(kit):
    """Ending what was never begun, twice, or by an id that cannot be hashed, does nothing."""
    await end(kit, "unknown")
    await end(kit, [])
    begin_scope("once")
    await end(kit, "once")
    await end(kit, "once")
    assert current_scope() is None


def test_ids_an_unhashable_id_is_refused():
    """An id that could never be found again is refused, with what to use."""
    with pytest.raises(ConfigurationError, match="list is not"):
        begin_scope([1])
    assert current_scope() is None


@twice
async def test_ids_commit_on_success(kit):
    """`commit="on-success"` commits at the end, unless the end tells of an error."""
    begin_scope("good", commit="on-success")
    kit.session().add(Payment(amount=1))
    await end(kit, "good")
    begin_scope("bad", commit="on-success")
    kit.session().add(Payment(amount=2))
    await kit.done(kit.session().flush())
    await end(kit, "bad", KeyError())
    assert kit.amounts() == [1]


@twice
async def test_ids_a_failing_end_is_over_all_the_same(kit):
    """Where the end itself fails the id is free again, and everything released."""
    begin_scope("fails", commit="on-success")
    kit.session().add(Payment(account_id=99))
    with pytest.raises(Exception, match="FOREIGN KEY"):
        await end(kit, "fails")
    assert kit.checked_out() == 0
    assert "fails" not in _open
    await end(kit, "fails")


def test_ids_uncommitted_writes_are_reported(sync_kit):
    """FAILURES 40: an end by id reports what nobody committed."""
    begin_scope("job")
    sync_kit.session().add(Payment())
    sync_kit.session().flush()
    with pytest.warns(UncommittedWrites, match="'job'"):
        end_scope("job")


def test_ids_from_any_thread(sync_kit):
    """One thread begins, another works, a third ends."""
    in_thread(lambda: begin_scope("job"))

    def work():
        begin_scope("job")
        sync_kit.session().add(Payment())
        sync_kit.session().flush()
        sync_kit.session().commit()
        return sync_kit.session()

    session = in_thread(work)
    assert not isinstance(session, BaseException)
    assert in_thread(lambda: end_scope("job")) is None
    with pytest.raises(ScopeEndedError):
        session.scalar(text("SELECT 1"))
    assert sync_kit.count() == 1


def test_ids_ending_while_the_session_executes_elsewhere(sync_kit):
    """The session is dead at once, and the thread that executes on it gives its connection back when it is through."""
    pause = Pause(sync_kit.db.engine)
    results = []
    session = None

    def work():
        nonlocal session
        begin_scope("job")
        session = sync_kit.session()
        results.append(session.scalar(text("SELECT pause()")))
        try:
            session.scalar(text("SELECT 1"))
        except ScopeEndedError:
            results.append("dead")

    thread = threading.Thread(target=work)
    thread.start()
    assert pause.entered.wait(LIMIT)
    end_scope("job")
    assert sync_kit.checked_out() == 1  # nobody pulls a connection away under a statement
    pause.go.set()
    thread.join()
    assert results == [1, "dead"]
    assert sync_kit.checked_out() == 0
    assert not sync_kit.db.holders


async def test_ids_a_sync_end_cannot_wait(async_kit):
    """`end_scope` on the loop, of a scope that holds an async connection, is refused with what to call, and can be
    made good by that."""
    begin_scope("request")
    await async_kit.session().scalar(text("SELECT 1"))
    with pytest.raises(ScopeMisuseError, match=r"`await aend_scope\(id\)`"):
        end_scope("request")
    assert not current_scope().ended
    await aend_scope("request")
    assert async_kit.checked_out() == 0


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
async def test_ids_a_sync_end_of_async_sessions_that_hold_nothing(async_kit, used):
    """Where nothing has to be awaited `end_scope` ends async sessions, too."""
    begin_scope("request")
    session = async_kit.session()
    if used:
        session.add(Payment())
        await session.commit()
    end_scope("request")
    with pytest.raises(ScopeEndedError):
        await session.scalar(text("SELECT 1"))
    assert current_scope() is None


async def test_ids_ended_from_another_thread_on_the_owning_loop(async_kit):
    """`end_scope` from a thread without a loop ends the async sessions on the loop that they belong to."""
    begin_scope("request")
    await async_kit.session().scalar(text("SELECT 1"))
    await asyncio.to_thread(end_scope, "request")
    assert async_kit.checked_out() == 0
    with pytest.raises(ScopeEndedError):
        async_kit.session()


async def test_ids_ended_from_another_loop_on_the_owning_loop(async_kit):
    """`aend_scope` on another loop waits for the owning loop to end the sessions there."""
    begin_scope("request", commit="on-success")
    async_kit.session().add(Payment())
    await asyncio.to_thread(lambda: asyncio.run(aend_scope("request")))
    assert async_kit.checked_out() == 0
    assert async_kit.count() == 1


@pytest.mark.parametrize("how", ["thread", "loop"])
async def test_ids_ended_from_elsewhere_with_an_error(async_kit, how):
    """The owning loop is told what the work failed with; and whoever ended it is in the scope around it again."""
    error = KeyError()

    async def aend():
        await aend_scope("request", error)
        return current_scope()

    def end():
        end_scope("request", error)
        return current_scope()

    async with scope("outer") as outer:
        begin_scope("request", commit="on-success")
        async_kit.session().add(Payment())
        await async_kit.session().flush()
        assert await asyncio.to_thread(end if how == "thread" else lambda: asyncio.run(aend())) is outer
    assert async_kit.count() == 0


def test_ids_ended_after_its_loop(tmp_path):
    """A scope whose loop is gone says so, instead of waiting for ever."""
    from tests.support.kits import make_kit

    kit = make_kit("async", f"sqlite:///{tmp_path / 'test.db'}")

    async def left_open():
        begin_scope("left open")
        kit.session()

    kit.run(left_open())
    with pytest.raises(ScopeMisuseError, match=r"'left open'.*does not run any more"):
        asyncio.run(aend_scope("left open"))
    end_scope("left open")  # it holds nothing, and can go


def test_ids_many_threads_begin_the_same_work(sync_kit):
    """Of many threads that begin the same id at the same moment one opens the scope, and all are in it."""
    barrier = threading.Barrier(8)
    found = []

    def begin():
        barrier.wait(LIMIT)
        found.append(begin_scope("same"))
        assert current_scope() is found[0]

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(work) for work in found}) == 1
    end_scope("same")


def test_ids_the_outer_scope_comes_back(sync_kit):
    """A scope that was open when the id began is current again when it ends."""
    from dbscope import scope

    with scope("outer") as outer:
        begin_scope("inner")
        assert current_scope() is not outer
        end_scope("inner")
        assert current_scope() is outer
