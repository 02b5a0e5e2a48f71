"""Engines that are made again and again for one database, as one for each request (FAILURES 39)."""

import asyncio
import os
from collections.abc import Callable
from typing import Any
from weakref import WeakSet, ref

from sqlalchemy.engine import URL, Engine

from dbscope import sqlite
from dbscope.events import EngineMade, Fact
from dbscope.guards.policy import Guard, Level, level_of
from dbscope.where import running_loop, spell

__all__ = ["EnginesAgain"]

SUSPICIOUS = 5  # engines for one URL, in one process and on one event loop, or on none
MOST = 1000  # URLs that are counted


class _Count:
    """The engines that were made for one URL."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.of_loop: Callable[[], Any] = (lambda: None) if loop is None else ref(loop)
        self.alive: WeakSet[Engine] = WeakSet()
        self.made = 0
        self.tell_at = SUSPICIOUS


class EnginesAgain(Guard):
    """Told for the fifth engine, and again for each doubling; with `"raise"` from the fifth on for each.

    Of a loop's engines those on other loops are no matter: an engine's connections belong to one loop.
    """

    name = "engines_again"
    default: Level = "log"
    kinds: tuple[type[Fact], ...] = (EngineMade,)

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[tuple[URL, int, int], _Count] = {}

    def look(self, fact: EngineMade) -> None:
        """Count it, and report it."""
        engine: Engine = fact.engine
        if engine.dialect.name == "sqlite" and sqlite.is_memory(engine.url):
            return  # each is a database of its own
        loop = running_loop()
        key = (engine.url, os.getpid(), id(loop))
        count = self._counts.get(key)
        if count is None or count.of_loop() is not loop:  # another loop had this number before
            if len(self._counts) >= MOST:
                self._counts = {known: other for known, other in list(self._counts.items()) if len(other.alive)}
            count = self._counts[key] = _Count(loop)
        if engine in count.alive:
            return
        count.alive.add(engine)
        count.made += 1
        if count.made >= count.tell_at:
            if level_of(self.name, fact.database) != "raise":
                count.tell_at *= 2
            self.found(
                f"{count.made} engines were made for {engine.url.render_as_string(hide_password=True)} in this process"
                f"{'' if loop is None else ', on one event loop'}, the last at {spell(fact.place)}. There are "
                f"{len(count.alive)} of them now, with a pool each: the server runs out of connections.\n"
                "Make one when the process starts, and share it.",
                database=fact.database,
                place=fact.place,
            )
