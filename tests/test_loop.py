"""Loops: work that is done over and over, each pass in a scope of its own (DESIGN, Scopes 11)."""

import asyncio
import functools
import logging
import os
import signal
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from dbscope import ConfigurationError, Loop, ScopeEndedError, ScopeMisuseError, current_scope
from tests.support.kits import LIMIT, Payment, drive, twice

NEVER = 3600.0  # an interval that no test waits for


def loop_of(kit, function, **options):
    """A loop over a coroutine function; in sync it is driven in the loop's thread."""
    options = {"interval": 0, **options}
    return Loop(function if kit.colour == "async" else lambda: drive(function()), **options)


async def run(kit, loop):
    """Run a loop to its end, in its colour."""
    await loop.arun() if kit.colour == "async" else loop.run()


@twice
async def test_scopes_11_each_pass_has_a_scope_of_its_own(kit):
    """A pass has a scope with the loop's name, and its own session, which are over when the next begins."""
    seen = []

    async def work():
        seen.append((current_scope(), kit.session()))
        await kit.done(kit.session().scalar(text("SELECT 1")))
        if len(seen) == 3:
            loop.stop()

    loop = loop_of(kit, work, name="poll")
    await run(kit, loop)
    assert loop.passes == 3
    assert len({id(session) for _, session in seen}) == 3
    assert {work.name for work, _ in seen} == {"poll"}
    assert all(work.ended for work, _ in seen)
    assert kit.checked_out() == 0
    assert current_scope() is None
    with pytest.raises(ScopeEndedError, match="'poll'"):
        await kit.done(seen[0][1].execute(text("SELECT 1")))


@twice
async def test_failures_8_a_failing_pass_is_logged_and_the_next_starts_clean(kit, caplog):
    """A pass whose flush failed leaves a session that must roll back first: the next pass never sees it."""

    async def work():
        if loop.passes == 1:
            kit.session().add(Payment(id=1, account_id=99))
            await kit.done(kit.session().flush())
        if loop.passes == 2:
            kit.session().add(Payment(id=1))
            await kit.done(kit.session().commit())
            loop.stop()

    loop = loop_of(kit, work, name="poll")
    with caplog.at_level(logging.ERROR, "dbscope"):
        await run(kit, loop)
    assert kit.count() == 1
    assert [record.getMessage() for record in caplog.records] == ["pass 1 of poll failed; the next starts clean"]
    assert isinstance(caplog.records[0].exc_info[1], SQLAlchemyError)


@twice
async def test_scopes_11_commit_on_success(kit):
    """With `commit="on-success"` a pass that ends well is committed, and one that fails is not."""

    async def work():
        kit.session().add(Payment(amount=loop.passes))
        await kit.done(kit.session().flush())
        if loop.passes == 2:
            raise KeyError
        if loop.passes == 3:
            loop.stop()

    errors = []
    loop = loop_of(kit, work, commit="on-success", on_error=errors.append)
    await run(kit, loop)
    assert kit.amounts() == [1, 3]
    assert [type(error) for error in errors] == [KeyError]


@twice
async def test_scopes_11_what_on_error_raises_ends_the_loop(kit):
    """`on_error` is called instead of logging, and may let the error through; a BaseException always comes out."""

    def give_up(error):
        raise error

    async def fails():
        raise KeyError("pass")

    class Interrupt(BaseException):
        """As KeyboardInterrupt, which would end the event loop."""

    async def interrupted():
        raise Interrupt

    with pytest.raises(KeyError, match="pass"):
        await run(kit, loop_of(kit, fails, on_error=give_up))
    with pytest.raises(Interrupt):
        await run(kit, loop_of(kit, interrupted))


def test_scopes_11_stop_and_wake_from_another_thread():
    """`wake()` starts the next pass at once and `stop()` ends the waiting at once, from another thread."""
    passed = threading.Semaphore(0)
    loop = Loop(passed.release, interval=NEVER)
    thread = threading.Thread(target=loop.run)
    thread.start()
    for _ in range(3):
        assert passed.acquire(timeout=LIMIT)
        loop.wake()
    assert passed.acquire(timeout=LIMIT)
    loop.stop()
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert loop.passes == 4
    assert loop.stopped()


