"""`dbscope doctor`: asks a database, and looks at how it is to be used, before the night does."""

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from dbscope.capacity import size_of
from dbscope.database import BaseDatabase, make_engine, url_of
from dbscope.engines import beside
from dbscope.errors import DBScopeError
from dbscope.monitor.checks import UNPREPARED, Checked, Finding, examine
from dbscope.sqlite import is_memory

__all__ = ["CannotCheck", "Report", "add_to", "doctor"]

T = TypeVar("T")

PATIENCE = 10.0  # seconds for the server to answer everything
SECOND = 2.0  # seconds for a second connection, where a pooler is between
POOL_SIZE, MAX_OVERFLOW = 5, 10  # SQLAlchemy's
HIDDEN = "***"

TEACHES = """\
Checks a database and how it is to be used, before the night does: time-outs,
the pools of all processes against what the server gives, a pooler in between,
SQLite's settings, versions. It changes nothing. Each finding has its remedy.

TARGET is a URL, or module:name for the Database, AsyncDatabase or engine of an
application, with the pool and the options that it has there. Without one it is
$DATABASE_URL, so that no password is seen in the list of processes."""

EXAMPLES = """\
examples:
  dbscope doctor postgresql+psycopg://app@db.example/shop
  dbscope doctor shop.database:db --processes 16
  dbscope doctor sqlite:///shop.db --json

exit status: 0 if nothing serious was found, 1 if there are problems (with
--strict, or advice), 2 if it could not be checked. NO_COLOR turns colours off."""


class CannotCheck(Exception):
    """Why not, in one line, without any password."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        target: what was asked for; a URL without its password.
        server: such as `PostgreSQL 18.6`.
        findings: the worst first.
    """

    target: str
    server: str
    findings: tuple[Finding, ...]

    def holds(self, *, strict: bool = False) -> bool:
        """Whether nothing serious was found; with `strict`, nothing to do at all."""
        return all(found.level == "ok" or (found.level == "advice" and not strict) for found in self.findings)


@dataclass(frozen=True)
class Target:
    """What is to be checked.

    Attributes:
        shown: how it is called.
        engine: its sync engine, on a pool that is used for nothing else.
        is_async: whether an async one is around it.
        each: how many connections the pool of a process gives out at most.
        configured: whether it is an application's own.
    """

    shown: str
    engine: Engine
    is_async: bool
    each: float
    configured: bool

    def ask(self, work: Callable[[Connection], T]) -> T:
        """Call a function with a connection in AUTOCOMMIT, which is closed then."""
        engine = beside(self.engine, self.engine.pool.recreate())
        try:
            if self.is_async:
                return asyncio.run(_ask(engine, work))
            with engine.connect() as connection:
                return work(connection.execution_options(isolation_level="AUTOCOMMIT"))
        finally:
            if not self.is_async:
                engine.dispose()

    def shares(self) -> int | None:
        """The number of the server's process behind a connection, if one is to be had at once."""
        got: list[int | BaseException] = []

        def second() -> None:
            try:
                got.append(self.ask(lambda connection: int(connection.execute(_PID).scalar_one())))
            except Exception as error:
                got.append(error)

        thread = threading.Thread(target=second, name="dbscope-doctor-second", daemon=True)
        thread.start()
        thread.join(SECOND)
        for answer in got:
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return None  # the first connection has the only one: the thread gets it when that is closed


_PID = text("SELECT pg_backend_pid()")


async def _ask(engine: Engine, work: Callable[[Connection], T]) -> T:
    from sqlalchemy.ext.asyncio import AsyncEngine

    made = AsyncEngine(engine)
    try:
        async with made.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            return await connection.run_sync(work)
    finally:
        await made.dispose()


# -- what is meant -----------------------------------------------------------------------------------------------


