"""What a fork changes: the child shares no connection with its parent, and needs no help to know it."""

import os
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

from dbscope import lifecycle
from dbscope.ids import disinherit_all
from dbscope.implicit import forget_implicit
from dbscope.scope import _current, disinherit, open_scopes_of_this_context


class _Databases:
    """Weak references that can be gone through while other threads add to them: a `WeakSet` raises then."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def add(self, database: Any) -> None:
        """Mind it from now on."""
        self._known[id(database)] = database

    def discard(self, database: Any) -> None:
        """Mind it no more."""
        self._known.pop(id(database), None)

    def __iter__(self) -> Iterator[Any]:
        for reference in self._known.valuerefs():  # a list, which is made in one go
            if (database := reference()) is not None:
                yield database


# The databases to mind: weakly, for a fork must not keep alive what the application has dropped.
databases = _Databases()

# Sessions of the parent's: collecting one would speak on its connection.
_kept: list[Any] = []


def keep_alive(sessions: list[Any]) -> None:
    """In the child of a fork: never let go of sessions of the parent's."""
    _kept.extend(sessions)


def _leave(_: object) -> None:
    """In a process of multiprocessing's: its function is called in no block of the parent's, and never returns to one.

    The scope would be its for the whole of its life, and end with none of its tasks.
    """
    _current.set(None)


def _in_child() -> None:
    parent = os.getppid()
    lifecycle.generation += 1  # a session of the parent that the application kept is refused when it is used
    for home in open_scopes_of_this_context():
        disinherit(home, parent)
    forget_implicit(parent)
    disinherit_all(parent)
    for database in databases:
        database.after_fork()
    processes: Any = sys.modules.get("multiprocessing.util")
    if processes is not None:
        processes.register_after_fork(_leave, _leave)  # which comes next, if it was multiprocessing that forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
