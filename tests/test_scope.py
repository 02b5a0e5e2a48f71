"""Scopes: whose work it is, which sessions belong to it, and what is left when it is over (DESIGN, Scopes 1 to 5)."""

import asyncio
import contextlib
import contextvars
import gc
import os
import re
import signal
import sys
import threading
import types
import warnings
import weakref

import pytest
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dbscope import (
    ConfigurationError,
    Database,
    NoScopeError,
    OverlapError,
    Scope,
    ScopeEndedError,
    ScopeMisuseError,
    ScopeWarning,
    UncommittedWrites,
    UncommittedWritesError,
    begin_scope,
    current_scope,
    end_scope,
    scope,
)
from dbscope.hooks import Hook
from dbscope.lifecycle import Write
from dbscope.scope import Colour, PlacedScope, open_scopes_of_this_context
from dbscope.session import _USES
from tests.support.kits import LIMIT, Account, Payment, twice


def in_thread(function):
    """The result of a function in a thread of its own, which has ended; or its error."""
    results = []

    def catch():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    return results[0]


def line_of(function, offset):
    """`file.py:line` of the line that many lines below the head of a function of this file."""
    return f"test_scope.py:{function.__code__.co_firstlineno + offset}"


# -- 1: no dictionary of sessions by key -------------------------------------------------------------------------


@twice
async def test_scopes_1_a_scope_has_one_session_for_each_database(kit, tmp_path):
    """In one scope a database always gives the same session, and two databases give two."""
    other = kit.file(tmp_path / "other.db")
    async with kit.scope():
        assert kit.session() is kit.session()
        assert kit.session(other) is not kit.session()
        assert kit.session(other) is kit.session(other)


def test_scopes_1_a_scope_serves_both_colours(sync_kit, tmp_path):
    """One async scope holds a sync and an async session side by side, and releases both."""
    from tests.support.kits import make_kit

    async_kit = make_kit("async", f"sqlite:///{tmp_path / 'async.db'}")

    async def test():
        async with scope("both"):
            sync_kit.session().scalar(text("SELECT 1"))
            await async_kit.session().scalar(text("SELECT 1"))
            assert (sync_kit.checked_out(), async_kit.checked_out()) == (1, 1)
        assert (sync_kit.checked_out(), async_kit.checked_out()) == (0, 0)

    async_kit.run(test())


def test_scopes_1_an_async_session_wants_an_async_scope(async_kit):
    """An async session in `with scope()` is refused at once, saying that it needs `async with`."""

    async def test():
        with scope("wrong colour"), pytest.raises(NoScopeError, match=r"async with scope\(\)") as caught:
            async_kit.session()
        assert "'wrong colour'" in str(caught.value)

    asyncio.get_event_loop_policy()
    async_kit.database()
    in_thread(lambda: asyncio.run(test()))


def test_scopes_1_a_new_thread_gets_a_new_session(sync_kit):
    """Fifty short threads, whose ids the system uses again, get fifty sessions."""
    sessions = [in_thread(sync_kit.session) for _ in range(50)]
    assert len({id(session) for session in sessions}) == 50


@twice
async def test_scopes_1_nothing_of_an_ended_scope_is_left(kit):
    """Scopes, and the sessions in them, are garbage when they are over: nothing holds on to them by a key."""

    async def use():
        async with kit.scope() as work:
            session = kit.session()
            await kit.done(session.execute(text("SELECT 1")))
            return weakref.ref(work), weakref.ref(session)

    refs = [ref for _ in range(10) for ref in await use()]
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


@twice
async def test_scopes_1_cycles_do_not_grow_anything(kit):
    """FAILURES 23: a thousand scopes leave no more objects behind than ten did."""

    async def use(times):
        for _ in range(times):
            async with kit.scope():
                await kit.done(kit.session().execute(text("SELECT 1")))
        gc.collect()
        return len(gc.get_objects())

    await use(100)
    before = await use(10)
    assert await use(1000) - before < 100


def test_scopes_1_a_forgotten_implicit_scope_ends_with_its_thread(sync_kit):
    """A thread that ends without a word gives its connection back at once, without the garbage collector."""
    gc.disable()
    try:
        in_thread(lambda: sync_kit.session().scalar(text("SELECT 1")))
        assert sync_kit.checked_out() == 0
    finally:
        gc.enable()


@twice
async def test_scopes_1_an_ended_scope_is_empty(kit):
    """The scope itself lets go of its sessions when it ends, so that a kept scope keeps nothing alive."""
    async with kit.scope() as work:
        kit.session()
        assert work.has(kit.db)
    assert not work.has(kit.db)
    with pytest.raises(ScopeEndedError):
        work.open(kit.db)


# -- 2: outside of any scope -------------------------------------------------------------------------------------


def test_scopes_2_a_thread_has_an_implicit_scope(sync_kit):
    """Outside of every scope a thread keeps one session of its own, another than every other thread's."""

    def twice_the_same():
        first = sync_kit.session()
        assert sync_kit.session() is first
        return first

    first, second = in_thread(twice_the_same), in_thread(twice_the_same)
    assert isinstance(first, Session)
    assert first is not second


def test_scopes_2_an_explicit_scope_is_apart_from_the_implicit_one(sync_kit):
    """A scope that is opened in a thread has another session than the thread's implicit one, which then goes on."""

    def test():
        outside = sync_kit.session()
        with scope():
            assert sync_kit.session() is not outside
        return sync_kit.session() is outside

    assert in_thread(test) is True


def test_scopes_2_a_running_task_has_no_implicit_scope(sync_kit):
    """Inside a running task the thread's scope is refused, for all tasks would share it, with what to open."""

    async def test():
        with pytest.raises(NoScopeError, match=r"task 'Task-\d+'.*outside of every scope(?s:.*)`async with scope\(\)"):
            sync_kit.session()

    def thread():
        mine = sync_kit.session()  # even where the thread has one already
        asyncio.run(test())
        return sync_kit.session() is mine

    assert in_thread(thread) is True


def test_scopes_2_a_cell_of_ipython_has_an_implicit_scope(sync_kit, monkeypatch):
    """IPython runs its cells as tasks, one after the other: there the implicit scope works as in a thread."""
    shell = types.SimpleNamespace(get_ipython=lambda: object())  # the one function that is asked
    monkeypatch.setitem(sys.modules, "IPython", shell)

    async def cell():
        return sync_kit.session()

    assert in_thread(lambda: asyncio.run(cell()) is asyncio.run(cell())) is True
    shell.get_ipython = lambda: None  # imported by an application, which is no shell
    assert isinstance(in_thread(lambda: asyncio.run(cell())), NoScopeError)


def test_scopes_2_implicit_scopes_can_be_refused_everywhere(sync_kit):
    """With `implicit_scopes=False` a session outside of every scope is an error that says what to open."""
    sync_kit.database(implicit_scopes=False)
    error = in_thread(sync_kit.session)
    assert isinstance(error, NoScopeError)
    assert re.search(r"implicit_scopes=False(?s:.*)`with scope\(\)", str(error))
    with scope():
        sync_kit.session()
    with sync_kit.db.transaction(), sync_kit.db.reader():
        pass


