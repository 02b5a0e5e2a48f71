"""Facts: what happens to scopes, sessions, connections and transactions, told to those who observe it.

A fact costs nothing where nobody observes its kind: the core then asks an empty list, and makes none. What was seen is
told in the thread or task in which it happens, and before the work goes on; an observer that raises is logged, and
harms nobody. Facts hold no parameters of statements.

>>> from dbscope import scope
>>> stop = observe(lambda fact: print("opened", fact.scope.name), ScopeOpened)
>>> with scope("nightly-report"): pass
opened nightly-report
>>> stop()
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from dbscope.errors import ConfigurationError, GuardError

__all__ = [
    "ConnectionReturned",
    "ConnectionTaken",
    "EngineMade",
    "Fact",
    "HookRun",
    "PoolExhausted",
    "RollbackPending",
    "ScopeEnded",
    "ScopeOpened",
    "ScopeTooLong",
    "ScopesPileUp",
    "SentInTransaction",
    "SessionCreated",
    "SessionDropped",
    "StatementBegun",
    "StatementEnded",
    "SyncOnLoop",
    "TransactionBegun",
    "TransactionBegunAgain",
    "TransactionEnded",
    "WorkFailed",
    "emit",
    "observe",
    "tell_failed",
]

F = TypeVar("F", bound="Fact")
log = logging.getLogger("dbscope")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something that has happened.

    Attributes:
        at: when, on the monotonic clock, in seconds.
    """

    observers: ClassVar[list[Callable[[Any], object]]] = []

    at: float = field(default_factory=time.monotonic, compare=False)

    def __init_subclass__(cls) -> None:
        cls.observers = []


@dataclass(frozen=True, kw_only=True)
class ScopeOpened(Fact):
    """A scope was entered. `scope` is the `Scope`."""

    scope: Any


@dataclass(frozen=True, kw_only=True)
class ScopeEnded(Fact):
    """A scope is over, and has given back what it held. `error` is what its work failed with, if it did."""

    scope: Any
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class ScopeTooLong(Fact):
    """A scope that used a database is over, and `lasted` more seconds than it should."""

    scope: Any
    lasted: float


@dataclass(frozen=True, kw_only=True)
class EngineMade(Fact):
    """A database was made, or an engine is watched for the first time.

    Attributes:
        database: the `Database`, `AsyncDatabase` or `Watch`.
        engine: its (sync) engine, which another one may have, too.
        place: where, as `where.spell` reads it.
    """

    database: Any
    engine: Any
    place: Any


@dataclass(frozen=True, kw_only=True)
class SentInTransaction(Fact):
    """A task is about to be sent to a queue, inside of a transaction with uncommitted writes.

    Attributes:
        task: its name.
        database: the one that was written to.
        wrote: where, as `where.spell` reads it; or, as a text, what was never flushed.
        advice: what to do instead.
    """

    task: str
    database: Any
    wrote: Any
    advice: str


@dataclass(frozen=True, kw_only=True)
class ScopesPileUp(Fact):
    """So many scopes by id are open at once that some may never be ended: `scopes`, the oldest first."""

    scopes: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class SessionDropped(Fact):
    """The garbage collector found a session, or a connection of a watched engine, with an open transaction.

    Attributes:
        database: the `Database`, `AsyncDatabase` or `Watch`.
        name: that of its scope, which was still open and is gone, too; None where it has none.
        opened: where that scope was opened, as `where.spell` reads it; None outside of every scope.
        taken: where it took its connection, the same.
    """

    database: Any
    name: str | None
    opened: Any
    taken: Any


@dataclass(frozen=True, kw_only=True)
class WorkFailed(Fact):
    """An error leaves a scope, a transaction's block, or a test: `error`, to which notes may be added."""

    error: BaseException


@dataclass(frozen=True, kw_only=True)
class _OfSession(Fact):
    """Something that has happened to a session.

    Attributes:
        database: the `Database` or `AsyncDatabase`; None for a session of an engine that is only watched.
        scope: the `Scope` that the session belongs to; None outside of every scope.
        session: the sync `Session`.
    """

    database: Any
    scope: Any
    session: Any


@dataclass(frozen=True, kw_only=True)
class SessionCreated(_OfSession):
    """A session was made. It holds no connection yet."""


