"""Rows to lines, for pipes and scripts: nothing is cut off, and no column's width depends on a terminal."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from dbscope.cli.top.rows import Picture, Row

__all__ = ["age", "clock", "lines", "one_line"]

HEADS = (
    *("AGE", "STATE", "PROCESS", "BACKEND", "BACKEND_START", "XACT_START", "QUERY_START", "STATE_CHANGE"),
    *("SCOPE", "LINE", "STATEMENT"),
)


def lines(shown: Picture, rows: Sequence[Row]) -> Iterator[str]:
    """The pools, the connections, and who did not answer."""
    pools = [
        (
            pool.database,
            f"{pool.process} {shown.programs.get(pool.process, '')}".strip(),
            "-" if pool.out is None else str(pool.out),
            "-" if pool.most is None else str(pool.most),
        )
        for pool in shown.pools
    ]
    if pools:
        yield from _table(("POOL", "PROCESS", "OUT", "OF"), pools)
        yield ""
    yield from _table(HEADS, [_cells(row) for row in rows])
    if not rows:
        yield f"nothing of what was asked for is held; others: {len(shown.rows)}" if shown.rows else "nothing is held"
    for pool in shown.pools:
        if pool.unnamed:
            yield f"{pool.database}, process {pool.process}: {pool.unnamed} more taken from the engine, by no session"


def _cells(row: Row) -> tuple[str, ...]:
    state = row.state + (f", blocked by {', '.join(map(str, row.blocked_by))}" if row.blocked_by else "")
    whose = "-" if row.process is None else f"{row.process} {row.program or ''}".strip()
    starts = (row.backend_start, row.xact_start, row.query_start, row.state_change)
    return (
        age(row.age),
        state,
        whose,
        str(row.backend or "-"),
        *map(clock, starts),
        row.whose,
        row.line or "-",
        one_line(row.statement),
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def one_line(statement: str | None) -> str:
    """A statement without its line breaks."""
    return " ".join((statement or "").split()) or "-"


def clock(at: datetime | None) -> str:
    """A time of today as that, another with its date."""
    if at is None:
        return "-"
    local = at.astimezone()
    return local.strftime("%H:%M:%S" if local.date() == datetime.now().date() else "%Y-%m-%d %H:%M:%S")


def age(seconds: float) -> str:
    """A duration in as few characters as say it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} m"
