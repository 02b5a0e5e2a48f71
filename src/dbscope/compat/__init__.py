"""The five documents' own names, for applications that exist: change the import, keep the code.

- SQLAlchemy: `scoped_session`, `async_scoped_session`
- Galaxy: `RequestSessions`, `check_database_connection`
- the managed session: `init_engine`, `init_session_factory`, `ManagedSession`

Each difference from the original is in docs/compat.md. New code uses `dbscope.Database` and `dbscope.scope`.
"""

from typing import TYPE_CHECKING, Any

from dbscope.compat.galaxy import RequestSessions, check_database_connection
from dbscope.compat.managed import ManagedSession, init_engine, init_session_factory
from dbscope.compat.scoping import scoped_session

if TYPE_CHECKING:
    from dbscope.compat.aio import async_scoped_session

__all__ = [
    "ManagedSession",
    "RequestSessions",
    "async_scoped_session",
    "check_database_connection",
    "init_engine",
    "init_session_factory",
    "scoped_session",
]


def __getattr__(name: str) -> Any:
    if name == "async_scoped_session":  # SQLAlchemy's asyncio part wants greenlet: not before it is asked for
        from dbscope.compat.aio import async_scoped_session

        return async_scoped_session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
