"""Galaxy's model-side object: sessions by request id, and by thread outside of requests."""

import logging
import sys
import threading
from collections.abc import Callable, Hashable
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

from sqlalchemy import orm
from sqlalchemy.orm import Session, sessionmaker

from dbscope.compat.scoping import scoped_session
from dbscope.plan import off_loop
from dbscope.scope import Scope, current_scope

__all__ = ["RequestSessions", "check_database_connection"]

S = TypeVar("S", bound=Session)
log = logging.getLogger(__name__)

# The ids that were set in this context and not unset, the current one last; each with the scope in which it was set.
_ids: ContextVar[tuple[tuple[Any, Scope | None], ...]] = ContextVar("dbscope.compat.request_id", default=())
_DEPTH = 16  # ids that another thread unsets stay in the tuple: it must not grow with them


class _Tenant:
    """Held by a thread's local storage alone: when the thread ends, its session goes with it.

    Otherwise a new thread that is given the same number would find it.
    """

    def __init__(self, sessions: "dict[Any, Any]", key: int) -> None:
        self.sessions = sessions
        self.key = key

    def __del__(self) -> None:
        session = self.sessions.pop(self.key, None)
        if session is not None and not sys.is_finalizing():
            session.close()


class _Guest:
    """What a scope keeps for the session under its key, which may never be made: at its end it asks as of a session."""

    def __init__(self, sessions: "dict[Any, Any]", key: Scope) -> None:
        self.sessions = sessions
        self.key = key
        self.sync_session = None  # closing needs none

    def in_transaction(self) -> bool:
        """Whether closing talks to the server."""
        session = self.sessions.get(self.key)
        return session is not None and bool(session.in_transaction())

    async def run_sync(self, close: Callable[[Any], Any]) -> None:
        """Close it off the loop."""
        await off_loop(lambda: close(None))


class RequestSessions(Generic[S]):
    """What Galaxy has as `app.model`: one registry, its key the request's id, and outside of requests the thread.

    An open dbscope scope is a request, too, as that of a Celery task: its session goes with it, and no id is set.

    >>> from sqlalchemy import create_engine
    >>> from sqlalchemy.orm import sessionmaker
    >>> model = RequestSessions(sessionmaker(create_engine("sqlite://")))
    >>> token = model.set_request_id("request-1")
    >>> model.session() is model.session()
    True
    >>> model.unset_request_id("request-1")
    >>> model.scoped_registry.registry
    {}

    Args:
        session_factory: any callable that returns a new session, such as a `sessionmaker`.
    """

    def __init__(self, session_factory: "sessionmaker[S]") -> None:
        self.session: scoped_session[S] = scoped_session(session_factory, scopefunc=self.request_scopefunc)
        self._threads = threading.local()

    @property
    def context(self) -> scoped_session[S]:
        """The same as `session`."""
        return self.session

    @property
    def Session(self) -> scoped_session[S]:
        """The same as `session`."""
        return self.session

    @property
    def scoped_registry(self) -> Any:
        """`session.registry`; its own `registry` is the dictionary of sessions by id."""
        return self.session.registry

    def new_session(self) -> S:
        """A session that no registry knows: whoever asked for it closes it."""
        return self.session.session_factory()

    def request_scopefunc(self) -> Hashable:
        """The key of the current session: the request's id, or the scope, whichever is further in; or the thread."""
        ids = _ids.get()
        id, inside = ids[-1] if ids else (None, None)
        home = current_scope()
        if home is None or (ids and home is inside):
            return id or self._thread()
        return self._tied(home)

    def _tied(self, home: Scope) -> Hashable:
        """The key of a scope's session, which is closed and dropped when the scope ends."""
        if home.guest(self) is None:
            home.keep(self, _Guest(self.scoped_registry.registry, home), lambda: self._drop(home))
        return home

    def _drop(self, key: Any) -> None:
        session = self.scoped_registry.registry.pop(key, None)
        if session is not None:
            session.close()

    def _thread(self) -> int:
        key = threading.get_ident()
        if not hasattr(self._threads, "tenant"):
            self._threads.tenant = _Tenant(self.scoped_registry.registry, key)
        return key

    @staticmethod
    def set_request_id(request_id: Any) -> "Token[tuple[tuple[Any, Scope | None], ...]]":
        """Make `request_id` current here, and in the tasks and worker threads that are started from here.

        A falsy id stands for the thread.
        """
        return _ids.set((*_ids.get(), (request_id, current_scope()))[-_DEPTH:])

    def unset_request_id(self, request_id: Any) -> None:
        """Close and drop the session of `request_id`, from any thread, and make the id before it current again.

        Unknown and repeated ids are no mistake; no session is ever made.

        Raises:
            Exception: what closing raised; the session is dropped all the same.
        """
        ids = _ids.get()
        if any(id == request_id for id, _ in ids):
            _ids.set(tuple(one for one in ids if one[0] != request_id))
        self._drop(request_id)


def check_database_connection(session: "Session | orm.scoped_session[Any]") -> None:
    """Make a session usable again whose connection was lost: roll back, and log an error.

    Does nothing where no transaction is open.

    Args:
        session: a session, or a registry, whose current session is meant; none is made.
    """
    if isinstance(session, orm.scoped_session):
        if not session.registry.has():
            return
        current: Session = session()
    else:
        current = session
    if current.in_transaction() and (not current.is_active or current.connection().invalidated):
        current.rollback()
        log.error("Database transaction rolled back due to inactive session transaction or invalid connection")