def target_of(given: str, pool_size: int | None, max_overflow: int | None) -> Target:
    """What a URL, or the name of an application's database, stands for.

    Raises:
        CannotCheck: nothing that is known; or it cannot be imported.
        DBScopeError: the URL is none, or its driver is missing.
    """
    named = re.fullmatch(r"[\w.]+:[\w.]+", given)
    if not named and "://" not in given:
        raise CannotCheck(
            "this is not a database URL, such as 'postgresql+psycopg://user:password@host/database', and no "
            "module:name, such as shop.database:db. (It is not shown, for it may hold a password.)"
        )
    if not named:
        size = POOL_SIZE if pool_size is None else pool_size
        overflow = MAX_OVERFLOW if max_overflow is None else max_overflow
        return of_url(given, float("inf") if size == 0 or overflow < 0 else size + overflow)
    if pool_size is not None or max_overflow is not None:
        raise CannotCheck(f"{given} has a pool of its own: leave --pool-size and --max-overflow out")
    return of_application(given)


def of_url(given: str, each: float) -> Target:
    try:
        is_async = make_url(given).get_dialect().is_async
    except (ArgumentError, NoSuchModuleError, ValueError):
        is_async = False  # what is wrong is told below
    url = url_of(given, is_async=is_async)
    create: Any = create_engine
    if is_async:
        from sqlalchemy.ext.asyncio import create_async_engine as create
    options: dict[str, Any] = {}
    if url.get_backend_name() != "sqlite" or not is_memory(url):
        options = {"poolclass": NullPool}
    engine, _ = make_engine(read_only(url), create, options)
    return Target(shown(url), getattr(engine, "sync_engine", engine), is_async, each, configured=False)


def read_only(url: URL) -> URL:
    """A URL of SQLite's by which no file is made, and nothing is changed in one; others as they are."""
    if url.get_backend_name() != "sqlite" or is_memory(url):
        return url
    database = str(url.database)
    if not database.startswith("file:"):
        database = f"file:{quote(os.path.abspath(database))}"
    return url.set(database=database, query={**url.query, "mode": "ro", "uri": "true"})


