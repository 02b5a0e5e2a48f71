"""Galaxy's model-side object: sessions by request id, and by thread outside of requests."""

import logging
import sys
import threading
from collections.abc import Hashable
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

from sqlalchemy import orm
from sqlalchemy.orm import Session, sessionmaker

from dbscope.compat.scoping import scoped_session

__all__ = ["RequestSessions", "check_database_connection"]

S = TypeVar("S", bound=Session)
log = logging.getLogger(__name__)

# The ids that were set in this context and not unset, the current one last.
_ids: ContextVar[tuple[Any, ...]] = ContextVar("dbscope.compat.request_id", default=())
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


class RequestSessions(Generic[S]):
    """What Galaxy has as `app.model`: one registry, its key the request's id, and outside of requests the thread.

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
        """The key of the current session: the request's id, or the thread's number."""
        ids = _ids.get()
        return (ids[-1] if ids else None) or self._thread()

    def _thread(self) -> int:
        key = threading.get_ident()
        if not hasattr(self._threads, "tenant"):
            self._threads.tenant = _Tenant(self.scoped_registry.registry, key)
        return key

    @staticmethod
    def set_request_id(request_id: Any) -> "Token[tuple[Any, ...]]":
        """Make `request_id` current here, and in the tasks and worker threads that are started from here.

        A falsy id stands for the thread.
        """
        return _ids.set((*_ids.get(), request_id)[-_DEPTH:])

    def unset_request_id(self, request_id: Any) -> None:
        """Close and drop the session of `request_id`, from any thread, and make the id before it current again.

        Unknown and repeated ids are no mistake; no session is ever made.

        Raises:
            Exception: what closing raised; the session is dropped all the same.
        """
        ids = _ids.get()
        if request_id in ids:
            _ids.set(tuple(id for id in ids if id != request_id))
        session = self.scoped_registry.registry.pop(request_id, None)
        if session is not None:
            session.close()


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
