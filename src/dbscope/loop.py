"""Loops: work that is done over and over, each pass in a scope of its own."""

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from queue import Empty, SimpleQueue
from typing import Any

from dbscope.errors import ConfigurationError, ScopeMisuseError
from dbscope.hooks import title
from dbscope.scope import Commit, PlacedScope
from dbscope.where import here

__all__ = ["Loop"]

log = logging.getLogger("dbscope")


class Loop:
    """Call a function over and over, each pass in a scope of its own, until told to stop.

    A pass that fails is logged and the next starts clean, whatever state its sessions were left in.
    `stop()` and `wake()` may be called from anywhere: another thread, another task, a signal handler.

    Args:
        function: what a pass does: a function for `run`, a coroutine function for `arun`.
        interval: the seconds between the end of a pass and the start of the next.
        name: what errors, logs and the live view call a pass; the function's name, if not given.
        commit: as for `scope`.
        on_error: called with the error of each pass that failed, instead of logging it; what it raises ends the loop.

    Raises:
        ConfigurationError: the function is none, or the interval is negative.

    >>> from dbscope import Loop
    >>> def watch():
    ...     print("a pass")
    ...     loop.stop()
    >>> loop = Loop(watch, interval=1.0)
    >>> loop.run()
    a pass
    """

    def __init__(
        self,
        function: Callable[[], Any] | Callable[[], Awaitable[Any]],
        *,
        interval: float,
        name: str | None = None,
        commit: Commit = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        if not callable(function):
            raise ConfigurationError(f"a loop is given the function of one pass, not {function!r}.")
        if not interval >= 0:
            raise ConfigurationError(f"a loop's interval is a number of seconds from 0 up, not {interval!r}.")
        self.function = function
        self.interval = interval
        self.name = name or title(function)
        self.commit: Commit = commit
        self.on_error = on_error or self._log
        self.passes = 0  # how many have been started
        self._place = here()
        self._stopped = False
        self._wakes: SimpleQueue[None] = SimpleQueue()  # its put() may interrupt anything, an Event's set() may not
        self._alarm: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def stopped(self) -> bool:
        """Whether `stop()` was called."""
        return self._stopped

    def stop(self) -> None:
        """End the loop when the running pass is through; at once while it waits for the next."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """Start the next pass now, if the loop is waiting for it."""
        alarm = self._alarm
        if alarm is None:
            self._wakes.put(None)
        elif not alarm[0].is_closed():
            alarm[0].call_soon_threadsafe(alarm[1].set)

    def run(self) -> None:
        """Run the passes in this thread, until `stop()`.

        Raises:
            ScopeMisuseError: the function is a coroutine function.
        """
        if _is_async(self.function):
            raise ScopeMisuseError(f"{self.name} is a coroutine function: run its loop with `await loop.arun()`.")
        while True:
            while not self._wakes.empty():
                self._wakes.get()  # who asked for this pass gets it
            if self.stopped():  # whoever says so later also ends the waiting below
                return
            try:
                with self._scope():
                    self.function()
            except Exception as error:
                self.on_error(error)
            with contextlib.suppress(Empty):
                self._wakes.get(timeout=self.interval)

    async def arun(self) -> None:
        """Async version of `run`, on this event loop."""
        if not _is_async(self.function):
            raise ScopeMisuseError(f"{self.name} is no coroutine function: run its loop with `loop.run()`.")
        alarm = asyncio.Event()
        self._alarm = asyncio.get_running_loop(), alarm
        while True:
            alarm.clear()
            if self.stopped():
                return
            try:
                async with self._scope():
                    await self.function()
            except Exception as error:
                self.on_error(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(alarm.wait(), self.interval)

    def _scope(self) -> PlacedScope:
        self.passes += 1
        return PlacedScope(self.name, self._place, commit=self.commit)

    def _log(self, error: Exception) -> None:
        log.error("pass %d of %s failed; the next starts clean", self.passes, self.name, exc_info=error)

    def __repr__(self) -> str:
        return f"<Loop {self.name}, {self.passes} passes{', stopped' if self.stopped() else ''}>"


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
