"""What processes and PostgreSQL answer, joined by the number of the server's process: one row for each connection."""

import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy.engine import URL

from dbscope.monitor.activity import Backend, without_literals
from dbscope.monitor.client import Answer
from dbscope.monitor.snapshot import Holding, PoolState

__all__ = ["SORTS", "Picture", "Row", "arranged", "as_json", "picture"]

PORT = 5432
LOCAL = re.compile(r"^$|^/|^localhost$|^127\.|^::1$")  # a server here may have another address elsewhere
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")  # a terminal would obey them


@dataclass(frozen=True)
class Row:
    """A connection: what its process says, where it is of one that answers, and what its server says.

    Attributes:
        state: the process's own word, if it has one: `"active"` means that a call of the session runs.
        age: seconds since the work took the connection; of others, since their transaction, or state, began.
        process: the number of the process that holds it; None if none that answers does.
        backend: the number of the server's process.
        state_of_server: `pg_stat_activity.state`.
        client: address, user and application, as the server knows them.
    """

    state: str
    age: float
    database: str
    process: int | None = None
    program: str | None = None
    worker: str | None = None
    scope: str | None = None
    opened: str | None = None
    line: str | None = None
    statement: str | None = None
    backend: int | None = None
    state_of_server: str | None = None
    backend_start: datetime | None = None
    xact_start: datetime | None = None
    query_start: datetime | None = None
    state_change: datetime | None = None
    wait: str | None = None
    blocked_by: tuple[int, ...] = ()
    user: str | None = None
    application: str | None = None
    client: str | None = None

    @property
    def whose(self) -> str:
        """The work, or whatever is known instead."""
        if self.process is None:
            return f"({self.application or self.user or 'unknown'})"
        return self.scope or "(no scope)"

    @property
    def key(self) -> tuple[Any, ...]:
        """What stays the same of it from one look to the next."""
        return (self.process, self.database, self.backend, self.worker, self.line)


@dataclass(frozen=True)
class Picture:
    """Everything at one moment.

    Attributes:
        at: when, in seconds since 1970.
        rows: the connections that somebody holds, and those that a server tells of.
        pools: of all processes that answer.
        programs: the name of each process's program.
        server: the PostgreSQL that was asked; None if none was.
        problems: who did not answer, and why.
    """

    at: float
    rows: tuple[Row, ...]
    pools: tuple[PoolState, ...]
    programs: dict[int, str]
    server: str | None
    problems: tuple[str, ...]

    @property
    def processes(self) -> int:
        """How many have answered."""
        return len(self.programs)


def picture(
    answers: Sequence[Answer],
    backends: Iterable[Backend] = (),
    url: URL | None = None,
    *,
    problems: Iterable[str] = (),
    literals: bool = False,
) -> Picture:
    """Join what was answered.

    Args:
        answers: of the processes.
        backends: of the server.
        url: the server's.
        problems: other reasons why something is missing.
        literals: show the statements of others as the server has them, with values in them.
    """
    known = {backend.pid: backend for backend in backends}
    rows = []
    for answer in answers:
        servers = {pool.database: pool for pool in answer.pools}
        for holding in answer.holdings:
            pool = servers.get(holding.database)
            row = _row(answer, holding)
            backend = known.get(holding.backend or 0)
            if backend is not None and url is not None and pool is not None and _is_same(pool, backend, url):
                row = _joined(row, known.pop(backend.pid), literals)
            rows.append(row)
    rows += [_foreign(backend, literals) for backend in known.values()]
    silent = [f"process {answer.process}: {answer.problem}" for answer in answers if answer.problem]
    return Picture(
        at=time.time(),
        rows=tuple(_harmless(row) for row in rows),
        pools=tuple(replace(pool, database=_safe(pool.database)) for answer in answers for pool in answer.pools),
        programs={answer.process: _safe(answer.program) for answer in answers if answer.problem is None},
        server=None if url is None else f"{url.host or 'localhost'}:{url.port or PORT}/{url.database or ''}",
        problems=tuple(_safe(problem) for problem in (*silent, *problems)),
    )