async def test_scopes_2_an_async_database_has_no_implicit_scope(async_kit):
    """An async session outside of every scope is refused, with what to open: nobody would await its end."""
    with pytest.raises(NoScopeError, match=r"`async with scope\(\)"):
        async_kit.session()
    with pytest.raises(NoScopeError):
        async_kit.db.session.add(Payment())


async def test_an_async_session_in_a_worker_thread_is_refused(async_kit):
    """It could not be awaited there: the error says so where it is asked for, and not where a coroutine is lost."""
    async with scope("request"):
        with pytest.raises(NoScopeError, match=r"in scope 'request'.*, in a thread that cannot await.\n.*`async def`"):
            await asyncio.to_thread(async_kit.session)
        assert async_kit.session() is not None


# -- 3: nesting, and exits out of order and out of context -------------------------------------------------------


@twice
async def test_scopes_3_a_nested_scope_has_its_own_sessions(kit):
    """An inner scope has another session; leaving it makes the outer one current again, with the same session."""
    async with kit.scope("outer") as outer:
        session = kit.session()
        async with kit.scope("inner") as inner:
            assert current_scope() is inner
            assert kit.session() is not session
        assert current_scope() is outer
        assert kit.session() is session
    assert current_scope() is None


@twice
async def test_scopes_3_an_exit_that_fails_restores_the_outer(kit):
    """Where the end of a scope or block raises, the scope around it is current again all the same."""
    kit.database(uncommitted="raise")
    async with kit.scope("outer") as outer:
        with pytest.raises(UncommittedWritesError):
            async with kit.scope("inner"):
                await _flushed(kit, kit.session())
        assert current_scope() is outer
        with pytest.raises(IntegrityError):
            async with kit.transaction(new=True) as session:
                session.add(Payment(account_id=7))
        assert current_scope() is outer


@twice
async def test_scopes_3_an_exit_in_another_context_releases(kit):
    """A scope that is left in a copy of the context, as FastAPI leaves dependencies, gives everything back."""
    work = kit.scope()
    await work.__aenter__()
    await kit.done(kit.session().execute(text("SELECT 1")))
    assert kit.checked_out() == 1
    if kit.colour == "sync":
        from tests.support.kits import drive

        contextvars.copy_context().run(lambda: drive(work.__aexit__(None, None, None)))
    else:
        await asyncio.create_task(work.__aexit__(None, None, None))
    assert kit.checked_out() == 0
    assert current_scope() is None  # the ended one counts as none, although it is still there in this context
    with pytest.raises(ScopeEndedError):
        kit.session()
    async with kit.scope() as next_one:
        assert current_scope() is next_one
        kit.session()
    assert current_scope() is None


def test_scopes_3_an_inner_scope_that_was_left_elsewhere_is_not_open():
    """The outer scope may end here when the inner one has ended in another context, and takes it away from here."""
    with scope("outer"):
        work = scope("inner")
        work.__enter__()
        contextvars.copy_context().run(work.__exit__, None, None, None)
    assert current_scope() is None
    with Database("sqlite://") as db:
        assert db.session.scalar(text("SELECT 1")) == 1  # the thread's own again
        db.session.remove()


@twice
async def test_scopes_3_an_exit_out_of_order_is_reported_and_releases(kit):
    """The outer scope ends first: a warning names both, everything is released, and no dead scope becomes current."""
    outer, inner = kit.scope("outer"), kit.scope("inner")
    await outer.__aenter__()
    await kit.done(kit.session().execute(text("SELECT 1")))
    await inner.__aenter__()
    await kit.done(kit.session().execute(text("SELECT 1")))
    with pytest.warns(ScopeWarning, match=r"'outer' .* ended before scope 'inner'"):
        await outer.__aexit__(None, None, None)
    assert kit.checked_out() == 1
    kit.session()  # the inner one goes on
    await inner.__aexit__(None, None, None)
    assert kit.checked_out() == 0
    assert current_scope() is None
    with scope():
        pass


@twice
async def test_scopes_3_the_outer_scope_comes_back_although_it_has_ended(kit):
    """After an inner scope, code that outlived the outer one is told so again, and is not outside of every scope."""
    async with kit.scope("request") as outer:
        await kit.done(outer.finish() if kit.colour == "sync" else outer.afinish())
        async with kit.scope("stream"):
            kit.session()
        with pytest.raises(ScopeEndedError, match="'request'"):
            kit.session()
    assert current_scope() is None


async def test_scopes_3_tasks_that_start_each_other_keep_no_ended_scopes():
    """Work that is handed from task to task for ever, each in a scope of its own, does not keep all of them."""
    made, alive, done = [], [], asyncio.Event()
    running = set()

    async def link(left):
        async with scope() as work:
            made.append(weakref.ref(work))
            if left:
                running.add(task := asyncio.create_task(link(left - 1)))
                task.add_done_callback(running.discard)
        del work
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        if not left:
            done.set()

    await link(20)
    await done.wait()
    assert max(alive) <= 4


@twice
async def test_scopes_3_an_exit_out_of_order_of_empty_scopes(kit):
    """Scopes without sessions take a shorter way out, and are reported all the same."""
    outer, middle, inner = kit.scope("outer"), kit.scope("middle"), kit.scope("inner")
    for work in (outer, middle, inner):
        await work.__aenter__()
    with pytest.warns(ScopeWarning, match="'middle'"):
        await middle.__aexit__(None, None, None)
    await inner.__aexit__(None, None, None)
    assert current_scope() is not None
    assert current_scope().name == "outer"
    await outer.__aexit__(None, None, None)
    assert current_scope() is None


def test_scopes_3_a_suspended_scope_is_resumed_wherever_its_work_goes_on(sync_kit):
    """As a response that is made piece by piece: its sessions wait, and what is around it each time comes back."""
    work = PlacedScope("request", None)
    work.enter(Colour.SYNC)
    session = sync_kit.session()
    work.resume()  # it is current already
    work.suspend()
    assert current_scope() is None
    with scope("server") as around:
        work.resume()
        assert sync_kit.session() is session
        begin_scope("left open")
        work.suspend()
        assert current_scope() is around
        work.resume()
        end_scope("left open")
        work.resume()
        work.finish()
        with pytest.raises(ScopeEndedError, match="'request'"):
            sync_kit.session()
        work.suspend()
        assert current_scope() is around
        work.resume()
        with pytest.raises(ScopeEndedError, match="'request'"):
            sync_kit.session()
        work.suspend()
        assert current_scope() is around
    assert current_scope() is None


@twice
async def test_scopes_3_a_scope_is_entered_once(kit):
    """A scope serves one piece of work: entering it again is refused, while it is open and after."""
    work = scope("once")
    async with kit.block(work):
        with pytest.raises(ScopeMisuseError, match=r"'once'.*entered again"):
            await kit.block(work).__aenter__()
        assert current_scope() is work
    with pytest.raises(ScopeMisuseError, match="entered again"):
        await kit.block(work).__aenter__()
    await kit.block(work).__aexit__(None, None, None)  # ended twice: harmless


