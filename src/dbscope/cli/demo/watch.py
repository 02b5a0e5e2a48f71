"""Counts what goes on: open scopes, sessions, connections in use, commits and rollbacks."""

import gc
import threading
from collections import Counter
from typing import Any

from sqlalchemy import Engine, event

from dbscope import Scope, current_scope
from dbscope.cli.demo.doors import Doors
from dbscope.guards import Found

__all__ = ["Watch", "open_scopes"]


class Watch:
    """Counts, for the live table and for the audit."""

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.scopes_seen = 0
        self.commits = 0
        self.rollbacks = 0
        self.failures: Counter[str] = Counter()  # of the job handler and the workers, and warnings: by name
        self.findings: list[Found] = []
        self._open: list[Scope] = []
        self._lock = threading.Lock()
        for engine in doors.engines.values():
            event.listen(engine, "commit", self._committed)
            event.listen(engine, "rollback", self._rolled_back)

    def scope(self) -> None:
        """Note the current scope: work has begun in it."""
        work = current_scope()
        with self._lock:
            if work is not None:
                self.scopes_seen += 1
                self._open.append(work)

    def open(self) -> list[Scope]:
        """The noted scopes that are still open."""
        with self._lock:
            self._open = [work for work in self._open if not work.ended]
            return [*self._open]

    def sessions(self) -> int:
        """How many sessions they have."""
        databases = (self.doors.db, self.doors.adb, self.doors.narrow, self.doors.dry)
        return sum(work.has(database) for work in self.open() for database in databases)

    def connections(self) -> dict[str, int]:
        """How many connections each pool has given out."""
        return {name: checked_out(engine) for name, engine in self.doors.engines.items()}

    def warned(self, message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        """Stands for `warnings.showwarning`."""
        with self._lock:
            self.failures[category.__name__] += 1

    def found(self, fact: Found) -> None:
        """A guard has found something."""
        with self._lock:
            self.findings.append(fact)

    def failed(self, name: str) -> None:
        """Work that is no request has failed."""
        with self._lock:
            self.failures[name] += 1

    def _committed(self, connection: object) -> None:
        with self._lock:
            self.commits += 1

    def _rolled_back(self, connection: object) -> None:
        with self._lock:
            self.rollbacks += 1


def checked_out(engine: Engine) -> int:
    """How many connections a pool has given out."""
    pool: Any = engine.pool
    return int(pool.checkedout())


def open_scopes() -> list[Scope]:
    """Every scope of this process that was entered and is not over: found by the garbage collector, not by a list."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, Scope)]
    return [work for work in found if getattr(work, "since", None) is not None and not work.ended]
