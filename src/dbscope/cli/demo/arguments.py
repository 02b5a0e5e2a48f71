"""The command line of `dbscope demo`. It needs none of the demo's extras, so that `--help` works without them."""

import argparse
from functools import partial
from typing import Any

__all__ = ["add_to"]

PROTECTIONS = ("early-finish", "ownership", "overlap", "ended-sessions", "uncommitted")

TEACHES = """\
Runs a small bank for some seconds and proves that its books are right.

Clients send real HTTP requests: deposits, withdrawals, transfers, reports that
stream, standing orders. They go to uvicorn (async endpoints on its loop, sync
ones in threads) and to waitress (the same as WSGI); a job handler and a pool
of workers use the database beside them. Some requests fail half-way, some
clients hang up, and some handlers misbehave on purpose: they share a session,
forget to commit, commit what is not theirs, keep a session for too long.

At the end everything is compared: what each client was told, what the servers
say, and what the database holds. Each misbehaviour has to be caught by name."""

EXAMPLES = """\
examples:
  15 seconds on a SQLite file of its own:
    dbscope demo
  see that a protection matters (early-finish, ownership, overlap,
  ended-sessions or uncommitted):
    dbscope demo --without ownership
  the same bank on thread-local sessions, written by hand, to see what is lost:
    dbscope demo --unprotected
  on a server, async endpoints by way of psycopg or of asyncpg:
    dbscope demo --database-url postgresql+psycopg://user:password@host/name
    dbscope demo --database-url postgresql+asyncpg://user:password@host/name

The demo's tables are called dbscope_demo_*; it makes them anew, and drops them
at the end.

exit status: 0 if the audit holds, 1 if it does not, 2 if the demo cannot run,
130 if it was interrupted. NO_COLOR turns colours off."""


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="run a bank on real HTTP requests, and audit its books",
        description=TEACHES,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=seconds_of, default=15.0, metavar="N", help="how long to send (default: 15)")
    parser.add_argument(
        "--clients",
        type=partial(count_of, most=40),
        default=12,
        metavar="N",
        help="how many send at once (default: 12)",
    )
    parser.add_argument(
        "--requests", type=count_of, metavar="N", help="stop after so many, each mistake having been made"
    )
    parser.add_argument("--database-url", metavar="URL", help="a database instead of a SQLite file")
    off = parser.add_mutually_exclusive_group()
    off.add_argument("--without", choices=PROTECTIONS, metavar="PROTECTION", help="turn off one of dbscope's rules")
    off.add_argument("--unprotected", action="store_true", help="turn dbscope off: hand-written sessions instead")
    parser.add_argument("--json", action="store_true", help="print the audit as JSON")
    parser.add_argument("--verbose", action="store_true", help="print what the errors say, and every fault")
    parser.set_defaults(run=_run, parser=parser)


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        from dbscope.cli.demo.command import CannotRun, run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        parser.exit(2, f'dbscope demo: {missing} is not installed; pip install "dbscope[demo]"\n')
    except ImportError as error:  # greenlet, which says itself what to install
        parser.exit(2, f"dbscope demo: {error}\n")
    try:
        return run(options)
    except CannotRun as error:
        parser.exit(2, f"dbscope demo: {error}\n")


def seconds_of(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, more than 0 and up to 3600")
    return seconds


def count_of(text: str, most: int = 1_000_000) -> int:
    count = int(text) if text.isdecimal() else 0
    if not 0 < count <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {most}")
    return count