@twice
async def test_scopes_3_finish_ends_the_work_before_the_block(kit):
    """After `finish()` the sessions are dead and the connections back; leaving the block is harmless."""
    async with kit.scope(commit="on-success") as work:
        session = kit.session()
        session.add(Payment())
        await kit.done(work.finish() if kit.colour == "sync" else work.afinish())
        assert work.ended
        assert kit.count() == 1
        with pytest.raises(ScopeEndedError):
            session.add(Payment())
        await kit.done(work.finish() if kit.colour == "sync" else work.afinish())
    async with kit.scope(commit="on-success") as work:
        kit.session().add(Payment())
        await kit.done(work.finish(veto=True) if kit.colour == "sync" else work.afinish(veto=True))
    assert kit.count() == 1


@pytest.mark.parametrize("end", ["well", "an error", "a veto", "rollback-only", "a commit that fails"])
@twice
async def test_what_follows_from_the_success_of_a_scope(kit, end):
    """Is called when everything is committed and given back, be it used after that was asked for, and else dropped."""
    called = []
    expected = {"an error": ZeroDivisionError, "a commit that fails": IntegrityError}.get(end)
    with pytest.raises(expected) if expected else contextlib.nullcontext():
        async with kit.scope(commit="on-success") as work:
            work.after_commit(Hook(lambda: called.append(kit.checked_out()), "commit", None, name="it", blocking=True))
            kit.session().add(Account(name="same"))
            if end == "an error":
                raise ZeroDivisionError
            if end == "a veto":
                await kit.done(work.finish(veto=True) if kit.colour == "sync" else work.afinish(veto=True))
            if end == "rollback-only":
                kit.db.set_rollback_only()
            if end == "a commit that fails":
                kit.session().add(Account(name="same"))
    assert called == ([0] if end == "well" else [])


@pytest.mark.parametrize("commit", [None, "on-success"])
async def test_scopes_3_an_async_connection_is_not_ended_by_a_call_that_cannot_wait(async_kit, commit):
    """`finish()` refuses where `afinish()` is needed, and nothing has happened: the work goes on."""
    async with scope(commit=commit) as work:
        await async_kit.session().execute(text("SELECT 1"))
        with pytest.raises(ScopeMisuseError, match=r"Use `await afinish\(\)`"):
            work.finish()
        async_kit.session().add(Payment())
        await work.afinish() if commit else await async_kit.session().commit()
    assert async_kit.count() == 1


@pytest.mark.parametrize("end", [Scope.finish, lambda work: work.__exit__(None, None, None)], ids=["finish", "exit"])
def test_scopes_3_an_end_within_the_end_does_nothing(sync_kit, end):
    """A listener that ends the scope which is just committing neither commits twice nor releases too early."""
    with scope(commit="on-success") as work:
        session = sync_kit.session()
        event.listen(session, "after_flush", lambda *_: end(work))
        session.add(Payment())
    assert sync_kit.count() == 1
    assert current_scope() is None


@pytest.mark.parametrize("name", [7, b"x", ("a",)])
def test_scopes_3_a_name_is_a_string(name):
    """A name that is no string is refused with the call that would do."""
    with pytest.raises(ConfigurationError, match="a scope's name is a string") as caught:
        scope(name)
    assert f"scope({str(name)!r})" in str(caught.value)


def test_scopes_3_commit_has_one_other_value():
    """A misspelt `commit=` is refused when the scope is made."""
    with pytest.raises(ConfigurationError, match="on-success"):
        scope(commit="on_success")


def test_scopes_3_a_scope_says_who_it_is():
    """Its repr has the name, the line that opened it, and where it stands."""
    work = Scope("report")
    assert "'report'" in repr(work)
    with work:
        line = line_of(test_scopes_3_a_scope_says_who_it_is, 4)
        assert line in repr(work)
        assert "open" in repr(work)
    assert "ended" in repr(work)
    with scope() as nameless:
        assert "the scope opened at" in nameless.describe()
    assert repr(Scope()) == "<a scope: new>"


# -- 4: close() resets while the scope is open; its end is the end -----------------------------------------------


@twice
async def test_scopes_4_close_resets_while_the_scope_is_open(kit):
    """`with db.session() as session:` twice in one scope works, and is the same session."""
    async with kit.scope():
        async with kit.block(kit.session()) as first:
            first.add(Payment(amount=1))
            await kit.done(first.commit())
        assert kit.checked_out() == 0
        async with kit.block(kit.session()) as second:
            assert second is first
            second.add(Payment(amount=2))
            await kit.done(second.commit())
    assert kit.amounts() == [1, 2]


