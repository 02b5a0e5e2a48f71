"""Whether all processes together may ask for more connections than the server gives: arithmetic, before the night does.

Each process has a pool of its own, and each host its own processes. What does not add up is found under load, by
whichever process asks last: `FATAL: sorry, too many clients already`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.pool import Pool

from dbscope.engines import told_pid
from dbscope.errors import ConfigurationError

__all__ = ["Capacity", "capacity_of", "limit_of", "refuse_more", "refuse_processes", "size_of"]


@dataclass(frozen=True)
class Capacity:
    """What the processes of an application may ask for, and what their server gives.

    Attributes:
        processes: how many, on all hosts together.
        each: connections that the pools of one process give out at most; infinite if one has no limit.
        limit: connections that the server gives to this user on this database at most; None where it sets no limit
            (SQLite), or where a pooler is between, whose own limits count.
        where_from: which of the server's settings that is.
    """

    processes: int
    each: float
    limit: int | None
    where_from: str

    @property
    def wanted(self) -> float:
        """What all processes together may ask for."""
        return self.processes * self.each

    @property
    def fits(self) -> bool:
        """Whether the server gives all of that."""
        return self.limit is None or self.wanted <= self.limit

    def __str__(self) -> str:
        made = f"{self.processes} process{'es' if self.processes != 1 else ''} x {self.each:g} = {self.wanted:g}"
        of = "no limit" if self.limit is None else str(self.limit)
        return f"{made} of {of} connections ({self.where_from})"


def capacity_of(pools: Sequence[Pool], processes: int, connection: Connection) -> Capacity:
    """Ask a connection's server."""
    limit, where_from = limit_of(connection)
    return Capacity(processes, sum(map(size_of, pools)), limit, where_from)


def refuse_more(found: Capacity, name: str) -> Capacity:
    """Give the capacity back, unless the server has less than may be asked of it.

    Raises:
        ConfigurationError: it has.
    """
    if found.fits:
        return found
    largest = (found.limit or 0) // found.processes
    advice = (
        f"Give each at most {largest} (`pool_size={largest}, max_overflow=0`)"
        if largest
        else "Have fewer processes than connections"
    )
    if found.each == float("inf"):
        advice = f"Give each a limit: `pool_size={max(largest, 1)}, max_overflow=0`"
    raise ConfigurationError(
        f"the pools of {name} may ask for more connections than its server gives: {found}.\n"
        f"{advice}, put a pooler such as PgBouncer in between, or raise the server's limit."
    )


def refuse_processes(processes: Any) -> None:
    """Raise if this is no number of processes."""
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ConfigurationError(
            f"processes is how many there are on all hosts together, 1 or more, not {processes!r}."
        )


def size_of(pool: Pool) -> float:
    """How many connections a pool gives out at most."""
    overflow = getattr(pool, "_max_overflow", -1)  # only QueuePool has a limit, and no public name for it
    return float("inf") if overflow < 0 else pool.size() + overflow  # type: ignore[attr-defined]  # QueuePool's


def limit_of(connection: Connection) -> tuple[int | None, str]:
    """How many connections the server gives to this user on this database at most, and which setting says so."""
    asks = _ASKS.get(connection.dialect.name)
    return (None, "no server") if asks is None else asks(connection)


def _postgresql(connection: Connection) -> tuple[int | None, str]:
    row = connection.execute(_POSTGRESQL).one()
    if (told := told_pid(connection.connection.driver_connection)) is not None and told != row.pid:
        return None, "a pooler is between: its limits count"
    reserved = 0 if row.superuser else row.reserved
    limits = [(row.allowed - reserved, f"max_connections {row.allowed}{f', {reserved} reserved' if reserved else ''}")]
    for limit, whose in (
        (row.of_role, "the user's CONNECTION LIMIT"),
        (row.of_database, "the database's CONNECTION LIMIT"),
    ):
        if limit >= 0:
            limits.append((limit, whose))
    return min(limits, key=lambda found: found[0])


_POSTGRESQL = text(
    """
    SELECT pg_backend_pid() AS pid, current_setting('max_connections')::int AS allowed,
        current_setting('superuser_reserved_connections')::int
            + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
        role.rolsuper AS superuser, role.rolconnlimit AS of_role, database.datconnlimit AS of_database
    FROM pg_roles AS role, pg_database AS database
    WHERE role.rolname = current_user AND database.datname = current_database()
    """
)


def _mysql(connection: Connection) -> tuple[int | None, str]:
    allowed, of_user = connection.execute(text("SELECT @@max_connections, @@max_user_connections")).one()
    if 0 < of_user < allowed:
        return int(of_user), "max_user_connections"
    return int(allowed), f"max_connections {allowed}"


_ASKS = {"postgresql": _postgresql, "mysql": _mysql, "mariadb": _mysql}
