"""What is done about what a guard finds: nothing, a line in the log, a warning, an error. For all databases, or one."""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

from dbscope.errors import ConfigurationError, GuardError, GuardWarning
from dbscope.events import Fact, emit, observe
from dbscope.where import Place, line_of

__all__ = ["Found", "Guard", "Level", "level_of", "set_levels"]

Level = Literal["off", "log", "warn", "raise"]
log = logging.getLogger("dbscope.guards")
MOST = 1000  # warnings that are remembered


@dataclass(frozen=True, kw_only=True)
class Found(Fact):
    """A guard found something: told whatever its level is, unless that is `"off"`.

    Attributes:
        guard: its name.
        message: what it found, where, and what to do.
        database: the one that it is about, if it is about one.
        collected: whether the garbage collector has found it: it does so in the middle of anything, in a thread that
            may have any lock, and an observer that waits for one may wait for ever.
    """

    guard: str
    message: str
    database: Any = None
    collected: bool = False


class Guard:
    """Watches for one kind of mistake. A subclass has a name, the level that it begins with, and the facts it needs.

    While its level is `"off"` for every database, it observes nothing.
    """

    name: str
    default: Level
    kinds: tuple[type[Fact], ...] = ()
    warning: type[GuardWarning] = GuardWarning

    def __init__(self) -> None:
        self._shown: dict[Any, Any] = {}  # what `warnings` keeps, so that it shows the same once
        self._stop: Callable[[], None] | None = None

    def look(self, fact: Any) -> None:
        """Look at a fact."""

    def start(self) -> None:
        """Begin to watch. Called once, until `stop`."""
        if self.kinds:
            self._stop = observe(self.look, *self.kinds)

    def stop(self) -> None:
        """Watch no longer."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def found(self, message: str, *, database: Any = None, place: Place | None = None, collected: bool = False) -> None:
        """Do what the level says.

        Args:
            message: what was found, where, and what to do.
            database: the one that it is about: its level counts.
            place: the line that a warning is shown at.
            collected: whether the garbage collector has found it.

        Raises:
            GuardError: the level is `"raise"`.
        """
        level = level_of(self.name, database)
        if level == "off":
            return
        if Found.observers:
            emit(Found(guard=self.name, message=message, database=database, collected=collected))
        if level == "raise":
            raise GuardError(f'{message}\n(The guard {self.name!r} is set to "raise".)')
        if level == "log":
            log.warning("%s: %s", self.name, message)
            return
        file, line = line_of(place)
        if len(self._shown) > MOST:  # messages with an age in them differ each time
            self._shown.clear()
        try:
            warnings.warn_explicit(message, self.warning, file, line, registry=self._shown)
        except GuardWarning as warning:  # warnings are errors here
            raise GuardError(message) from warning

    def explain(self, error: BaseException, note: Callable[[], str], database: Any = None) -> None:
        """Add a note to an error that is raised whatever the level is; `"log"` says it in the log, too.

        Args:
            error: of whom.
            note: what to add, called if it is wanted.
            database: the one that it is about: its level counts.
        """
        level = level_of(self.name, database)
        if level == "off":
            return
        message = note()
        error.add_note(message)
        if level == "log":
            log.warning("%s: %s", self.name, message)
        if Found.observers:
            emit(Found(guard=self.name, message=message, database=database))


_guards: dict[str, Guard] = {}
_levels: dict[str, Level] = {}
_of_database: "WeakKeyDictionary[Any, dict[str, Level]]" = WeakKeyDictionary()
_watching: set[str] = set()


def register(guard: Guard) -> Guard:
    """Put a guard to work, at its default level."""
    _guards[guard.name] = guard
    _levels[guard.name] = guard.default
    _settle(guard)
    return guard


def level_of(name: str, database: Any = None) -> Level:
    """The level of a guard: the database's own, or that of all."""
    own = _of_database.get(database) if database is not None else None
    return (own or {}).get(name) or _levels[name]


def set_levels(levels: Mapping[str, Level], database: Any = None) -> None:
    """Set the levels of some guards, for one database or (None) for all that have none of their own.

    Raises:
        ConfigurationError: there is no such guard, or no such level; nothing is changed then.
    """
    for name, level in levels.items():
        if name not in _guards:
            raise ConfigurationError(f"there is no guard {name!r}. There are: {', '.join(sorted(_guards))}.")
        if level not in get_args(Level):
            raise ConfigurationError(f'the level of a guard is "off", "log", "warn" or "raise", not {level!r}.')
    if database is not None and not hasattr(database, "holders"):  # what a database and a watch have
        raise ConfigurationError(
            f"the levels of guards are set for a Database, an AsyncDatabase or what watch(engine) gave, not for a "
            f"{type(database).__name__}."
        )
    if database is None:
        _levels.update(levels)
    else:
        _of_database.setdefault(database, {}).update(levels)
    for name in levels:
        _settle(_guards[name])


def _settle(guard: Guard) -> None:
    """Let the guard watch where anybody wants it to."""
    alive = [database for known in _of_database.keyrefs() if (database := known()) is not None]  # others may add some
    wanted = _levels[guard.name] != "off" or any(
        _of_database.get(database, {}).get(guard.name, "off") != "off" for database in alive
    )
    if wanted and guard.name not in _watching:
        _watching.add(guard.name)
        guard.start()
    elif not wanted and guard.name in _watching:
        _watching.discard(guard.name)
        guard.stop()
