"""What is joined with what, sorted and filtered; and what never reaches a terminal."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import make_url

from dbscope.cli.top import plain
from dbscope.cli.top.arguments import SORTS as CHOICES
from dbscope.cli.top.rows import SORTS, Row, arranged, picture
from dbscope.monitor.activity import Backend, without_literals
from dbscope.monitor.client import Answer
from dbscope.monitor.snapshot import Holding, PoolState

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
HOLDING = Holding(
    database="shop",
    scope="GET /orders",
    opened="web.py:1",
    worker="thread 'x'",
    state="idle in transaction",
    taken="orders.py:88",
    age=8.0,
    statement="SELECT %(id)s",
    backend=7,
    process=1,
)
POOL = PoolState(
    database="shop", dialect="postgresql", host="db", port=None, catalog="shop", out=1, most=5, unnamed=0, process=1
)
BACKEND = Backend(
    pid=7,
    datname="shop",
    usename="app",
    application_name="",
    client="10.0.0.1:5",
    state="idle in transaction",
    backend_start=NOW - timedelta(hours=1),
    xact_start=NOW - timedelta(seconds=8),
    query_start=NOW,
    state_change=NOW,
    wait="Client ClientRead",
    blocked_by=(),
    query="SELECT 17",
    now=NOW,
)


def joined(pool: PoolState = POOL, backend: Backend = BACKEND, url: str = "postgresql://db/shop") -> list[Row]:
    """The rows of one process with one holding, and of one backend."""
    answer = Answer(1, "gunicorn", 0.0, pools=(pool,), holdings=(HOLDING,))
    return list(picture([answer], [backend], make_url(url)).rows)


def test_one_connection_is_one_row() -> None:
    """The process's own words, and the server's times."""
    (row,) = joined()
    assert (row.scope, row.xact_start, row.statement) == ("GET /orders", BACKEND.xact_start, "SELECT %(id)s")


@pytest.mark.parametrize(
    ("pool", "url"),
    [
        ({}, "postgresql://db:5432/shop"),
        ({"port": 5432}, "postgresql://db/shop"),
        ({"host": None}, "postgresql://db/shop"),
        ({"host": "/run/postgresql"}, "postgresql://db/shop"),
        ({"host": "127.0.0.1"}, "postgresql://localhost/shop"),
        ({}, "postgresql://db/another"),  # the server tells of all its databases
    ],
)
def test_the_same_server_by_another_name(pool: dict[str, Any], url: str) -> None:
    """A server of this machine has many addresses, and the port may be left out."""
    assert len(joined(replace(POOL, **pool), url=url)) == 1


@pytest.mark.parametrize(
    ("pool", "backend"),
    [
        ({"port": 6432}, {}),  # a pooler is between: the driver was told a number of the pooler's
        ({"catalog": "another"}, {}),
        ({"host": "192.0.2.1"}, {}),
        ({"dialect": "mysql"}, {}),
        ({}, {"pid": 8}),
    ],
)
def test_another_server_s_numbers_are_not_taken_for_these(pool: dict[str, Any], backend: dict[str, Any]) -> None:
    """Two servers may have processes of the same number."""
    url = "postgresql://192.0.2.2/shop" if "host" in pool else "postgresql://db/shop"
    own, other = joined(replace(POOL, **pool), replace(BACKEND, **backend), url)
    assert (own.xact_start, other.process) == (None, None)


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("SELECT 'a''b', 4.5e3, .5, 0xff", "SELECT ?, ?, ?, ?"),
        (r"SELECT E'it\'s' || e'', 'x", "SELECT ? || ?, ?"),
        ("SELECT $$ secret 'x' $$, $t$ secret $$ $t$, $1", "SELECT ?, ?, $1"),
        (
            'SELECT "Col 1", t1.c2 FROM t_3 -- 42 secret\nWHERE /* 17 */ x=-1',
            'SELECT "Col 1", t1.c2 FROM t_3  \nWHERE   x=-?',
        ),
        ("ALTER ROLE x PASSWORD 'swordfish", "ALTER ROLE x PASSWORD ?"),
    ],
)
def test_values_in_the_statements_of_others_are_left_out(query: str, shown: str) -> None:
    """Drivers that put parameters into the text send them as literals; a text that is cut off has no closing quote."""
    assert without_literals(query) == shown


def test_what_a_terminal_would_obey_is_left_out() -> None:
    """A scope's name may come from a request's path, an application's name from whoever connects."""
    evil = "a\x1b]0;title\x07\x1b[2J\r\nb\u202e\x9b"
    answer = Answer(1, evil, 0.0, (replace(POOL, database=evil),), (replace(HOLDING, scope=evil, database=evil),))
    shown = picture(
        [answer, Answer(2, "", 0.0, problem=evil)],
        [replace(BACKEND, application_name=evil)],
        make_url("postgresql://db/x"),
    )
    for text in (*plain.lines(shown, shown.rows), *shown.problems):
        assert not set(text) & set("\x1b\x07\r\n\u202e\x9b"), text


def test_every_sort_can_be_asked_for() -> None:
    """The command line offers what there is."""
    assert tuple(SORTS) == CHOICES


def test_sorting_and_filtering() -> None:
    """What is held longest is on top, the connections of others below; all words have to be found, wherever."""
    rows = [
        Row(state="active", age=9.0, database="shop", process=1, scope="b"),
        Row(state="idle in transaction", age=3.0, database="shop", process=2, scope="a", line="x.py:3"),
        Row(state="idle", age=99.0, database="shop", application="psql"),
    ]
    assert [row.age for row in arranged(rows)] == [9.0, 3.0, 99.0]
    assert [row.age for row in arranged(rows, sort="state")] == [3.0, 9.0, 99.0]
    assert [row.age for row in arranged(rows, sort="scope")] == [3.0, 9.0, 99.0]
    assert [row.age for row in arranged(rows, others=False)] == [9.0, 3.0]
    assert [row.age for row in arranged(rows, match="IDLE x.py")] == [3.0]
    assert [row.age for row in arranged(rows, match="psql")] == [99.0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (99.94, "99.9 s"), (100, "1:40 m"), (3600, "1:00:00 h"), (90061, "25:01:01 h")],
)
def test_ages(seconds: float, shown: str) -> None:
    """In as few characters as say it."""
    assert plain.age(seconds) == shown
