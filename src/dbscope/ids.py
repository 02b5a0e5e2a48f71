"""Scopes by id, for frameworks that signal the start and the end of their work instead of wrapping it.

The table holds open scopes only: ending one takes it out, whatever happens, and an id that is used again names new
work, which inherits nothing.
"""

import asyncio
from collections.abc import Hashable
from typing import Any

from dbscope.errors import ConfigurationError, ScopeMisuseError
from dbscope.events import ScopesPileUp, emit
from dbscope.scope import Colour, Commit, PlacedScope, Scope, disinherit
from dbscope.scope import _current as _current_scope
from dbscope.where import here, running_loop, spell

__all__ = ["aend_scope", "begin_scope", "end_scope"]

_open: dict[Hashable, Scope] = {}
many: list[int] = []  # so many open at once are told of; the next time when there are twice as many


def begin_scope(id: Hashable, name: str | None = None, *, commit: Commit = None) -> Scope:
    """Open the scope of the work called `id`, and make it current here and in what is started from here.

    With an id whose scope is open already, make that one current: the same work goes on in another thread or task.

    Args:
        id: anything hashable that names this work alone, such as a request's or a task's id.
        name: what errors and the live view call it; the id, if not given.
        commit: as for `scope`.

    Returns:
        the scope. `end_scope(id)`, or `await aend_scope(id)` where it used an async database, ends it.

    Raises:
        ConfigurationError: the id cannot be hashed.
    """
    try:
        known = _open.get(id)
    except TypeError:
        raise ConfigurationError(
            f"a scope's id has to be hashable, and {type(id).__name__} is not: {id!r}. Use a string or a number."
        ) from None
    if known is None:
        work = PlacedScope(str(id) if name is None else name, here(), commit=commit)
        known = _open.setdefault(id, work)
        if known is work:
            work.enter(Colour.BY_ID)
            if many and len(_open) >= many[0]:
                many[0] *= 2
                emit(ScopesPileUp(scopes=tuple(_open.values())))
            return work
    _current_scope.set(known)
    return known


def end_scope(id: Hashable, error: BaseException | None = None) -> None:
    """End the scope of the work called `id`: commit if it is to commit on success, release its sessions.

    From any thread. An id that is unknown, or whose scope was ended before, is no mistake: nothing happens. A session
    that another thread is executing on is dead from now on, and released by that thread.

    Args:
        id: what `begin_scope` was given.
        error: what the work failed with: an on-success scope then rolls back.

    Raises:
        ScopeMisuseError: it holds an async connection, whose loop runs in this very thread.
    """
    work = _open.get(id) if _hashable(id) else None
    if work is None:
        return
    loop = getattr(work, "_loop", None)
    if loop is not None and loop.is_running() and loop is not running_loop():
        asyncio.run_coroutine_threadsafe(aend_scope(id, error), loop).result()
        work._leave()
        return
    work.refuse_async("aend_scope(id)")
    if _open.pop(id, None) is not None:
        work.__exit__(type(error) if error else None, error, None)


async def aend_scope(id: Hashable, error: BaseException | None = None) -> None:
    """Async version of `end_scope`: on the loop that owns the scope's async sessions, from whichever it is called."""
    work = _open.get(id) if _hashable(id) else None
    if work is None:
        return
    loop = getattr(work, "_loop", None)
    if loop is not None and loop is not running_loop():
        if not loop.is_running():
            raise ScopeMisuseError(
                f"{work.describe()} was to be ended at {spell(here())}, but the loop that its async sessions belong to "
                "does not run any more. End scopes before their loop."
            )
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(aend_scope(id, error), loop))
        work._leave()
        return
    if _open.pop(id, None) is not None:
        await work.__aexit__(type(error) if error else None, error, None)


def _hashable(id: Any) -> bool:
    try:
        hash(id)
    except TypeError:
        return False
    return True


def open_by_id() -> list[Scope]:
    """The scopes by id that are open, the oldest first."""
    return list(_open.values())


def disinherit_all(parent: int) -> None:
    """In the child of a fork: the open scopes are the parent's."""
    for work in _open.values():
        disinherit(work, parent)
    _open.clear()
