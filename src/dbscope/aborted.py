"""What PostgreSQL says of a transaction in which a statement has failed: that it can only roll back.

It does not say so when the transaction is committed: that COMMIT is turned into a ROLLBACK, and nothing is reported.
psycopg knows how the transaction stands. Of other drivers an error leaves a mark, and only where there is one the
server is asked before the commit: what the driver refused by itself (asyncpg, an argument of a wrong type) has aborted
nothing.
"""

from typing import Any

from sqlalchemy.engine import Connection, ExceptionContext

from dbscope.errors import TransactionAbortedError
from dbscope.lifecycle import Lifecycle
from dbscope.lockwatch import ask
from dbscope.where import Place, here, spell

__all__ = ["Failure", "note_failure", "refuse_aborted", "sqlstate"]

IN_ERROR = 3  # libpq's PQTRANS_INERROR
REFUSED = "25P02"  # "current transaction is aborted, commands ignored until end of transaction block"
SHOWN = 120  # characters of a statement


class Failure:
    """The statement that a transaction failed with, as far as is known before the server is asked."""

    __slots__ = ("by_server", "error", "place", "sqlstate", "statement")

    def __init__(self, statement: str | None, place: Place | None, error: BaseException, *, by_server: bool) -> None:
        # The words alone: the exception would keep the frames of the user's alive, and all that they hold.
        cause = error.__cause__ or error  # asyncpg's own, below SQLAlchemy's translation of it
        self.error = f"{type(cause).__name__}: {cause}".partition("\n")[0].rstrip()
        self.sqlstate = sqlstate(error)
        self.statement = statement
        self.place = place
        self.by_server = by_server  # so the transaction is aborted; otherwise the driver may have refused by itself

    def __str__(self) -> str:
        if self.statement is None:
            return f"the flush at {spell(self.place)} failed: {self.error}"
        text = " ".join(self.statement.split())
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
        return f"the statement at {spell(self.place)} failed: {shown!r}, {self.error}"


def note_failure(context: ExceptionContext, known: Failure | None) -> Failure | None:
    """A statement of a transaction failed.

    Args:
        context: SQLAlchemy's, of the `handle_error` event.
        known: what has failed in the transaction before.

    Returns:
        what an error about the transaction has to quote from now on.
    """
    error = context.original_exception
    shown = context.sqlalchemy_exception
    if context.dialect.name != "postgresql" or shown is None or context.is_disconnect:
        return known
    if known is not None and sqlstate(error) == REFUSED:
        shown.add_note(f"PostgreSQL refuses everything in this transaction since {known}.\n{_ADVICE}")
        return known
    status = None if context.connection is None else _status(context.connection)
    by_server = status == IN_ERROR or getattr(error.__cause__, "severity", None) is not None
    if (known is not None and known.by_server) or status not in (None, IN_ERROR):
        return known
    execution: Any = context.execution_context
    statement = context.statement or getattr(execution, "statement", None) or "an unknown statement"
    return Failure(statement, here(), error, by_server=by_server)


def refuse_aborted(connection: Connection, known: Failure | None, life: Lifecycle) -> None:
    """Raise if the server would turn the COMMIT that is to be sent into a ROLLBACK.

    Args:
        connection: the one whose transaction is to be committed.
        known: the statement that failed in it, if one did.
        life: of its session.
    """
    status = _status(connection)
    if status != IN_ERROR and (status is not None or known is None or not _refuses(connection)):
        return
    since = f"since {known}" if known is not None else "by an error that was raised below SQLAlchemy"
    raise TransactionAbortedError(
        f"{life.the_commit()} would have saved nothing: PostgreSQL has aborted the transaction {since}.\n"
        f"It answers such a COMMIT with a ROLLBACK, and with no error. {_ADVICE}",
        None if known is None else known.sqlstate,
    )


_ADVICE = "Let the first error out of the block, or put the part that may fail into `transaction(nested=True)`."


def _status(connection: Connection) -> int | None:
    """How the transaction stands, where the driver says so without asking the server: psycopg, and psycopg2."""
    driver: Any = connection.connection.driver_connection
    wire = getattr(driver, "pgconn", None) or getattr(driver, "info", None)
    return getattr(wire, "transaction_status", None)


def _refuses(connection: Connection) -> bool:
    """Whether the server refuses a statement; one trip."""
    raw: Any = connection.connection.dbapi_connection
    try:
        if hasattr(raw, "run_async"):  # asyncpg's cursor would prepare it first, which is a trip more
            raw.run_async(lambda driver: driver.execute("SELECT 1"))
        else:
            ask(raw, "SELECT 1")
    except Exception as error:  # any other one the COMMIT will meet, too
        return sqlstate(error) == REFUSED
    return False


def sqlstate(error: BaseException) -> str | None:
    """The code of a driver's error, if the server gave it one; asyncpg gives codes to some of its own."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
