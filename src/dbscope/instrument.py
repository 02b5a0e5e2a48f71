"""The only caller of `event.listen`: once per session class and once per engine, where it costs least.

On the session class, because instance-level listeners cost three times a session's creation. On the dialect's
`do_execute`, because one `ConnectionEvents` listener, even an empty one, costs a SQLite SELECT a quarter of its time.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from dbscope import lifecycle, sqlite
from dbscope.statements import Kind, kind


def instrument_sessions(session_class: type[Session]) -> None:
    """Let the sessions of a class that `derive` made know what SQLAlchemy does with them."""
    event.listen(session_class, "after_transaction_create", lifecycle.on_transaction_create)
    event.listen(session_class, "after_begin", lifecycle.on_begin)
    event.listen(session_class, "before_commit", lifecycle.before_commit)
    event.listen(session_class, "after_commit", lifecycle.after_commit)
    event.listen(session_class, "after_transaction_end", lifecycle.on_transaction_end)


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
    immediate = False
    if session is not None:
        life = session._dbscope
        if what is not _READ or life.doom is not None:
            life.statement(session, what, statement, alone=what is Kind.WRITE and sqlite.alone(statement))
        owner = life.owner
        immediate = owner is not None and owner.immediate
    begin = sqlite.mode(cursor, connection, what, statement, immediate=immediate)
    if begin is not None:
        if life is not None:
            life.read_first = what is _READ and not immediate
            if immediate:
                life.refuse_second_writer()
        cursor.execute(begin)


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
    for name, listener in _WATCH[before_sqlite_statement if own_begin else before_statement].items():
        event.listen(engine, name, listener)
