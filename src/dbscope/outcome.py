"""A connection that is lost during COMMIT: whether the transaction was committed, nobody knows but the server.

Where `outcome="resolve"` was asked for, the transaction's id is learned before the COMMIT is sent, and a new connection
asks what became of it. An id means something to one run of one server only: a server that has crashed may give the same
id to another transaction, and so may the one that takes its place. So the id is kept with what tells runs apart, and
where that differs, the outcome stays unknown.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol

from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.pool import Pool

from dbscope.aborted import sqlstate
from dbscope.errors import CommitOutcomeUnknown, NotCommittedError
from dbscope.lifecycle import Lifecycle
from dbscope.lockwatch import ask_anew

__all__ = ["commit", "is_lost"]

LIMIT = 10.0  # seconds, for everything that is done to find out
FIRST, LONGEST = 0.01, 0.5  # seconds between two questions: doubled from the first to the longest

COMMITTED, ABORTED, IN_PROGRESS = "committed", "aborted", "in progress"  # as pg_xact_status says
FORGOTTEN, ELSEWHERE = "forgotten", "elsewhere"

# A restart changes the first part; a crash that only the server's processes have noticed, the second one.
_RUN = """concat_ws('/', extract(epoch FROM pg_postmaster_start_time()),
    extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()))"""
_RECEIPT = f"SELECT pg_current_xact_id_if_assigned()::text, {_RUN}"
_STATUS = f"""SELECT CASE {_RUN} WHEN '{{run}}'
    THEN coalesce(pg_xact_status('{{xid}}'::xid8), '{FORGOTTEN}') ELSE '{ELSEWHERE}' END"""

log = logging.getLogger("dbscope")


class Receipt(NamedTuple):
    """What to ask the server for, should its answer to the COMMIT be lost."""

    xid: int | None
    run: str = ""
    why: str = ""  # there is nothing to ask for


class Committing(Protocol):
    """What the handler of errors and the commit tell each other about the connection."""

    _committing: bool
    _lost: bool
    _cut: bool


def commit(connection: Any, life: Lifecycle, send: Callable[[], None]) -> None:
    """Commit, and know the outcome; or say that nobody does.

    Args:
        connection: the one whose transaction is committed, a `Committing` one.
        life: of its session.
        send: sends the COMMIT.

    Raises:
        CommitOutcomeUnknown: the connection was lost, and nobody was asked, or nobody could tell.
        NotCommittedError: the connection was lost, and the server has rolled back.
    """
    receipt = _receipt(connection) if life.resolves else None
    connection._committing = True
    try:
        try:
            send()
        except Exception as error:
            if not connection._lost or connection._cut:
                raise
            _settle(connection, life, receipt, error)
    except BaseException as error:  # a cancel, a signal, be it while asking: it is the user's, and stays what it is
        if connection._lost and (connection._cut or not isinstance(error, Exception)):
            life.forget_hooks()
            error.add_note(f"{life.the_commit()} was under way: whether it has happened is unknown")
        raise
    finally:
        connection._committing = False


def is_lost(context: ExceptionContext) -> bool:
    """Whether a COMMIT failed in a way that leaves its outcome open: its connection is gone, and no answer came.

    SQLAlchemy, which takes an OSError for nothing special, is told that the connection is gone.
    """
    error = context.original_exception
    if isinstance(error, OSError):  # a time limit of the driver's, too
        context.is_disconnect = True
    if not context.is_disconnect:
        return False
    if context.dialect.driver == "asyncpg" and isinstance(error, _interface_error(context)):
        return False  # it was closed before, and nothing has been sent
    # Where the server ended it for being idle, the COMMIT had not come by then.
    return all(sqlstate(cause) != "25P03" for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _interface_error(context: ExceptionContext) -> type[BaseException]:
    dbapi: Any = context.dialect.loaded_dbapi
    return dbapi.InterfaceError  # type: ignore[no-any-return]  # a class, says PEP 249


def _receipt(connection: Connection) -> Receipt:
    dialect = connection.dialect
    if dialect.name != "postgresql":
        return Receipt(None, why=f"{dialect.name} cannot be asked")
    if (dialect.server_version_info or (0,)) < (13,):
        return Receipt(None, why="PostgreSQL can be asked from version 13 on")
    xid, run = connection.exec_driver_sql(_RECEIPT).one()
    if xid is None:
        return Receipt(None, why="it had no id, for it had not written anything when the COMMIT was sent")
    return Receipt(int(xid), run)


def _settle(connection: Connection, life: Lifecycle, receipt: Receipt | None, error: Exception) -> None:
    """Return if the transaction was committed; raise otherwise."""
    where = f" to {life.source.name}" if life.source is not None else ""
    lost = f"the connection{where} was lost during {life.the_commit()}"
    if receipt is None:
        _unknown(life, f'{lost}.\n{_UNKNOWN} `outcome="resolve"` has PostgreSQL asked.', None, error)
    answer = receipt.why if receipt.xid is None else _find_out(connection.engine, receipt)
    if answer == COMMITTED:
        log.warning("%s; it has happened, says the server (transaction %s)", lost, receipt.xid)
    elif answer == ABORTED:
        raise NotCommittedError(
            f"{lost}, and the server has rolled back (transaction {receipt.xid}): nothing of it was saved.\n"
            "The whole piece of work may be repeated, in a new scope."
        ) from error
    else:
        number = "" if receipt.xid is None else f" (transaction {receipt.xid})"
        reason = _REASONS.get(answer, answer)
        _unknown(life, f"{lost}{number}.\nThe server could not tell: {reason}. {_UNKNOWN}", receipt.xid, error)


_UNKNOWN = "Whether it has happened is unknown: look for what it should have saved before you repeat it."
_REASONS = {
    IN_PROGRESS: "it still had it in progress when the time was up",
    FORGOTTEN: "it remembers the transaction no more",
    ELSEWHERE: "it is another one, or was restarted since, and the transaction's id may be another one's by now",
}


def _unknown(life: Lifecycle, message: str, xid: int | None, error: Exception) -> NoReturn:
    if life.forget_hooks():
        message += "\nNeither its on_commit nor its on_rollback hooks are called."
    raise CommitOutcomeUnknown(message, xid) from error


# -- asking ------------------------------------------------------------------------------------------------------------


def _find_out(engine: Engine, receipt: Receipt) -> str:
    """What became of the transaction, or why that cannot be known."""
    # A pool of its own: in the user's there may be no connection left, and nobody to give one back before this is over.
    question = partial(_ask_until, engine.pool.recreate(), receipt, time.monotonic() + LIMIT)
    return _ask_on_loop(question) if engine.dialect.is_async else _ask_in_thread(question)


Pause = Callable[[float], None]
_SILENT = "it did not answer in time"


def _ask_in_thread(question: Callable[[Pause], str]) -> str:
    """Ask in a thread, which can be left alone: a driver that connects to a server out of reach cannot be stopped."""
    answers: list[str] = []
    thread = threading.Thread(
        target=lambda: answers.append(question(time.sleep)), name="dbscope commit outcome", daemon=True
    )
    thread.start()
    thread.join(LIMIT)
    return answers[0] if answers else _SILENT


def _ask_on_loop(question: Callable[[Pause], str]) -> str:
    """Async version of `_ask_in_thread`, in the greenlet that SQLAlchemy commits in."""
    from sqlalchemy.util import await_only, greenlet_spawn  # there is a greenlet, or nobody could have come here

    def pause(seconds: float) -> None:
        await_only(asyncio.sleep(seconds))

    async def answer() -> str:
        try:
            return await asyncio.wait_for(greenlet_spawn(question, pause), LIMIT)
        except TimeoutError:
            return _SILENT

    return await_only(answer())


def _ask_until(pool: Pool, receipt: Receipt, deadline: float, pause: Pause) -> str:
    """Ask until the server knows, or the time is up."""
    wait = FIRST
    try:
        while True:
            try:
                answer = str(ask_anew(pool, _STATUS.format(run=receipt.run, xid=receipt.xid)))
            except Exception as error:  # it may be starting again
                answer = f"{type(error).__name__}: {error}".partition("\n")[0]
                final = False
            else:
                final = answer != IN_PROGRESS
            if final or time.monotonic() + wait > deadline:
                return answer
            pause(wait)
            wait = min(2 * wait, LONGEST)
    finally:
        pool.dispose()
