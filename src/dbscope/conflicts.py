"""Conflicts: errors that mean "somebody else was faster, do it again", told by the server's code, not by its text.

A transaction that met one is rolled back, by the server or by its block, and may pass if the whole of it is repeated.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.exc import StaleDataError

from dbscope.errors import (
    CommitOutcomeUnknown,
    DBScopeError,
    PartialCommit,
    RollbackOnlyError,
    TransactionAbortedError,
)

__all__ = ["Conflict", "conflict_of", "leaves_open", "saved_a_part"]


class Conflict(Enum):
    """Why a transaction is to be repeated."""

    SERIALIZATION = "serialization failure"
    DEADLOCK = "deadlock"
    LOCK = "lock not available"
    BUSY = "database busy"
    STALE = "stale data"
    UNKNOWN_OUTCOME = "unknown outcome of the commit"
    ASKED_FOR = "an error that the policy names"


# Of class 40 (transaction rollback) these only: 40003 says that nobody knows whether the statement completed.
_SQLSTATES = {
    "40001": Conflict.SERIALIZATION,
    "40P01": Conflict.DEADLOCK,
    "55P03": Conflict.LOCK,
}

# MySQL, MariaDB. Their SQLSTATEs say less: a lock wait that timed out has the general HY000.
_ERRNOS = {
    1020: Conflict.SERIALIZATION,  # a row has changed since the snapshot (MariaDB's innodb_snapshot_isolation)
    1205: Conflict.LOCK,  # the wait timed out; MariaDB's NOWAIT says the same
    1213: Conflict.DEADLOCK,  # a Galera cluster's conflicts, too
    3101: Conflict.SERIALIZATION,  # a replication group refused the commit
    3572: Conflict.LOCK,  # MySQL's NOWAIT
}
_MYSQL = frozenset({"MySQLdb", "aiomysql", "asyncmy", "cymysql", "mariadb", "mysql", "pymysql"})

# SQLite: the lower eight bits say what, the rest why.
_SQLITE = {
    5: Conflict.BUSY,  # SQLITE_BUSY
    6: Conflict.BUSY,  # SQLITE_LOCKED: the same between connections that share a cache
}
_BUSY_SNAPSHOT = 517  # what the transaction has read is out of date: waiting for the lock would not help


def conflict_of(error: BaseException, *, stale_data: bool = False) -> Conflict | None:
    """Which conflict an error is, or was raised `from`; None if it is none.

    Args:
        error: SQLAlchemy's, or a driver's own.
        stale_data: count SQLAlchemy's `StaleDataError`, which says that a row was changed or deleted by another.
    """
    for cause in _causes(error):
        found = _by_code(cause.orig if isinstance(cause, DBAPIError) else cause)
        if found is not None:
            return found
        if stale_data and isinstance(cause, StaleDataError):
            return Conflict.STALE
        # A decision of dbscope's own is not undone by what led to it, but for those that only report a failure:
        # a PartialCommit has saved something, a SelfBlockedError would come again.
        if isinstance(cause, DBScopeError) and not isinstance(cause, RollbackOnlyError | TransactionAbortedError):
            return None
    return None


def _by_code(error: Any) -> Conflict | None:
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int):
        return Conflict.SERIALIZATION if code == _BUSY_SNAPSHOT else _SQLITE.get(code & 0xFF)
    if type(error).__module__.partition(".")[0] in _MYSQL:
        errno = getattr(error, "errno", None) or (error.args[0] if error.args else None)
        return _ERRNOS.get(errno) if isinstance(errno, int) else None
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state is None and error.args and isinstance(error.args[0], dict):
        state = error.args[0].get("C")  # pg8000 hands on the server's fields
    return _SQLSTATES.get(state) if isinstance(state, str) else None


def leaves_open(error: BaseException) -> bool:
    """Whether an error, or what it was raised `from`, means that something may have been saved, and nobody knows."""
    return any(isinstance(cause, CommitOutcomeUnknown) for cause in _causes(error))


def saved_a_part(error: BaseException) -> bool:
    """Whether an error, or what it was raised `from`, means that some databases have committed, and others not."""
    return any(isinstance(cause, PartialCommit) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__
