"""A pool that runs dry: the error lists who holds its connections (FAILURES 1, 20, 21)."""

from typing import Any

from dbscope import fork
from dbscope.events import Fact, PoolExhausted
from dbscope.guards.policy import Guard, Level
from dbscope.monitor.snapshot import holdings, lives_in
from dbscope.where import here, name_of, spell, worker

__all__ = ["PoolHolders"]

MOST = 20  # holders that are listed


class PoolHolders(Guard):
    """Adds a note to SQLAlchemy's time-out error: each holder's scope, task or thread, age, state, line, statement.

    The error stays SQLAlchemy's, whatever the level; `"off"` leaves the note out, `"log"` logs it besides.
    """

    name = "pool_exhausted"
    default: Level = "warn"
    kinds: tuple[type[Fact], ...] = (PoolExhausted,)

    def look(self, fact: PoolExhausted) -> None:
        """Name the holders."""
        pool: Any = fact.engine.pool
        database = next((known for known in fork.databases if known._sync_engine.pool is pool), None)
        self.explain(fact.error, lambda: holders_of(pool), database)


def holders_of(pool: Any) -> str:
    """The holders of a pool's connections, one to a line, the longest first."""
    found = holdings(pool)
    lines = [f"- {holding}" for holding in found[:MOST]]
    if len(found) > MOST:
        lines.append(f"- and {len(found) - MOST} more")
    others = pool.checkedout() - len(found) if hasattr(pool, "checkedout") else 0
    if others > 0:
        lines.append(f"- {others} taken from the engine itself, by no session of dbscope's")
    me = worker()
    mine = next((life.taken for life in lives_in(pool) if life.user == me), None)
    if mine is not None:
        lines.append(
            f"The one taken at {spell(mine)} was last used by {name_of(me)}, which asks for another at "
            f"{spell(here())}: it waits for itself. Use the session that is there, end its transaction first, or close "
            "what was forgotten."
        )
    if not lines:
        return "The pool's connections were given back in the meantime: it is too small for this load, not leaking."
    return "The pool's connections are held by:\n" + "\n".join(lines)
