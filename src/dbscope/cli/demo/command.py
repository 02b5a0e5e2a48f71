"""The whole demo, from the first request to the exit status."""

import argparse
import asyncio
import gc
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from dbscope import DBScopeError, guards
from dbscope.cli.demo import screen, unprotected
from dbscope.cli.demo.audit import Audit, audit, read_books
from dbscope.cli.demo.bank import Bank
from dbscope.cli.demo.doors import Doors, open_doors
from dbscope.cli.demo.facts import Snapshot, snapshot
from dbscope.cli.demo.load import Load
from dbscope.cli.demo.misbehaviour import BUDGET
from dbscope.cli.demo.service import Service
from dbscope.cli.demo.watch import open_scopes
from dbscope.cli.demo.without import PROTECTIONS
from dbscope.events import observe
from dbscope.guards import Found, budgets

__all__ = ["CannotRun", "run"]

FRAME = 0.2  # seconds that a screen stands
LINES = 5  # of progress, where nobody watches


class CannotRun(Exception):
    """What the user has to know, and nothing else."""


def run(options: argparse.Namespace) -> int:
    """Run the demo as the command line asks.

    Raises:
        CannotRun: the database, or one of the drivers, is not to be had.
    """
    console = Console(highlight=False, stderr=options.json)
    outcome: tuple[Snapshot, Audit] | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="dbscope-demo-") as folder, _quiet():
            outcome = _load_and_audit(options, console, Path(folder))
    except KeyboardInterrupt:
        pass  # told below, when nothing of the interrupted work is kept by the exception any more
    except BrokenPipeError:
        raise
    except (DBScopeError, SQLAlchemyError, OSError, ImportError) as error:
        notes = getattr(error, "__notes__", [])
        raise CannotRun("\n".join([str(error).partition("\n(Background")[0], *notes])) from error
    if outcome is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()  # what was cancelled before it began would be complained about at the end of the process
        print("dbscope demo: interrupted", file=sys.stderr)
        return 130
    facts, found = outcome
    if options.json:
        print(as_json(facts, found))
    else:
        _print(console, [*screen.findings(found, every=options.verbose), screen.verdict(facts, found)])
    return 0 if found.holds else 1


def _print(console: Console, parts: list[RenderableType]) -> None:
    """Print the audit; in a pipe without the spaces that fill a terminal's lines."""
    with console.capture() as printed:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))
    for line in printed.get().splitlines():
        print(line.rstrip())
    sys.stdout.flush()


def _load_and_audit(options: argparse.Namespace, console: Console, folder: Path) -> tuple[Snapshot, Audit]:
    urls = both_urls(options.database_url or f"sqlite:///{folder / 'bank.db'}")
    protection = PROTECTIONS.get(options.without)
    with ExitStack() as stack:
        if protection is not None:
            stack.enter_context(protection.off())
        bank = Bank(_doors(options, urls))
        stack.enter_context(_warnings_to(bank))
        stack.enter_context(_guards_tell(bank))
        service = Service(bank)
        stack.callback(service.dispose)
        with service:
            load = Load(service.urls, clients=options.clients, seconds=options.seconds, requests=options.requests)
            title = f"dbscope demo on {urls[0].get_backend_name()}, {options.clients} clients{_off(options)}"
            asyncio.run(_show(load, bank, console, title))
        facts = snapshot(title, bank, load)
        found = [*bank.watch.findings]
        return facts, audit(read_books(urls[0]), load.sent, bank.log.answers, service.held, open_scopes(), found)


def _doors(options: argparse.Namespace, urls: tuple[URL, URL]) -> Doors:
    if options.unprotected:
        return unprotected.open_doors(urls)
    changed = PROTECTIONS[options.without].doors if options.without else {}
    return open_doors(urls, clients=options.clients, **changed)


def _off(options: argparse.Namespace) -> str:
    if options.unprotected:
        return ", unprotected"
    return f", without {options.without}" if options.without else ""


async def _show(load: Load, bank: Bank, console: Console, title: str) -> None:
    """Run the load, and show what goes on: on a terminal live, in a pipe as a few lines."""
    running = asyncio.create_task(load.run())
    moving = console.is_terminal and not console.is_dumb_terminal
    quiet = console.stderr and not moving  # the output is JSON
    shown = 0
    if not (moving or quiet):
        console.print(title, soft_wrap=True)
        console.print(screen.HINT, soft_wrap=True)
    with Live(console=console, auto_refresh=False, transient=True) if moving else ExitStack() as display:
        while not running.done():
            await asyncio.wait([running], timeout=FRAME)
            facts = snapshot(title, bank, load)
            if isinstance(display, Live):
                display.update(screen.live(facts), refresh=True)
            elif not quiet and facts.done * LINES >= shown + 1:
                shown = int(facts.done * LINES)
                console.print(screen.plain(facts), soft_wrap=True)
    await running


def both_urls(given: str) -> tuple[URL, URL]:
    """The URLs of the sync and of the async driver, of which one is given.

    Raises:
        CannotRun: it is no URL, or of a database that the demo does not know.
    """
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise CannotRun("this is not a database URL, such as postgresql+psycopg://user@host/name") from None
    backend, _, driver = url.drivername.partition("+")
    if backend == "sqlite" and driver in ("", "pysqlite", "aiosqlite"):
        if url.database in (None, "", ":memory:"):
            raise CannotRun("a bank in memory would have one connection for everybody: name a file, sqlite:///bank.db")
        return url.set(drivername="sqlite"), url.set(drivername="sqlite+aiosqlite")
    if backend == "postgresql" and driver in ("", "psycopg", "psycopg_async", "asyncpg"):
        asynchronous = "asyncpg" if driver == "asyncpg" else "psycopg"
        return url.set(drivername="postgresql+psycopg"), url.set(drivername=f"postgresql+{asynchronous}")
    raise CannotRun(f"{url.drivername}: the demo knows sqlite, postgresql+psycopg and postgresql+asyncpg")


def as_json(facts: Snapshot, found: Audit) -> str:
    """The audit for programs."""
    checks = [{**asdict(check), "ok": not check.faults} for check in found.checks]
    mistakes = [{**asdict(mistake), "ok": mistake.holds} for mistake in found.mistakes]
    return json.dumps(
        {"ok": found.holds, "checks": checks, "misbehaviours": mistakes, "counts": asdict(facts)}, indent=2
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Let nothing of what the misbehaviour makes libraries log get onto the screen; it is counted and shown there."""
    handler = logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


@contextmanager
def _warnings_to(bank: Bank) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = bank.watch.warned
        yield


@contextmanager
def _guards_tell(bank: Bank) -> Iterator[None]:
    """Note what the guards find, by a budget that fits a short run."""
    before = budgets._budget
    stop = observe(bank.watch.found, Found)
    guards.configure(budget=BUDGET)
    try:
        yield
    finally:
        stop()
        guards.configure(budget=before)
