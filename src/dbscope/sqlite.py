"""What SQLite needs to keep its promises: a BEGIN of our own, and sane settings for connections.

Python's sqlite3 begins implicitly, and only before a write: two SELECTs of one transaction may then see different
data, and a savepoint opens no transaction at all. Here each transaction begins, explicitly, with its first statement;
those that are going to write say so, so that "database is locked" waits for its time-out instead of failing at once.
"""

import os
import re
import sqlite3
import uuid
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolResetState, QueuePool

from dbscope.statements import Kind


def is_memory(url: URL) -> bool:
    """Whether the URL names a database in memory."""
    database = url.database or ""
    return database in ("", ":memory:") or "mode=memory" in str(url) or database.startswith("file::memory:")


def absolute(url: URL) -> URL:
    """The URL with the whole path of its file, however it was written; other URLs as they are."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith("file:"):
        return url
    return url.set(database=os.path.abspath(url.database))


class Memory:
    """A database in memory that outlives its connections, and that one connection at a time uses.

    SQLAlchemy binds `sqlite://` to a thread: each would see a database of its own, and a connection that had to be
    thrown away would take all data with it. Here one idle connection keeps the data, and the pool has room for one:
    two transactions on one SQLite connection would commit and roll back each other's work.
    """

    def __init__(self, url: URL) -> None:
        self._name = f"file:dbscope-{uuid.uuid4().hex}"
        self.url = url.set(database=self._name, query={"mode": "memory", "cache": "shared", "uri": "true"})
        self._keeper: sqlite3.Connection | None = None

    def open(self) -> None:
        """Keep the data, until `close`."""
        self._keeper = sqlite3.connect(f"{self._name}?mode=memory&cache=shared", uri=True, check_same_thread=False)

    def close(self) -> None:
        """Let the data go."""
        if self._keeper is not None:
            self._keeper.close()


def pool_options(url: URL, memory: Memory | None) -> dict[str, Any]:
    """What `create_engine` is told beyond the user's options."""
    if memory is None:
        return {}
    pool = AsyncAdaptedQueuePool if url.get_dialect().is_async else QueuePool
    return {"poolclass": pool, "pool_size": 1, "max_overflow": 0, "connect_args": {"check_same_thread": False}}


def set_up(engine: Engine, memory: Memory | None) -> None:
    """Foreign keys are enforced; files use write-ahead logging, so that readers and the one writer do not block."""
    if memory is not None:
        memory.open()

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        if memory is None:
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.close()


def set_until_returned(connection: Connection, pragma: str, value: int) -> None:
    """Set a PRAGMA of a connection until it is back in its pool, whoever brings it back."""
    pool = connection.engine.pool
    if _set_back not in pool.dispatch.reset:  # event.contains() goes by id(), and takes a new pool for one that is gone
        event.listen(pool, "reset", _set_back)
    cursor: Any = connection.connection.cursor()  # below SQLAlchemy, where nobody asks what it does to the transaction
    try:
        cursor.execute(f"PRAGMA {pragma}")
        before = cursor.fetchone()[0]
        connection.connection.info.setdefault(_CHANGED, {}).setdefault(pragma, before)
        cursor.execute(f"PRAGMA {pragma} = {value}")
    finally:
        cursor.close()


_CHANGED = "dbscope pragmas"


def _set_back(connection: Any, record: Any, state: PoolResetState) -> None:
    changed: dict[str, int] = record.info.pop(_CHANGED, {})
    if not state.terminate_only:
        for pragma, before in changed.items():
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA {pragma} = {before}")
            cursor.close()


_READ = Kind.READ

# These refuse to run inside of a transaction, or do nothing in one; comments may come before.
_OUTSIDE = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:VACUUM|ATTACH|DETACH)\b", re.IGNORECASE | re.DOTALL)


def alone(text: str) -> bool:
    """Whether a statement takes part in no transaction."""
    return _OUTSIDE.match(text) is not None


def begin(driver: Any, kind: Kind, text: str, *, immediate: bool) -> str | None:
    """The BEGIN that has to come before a statement, or None if none is wanted.

    Args:
        driver: sqlite3's connection, in which no transaction is open.
        kind: the statement's.
        text: the statement.
        immediate: take the write lock, whatever it is.
    """
    if driver.isolation_level is None:
        return None  # AUTOCOMMIT was asked for
    if kind is _READ:
        return "BEGIN IMMEDIATE" if immediate else "BEGIN"
    if kind is Kind.CONTROL or kind is Kind.SETTING or alone(text):
        return None
    return "BEGIN IMMEDIATE" if immediate or kind is Kind.WRITE else "BEGIN"


def restart(session: Session) -> None:
    """End the transaction that a session has read in, and begin a writing one, below the session's own state.

    What is pending stays pending. What was read before may be stale now, and is read again where it is used next,
    unless the session keeps loaded state after a commit, too (`expire_on_commit=False`).
    """
    connection = session.connection()
    connection.exec_driver_sql("COMMIT")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    forget_loaded(session)


def forget_loaded(session: Session) -> None:
    """Let what was read in a transaction that is over be read again; what is changed, and unsaved, stays."""
    if session.expire_on_commit:
        changed = {id(item) for items in (session.dirty, session.deleted) for item in items}
        for item in session.identity_map.values():
            if id(item) not in changed:
                session.expire(item)
