"""The whole command: collect, then print once or show it live."""

import argparse
import json
import sys
from collections.abc import Mapping

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from dbscope.cli.top import plain
from dbscope.cli.top.rows import Picture, arranged, as_json, picture
from dbscope.errors import ConfigurationError
from dbscope.monitor.activity import Server
from dbscope.monitor.client import ask_all
from dbscope.monitor.server import folders

__all__ = ["CannotRun", "Sources", "run"]


class CannotRun(Exception):
    """What the user has to know, and nothing else."""


class Sources:
    """Who is asked: the processes, and a server if there is one to ask.

    Args:
        server: it.
        literals: show values in its statements.
    """

    def __init__(self, server: Server | None, *, literals: bool = False) -> None:
        self.server = server
        self.literals = literals
        self.reached = True

    def look(self) -> Picture:
        """Ask them all, once."""
        backends, problems = [], []
        if self.server is not None:
            try:
                backends = self.server.backends()
                self.reached = True
            except SQLAlchemyError as error:
                self.reached = False
                said = str(getattr(error, "orig", None) or error).strip()
                problems.append(f"PostgreSQL at {self.server.url.host or 'localhost'}: {said}")
        url = None if self.server is None or not self.reached else self.server.url
        return picture(ask_all(), backends, url, problems=problems, literals=self.literals)


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run it as the command line asks.

    Raises:
        CannotRun: the URL is of no PostgreSQL, or something that is needed is not installed.
    """
    server = _server(options, environ)
    sources = Sources(server, literals=options.literals)
    try:
        if options.once or options.json or not _can_move(environ):
            return _once(options, sources)
        return _live(options, sources)
    finally:
        if server is not None:
            server.__exit__(None, None, None)


def _can_move(environ: Mapping[str, str]) -> bool:
    return sys.stdout.isatty() and sys.stdin.isatty() and environ.get("TERM") not in (None, "", "dumb")


def _server(options: argparse.Namespace, environ: Mapping[str, str]) -> Server | None:
    url = options.url
    if url is None and not options.no_server:
        url = _if_postgresql(environ.get("DATABASE_URL"))
    if not url:
        return None
    try:
        return Server(url)
    except ConfigurationError as error:
        raise CannotRun(str(error)) from None


def _if_postgresql(url: str | None) -> str | None:
    try:
        return url if url and make_url(url).get_backend_name() == "postgresql" else None
    except (ArgumentError, ValueError):
        return None


def _once(options: argparse.Namespace, sources: Sources) -> int:
    shown = sources.look()
    rows = arranged(shown.rows, sort=options.sort, match=options.match, others=not options.mine)
    if options.json:
        print(json.dumps(as_json(shown, rows), indent=2))
    elif shown.programs or shown.server:
        print(*plain.lines(shown, rows), sep="\n")
    sys.stdout.flush()
    for problem in shown.problems:
        print(f"dbscope top: {problem}", file=sys.stderr)
    if not shown.programs and not shown.server:
        print(f"dbscope top: {NOBODY} Looked in {', '.join(map(str, folders()))}.", file=sys.stderr)
        return 1
    return 0 if sources.reached else 1


NOBODY = (
    "no process answers. Those of this user answer once they have used a connection with dbscope, unless "
    "DBSCOPE_MONITOR turns it off; run this as the same user, in the same container."
)


def _live(options: argparse.Namespace, sources: Sources) -> int:
    try:
        from dbscope.cli.top import live
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise CannotRun(
            f'{missing} is not installed; pip install "dbscope[top]", or print it once: dbscope top --once'
        ) from None
    return live.run(options, sources)
