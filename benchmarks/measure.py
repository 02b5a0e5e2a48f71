"""Paired timing: all contenders of a row in one process, in a random order each round, compared within the round.

A ratio of two times that were taken a few milliseconds apart survives a machine whose speed drifts; two figures from
two runs do not.
"""

import asyncio
import gc
import importlib
import os
import random
import statistics
import textwrap
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from itertools import repeat
from time import perf_counter, process_time, thread_time
from typing import Any

SLICE = 0.004  # seconds that one contender runs in one round
# The same for rows with SQL, whose caches are cold at first, and code specialised to another's classes; and for rows
# that tell two requests from each other which differ by little.
LONG_SLICE = 0.02


class Missing(Exception):
    """This machine lacks what a row needs; the message says what."""


def needs(*modules: str) -> None:
    """Raise `Missing` unless all of them can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise Missing(f"{module} is not installed") from error


@dataclass
class Contender:
    """A piece of code to measure.

    Args:
        name: how the table calls it.
        code: what is measured. It is compiled into the measuring loop, as `timeit` does, so that a look-up of 50 ns
            is not buried under the call of a function.
        ends: what it does with the transaction at its end, for they differ.
        setup: run once before, in the context that all measuring happens in.
        is_async: the code awaits.
        needs: modules that it cannot do without; where one is missing, the row is measured without it.
    """

    name: str
    code: str
    ends: str = ""
    setup: str = ""
    is_async: bool = False
    needs: tuple[str, ...] = ()
    context: Context = field(default_factory=copy_context, repr=False)


@dataclass
class Row:
    """One comparison.

    Args:
        name: what is compared.
        contenders: dbscope's first; the one that all are compared with is the last.
        target: the ratio that dbscope's contender should not exceed; None for a row without a promise.
        steps: for look-ups. So many are made each time the context is entered, and what entering costs is taken off:
            a tight loop would flatter a `ContextVar`, which remembers its value until the context is switched.
        sql: it runs SQL.
        waits: it waits for a server or a disk, so that the clock on the wall counts; elsewhere the thread's time on
            the CPU does, which other processes disturb less.
        threads: a contender works in other threads as well, so that the process's time on the CPU counts.
        adds: what counts is not the ratio but what dbscope adds, in microseconds.
    """

    name: str
    contenders: list[Contender]
    target: float | None = None
    steps: int = 0
    sql: bool = False
    waits: bool = False
    adds: bool = False
    note: str = ""
    threads: bool = False

    def here(self) -> "Row":
        """The row with the contenders that this machine can measure; the note names the others."""
        contenders, notes = [], [self.note] if self.note else []
        for one in self.contenders:
            try:
                needs(*one.needs)
            except Missing as missing:
                notes.append(f"without {one.name}: {missing}")
            else:
                contenders.append(one)
        return replace(self, contenders=contenders, note="; ".join(notes))


@dataclass
class Result:
    """What one contender needed, in seconds for each run of its code, and compared with the last one's.

    The comparison is a ratio, or in a row that says so the difference in microseconds.
    """

    contender: Contender
    seconds: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        """The median of the paired ratios."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the paired ratios."""
        first, _, third = statistics.quantiles(self.ratios, n=4) if len(self.ratios) > 1 else self.ratios * 3
        return first, third


def pin() -> str:
    """Keep this process, and the servers that it starts from now on, on one CPU; tell what came of it.

    A client and a server on two CPUs wait for each other to wake up, which takes twice as long and varies by half.
    """
    try:
        cpu = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpu})
    except (AttributeError, OSError):
        return "not pinned"
    return "pinned to one CPU"


def measure(row: Row, rounds: int, names: dict[str, Any], progress: Callable[[int], None]) -> list[Result]:
    """Measure a row; the results are in the order of its contenders.

    `names` are what their code uses; `dispose` among them is awaited at the end, in the loop that they ran in.
    """
    with asyncio.Runner() as runner:
        slices = [_Slice(contender, row, names, runner) for contender in row.contenders]
        try:
            for one in slices:
                one.calibrate()
            for number in range(rounds):
                for one in random.sample(slices, len(slices)):
                    one.run()
                progress(number + 1)
        finally:
            for one in slices:
                one.finish()
            if "dispose" in names:
                runner.run(names["dispose"]())
    base = slices[-1].seconds
    return [
        Result(
            one.contender,
            one.seconds,
            [(mine - its) * 1e6 if row.adds else mine / its for mine, its in zip(one.seconds, base, strict=True)],
        )
        for one in slices
    ]


LOOP = """
{prefix}def measured(rounds, clock):
    begun = clock()
    for _ in rounds:
{body}
    return clock() - begun
"""

STEPS = """
def steps():
{steps}

def nothing():
    pass

{prefix}def measured(rounds, clock, run=context.run, body=steps):
    begun = clock()
    for _ in rounds:
        run(body)
    return clock() - begun
"""


class _Slice:
    """A contender, compiled, and its times."""

    def __init__(self, contender: Contender, row: Row, names: dict[str, Any], runner: asyncio.Runner) -> None:
        self.contender = contender
        self.seconds: list[float] = []
        self.number = 1
        self._runner = runner
        self._steps = steps = row.steps
        self._slice = LONG_SLICE if row.sql or row.adds else SLICE
        self._clock = perf_counter if row.waits else process_time if row.threads else thread_time
        self._names = dict(names)
        self._do(contender.setup)
        prefix = "async " if contender.is_async else ""
        if steps:
            # One level further in: the contender's context is entered anew for each body.
            self._names["context"] = contender.context
            source = STEPS.format(prefix=prefix, steps=textwrap.indent("\n".join([contender.code] * steps), " " * 4))
        else:
            source = LOOP.format(prefix=prefix, body=textwrap.indent(contender.code, " " * 8))
        exec(compile(source, f"{__file__}: {contender.name}", "exec"), self._names)

    def _do(self, code: str) -> None:
        if not code:
            return
        prefix = "async " if self.contender.is_async else ""
        exec(f"{prefix}def prepare():\n{textwrap.indent(code, '    ')}", self._names)
        prepare = self._names["prepare"]
        if self.contender.is_async:
            self._runner.run(prepare(), context=self.contender.context)
        else:
            self.contender.context.run(prepare)

    def calibrate(self) -> None:
        """Find how often the code runs in a slice of time, after a first time that connects and compiles."""
        self._time(1)
        while (seconds := self._time(self.number)) < self._slice / 2:
            self.number *= 2
        self.number = max(1, round(self.number * self._slice / seconds))

    def run(self) -> None:
        """Take one more time."""
        # For all alike: the collector runs as it does in an application, and starts each slice from zero.
        gc.collect()
        seconds = self._time(self.number)
        if self._steps:
            seconds = max(seconds - self._time(self.number, body=self._names["nothing"]), 1e-9) / self._steps
        self.seconds.append(seconds / self.number)

    def _time(self, number: int, **body: Any) -> float:
        measured, context = self._names["measured"], self.contender.context
        if self.contender.is_async:
            # Steps enter the context by themselves, and none can be entered twice.
            awaitable = measured(repeat(None, number), self._clock, **body)
            return self._runner.run(awaitable, context=None if self._steps else context)
        if self._steps:
            return measured(repeat(None, number), self._clock, **body)
        return context.run(measured, repeat(None, number), self._clock)

    def finish(self) -> None:
        """Nothing is kept but the times."""
        self._names.clear()
