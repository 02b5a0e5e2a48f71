"""Long work apart: connections beside those of the application, with a name of their own, and limits of their own.

A migration or a back-fill that shares the pool of the requests takes connections from them, and is cut off by the
time-outs that were made for them. So it gets a pool of its own, whose connections say what they are for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool

from dbscope.engines import beside, set_for_good
from dbscope.errors import ConfigurationError
from dbscope.settings import Seconds, Settings, milliseconds, settings_of
from dbscope.sqlite import is_memory

__all__ = ["Work", "engine_for", "work_of"]

LONGEST_NAME = 50  # bytes: a part of the application's own name comes first
SHOWN = 63  # bytes of an application's name that PostgreSQL shows
NEVER = 2**31 - 1  # milliseconds: what SQLite takes for "wait as long as it takes"
A_YEAR = 31_536_000  # seconds: the longest that MySQL and MariaDB wait


class Work:
    """What is asked of the connections for one kind of long work, checked."""

    def __init__(self, name: str, connections: int, limits: Settings) -> None:
        self.name = name
        self.connections = connections
        self.limits = limits


def work_of(
    engine: Engine, name: Any, connections: Any, lock_timeout: Seconds | None, statement_timeout: Seconds | None
) -> Work:
    """The checked options of `Database.apart`.

    Raises:
        ConfigurationError: one cannot be meant, or is not to be had on this kind of database.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise ConfigurationError(
            f"apart() takes a name for the work, such as 'migration': a text of at most {LONGEST_NAME} bytes on one "
            f"line, not {name!r}."
        )
    if isinstance(connections, bool) or not isinstance(connections, int) or connections < 1:
        raise ConfigurationError(f"connections is how many the work may use at once, 1 or more, not {connections!r}.")
    times = {"lock_timeout": lock_timeout, "statement_timeout": statement_timeout}
    limits = settings_of({name: value for name, value in times.items() if value is not None}) or Settings()
    dialect = engine.dialect.name
    known = _KNOWN.get(dialect, ())
    for limit in limits.asked():
        if limit not in known:
            raise ConfigurationError(
                f"{limit} of work apart is not known on {dialect}: say {limit}=None, and limit it by other means."
            )
    if dialect == "sqlite" and is_memory(engine.url):
        raise ConfigurationError(
            "a SQLite database in memory has one connection, and cannot have others beside it: use a file."
        )
    return Work(name, connections, limits)


def engine_for(engine: Engine, work: Work) -> Engine:
    """An engine like another one, with a pool for the work alone."""
    made = beside(engine, _pool(engine.pool, work.connections, is_async=engine.dialect.is_async))
    set_up = _SET_UP.get(engine.dialect.name)
    if set_up is not None:
        event.listen(made.pool, "connect", partial(set_up, engine.dialect, work))
    return made


def _pool(pool: Pool, connections: int, *, is_async: bool) -> Pool:
    """A pool that connects as another one does, as `recreate()` makes it, but for its size."""
    pool_class = AsyncAdaptedQueuePool if is_async else QueuePool
    return pool_class(
        pool._creator,
        pool_size=connections,
        max_overflow=0,
        recycle=pool._recycle,
        pre_ping=pool._pre_ping,
        echo=pool.echo,
        logging_name=pool._orig_logging_name,
        reset_on_return=pool._reset_on_return,
        dialect=pool._dialect,
        _dispatch=pool.dispatch,
    )


# -- a new connection, after the application's own listeners ----------------------------------------------------------


def _on_postgresql(dialect: Any, work: Work, connection: Any, record: Any) -> None:
    version = getattr(dialect, "server_version_info", None) or (0,)
    limits = {
        "statement_timeout": work.limits.statement_timeout,
        "lock_timeout": work.limits.lock_timeout,
        "idle_in_transaction_session_timeout": None,
        **({"idle_session_timeout": None} if version >= (14,) else {}),
        **({"transaction_timeout": None} if version >= (17,) else {}),
    }
    settings = {name: "'0'" if value is None else f"'{milliseconds(value)}'" for name, value in limits.items()}
    ours = f": {work.name}"
    room = SHOWN - len(ours.encode())
    theirs = f"coalesce(left(nullif(current_setting('application_name'), ''), {room}), 'dbscope')"
    settings["application_name"] = f"{theirs} || '{ours.replace(chr(39), chr(39) * 2)}'"
    set_for_good(
        dialect,
        connection,
        record,
        settings,
        what=f"apart({work.name!r})",
        instead="Make a Database of the server's own address for this work, and take it apart from that one.",
    )
    connection.commit()  # or the rollback with which the connection returns to its pool would undo it


def _on_sqlite(dialect: Any, work: Work, connection: Any, record: Any) -> None:
    limit = work.limits.lock_timeout
    _execute(connection, f"PRAGMA busy_timeout = {NEVER if limit is None else milliseconds(limit)}")


def _on_mysql(dialect: Any, work: Work, connection: Any, record: Any) -> None:
    lock, statement = work.limits.lock_timeout, work.limits.statement_timeout
    seconds = A_YEAR if lock is None else -(-milliseconds(lock) // 1000)
    limit = f"max_statement_time = {statement or 0}" if dialect.is_mariadb else "max_execution_time = 0"
    _execute(
        connection, f"SET SESSION lock_wait_timeout = {seconds}, innodb_lock_wait_timeout = {seconds}, SESSION {limit}"
    )


def _execute(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


_SET_UP: dict[str, Callable[..., None]] = {
    "postgresql": _on_postgresql,
    "sqlite": _on_sqlite,
    "mysql": _on_mysql,
    "mariadb": _on_mysql,
}
_KNOWN: dict[str, tuple[str, ...]] = {
    "postgresql": ("lock_timeout", "statement_timeout"),
    "sqlite": ("lock_timeout",),
    "mysql": ("lock_timeout",),
    "mariadb": ("lock_timeout", "statement_timeout"),
}