def of_application(given: str) -> Target:
    module, _, name = given.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        engine = found._sync_engine if isinstance(found, BaseDatabase) else getattr(found, "sync_engine", found)
    except (Exception, SystemExit) as error:  # a program that runs when it is imported ends itself
        raise CannotCheck(f"{given} cannot be had: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(engine, Engine):
        raise CannotCheck(f"{given} is no Database, AsyncDatabase or engine, but {type(found).__name__}")
    each = size_of(engine.pool)
    return Target(f"{given} ({shown(engine.url)})", engine, engine.dialect.is_async, each, configured=True)


def shown(url: URL) -> str:
    """A URL without what is secret in it."""
    return without(url.render_as_string(hide_password=True), secrets_of(url, options_only=True))


def secrets_of(url: URL, *, options_only: bool = False) -> list[str]:
    """What must not be printed, in each way to write it: the password, wherever in a URL it stands."""
    found: list[Any] = [] if options_only else [url.password]
    for name, value in url.query.items():
        if "pass" in name.lower() or "secret" in name.lower():
            found += [value] if isinstance(value, str) else value
    secrets = [str(secret) for secret in found if secret]
    return [form for one in secrets for form in (one, quote(one), quote(one, safe=""), quote_plus(one))]


def without(said: str, secrets: list[str]) -> str:
    """A text without any of these."""
    for secret in sorted(secrets, key=len, reverse=True):
        said = said.replace(secret, HIDDEN)
    return said


def one_line(error: BaseException) -> str:
    """What an error says, in a line."""
    told = getattr(error, "orig", None) or error
    return " ".join((str(told).strip() or type(told).__name__).split("\n\t", 1)[0].split())


# -- the check ---------------------------------------------------------------------------------------------------


def doctor(
    given: str,
    *,
    processes: int = 1,
    pool_size: int | None = None,
    max_overflow: int | None = None,
    patience: float = PATIENCE,
) -> Report:
    """Check a database.

    Args:
        given: a URL, or `module:name`.
        processes: how many there are, on all hosts together.
        pool_size: that of a process, where a URL is given.
        max_overflow: the same.
        patience: seconds for the server to answer.

    Raises:
        CannotCheck: it could not be checked.
    """
    urls: list[URL] = []
    whose = ""
    if "://" in given:
        with contextlib.suppress(ArgumentError, ValueError):
            urls.append(make_url(given))
    try:
        target = target_of(given, pool_size, max_overflow)
        urls.append(target.engine.url)
        whose = f"{target.shown}: "
        return _in_time(partial(_examine, target, processes), patience)
    except (DBScopeError, SQLAlchemyError, OSError, ImportError, ValueError, CannotCheck) as error:
        ours = isinstance(error, DBScopeError)  # it shows no password, and often a URL, whose user may have that name
        secrets = [secret for url in urls for secret in secrets_of(url, options_only=ours)]
        raise CannotCheck(f"{whose}{without(one_line(error), secrets)}") from None


def _examine(target: Target, processes: int) -> Report:
    checked = Checked(target.engine, target.is_async, target.each, processes, target.configured, target.shares)
    try:
        findings = target.ask(partial(examine, checked))
    except DBAPIError as error:
        if "prepared statement" not in str(error.orig):
            raise
        message = f"the driver's prepared statements fail, as they do behind a pooler: {one_line(error)}"
        findings = [Finding("pooler", "problem", message, UNPREPARED.get(checked.driver, ""))]
    return Report(target.shown, server_of(target.engine), tuple(findings))


def server_of(engine: Engine) -> str:
    """The server's name and version; they are known once there was a connection."""
    dialect: Any = engine.dialect
    name = {"postgresql": "PostgreSQL", "sqlite": "SQLite", "mysql": "MySQL", "mariadb": "MariaDB"}
    version = getattr(dialect, "server_version_info", None)
    if version is None and dialect.name == "sqlite":
        version = dialect.dbapi.sqlite_version_info
    numbers = ".".join(map(str, version)) if version else ""
    return f"{name.get(dialect.name, dialect.name)} {numbers}".strip()


def _in_time(work: Callable[[], T], patience: float) -> T:
    """Call a function in a thread, which is left alone where the server does not answer."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="dbscope-doctor", daemon=True)
    thread.start()
    thread.join(patience)
    if failed:
        raise failed[0]
    if not done:
        raise CannotCheck(f"the server did not answer within {patience:g} s")
    return done[0]


# -- what is printed ---------------------------------------------------------------------------------------------

_COLOURS = {"problem": "31;1", "advice": "33", "ok": "32"}


def rendered(report: Report, *, colour: bool) -> list[str]:
    """The report, line by line."""
    lines = [f"{report.target}: {report.server}", ""]
    for found in report.findings:
        label = f"{found.level:<8}"
        shown = f"\x1b[{_COLOURS[found.level]}m{label}\x1b[0m" if colour else label
        lines.append(f"{shown} {found.message}")
        lines += [f"{'':8}   {line}" for line in found.remedy.splitlines()]
    counts = {level: sum(found.level == level for found in report.findings) for level in ("problem", "advice")}
    problems = f"{counts['problem']} problem{'s' * (counts['problem'] != 1)}"
    return [*lines, "", f"{problems}, {counts['advice']} advice"]


def in_colour() -> bool:
    """Whether somebody watches who likes colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check a database and a configuration",
        description=TEACHES,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="?", metavar="TARGET", help="a URL, or module:name (default: $DATABASE_URL)")
    parser.add_argument("--processes", type=partial(_number, 1), default=1, metavar="N", help="on all hosts")
    parser.add_argument("--pool-size", type=partial(_number, 0), metavar="N", help="of a process (default: 5)")
    parser.add_argument("--max-overflow", type=partial(_number, -1), metavar="N", help="of its pool (default: 10)")
    parser.add_argument("--strict", action="store_true", help="advice counts, too")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_run, parser=parser)


def _number(least: int, given: str) -> int:
    try:
        number = int(given)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number of {least} or more")
    return number


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    given = options.target or os.environ.get("DATABASE_URL")
    if not given:
        parser.error("say which database: a URL, or module:name; or set DATABASE_URL")
    try:
        report = doctor(
            given, processes=options.processes, pool_size=options.pool_size, max_overflow=options.max_overflow
        )
    except CannotCheck as error:
        if options.json:
            print(json.dumps({"ok": False, "error": str(error)}))
        source = "" if options.target else "DATABASE_URL: "
        print(f"dbscope doctor: {source}{error}", file=sys.stderr)
        return 2
    holds = report.holds(strict=options.strict)
    if options.json:
        print(json.dumps({"ok": holds, **asdict(report)}, indent=2))
    else:
        print("\n".join(rendered(report, colour=in_colour())))
    return 0 if holds else 1
