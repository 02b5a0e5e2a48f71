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
    └── TransactionError
        ├── NotTheOwnerError        a commit (or reset, or invalidate) by somebody who did not begin
        ├── RollbackOnlyError       the block can only roll back
        ├── TransactionInProgress   uncommitted writes without an owner stood before the block
        ├── ReadOnlyError           a write in a reader
        ├── SelfBlockedError        an independent transaction would wait for its own work
        ├── PartialCommit           several databases, and a commit failed after another had succeeded
        └── UncommittedWritesError  a scope ended with writes that nobody committed

    UncommittedWrites               the same, as a warning (the default)
    ScopeWarning                    scopes that ended in an order, or a place, that they should not
"""

__all__ = [
    "ConfigurationError",
    "DBScopeError",
    "FanOutError",
    "LeftOpenError",
    "NoScopeError",
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


class TransactionError(DBScopeError):
    """Something about who may commit, and what can still be committed."""


class NotTheOwnerError(TransactionError):
    """Somebody else's managed transaction was to be ended."""


class RollbackOnlyError(TransactionError):
    """The managed transaction can only roll back: a part of its work is gone or failed."""


class TransactionInProgress(TransactionError):
    """A managed transaction was to begin on a session with uncommitted writes that nobody owns."""


class ReadOnlyError(TransactionError):
    """A reader was asked to write."""


class SelfBlockedError(TransactionError):
    """An independent transaction would have waited for a lock or a connection that its own work holds."""


class PartialCommit(TransactionError):
    """A scope over several databases committed some of them, and then a commit failed.

    Attributes:
        committed: the databases whose work is saved, in the order of their commits.
        failed: the databases whose work is rolled back, the one that failed first.
    """

    def __init__(self, message: str, committed: tuple[object, ...], failed: tuple[object, ...]) -> None:
        super().__init__(message)
        self.committed = committed
        self.failed = failed


class UncommittedWritesError(TransactionError):
    """A scope ended with writes that nobody committed; they are rolled back."""


class UncommittedWrites(UserWarning):
    """A scope ended with writes that nobody committed; they are rolled back."""


class ScopeWarning(UserWarning):
    """Scopes ended in an order, or a place, that they should not."""
