"""Fan-out: one piece of work split into parts that run side by side, each in a scope of its own.

The pool is what they share. More parts than connections would wait in it for each other, and a part that fans out
again while it holds one could wait for itself; so the parts are counted before they start.
"""

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, TypeVar

from dbscope.errors import ConfigurationError, FanOutError
from dbscope.hooks import title
from dbscope.plan import to_completion
from dbscope.scope import PlacedScope, Scope, current_scope
from dbscope.where import here, spell

__all__ = ["Slots", "afan_out", "fan_out"]

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 32  # at once, if the pool has room for more and nobody says how many


class Slots:
    """How many parts of fan-outs may hold a connection of one pool now."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.lock = threading.Lock()
        self.used = 0  # by running parts
        self.reserved = 0  # by callers' own connections
        self.stuck = 0  # of these two, what waits in a fan-out and so cannot be given back before it ends
        self.callers: dict[Scope | None, _Caller] = {}
        self.waiting: deque[Callable[[], object]] = deque()

    def wake(self) -> None:
        """Let everybody who waits look again."""
        with self.lock:
            waiting = [*self.waiting]
            self.waiting.clear()
        for call in waiting:
            call()


class _Caller:
    """Work that waits in one fan-out, or in several side by side, and so cannot give back what it holds."""

    __slots__ = ("fan_outs", "held", "lent", "reserved")

    def __init__(self, *, lent: bool) -> None:
        self.fan_outs = 0
        self.held = 0
        self.reserved = 0
        self.lent = lent  # the part's own slot, which it does not need while it waits here


class Share:
    """What one fan-out may use of the pool's slots."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.home = current_scope()
        self.place = here()

    def __enter__(self) -> "Share":
        """Join those that wait, as long as one connection is left to give them their turn.

        Raises:
            FanOutError: this would be the last one, and no slot could ever come free.
        """
        slots, home = self.slots, self.home
        with slots.lock:  # looked up and taken in one go: of two callers that come at once one goes on
            held, is_part = (0, False) if home is None else home.held(slots.source)
            caller = slots.callers.get(home) or _Caller(lent=is_part and held == 0)
            more = max(0, held - caller.held)  # its other fan-outs have counted what it held then
            slots.stuck += more
            capacity = slots.source.capacity()  # which may depend on who is stuck, as in a test's sandbox
            if slots.stuck >= capacity:
                slots.stuck -= more
                raise FanOutError(
                    f"a fan-out at {spell(self.place)} could never begin: the pool of {slots.source.name} has "
                    f"{capacity:.0f} connection{'s' if capacity > 1 else ''}, and callers that wait for their own "
                    "fan-outs hold all of them.\nFan out before the transaction, or after it, or enlarge the pool "
                    "(SQLite in memory has one connection, a file has more)."
                )
            caller.held += more
            reserved = max(caller.reserved, caller.held - is_part)
            slots.reserved += reserved - caller.reserved
            caller.reserved = reserved
            slots.callers[home] = caller
            caller.fan_outs += 1
        self.caller = caller
        return self

    def __exit__(self, *_: object) -> None:
        slots, caller = self.slots, self.caller
        with slots.lock:
            caller.fan_outs -= 1
            if not caller.fan_outs:
                del slots.callers[self.home]
                slots.reserved -= caller.reserved
                slots.stuck -= caller.held
        slots.wake()

    def take(self, wake: Callable[[], object]) -> Callable[[], None] | None:
        """What gives a slot back when its part is through; or None, and `wake` is called when to try again."""
        slots = self.slots
        with slots.lock:
            if self.caller.lent:
                self.caller.lent = False
                return self._give_lent
            if slots.used + slots.reserved < slots.source.capacity():
                slots.used += 1
                return self._give
            slots.waiting.append(wake)
            return None

    def _give_lent(self) -> None:
        with self.slots.lock:
            self.caller.lent = True
        self.slots.wake()

    def _give(self) -> None:
        with self.slots.lock:
            self.slots.used -= 1
        self.slots.wake()


def _check(function: Any, items: Iterable[T], limit: int | None) -> list[T]:
    if not callable(function):
        raise ConfigurationError(f"fan_out() is given a function, and the items to call it with; this is {function!r}.")
    if limit is not None and limit < 1:
        raise ConfigurationError(f"a fan-out's limit is a number from 1 up, not {limit!r}.")
    return list(items)


def fan_out(
    source: Any,
    slots: Slots,
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    name: str | None,
    limit: int | None,
) -> list[R]:
    """The parts in threads; see `Database.fan_out`."""
    given = _check(function, items, limit)
    if iscoroutinefunction(function):
        raise ConfigurationError(
            f"{title(function)} is a coroutine function, and {source.name} is a sync database, whose fan_out() runs "
            "functions in threads. Use an AsyncDatabase, or a plain function."
        )
    if not given:
        return []
    place, called = here(), name or title(function)

    def part(item: T) -> R:
        with PlacedScope(called, place, joined=source):
            return function(item)

    parts: list[Future[R]] = []
    failed = threading.Event()
    room = threading.Semaphore(limit or _THREADS)
    with Share(slots) as share, ThreadPoolExecutor(len(given), thread_name_prefix=called) as threads:
        for item in given:
            room.acquire()
            give = _wait_for(share)
            if failed.is_set():
                give()
                break
            future = threads.submit(contextvars.copy_context().run, part, item)

            def through(done: Future[R], give: Callable[[], None] = give) -> None:
                if done.exception() is not None:
                    failed.set()
                give()
                room.release()

            future.add_done_callback(through)
            parts.append(future)
        done, _ = wait(parts, return_when=FIRST_EXCEPTION)
        error = next((e for future in parts if future in done and (e := future.exception()) is not None), None)
    if error is not None:
        raise error
    return [future.result() for future in parts]


def _wait_for(share: Share) -> Callable[[], None]:
    while True:
        free = threading.Event()
        give = share.take(free.set)
        if give is not None:
            return give
        free.wait()


async def afan_out(
    source: Any,
    slots: Slots,
    function: Callable[[T], Awaitable[R]],
    items: Iterable[T],
    *,
    name: str | None,
    limit: int | None,
) -> list[R]:
    """The parts in tasks; see `AsyncDatabase.fan_out`."""
    given = _check(function, items, limit)
    if not given:
        return []
    place, called = here(), name or title(function)
    parts: list[asyncio.Task[R]] = []
    room = asyncio.Semaphore(limit or len(given))

    async def part(item: T) -> R:
        async with PlacedScope(called, place, joined=source):
            return await function(item)

    with Share(slots) as share:
        try:
            for item in given:
                await room.acquire()
                give = await _await_for(share)
                if any(task.done() and _failed(task) for task in parts):
                    give()
                    break
                task = asyncio.create_task(part(item), name=called)

                def through(_: object, give: Callable[[], None] = give) -> None:
                    give()
                    room.release()

                task.add_done_callback(through)  # not in the part itself: one that is cancelled early never begins
                parts.append(task)
            await asyncio.wait(parts, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            if parts:
                for task in parts:
                    task.cancel()  # those that are through do not notice
                await to_completion(asyncio.ensure_future(asyncio.wait(parts)))
    for task in parts:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return [task.result() for task in parts]


def _failed(task: "asyncio.Task[Any]") -> bool:
    return task.cancelled() or task.exception() is not None


async def _await_for(share: Share) -> Callable[[], None]:
    loop = asyncio.get_running_loop()
    while True:
        free = asyncio.Event()
        give = share.take(partial(loop.call_soon_threadsafe, free.set))
        if give is not None:
            return give
        await free.wait()
