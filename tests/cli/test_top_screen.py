"""What a key does, and what is shown, as text."""

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support import needs

needs.module("rich", extra="top")

from rich.console import Console  # noqa: E402  # not before it is known to be there

from dbscope.cli.top.keys import KEYS, View, keys_of, press  # noqa: E402
from dbscope.cli.top.rows import SORTS, Picture, Row  # noqa: E402
from dbscope.cli.top.screen import live  # noqa: E402
from dbscope.monitor.snapshot import PoolState  # noqa: E402

AT = datetime(2026, 1, 2, 12, 30, 45, tzinfo=UTC)
ROW = Row(
    state="idle in transaction",
    age=8.0,
    database="shop",
    process=4711,
    program="gunicorn",
    worker="thread 'x'",
    scope="POST /orders",
    opened="web.py:1",
    line="a/long/way/to/the/orders.py:88",
    statement="UPDATE account\n   SET balance = 0",
    backend=77,
    backend_start=AT,
    xact_start=AT,
    query_start=AT,
    state_change=AT,
)
WAITS = replace(ROW, state="active", blocked_by=(77,), backend=78, scope="POST /waits", line="orders.py:99", age=3.0)
OTHER = Row(state="idle", age=99.0, database="shop", backend=5, application="psql", user="alice", client="10.0.0.9:1")
ROWS = [ROW, WAITS, OTHER]
POOL = PoolState(
    database="shop", dialect="postgresql", host="h", port=None, catalog="shop", out=5, most=5, unnamed=2, process=4711
)
PICTURE = Picture(
    at=AT.timestamp(), rows=tuple(ROWS), pools=(POOL,), programs={4711: "gunicorn"}, server="h:5432/shop", problems=()
)


def shown(
    view: View | None = None, rows: Any = None, picture: Any = PICTURE, width: int = 120, height: int = 30
) -> str:
    """The screen, without colours."""
    console = Console(file=io.StringIO(), width=width, height=height, legacy_windows=False)
    console.print(live(picture, ROWS if rows is None else rows, view or View(), width, height))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_full_pool_and_its_holders_are_seen_first() -> None:
    """In the first lines: which pool is full, of which process; then who holds it, longest first."""
    lines = shown().splitlines()
    assert "1 process, by held, h:5432/shop" in lines[0]
    assert " ".join(lines[1].split()) == f"shop gunicorn 4711 {'█' * 20} 5 of 5 out FULL 2 by no session"
    head, first, second, third = lines[3:7]
    assert head.split() == ["held", "state", "work", "line", "process", "backend", "statement"]
    assert " ".join(first.split()).startswith("8.0 s idle in trans. POST /orders")
    assert "waits for 77" in second
    assert "(psql)" in third


@pytest.mark.parametrize(("width", "height"), [(60, 12), (80, 24), (120, 40), (200, 50)])
@pytest.mark.parametrize("view", [View(), View(detail=True), View(help=True), View(typing="pay", match="pay")])
def test_it_fits_the_terminal(width: int, height: int, view: View) -> None:
    """However many rows there are, nothing is wrapped, and the last line is that of the keys."""
    many = [replace(ROW, backend=number) for number in range(100)]
    lines = shown(view, many, width=width, height=height).splitlines()
    assert max(map(len, lines)) <= width
    if not (view.detail or view.help) or height >= 24:
        assert len(lines) <= height


def test_the_line_s_number_is_never_cut_off() -> None:
    """What is left out of a long path is its beginning."""
    assert "orders.py:88" in shown(width=80)


def test_a_wide_terminal_has_statement_33_s_columns() -> None:
    """backend_start, xact_start, query_start, state_change; a narrow one has them below, for the row that is chosen."""
    for width in (200, 120):
        text = shown(width=width)
        for name in ("backend_start", "xact_start", "query_start", "state_change"):
            assert name in text


def test_the_detail_view_has_everything() -> None:
    """Of the row that is chosen: of a foreign one what its server tells."""
    text = shown(View(detail=True))
    for word in (
        "thread 'x'",
        "web.py:1",
        "4711 gunicorn",
        "UPDATE account",
        "77",
        "2026-01-02",
        "idle in transaction",
    ):
        assert word in text
    text = shown(View(detail=True, chosen=OTHER.key))
    for word in ("alice", "psql", "10.0.0.9:1"):
        assert word in text


def test_what_is_missing_is_said() -> None:
    """Before the first answer, with nothing held, with nobody there, and where somebody does not answer."""
    assert "asking" in shown(picture=None)
    assert "nothing is held" in shown(rows=[])
    assert "no process answers" in shown(picture=replace(PICTURE, programs={}, pools=()))
    assert "process 3: no answer" in shown(picture=replace(PICTURE, problems=("process 3: no answer",)))
    assert "does not count" in shown(picture=replace(PICTURE, pools=(replace(POOL, out=None, most=None),)))
    assert "5 out, no limit" in shown(picture=replace(PICTURE, pools=(replace(POOL, most=None),)))


def after(*keys: str, view: View | None = None) -> View:
    """The view after these keys."""
    view = view or View()
    for key in keys:
        view = press(view, key, ROWS)
    return view


def test_keys_choose_a_row_which_stays_chosen() -> None:
    """Although others come and go around it; the ends are the ends."""
    assert after("down").chosen == after("j").chosen == WAITS.key
    assert after("down", "down", "down", "down").chosen == after("end").chosen == OTHER.key
    assert after("end", "home").chosen == after("up").chosen == after("k").chosen == ROW.key
    assert press(after("down"), "down", [replace(ROW, backend=1), *ROWS]).chosen == OTHER.key
    assert press(View(chosen=OTHER.key), "down", [ROW]).chosen == ROW.key
    assert press(View(), "down", []).chosen is None


def test_keys_sort_filter_stop_and_end() -> None:
    """Each key does what the help says."""
    sorts = [after(*["s"] * number).sort for number in range(len(SORTS) + 1)]
    assert sorts == [*SORTS, next(iter(SORTS))]
    assert after(" ").paused
    assert not after(" ", " ").paused
    assert not after("o").others
    assert after("enter").detail
    assert not after("enter", "esc").detail
    assert after("?").help
    assert not after("?", "x").help
    assert after("q").ended
    assert after("x") == View()


def test_a_filter_is_typed() -> None:
    """It works while it is typed, keys are letters then, and Esc drops it."""
    typing = after("/", *"qs x")
    assert (typing.typing, typing.match, typing.ended) == ("qs x", "qs x", False)
    assert after("/", *"pay", "backspace", "enter") == View(match="pa")
    assert after("/", *"pay", "esc") == View()
    assert after("/", *"pay", "enter", "esc") == View()
    assert after("/", *"pay", "enter", "/").typing == "pay"


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("jq", ["j", "q"]),
        ("\x1b[A\x1b[B\x1bOA", ["up", "down", "up"]),
        ("\x1b[5~\x1b[6~\x1b[H", ["pageup", "pagedown", "home"]),
        ("\x1b", ["esc"]),
        ("\r\x7f\x04", ["enter", "backspace", "q"]),
        ("\x1b[15~\x1b[1;5Cx", ["x"]),
        ("ä", ["ä"]),
    ],
)
def test_what_a_terminal_sends(typed: str, keys: list[str]) -> None:
    """Keys with sequences of their own, and those that nobody needs."""
    assert keys_of(typed) == keys


def test_every_key_is_in_the_help() -> None:
    """The screen lists them."""
    text = shown(View(help=True))
    for key, _ in KEYS:
        assert key in text