USES = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "scalar": lambda session: session.scalar(text("SELECT 1")),
    "scalars": lambda session: session.scalars(select(Payment)),
    "get": lambda session: session.get(Payment, 1),
    "connection": lambda session: session.connection(),
    "begin": lambda session: getattr(session, "sync_session", session).begin(),
    "begin_nested": lambda session: getattr(session, "sync_session", session).begin_nested(),
    "add": lambda session: session.add(Payment()),
    "add_all": lambda session: session.add_all([Payment()]),
    "merge": lambda session: session.merge(Payment(id=1)),
    "bulk": lambda session: getattr(session, "sync_session", session).bulk_save_objects([Payment()]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@twice
async def test_scopes_4_a_kept_session_is_dead_for_good(kit, use, used):
    """New SQL, and objects to be saved, raise on a session whose scope has ended, at the first try and at others."""
    async with kit.scope("request") as _:
        session = kit.session()
        if used:
            await kit.done(session.execute(text("SELECT 1")))
    for _ in range(2):
        with pytest.raises(ScopeEndedError, match="'request'"):
            await kit.done(use(session))
    assert kit.checked_out() == 0


def test_scopes_4_the_error_tells_the_whole_story(sync_kit):
    """It names the scope, where it was opened, where and when it ended, who asks, where, and what to do."""
    with scope("POST /orders"):
        kept = sync_kit.session()
    with pytest.raises(ScopeEndedError) as caught:
        kept.scalar(text("SELECT 1"))
    story = str(caught.value)
    name = test_scopes_4_the_error_tells_the_whole_story
    assert f"scope 'POST /orders' (opened at {'tests/' if 'tests/' in story else ''}{line_of(name, 2)})" in story
    assert line_of(name, 5) in story  # who asks
    assert re.search(rf"it ended \d+\.\d s ago at \S*{line_of(name, 2)}", story)
    assert f"thread {threading.current_thread().name!r}" in story
    assert "opens its own" in story
    assert "ids instead of objects" in story


@twice
async def test_scopes_4_harmless_clean_up_stays_harmless(kit):
    """`close()`, `rollback()`, and a `commit()` of nothing may come after the end, as from dependencies; twice, too."""
    async with kit.scope():
        session = kit.session()
        await kit.done(session.execute(text("SELECT 1")))
    for clean_up in (session.close, session.rollback, session.commit, session.expunge_all) * 2:
        await kit.done(clean_up())
    assert not session.in_transaction()
    assert kit.checked_out() == 0
    with pytest.raises(ScopeEndedError):
        await kit.done(session.execute(text("SELECT 1")))


@twice
async def test_scopes_4_clean_up_after_a_block_of_its_own_is_harmless(kit):
    """What a managed transaction refused is harmless clean-up when it is over: it has no owner any more."""
    async with kit.transaction() as session:
        await kit.done(session.execute(text("SELECT 1")))
    for clean_up in (session.close, session.rollback, session.commit, session.reset, session.invalidate) * 2:
        await kit.done(clean_up())
    assert kit.checked_out() == 0


@twice
async def test_scopes_4_work_that_inherited_the_scope_is_told(kit):
    """FAILURES 9: a background thread or task that outlives its request gets an error that says what to do."""
    over = kit.event()
    results = []

    async def background():
        await over.wait()
        with pytest.raises(
            ScopeEndedError, match=r"a session of .* was asked for by (?:task|thread) .*'request'.*ended"
        ):
            kit.session()
        async with kit.scope("its own"):
            await kit.done(kit.session().execute(text("SELECT 1")))
        results.append("done")

    async def request():
        async with kit.scope("request"):
            kit.session()
            if kit.colour == "async":
                return asyncio.create_task(background())
            thread = threading.Thread(target=contextvars.copy_context().run, args=(drive_it, background))
            thread.start()
            return thread

    def drive_it(function):
        from tests.support.kits import drive

        drive(function())

    left = await request()
    over.set()
    if kit.colour == "async":
        await left
    else:
        left.join()
    assert results == ["done"]


def test_scopes_4_what_outlives_its_scope_opens_one_that_is_inside_of_none():
    """The new scope of such work has nothing around it but what is still open."""
    with scope("outer") as outer:
        with scope("request"):
            context = contextvars.copy_context()

        async def aenter():
            async with scope():
                return open_scopes_of_this_context()[1:]

        def enter():
            with scope():
                return open_scopes_of_this_context()[1:]

        assert context.run(enter) == [outer]
        assert context.copy().run(asyncio.run, aenter()) == [outer]
    assert context.run(enter) == []
    assert context.copy().run(asyncio.run, aenter()) == []


@twice
async def test_scopes_4_a_stream_that_outlives_the_scope_is_told(kit):
    """FAILURES 3: a stream that goes on after the scope's end gets the error, not a connection for all its life."""

    async def stream(session):
        for _ in range(2):
            yield await kit.done(session.scalar(text("SELECT 1")))

    async with kit.scope("request"):
        rows = stream(kit.session())
        assert await anext(rows) == 1
    assert kit.checked_out() == 0
    with pytest.raises(ScopeEndedError, match="'request'"):
        await anext(rows)


def test_scopes_4_an_object_that_was_kept_is_detached(sync_kit):
    """What was loaded in the scope stays readable, and belongs to no session any more."""
    with sync_kit.db.transaction() as session:
        session.add(Payment(amount=3))
    with scope():
        payment = sync_kit.session().scalars(select(Payment)).one()
    assert payment.amount == 3
    assert payment not in sync_kit.db.new_session()
    with scope():
        sync_kit.session().add(payment)  # it can be attached again


# -- 5: one session, two threads or tasks ------------------------------------------------------------------------


class Pause:
    """A SQL function `pause()` that says when it was entered, and blocks until told to go on."""

    def __init__(self, engine):
        self.entered = threading.Event()
        self.go = threading.Event()
        event.listen(getattr(engine, "sync_engine", engine), "connect", self._connect)

    def _connect(self, connection, record):
        if hasattr(connection, "run_async"):
            connection.run_async(lambda driver: driver.create_function("pause", 0, self))
        else:
            connection.create_function("pause", 0, self)

    def __call__(self):
        self.entered.set()
        assert self.go.wait(LIMIT)
        return 1

    async def is_entered(self):
        """Wait for it, without blocking a loop that runs here."""
        assert await blocking(lambda: self.entered.wait(LIMIT))


async def blocking(function):
    """Call a function that blocks: in a thread, where a loop runs here."""
    if asyncio._get_running_loop() is None:
        return function()
    return await asyncio.to_thread(function)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.scalar(text("SELECT 1")),
        lambda session: session.flush(),
        lambda session: session.commit(),
        lambda session: session.rollback(),
        lambda session: session.close(),
        lambda session: session.connection(),
    ],
    ids=["scalar", "flush", "commit", "rollback", "close", "connection"],
)
@twice
async def test_scopes_5_overlap_raises_naming_both(kit, use, warm):
    """FAILURES 7, 27: a second thread or task on a busy session is refused, named with the first; the first goes on."""
    pause = Pause(kit.db.engine)
    if warm:
        async with kit.scope():
            await kit.done(kit.session().execute(text("SELECT 1")))

    async def first():
        if kit.colour == "async":
            asyncio.current_task().set_name("part_0")
        return await kit.done(kit.session().scalar(text("SELECT pause()")))

    async def second():
        await pause.is_entered()
        try:
            await kit.done(use(kit.session()))
        finally:
            pause.go.set()

    async with kit.scope("shared"):
        kit.session()
        one, error = await kit.together(first, second)
    assert one == 1
    assert isinstance(error, OverlapError)
    assert "part_0" in str(error)
    assert "scope 'shared'" in str(error)
    assert re.search(r"by (thread 'part_1'|task 'Task-\d+') at \S*test_scope.py", str(error))
    assert "fan_out" in str(error)


def test_scopes_5_every_call_that_may_talk_to_the_database_counts(sync_kit):
    """None of a session's methods that use the connection gets past the one that is executing."""
    pause = Pause(sync_kit.db.engine)
    arguments = {
        **dict.fromkeys(["execute", "scalar", "scalars"], (text("SELECT 1"),)),
        **dict.fromkeys(["bulk_insert_mappings", "bulk_update_mappings"], (Payment, [{"id": 1}])),
        "bulk_save_objects": ([Payment()],),
    }
    with scope():
        session = sync_kit.session()
        thread = threading.Thread(target=lambda: session.scalar(text("SELECT pause()")))
        thread.start()
        assert pause.entered.wait(LIMIT)
        for use in _USES:
            with pytest.raises(OverlapError, match=rf"session.{use}\(\) was called"):
                getattr(session, use)(*arguments.get(use, ()))
        pause.go.set()
        thread.join()


def test_scopes_5_overlap_raises_while_a_cold_pool_connects(sync_kit):
    """FAILURES 7, 27: the time in which the first user's connection is made counts, too."""
    connecting, go = threading.Event(), threading.Event()

    @event.listens_for(sync_kit.db.engine, "do_connect")
    def connect(*_):
        connecting.set()
        assert go.wait(LIMIT)

    with scope():
        session = sync_kit.session()
        results = []
        thread = threading.Thread(target=lambda: results.append(session.scalar(text("SELECT 1"))))
        thread.start()
        assert connecting.wait(LIMIT)
        try:
            with pytest.raises(OverlapError):
                session.scalar(text("SELECT 2"))
        finally:
            go.set()
            thread.join()
        assert results == [1]


