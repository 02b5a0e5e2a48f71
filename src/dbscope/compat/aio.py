"""SQLAlchemy's `async_scoped_session`. Loaded only when asked for, because it needs greenlet."""

import asyncio
import importlib
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.util import ScopedRegistry

try:
    importlib.import_module("greenlet")  # SQLAlchemy 2.0 imports without it, and fails at the first use
    from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
except ImportError as error:
    raise ImportError('async sessions need greenlet: pip install "dbscope[async]"', name=error.name) from error

from dbscope.registry import complete

__all__ = ["TaskRegistry", "async_scoped_session"]

S = TypeVar("S", bound=AsyncSession)
_AT_ONCE = 8  # how many leftovers a new entry looks at: the cost of making one has a bound


class TaskRegistry(ScopedRegistry[S]):
    """A `ScopedRegistry` that does not grow for ever where the keys are tasks.

    The entry of a task that is done goes when a later one is made, if its session is empty: no transaction, no
    objects. One that somebody may still need (an object of it is alive, or a transaction is open) stays, as in
    SQLAlchemy, and is looked at again.
    """

    def __init__(self, createfunc: Callable[[], S], scopefunc: Callable[[], Any]) -> None:
        super().__init__(createfunc, scopefunc)
        self._done: deque[asyncio.Task[Any]] = deque()

    def __call__(self) -> S:
        key = self.scopefunc()
        try:
            return self.registry[key]  # type: ignore[no-any-return]  # an S
        except KeyError:
            self._new(key)
            return self.registry.setdefault(key, self.createfunc())  # type: ignore[no-any-return]  # an S

    def set(self, obj: S) -> None:
        """Make `obj` the session of the current key."""
        key = self.scopefunc()
        if key not in self.registry:
            self._new(key)
        self.registry[key] = obj

    def _new(self, key: Any) -> None:
        for _ in range(min(len(self._done), _AT_ONCE)):
            task = self._done.popleft()
            session = self.registry.get(task)
            if session is not None and _is_empty(session):
                del self.registry[task]
            elif session is not None:
                self._done.append(task)
        if isinstance(key, asyncio.Task):
            key.add_done_callback(self._done.append)


def _is_empty(session: Any) -> bool:
    """Whether nothing can be missed of the session: not by whoever holds one of its objects, either."""
    return isinstance(session, AsyncSession) and not (
        session.in_transaction() or session.identity_map or session.new or session.deleted
    )


class async_scoped_session(sqlalchemy_asyncio.async_scoped_session[S]):
    """SQLAlchemy's `async_scoped_session`, by its own names, for applications that exist.

    Beside what SQLAlchemy proxies it has every other public member of `AsyncSession`.

    Args:
        session_factory: any callable that returns a new session, such as an `async_sessionmaker`.
        scopefunc: returns the key under which the current session is kept in `registry.registry`, a dictionary:
            `asyncio.current_task`, or a request's id. Whoever gives it awaits `remove()` when a key's work is over.
    """

    def __init__(self, session_factory: "async_sessionmaker[S]", scopefunc: Callable[[], Any]) -> None:
        super().__init__(session_factory, scopefunc)
        self.registry = TaskRegistry(session_factory, scopefunc)

    async def remove(self) -> None:
        """Close the current session, if there is one, and forget it: the next use makes a new one.

        Raises:
            Exception: what closing raised; the session is forgotten all the same.
        """
        if self.registry.has():
            try:
                await self.registry().close()
            finally:
                self.registry.clear()


complete(async_scoped_session, AsyncSession)
