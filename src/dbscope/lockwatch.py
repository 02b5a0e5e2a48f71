"""An independent transaction that waits for a lock of its own work's would wait for ever: found out, and cancelled.

PostgreSQL knows no deadlock there: the holder is idle, and only the application knows that it will stay so until the
waiter is through. While such a statement runs, the holder's own connection, which nobody uses meanwhile, is asked
whether it is the one that is waited for.
"""

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any

from dbscope.where import in_greenlet, running_loop

__all__ = ["LockWatch", "ask", "knows_waits"]

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


# Whether a process waits for the one that is asked, be it by way of others: a row's second waiter waits for the first,
# and only that one for whoever holds the lock.
_WAITS_FOR_ME = """
WITH RECURSIVE ahead (pid) AS (
    SELECT unnest(pg_blocking_pids({}))
    UNION SELECT unnest(pg_blocking_pids(pid)) FROM ahead
) SELECT pg_backend_pid() IN (SELECT pid FROM ahead)"""


class LockWatch:
    """Watches one statement of an independent transaction, from its start to `stop()`.

    Args:
        backend: the server's process that executes the statement.
        holders: the connections of the transactions around it; idle until this statement is through.
    """

    def __init__(self, backend: int, holders: list[Any]) -> None:
        self.backend = backend
        self.holders = holders
        self.blocked_by: Any = None  # the connection that holds the lock
        self._over = False
        loop = running_loop()
        if loop is not None and in_greenlet():
            self._task: asyncio.Task[None] | None = loop.create_task(self._awatch())
            self._stop: Callable[[], object] = self._task.cancel
        else:
            event = threading.Event()
            self._stop = event.set
            threading.Thread(target=self._watch, args=(event,), name="dbscope lock watch", daemon=True).start()

    def stop(self) -> None:
        """The statement is through."""
        self._over = True
        self._stop()

    def _looks(self) -> Generator[float, None, None]:
        """Look at each holder; yields the seconds to wait before the next look."""
        yield FIRST
        while not self._over:
            for holder in self.holders:
                raw = holder.connection.dbapi_connection
                if ask(raw, _WAITS_FOR_ME.format(self.backend)) and not self._over:
                    self.blocked_by = holder
                    ask(raw, f"SELECT pg_cancel_backend({self.backend})")
                    return
            yield NEXT

    def _watch(self, over: threading.Event) -> None:
        for pause in self._looks():
            if over.wait(pause):
                return

    async def _awatch(self) -> None:
        from sqlalchemy.util import greenlet_spawn  # there is a greenlet, or nobody could have come here

        looks = self._looks()
        pause = await greenlet_spawn(next, looks, None)
        while pause is not None:
            await asyncio.sleep(pause)
            pause = await greenlet_spawn(next, looks, None)