async def test_scopes_5_overlap_of_tasks_while_a_cold_pool_connects(async_kit):
    """FAILURES 7: `gather` over one session is refused although the first is not through connecting."""
    async with scope():
        session = async_kit.session()
        one, two = await asyncio.gather(
            session.scalar(text("SELECT 1")), session.scalar(text("SELECT 2")), return_exceptions=True
        )
    assert one == 1
    assert isinstance(two, OverlapError)


def test_scopes_5_four_threads_on_one_session(sync_kit):
    """FAILURES 27: of four threads that use one session at once, one goes on and three are refused."""
    pause = Pause(sync_kit.db.engine)
    refused = threading.Barrier(4)
    errors = []

    def others(session):
        assert pause.entered.wait(LIMIT)
        try:
            session.commit()
        except OverlapError as error:
            errors.append(error)
        refused.wait(LIMIT)

    with scope():
        session = sync_kit.session()
        threads = [threading.Thread(target=others, args=[session]) for _ in range(3)]
        for thread in threads:
            thread.start()
        first = threading.Thread(target=lambda: session.scalar(text("SELECT pause()")))
        first.start()
        refused.wait(LIMIT)
        pause.go.set()
        for thread in [*threads, first]:
            thread.join()
    assert len(errors) == 3


async def test_scopes_5_handing_over_to_a_thread_is_fine(sync_kit):
    """The loop hands its scope's session to a worker thread, and takes it back."""
    async with scope():
        session = sync_kit.session()
        session.add(Payment())
        await asyncio.to_thread(session.flush)
        assert await asyncio.to_thread(lambda: sync_kit.session() is session)
        session.commit()
    assert sync_kit.count() == 1


async def test_scopes_5_handing_over_to_a_child_task_is_fine(async_kit):
    """A middleware's task opens the scope, a child of it runs the endpoint, as under Starlette's BaseHTTPMiddleware."""

    async def endpoint():
        session = async_kit.session()
        session.add(Payment())
        await session.commit()
        return session

    async with scope("request"):
        await async_kit.session().scalar(text("SELECT 1"))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(endpoint())
        assert task.result() is async_kit.session()
    assert async_kit.count() == 1


def test_scopes_5_handing_over_between_threads_is_fine(sync_kit):
    """For threads overlap alone counts: one writes, and another commits when it is through."""
    with scope():
        session = sync_kit.session()

        def write():
            session.add(Payment())
            session.flush()

        in_thread(write)
        in_thread(session.commit)
    assert sync_kit.count() == 1


async def of_siblings(kit, sibling, *, write=None, finish=None):
    """What comes of two tasks of one scope: one writes, its sibling does something, and then the first one commits.

    Args:
        sibling: called between the write and what follows it.
        write: instead of adding and flushing a payment.
        finish: instead of the commit.
    """
    wrote, tried = asyncio.Event(), asyncio.Event()

    async def add():
        kit.session().add(Payment(amount=7))
        await kit.done(kit.session().flush())

    async def writer():
        await (write or add)()
        wrote.set()
        await tried.wait()
        await (finish or (lambda: kit.done(kit.session().commit())))()

    async def beside():
        await wrote.wait()
        try:
            await sibling()
        finally:
            tried.set()

    async with scope("request"):
        kit.session()
        tasks = [asyncio.create_task(writer(), name="writer"), asyncio.create_task(beside(), name="sibling")]
        return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("ending", ["commit", "rollback", "close", "reset"])
async def test_scopes_5_a_sibling_cannot_end_what_another_wrote(async_kit, ending):
    """FAILURES 7: between a task's write and its commit no sibling may commit, roll back or close; both are named."""

    async def sibling():
        await getattr(async_kit.session(), ending)()

    one, error = await of_siblings(async_kit, sibling)
    assert one is None
    assert isinstance(error, OverlapError)
    assert re.search(rf"session.{ending}\(\) was called by task 'sibling' at \S*test_scope.py:\d+", str(error))
    assert re.search(r"while task 'writer', which wrote at \S*test_scope.py:\d+ .*still running", str(error))
    assert async_kit.amounts() == [7]


@pytest.mark.parametrize("door", ["transaction", "connection's commit", "connection's rollback"])
async def test_scopes_5_a_sibling_cannot_end_it_by_another_door(async_kit, door):
    """`session.get_transaction().commit()`, and the methods of `session.connection()`, are the same ends."""

    async def write():
        await async_kit.session().execute(update(Payment).values(amount=1))

    async def finish():
        await async_kit.session().rollback()

    async def sibling():
        if door == "transaction":
            await async_kit.session().get_transaction().commit()
        else:
            await getattr(await async_kit.session().connection(), door.split()[1])()

    _, error = await of_siblings(async_kit, sibling, write=write, finish=finish)
    assert isinstance(error, OverlapError)


async def test_scopes_5_a_rollback_by_another_door_is_told_to_the_one_who_wrote(async_kit):
    """Where a sibling's rollback cannot be refused, the writer's commit must not succeed without its rows."""

    async def finish():
        session = async_kit.session()
        with pytest.raises(OverlapError, match=r"task 'writer' wrote .* was rolled back by task 'sibling'"):
            await session.commit()
        await session.rollback()  # said and done: the session serves again
        session.add(Payment(amount=8))
        await session.commit()

    async def sibling():
        await async_kit.session().get_transaction().rollback()

    assert await of_siblings(async_kit, sibling, finish=finish) == [None, None]
    assert async_kit.amounts() == [8]


async def test_scopes_5_a_sibling_that_cleans_up_after_an_error_keeps_its_error(async_kit):
    """A sibling's `async with session:` around a failing body lets its own error through, with a note."""

    async def sibling():
        async with async_kit.session():
            raise KeyError("mine")

    _, error = await of_siblings(async_kit, sibling)
    assert isinstance(error, KeyError)
    assert async_kit.count() == 1


async def test_scopes_5_a_sibling_that_cleans_up_a_sync_session_keeps_its_error(sync_kit):
    """A sibling's `with session:` around a failing body does, too, on a sync session that tasks share."""

    async def sibling():
        with sync_kit.session():
            raise KeyError("mine")

    _, error = await of_siblings(sync_kit, sibling)
    assert isinstance(error, KeyError)
    assert "is still running" in error.__notes__[0]
    assert sync_kit.count() == 1


async def test_scopes_5_a_sibling_cannot_take_over_what_another_wrote(async_kit):
    """A sibling's block is refused with the names of both, not with the advice to commit the other's writes."""

    async def sibling():
        async with async_kit.transaction():
            pass

    _, error = await of_siblings(async_kit, sibling)
    assert isinstance(error, OverlapError)
    assert re.search(r"transaction\(\) was called by task 'sibling' .* task 'writer', which wrote", str(error))
    assert async_kit.amounts() == [7]


