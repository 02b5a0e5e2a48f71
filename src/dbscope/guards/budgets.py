"""Work that takes too long: idle in transaction, a long transaction, a long scope (statement 36; FAILURES 4, 26, 35).

One thread of this process looks now and then at what is open, and sleeps while nothing is: the core wakes it with the
next connection that a session takes.
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

from dbscope import fork, lifecycle, scope
from dbscope.errors import ConfigurationError, GuardError
from dbscope.events import Fact, ScopeTooLong
from dbscope.guards.policy import Guard, Level, level_of, log
from dbscope.lifecycle import Lifecycle
from dbscope.monitor.snapshot import of_life
from dbscope.where import ago

__all__ = ["IdleInTransaction", "LongScope", "LongTransaction", "set_budget"]

DEFAULT = 5.0  # seconds
LOOKS = 5  # in the time of a budget
_budget = DEFAULT


class _Budget(Guard):
    """Watched from outside: to `"raise"` is to refuse the transaction's next statement."""

    default: Level = "log"

    def start(self) -> None:
        """Have the thread look."""
        super().start()
        _watcher.wanted(self, True)

    def stop(self) -> None:
        """Have it look no more for this."""
        super().stop()
        _watcher.wanted(self, False)

    def over(self, life: Lifecycle, seen: "_Seen", now: float) -> str | None:
        """What is to be said, if the budget is spent."""
        return None


class IdleInTransaction(_Budget):
    """A transaction is open, holds its connection and its locks, and sends no statement."""

    name = "idle_in_transaction"

    def over(self, life: Lifecycle, seen: "_Seen", now: float) -> str | None:
        """What is to be said."""
        if now - seen.quiet < _budget or life.state != "idle in transaction":
            return None
        return (
            f"idle in transaction for {now - seen.quiet:.1f} s.\n"
            "End the transaction before slow work (a request to another service, a queue, a sleep), and begin another "
            "after it."
        )


class LongTransaction(_Budget):
    """A transaction is open for longer than the budget."""

    name = "long_transaction"

    def over(self, life: Lifecycle, seen: "_Seen", now: float) -> str | None:
        """What is to be said."""
        if now - life.since < _budget or life.state == "idle":
            return None
        return (
            f"in one transaction for {now - life.since:.1f} s: its locks are held, and its snapshot is as old.\n"
            "Commit in smaller parts; run migrations and back-fills apart (`db.apart(...)`)."
        )


class LongScope(_Budget):
    """A scope that used a database took longer than the budget: told when it ends."""

    name = "long_scope"
    kinds: tuple[type[Fact], ...] = (ScopeTooLong,)

    def start(self) -> None:
        """Let scopes tell."""
        super().start()
        scope.too_long[:] = [_budget]

    def stop(self) -> None:
        """Let them tell no more."""
        super().stop()
        scope.too_long.clear()

    def look(self, fact: ScopeTooLong) -> None:
        """Report it."""
        self.found(
            f"{fact.scope.describe()} took {fact.lasted:.1f} s; the budget is {_budget:g} s.\n"
            "Work that takes long on purpose runs apart from what people wait for (a task queue, `db.apart(...)`).",
            place=fact.scope.place,
        )


def _open() -> Iterator[tuple[Any, Lifecycle]]:
    """What holds a connection, and should not do so for long, with its database."""
    for database in list(fork.databases):
        if database.apart_for is not None:
            continue  # it is long on purpose
        for reference in list(database.holders):
            life = reference()
            if life is not None and life.connection is not None:
                yield database, life


@dataclass
class _Seen:
    """What the last looks at a session's transaction saw."""

    life: "ref[Lifecycle]"
    since: float
    statements: int
    quiet: float  # since when there was no new statement
    told: set[str]


class _Watcher:
    """The thread. It is started by the first connection that is taken, and does not keep the process alive."""

    def __init__(self) -> None:
        self._guards: list[_Budget] = []
        self._seen: dict[int, _Seen] = {}
        self._awake = threading.Event()
        self._thread: threading.Thread | None = None

    def wanted(self, guard: _Budget, wanted: bool) -> None:
        """Look, or look no more, on behalf of a guard."""
        self._guards = [each for each in self._guards if each is not guard] + [guard] * wanted
        if wanted:
            self._arm()
        self._awake.set()

    def _arm(self) -> None:
        """Have the core wake the thread with the next connection."""
        if self.wake not in lifecycle.sleepers:
            lifecycle.sleepers.append(self.wake)

    def wake(self) -> None:
        """A connection was taken."""
        self._awake.set()
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="dbscope-guards", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has none to give, or the interpreter ends: no matter of the user's work
                self._arm()
            else:
                self._thread = thread

    def _run(self) -> None:
        while self._guards:
            self._awake.clear()
            try:
                open_now = self.look(time.monotonic())
            except Exception:
                log.exception("looking for transactions that take too long failed")
                open_now = True
            if not open_now:
                self._arm()
                if any(True for _ in _open()):
                    continue  # one was taken before it was armed
                self._awake.wait()
            else:
                self._awake.wait(_budget / LOOKS)

    def look(self, now: float) -> bool:
        """Look at all open transactions once.

        Returns:
            whether there are any.
        """
        before, self._seen = self._seen, {}
        for database, life in _open():
            seen = before.get(id(life))
            if seen is None or seen.life() is not life or seen.since != life.since:
                seen = _Seen(ref(life), life.since, life.statements, now, set())
            elif seen.statements != life.statements or life.state == "active":
                seen.statements, seen.quiet = life.statements, now
            self._seen[id(life)] = seen
            self._judge(database, life, seen, now)
        return bool(self._seen)

    def _judge(self, database: Any, life: Lifecycle, seen: _Seen, now: float) -> None:
        for guard in self._guards:
            if guard.name in seen.told or level_of(guard.name, database) == "off":
                continue
            spent = guard.over(life, seen, now)
            if spent is None:
                continue
            seen.told.add(guard.name)
            held = of_life(database.name, life, now)
            whose = life.whose if held.scope is not None else "a session outside of every scope"
            said = f" Its last statement: {' '.join(held.statement.split())[:120]}" if held.statement else ""
            message = (
                f"{whose}, last used by {held.worker}, holds a connection of {database.name}, taken at {held.taken} "
                f"{ago(life.since)}: {spent}{said}"
            )
            try:
                guard.found(message, database=database, place=life.taken)
            except GuardError as error:
                life.undone = error.with_traceback(None)  # the transaction's next statement raises it
                if life.connection is None or life.since != seen.since:
                    life.undone = None  # it has ended meanwhile, and the next one is innocent

    def after_fork(self) -> None:
        """In the child: the thread is the parent's."""
        self._thread, self._seen, self._awake = None, {}, threading.Event()
        if self._guards:
            self._arm()


_watcher = _Watcher()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watcher.after_fork)


def set_budget(seconds: Any) -> None:
    """How long a transaction may be idle, or open, and a scope may last.

    Raises:
        ConfigurationError: it is no positive number of seconds.
    """
    global _budget
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ConfigurationError(f"budget is a positive number of seconds, not {seconds!r}.")
    _budget = float(seconds)
    if scope.too_long:
        scope.too_long[:] = [_budget]
    _watcher._awake.set()