async def test_scopes_11_stop_and_wake_from_tasks_and_threads():
    """The same for a loop on an event loop: from another task and from another thread."""
    asyncio.get_running_loop().set_debug(True)  # which raises where another thread does what only the loop's may
    passed = asyncio.Semaphore(0)

    async def work():
        passed.release()

    loop = Loop(work, interval=NEVER)
    task = asyncio.create_task(loop.arun())
    async with asyncio.timeout(LIMIT):
        await passed.acquire()
        loop.wake()
        await passed.acquire()
        for _ in range(5):
            await asyncio.sleep(0)  # it comes to rest
        await asyncio.to_thread(loop.wake)
        await passed.acquire()
        await asyncio.to_thread(loop.stop)
        await task
    assert loop.passes == 3


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_scopes_11_stop_from_a_signal_handler(colour):
    """A signal handler may stop a loop that is waiting: it is interrupted wherever it is, and ends."""
    before = signal.signal(signal.SIGUSR1, lambda *_: loop.stop())

    def work():
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR1)).start()

    async def awork():
        work()

    loop = Loop(work if colour == "sync" else awork, interval=NEVER)
    try:
        loop.run() if colour == "sync" else asyncio.run(loop.arun())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert loop.passes == 1


def test_scopes_11_wakes_during_a_pass_are_one():
    """Who wakes the loop while a pass runs gets one more pass, and not one for each call."""
    left = []

    def work():
        if loop.passes == 1:
            for _ in range(5):
                loop.wake()
        else:
            left.append(loop._wakes.qsize())
            loop.stop()

    loop = Loop(work, interval=NEVER)
    loop.run()
    assert left == [0]


async def test_scopes_11_wakes_are_not_kept_on_a_loop():
    """However often a loop on an event loop is woken, nothing grows; when it has ended, nobody minds."""

    async def work():
        for _ in range(5):
            loop.wake()
        if loop.passes == 2:
            loop.stop()

    loop = Loop(work, interval=NEVER)
    await asyncio.to_thread(asyncio.run, loop.arun())
    loop.wake()
    assert loop._wakes.qsize() == 0


def test_scopes_11_a_stopped_loop_does_not_begin():
    """`stop()` before `run()`: not one pass."""
    loop = Loop(lambda: pytest.fail("it ran"), interval=0)
    loop.stop()
    loop.run()
    assert loop.passes == 0


def test_scopes_11_waiting_is_not_busy():
    """While a sync loop waits nothing runs: no line of Python's is executed in its thread until it is woken."""
    lines, passed = [], threading.Event()

    def count(frame, kind, _):
        if passed.is_set():
            lines.append((frame.f_code.co_name, frame.f_lineno))
        return count

    def run():
        import sys

        sys.settrace(count)
        loop.run()

    loop = Loop(passed.set, interval=NEVER)
    thread = threading.Thread(target=run)
    thread.start()
    assert passed.wait(LIMIT)
    known = -1
    while known != len(lines):  # until it has come to rest
        known = len(lines)
        for _ in range(1000):
            os.sched_yield()
    waits = [name for name, _ in lines]
    loop.stop()
    thread.join()
    assert len(waits) < 300


async def test_scopes_11_waiting_is_not_busy_on_a_loop():
    """While an async loop waits its task is not scheduled: the event loop's turns are all ours."""
    passed = asyncio.Event()

    async def work():
        passed.set()

    loop = Loop(work, interval=NEVER)
    steps = []
    task = asyncio.create_task(loop.arun())
    await passed.wait()
    for _ in range(5):
        await asyncio.sleep(0)  # it comes to rest
    running_loop = asyncio.get_running_loop()
    for _ in range(100):
        steps.append(len(running_loop._ready))
        await asyncio.sleep(0)
    loop.stop()
    await task
    assert steps == [0] * 100


def test_scopes_11_the_colour_of_the_function():
    """`run` wants a function, `arun` a coroutine function; each names the other."""

    async def awork():
        pass

    class Awork:
        """A callable object."""

        async def __call__(self):
            pass

    for function in (awork, Awork(), functools.partial(Awork())):
        with pytest.raises(ScopeMisuseError, match=r"await loop\.arun\(\)"):
            Loop(function, interval=0).run()
    with pytest.raises(ScopeMisuseError, match=r"loop\.run\(\)"):
        asyncio.run(Loop(lambda: None, interval=0).arun())


@pytest.mark.parametrize(("function", "interval"), [("poll", 1), (print, -1), (print, float("nan"))])
def test_scopes_11_what_cannot_be_a_loop(function, interval):
    """No function, or an interval that is none, is refused when the loop is made."""
    with pytest.raises(ConfigurationError):
        Loop(function, interval=interval)
