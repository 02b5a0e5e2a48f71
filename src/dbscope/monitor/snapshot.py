"""A snapshot of what this process holds. It is put together when somebody asks, from what the core records anyway."""

import os
import re
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from dbscope import fork
from dbscope.capacity import size_of
from dbscope.engines import told_pid
from dbscope.lifecycle import Lifecycle, State, taken_by
from dbscope.where import Place, name_of, spell

__all__ = ["Holding", "PoolState", "holdings", "of_life", "pools", "without_secrets"]

SHOWN = 500  # characters of a statement
_BESIDE = re.compile(r"( apart for '.*'(?: \(autocommit\))?| \(autocommit\))$")  # what follows a database's own name


@dataclass(frozen=True)
class Holding:
    """A connection that some work of this process holds.

    Attributes:
        database: its name.
        scope: the name of the work, or the line that opened its scope; None outside of every scope.
        opened: the line that opened the scope.
        worker: the task or thread that used the session last.
        state: `"active"` while a call of the session runs; `"idle in transaction"` otherwise; `"idle"` where none was
            begun, as in a reader with `autocommit`.
        taken: the line that took the connection, as `orders.py:88`.
        age: seconds since then.
        statement: the text of the last one, without its parameters; None before the first.
        backend: the number of the server's process, as the driver was told it.
        process: this one's.
    """

    database: str
    scope: str | None
    opened: str | None
    worker: str
    state: State
    taken: str
    age: float
    statement: str | None
    backend: int | None
    process: int

    def __str__(self) -> str:
        """The holding in a line or two, as errors list it."""
        whose = "a session outside of every scope" if self.scope is None else f"scope {self.scope!r}"
        opened = f" (opened at {self.opened})" if self.opened and self.scope is not None else ""
        said = f": {' '.join(self.statement.split())[:80]}" if self.statement else ""
        return f"{whose}{opened}, {self.worker}, {self.age:.1f} s, {self.state}, taken at {self.taken}{said}"


@dataclass(frozen=True)
class PoolState:
    """A pool of connections of this process.

    Attributes:
        database: the name of its database.
        dialect: as SQLAlchemy calls it, such as `"postgresql"`.
        host: of the server; None where the URL names none.
        port: the same.
        catalog: the name that the server has for the database, or SQLite's file.
        out: connections that are taken; None where the pool does not count them.
        most: connections that it gives out at most; None where it has no limit.
        unnamed: of those that are out, those that no session of dbscope's has taken.
        process: this one's number.
    """

    database: str
    dialect: str
    host: str | None
    port: int | None
    catalog: str | None
    out: int | None
    most: int | None
    unnamed: int
    process: int


def pools() -> list[PoolState]:
    """The pools of this process's databases, and how much of each is taken."""
    found: dict[int, PoolState] = {}
    for database in list(fork.databases):
        for number, pool in enumerate(database._pools()):
            if id(pool) not in found:
                found[id(pool)] = _pool_of(database, pool, " (autocommit)" if number else "")
    return sorted(found.values(), key=lambda pool: pool.database)


def _pool_of(database: Any, pool: Any, beside: str) -> PoolState:
    engine = database._sync_engine
    url, most = engine.url, size_of(pool) if hasattr(pool, "checkedout") else float("inf")
    out = pool.checkedout() if hasattr(pool, "checkedout") else None
    return PoolState(
        database=database.name + beside,
        dialect=engine.dialect.name,
        host=url.host or _one(url.query.get("host")),
        port=url.port,
        catalog=url.database,
        out=out,
        most=None if most == float("inf") else int(most),
        unnamed=0 if out is None else max(0, out - len(holdings(pool))),
        process=os.getpid(),
    )


def _one(value: Any) -> str | None:
    return value if isinstance(value, str) or value is None else str(value[0])


def without_secrets(name: str) -> str:
    """The name of a database, which is its URL where none was given: without what may be a password in it."""
    if "://" not in name:
        return name
    url, beside = (*_BESIDE.split(name, maxsplit=1), "")[:2]
    try:
        if " " not in url:
            return make_url(url).set(query={}).render_as_string(hide_password=True) + beside
    except (ArgumentError, ValueError):
        pass
    return f"{url.partition('://')[0]}://...{beside}"


def holdings(pool: Any = None) -> list[Holding]:
    """What the sessions of this process hold, the longest first.

    Args:
        pool: only what is of this pool.
    """
    now = time.monotonic()
    return sorted((of_life(name, life, now) for name, life in _lives(pool)), key=lambda holding: -holding.age)


def lives_in(pool: Any) -> list[Lifecycle]:
    """The lives of the sessions that hold a pool's connections."""
    return [life for _, life in _lives(pool)]


def _lives(pool: Any) -> list[tuple[str, Lifecycle]]:
    return [
        (database.name, life)
        for database in list(fork.databases)
        for life in [reference() for reference in list(database.holders)]
        if life is not None and (connection := life.connection) is not None
        if pool is None or connection.engine.pool is pool
    ]


def of_life(database: str, life: Lifecycle, now: float) -> Holding:
    """What one session holds."""
    home: Any = life.home
    place: Place | None = None if home is None else home.place
    return Holding(
        database=database,
        scope=None if home is None else home.name or spell(place),
        opened=None if place is None or home is None or not home.name else spell(place),
        worker=name_of(life.user),
        state=life.state,
        taken=spell(life.taken),
        age=max(0.0, now - life.since),
        statement=None if life.sent is None else life.sent[:SHOWN],
        backend=_backend(life),
        process=os.getpid(),
    )


def _backend(life: Lifecycle) -> int | None:
    """The server's process, where the driver knows it without asking."""
    try:
        taken = taken_by(life.connection)
        return None if taken is None else told_pid(taken.driver_connection)
    except Exception:  # it was given back, or lost, in between
        return None