@pytest.mark.parametrize(
    "through",
    [
        lambda coroutine: asyncio.wait_for(coroutine, LIMIT),
        asyncio.shield,
        asyncio.create_task,
        lambda coroutine: coroutine,
    ],
    ids=["wait_for", "shield", "create_task", "await"],
)
@pytest.mark.parametrize("flushed", [False, True], ids=["pending", "flushed"])
async def test_scopes_5_a_task_started_after_the_write_may_end_it(async_kit, through, flushed):
    """The writer may end its transaction by a task that it starts after the write, while it waits itself."""
    async with scope():
        session = async_kit.session()
        session.add(Payment())
        if flushed:
            await session.flush()
        await through(session.commit())
    assert async_kit.count() == 1


async def test_scopes_5_the_writer_is_known_in_a_copy_of_the_context(sync_kit):
    """A task may end what it wrote by a call that some library made in a copied context."""
    async with scope():
        session = sync_kit.session()
        session.add(Payment())
        contextvars.copy_context().run(session.flush)
        session.commit()
    assert sync_kit.count() == 1


@pytest.mark.parametrize("ending", ["commit", "rollback", "savepoint"])
async def test_scopes_5_a_task_remembers_no_write_that_is_over(sync_kit, ending):
    """A task that writes again and again keeps nothing of its finished transactions and savepoints."""

    def kept():
        gc.collect()
        return sum(isinstance(found, Write) for found in gc.get_objects())

    before = kept()
    async with scope():
        session = sync_kit.session()
        for _ in range(20):
            savepoint = session.begin_nested() if ending == "savepoint" else None
            session.execute(insert(Payment))
            savepoint.rollback() if savepoint else getattr(session, ending)()
        assert kept() <= before + 1
        session.rollback()


@twice
async def test_scopes_8_what_a_savepoint_undid_is_not_missed(kit):
    """Writes that went with the rollback to a savepoint are not reported as lost, and a block may follow them."""
    async with kit.scope():
        session = kit.session()
        for _ in range(2):
            savepoint = await kit.done(session.begin_nested())
            await kit.done(session.execute(insert(Payment)))
            await kit.done(savepoint.rollback())
        async with kit.transaction():
            session.add(Payment(amount=1))
        savepoint = await kit.done(session.begin_nested())
        await kit.done(session.execute(insert(Payment)))
        await kit.done(savepoint.rollback())
    assert kit.amounts() == [1]


async def test_scopes_5_what_a_finished_task_wrote_anybody_may_end(async_kit):
    """When the task that wrote is through, its work is the scope's, and the parent commits it."""

    async def write(amount):
        async_kit.session().add(Payment(amount=amount))
        await async_kit.session().flush()

    async with scope():
        async_kit.session()
        await asyncio.create_task(write(1))
        await asyncio.create_task(write(2))
        await async_kit.session().commit()
    assert async_kit.amounts() == [1, 2]


async def test_scopes_5_the_scope_ends_what_a_running_task_wrote(async_kit):
    """The end of the scope is not refused by a child that wrote and still runs: the child is told when it goes on."""
    async_kit.database(uncommitted="off")
    wrote, over = asyncio.Event(), asyncio.Event()

    async def child():
        session = async_kit.session()
        session.add(Payment())
        await session.flush()
        wrote.set()
        await over.wait()
        await session.execute(text("SELECT 1"))

    async with scope("request"):
        async_kit.session()
        task = asyncio.create_task(child())
        await wrote.wait()
    assert async_kit.checked_out() == 0
    over.set()
    with pytest.raises(ScopeEndedError, match="'request'"):
        await task
    assert async_kit.count() == 0


@pytest.mark.parametrize("how", ["transaction", "on-success"])
async def test_scopes_5_the_owner_commits_what_a_running_task_wrote(async_kit, how):
    """The end of a managed transaction is its owner's, whoever wrote in it and still runs."""
    wrote, over = asyncio.Event(), asyncio.Event()

    async def child(session):
        session.add(Payment())
        await session.flush()
        wrote.set()
        await over.wait()

    async with async_kit.transaction() if how == "transaction" else scope(commit="on-success"):
        task = asyncio.create_task(child(async_kit.session()))
        await wrote.wait()
    assert async_kit.count() == 1
    over.set()
    await task


async def test_scopes_5_a_rolled_back_savepoint_frees_the_siblings(async_kit):
    """A task whose savepoint was rolled back has written nothing that a sibling's commit could end half-way."""
    undone, committed = asyncio.Event(), asyncio.Event()

    async def tries():
        savepoint = await async_kit.session().begin_nested()
        async_kit.session().add(Payment(amount=1))
        await async_kit.session().flush()
        await savepoint.rollback()
        undone.set()
        await committed.wait()

    async def commits():
        await undone.wait()
        await async_kit.session().commit()
        committed.set()

    async with scope():
        async_kit.session()
        await asyncio.gather(tries(), commits())
    assert async_kit.count() == 0


def test_scopes_5_a_dead_session_is_released_by_the_thread_that_uses_it(sync_kit):
    """A scope that ends while another thread executes leaves the release to that thread."""
    pause = Pause(sync_kit.db.engine)
    results = []
    with scope("short"):
        session = sync_kit.session()
        thread = threading.Thread(target=lambda: results.append(session.scalar(text("SELECT pause()"))))
        thread.start()
        assert pause.entered.wait(LIMIT)
    assert sync_kit.checked_out() == 1
    pause.go.set()
    thread.join()
    assert results == [1]
    assert sync_kit.checked_out() == 0
    with pytest.raises(ScopeEndedError):
        session.scalar(text("SELECT 1"))


# -- 7: a scope never commits ------------------------------------------------------------------------------------


@twice
async def test_scopes_7_a_scope_never_commits_by_itself(kit):
    """Leaving a plain scope rolls back; what was committed stays."""
    async with kit.scope():
        session = kit.session()
        session.add(Payment(amount=1))
        await kit.done(session.commit())
        session.add(Payment(amount=2))
        await kit.done(session.flush())
        await kit.done(session.rollback())
    assert kit.amounts() == [1]


@twice
async def test_scopes_7_commit_on_success(kit, tmp_path):
    """An on-success scope commits all its databases when its block ends well, and none when it fails."""
    other = kit.file(tmp_path / "other.db")
    async with kit.scope(commit="on-success"):
        kit.session().add(Payment(amount=1))
        kit.session(other).add(Payment(amount=1))
    with pytest.raises(KeyError):
        async with kit.scope(commit="on-success"):
            kit.session().add(Payment(amount=2))
            kit.session(other).add(Payment(amount=2))
            await kit.done(kit.session().flush())
            raise KeyError
    assert kit.amounts() == [1]
    async with kit.reader(other) as session:
        assert (await kit.done(session.scalars(select(Payment.amount)))).all() == [1]


# -- 8: writes that nobody committed -----------------------------------------------------------------------------


async def _saved(kit):
    async with kit.transaction() as session:
        session.add(Account(name="a"))


async def _pending(kit, session):
    session.add(Payment())


