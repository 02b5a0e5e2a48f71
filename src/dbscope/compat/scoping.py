"""SQLAlchemy's `scoped_session`: the same names and behaviour, inside scopes and outside of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import orm
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import ThreadLocalRegistry

from dbscope import current_scope
from dbscope.registry import complete

__all__ = ["ScopeOrThreadRegistry", "scoped_session"]

S = TypeVar("S", bound=Session)


class ScopeOrThreadRegistry(ThreadLocalRegistry[S]):
    """One session for each open scope, and outside of scopes one for each thread.

    A scope closes its session when it ends. The thread's is SQLAlchemy's: `registry` is a `threading.local` with
    `.value`, and goes with the thread.
    """

    def __call__(self) -> S:
        home = current_scope()
        if home is None:
            return super().__call__()
        session = home.guest(self)
        if session is None:
            made = self.createfunc()
            session = home.keep(self, made, close_of(made))
        return session  # type: ignore[no-any-return]  # an S: only this registry keeps something under this key

    def has(self) -> bool:
        """Whether the scope, or outside of scopes the thread, has a session."""
        home = current_scope()
        return super().has() if home is None else home.guest(self) is not None

    def set(self, obj: S) -> None:
        """Make `obj` the session of the scope, or outside of scopes of the thread."""
        home = current_scope()
        if home is None:
            super().set(obj)
        else:
            home.dismiss(self)
            home.keep(self, obj, close_of(obj))

    def clear(self) -> None:
        """Forget the session, if there is one, without closing it."""
        home = current_scope()
        if home is None:
            super().clear()
        else:
            home.dismiss(self)


def close_of(session: Any) -> Callable[[], None]:
    """What closes a session when its scope ends; of an `AsyncSession`, the one inside, in the scope's own greenlet."""
    return getattr(session, "sync_session", session).close  # type: ignore[no-any-return]  # of a Session


class scoped_session(orm.scoped_session[S]):
    """SQLAlchemy's `scoped_session`, by its own names, for applications that exist.

    Without a `scopefunc`, and inside an open dbscope scope, the session belongs to that scope and is closed when it
    ends; outside it is the thread's. With a `scopefunc` it is as in SQLAlchemy. What it proxies is SQLAlchemy's, and
    beside it every other public member of the session (`in_transaction`, `get_transaction`, `invalidate`, ...).

    Args:
        session_factory: any callable that returns a new session, such as a `sessionmaker`.
        scopefunc: returns the key under which the current session is kept in `registry.registry`, a dictionary.
            Whoever gives one calls `remove()` when a key's work is over.
    """

    def __init__(self, session_factory: "sessionmaker[S]", scopefunc: Callable[[], Any] | None = None) -> None:
        super().__init__(session_factory, scopefunc)
        if not scopefunc:
            self.registry = ScopeOrThreadRegistry(session_factory)

    def remove(self) -> None:
        """Close the current session, if there is one, and forget it: the next use makes a new one.

        Raises:
            Exception: what closing raised; the session is forgotten all the same.
        """
        if self.registry.has():
            try:
                self.registry().close()
            finally:
                self.registry.clear()


complete(scoped_session, Session)
