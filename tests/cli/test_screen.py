"""The screen, as text."""

import io
from dataclasses import replace

import pytest

from tests.support import needs

needs.module("greenlet", extra="async")
for name in ("httpx", "uvicorn", "waitress", "rich"):
    needs.module(name, extra="demo")

from rich.console import Console  # noqa: E402  # not before it is known to be there

from dbscope.cli.demo import screen  # noqa: E402
from dbscope.cli.demo.audit import Audit, Caught, Check  # noqa: E402
from dbscope.cli.demo.facts import DoorFacts, Snapshot  # noqa: E402

FACTS = Snapshot(
    title="dbscope demo on sqlite, 12 clients",
    done=0.5,
    elapsed=7.4,
    seconds=15.0,
    sent=1234,
    hung_up=56,
    doors=(DoorFacts("ASGI, on the loop", 3, 400, 2, 50), DoorFacts("WSGI, in threads", 4, 410, 0, 60)),
    jobs=7,
    receipts=800,
    scopes=8,
    scopes_seen=2345,
    sessions=6,
    connections=5,
    commits=900,
    rollbacks=300,
    errors={"OverlapError": 12, "ScopeEndedError": 9},
)
MANY = {f"Error{number}": 100 - number for number in range(30)}


def shown(thing, width: int = 80) -> list[str]:
    """What a terminal of this width shows, without colours."""
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(thing)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_live_table():
    """It shows the progress, each door, what is open now, and the errors by name."""
    lines = shown(screen.live(FACTS))
    assert lines[0] == "dbscope demo on sqlite, 12 clients" + "7 of 15 s".rjust(46)
    assert lines[2] == "Who holds what, right now: dbscope top, in another terminal"
    text = "\n".join(" ".join(line.split()) for line in lines)
    for line in (
        "ASGI, on the loop 3 400 2 50",
        "WSGI, in threads 4 410 0 60",
        "scopes open 8 of 2345 OverlapError 12",
        "sessions 6 ScopeEndedError 9",
        "connections in use 5",
        "commits 900",
        "rollbacks 300",
        "clients hung up 56",
    ):
        assert line in text


def test_the_live_table_fits_a_small_terminal():
    """However many kinds of errors there are, it fits 80 columns and 24 lines; the rare ones are summed up."""
    doors = tuple(DoorFacts("ASGI, in threads", 100, 999_999, 99_999, 99_999) for _ in range(3))
    lines = shown(screen.live(replace(FACTS, doors=doors, errors=MANY, commits=9_999_999, scopes_seen=9_999_999)))
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert "and 18 others" in "\n".join(lines)


def test_the_plain_line():
    """A pipe gets the same in one line."""
    assert screen.plain(FACTS) == (
        "  7.4 s: 1234 requests, 900 commits, 300 rollbacks, 5 connections in use, 21 errors"
    )


HELD = Audit(
    checks=(Check("connections are given back", "3 pools", ()),),
    mistakes=(
        Caught(40, "forgets to commit", "UncommittedWritesError", 3, 3, line="misbehaviour.py:389"),
        Caught(4, "waits in a transaction", "idle_in_transaction", 2, 2, line="misbehaviour.py:97"),
    ),
)
FAILED = Audit(
    checks=(Check("connections are given back", "3 pools", tuple(f"fault {number}" for number in range(8))),),
    mistakes=(Caught(40, "forgets to commit", "UncommittedWritesError", 3, 2, "scope 'x' ended"),),
)


def audited(audit: Audit, **options: bool) -> str:
    """The audit as a pipe gets it."""
    return "\n".join(" ".join(line.split()) for part in screen.findings(audit, **options) for line in shown(part))


def test_an_audit_that_holds():
    """Each promise and each mistake has a line that says ok."""
    text = audited(HELD)
    assert "ok 40 forgets to commit 3/3 UncommittedWritesError 389" in text
    assert "ok 4 waits in a transaction 2/2 idle_in_transaction 97" in text
    assert "ok connections are given back 3 pools" in text
    assert "FAILED" not in text
    assert "The books hold. 1234 requests in 7.4 s" in "\n".join(shown(screen.verdict(FACTS, HELD)))


def test_a_narrow_audit_still_names_what_caught_a_mistake():
    """The sentence takes more lines; the name of the error or guard is what one looks for."""
    lines = [line for part in screen.findings(HELD) for line in shown(part, width=60)]
    assert max(map(len, lines)) <= 60
    assert any("UncommittedWritesError" in line and line.endswith("389") for line in lines)
    assert any("idle_in_transaction" in line for line in lines)


def test_an_audit_that_fails():
    """What does not hold says FAILED, and the first faults are listed; all of them where asked for."""
    text = audited(FAILED)
    assert "FAILED 40 forgets to commit 2/3 UncommittedWritesError" in text
    assert "FAILED connections are given back 3 pools" in text
    assert "connections are given back: 8 times not" in text
    assert "fault 4\nand 3 more" in text
    assert "fault 7" in audited(FAILED, every=True)
    assert "UncommittedWritesError scope 'x' ended" in audited(FAILED, every=True)
    assert "The books do NOT hold." in "\n".join(shown(screen.verdict(FACTS, FAILED)))


@pytest.mark.parametrize("sent", [0, 3])
def test_a_mistake_has_to_be_made_to_count_as_caught(sent):
    """An audit in which a mistake was never made does not hold."""
    assert replace(HELD, mistakes=(Caught(40, "", "", sent, sent),)).holds is (sent > 0)
