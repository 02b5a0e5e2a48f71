"""Every error and warning of dbscope.

::

    DBScopeError
    ├── ConfigurationError          a database or a decorator was set up in a way that cannot work
    ├── ScopeError
    │   ├── NoScopeError            a session was asked for where no scope is open
    │   ├── ScopeEndedError         the scope, or the session, is over
    │   ├── ScopeMisuseError        entered twice, in a generator, in the wrong colour, in the wrong process
    │   └── LeftOpenError           a test ended, and something that it opened was still open
    ├── OverlapError                one session, two threads or tasks
    ├── FanOutError                 a fan-out that could never get a connection
    ├── GuardError                  a guard found what it was told to raise for
    └── TransactionError
        ├── NotTheOwnerError        a commit (or reset, or invalidate) by somebody who did not begin
        ├── RollbackOnlyError       the block can only roll back
        ├── TransactionInProgress   uncommitted writes, or a transaction, stood before a block that must not find any
        ├── NoTransactionError      something was asked of a transaction, and none is open
        ├── ReadOnlyError           a write in a reader
        ├── TransactionAbortedError the server has aborted the transaction, and would not say so at the commit
        ├── SelfBlockedError        an independent transaction would wait for its own work
        ├── CommitOutcomeUnknown    a connection was lost during COMMIT: committed or not, nobody knows
        ├── NotCommittedError       the same, and the server says that it has rolled back
        ├── PartialCommit           several databases, and a commit failed after another had succeeded
        └── UncommittedWritesError  a scope ended with writes that nobody committed

    GuardWarning                    a guard found what it was told to warn about
    └── SentBeforeCommit            a task was sent to a queue inside of a transaction that has yet to commit
    UncommittedWrites               the same, as a warning (the default)
    ScopeWarning                    scopes that ended in an order, or a place, that they should not
"""

__all__ = [
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "DBScopeError",
    "FanOutError",
    "GuardError",
    "GuardWarning",
    "LeftOpenError",
    "NoScopeError",
    "NoTransactionError",
    "NotCommittedError",
    "NotTheOwnerError",
    "OverlapError",
    "PartialCommit",
    "ReadOnlyError",
    "RollbackOnlyError",
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
]


class DBScopeError(Exception):
    """Base of every error that dbscope raises by its own decision."""


class ConfigurationError(DBScopeError):
    """A database, an option or a decorator was set up in a way that cannot work."""


class ScopeError(DBScopeError):
    """Something about the scope in which a session was asked for."""


class NoScopeError(ScopeError):
    """A session was asked for where no scope is open, and none may be opened implicitly."""


class ScopeEndedError(ScopeError):
    """A session, or a scope that was inherited or kept, was used after its end."""


class ScopeMisuseError(ScopeError):
    """A scope was entered twice, in a generator's frame, in the wrong colour or in the wrong process."""


class LeftOpenError(ScopeError):
    """A test ended, and a scope or a connection of it was still open."""


class OverlapError(DBScopeError):
    """Two threads or tasks used one session at the same moment, or ended each other's transaction."""


class FanOutError(DBScopeError):
    """A fan-out could never get a connection, because its own callers hold all of them."""


class GuardError(DBScopeError):
    """A guard found something, and was told to raise for it."""


class TransactionError(DBScopeError):
    """Something about who may commit, and what can still be committed."""


class NotTheOwnerError(TransactionError):
    """Somebody else's managed transaction was to be ended."""


class RollbackOnlyError(TransactionError):
    """The managed transaction can only roll back: a part of its work is gone or failed."""


class TransactionInProgress(TransactionError):
    """A block found uncommitted writes that nobody owns, or a transaction, and must not begin after them or inside."""


class NoTransactionError(TransactionError):
    """Something was asked of the open transaction, and none is open."""


class ReadOnlyError(TransactionError):
    """A reader was asked to write."""


class SelfBlockedError(TransactionError):
    """An independent transaction would have waited for a lock or a connection that its own work holds."""


class TransactionAbortedError(TransactionError):
    """A transaction was to be committed that PostgreSQL has aborted: its COMMIT would have saved nothing, silently.

    Attributes:
        sqlstate: PostgreSQL's code of the error that aborted it, if dbscope saw it.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class CommitOutcomeUnknown(TransactionError):
    """A connection was lost during COMMIT, and whether the transaction was committed is unknown.

    Attributes:
        xid: PostgreSQL's id of the transaction, where it was learned before the COMMIT (`outcome="resolve"`).
    """

    def __init__(self, message: str, xid: int | None = None) -> None:
        super().__init__(message)
        self.xid = xid


class NotCommittedError(TransactionError):
    """A connection was lost during COMMIT, and the server says that it has rolled back: the work may be repeated."""


class PartialCommit(TransactionError):
    """A scope over several databases committed some of them, and then a commit failed.

    Attributes:
        committed: the databases whose work is saved, in the order of their commits.
        failed: the databases whose work is rolled back, the one that failed first.
        unknown: the database whose connection was lost during COMMIT, if that is what failed.
    """

    def __init__(
        self,
        message: str,
        committed: tuple[object, ...],
        failed: tuple[object, ...],
        unknown: tuple[object, ...] = (),
    ) -> None:
        super().__init__(message)
        self.committed = committed
        self.failed = failed
        self.unknown = unknown


class UncommittedWritesError(TransactionError):
    """A scope ended with writes that nobody committed; they are rolled back."""


class UncommittedWrites(UserWarning):
    """A scope ended with writes that nobody committed; they are rolled back."""


class GuardWarning(UserWarning):
    """A guard found something, and was told to warn about it."""


class ScopeWarning(UserWarning):
    """Scopes ended in an order, or a place, that they should not."""


class SentBeforeCommit(GuardWarning):
    """A task was sent to a queue inside of a transaction that has yet to commit: a worker may not find its rows."""
