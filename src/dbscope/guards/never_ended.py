"""Sessions that nobody closed, and scopes that nobody ended: found by the garbage collector, or by the process's end.

Nobody is there to raise to: what is found by the garbage collector goes, at the level `"raise"`, to
`sys.unraisablehook`, as Python has it for such errors; at the process's end it is printed.
"""

import asyncio
import atexit

from dbscope import fork, ids
from dbscope.events import Fact, ScopesPileUp, SessionDropped
from dbscope.guards.policy import Guard, Level
from dbscope.scope import Colour, Scope, open_scopes_of_this_context
from dbscope.where import Place, Worker, ago, is_over, spell

__all__ = ["ScopeNeverEnded", "SessionWasDropped"]

CROWD = 1000  # scopes by id that are open at once


class SessionWasDropped(Guard):
    """A session outside of every scope was dropped with a transaction open, without `close()`."""

    name = "session_dropped"
    default: Level = "log"
    kinds: tuple[type[Fact], ...] = (SessionDropped,)

    def look(self, fact: SessionDropped) -> None:
        """Report it."""
        if fact.opened is not None or fact.name is not None:
            return  # of a scope, which is what has to be ended
        self.found(
            f"a session was dropped with a transaction open: the connection of {fact.database.name} that it took at "
            f"{spell(fact.taken)} was held until the garbage collector found it; what was not committed is lost.\n"
            "Close it: `with Session() as session:`; or open a scope around the work, which closes its sessions.",
            database=fact.database,
            place=fact.taken,
            collected=True,
        )


class ScopeNeverEnded(Guard):
    """A scope was entered and never left: its id was forgotten, or `__exit__` was never called."""

    name = "scope_never_ended"
    default: Level = "log"
    kinds: tuple[type[Fact], ...] = (SessionDropped, ScopesPileUp)

    def start(self) -> None:
        """Have the scopes by id counted, and look once more when the process ends."""
        super().start()
        ids.many[:] = [CROWD]
        atexit.register(self.at_exit)

    def stop(self) -> None:
        """Undo that."""
        super().stop()
        ids.many.clear()
        atexit.unregister(self.at_exit)

    def look(self, fact: SessionDropped | ScopesPileUp) -> None:
        """Report it."""
        if isinstance(fact, ScopesPileUp):
            oldest = fact.scopes[0]
            self._found(
                f"{len(fact.scopes)} scopes by id are open at once; the oldest, {oldest.describe()}, was opened "
                f"{ago(oldest.since)}, and is among those that may never be ended",
                oldest.place,
            )
        elif fact.opened is not None or fact.name is not None:
            name = f" {fact.name!r}" if fact.name else ""
            self._found(
                f"scope{name} (opened at {spell(fact.opened)}) was dropped and never ended: the connection of "
                f"{fact.database.name} that its session took at {spell(fact.taken)} was held until the garbage "
                "collector found it; what was not committed is lost",
                fact.opened,
                fact.database,
                collected=True,
            )

    def at_exit(self) -> None:
        """The process ends: whoever was to end a scope has had the time."""
        left = {id(home): home for home in [*ids.open_by_id(), *open_scopes_of_this_context(), *_abandoned()]}
        for home in left.values():
            self._found(
                f"{home.describe()}, opened {ago(home.since)}, was still open when the process ended", home.place
            )

    def _found(self, what: str, place: Place | None, database: object = None, *, collected: bool = False) -> None:
        self.found(
            f"{what}.\nEnd each scope: `with scope(): ...` does, whatever happens in it; `end_scope(id)` belongs into "
            "`finally`.",
            database=database,
            place=place,
            collected=collected,
        )


def _abandoned() -> list[Scope]:
    """The scopes whose sessions hold connections, and whose threads or tasks are gone."""
    lives = [
        life
        for database in list(fork.databases)
        for reference in list(database.holders)
        if (life := reference()) is not None and life.user is not None and _is_gone(life.user)
    ]
    homes = [life.home for life in lives if isinstance(life.home, Scope) and not life.home.ended]
    return [home for home in homes if home._colour is not Colour.IMPLICIT]


def _is_gone(user: Worker) -> bool:
    return is_over(user) or (isinstance(user, asyncio.Task) and user.get_loop().is_closed())
