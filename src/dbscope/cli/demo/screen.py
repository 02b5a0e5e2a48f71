"""What people see: functions from a snapshot, or an audit, to something that rich can print, or to plain lines."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dbscope.cli.demo.audit import Audit
from dbscope.cli.demo.facts import Snapshot

__all__ = ["HINT", "findings", "live", "plain", "verdict"]

FAULTS = 5  # of each promise are shown, unless all are asked for
ERRORS = 13  # names
HINT = "Who holds what, right now: dbscope top, in another terminal"


def live(facts: Snapshot) -> RenderableType:
    """The screen while the load runs; it fits 80 columns and 24 lines."""
    head = Table.grid(expand=True)
    head.add_column(no_wrap=True)
    head.add_column(justify="right", no_wrap=True)
    head.add_row(Text(facts.title, style="bold"), f"{facts.elapsed:.0f} of {facts.seconds:.0f} s")
    bar, hint = ProgressBar(total=1.0, completed=facts.done), Text(HINT, style="dim")
    return Group(head, bar, "", hint, _doors(facts), "", _state(facts))  # the "" ends the bar's line


def _doors(facts: Snapshot) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("requests", min_width=20)
    for title in ("in flight", "answered", "refused", "failed"):
        table.add_column(title, justify="right", min_width=9)
    for door in facts.doors:
        table.add_row(door.title, *map(str, (door.running, door.answered, door.refused, door.failed)))
    return table


def _state(facts: Snapshot) -> Table:
    counts = [
        ("scopes open", f"{facts.scopes}", f"of {facts.scopes_seen}"),
        ("sessions", f"{facts.sessions}", ""),
        ("connections in use", f"{facts.connections}", ""),
        ("commits", f"{facts.commits}", ""),
        ("rollbacks", f"{facts.rollbacks}", ""),
        ("clients hung up", f"{facts.hung_up}", ""),
        ("jobs done", f"{facts.jobs}", ""),
        ("receipts written", f"{facts.receipts}", ""),
    ]
    left = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    left.add_column(min_width=20)
    left.add_column(justify="right", min_width=6)
    left.add_column(style="dim")
    for row in counts:
        left.add_row(*row)
    right = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    right.add_column(min_width=24)
    right.add_column(justify="right", min_width=5)
    for name, count in _most(facts):
        right.add_row(Text(name, style="" if name.startswith("and ") else "yellow"), str(count))
    both = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    both.add_column("now")
    both.add_column("errors, by name")
    both.add_row(left, right)
    return both


def _most(facts: Snapshot) -> list[tuple[str, int]]:
    """The most frequent errors, and how many others there are."""
    found = [*facts.errors.items()]
    if len(found) <= ERRORS:
        return found
    rest = found[ERRORS - 1 :]
    return [*found[: ERRORS - 1], (f"and {len(rest)} others", sum(count for _, count in rest))]


def plain(facts: Snapshot) -> str:
    """The same as one line, for a file or a pipe."""
    return (
        f"{facts.elapsed:5.1f} s: {facts.sent} requests, {facts.commits} commits, {facts.rollbacks} rollbacks, "
        f"{facts.connections} connections in use, {sum(facts.errors.values())} errors"
    )


def findings(audit: Audit, *, every: bool = False) -> Iterator[RenderableType]:
    """The audit, from top to bottom.

    Args:
        audit: what was found.
        every: show all faults, and what each error says.
    """
    mistakes = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    mistakes.add_column("", min_width=6)
    mistakes.add_column("", justify="right")
    mistakes.add_column("a handler that...")  # what may take several lines where there is little room
    mistakes.add_column("caught", justify="right", no_wrap=True)
    mistakes.add_column("by", no_wrap=True)
    mistakes.add_column("line", justify="right", no_wrap=True)
    for mistake in audit.mistakes:
        what = str(mistake.number), mistake.mistake, f"{mistake.caught}/{mistake.sent}", mistake.by
        mistakes.add_row(_verdict(mistake.holds), *what, mistake.line.rpartition(":")[2])
    yield mistakes
    if every:
        for mistake in audit.mistakes:
            yield Text.assemble("\n", (mistake.by, "bold"), f" {mistake.example}")
    yield ""
    checks = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    checks.add_column(min_width=6)
    checks.add_column()
    checks.add_column(style="dim")
    for check in audit.checks:
        checks.add_row(_verdict(not check.faults), check.promise, check.checked)
    yield checks
    for check in audit.checks:
        if check.faults:
            yield ""
            yield Text(f"{check.promise}: {len(check.faults)} times not", style="bold")
            shown = check.faults if every else check.faults[:FAULTS]
            yield from (Text(f"  {fault}") for fault in shown)
            if len(shown) < len(check.faults):
                yield Text(f"  and {len(check.faults) - len(shown)} more", style="dim")


def _verdict(holds: bool) -> Text:
    return Text("ok", style="green") if holds else Text("FAILED", style="bold red")


def verdict(facts: Snapshot, audit: Audit) -> RenderableType:
    """The last line."""
    what = f"{facts.sent} requests in {facts.elapsed:.1f} s, {facts.commits} commits"
    if audit.holds:
        return Text.assemble("\n", ("The books hold.", "bold green"), f" {what}.")
    return Text.assemble("\n", ("The books do NOT hold.", "bold red"), f" {what}.")
