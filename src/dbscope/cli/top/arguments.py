"""The command line of `dbscope top`. It needs no extra for `--help`, `--once` and `--json`."""

import argparse
import os
from typing import Any

__all__ = ["add_to"]

SORTS = ("held", "state", "process", "scope", "database")

TEACHES = """\
Shows, live, who holds which database connection, since when, and from which
line: of every process of this user that uses dbscope. Look at the pools first:
a full one is red. Below are the connections, those that are held longest on
top: the work that holds each, the line that took it, and its last statement.

A process answers from its first connection on, on a Unix socket that only its
user may open (DBSCOPE_MONITOR=0 in its environment turns that off). So run this
as the same user, on the same machine or in the same container.

With --url, or DATABASE_URL, a PostgreSQL is asked, too: its clock and states,
who waits for whom, and the connections of everybody else. No password is ever
learned from a process; what a server gives to --url is what its user may see.
Of statements only the text is shown: values in those of others become "?"."""

EXAMPLES = """\
keys: arrows or j, k choose a connection, Enter shows all about it; s sorts,
/ filters, o hides others, space stops the picture, ? helps, q ends.

examples:
  what is going on here:
    dbscope top
  with what PostgreSQL knows; the password comes from ~/.pgpass or PGPASSWORD,
  for other users of this machine may see a command line:
    dbscope top --url postgresql://app@db.example.com/shop
  once, as text; the work of one handler only:
    dbscope top --once --match 'POST /orders'
  for a script: is anything held for more than a minute?
    dbscope top --json | jq '.connections[] | select(.age > 60)'
  a service with folders of its own (systemd's PrivateTmp, a container):
    DBSCOPE_MONITOR=/run/shop dbscope top

exit status: 0 if something has answered, 1 if nobody has (or the server that
--url names has not), 2 for bad usage, 130 for ctrl-C. NO_COLOR turns colours
off."""


def add_to(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "top",
        help="show, live, which work holds which connection",
        description=TEACHES,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", metavar="URL", help="a PostgreSQL to ask, too (default: DATABASE_URL, if it is one)")
    parser.add_argument("--no-server", action="store_true", help="ask none, whatever DATABASE_URL says")
    parser.add_argument("--once", action="store_true", help="print it once; a pipe gets that in any case")
    parser.add_argument("--json", action="store_true", help="print it once, as JSON")
    parser.add_argument("--sort", choices=SORTS, default="held", help="what is on top (default: held, the longest)")
    parser.add_argument("--match", default="", metavar="WORDS", help="only connections with all of these words")
    parser.add_argument("--mine", action="store_true", help="leave out what no process that answers holds")
    parser.add_argument("--literals", action="store_true", help="show values in the statements that the server tells")
    parser.add_argument("--interval", type=seconds_of, default=1.0, metavar="N", help="seconds between looks")
    parser.set_defaults(run=_run, parser=parser)


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from dbscope.cli.top.command import CannotRun, run

    if options.no_server and options.url:
        parser.error("--no-server is not allowed with --url")
    try:
        return run(options, os.environ)
    except CannotRun as error:
        parser.exit(2, f"dbscope top: {error}\n")


def seconds_of(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds
