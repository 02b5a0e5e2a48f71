"""What may go wrong with a database at night, and can be seen by day: one check a function, each with its remedy.

A check is given what is known (`Checked`) and a connection in AUTOCOMMIT, changes nothing, and yields findings.
"""

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.engine import Connection

from dbscope.capacity import Capacity, limit_of
from dbscope.engines import told_pid

__all__ = ["CHECKS", "UNPREPARED", "Checked", "Finding", "examine", "lost_slots"]

Level = Literal["problem", "advice", "ok"]


@dataclass(frozen=True)
class Finding:
    """What a check has to say.

    Attributes:
        check: its name.
        level: `"problem"` for what will fail, hang or lose something; `"advice"`; or `"ok"`.
        message: what was found, and what comes of it.
        remedy: a line or two to paste; empty where nothing is to be done.
    """

    check: str
    level: Level
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Checked:
    """What is checked.

    Attributes:
        engine: the (sync) engine.
        is_async: whether an async one is around it.
        each: how many connections the pool of one process gives out at most.
        processes: how many there are, on all hosts together.
        configured: whether it is an application's own engine, and not one that was made from a URL.
        shares: opens a second connection while the first one is open, and gives the number of the server's process
            behind it; None if it got none in time.
    """

    engine: Any
    is_async: bool
    each: float
    processes: int
    configured: bool
    shares: Callable[[], int | None]

    @property
    def driver(self) -> str:
        """Its name, such as `psycopg`."""
        return str(self.engine.dialect.driver).removesuffix("_async")


Check = Callable[[Checked, Connection], Iterator[Finding]]


def examine(checked: Checked, connection: Connection) -> list[Finding]:
    """Everything that there is to say, the worst first."""
    order = ("problem", "advice", "ok")
    found = [finding for check in CHECKS for finding in check(checked, connection)]
    return sorted(found, key=lambda finding: order.index(finding.level))


# -- versions ----------------------------------------------------------------------------------------------------


def version_of(package: str) -> tuple[int, ...]:
    """An installed package's version, as far as it is numbers."""
    return numbers(importlib.metadata.version(package))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 1, 0) of 2.1.0rc1."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def lost_slots(version: str) -> str | None:
    """The first good version, if this one of SQLAlchemy loses connections of async pools where tasks are cancelled."""
    found = numbers(version)
    if found < (2, 0, 56):
        return "2.0.56"
    if (2, 1) <= found < (2, 1, 7):
        return "2.1.7"
    return None


def sqlalchemy_version(checked: Checked, connection: Connection) -> Iterator[Finding]:
    """Cancelled tasks take connections with them."""
    version = importlib.metadata.version("SQLAlchemy")
    wanted = lost_slots(version)
    if wanted is None:
        yield Finding("sqlalchemy", "ok", f"SQLAlchemy {version}")
        return
    yield Finding(
        "sqlalchemy",
        "problem" if checked.is_async else "advice",
        f"SQLAlchemy {version}: an async pool loses a connection for good when a task is cancelled at a bad moment",
        f'pip install "SQLAlchemy>={wanted}"',
    )


_TESTED = {
    "psycopg": ((3, 2), "postgresql"),
    "asyncpg": ((0, 30), "asyncpg"),
    "aiosqlite": ((0, 20), "aiosqlite"),
    "pymysql": ((), ""),
    "pysqlite": ((), ""),
}


def driver(checked: Checked, connection: Connection) -> Iterator[Finding]:
    """Drivers that dbscope does not know well, or that are too old."""
    name = checked.driver
    if name not in _TESTED:
        instead = {
            "postgresql": 'pip install "dbscope[postgresql]", and a URL with postgresql+psycopg://',
            "sqlite": 'pip install "dbscope[aiosqlite]", and a URL with sqlite+aiosqlite://',
        }.get(checked.engine.dialect.name, "")
        yield Finding(
            "driver",
            "advice",
            f"{name}: dbscope is not tested with it, and cannot ask it for all that it tells of others",
            instead,
        )
        return
    oldest, extra = _TESTED[name]
    if not oldest:
        yield Finding("driver", "ok", name)
    elif version_of(name) < oldest:
        yield Finding(
            "driver",
            "advice",
            f"{name} {importlib.metadata.version(name)} is older than dbscope is tested with",
            f'pip install --upgrade "dbscope[{extra}]"',
        )
    else:
        yield Finding("driver", "ok", f"{name} {importlib.metadata.version(name)}")


