"""The implicit scope of a thread: where `db.session` belongs outside of every scope, as long as the thread lives."""

import atexit
import os
import sys
import threading
import time
from _thread import start_new_thread
from typing import Any

from dbscope.ending import end
from dbscope.errors import NoScopeError
from dbscope.scope import Colour, Scope, State, current_scope, disinherit
from dbscope.where import GREENLETS, here, name_of, running_loop, spell, worker

__all__ = ["forget_implicit", "home_of", "implicit_scope", "open_implicit"]


class ThreadScope(Scope):
    """A scope that nobody opened and that is current for nobody: a thread finds it when there is no other."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(f"thread {threading.current_thread().name}")
        self._colour = Colour.IMPLICIT
        self._outer = None
        self.since = time.monotonic()
        self._state = State.OPEN

    def end(self) -> None:
        """Release what it holds, with its thread; does nothing when it has ended."""
        if self._state is State.OPEN:
            end(self._conclude(None), None, self.describe)


class _Tenure:
    """Held by a thread's local storage alone, so that the implicit scope ends with its thread."""

    def __init__(self, home: ThreadScope) -> None:
        self.home = home
        self.pid = os.getpid()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        if self.pid != os.getpid():
            _inherited.append(self.home)  # in a fork's child: closing would speak on the parent's connection
        elif GREENLETS:
            # This is gevent's hub, which must not wait: not even for the answer to a rollback.
            start_new_thread(self.home.end, ())
        else:
            self.home.end()


class _Thread(threading.local):
    home: ThreadScope | None = None
    tenure: _Tenure | None = None


_thread = _Thread()
_inherited: list[Any] = []


def implicit_scope() -> Scope | None:
    """This thread's implicit scope, if it has one."""
    home = _thread.home
    return None if home is None or home.ended else home


def home_of(source: Any) -> Scope | None:
    """The scope whose session for `source` a block uses; None if it opens one for itself."""
    home = current_scope()
    if home is None:  # what inherited a dead scope and opens a block does the right thing
        thread = implicit_scope() if running_loop() is None else None
        home = thread if thread is not None and thread.has(source) else None
    return home


def open_implicit(source: Any) -> Scope:
    """This thread's implicit scope (this greenlet's under gevent), opened if there is none yet.

    Raises:
        NoScopeError: in a running task: whatever runs next on this thread would share the session.
    """
    if running_loop() is not None and not in_ipython():
        raise NoScopeError(
            f"a session of {source.name} was asked for by {name_of(worker())} at {spell(here())}, outside of every "
            "scope: all tasks of this thread would share it.\nOpen one around the work: `async with scope(): ...`, for "
            "each message of a websocket, too; dbscope.integrations.asgi.ScopeMiddleware does for each HTTP request."
        )
    home = _thread.home
    if home is None or home.ended:
        home = _thread.home = ThreadScope()
        _thread.tenure = _Tenure(home)
        if threading.current_thread() is threading.main_thread():
            atexit.register(home.end)  # its storage is only cleared when it is too late to warn
            processes: Any = sys.modules.get("multiprocessing.util")
            if processes is not None:
                processes.Finalize(None, home.end, exitpriority=0)  # its children end without `atexit`
    return home


def in_ipython() -> bool:
    """Whether the running task is a cell of IPython's: its loop runs one at a time, as a thread does."""
    module = sys.modules.get("IPython")
    return module is not None and module.get_ipython() is not None


def forget_implicit(parent: int) -> None:
    """In the child of a fork: the implicit scope of the thread that forked is the parent's."""
    if _thread.home is not None:
        disinherit(_thread.home, parent)
        if _thread.tenure is not None:
            _inherited.append(_thread.tenure)
        _thread.home = _thread.tenure = None
