"""Interrupting a piece of work at every point where it can be, one run for each point; the points are found on the way.

    async for strike in every_await(task_of(...)): ...

`Awaits` strikes where a task of the loop is suspended: that is where a cancel can arrive. `Calls` strikes where the
driver is called, and where it returns: that is where a signal's handler can raise.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Generator
from types import FrameType
from typing import Any, Self


class Awaits:
    """Counts the suspensions of all tasks of a loop, and strikes at one of them.

    Args:
        at: which suspension, from 1.
        strike: what is done there.
    """

    def __init__(self, at: int, strike: Callable[[], object]) -> None:
        self.at = at
        self.strike = strike
        self.seen = 0

    @property
    def has_struck(self) -> bool:
        """Whether the work came as far as that."""
        return self.seen >= self.at

    async def over(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and strike in it, or in a task that it makes."""
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
            options.setdefault("name", repr(coroutine))
            return asyncio.Task(self._counted(coroutine), loop=loop, **options)

        loop.set_task_factory(factory)
        try:
            await _Steps(work, self._step)
        finally:
            loop.set_task_factory(before)

    async def _counted(self, work: Any) -> Any:
        return await _Steps(work, self._step)

    def _step(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.strike()


class _Steps:
    """Awaits a coroutine, and calls a function each time it is suspended."""

    def __init__(self, work: Any, step: Callable[[], None]) -> None:
        self.work = work
        self.step = step

    def __await__(self) -> Generator[Any, Any, Any]:
        value, error = None, None
        while True:
            try:
                waits_for = self.work.send(value) if error is None else self.work.throw(error)
            except StopIteration as done:
                return done.value
            self.step()
            try:
                value, error = (yield waits_for), None
            except GeneratorExit:
                self.work.close()
                raise
            except BaseException as thrown:
                value, error = None, thrown


class _Signals:
    """Counts something in the main thread, and sends a signal there, whose handler raises."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at = at
        self.error = error
        self.seen = 0
        self._before: Any = None

    @property
    def has_struck(self) -> bool:
        """Whether the work came as far as that."""
        return self.seen >= self.at

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGUSR1, self._handle)
        self._watch()
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)
        signal.signal(signal.SIGUSR1, self._before)

    def _handle(self, number: int, frame: object) -> None:
        raise self.error

    def _count(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            sys.setprofile(None)
            sys.settrace(None)
            signal.raise_signal(signal.SIGUSR1)

    def _watch(self) -> None:
        raise NotImplementedError


class Calls(_Signals):
    """Counts the calls of a driver and their returns, and has a signal's handler raise at one of them.

    Args:
        at: which of them, from 1.
        error: what is raised there.
        driver: the name of the driver's package.
    """

    def __init__(self, at: int, error: BaseException, driver: str) -> None:
        super().__init__(at, error)
        self.driver = driver

    def _watch(self) -> None:
        sys.setprofile(self._look)

    def _look(self, frame: FrameType, what: str, called: Any) -> None:
        if _is_finalizer(frame):
            return
        if what in ("call", "return"):
            mine = _package(frame) == self.driver and frame.f_back is not None and _package(frame.f_back) in _CALLERS
        else:
            mine = _package(frame) in (*_CALLERS, self.driver) and _is_of(called, self.driver)
        if mine:
            self._count()


class Lines(_Signals):
    """Counts the lines of dbscope and SQLAlchemy that are executed, and has a signal's handler raise at one of them."""

    where = ""  # the module that was struck

    def _watch(self) -> None:
        sys.settrace(self._call)

    def _call(self, frame: FrameType, what: str, _: Any) -> Any:
        return self._line if _package(frame) in _CALLERS and not _is_finalizer(frame) else None

    def _line(self, frame: FrameType, what: str, _: Any) -> Any:
        if what == "line":
            self.where = frame.f_globals["__name__"]
            self._count()
        return self._line


_CALLERS = ("sqlalchemy", "dbscope")


def _is_finalizer(frame: FrameType | None) -> bool:
    """Whether the garbage collector called it, or what called it: what is raised there Python tells nobody."""
    while frame is not None and _package(frame) != "tests":
        if frame.f_code.co_name in ("__del__", "_cleanup"):
            return True
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_of(called: Any, driver: str) -> bool:
    owner = getattr(called, "__self__", None)
    module = getattr(called, "__module__", None) or getattr(type(owner), "__module__", None) or ""
    return str(module).partition(".")[0] in (driver, f"{driver}_binary", f"{driver}_c")
