"""Give every piece of work its own SQLAlchemy session, and show which work holds which connection."""

from typing import TYPE_CHECKING, Any

from dbscope import guards as guards  # which are at work from here on
from dbscope.conflicts import Conflict
from dbscope.database import Database
from dbscope.errors import (
    CommitOutcomeUnknown,
    ConfigurationError,
    DBScopeError,
    FanOutError,
    GuardError,
    GuardWarning,
    NoScopeError,
    NotCommittedError,
    NoTransactionError,
    NotTheOwnerError,
    OverlapError,
    PartialCommit,
    ReadOnlyError,
    RollbackOnlyError,
    ScopeEndedError,
    ScopeError,
    ScopeMisuseError,
    ScopeWarning,
    SelfBlockedError,
    SentBeforeCommit,
    TransactionAbortedError,
    TransactionError,
    TransactionInProgress,
    UncommittedWrites,
    UncommittedWritesError,
)
from dbscope.ids import aend_scope, begin_scope, end_scope
from dbscope.loop import Loop
from dbscope.retry import AttemptFailed, Retry
from dbscope.scope import Scope, current_scope, scope
from dbscope.watched import watch

if TYPE_CHECKING:
    from dbscope.aio import AsyncDatabase

__all__ = [
    "AsyncDatabase",
    "AttemptFailed",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "Conflict",
    "DBScopeError",
    "Database",
    "FanOutError",
    "GuardError",
    "GuardWarning",
    "Loop",
    "NoScopeError",
    "NoTransactionError",
    "NotCommittedError",
    "NotTheOwnerError",
    "OverlapError",
    "PartialCommit",
    "ReadOnlyError",
    "Retry",
    "RollbackOnlyError",
    "Scope",
    "ScopeEndedError",
    "ScopeError",
    "ScopeMisuseError",
    "ScopeWarning",
    "SelfBlockedError",
    "SentBeforeCommit",
    "TransactionAbortedError",
    "TransactionError",
    "TransactionInProgress",
    "UncommittedWrites",
    "UncommittedWritesError",
    "aend_scope",
    "begin_scope",
    "current_scope",
    "end_scope",
    "scope",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "AsyncDatabase":  # SQLAlchemy's asyncio part wants greenlet: not before it is asked for
        from dbscope.aio import AsyncDatabase

        return AsyncDatabase
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
