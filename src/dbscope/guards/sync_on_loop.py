"""A sync session on a running event loop: while it waits, nothing else of the process goes on (FAILURES 42)."""

from sqlalchemy.engine import Engine

from dbscope import sqlite
from dbscope.events import Fact, PoolExhausted, SyncOnLoop
from dbscope.guards.policy import Guard, Level, level_of
from dbscope.implicit import in_ipython
from dbscope.where import Place, here, name_of, running_loop, spell, worker

__all__ = ["SyncOnSameLoop"]

_REMEDY = (
    "Use an AsyncDatabase here; or call the sync work by `await asyncio.to_thread(function, ...)`; or make the "
    "endpoint a `def`, which frameworks run in a thread."
)


class SyncOnSameLoop(Guard):
    """Told once for each line, unless the level is `"raise"`.

    A cell of a notebook has its loop for itself, and a SQLite database in memory has nothing to wait for.
    """

    name = "sync_on_loop"
    default: Level = "log"
    kinds: tuple[type[Fact], ...] = (SyncOnLoop, PoolExhausted)

    def __init__(self) -> None:
        super().__init__()
        self._told: set[Place | None] = set()

    def look(self, fact: SyncOnLoop | PoolExhausted) -> None:
        """Report it."""
        if in_ipython():
            return
        if isinstance(fact, PoolExhausted):
            if running_loop() is not None and not fact.engine.dialect.is_async:
                fact.error.add_note(f"It waited on the running event loop: no task could give one back.\n{_REMEDY}")
            return
        place = here()
        level = level_of(self.name, fact.database)
        if (level != "raise" and place in self._told) or _in_memory(fact.engine):
            return
        self._told.add(place)
        whose = "a session outside of every scope" if fact.scope is None else fact.scope.describe()
        self.found(
            f"{whose} took a connection of {fact.engine.url.render_as_string(hide_password=True)} at {spell(place)} in "
            f"{name_of(worker())}, on the running event loop: every other task stands still while the sync session "
            f"waits, for the pool, for a lock, for an answer.\n{_REMEDY}",
            database=fact.database,
            place=place,
        )


def _in_memory(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite" and sqlite.is_memory(engine.url)
