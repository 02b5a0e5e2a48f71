"""`python -m benchmarks`: measure the rows, print target and reached, keep the table in the documentation."""

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks import memory, report
from benchmarks.frameworks import framework_rows
from benchmarks.measure import Missing, measure, pin
from benchmarks.report import Figure, Outcome, Screen
from benchmarks.rows import Server, rows
from benchmarks.web import web_rows

CYCLES = 1_000_000
SCOPES = 20_000
NO_GROWTH = 1.0  # bytes a cycle: a million leave less than what the allocator rounds up to


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    screen = Screen(sys.stdout)
    began = time.monotonic()
    pinned = pin()  # before the server starts, which inherits it
    where = report.setting(pinned)
    screen.line(where)
    screen.line("ratios to the last contender of each row: median, then smallest, first and third quartile\n")
    with ExitStack() as stack:
        outcomes = [*timed(options, stack, screen), *measured_memory(options, screen)]
    if not outcomes:
        print(f"no row is called like {options.rows!r}", file=sys.stderr)
        return 2
    missed = [row.name for row in outcomes if row.verdict == "MISSED"]
    screen.line(f"\n{len(outcomes)} rows in {time.monotonic() - began:.0f} s; missed: {', '.join(missed) or 'none'}")
    if options.json:
        options.json.write_text(json.dumps(report.as_json(outcomes, where, options.rounds), indent=2) + "\n")
    if options.write:
        report.write(report.as_markdown(outcomes, where, options.rounds))
    return 1 if options.check and missed else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What a session's life costs.")
    parser.add_argument("--rounds", type=positive, default=41, help="how often each contender is timed (default: 41)")
    parser.add_argument("--rows", metavar="PATTERN", help="only rows whose names match, such as 'look-up*' or 'async'")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there as well")
    parser.add_argument("--write", action="store_true", help="keep the table in docs/benchmarks.md (all rows)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    if options.write and options.rows:
        parser.error("--write keeps all rows; leave out --rows")
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def wanted(name: str, pattern: str | None) -> bool:
    plain = name.replace("`", "").lower()
    return pattern is None or pattern.lower() in plain or fnmatch.fnmatch(plain, pattern.lower())


def timed(options: argparse.Namespace, stack: ExitStack, screen: Screen) -> Iterator[Outcome]:
    """The rows that are timed."""
    server = Server(stack)
    for named, place in [*rows(server), *web_rows(server), *framework_rows(server)]:
        if not wanted(named.name, options.rows):
            continue
        row = named.here()
        outcome = Outcome(row.name, row.target, "us" if row.adds else "", note=row.note)

        def progress(done: int, name: str = row.name) -> None:
            screen.progress(f"{name}: round {done} of {options.rounds}")

        screen.progress(f"{row.name}: getting ready")
        try:
            with place() as names:
                outcome.figures = [report.figure(one) for one in measure(row, options.rounds, names, progress)]
        except Missing as missing:
            outcome.missing = str(missing)
        screen.row(outcome)
        yield outcome


def measured_memory(options: argparse.Namespace, screen: Screen) -> Iterator[Outcome]:
    """The rows about memory, each contender in a process of its own."""
    growth = "growth for each cycle of `db.session`, "
    table = [
        (
            "memory of an idle scope",
            300.0,
            SCOPES,
            f"{SCOPES:,} scopes, open at the same time, each in a context of its own as a request has one",
            [("dbscope", memory.idle_scope), ("a plain session", memory.idle_session)],
        ),
        (
            f"{growth}closed",
            NO_GROWTH,
            CYCLES,
            f"{CYCLES:,} scopes that use it and end",
            [("dbscope", memory.closed)],
        ),
        (
            f"{growth}forgotten",
            NO_GROWTH,
            CYCLES,
            f"{CYCLES:,} scopes that use it and never end: their context goes, as a request's does",
            [("dbscope", memory.forgotten), ("scoped_session, scopefunc", memory.forgotten_keys)],
        ),
    ]
    for name, target, count, note, contenders in table:
        if not wanted(name, options.rows):
            continue
        outcome = Outcome(name, target, "B", note=note)
        for contender, what in contenders:
            # What is never given back is known after a few; a million would take gigabytes.
            times = count if contender == "dbscope" else min(count, 50_000)
            screen.progress(f"{name}: {contender}, {times:,} times")
            found = memory.ask(what.__name__, times)
            spread = "" if "blocks" not in found else f"{found['blocks']:.2f} objects"
            outcome.figures.append(Figure(contender, "", "", found["bytes"], spread, ""))
        screen.row(outcome)
        yield outcome


if __name__ == "__main__":
    sys.exit(main())
