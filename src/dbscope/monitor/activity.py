"""What PostgreSQL says of its connections: `pg_stat_activity`, asked by one connection that begins no transaction."""

import re
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from dbscope.errors import ConfigurationError

__all__ = ["Backend", "Server", "without_literals"]

NAME = "dbscope top"
PATIENCE = 5  # seconds to connect, and for the answer


@dataclass(frozen=True)
class Backend:
    """One connection, as the server sees it: the columns of `pg_stat_activity`, some by a better name.

    Attributes:
        blocked_by: the numbers of the backends that it waits for.
        now: the server's clock.
    """

    pid: int
    datname: str | None
    usename: str | None
    application_name: str | None
    client: str | None
    state: str | None
    backend_start: datetime | None
    xact_start: datetime | None
    query_start: datetime | None
    state_change: datetime | None
    wait: str | None
    blocked_by: tuple[int, ...]
    query: str | None
    now: datetime


_QUERY = text(
    """
    SELECT pid, datname, usename, application_name,
        CASE WHEN client_addr IS NULL THEN 'local' ELSE host(client_addr) || ':' || client_port END AS client,
        state, backend_start, xact_start, query_start, state_change, wait_event_type || ' ' || wait_event AS wait,
        CASE WHEN wait_event_type = 'Lock' THEN pg_blocking_pids(pid) END AS blocked_by, query,
        clock_timestamp() AS now
    FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
    ORDER BY pid
    """
)


class Server:
    """A PostgreSQL that is asked again and again, on one connection, for one `with` block.

    Args:
        url: of the server; whichever driver it names, psycopg or psycopg2 is used.

    Raises:
        ConfigurationError: it is no URL of a PostgreSQL, or there is no driver.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            backend = parsed.get_backend_name()
        except (ArgumentError, ValueError):
            raise ConfigurationError(
                "this is not a database URL, such as postgresql://user@host/name."
            ) from None  # whose message may quote it, with its password
        if "@" in (parsed.host or ""):  # which an error of the driver's would quote
            raise ConfigurationError("the URL has more than one '@': in a password write it as '%40'.")
        if backend != "postgresql":
            raise ConfigurationError(f"{backend} has no pg_stat_activity; processes tell of it by themselves.")
        self.url = parsed
        self._engine = _engine(parsed)
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._drop()
        self._engine.dispose()

    def backends(self) -> list[Backend]:
        """The connections of its clients, but for this one.

        Raises:
            SQLAlchemyError: it is out of reach; the next call tries again.
        """
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
                self._connection.execute(text(f"SET statement_timeout = '{PATIENCE}s'"))
            rows = self._connection.execute(_QUERY).mappings().all()
        except SQLAlchemyError:
            self._drop()
            raise
        return [Backend(**{**row, "blocked_by": tuple(row["blocked_by"] or ())}) for row in rows]

    def _drop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()


def _engine(url: URL) -> Engine:
    connect_args: dict[str, Any] = {"connect_timeout": PATIENCE, "application_name": NAME}
    for driver in ("psycopg", "psycopg2"):
        try:
            return create_engine(
                url.set(drivername=f"postgresql+{driver}"),
                poolclass=NullPool,
                isolation_level="AUTOCOMMIT",
                connect_args=connect_args,
            )
        except (ModuleNotFoundError, NoSuchModuleError):
            continue
    raise ConfigurationError('to ask PostgreSQL, psycopg is needed: pip install "dbscope[postgresql]".')


# Strings (also E'...', and $tag$...$tag$), comments, which may hold anything, quoted names, and numbers.
_LITERALS = re.compile(
    r"""
    (?P<string> \b[eE]'(?:[^'\\]|''|\\.)*(?:'|$) | '(?:[^']|'')*(?:'|$) | (\$(?:[A-Za-z_]\w*)?\$).*?(?:\2|$) )
    | (?P<comment> --[^\n]* | /\*.*?(?:\*/|$) )
    | (?P<name> "(?:[^"]|"")*(?:"|$) | \$\d+ | [A-Za-z_][\w$]* )
    | (?P<number> \d[\w.]* | \.\d+ )
    """,
    re.VERBOSE | re.DOTALL,
)


def without_literals(query: str) -> str:
    """A statement with `?` for each literal: drivers that put parameters into the text send them as literals."""
    return _LITERALS.sub(lambda found: found[0] if found["name"] else " " if found["comment"] else "?", query)
