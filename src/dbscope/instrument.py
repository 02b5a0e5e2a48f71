"""The only caller of `event.listen`: once per session class and once per engine, where it costs least.

On the session class, because instance-level listeners cost three times a session's creation. On the dialect's
`do_execute`, because one `ConnectionEvents` listener, even an empty one, costs a SQLite SELECT a quarter of its time.
"""

from collections.abc import Callable
from typing import Any, cast

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.orm import Session, SessionTransaction

from dbscope import sqlite
from dbscope.aborted import note_failure
from dbscope.connection import OwnedConnection
from dbscope.errors import DBScopeError
from dbscope.holders import HolderWatch, explain_busy
from dbscope.interrupt import before_closing, hidden, is_cut, keep_cancel
from dbscope.lifecycle import Source
from dbscope.outcome import is_lost
from dbscope.session import ScopedSession
from dbscope.statements import Kind, kind


def on_transaction_create(session: ScopedSession, transaction: SessionTransaction) -> None:
    """New work begins, by SQL or by `add()`: refuse it where no work may begin."""
    life = session._dbscope
    if transaction.parent is not None:
        return
    life.used = True  # before looking whether it has ended: the end looks in the other order
    if life.acting:
        return
    home = life.home
    if life.ended is not None or life.doom or life.undone or (home is not None and home.is_inside):
        try:
            life.refuse_ended()
            life.refuse_doomed()
            life.refuse_self_block(session)
        except DBScopeError:
            transaction.close()  # or SQLAlchemy keeps it, and the next try would pass
            raise


def on_begin(session: ScopedSession, transaction: SessionTransaction, connection: Connection) -> None:
    """A connection was taken; SQLAlchemy says so for each savepoint too."""
    if transaction.parent is None:
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
        session._dbscope.committed = True
    else:
        session._dbscope.freed = savepoint


def on_transaction_end(session: ScopedSession, transaction: SessionTransaction) -> None:
    """A transaction or a savepoint is over: `close()` fires this alone, neither commit nor rollback events."""
    life = session._dbscope
    if transaction.parent is None:
        committed, life.committed = life.committed, False
        if life.writes and not committed and life.owner is None:
            life.undone_by_sibling()
        life.root_ended()
        if life.hooks and life.owner is None and not life.acting:
            cast("Source", life.source).run_hooks(life.take_hooks(committed=committed))
    elif transaction.nested and (life.writes or life.hooks or life.doom is not None):
        life.savepoint_ended(session, transaction)


def instrument_sessions(session_class: type[Session]) -> None:
    """Let the sessions of a class that `derive` made know what SQLAlchemy does with them."""
    event.listen(session_class, "after_transaction_create", on_transaction_create)
    event.listen(session_class, "after_begin", on_begin)
    event.listen(session_class, "before_commit", before_commit)
    event.listen(session_class, "after_commit", after_commit)
    event.listen(session_class, "after_transaction_end", on_transaction_end)


_READ = Kind.READ


def before_statement(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
    """Tell a statement's session what it is about to do, so that it can refuse."""
    session = getattr(context.root_connection, "_dbscope", None)
    if session is not None:
        what = kind(statement)
        life = session._dbscope
        if what is not _READ or life.doom is not None:
            life.statement(session, what, statement)
        if life.beside and life.watch is None and life.turn.locked():  # in a call of the session's, which ends it
            life.watch_locks(context.root_connection)


def before_sqlite_statement(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
    """The same where the BEGIN is ours."""
    connection = context.root_connection
    session = getattr(connection, "_dbscope", None)
    what = kind(statement)
    life = None
    immediate = autocommit = False
    if session is not None:
        life = session._dbscope
        if what is not _READ or life.doom is not None:
            life.statement(session, what, statement, alone=what is Kind.WRITE and sqlite.alone(statement))
        owner = life.owner
        if owner is not None:
            immediate, autocommit = owner.immediate, owner.autocommit
    begin = None if autocommit else sqlite.mode(cursor, connection, what, statement, immediate=immediate)
    if begin is not None:
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


def _without_parameters(listener: Callable[..., None]) -> Callable[..., None]:
    def listen(cursor: Any, statement: str, context: Any) -> None:
        listener(cursor, statement, None, context)

    return listen


_WATCH = {
    listener: {
        "do_execute": listener,
        "do_executemany": listener,
        "do_execute_no_params": _without_parameters(listener),
    }
    for listener in (before_statement, before_sqlite_statement)
}


def instrument_engine(engine: Engine, *, own_begin: bool) -> None:
    """Let every statement of the engine pass by its session, once, however many databases share the engine."""
    dialect: Any = engine.dialect  # which those that `execution_options()` made share, too
    if "_dbscope" in vars(dialect):  # event.contains() goes by id(), and takes a new engine for one that is gone
        return
    dialect._dbscope = True
    if engine._connection_cls is Connection:  # changing each connection's class later costs a SELECT 4 %
        engine._connection_cls = OwnedConnection
    for name, listener in _WATCH[before_sqlite_statement if own_begin else before_statement].items():
        event.listen(engine, name, listener)
    event.listen(engine, "handle_error", on_error)
    event.listen(engine, "invalidate", before_closing(engine.dialect))
    if (keep := keep_cancel(engine.dialect)) is not None:
        event.listen(engine, "connect", keep)
