"""What a fork changes: the child shares no connection with its parent, and needs no help to know it."""

import os
from typing import Any
from weakref import WeakSet

from dbscope import lifecycle
from dbscope.ids import disinherit_all
from dbscope.implicit import forget_implicit
from dbscope.scope import disinherit, open_scopes_of_this_context

# The databases to mind: weakly, for a fork must not keep alive what the application has dropped.
databases: "WeakSet[Any]" = WeakSet()

# Sessions of the parent's: collecting one would speak on its connection.
_kept: list[Any] = []


def keep_alive(sessions: list[Any]) -> None:
    """In the child of a fork: never let go of sessions of the parent's."""
    _kept.extend(sessions)


def _in_child() -> None:
    parent = os.getppid()
    lifecycle.generation += 1  # a session of the parent that the application kept is refused when it is used
    for home in open_scopes_of_this_context():
        disinherit(home, parent)
    forget_implicit(parent)
    disinherit_all(parent)
    for database in databases:
        database.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