@dataclass(frozen=True, kw_only=True)
class ConnectionTaken(_OfSession):
    """A session has a connection of the pool from now on."""


@dataclass(frozen=True, kw_only=True)
class ConnectionReturned(_OfSession):
    """A session's connections are back in their pool, or were thrown away, after so many seconds."""

    held: float


@dataclass(frozen=True, kw_only=True)
class SyncOnLoop(_OfSession):
    """A sync session took a connection of an `engine` in the thread of a running event loop."""

    engine: Any


@dataclass(frozen=True, kw_only=True)
class TransactionBegun(_OfSession):
    """A session has begun a transaction."""


@dataclass(frozen=True, kw_only=True)
class TransactionBegunAgain(_OfSession):
    """The same, where the session had committed another one before: told besides `TransactionBegun`."""


@dataclass(frozen=True, kw_only=True)
class TransactionEnded(_OfSession):
    """A session's transaction is over.

    Attributes:
        outcome: `"commit"`, `"rollback"`, or `"unknown"`, where the connection was lost during COMMIT.
        lasted: how many seconds it was open.
    """

    outcome: Literal["commit", "rollback", "unknown"]
    lasted: float


@dataclass(frozen=True, kw_only=True)
class RollbackPending(_OfSession):
    """A session's transaction cannot go on, and was not rolled back: SQLAlchemy raises `PendingRollbackError`.

    Attributes:
        error: SQLAlchemy's, which is about to be raised: notes may be added.
        failure: what the transaction failed with, as a text to read; None where that is not known.
    """

    error: BaseException
    failure: Any


@dataclass(frozen=True, kw_only=True)
class StatementBegun(_OfSession):
    """A statement is about to be sent: its text, without its parameters."""

    statement: str


@dataclass(frozen=True, kw_only=True)
class StatementEnded(_OfSession):
    """A statement was answered, or failed with `error`, after so many seconds. Its rows may still be fetched."""

    statement: str
    lasted: float
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class HookRun(Fact):
    """A hook was called, because of an `outcome` of its transaction; `error` is what it failed with, if it did."""

    name: str
    outcome: str
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class PoolExhausted(Fact):
    """Somebody waited for a connection of a pool, and got none in time.

    Attributes:
        engine: the (sync) engine whose pool it is.
        error: SQLAlchemy's, which is about to be raised: notes may be added.
    """

    engine: Any
    error: Exception


def emit(fact: Fact) -> None:
    """Tell a fact to its observers. Call it where `type(fact).observers` is not empty.

    Raises:
        GuardError: an observer that is a guard says that this must not go on.
    """
    for observer in [*type(fact).observers]:
        try:
            observer(fact)
        except GuardError:
            raise
        except Exception:
            log.exception("an observer of %s failed; the work goes on", type(fact).__name__)


def tell_failed(error: BaseException) -> None:
    """Tell that an error leaves a scope, a block or a test. Call it where `WorkFailed.observers` is not empty."""
    try:
        emit(WorkFailed(error=error))
    except GuardError as found:
        error.add_note(str(found))  # the work has failed as it is


def _is_kind(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Fact) and kind is not Fact


def observe(observer: Callable[[F], object], *kinds: type[F]) -> Callable[[], None]:
    """Have a function called with each fact of some kinds, until what this returns is called.

    Args:
        observer: it is called where the fact happens, and so by any thread: it must be quick, and must not block.
        kinds: such as `ScopeOpened`.

    Returns:
        a function that ends it; calling it again is harmless.

    Raises:
        ConfigurationError: it is no function, or one of the kinds is none.
    """
    if not callable(observer):
        raise ConfigurationError(f"an observer is a function that takes a fact, not {observer!r}.")
    for kind in kinds:
        if not _is_kind(kind):
            raise ConfigurationError(f"a kind of fact is a class such as events.ScopeOpened, not {kind!r}.")
    if not kinds:
        raise ConfigurationError("say which kinds of facts are observed, such as events.ScopeOpened.")

    for kind in kinds:
        kind.observers.append(observer)

    def stop() -> None:
        for kind in kinds:
            if observer in kind.observers:
                kind.observers.remove(observer)

    return stop
