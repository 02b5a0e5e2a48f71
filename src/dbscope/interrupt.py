"""A call of the driver's was cut short, by a cancel or by a signal's exception: the server must not go on alone.

A connection that is thrown away in the middle of a statement leaves the statement running, and its transaction's locks
held, until the server notices. So before such a connection is closed the statement is cancelled by the driver's own
means, within `LIMIT`. What can't be cancelled is a server out of reach, and a call that another thread is in: its limit
is the statement's own time-out.
"""

import asyncio
import contextlib
import gc
import inspect
import signal
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

from sqlalchemy.engine import ExceptionContext

from dbscope.plan import outlast
from dbscope.where import in_greenlet

__all__ = ["before_closing", "hidden", "is_cut", "is_of_signal", "keep_cancel", "swallowed", "take_swallowed"]

LIMIT = 5.0  # seconds, to have a statement cancelled
PATIENCE = 0.05  # seconds that SQLite's statement may still take before it is interrupted

ACTIVE = 1  # libpq's PQTRANS_ACTIVE: a statement was sent, and its end has not been read


def is_cut(context: ExceptionContext) -> bool:
    """Whether a call of the driver's ended before the statement did, so that the connection can't be used again.

    SQLAlchemy takes that from the exception's class: one that is no `Exception`. But a signal's handler may raise any
    class (Celery's soft time limit is an `Exception`); and psycopg tells when a statement was left running.
    """
    connection, error = context.connection, context.original_exception
    if connection is None or isinstance(error, context.dialect.loaded_dbapi.Error):
        return False
    if not isinstance(error, Exception) or is_of_signal(error):
        return True
    return not connection.invalidated and _is_active(connection.connection.driver_connection)


def is_of_signal(error: BaseException) -> bool:
    """Whether a signal's handler raised it: it has nothing to do with the call that it came out of."""
    trace, codes = error.__traceback__, None
    while trace is not None:
        if codes is None:
            codes = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _code_of(handler: Any) -> Any:
    while isinstance(handler, partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)  # a method's
    if not inspect.isroutine(function):
        function = getattr(type(handler), "__call__", None)  # noqa: B004  # an object that can be called
    return getattr(function, "__code__", None)


def hidden(context: ExceptionContext) -> BaseException | None:
    """The exception that cut the look whether a pooled connection is alive, where that look's clean-up has hidden it.

    psycopg refuses to go back from AUTOCOMMIT while the statement runs; its error takes the place of the first one.
    """
    first = context.original_exception.__context__
    if not context.is_pre_ping or first is None or isinstance(first, context.dialect.loaded_dbapi.Error):
        return None
    # What the caller was handling already is a context, too, but did not pass by the look.
    trace = first.__traceback__
    return first if trace is not None and trace.tb_frame.f_code.co_name == "do_ping" else None


# What a signal's handler raised while a connection went back into its pool: SQLAlchemy logs that, and goes on. Only the
# main thread handles signals, and only it may look for more than whether there is something.
swallowed: list[Exception] = []


def take_swallowed() -> Exception | None:
    """What was swallowed in this thread since this was asked last: the last of it."""
    if threading.current_thread() is not threading.main_thread():
        return None
    last = swallowed[-1]
    swallowed.clear()
    return last


def before_closing(dialect: Any) -> Callable[[Any, Any, Any], None]:
    """A listener for the pool's `invalidate`: cancels the statement of a connection that is thrown away."""
    stop = _STOPS.get(dialect.driver)

    def invalidated(_: Any, record: Any, error: BaseException | None) -> None:
        of_signal = isinstance(error, Exception) and is_of_signal(error)
        if of_signal:
            swallowed.append(cast("Exception", error))
        if stop is not None:
            stop(record.driver_connection)
            if (of_signal or isinstance(error, asyncio.CancelledError)) and _CANCEL in record.info:
                _psycopg_gave_up(record)

    return invalidated


def keep_cancel(dialect: Any) -> Callable[[Any, Any], None] | None:
    """A listener for the pool's `connect`, where there is something to keep for a later cancel.

    Where psycopg's own cancel is cut short in its turn, as AnyIO does, it closes the connection and leaves the
    statement running; from a closed connection none can be cancelled.
    """

    def connected(_: Any, record: Any) -> None:
        record.info[_CANCEL] = record.driver_connection.pgconn.get_cancel()

    return connected if dialect.driver == "psycopg" and dialect.is_async else None


_CANCEL = "dbscope cancel"


def _psycopg_gave_up(record: Any) -> None:
    if record.driver_connection.closed:
        _to_its_end(lambda: asyncio.to_thread(record.info[_CANCEL].cancel))


def _is_active(driver: Any) -> bool:
    """Whether a statement is running, as far as the driver tells: psycopg, and psycopg2."""
    wire = getattr(driver, "pgconn", None) or getattr(driver, "info", None)
    return getattr(wire, "transaction_status", None) == ACTIVE


def _psycopg(driver: Any) -> None:
    if not _is_active(driver):
        return
    if asyncio.iscoroutinefunction(driver.cancel_safe):
        _to_its_end(lambda: driver.cancel_safe(timeout=LIMIT))
    else:
        with contextlib.suppress(Exception):  # it is closed next, whatever became of this
            driver.cancel_safe(timeout=LIMIT)


def _asyncpg(driver: Any) -> None:
    # It has asked for the cancel by itself, in a task; `close` waits for that one, and `terminate` ends it.
    if not driver.is_closed():
        _to_its_end(lambda: driver.close(timeout=LIMIT))


def _sqlite(driver: Any) -> None:
    # A cursor that a traceback keeps would hold the lock beyond the connection's close.
    with contextlib.suppress(Exception):
        driver.rollback()


def _aiosqlite(driver: Any) -> None:
    async def stop() -> None:
        at_rest = asyncio.ensure_future(driver.cursor())  # in its thread, behind what is running there
        _, running = await asyncio.wait({at_rest}, timeout=PATIENCE)
        if running:
            await driver.interrupt()
        await at_rest
        try:
            await driver.rollback()
        except sqlite3.OperationalError:
            # The interrupt came a moment too late, and holds for whatever follows, until no cursor has rows to give.
            await driver._execute(_close_cursors, driver._conn)
            await driver.rollback()
        await driver.close()  # in its thread, too, which takes a lock for a moment

    _to_its_end(stop)


def _close_cursors(raw: sqlite3.Connection) -> None:
    for cursor in gc.get_referrers(raw):  # slow, and nobody else knows those that a cancel has left open
        if isinstance(cursor, sqlite3.Cursor):
            cursor.close()


_STOPS: dict[str, Callable[[Any], None]] = {
    "psycopg": _psycopg,
    "asyncpg": _asyncpg,
    "pysqlite": _sqlite,
    "aiosqlite": _aiosqlite,
}


def _to_its_end(stop: Callable[[], Awaitable[None]]) -> None:
    """Wait for what stops a statement, `LIMIT` at most, however often this task is cancelled meanwhile."""
    if in_greenlet():  # otherwise the garbage collector closes it, and nobody can wait
        from sqlalchemy.util import await_only  # there is a greenlet, or nobody could have come here

        async def stopped() -> None:
            work = asyncio.ensure_future(asyncio.wait_for(stop(), LIMIT))
            await outlast(work, forward=False)  # the cancel is on its way already
            if not work.cancelled():
                work.exception()  # it is closed next, whatever became of this

        await_only(stopped())
