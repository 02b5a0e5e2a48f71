"""The audit: whatever disagrees, it says so."""

from dataclasses import replace

import pytest

from tests.support import needs

needs.module("greenlet", extra="async")
for name in ("httpx", "uvicorn", "waitress", "rich"):
    needs.module(name, extra="demo")

from dbscope.cli.demo.audit import Books, audit  # noqa: E402  # not before its packages are known to be there
from dbscope.cli.demo.books import ACCOUNTS, OPENING, Order  # noqa: E402
from dbscope.cli.demo.load import Sent  # noqa: E402
from dbscope.cli.demo.log import Answer  # noqa: E402
from dbscope.cli.demo.misbehaviour import MISBEHAVIOURS  # noqa: E402
from dbscope.guards import Found  # noqa: E402

BALANCES = {**dict.fromkeys(ACCOUNTS, OPENING), "A01": OPENING - 500, "A02": OPENING + 500 + 70}
TRANSFER, JOB, HUNG_UP = Order("r1", "A01", "A02", 500), Order("r2", None, "A02", 70), Order("r3", "A01", None, 1)
BOOKS = Books(
    balances=BALANCES,
    payments={"r1": TRANSFER, "r2": JOB},
    entries=[("r1", "A01", -500), ("r1", "A02", 500), ("r2", "A02", 70)],
    receipts=frozenset(["r1", "r2"]),
    jobs={"r2": "done"},
)
LINES = tuple(f"{account},{balance},{balance - OPENING}" for account, balance in BALANCES.items())
SENT = [
    Sent("r1", "wsgi", "pay", TRANSFER, status=201, body={}),
    Sent("r2", "sync", "job", JOB, status=202, body={}),
    Sent("r3", "async", "pay", HUNG_UP, hangs_up=True),
    Sent("r4", "async", "report", status=200, lines=LINES),
]
ANSWERS = {
    "r1": Answer("r1", "wsgi", 201, ended=True),
    "r2": Answer("r2", "sync", 202, ended=True),
    "r3": Answer("r3", "async", 409, ended=True),
    "r4": Answer("r4", "async", 200, ended=True),
}


def faults(books=BOOKS, sent=SENT, answers=ANSWERS, held=None, scopes=()) -> list[str]:
    """What the audit complains about."""
    found = audit(books, sent, answers, held or {"sync": 0}, scopes)
    return [f"{check.promise}: {fault}" for check in found.checks for fault in check.faults]


def test_what_agrees_passes():
    """Books, clients and servers that agree have no fault."""
    assert faults() == []


def books(**changes):
    """The books, with some of them changed."""
    return {"books": replace(BOOKS, **changes)}


def sent(number: int, **changes):
    """What the clients know, with one request changed."""
    return {"sent": [replace(one, **changes) if at == number else one for at, one in enumerate(SENT, 1)]}


