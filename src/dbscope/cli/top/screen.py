"""What people see: a function from a picture, and how it is viewed, to something that rich can print."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbscope.cli.top.keys import KEYS, View, place_of
from dbscope.cli.top.plain import age, clock, one_line
from dbscope.cli.top.rows import Picture, Row
from dbscope.monitor.snapshot import PoolState

__all__ = ["live"]

POOLS = 5  # that are shown, the fullest first
BAR = 20
SLOW = 5.0  # seconds idle in a transaction that somebody should look at: as the guards' budget
DETAIL = 6  # lines below the table
GAP = 2  # between columns
FOOTER = "↑↓ choose  enter all about it  s sort  / filter  o others  space stop  ? help"


def live(shown: Picture | None, rows: Sequence[Row], view: View, width: int, height: int) -> RenderableType:
    """The screen; it fits the terminal.

    Args:
        shown: what is known; None until the first look is over.
        rows: those of its rows that are asked for, in order.
        view: what is shown, and how.
        width: of the terminal.
        height: of the terminal.
    """
    if shown is None:
        return Text("dbscope top: asking...", style="dim")
    head = [*_head(shown, rows, view, width)]
    foot = _foot(view, width)
    room = height - len(head) - 2
    if view.help:
        return Group(*head, _help(), "", foot)
    chosen = rows[place_of(view, rows)] if rows else None
    if view.detail and chosen is not None:
        return Group(*head, _detail(chosen), "", foot)
    below = _below(chosen, width) if chosen is not None and room > DETAIL + 6 else []
    return Group(*head, _table(rows, view, width, room - len(below) - 1), *below, "", foot)


def _head(shown: Picture, rows: Sequence[Row], view: View, width: int) -> Iterator[RenderableType]:
    yield _line(_title(shown, view), width)
    pools = sorted(shown.pools, key=lambda pool: -(pool.out or 0) / (pool.most or 10**6))
    if pools:
        names = max(len(_pool_name(pool, shown)) for pool in pools[:POOLS])
        for pool in pools[:POOLS]:
            yield _line(_pool(pool, shown, min(names, max(20, width - BAR - 30))), width)
        if len(pools) > POOLS:
            yield Text(f"and {len(pools) - POOLS} more pools", style="dim")
    for problem in shown.problems[:2]:
        yield _line(Text(problem, style="red"), width)
    if not shown.programs:
        yield _line(Text("no process answers: run this as the user of those that you look for", style="yellow"), width)
    yield Text("")


def _title(shown: Picture, view: View) -> Text:
    at = datetime.fromtimestamp(shown.at).strftime("%H:%M:%S")
    count = f"{shown.processes} process{'' if shown.processes == 1 else 'es'}"
    title = Text.assemble(("dbscope top", "bold"), f"  {at}")
    if view.paused:
        title.append(" stopped: space goes on ", style="black on yellow")
    title.append(f"  {count}, by {view.sort}")
    if view.match:
        title.append(f", with {view.match!r}", style="cyan")
    if not view.others:
        title.append(", without others")
    if shown.server:
        title.append(f", {shown.server}", style="dim")
    return title


def _pool_name(pool: PoolState, shown: Picture) -> str:
    return f"{pool.database}  {shown.programs.get(pool.process, '')} {pool.process}"


def _pool(pool: PoolState, shown: Picture, width: int) -> Text:
    name = Text(_pool_name(pool, shown))
    name.truncate(width, overflow="ellipsis", pad=True)
    if pool.out is None:
        return Text.assemble(name, "  ", ("does not count its connections", "dim"))
    if pool.most is None:
        return Text.assemble(name, f"  {pool.out} out, no limit")
    share = pool.out / pool.most if pool.most else 1.0
    style = "red" if share >= 1 else "yellow" if share >= 0.7 else "green"
    full = min(BAR, round(share * BAR))
    line = Text.assemble(
        name,
        "  ",
        ("█" * full, style),
        ("░" * (BAR - full), "dim"),
        (f" {pool.out} of {pool.most} out", f"bold {style}" if share >= 1 else ""),
    )
    if share >= 1:
        line.append("  FULL", style="bold red")
    if pool.unnamed:
        line.append(f"  {pool.unnamed} by no session", style="yellow")
    return line


# -- the table -------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Row], view: View, width: int, room: int) -> RenderableType:
    if not rows:
        return Text("nothing is held" + (f" with {view.match!r} in it" if view.match else ""), style="dim")
    chosen = place_of(view, rows)
    room = max(1, room - 1)  # its head
    first = max(0, min(chosen - room // 2, len(rows) - room))
    seen = rows[first : first + room]
    wide, widest = width >= 110, width >= 150
    names = ("backend_start", "xact_start", "query_start", "state_change") if widest else ()
    fixed = [8, 15, *([8, 8] if wide else []), *map(len, names)]
    left = width - sum(fixed) - GAP * (len(fixed) + 3)
    line = min(max(len(row.line or "") for row in seen), max(16, left // 4), 36)
    work = min(max(len(row.whose) for row in seen), max(16, (left - line) // 2), 36)
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim")
    table.add_column("held", justify="right", no_wrap=True, width=fixed[0])
    table.add_column("state", no_wrap=True, width=fixed[1])
    table.add_column("work", no_wrap=True, overflow="ellipsis", width=max(work, 4))
    table.add_column("line", no_wrap=True, width=max(line, 4))
    if wide:
        table.add_column("process", justify="right", no_wrap=True, width=8)
        table.add_column("backend", justify="right", no_wrap=True, width=8)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, width=len(name))
    table.add_column("statement", no_wrap=True, overflow="ellipsis", width=max(9, left - max(work, 4) - max(line, 4)))
    for number, row in enumerate(seen, first):
        cells: list[RenderableType] = [age(row.age), _state(row), Text(row.whose), Text(_end(row.line or "-", line))]
        if wide:
            cells += [str(row.process or "-"), str(row.backend or "-")]
        if widest:
            cells += [clock(at) for at in (row.backend_start, row.xact_start, row.query_start, row.state_change)]
        cells.append(Text(one_line(row.statement)))
        style = "reverse" if number == chosen else "dim" if row.process is None else ""
        table.add_row(*cells, style=style)
    return table


def _end(line: str, width: int) -> str:
    """The end of a line's name, where its number is."""
    return line if len(line) <= width else "…" + line[len(line) - width + 1 :]


