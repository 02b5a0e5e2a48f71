"""Which line of the user's code asks, and which thread or task: recorded cheaply, spelled out on request."""

import asyncio
import os
import sys
import threading
import time
from asyncio import events as _events
from contextvars import ContextVar
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType
from typing import Any, TypeAlias

from dbscope.errors import ConfigurationError

# A line, as cheap as it gets: turning the instruction into a line number is left to whoever wants to read it,
# and the frame itself is never kept, for it would keep its locals alive.
Place: TypeAlias = tuple[CodeType, int]
Worker: TypeAlias = int | asyncio.Task[Any]

running_loop = _events._get_running_loop  # the C function: get_running_loop() without the exception
thread_id = threading.get_ident

# Frames of these packages are on the way between the user's line and ours.
_BETWEEN = {"sqlalchemy", "sqlmodel", "dbscope", "contextlib", "asyncio", "concurrent", "threading", "runpy"}
_between: dict[str, bool] = {}

# A module inside one of them that sets this plays the user's part: an example that comes with the package, say.
_USERS_OWN = "__dbscope_user_code__"

# Whoever stands above this frame runs the loop, and knows nothing of what a task does.
_STEP = _events.Handle._run.__code__


def pass_over(*packages: str) -> None:
    """Take frames of these packages for machinery, too: an integration knows what stands between the user and it."""
    _BETWEEN.update(packages)
    _between.clear()  # some were judged before


def is_between(frame: FrameType) -> bool:
    """Whether this frame belongs to the machinery rather than to the user, remembered by file name."""
    name = frame.f_code.co_filename
    if name.startswith("<"):  # generated code: many modules share the name
        return _judge(frame)
    known = _between.get(name)
    if known is None:
        known = _between[name] = _judge(frame)
    return known


def _judge(frame: FrameType) -> bool:
    root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return root in _BETWEEN and _USERS_OWN not in frame.f_globals


def _nobody() -> None: ...


# Where no line of a user's led to something that has to have a place, as in a thread that was given SQLAlchemy's own
# method to run.
UNKNOWN: Place = (_nobody.__code__, -1)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The nearest frame of the user's at or above `frame`; in async code, across the greenlet's edge."""
    greenlet: Any = None
    while True:
        while frame is not None:
            # The dictionary first, and no call: between a user's line and a connection lie some fifteen frames.
            if _between.get(frame.f_code.co_filename) is not True and not is_between(frame):
                return frame
            frame = None if frame.f_code is _STEP else frame.f_back
        # Under AsyncSession the stack ends where its greenlet began; the user waits in the greenlet's parent.
        if greenlet is None:
            module = sys.modules.get("greenlet")
            if module is None:
                return None
            greenlet = module.getcurrent()
        greenlet = greenlet.parent
        if greenlet is None:
            return None
        frame = greenlet.gr_frame


def place_of(frame: FrameType | None) -> Place | None:
    """The user's line at or above `frame`."""
    if frame is not None:
        code = frame.f_code
        if _between.get(code.co_filename) is False:  # the user's own call, nearly always: no walk
            return code, frame.f_lasti
    found = user_frame(frame)
    return None if found is None else (found.f_code, found.f_lasti)


def here() -> Place | None:
    """The user's line that led to this call."""
    return place_of(sys._getframe(1))


def line_of(place: Place | None) -> tuple[str, int]:
    """The file and the line number of a place."""
    if place is None or place is UNKNOWN:
        return "<unknown>", 0
    code, instruction = place
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            line = number
    return code.co_filename, line


def spell(place: Place | None) -> str:
    """A place as `orders.py:88`, relative to the working directory where that is shorter."""
    if place is None or place is UNKNOWN:
        return "an unknown line"
    name, line = line_of(place)
    try:
        shorter = os.path.relpath(name, Path.cwd())
    except (OSError, ValueError):  # the folder is gone, or on another drive
        shorter = name
    return f"{name if shorter.startswith('..') else shorter}:{line}"


def worker() -> Worker:
    """Who runs now: the task on a running loop, elsewhere the thread (under gevent the greenlet)."""
    loop = running_loop()
    if loop is None:
        return thread_id()
    return asyncio.current_task(loop) or thread_id()


# Under gevent, which makes greenlets of threads by `monkey.patch_all()`: what is a thread here is a greenlet.
GREENLETS = not isinstance(thread_id, BuiltinFunctionType)


def is_over(who: Worker) -> bool:
    """Whether a task or thread has ended; under gevent nobody keeps a list of greenlets, and none is known to have."""
    if isinstance(who, int):
        return not GREENLETS and all(t.ident != who for t in threading.enumerate())
    return who.done()


def refuse_late_patch() -> None:
    """Raise where threads were made greenlets after this module was imported: some of them would be taken for one."""
    raise ConfigurationError(
        "threads were turned into greenlets after dbscope was imported: what is a thread of its own for gevent would "
        "be one with all others here, and a greenlet that waits in a pool would stop them all.\n"
        "Patch first: `from gevent import monkey; monkey.patch_all()` as the first lines of the program; for gunicorn "
        "with --preload and gevent workers, of gunicorn.conf.py."
    )


# For whom a task or thread of dbscope's own ends something: who waits for it meanwhile.
on_behalf: ContextVar[Worker | None] = ContextVar("dbscope.on_behalf", default=None)


def in_greenlet() -> bool:
    """Whether this code runs in a greenlet that is not the thread's own, as what SQLAlchemy awaits does."""
    module = sys.modules.get("greenlet")
    return module is not None and module.getcurrent().parent is not None


def task_now() -> asyncio.Task[Any] | None:
    """The running task, if a loop is running in this thread."""
    loop = running_loop()
    return None if loop is None else asyncio.current_task(loop)


def name_of(who: Worker | None) -> str:
    """A worker as a person would name it."""
    if who is None:
        return "another thread or task"
    if isinstance(who, int):
        for thread in threading.enumerate():
            if thread.ident == who:
                return f"thread {thread.name!r}"
        return f"thread {who}"
    return f"task {who.get_name()!r}"


def name_of_loop(loop: asyncio.AbstractEventLoop) -> str:
    """An event loop, so that it can be told from others."""
    state = "closed" if loop.is_closed() else "running" if loop.is_running() else "not running"
    return f"the {state} {type(loop).__name__} at {id(loop):#x}"


def ago(since: float) -> str:
    """The age of a `time.monotonic()` reading, for people."""
    return f"{time.monotonic() - since:.1f} s ago"