# -- the pool and the server's limit -----------------------------------------------------------------------------


def capacity(checked: Checked, connection: Connection) -> Iterator[Finding]:
    """All processes' pools against what the server gives."""
    if connection.dialect.name == "sqlite":
        return
    found = Capacity(checked.processes, checked.each, *limit_of(connection))
    if found.fits:
        yield Finding("capacity", "ok", str(found))
        return
    largest = max((found.limit or 0) // found.processes, 1)
    yield Finding(
        "capacity",
        "problem",
        f"{found}: under load the last one to ask is refused, 'too many clients already'",
        f"pool_size={largest}, max_overflow=0        # or fewer processes, or a pooler such as PgBouncer",
    )


def pre_ping(checked: Checked, connection: Connection) -> Iterator[Finding]:
    """A connection that died in the pool fails the next work that takes it."""
    if not checked.configured or connection.dialect.name == "sqlite":
        return
    if getattr(checked.engine.pool, "_pre_ping", False):
        yield Finding("pool_pre_ping", "ok", "connections are tried before they are given out")
    else:
        yield Finding(
            "pool_pre_ping",
            "advice",
            "connections are not tried before they are given out: after a restart of the server, as many pieces of "
            "work fail as the pool has connections",
            "create_engine(url, pool_pre_ping=True)        # Database(url) has it",
        )


# -- PostgreSQL --------------------------------------------------------------------------------------------------

_SETTINGS = {
    "statement_timeout": ("advice", "60s", "a statement may take for ever, and holds its connection meanwhile"),
    "lock_timeout": ("advice", "10s", "a statement waits for a lock for ever, and others queue up behind it"),
    "idle_in_transaction_session_timeout": (
        "problem",
        "60s",
        "a transaction that somebody forgot, or that waits for another service, keeps its connection and its locks "
        "for ever",
    ),
    "transaction_timeout": ("advice", "15min", "a transaction may be open for ever, and vacuum cleans nothing behind"),
    "client_connection_check_interval": (
        "advice",
        "10s",
        "a statement whose client is gone, or was cancelled, goes on to its end, with its locks",
    ),
}


def server_settings(checked: Checked, connection: Connection) -> Iterator[Finding]:
    """The time-outs that a connection has from the start, and whether a client that is gone is noticed."""
    if connection.dialect.name != "postgresql":
        return
    names = ", ".join(f"'{name}'" for name in _SETTINGS)
    rows = connection.execute(text(f"SELECT name, setting::bigint AS setting FROM pg_settings WHERE name IN ({names})"))
    values: dict[str, int] = {row.name: row.setting for row in rows}
    where: Any = connection.execute(
        text("SELECT quote_ident(session_user) AS role, quote_ident(current_database()) AS database")
    ).one()
    alter = f"ALTER ROLE {where.role} IN DATABASE {where.database} SET"
    for name, (level, advised, consequence) in _SETTINGS.items():
        if name not in values:  # of a newer server
            continue
        if values[name] == 0:
            yield Finding(name, level, f"{name} is off: {consequence}", f"{alter} {name} = '{advised}';")  # type: ignore[arg-type]
        else:
            yield Finding(name, "ok", f"{name} is {spelled(values[name])}")
    lock, statement = values.get("lock_timeout", 0), values.get("statement_timeout", 0)
    if 0 < statement <= lock:
        yield Finding(
            "lock_timeout",
            "advice",
            f"lock_timeout ({spelled(lock)}) is not shorter than statement_timeout ({spelled(statement)}), and never "
            "strikes: a lock that is not had in time looks like a slow statement",
            f"{alter} lock_timeout = '{max(statement // 4, 1)}ms';",
        )


def spelled(milliseconds: int) -> str:
    """A time for people."""
    return f"{milliseconds / 1000:g} s" if milliseconds >= 1000 else f"{milliseconds} ms"


def pooler(checked: Checked, connection: Connection) -> Iterator[Finding]:
    """A pooler between, its mode, and whether the driver leaves prepared statements on it (FAILURES 34)."""
    if connection.dialect.name != "postgresql":
        return
    raw = connection.connection.driver_connection
    told = told_pid(raw)
    backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    if told is None:
        yield Finding("pooler", "advice", f"{checked.driver} does not tell whether there is a pooler between")
        return
    if told == backend:
        yield Finding("pooler", "ok", "no pooler between")
        return
    if checked.shares() != backend:
        yield Finding("pooler", "ok", "a pooler is between; no sign of transaction mode")
        return
    if not prepares(raw, connection.connection):
        yield Finding("pooler", "ok", f"a pooler in transaction mode, and {checked.driver} prepares no statements")
        return
    yield Finding(
        "pooler",
        "problem",
        f"a pooler in transaction mode, and {checked.driver} prepares statements, which stay on a server connection "
        "that others are given next: 'prepared statement already exists' (or does not), now and then. PgBouncer 1.21 "
        "and newer keeps track of them where max_prepared_statements is more than 0",
        UNPREPARED.get(checked.driver, ""),
    )


UNPREPARED = {
    "psycopg": 'connect_args={"prepare_threshold": None}',
    "asyncpg": 'connect_args={"statement_cache_size": 0, "prepared_statement_cache_size": 0,\n'
    '    "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__"}',
}


def prepares(raw: Any, adapted: Any) -> bool:
    """Whether a driver's connection leaves prepared statements behind."""
    if hasattr(raw, "prepare_threshold"):  # psycopg
        return raw.prepare_threshold is not None
    if hasattr(adapted.dbapi_connection, "_prepared_statement_cache"):  # asyncpg, by way of SQLAlchemy
        config = getattr(raw, "_config", None)
        cached = adapted.dbapi_connection._prepared_statement_cache is not None
        return cached or getattr(config, "statement_cache_size", 0) != 0
    return False


# -- SQLite ------------------------------------------------------------------------------------------------------


def sqlite_settings(checked: Checked, connection: Connection) -> Iterator[Finding]:
    """Write-ahead logging, foreign keys, and how long a lock is waited for."""
    if connection.dialect.name != "sqlite":
        return
    mode, keys, busy = (
        connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
        for name in ("journal_mode", "foreign_keys", "busy_timeout")
    )
    if mode == "memory":
        yield Finding("journal_mode", "ok", "a database in memory, which goes with its process")
    elif mode == "wal":
        yield Finding("journal_mode", "ok", "journal_mode is wal")
    else:
        yield Finding(
            "journal_mode",
            "problem",
            f"journal_mode is {mode}: who writes waits for all who read, and who reads for who writes: 'database is "
            "locked'",
            "PRAGMA journal_mode = WAL;        -- once: the file keeps it. Database(url) does it",
        )
    if keys:
        yield Finding("foreign_keys", "ok", "foreign keys are enforced")
    else:
        yield Finding(
            "foreign_keys",
            "problem" if checked.configured else "advice",
            "foreign keys are not enforced on the connections of a plain engine: rows may point to nothing",
            "PRAGMA foreign_keys = ON;        -- on each new connection. Database(url) does it",
        )
    if busy >= _PATIENCE:
        yield Finding("busy_timeout", "ok", f"a lock is waited for for {spelled(busy)}")
    else:
        yield Finding(
            "busy_timeout",
            "problem",
            f"a lock is waited for for {spelled(busy)} only: two writers at once, and one fails, 'database is locked'",
            'connect_args={"timeout": 5}        # seconds; or sqlite:///file.db?timeout=5',
        )


_PATIENCE = 1000  # milliseconds

CHECKS: tuple[Check, ...] = (pooler, server_settings, capacity, pre_ping, sqlite_settings, sqlalchemy_version, driver)
