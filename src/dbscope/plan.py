"""A plan: what beginning or ending something does, in order, written once; `run` and `arun` carry it out.

A plan is a generator that yields steps and is sent their results, or thrown their errors.
The plan decides what happens; the two runners know only in which thread or on which loop a step may run.
"""

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

from sqlalchemy.orm import Session

from dbscope.where import on_behalf, worker

T = TypeVar("T")


class OnSession(NamedTuple):
    """Call `action` with the sync session; `session` says of which colour the work is."""

    session: Any  # Session | AsyncSession
    action: Callable[[Session], Any]


class Call(NamedTuple):
    """Call a function of the user's that may block, or be a coroutine function."""

    function: Callable[[], Any]
    blocking: bool  # it belongs to a sync database, and must not run on a loop


Step: TypeAlias = OnSession | Call
Plan: TypeAlias = Generator[Step, Any, T]


def run(plan: Plan[T]) -> T:
    """Carry out a plan in this thread."""
    try:
        step = next(plan)
        while True:
            try:
                result = step.function() if isinstance(step, Call) else step.action(_inner(step.session))
            except BaseException as error:
                step = plan.throw(error)
            else:
                step = plan.send(result)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # a plan returns its T


def _inner(session: Any) -> Any:
    """The sync session: an async one that holds no connection can be ended without a loop."""
    return getattr(session, "sync_session", session)


async def arun(plan: Plan[T], *, lasting: bool = False) -> T:
    """Carry out a plan on this loop: async sessions here, sync ones that hold a transaction in a thread.

    Args:
        plan: what to do.
        lasting: somebody else raises the cancels, when all is done: a step in a thread, which no cancel ends, tells
            the plan what came of it instead.
    """
    try:
        step = next(plan)
        while True:
            try:
                result = await _take(step, lasting)
            except BaseException as error:
                step = plan.throw(error)
            else:
                step = plan.send(result)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # a plan returns its T


async def _take(step: Step, lasting: bool) -> Any:
    if isinstance(step, Call):
        if step.blocking:
            return await off_loop(step.function, lasting=lasting)
        result = step.function()
        return await result if asyncio.iscoroutine(result) or isinstance(result, asyncio.Future) else result
    session, action = step
    if isinstance(session, Session):
        # A commit may wait for a lock that another task of this very loop holds.
        if session.in_transaction():
            return await off_loop(lambda: action(session), lasting=lasting)
        return action(session)
    if session.in_transaction():
        return await session.run_sync(action)
    return action(session.sync_session)  # holds no connection: crossing to a greenlet would buy nothing


# -- off the loop ------------------------------------------------------------------------------------------------

_threads: ThreadPoolExecutor | None = None
_threads_lock = threading.Lock()


def _forget_threads() -> None:
    global _threads, _threads_lock
    _threads, _threads_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork


async def off_loop(function: Callable[[], T], *, lasting: bool = False) -> T:
    """Run blocking work in a thread of dbscope's own, in a copy of this context, to its end.

    Not in the loop's default executor: requests that wait in it for a lock would leave no thread to the one that
    releases it. As many threads are made as work is waiting (never more than connections are checked out).

    Args:
        function: what to do.
        lasting: as for `arun`.
    """
    work = _in_thread(function)
    if lasting:
        await outlast(work, forward=False)
        return work.result()
    return await to_completion(work)


def _in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    global _threads
    with _threads_lock:
        if _threads is None:
            _threads = ThreadPoolExecutor(max_workers=10_000, thread_name_prefix="dbscope")
    context = _ours()
    return asyncio.get_running_loop().run_in_executor(_threads, lambda: context.run(function))


def _ours() -> contextvars.Context:
    """A copy of this context for a task or a thread that works for the caller, who waits for it."""
    context = contextvars.copy_context()
    if on_behalf.get() is None:
        context.run(on_behalf.set, worker())
    return context


async def to_completion(work: "asyncio.Future[T]") -> T:
    """Wait for `work` until it is done, however often this task is cancelled meanwhile; then cancel."""
    cancelled = await outlast(work, forward=False)
    if cancelled is None:
        return work.result()
    if not work.cancelled() and work.exception() is not None:
        cancelled.__context__ = work.exception()
    raise cancelled


async def finish(plan: Plan[T], *, forward: bool) -> tuple[T, asyncio.CancelledError | None]:
    """Carry out a plan that gives something back, to its end, however often this task is cancelled meanwhile.

    Args:
        plan: what to do; it catches what its steps raise.
        forward: pass the first cancel on to the step that is under way (and only the first: what follows cleans up).

    Returns:
        the plan's result, and the cancel that is still to be raised, if there was one.
    """
    work = asyncio.get_running_loop().create_task(arun(plan, lasting=True), context=_ours())
    cancelled = await outlast(work, forward=forward)
    return work.result(), cancelled


async def finish_off_loop(plan: Plan[T]) -> tuple[T, asyncio.CancelledError | None]:
    """As `finish`, for a plan that awaits nothing: all of it in one thread, which no cancel ends."""
    work = _in_thread(lambda: run(plan))
    cancelled = await outlast(work, forward=False)
    return work.result(), cancelled


async def outlast(work: "asyncio.Future[T]", *, forward: bool) -> asyncio.CancelledError | None:
    """Wait until `work` is done; the last cancel of this task, if there was one.

    One `asyncio.shield` is not enough: a second cancel (AnyIO cancels again and again) would leave the work behind.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as error:
            if cancelled is None and forward and not work.done():
                work.cancel(*error.args)  # with the message by which AnyIO knows its own
            cancelled = error
        except BaseException:  # the work's own error, which its result tells
            break
    return cancelled
