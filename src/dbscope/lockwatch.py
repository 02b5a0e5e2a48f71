"""An independent transaction that waits for a lock of its own work's would wait for ever: found out, and cancelled.

PostgreSQL knows no deadlock there: the holder is idle, and only the application knows that it will stay so until the
waiter is through. While such a statement runs, the holder's own connection, which nobody uses meanwhile, is asked
whether it is the one that is waited for.
"""

import asyncio
import contextlib
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from sqlalchemy.pool import Pool

from dbscope.where import in_greenlet, running_loop

__all__ = ["AHEAD", "LockWatch", "Watch", "ask", "ask_anew", "knows_waits"]

# Seconds until the first look, and between the next ones: at first the lock may be somebody else's.
FIRST, NEXT = 0.05, 0.5


def knows_waits(dialect: str) -> bool:
    """Whether the server can tell who waits for whom."""
    return dialect == "postgresql"


def backend_of(connection: Any) -> int:
    """The server's process behind a connection; one trip, for a pooler between may give the driver another number."""
    return int(ask(connection.connection.dbapi_connection, "SELECT pg_backend_pid()"))


def ask(raw: Any, question: str) -> Any:
    """The first column of the answer; asked of a driver's connection, below SQLAlchemy's, which notes statements."""
    cursor = raw.cursor()
    try:
        cursor.execute(question)
        return cursor.fetchone()[0]
    finally:
        cursor.close()


def ask_anew(pool: Pool, question: str) -> Any:
    """The same, of a connection that is taken from a pool for it."""
    connection = pool.connect()
    try:
        answer = ask(connection.dbapi_connection, question)
    except BaseException:
        connection.invalidate()
        raise
    connection.close()
    return answer


# Whom a process waits for, be it by way of others: a row's second waiter waits for the first, and only that one for
# whoever holds the lock.
AHEAD = """
WITH RECURSIVE ahead (pid) AS (
    SELECT unnest(pg_blocking_pids({0}))
    UNION SELECT unnest(pg_blocking_pids(pid)) FROM ahead
)"""
_WAITS_FOR_ME = f"{AHEAD} SELECT pg_backend_pid() IN (SELECT pid FROM ahead)"


class Watch:
    """Looks at something again and again, until `stop()`: in a task or a thread, made when the first look is due.

    Most of what is watched is over by then.

    Args:
        first: seconds until the first look.
        is_async: in a task, for what it asks is asked on the loop.
    """

    def __init__(self, first: float, *, is_async: bool) -> None:
        self.over = False
        self._stop: Callable[[], object]
        if is_async:
            self._stop = asyncio.get_running_loop().call_later(first, self._begin_task).cancel
        else:
            self._stop = _nothing
            _alarms.add(time.monotonic() + first, self)

    def stop(self) -> None:
        """What was watched is over."""
        self.over = True
        self._stop()

    def begin(self) -> None:
        """The first look is due, in a thread."""
        event = threading.Event()
        self._stop = event.set
        if not self.over:
            threading.Thread(target=self._watch, args=(event,), name="dbscope lock watch", daemon=True).start()

    def _begin_task(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._awatch())
        self._stop = self._task.cancel

    def _looks(self) -> Generator[float, None, None]:
        """Look; yields the seconds to wait before the next look."""
        raise NotImplementedError

    def _watch(self, over: threading.Event) -> None:
        with contextlib.closing(self._looks()) as looks:
            for pause in looks:
                if over.wait(pause):
                    return

    async def _awatch(self) -> None:
        from sqlalchemy.util import greenlet_spawn  # there is a greenlet, or nobody could have come here

        looks = self._looks()
        try:
            pause = await greenlet_spawn(next, looks, None)
            while pause is not None:
                await asyncio.sleep(pause)
                pause = await greenlet_spawn(next, looks, None)
        finally:
            await greenlet_spawn(looks.close)


def _nothing() -> None: ...


class _Alarms:
    """Begins watches when they are due, in one thread, which ends when there are none left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Watch]] = []
        self._count = itertools.count()  # of two that are due at the same time, watches are not compared
        self._runs = False

    def add(self, due: float, watch: Watch) -> None:
        """Begin a watch at a time of the monotonic clock, if it is not over by then."""
        with self._changed:
            heapq.heappush(self._due, (due, next(self._count), watch))
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="dbscope lock watches", daemon=True).start()
            elif self._due[0][2] is watch:
                self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._due:
                due, _, watch = self._due[0]
                pause = due - time.monotonic()
                if pause > 0 and not watch.over:
                    self._changed.wait(pause)
                else:
                    heapq.heappop(self._due)
                    watch.begin()
            self._runs = False


_alarms = _Alarms()


def _forget_alarms() -> None:
    global _alarms
    _alarms = _Alarms()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_alarms)  # the thread that begins them is the parent's


class LockWatch(Watch):
    """Watches one statement of an independent transaction, from its start to `stop()`.

    Args:
        backend: the server's process that executes the statement.
        holders: the connections of the transactions around it; idle until this statement is through.
    """

    def __init__(self, backend: int, holders: list[Any]) -> None:
        self.backend = backend
        self.holders = holders
        self.blocked_by: Any = None  # the connection that holds the lock
        super().__init__(FIRST, is_async=running_loop() is not None and in_greenlet())

    def _looks(self) -> Generator[float, None, None]:
        """Look at each holder; yields the seconds to wait before the next look."""
        while not self.over:
            for holder in self.holders:
                raw = holder.connection.dbapi_connection
                if ask(raw, _WAITS_FOR_ME.format(self.backend)) and not self.over:
                    self.blocked_by = holder
                    ask(raw, f"SELECT pg_cancel_backend({self.backend})")
                    return
            yield NEXT
