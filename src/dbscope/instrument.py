"""The only caller of `event.listen`: once per session class and once per engine, where it costs least.

On the session class, because instance-level listeners cost three times a session's creation. On the dialect's
`do_execute`, because one `ConnectionEvents` listener, even an empty one, costs a SQLite SELECT a quarter of its time.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any, Literal, cast

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.orm import Session, SessionTransaction

from dbscope import sqlite
from dbscope.aborted import Failure, note_failure
from dbscope.closings import expired_all, kept
from dbscope.connection import OwnedConnection
from dbscope.errors import DBScopeError
from dbscope.events import (
    ConnectionReturned,
    ConnectionTaken,
    StatementBegun,
    StatementEnded,
    SyncOnLoop,
    TransactionBegun,
    TransactionBegunAgain,
    TransactionEnded,
    emit,
)
from dbscope.holders import HolderWatch, explain_busy
from dbscope.interrupt import before_closing, hidden, is_cut, keep_cancel
from dbscope.lifecycle import Lifecycle, Source
from dbscope.outcome import is_lost
from dbscope.session import ScopedSession
from dbscope.statements import Kind, kind, known_kinds
from dbscope.where import here, running_loop

# The listeners of a session ask a transaction for `_parent`: the property `parent` is a call more each time.


def on_transaction_create(session: ScopedSession, transaction: SessionTransaction) -> None:
    """New work begins, by SQL or by `add()`: refuse it where no work may begin."""
    if transaction._parent is not None:
        return
    life = session._dbscope
    life.used = True  # before looking whether it has ended: the end looks in the other order
    if life.acting:
        return
    home = life.home
    if life.ended is not None or life.doom or life.undone or (home is not None and home._outer is not None):
        try:
            life.refuse_ended()
            life.refuse_doomed()
            life.refuse_self_block(session)
        except DBScopeError:
            transaction.close()  # or SQLAlchemy keeps it, and the next try would pass
            raise


def on_begin(session: ScopedSession, transaction: SessionTransaction, connection: Connection) -> None:
    """A connection was taken; SQLAlchemy says so for each savepoint too."""
    if transaction._parent is not None:
        return
    life = session._dbscope
    if type(connection) is Connection:  # of an engine that `execution_options()` made
        connection.__class__ = OwnedConnection
    connection._dbscope = session  # type: ignore[attr-defined]  # its statements find their session here
    if type(connection) is OwnedConnection and not isinstance(session.bind, Connection):  # the session's own
        connection._life = life
    life.began(connection)
    owner = life.owner
    if owner is not None and owner.settings is not None and life.shared is None:
        owner.settings.tell(connection)
    if (_taken or _begun or (life.again and _begun_again)) and not life.others:
        _tell_begin(session, life)
    if _on_loop and running_loop() is not None and not connection.dialect.is_async:
        emit(SyncOnLoop(database=life.source, scope=life.home, session=session, engine=connection.engine))


_on_loop = SyncOnLoop.observers
_taken, _returned = ConnectionTaken.observers, ConnectionReturned.observers
_begun, _begun_again, _over = (
    TransactionBegun.observers,
    TransactionBegunAgain.observers,
    TransactionEnded.observers,
)
_statement_begun, _statement_ended = StatementBegun.observers, StatementEnded.observers


def _tell_begin(session: ScopedSession, life: Lifecycle) -> None:
    whose: dict[str, Any] = {"database": life.source, "scope": life.home, "session": session}
    if _taken:
        emit(ConnectionTaken(**whose, at=life.since))
    if life.owner is None or not life.owner.autocommit:
        if _begun:
            emit(TransactionBegun(**whose, at=life.since))
        if _begun_again and life.again:
            emit(TransactionBegunAgain(**whose, at=life.since))


def _tell_end(session: ScopedSession, life: Lifecycle, *, committed: bool, unknown: bool) -> None:
    """The transaction is over, and the connection back."""
    whose: dict[str, Any] = {"database": life.source, "scope": life.home, "session": session}
    held = monotonic() - life.since
    if _over and (life.owner is None or not life.owner.autocommit):
        lost: Literal["unknown", "rollback"] = "unknown" if unknown else "rollback"
        emit(TransactionEnded(**whose, outcome="commit" if committed else lost, lasted=held))
    if _returned:
        emit(ConnectionReturned(**whose, held=held))


def before_commit(session: ScopedSession) -> None:
    """The deepest place that every commit passes, `SessionTransaction.commit()` included."""
    life = session._dbscope
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        life.refuse_stranger("commit()")
        life.refuse_sibling("commit()")
    elif life.doom is not None and life.doom.savepoint is savepoint:
        life.refuse_doomed()


def after_commit(session: ScopedSession) -> None:
    """A COMMIT, or the release of a savepoint, succeeded."""
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        life = session._dbscope
        life.committed = True
        if kept and session.expire_on_commit:
            expired_all(life, "the commit")
    else:
        session._dbscope.freed = savepoint


def after_rollback(session: ScopedSession, transaction: SessionTransaction) -> None:
    """A transaction, or to a savepoint, was rolled back, by whomever: SQLAlchemy expires what was loaded."""
    if kept:
        expired_all(session._dbscope, "the rollback")


def on_transaction_end(session: ScopedSession, transaction: SessionTransaction) -> None:
    """A transaction or a savepoint is over: `close()` fires this alone, neither commit nor rollback events."""
    life = session._dbscope
    if transaction._parent is None:
        committed = life.committed
        if committed:
            life.committed = False
            life.again = True
        elif life.writes and life.owner is None:
            life.undone_by_sibling()
        taken = life.connection
        life.root_ended()
        if (_over or _returned) and taken is not None:
            _tell_end(session, life, committed=committed, unknown=getattr(taken, "_lost", False))
        if life.hooks and life.owner is None and not life.acting:
            cast("Source", life.source).run_hooks(life.take_hooks(committed=committed))
    elif transaction.nested:
        if life.failed is not None and life.connection is not None and not life.connection.invalidated:
            life.failed = None  # the savepoint that it belonged to is gone
        if life.writes or life.hooks or life.doom is not None:
            life.savepoint_ended(session, transaction)


def instrument_sessions(session_class: type[Session]) -> None:
    """Let the sessions of a class that `derive` made know what SQLAlchemy does with them."""
    event.listen(session_class, "after_transaction_create", on_transaction_create)
    event.listen(session_class, "after_begin", on_begin)
    event.listen(session_class, "before_commit", before_commit)
    event.listen(session_class, "after_commit", after_commit)
    event.listen(session_class, "after_soft_rollback", after_rollback)
    event.listen(session_class, "after_transaction_end", on_transaction_end)


_READ = Kind.READ


def before_statement(cursor: Any, statement: str, parameters: Any, context: Any, execute: str = "do_execute") -> bool:
    """Tell a statement's session what it is about to do, so that it can refuse.

    Returns:
        whether the statement was executed here, because it is observed.
    """
    connection = context.root_connection
    try:
        life: Lifecycle = connection._dbscope._dbscope
    except AttributeError:  # no session's
        pass
    else:
        what = known_kinds.get(statement) or kind(statement)
        life.sent = statement
        life.statements += 1
        if what is not _READ or life.doom is not None or life.undone is not None:
            life.statement(connection._dbscope, what, statement)
        if life.beside and life.watch is None and life.turn.locked():  # in a call of the session's, which ends it
            life.watch_locks(connection)
    if _statement_begun or _statement_ended:
        return _observed(execute, cursor, statement, parameters, context)
    return False


def before_sqlite_statement(
    cursor: Any, statement: str, parameters: Any, context: Any, execute: str = "do_execute"
) -> bool:
    """The same where the BEGIN is ours."""
    connection = context.root_connection
    life: Lifecycle | None
    try:
        life, driver = connection._dbscope._dbscope, cursor.connection
    except AttributeError:  # no session's; or the driver is not sqlite3 itself
        session = getattr(connection, "_dbscope", None)
        life, driver = None if session is None else session._dbscope, connection.connection.driver_connection
    what = known_kinds.get(statement) or kind(statement)
    if life is not None:
        life.sent = statement
        life.statements += 1
    if what is _READ and life is not None and life.owner is None and life.undone is None:  # most are, and no call more
        if not driver.in_transaction and driver.isolation_level is not None:
            life.read_first = True
            cursor.execute("BEGIN")
    else:
        _begin_sqlite(cursor, driver, statement, what, connection, life)
    if _statement_begun or _statement_ended:
        return _observed(execute, cursor, statement, parameters, context)
    return False


def _begin_sqlite(
    cursor: Any, driver: Any, statement: str, what: Kind, connection: Any, life: Lifecycle | None
) -> None:
    """What comes before a statement that writes, or that is of a managed transaction, or of no session."""
    immediate = False
    if life is not None:
        if what is not _READ or life.doom is not None or life.undone is not None:
            alone = what is Kind.WRITE and sqlite.alone(statement)
            life.statement(connection._dbscope, what, statement, alone=alone)
        owner = life.owner
        if owner is not None:
            if owner.autocommit:
                return
            immediate = owner.immediate
    if driver.in_transaction:
        return
    begin = sqlite.begin(driver, what, statement, immediate=immediate)
    if begin is None:
        return
    if life is not None:
        life.read_first = what is _READ and not immediate
        if immediate:
            life.refuse_second_writer()
    cursor.execute(begin)


def on_error(context: ExceptionContext) -> None:
    """A statement failed, or what begins or ends a transaction; fetching rows, too."""
    connection = context.connection
    watch = _end_watch(connection)
    if (first := hidden(context)) is not None:
        raise first
    if watch is not None:
        watch.explain(context)
    elif context.dialect.name == "sqlite":
        explain_busy(context)
    if cut := is_cut(context):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False  # the other connections are as they were
    if isinstance(connection, OwnedConnection) and connection._life is not None:
        if connection._committing:
            connection._cut = cut
            connection._lost = is_lost(context)
        else:
            if context.is_disconnect and connection._life.failed is None:
                lost = Failure(context.statement, here(), context.original_exception, by_server=False)
                connection._life.failed = lost
            connection._failed = note_failure(context, connection._failed)


def watch_waits(engine: Engine, limit: float) -> None:
    """Let each statement of an engine be watched while it may wait for a lock: its error names who holds it.

    Of the engines that share its dialect, such as the one that it was made of, none is watched.

    Args:
        engine: one of PostgreSQL's, whose connections are no pooler's.
        limit: how many seconds a statement may wait, where its block says nothing else.
    """

    def begins(connection: Any, *_: object) -> None:
        _end_watch(connection)
        session = getattr(connection, "_dbscope", None)
        owner = None if session is None else session._dbscope.owner
        own = None if owner is None or owner.settings is None else owner.settings.lock_timeout
        connection._watch = HolderWatch(connection, own or limit)

    def ends(connection: Any, *_: object) -> None:
        _end_watch(connection)

    event.listen(engine, "before_cursor_execute", begins)
    event.listen(engine, "after_cursor_execute", ends)


def _end_watch(connection: Any) -> HolderWatch | None:
    watch: HolderWatch | None = getattr(connection, "_watch", None)
    if watch is not None:
        connection._watch = None
        watch.stop()
    return watch


def _observed(execute: str, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    """Execute a statement that is observed, here and not in SQLAlchemy: an event after it would cost all a quarter."""
    session = getattr(context.root_connection, "_dbscope", None)
    life = None if session is None else session._dbscope
    whose: dict[str, Any] = {
        "database": None if life is None else life.source,
        "scope": None if life is None else life.home,
        "session": session,
        "statement": statement,
    }
    if _statement_begun:
        emit(StatementBegun(**whose))
    failure: BaseException | None = None
    began = monotonic()
    try:
        given = () if execute == "do_execute_no_params" else (parameters,)
        getattr(context.dialect, execute)(cursor, statement, *given, context)
    except BaseException as error:
        failure = error
        raise
    finally:
        if _statement_ended:
            emit(StatementEnded(**whose, lasted=monotonic() - began, error=failure))
    return True  # it is done


def _listeners(before: Callable[..., bool]) -> dict[str, Callable[..., bool]]:
    """What is called in place of the three calls by which a dialect executes; what it gives says whether it did."""

    def executemany(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        return before(cursor, statement, parameters, context, "do_executemany")

    def execute_no_params(cursor: Any, statement: str, context: Any) -> bool:
        return before(cursor, statement, None, context, "do_execute_no_params")

    return {"do_execute": before, "do_executemany": executemany, "do_execute_no_params": execute_no_params}


def instrument_engine(engine: Engine, *, own_begin: bool) -> None:
    """Let every statement of the engine pass by its session, once, however many databases share the engine."""
    dialect: Any = engine.dialect  # which those that `execution_options()` made share, too
    if "_dbscope" in vars(dialect):  # event.contains() goes by id(), and takes a new engine for one that is gone
        return
    dialect._dbscope = True
    if engine._connection_cls is Connection:  # changing each connection's class later costs a SELECT 4 %
        engine._connection_cls = OwnedConnection
    for name, listener in _listeners(before_sqlite_statement if own_begin else before_statement).items():
        event.listen(engine, name, listener)
    event.listen(engine, "handle_error", on_error)
    event.listen(engine, "invalidate", before_closing(engine.dialect))
    if (keep := keep_cancel(engine.dialect)) is not None:
        event.listen(engine, "connect", keep)