def _state(row: Row) -> Text:
    if row.blocked_by:
        return Text(f"waits for {row.blocked_by[0]}", style="bold red")
    if row.state.startswith("idle in transaction"):
        return Text("idle in trans.", style="" if row.process is None else "red" if row.age >= SLOW else "yellow")
    return Text(row.state, style={"active": "green"}.get(row.state, "dim"))


# -- one connection --------------------------------------------------------------------------------------------------


def _below(row: Row, width: int) -> list[RenderableType]:
    """The row that is chosen, in a few lines."""
    opened = f" (opened at {row.opened})" if row.opened else ""
    times = (
        f"backend_start {clock(row.backend_start)} xact_start {clock(row.xact_start)} "
        f"query_start {clock(row.query_start)} state_change {clock(row.state_change)}"
    )
    where = f"taken at {row.line}" if row.line else f"{row.user or 'a user'} from {row.client or 'somewhere'}"
    asked = row.xact_start or row.backend_start
    return [
        Text("─" * width, style="dim"),
        _line(Text.assemble((row.whose, "bold"), f"{opened}{f', {row.worker}' if row.worker else ''}"), width),
        _line(Text(f"{row.state} for {age(row.age)}, {where}"), width),
        _line(Text(times if asked else "PostgreSQL was not asked (--url)", style="dim"), width),
        _line(Text(one_line(row.statement), style="cyan"), width),
    ]


def _detail(row: Row) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    on_server = row.state_of_server and row.state_of_server != row.state
    facts = (
        ("work", row.whose),
        ("opened at", row.opened),
        ("thread or task", row.worker),
        ("process", f"{row.process} {row.program or ''}" if row.process else None),
        ("state", row.state + (f" (the server says: {row.state_of_server})" if on_server else "")),
        ("held for", age(row.age)),
        ("taken at", row.line),
        ("database", row.database),
        ("backend", row.backend),
        ("backend_start", _exactly(row.backend_start)),
        ("xact_start", _exactly(row.xact_start)),
        ("query_start", _exactly(row.query_start)),
        ("state_change", _exactly(row.state_change)),
        ("waits for", row.wait),
        ("blocked by", ", ".join(map(str, row.blocked_by))),
        ("user", row.user),
        ("application", row.application),
        ("client", row.client),
        ("statement", row.statement),
    )
    for name, value in facts:
        if value not in (None, ""):
            table.add_row(name, Text(str(value)))
    return table


def _exactly(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone().isoformat(sep=" ", timespec="milliseconds")


def _help() -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, does in KEYS:
        table.add_row(key, does)
    return table


def _foot(view: View, width: int) -> RenderableType:
    if view.typing is not None:
        return _line(
            Text.assemble(("/", "bold"), view.typing, ("█", "blink"), ("  enter keeps, esc drops", "dim")), width
        )
    return _line(Text(FOOTER, style="dim"), width)


def _line(text: Text, width: int) -> Text:
    """A text in one line of the terminal."""
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text