def answered(id: str, **changes):
    """What the server says, with one answer changed."""
    return {"answers": {**ANSWERS, id: replace(ANSWERS[id], **changes)}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (books(balances={**BALANCES, "A03": OPENING + 1}), "A03 has 1000.01, its ledger says 1000.00"),
        (books(balances={**BALANCES, "A03": -1}), "A03 is overdrawn: -0.01"),
        (books(balances={**BALANCES, "A03": OPENING + 1}), "the bank holds 13000.71; opened with, paid in and out"),
        (books(entries=BOOKS.entries[:1]), "r1 should move A01 -5.00, A02 5.00; the ledger says A01 -5.00"),
        (books(entries=[*BOOKS.entries, ("r9", "A05", 1)]), "r9 has entries in the ledger, but there is no such"),
        (books(payments={"r2": JOB}), "r1 (pay) was answered 201, and is not saved: LOST 5.00"),
        (books(payments={**BOOKS.payments, "r1": replace(TRANSFER, amount=7)}), "r1 (pay) is saved as"),
        (books(payments={**BOOKS.payments, "r3": HUNG_UP}), "r3 (pay) was answered 409, and is saved all the same"),
        (books(payments={**BOOKS.payments, "r9": HUNG_UP}), "r9 is saved, and nobody asked for it"),
        (answered("r3", status=201), "r3 (pay) was answered 201, and is not saved: LOST 0.01"),
        (sent(1, status=500, body={"error": "X"}), "r1 (pay) was answered 500, and is saved all the same"),
        (sent(1, status=500, body={"error": "X"}), "r1 (pay) was answered 500; the server says 201"),
        (sent(1, status=None, failure="reset"), "r1 (pay) got no answer: reset"),
        ({"answers": {k: v for k, v in ANSWERS.items() if k != "r1"}}, "and the server does not know it"),
        ({"answers": {**ANSWERS, "r9": ANSWERS["r1"]}}, "r9 was answered, and no client sent it"),
        (answered("r4", ended=False), "r4 (report) is still being worked on"),
        (answered("r4", errors=["KeyError"]), "r4 (report) failed with KeyError"),
        (sent(4, cut=True), "r4 (report) was cut short"),
        (sent(4, lines=(*LINES[:-1], "A12,100000,5")), "r4: A12 had 1000.00, its ledger said 1000.05"),
        (sent(4, lines=LINES[:-1]), "r4: a report of 12 accounts instead of 13"),
        (books(receipts=frozenset(["r2"])), "r1 is saved, and has no receipt"),
        (books(receipts=frozenset(["r1", "r2", "r3"])), "r3 has a receipt, and is not saved"),
        (books(jobs={}), "r2: asking for the job was answered 202, and its state is None"),
        (books(jobs={"r2": "waiting"}), "r2: nobody has done the job"),
        (books(jobs={"r2": "failed: KeyError"}), "r2: the job is failed: KeyError, and its payment is saved"),
        ({"held": {"sync": 2}}, "2 connections of the pool 'sync' were never given back"),
        ({"scopes": ["<scope 'x': open>"]}, "<scope 'x': open>"),
    ],
)
def test_what_disagrees_is_found(changes, expected):
    """Whatever one side says alone is a fault, and names the request, the account or the pool."""
    assert any(expected in fault for fault in faults(**changes)), faults(**changes)


@pytest.mark.parametrize(
    ("errors", "body", "late", "caught"),
    [
        (["OverlapError"], {"error": "OverlapError"}, False, 1),
        (["OverlapError"], {"error": "OtherError"}, False, 0),  # the client was told something else
        (["OtherError"], {"error": "OtherError"}, False, 0),
        ([], {}, False, 0),
        (["ScopeEndedError"], None, True, 1),  # after the response had started: only the server can know
        ([], None, True, 0),
    ],
)
def test_a_mistake_is_caught_by_its_name(errors, body, late, caught):
    """A mistake counts as caught if its error is the one that was to be raised, and the client was told so in time."""
    made = next(m for m in MISBEHAVIOURS if m.late is late and m.by in ("OverlapError", "ScopeEndedError"))
    one = Sent("r1", "async", made.name, misbehaviour=made, status=200 if late else 500, body=body)
    answer = Answer("r1", "async", one.status, errors=errors, ended=True)
    found = audit(BOOKS, [one], {"r1": answer}, {}, ())
    assert [m.caught for m in found.mistakes if m.sent] == [caught]
    assert not found.holds


IDLE = next(misbehaviour for misbehaviour in MISBEHAVIOURS if misbehaviour.guard == "idle_in_transaction")
LINE = min(IDLE.lines) + 3


@pytest.mark.parametrize(
    ("guard", "line", "caught"),
    [
        ("idle_in_transaction", f"misbehaviour.py:{LINE}", 1),
        ("idle_in_transaction", "misbehaviour.py:1", 0),
        ("idle_in_transaction", f"endpoints.py:{LINE}", 0),
        ("long_transaction", f"misbehaviour.py:{LINE}", 0),
        (None, "", 0),
    ],
)
def test_a_mistake_is_caught_by_its_guard_and_line(guard, line, caught):
    """One that raises nothing counts as caught if its guard names a line of its handler."""
    findings = [Found(guard=guard, message=f"scope 'x', taken at src/{line} 2 s ago")] if guard else []
    one = Sent("r1", "sync", IDLE.name, misbehaviour=IDLE, status=200, body={})
    found = audit(BOOKS, [one], {"r1": Answer("r1", "sync", 200, ended=True)}, {}, (), findings)
    row = next(mistake for mistake in found.mistakes if mistake.sent)
    assert (row.by, row.caught) == ("idle_in_transaction", caught)
    assert row.line == (line if caught else "")
