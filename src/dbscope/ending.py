"""The end of a scope or a block: its plan, then the hooks that are due, then the first error."""

import asyncio
import sys
from collections.abc import Callable
from typing import TypeAlias

from dbscope.hooks import Hook, asettle, settle
from dbscope.interrupt import is_of_signal
from dbscope.plan import Plan, arun, finish, finish_off_loop, run

__all__ = ["Ending", "aend", "end", "raise_first"]

# Gives back what was held, whatever fails, and tells what failed and which hooks are due.
Ending: TypeAlias = Plan[tuple[BaseException | None, list[Hook]]]


def end(plan: Ending, error: BaseException | None, title: Callable[[], str]) -> None:
    """Carry out the plan and run the hooks; then raise what failed, unless the work failed itself, with `error`."""
    failure, hooks = run(plan)
    if hooks:
        run(settle(hooks, error or failure))
    raise_first(failure, error, title)


async def aend(
    plan: Ending,
    error: BaseException | None,
    title: Callable[[], str],
    *,
    holds: bool,
    forward: bool,
    awaits: bool = True,
) -> None:
    """Async version of `end`.

    Args:
        plan: what ends it.
        error: what the work failed with.
        title: what ends, for the note that an error is given.
        holds: whether a connection is held: it is then given back however often this task is cancelled meanwhile.
        forward: pass the first cancel on to the commit that is under way.
        awaits: whether a step of the plan may have to be awaited; all of it goes to one thread otherwise.
    """
    cancelled: asyncio.CancelledError | None = None
    if holds and not awaits:
        (failure, hooks), cancelled = await finish_off_loop(plan)
    elif holds:
        (failure, hooks), cancelled = await finish(plan, forward=forward)
    else:
        failure, hooks = await arun(plan)
    if hooks:
        try:
            await asettle(hooks, error or failure, cancelled)
        except asyncio.CancelledError:
            if error is None and failure is None:
                raise
    raise_first(failure, error, title)
    if cancelled is not None:
        if error is None:
            raise cancelled
        _cancel_again(cancelled)


def raise_first(failure: BaseException | None, error: BaseException | None, title: Callable[[], str]) -> None:
    """Let the first error through: the user's, if there is one; then `failure` is a note of its."""
    if failure is None:
        return
    if error is None or not isinstance(failure, Exception) or is_of_signal(failure):
        raise failure
    error.add_note(f"and {title()} failed to give back what it held: {failure!r}")


def _cancel_again(cancelled: asyncio.CancelledError) -> None:
    """An error of the user's stays on top, and the cancel is to come at the next await, as in Python 3.13's TaskGroup.

    Before 3.13 a cancel cannot be taken back: the next await of a task that has handled both might get it, long after.
    """
    task = asyncio.current_task()
    if sys.version_info >= (3, 13) and task is not None and task.cancelling():
        task.uncancel()
        task.cancel(*cancelled.args)