def _row(answer: Answer, holding: Holding) -> Row:
    return Row(
        state=holding.state,
        age=holding.age,
        database=holding.database,
        process=answer.process,
        program=answer.program,
        worker=holding.worker,
        scope=holding.scope,
        opened=holding.opened,
        line=holding.taken,
        statement=holding.statement,
        backend=holding.backend,
    )


def _joined(row: Row, backend: Backend, literals: bool) -> Row:
    told = _told(backend, literals)
    if row.statement is not None and not literals:
        told.pop("statement")  # the process's own has no values in it, and its placeholders
    return replace(row, **told)


def _foreign(backend: Backend, literals: bool) -> Row:
    since = backend.xact_start or backend.state_change or backend.backend_start or backend.now
    return Row(
        state=backend.state or "unknown",
        age=max(0.0, (backend.now - since).total_seconds()),
        database=backend.datname or "",
        **_told(backend, literals),
    )


def _told(backend: Backend, literals: bool) -> dict[str, Any]:
    return {
        "backend": backend.pid,
        "state_of_server": backend.state,
        "backend_start": backend.backend_start,
        "xact_start": backend.xact_start,
        "query_start": backend.query_start,
        "state_change": backend.state_change,
        "wait": backend.wait if backend.state == "active" else None,
        "blocked_by": backend.blocked_by,
        "user": backend.usename,
        "application": backend.application_name,
        "client": backend.client,
        "statement": (backend.query if literals else without_literals(backend.query or "")) or None,
    }


def _is_same(pool: PoolState, backend: Backend, url: URL) -> bool:
    """Whether a pool's server is the one that was asked: numbers of processes are those of one server.

    Behind a pooler the driver is told a number of the pooler's: its port is another.
    """
    if pool.dialect != "postgresql" or (pool.port or PORT) != (url.port or PORT):
        return False
    if pool.catalog is not None and pool.catalog != backend.datname:
        return False
    ours, theirs = pool.host or "", url.host or ""
    return ours == theirs or bool(LOCAL.match(ours) or LOCAL.match(theirs)) or bool(_at(ours) & _at(theirs))


@lru_cache(maxsize=100)
def _at(host: str) -> frozenset[str]:
    """The addresses of a host."""
    try:
        return frozenset(str(found[4][0]) for found in socket.getaddrinfo(host, None))
    except OSError:
        return frozenset([host])


def _safe(text: str) -> str:
    """A text from elsewhere in one line, without what would move a terminal's cursor."""
    return CONTROL.sub(" ", text)


def _harmless(row: Row) -> Row:
    texts: dict[str, Any] = {name: _safe(value) for name, value in asdict(row).items() if isinstance(value, str)}
    return replace(row, **texts)


_URGENCY = {"idle in transaction (aborted)": 0, "idle in transaction": 0, "active": 1}

SORTS = {
    "held": lambda row: (row.process is None, -row.age),
    "state": lambda row: (row.process is None, _URGENCY.get(row.state, 2), -row.age),
    "process": lambda row: (row.process is None, row.process or 0, -row.age),
    "scope": lambda row: (row.process is None, row.whose, -row.age),
    "database": lambda row: (row.database, row.process is None, -row.age),
}


def arranged(rows: Iterable[Row], *, sort: str = "held", match: str = "", others: bool = True) -> list[Row]:
    """The rows that are asked for, in order.

    Args:
        rows: all there are.
        sort: one of `SORTS`.
        match: words that all have to be found in a row, wherever.
        others: whether connections of others are shown, too.
    """
    words = match.lower().split()
    found = [row for row in rows if (others or row.process is not None) and all(word in _words(row) for word in words)]
    return sorted(found, key=SORTS[sort])


def _words(row: Row) -> str:
    return " ".join(str(value) for value in asdict(row).values() if value not in (None, ())).lower()


def as_json(shown: Picture, rows: Sequence[Row]) -> dict[str, Any]:
    """The picture for programs: times in ISO 8601, ages in seconds."""
    return {
        "version": 1,
        "at": datetime.fromtimestamp(shown.at).astimezone().isoformat(timespec="milliseconds"),
        "server": shown.server,
        "processes": [{"process": number, "program": name} for number, name in sorted(shown.programs.items())],
        "pools": [asdict(pool) for pool in shown.pools],
        "connections": [
            {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(row).items()}
            for row in rows
        ],
        "problems": list(shown.problems),
    }