async def _dirty(kit, session):
    account = (await kit.done(session.scalars(select(Account)))).one()
    account.balance = 5


async def _deleted(kit, session):
    account = (await kit.done(session.scalars(select(Account)))).one()
    await kit.done(session.delete(account))


async def _flushed(kit, session):
    session.add(Payment())
    await kit.done(session.flush())


async def _core(kit, session):
    await kit.done(session.execute(update(Account).values(balance=1)))


async def _sql(kit, session):
    await kit.done(session.execute(text("UPDATE accounts SET balance = 2")))


async def _savepoint(kit, session):
    async with kit.block(session.begin_nested()):
        session.add(Payment())


async def _closed(kit, session):
    session.add(Payment())
    await kit.done(session.flush())
    await kit.done(session.close())


async def _closed_pending(kit, session):
    session.add(Payment())
    await kit.done(session.close())


WAYS = [_pending, _dirty, _deleted, _flushed, _core, _sql, _savepoint, _closed, _closed_pending]


@pytest.mark.parametrize("way", WAYS)
@twice
async def test_scopes_8_uncommitted_writes_are_reported(kit, way):
    """FAILURES 40: pending, dirty, deleted, flushed, Core, text() and what close() dropped: the scope's end warns."""
    await _saved(kit)
    with pytest.warns(UncommittedWrites, match=r"scope 'request' .* nobody committed") as caught:
        async with kit.scope("request"):
            await way(kit, kit.session())
    message = str(caught[0].message)
    assert len(caught) == 1
    assert "db.transaction()" in message
    if way in (_pending, _dirty, _deleted):
        assert ("Payment" if way is _pending else "Account") in message
    elif way is not _savepoint:  # its flush comes from the kit's line
        first, last = way.__code__.co_firstlineno, max(line for *_, line in way.__code__.co_lines() if line)
        assert first < int(re.search(r"test_scope.py:(\d+)", message.partition("first at")[2])[1]) <= last
    assert kit.checked_out() == 0


@twice
async def test_scopes_8_the_line_of_the_first_write_is_named(kit):
    """Of several writes it is the first one's line that is named."""
    with pytest.warns(UncommittedWrites) as caught:  # noqa: PT031
        async with kit.scope():
            session = kit.session()
            await kit.done(session.execute(text("INSERT INTO payments (amount) VALUES (1)")))
            await kit.done(session.execute(text("INSERT INTO payments (amount) VALUES (2)")))
    here = test_scopes_8_the_line_of_the_first_write_is_named.__wrapped__
    assert line_of(here, 6) in str(caught[0].message)
    assert (caught[0].filename, caught[0].lineno) == (__file__, here.__code__.co_firstlineno + 6)


def test_scopes_8_without_a_write_the_scopes_line_is_named(sync_kit):
    """Where nothing was sent yet, the warning stands at the line that opened the scope, whoever ends it."""
    with pytest.warns(UncommittedWrites) as caught:  # noqa: PT031
        with scope() as work:
            sync_kit.session().add(Payment())
            work.finish()
    here = test_scopes_8_without_a_write_the_scopes_line_is_named
    assert (caught[0].filename, caught[0].lineno) == (__file__, here.__code__.co_firstlineno + 3)


@twice
async def test_scopes_8_it_can_raise(kit):
    """With `uncommitted="raise"` the scope's end raises, having released; but never over the user's own error."""
    kit.database(uncommitted="raise")
    with pytest.raises(UncommittedWritesError, match="nobody committed"):
        async with kit.scope():
            await _flushed(kit, kit.session())
    assert kit.checked_out() == 0
    with pytest.raises(KeyError):
        async with kit.scope():
            await _flushed(kit, kit.session())
            raise KeyError
    assert kit.checked_out() == 0


@pytest.mark.parametrize("policy", ["warn", "raise"])
@twice
async def test_scopes_8_it_raises_for_every_database(kit, tmp_path, policy):
    """Where the writes to two databases are lost, the error (here warnings are errors) tells of both."""
    kit.database(uncommitted=policy)
    second = kit.file(tmp_path / "second.db", uncommitted=policy)
    error = UncommittedWritesError if policy == "raise" else UncommittedWrites
    with pytest.raises(error, match="nobody committed") as caught:
        async with kit.scope():
            await _flushed(kit, kit.session())
            await _flushed(kit, kit.session(second))
    assert second.name in caught.value.__notes__[0]


@twice
async def test_scopes_8_it_can_be_off(kit):
    """With `uncommitted="off"` nothing is said."""
    kit.database(uncommitted="off")
    async with kit.scope():
        await _flushed(kit, kit.session())
    assert kit.count() == 0


@pytest.mark.parametrize("ending", ["commit", "rollback", "error", "hidden error"])
@twice
async def test_scopes_8_what_was_decided_is_not_reported(kit, ending):
    """A commit, a rollback and an error are decisions: nothing is reported then, nor of what was only read."""
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(KeyError):
        warnings.simplefilter("always")  # as an error it would only be a note on the user's
        async with kit.scope():
            session = kit.session()
            if ending == "hidden error":
                with contextlib.suppress(KeyError):
                    async with kit.block(session):
                        await _flushed(kit, session)
                        raise KeyError
            else:
                await _flushed(kit, session)
                if ending == "error":
                    raise KeyError
                await kit.done(getattr(session, ending)())
            (await kit.done(session.scalars(select(Payment)))).all()
    assert not caught


@twice
async def test_scopes_8_warnings_that_are_errors_release_all_the_same(kit):
    """Where warnings are errors the report is raised from the scope's end, after everything was given back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UncommittedWrites):
            async with kit.scope():
                await _flushed(kit, kit.session())
    assert kit.checked_out() == 0
    assert current_scope() is None


def test_scopes_8_a_threads_implicit_scope_reports_at_its_end(sync_kit):
    """What a thread wrote outside of every scope and never committed is reported when the thread ends."""

    def work():
        sync_kit.session().add(Payment())
        sync_kit.session().flush()

    with pytest.warns(UncommittedWrites, match=r"scope 'thread .*'") as caught:
        in_thread(work)
    assert line_of(test_scopes_8_a_threads_implicit_scope_reports_at_its_end, 5) in str(caught[0].message)
    assert sync_kit.checked_out() == 0


def test_scopes_8_the_main_thread_reports_at_exit(tmp_path):
    """FAILURES 40: a script that forgot its commit is told when it ends."""
    import subprocess

    script = f"""
from dbscope import Database
from sqlalchemy import text
db = Database("sqlite:///{tmp_path / "script.db"}")
db.session.execute(text("CREATE TABLE t (id int)"))
db.session.execute(text("INSERT INTO t VALUES (1)"))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 0
    assert "UncommittedWrites" in done.stderr
    assert "script.py:5" in done.stderr


# -- 9: clean-up -------------------------------------------------------------------------------------------------


class Interrupt(BaseException):
    """What a signal handler may raise."""


