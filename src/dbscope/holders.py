"""Who holds the lock that a statement did not get in time: said in a note on the error, which stays SQLAlchemy's.

PostgreSQL knows it as long as the statement waits, and forgets it with the time-out. So while a statement of work apart
runs, a connection beside asks now and then whom it waits for; the last answer is what the error tells. SQLite knows
nothing of the kind; there the sessions of this process are looked through when it is too late.
"""

import json
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection, Engine, ExceptionContext

from dbscope import fork
from dbscope.aborted import sqlstate
from dbscope.engines import told_pid
from dbscope.lifecycle import Lifecycle, life_of, taken_by
from dbscope.lockwatch import AHEAD, Watch, ask_anew
from dbscope.where import ago, name_of, spell, worker

__all__ = ["HolderWatch", "explain_busy"]

SHARE = 4  # looks in the time that a statement may wait
SHORTEST, LONGEST = 0.01, 5.0  # seconds between two of them
SHOWN = 120  # characters of a statement
LOCK_TIMEOUT, CANCELED = "55P03", "57014"  # the second one by statement_timeout, which may come first, or by hand

# What is waited for, and who is before the waiter, those that wait for nobody first.
_QUESTION = f"""{AHEAD}
SELECT json_build_object(
    'wanted', (
        SELECT json_build_object('type', locktype, 'mode', mode, 'relation', coalesce(relation::regclass::text, (
            SELECT relation::regclass::text FROM pg_locks WHERE pid = {{0}} AND locktype = 'tuple' LIMIT 1
        ))) FROM pg_locks WHERE pid = {{0}} AND NOT granted LIMIT 1
    ),
    'holders', (
        SELECT json_agg(json_build_object(
            'pid', ahead.pid, 'role', usename, 'application', application_name, 'state', state, 'query', query,
            'waits', wait_event_type = 'Lock',
            'since', extract(epoch FROM clock_timestamp() - state_change),
            'begun', extract(epoch FROM clock_timestamp() - xact_start)
        ) ORDER BY wait_event_type = 'Lock' NULLS FIRST, xact_start)
        FROM ahead LEFT JOIN pg_stat_activity AS activity ON activity.pid = ahead.pid WHERE ahead.pid <> {{0}}
    )
)::text"""


class HolderWatch(Watch):
    """Asks PostgreSQL whom one statement waits for, from its start to `stop()`.

    Args:
        connection: the one that executes the statement.
        limit: how many seconds it may wait at most.
    """

    def __init__(self, connection: Connection, limit: float) -> None:
        self._engine = connection.engine
        self._pid = told_pid(connection.connection.driver_connection)
        self._pause = min(max(limit / SHARE, SHORTEST), LONGEST)
        self._answer: Any = None
        self._asked = 0.0
        self._problem: Exception | None = None
        super().__init__(self._pause, is_async=connection.dialect.is_async)

    def _looks(self) -> Generator[float, None, None]:
        pool = self._engine.pool.recreate()  # of its own: in the work's there may be no connection left
        missed = 0
        try:
            while not self.over:
                try:
                    answer = json.loads(ask_anew(pool, _QUESTION.format(self._pid)))
                except Exception as problem:  # there may be no connection to be had; the work goes on
                    self._problem = problem
                else:
                    if answer["holders"]:
                        self._answer, self._asked, missed = answer, time.monotonic(), 0
                    elif missed:  # it goes on; one look may fall between the time-out and its error
                        self._answer = None
                    else:
                        missed = 1
                yield self._pause
        finally:
            pool.dispose()

    def explain(self, context: ExceptionContext) -> None:
        """Name the holders in a note, if a time-out struck while the statement waited for them."""
        error, code = context.sqlalchemy_exception, sqlstate(context.original_exception)
        if error is None or code not in (LOCK_TIMEOUT, CANCELED):
            return
        if self._answer is None:
            if self._problem is not None and code == LOCK_TIMEOUT:
                error.add_note(f"Who held the lock could not be asked: {self._problem!r}")
            return
        since = time.monotonic() - self._asked
        holders = [f"- {_told(holder, since, self._engine)}" for holder in self._answer["holders"]]
        error.add_note("\n".join([f"It waited for {_wanted(self._answer['wanted'])}, held by:", *holders, _ADVICE]))


_ADVICE = "Let the holder commit or roll back, and repeat the work; or end it: SELECT pg_terminate_backend(its number)."


def _wanted(lock: dict[str, str] | None) -> str:
    if lock is None:
        return "a lock"
    kind, relation = lock["type"], lock["relation"]
    if kind == "relation":
        return f"{relation} ({lock['mode']})"
    if kind in ("transactionid", "tuple"):
        return f"a row of {relation}" if relation else "a row"
    return f"a lock ({kind}, {lock['mode']})"


def _told(holder: dict[str, Any], since: float, engine: Engine) -> str:
    """What is known of one holder: by the server, and by this process if it is one of its sessions."""
    pid = holder["pid"]
    if pid == 0:
        return "a prepared transaction, which belongs to no connection: see pg_prepared_xacts"
    told = f"backend {pid} ({holder['application'] or holder['role'] or 'of no name'})"
    if holder["state"] is None:
        told += ", of which the server tells this role no more"
    else:
        query = " ".join(holder["query"].split())
        shown = query if len(query) <= SHOWN else f"{query[:SHOWN]} …"
        told += ", waiting for a lock itself" if holder["waits"] else ""
        told += f", {holder['state']} for {holder['since'] + since:.1f} s"
        told += "" if holder["begun"] is None else f", in a transaction of {holder['begun'] + since:.1f} s"
        told += f"; its {'' if holder['state'] == 'active' else 'last '}statement: {shown!r}"
    ours = [f"\n  in this process: {_ours(life)}" for life in _lives(engine) if _pid_of(life) == pid]
    return told + "".join(ours)


def explain_busy(context: ExceptionContext) -> None:
    """Name the sessions of this process that hold the lock of a SQLite file, in a note on "database is locked"."""
    error, code = context.sqlalchemy_exception, getattr(context.original_exception, "sqlite_errorcode", 0)
    if error is None or context.engine is None or code & 0xFF != 5 or code == 517:  # BUSY; but not a stale snapshot
        return
    session = getattr(context.connection, "_dbscope", None)
    mine = None if session is None else life_of(session)
    holders = [life for life in _lives(context.engine) if life is not mine and life.holds_write_lock]
    if holders:
        lines = [f"- {_ours(life)}" for life in holders]
        error.add_note("\n".join(["SQLite's one write lock is held by:", *lines]))


def _ours(life: Lifecycle) -> str:
    """One of this process's sessions, as a holder."""
    own = ", which waits itself: that could never end" if life.user == worker() else ""
    return (
        f"{life.whose}, on a connection taken at {spell(life.taken)}, {ago(life.since)}, by {name_of(life.user)}{own}"
    )


def _lives(engine: Engine) -> Iterator[Lifecycle]:
    """The lives of this process's sessions that hold a connection to the same database, or another of its server."""
    for database in list(fork.databases):
        if _address(database._sync_engine) == _address(engine):
            for held in list(database.holders):
                life = held()
                if life is not None and life.connection is not None:
                    yield life


def _address(engine: Engine) -> tuple[Any, ...]:
    url, backend = engine.url, engine.dialect.name
    if backend == "sqlite":
        return backend, str(Path(url.database or "").absolute())
    return backend, url.host, url.port


def _pid_of(life: Lifecycle) -> int | None:
    taken = taken_by(life.connection)
    try:
        return None if taken is None else told_pid(taken.driver_connection)
    except Exception:  # it ends at this very moment, in another thread
        return None
