"""The engines that a session is bound to instead of its own: those whose BEGIN says more, and those that send none.

After a connection has begun it is too late to shape its BEGIN, so the engine has to know before the connection is
taken. That is only when the block runs its first statement, and so the session is given another `get_bind()`.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from dbscope.errors import ConfigurationError

__all__ = ["Engines", "beside", "rebind", "set_for_good", "told_pid", "unbind"]


def rebind(session: Session, engine_for: Callable[[Any], Any]) -> None:
    """Let a session take its connections from other engines than its own, until `unbind`.

    On the instance: with an override on the class every statement of every session would come by it.
    """
    session.get_bind = _GetBind(ref(session), engine_for)  # type: ignore[method-assign]


def unbind(session: Session) -> None:
    """Let a session take its connections from its own engines again."""
    vars(session).pop("get_bind", None)


class _GetBind:
    """`session.get_bind`, with another engine in place of the one it finds. It does not keep the session alive."""

    __slots__ = ("_engine_for", "_session")

    def __init__(self, session: "ref[Session]", engine_for: Callable[[Any], Any]) -> None:
        self._session = session
        self._engine_for = engine_for

    def __call__(self, *args: Any, **options: Any) -> Any:
        session: Any = self._session()
        return self._engine_for(type(session).get_bind(session, *args, **options))


class Engines:
    """A database's engines beside its own, each made when it is first needed."""

    def __init__(self) -> None:
        self._made: dict[Any, Engine] = {}
        self._making = threading.Lock()

    def shaping(self, options: dict[str, Any]) -> Callable[[Any], Any]:
        """For `rebind`: engines on the same pools, whose BEGIN is shaped by execution options."""
        return partial(self._of, tuple(options.items()))

    def reading(self, bind: Any) -> Any:
        """For `rebind`: the same engines, whose transactions the server keeps read-only."""
        return bind if isinstance(bind, Connection) else self._of((("postgresql_readonly", True),), bind)

    def committing_at_once(self, bind: Any) -> Any:
        """For `rebind`: engines that begin nothing, on pools of their own, whose connections only read."""
        return self._of(None, bind)

    def apart(self) -> list[Engine]:
        """The engines that have a pool of their own, to be disposed of with the database."""
        return [engine for engine in self._made.values() if isinstance(engine, _EngineBeside)]

    def _of(self, options: tuple[tuple[str, Any], ...] | None, bind: Any) -> Any:
        if isinstance(bind, Connection):
            raise ConfigurationError(
                "the session works on a connection that was taken for it, and begun already: what shapes the BEGIN "
                "can only be asked of a session that is bound to an engine."
            )
        made = self._made.get((bind, options))
        if made is None:
            with self._making:
                made = self._made.get((bind, options))
                if made is None:
                    made = _reading(bind) if options is None else bind.execution_options(**dict(options))
                    made._connection_cls = bind._connection_cls
                    self._made[bind, options] = made
        return made


class _EngineBeside(OptionEngine):
    """An engine with another's dialect, options and listeners, and a pool of its own."""

    pool: Pool = None  # type: ignore[assignment]  # in place of OptionEngine's property


def beside(engine: Engine, pool: Pool) -> Engine:
    """An engine with another's dialect, options and listeners, on a pool of its own."""
    made = _EngineBeside(engine, {})
    made.pool = pool
    made._connection_cls = engine._connection_cls
    return made


def _reading(engine: Engine) -> Engine:
    if engine.get_execution_options().get("isolation_level") not in (None, "AUTOCOMMIT"):
        raise ConfigurationError(
            "the database's engine has an isolation level among its execution options, which each of its connections "
            "is given: reader(autocommit=True) cannot be had there. Give it to create_engine() instead."
        )
    made = beside(engine, engine.pool.recreate())
    event.listen(made.pool, "connect", partial(_read_only_for_good, engine.dialect))
    return made


def _read_only_for_good(dialect: Any, connection: Any, record: Any) -> None:
    """Let a new connection only read, and each of its statements be a transaction."""
    dialect.set_isolation_level(connection, "AUTOCOMMIT")
    set_for_good(
        dialect,
        connection,
        record,
        {"default_transaction_read_only": "'on'"},
        what="reader(autocommit=True)",
        instead="Use `reader()`, which sets nothing that outlives its transaction; or a direct address.",
    )


def set_for_good(
    dialect: Any, connection: Any, record: Any, settings: dict[str, str], *, what: str, instead: str
) -> None:
    """Set what a new connection of PostgreSQL's has until it is closed; in a transaction, where the driver begins one.

    Through a pooler the settings would stay on a server connection that others are given next. PgBouncer and its like
    tell the client a process number of their own, so that the one that the server knows is another; what hands the
    server's number through is no pooler, or cannot be told from none. The server compares, and sets nothing if they
    differ.

    Args:
        dialect: the engine's.
        connection: the new connection, as the pool's event has it.
        record: the pool's, of the same event.
        settings: SQL expressions, by the names of the settings.
        what: who asks, for the error.
        instead: what to do, for the error.

    Raises:
        ConfigurationError: there is a pooler between, or that cannot be told; the connection is closed.
    """
    pid = told_pid(record.driver_connection)
    calls = ", ".join(f"set_config('{name}', {value}, false)" for name, value in settings.items())
    if pid is not None and _found(connection, f"SELECT {calls} WHERE pg_backend_pid() = {pid}"):
        return
    connection.close()
    raise ConfigurationError(
        f"{what} needs a connection of its own to the server, and "
        + (
            f"{dialect.driver} does not tell whether it has one."
            if pid is None
            else "there is a pooler between, such as PgBouncer: what is set for it would reach others."
        )
        + f"\n{instead}"
    )


def _found(connection: Any, query: str) -> bool:
    """Whether a query finds a row; in one message, so that a pooler cannot have two servers answer parts of it."""
    if hasattr(connection, "run_async") and hasattr(connection.driver_connection, "get_server_pid"):
        return bool(connection.run_async(lambda asyncpg: asyncpg.execute(query)) == "SELECT 1")
    cursor = connection.cursor()
    try:
        cursor.execute(query)
        return cursor.fetchone() is not None
    finally:
        cursor.close()


def told_pid(driver: Any) -> int | None:
    """The server's process behind a connection, as the driver was told when it connected."""
    if hasattr(driver, "get_server_pid"):  # asyncpg
        return int(driver.get_server_pid())
    pid = getattr(getattr(driver, "info", None), "backend_pid", None)  # psycopg, psycopg2
    return None if pid is None else int(pid)