@twice
async def test_scopes_9_the_users_error_stays_on_top(server_kit):
    """FAILURES 35: the server ends the connection: the body's own error comes out, and nothing leaks."""
    kit = server_kit
    with pytest.raises(KeyError, match="the user's"):
        async with kit.scope():
            session = kit.session()
            session.add(Payment())
            await kit.done(session.flush())
            pid = await kit.done(session.scalar(text("SELECT pg_backend_pid()")))
            with kit.outside.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
            raise KeyError("the user's")
    assert kit.checked_out() == 0
    assert not kit.db.holders
    async with kit.transaction() as session:  # the next unit of work is clean
        session.add(Payment())
    assert kit.count() == 1


def failing_close(session):
    """Make closing the session fail, when its transaction has ended."""

    @event.listens_for(session, "after_transaction_end")
    def fail(session, transaction):
        if transaction.parent is None:
            raise RuntimeError("it would not close")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_scopes_9_every_session_is_released_although_one_fails(sync_kit, tmp_path, failing):
    """One session fails to close: the others are released, its connection is not returned, and the scope raises."""
    databases = [sync_kit.file(tmp_path / f"{number}.db") for number in range(3)]
    with pytest.raises(RuntimeError, match="it would not close"):
        with scope():
            sessions = [db.session() for db in databases]
            for session in sessions:
                session.scalar(text("SELECT 1"))
            failing_close(sessions[failing])
    assert [sync_kit.checked_out(db) for db in databases] == [0, 0, 0]
    assert current_scope() is None


def test_scopes_9_a_note_tells_what_failed_beside_the_users_error(sync_kit):
    """The user's error comes out with a note that says that, and how, the release failed."""
    with pytest.raises(KeyError) as caught:
        with scope("request"):
            sync_kit.session().scalar(text("SELECT 1"))
            failing_close(sync_kit.session())
            raise KeyError
    assert any("'request'" in note and "it would not close" in note for note in caught.value.__notes__)
    assert sync_kit.checked_out() == 0


@pytest.mark.parametrize("error", [KeyError, None], ids=["failing", "fine"])
@twice
async def test_scopes_9_an_interrupt_in_the_release_is_on_top(kit, error):
    """What ends the process, such as a KeyboardInterrupt, is not hidden in a note on the user's error."""
    engine = getattr(kit.db.engine, "sync_engine", kit.db.engine)

    def interrupt(_):
        raise Interrupt

    with pytest.raises(Interrupt):
        async with kit.scope():
            await kit.done(kit.session().scalar(text("SELECT 1")))
            event.listen(engine, "rollback", interrupt, once=True)
            if error is not None:
                raise error
    assert kit.checked_out() == 0


def test_scopes_9_only_an_interrupt_throws_the_connection_away(sync_kit):
    """After an error of the server's, and after the clean-up of an interrupt, connections go back into the pool."""
    made = []
    event.listen(sync_kit.db.engine, "connect", lambda *_: made.append(1))

    def interrupt(*_):
        raise Interrupt

    with scope():
        session = sync_kit.session()
        for _ in range(2):
            session.add(Payment(account_id=7))
            with pytest.raises(IntegrityError):
                session.flush()
            session.rollback()
        assert len(made) == 1
        event.listen(session, "before_flush", interrupt, once=True)
        session.scalar(text("SELECT 1"))
        session.add(Payment())
        with pytest.raises(Interrupt):
            session.flush()
        for _ in range(3):
            session.rollback()
            session.scalar(text("SELECT 1"))
    assert len(made) == 2


@pytest.mark.parametrize("ending", ["close", "reset", "invalidate", "the scope"])
def test_scopes_9_a_connection_that_was_interrupted_is_thrown_away_whatever_ends_it(sync_kit, ending):
    """Nobody gets a connection back that was in the middle of something, whichever way the transaction ends."""
    made = []
    event.listen(sync_kit.db.engine, "connect", lambda *_: made.append(1))

    def interrupt(*_):
        raise Interrupt

    with scope():
        session = sync_kit.session()
        session.scalar(text("SELECT 1"))
        event.listen(session, "before_flush", interrupt, once=True)
        session.add(Payment())
        with pytest.raises(Interrupt):
            session.flush()
        if ending == "the scope":
            session.expunge_all()  # what is pending would be reported
        else:
            getattr(session, ending)()
    with scope():
        sync_kit.session().scalar(text("SELECT 1"))
    assert len(made) == 2


def waits_for_a_lock(kit):
    """Wait until some connection of the database waits for a lock: the question is the server's, each takes a trip."""
    waiting = text(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with kit.outside.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _ in range(100_000):
            if connection.scalar(waiting):
                return
    raise AssertionError("nobody waits for a lock")


LOCK_AT_COMMIT = """
CREATE FUNCTION lock_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock(1);
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER lock_it AFTER INSERT ON payments {when} FOR EACH ROW EXECUTE FUNCTION lock_it();
"""


@pytest.mark.parametrize("then", ["end", "close", "rollback", "remove", "nothing"])
@pytest.mark.parametrize("when", ["", "DEFERRABLE INITIALLY DEFERRED"], ids=["flush", "commit"])
def test_scopes_9_an_interrupt_throws_the_connection_away(sync_server_kit, when, then):
    """FAILURES 12: after a BaseException in the middle of a flush or a COMMIT the pool never sees that connection."""
    kit = sync_server_kit
    with kit.db.engine.begin() as connection:
        connection.execute(text(LOCK_AT_COMMIT.format(when=when)))

    def interrupt(*_):
        raise Interrupt

    def send():
        waits_for_a_lock(kit)
        os.kill(os.getpid(), signal.SIGUSR1)

    def body(session):
        session.add(Payment())
        try:
            session.commit()
        except Interrupt:
            if then == "end":
                raise
            if then != "nothing":
                getattr(kit.db.session, then)()

    before = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send)
    try:
        with kit.outside.begin() as other:
            other.execute(text("SELECT pg_advisory_xact_lock(1)"))
            told = pytest.warns(UncommittedWrites) if then == "nothing" else contextlib.nullcontext()
            with contextlib.suppress(Interrupt), told:
                with scope():
                    session = kit.session()
                    pid = session.scalar(text("SELECT pg_backend_pid()"))
                    sender.start()
                    body(session)
    finally:
        signal.signal(signal.SIGUSR1, before)
        sender.join()
    assert kit.checked_out() == 0
    with kit.db.reader() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) != pid
    with kit.db.transaction() as session:
        session.add(Payment(amount=9))
    assert 9 in kit.amounts()


@pytest.mark.parametrize("then", ["close", "rollback", "remove"])
def test_scopes_9_an_interrupt_after_a_commit_leaves_a_session_that_works(sync_kit, then):
    """Where SQLAlchemy's session is stuck half-way, clean-up works all the same, and so does the next statement."""

    def interrupt(*_):
        raise Interrupt

    with scope():
        session = sync_kit.session()
        event.listen(session, "after_commit", interrupt, once=True)
        session.add(Payment())
        with pytest.raises(Interrupt):
            session.commit()
        getattr(sync_kit.db.session, then)()
        assert sync_kit.session().scalar(select(Payment.amount)) == 500
