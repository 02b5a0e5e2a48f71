"""What metrics and logs have in common: how a fact's work and database are called."""

import contextlib
from _thread import start_new_thread
from collections.abc import Callable
from typing import Any

from dbscope import fork
from dbscope.scope import Colour, Scope
from dbscope.where import spell

__all__ = ["database_of", "elsewhere", "is_work", "named"]


def is_work(scope: Scope) -> bool:
    """Whether a scope is of a piece of work, and not a thread's, which lasts as long as the thread."""
    return scope._colour is not Colour.IMPLICIT


def named(scope: Scope | None) -> str | None:
    """A scope's name, or the line that opened it."""
    return None if scope is None else scope.name or spell(scope.place)


def database_of(engine: Any) -> Any:
    """The database whose pool an engine takes its connections from, if there is one."""
    return next((known for known in list(fork.databases) if engine.pool in known._pools()), None)


def elsewhere(call: Callable[[], object]) -> None:
    """Call a function in a thread that has no lock; not by `threading`, whose own one this thread may have."""
    with contextlib.suppress(RuntimeError):  # there is none to be had, or the interpreter ends
        start_new_thread(call, ())
