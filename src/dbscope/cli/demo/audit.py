"""The audit: what each client was told, what the server says, and what the database holds have to agree.

It believes nobody. The database is read with a plain SQLAlchemy session on an engine of its own.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, create_engine, select
from sqlalchemy.orm import Session

from dbscope.cli.demo.books import ACCOUNTS, OPENING, Account, Entry, Job, Order, Payment, Receipt
from dbscope.cli.demo.doors import DRY
from dbscope.cli.demo.load import Sent
from dbscope.cli.demo.log import Answer, named_lines
from dbscope.cli.demo.misbehaviour import MISBEHAVIOURS, Misbehaviour
from dbscope.guards import Found

__all__ = ["Audit", "Books", "Caught", "Check", "audit", "read_books"]


@dataclass(frozen=True)
class Books:
    """What the database holds."""

    balances: Mapping[str, int]
    payments: Mapping[str, Order]
    entries: Sequence[tuple[str, str, int]]  # payment, account, amount
    receipts: frozenset[str]
    jobs: Mapping[str, str]  # the state of each


@dataclass(frozen=True)
class Check:
    """One promise, what it was checked on, and what breaks it."""

    promise: str
    checked: str
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Caught:
    """How often a mistake was made, and how often it was caught by its name."""

    number: int
    mistake: str
    by: str
    sent: int
    caught: int
    example: str = ""  # what one of the errors, or the guard, says
    line: str = ""  # of the handler

    @property
    def holds(self) -> bool:
        """Whether it was made, and caught each time."""
        return self.sent > 0 and self.sent == self.caught


@dataclass(frozen=True)
class Audit:
    """What was found."""

    checks: tuple[Check, ...]
    mistakes: tuple[Caught, ...]

    @property
    def holds(self) -> bool:
        """Whether everything is as promised."""
        return all(mistake.holds for mistake in self.mistakes) and not any(check.faults for check in self.checks)


def read_books(url: URL) -> Books:
    """Everything that the database holds, read by other means than the bank's own."""
    engine = create_engine(url)
    try:
        with Session(engine) as session:
            payments = session.scalars(select(Payment).order_by(Payment.id)).all()
            return Books(
                balances={account.id: account.balance for account in session.scalars(select(Account))},
                payments={p.id: Order(p.id, p.payer, p.payee, p.amount) for p in payments},
                entries=[(e.payment, e.account, e.amount) for e in session.scalars(select(Entry))],
                receipts=frozenset(session.scalars(select(Receipt.payment))),
                jobs={job.id: job.state for job in session.scalars(select(Job))},
            )
    finally:
        engine.dispose()


def audit(
    books: Books,
    sent: Sequence[Sent],
    answers: Mapping[str, Answer],
    held: Mapping[str, int],
    scopes: Sequence[Any],
    findings: Sequence[Found] = (),
) -> Audit:
    """Compare everything with everything.

    Args:
        books: what the database holds.
        sent: what the clients know.
        answers: what the server says.
        held: by pool, the connections that nobody gave back.
        scopes: those that are still open.
        findings: what the guards have found.
    """
    orders = sum(one.order is not None for one in sent)
    booked = sum(one.status == 201 for one in sent)
    told = sum(one.status is not None for one in sent)
    checks = (
        _check("balances equal the ledger, to the cent", f"{len(books.entries)} entries", _balances(books)),
        _check("payments are booked whole, and once", f"{len(books.payments)} payments", _payments(books)),
        _check("what was confirmed is saved", f"{booked} confirmed", _lost(books, sent, answers)),
        _check("what was not confirmed is not saved", f"{orders - booked} others", _unasked(books, sent, answers)),
        _check("server and clients tell the same", f"{told} answers", _same(sent, answers)),
        _check("what is meant to work works", f"{len(sent) - _mistakes(sent)} requests", _failed(sent, answers)),
        _check("reports and overviews are never torn", f"{_reports(sent)} answers", _torn(sent)),
        _check("receipts follow commits, and only those", f"{len(books.receipts)} receipts", _receipts(books)),
        _check("jobs are done, or say why not", f"{len(books.jobs)} jobs", _jobs(books, sent)),
        _check("connections are given back", f"{len(held)} pools", _held(held)),
        _check("no scope is left open", "all of the process", (f"{work!r}" for work in scopes)),
    )
    return Audit(checks, tuple(_caught(m, sent, answers, findings) for m in MISBEHAVIOURS))


def _check(promise: str, checked: str, faults: Iterable[str]) -> Check:
    return Check(promise, checked, tuple(faults))


def money(cents: int) -> str:
    """An amount for people."""
    sign = "-" if cents < 0 else ""
    return f"{sign}{abs(cents) // 100}.{abs(cents) % 100:02}"


# -- one promise each --------------------------------------------------------------------------------------------


def _balances(books: Books) -> Iterator[str]:
    ledger = dict.fromkeys(ACCOUNTS, OPENING)
    for _, account, amount in books.entries:
        ledger[account] += amount
    for account, balance in books.balances.items():
        if balance != ledger[account]:
            yield f"{account} has {money(balance)}, its ledger says {money(ledger[account])}"
        if balance < 0:
            yield f"{account} is overdrawn: {money(balance)}"
    flow = sum(sum(order.moves.values()) for order in books.payments.values())
    have, should = sum(books.balances.values()), OPENING * len(ACCOUNTS) + flow
    if have != should:
        yield f"the bank holds {money(have)}; opened with, paid in and out is {money(should)}"


def _payments(books: Books) -> Iterator[str]:
    moved: dict[str, Counter[str]] = defaultdict(Counter)
    for payment, account, amount in books.entries:
        moved[payment][account] += amount
    for id in sorted(moved.keys() - books.payments.keys()):
        yield f"{id} has entries in the ledger, but there is no such payment"
    for id, order in books.payments.items():
        if dict(moved[id]) != order.moves:
            yield f"{id} should move {_moves(order.moves)}; the ledger says {_moves(moved[id])}"


def _moves(moves: Mapping[str, int]) -> str:
    return ", ".join(f"{account} {money(amount)}" for account, amount in moves.items()) or "nothing"


def _answer(one: Sent, answers: Mapping[str, Answer]) -> int | None:
    """The status of a request; where its client hung up nobody was told, and it is the server that has to be right."""
    if not one.hangs_up:
        return one.status
    answer = answers.get(one.id)
    return None if answer is None else answer.status


def _lost(books: Books, sent: Sequence[Sent], answers: Mapping[str, Answer]) -> Iterator[str]:
    for one in sent:
        saved = books.payments.get(one.id)
        if one.order is None or _answer(one, answers) != 201:
            continue
        if saved is None:
            yield f"{one.id} ({one.name}) was answered 201, and is not saved: LOST {money(one.order.amount)}"
        elif saved != one.order:
            yield f"{one.id} ({one.name}) is saved as {saved}, not as {one.order}"


def _unasked(books: Books, sent: Sequence[Sent], answers: Mapping[str, Answer]) -> Iterator[str]:
    by_id = {one.id: one for one in sent}
    for id in books.payments:
        one = by_id.get(id)
        if one is None:
            yield f"{id} is saved, and nobody asked for it"
        elif one.name != "job" and (status := _answer(one, answers)) != 201:
            yield f"{id} ({one.name}) was answered {status or 'nothing'}, and is saved all the same"


def _same(sent: Sequence[Sent], answers: Mapping[str, Answer]) -> Iterator[str]:
    known = {one.id for one in sent}
    for one in sent:
        answer = answers.get(one.id)
        if one.failure is not None:
            yield f"{one.id} ({one.name}) got no answer: {one.failure}"
        elif answer is None:
            if not one.hangs_up:
                yield f"{one.id} ({one.name}) was answered {one.status}, and the server does not know it"
        elif not answer.ended:
            yield f"{one.id} ({one.name}) is still being worked on"
        elif one.status is not None and one.status != answer.status:
            yield f"{one.id} ({one.name}) was answered {one.status}; the server says {answer.status}"
        elif one.status == 500 and one.body is not None and one.body.get("error") not in answer.errors:
            yield f"{one.id} ({one.name}) was told of {one.body.get('error')}; the server says {answer.errors}"
    for id in answers.keys() - known:
        yield f"{id} was answered, and no client sent it"


def _mistakes(sent: Sequence[Sent]) -> int:
    return sum(one.misbehaviour is not None for one in sent)


def _failed(sent: Sequence[Sent], answers: Mapping[str, Answer]) -> Iterator[str]:
    for one in sent:
        answer = answers.get(one.id)
        meant_to = one.misbehaviour is not None or one.name == "half-way" or one.hangs_up
        if answer is not None and answer.errors and not meant_to:
            yield f"{one.id} ({one.name}) failed with {', '.join(answer.errors)}"
        elif one.cut and not meant_to:
            yield f"{one.id} ({one.name}) was cut short"


def _statements(one: Sent) -> list[tuple[str, int, int]]:
    if one.misbehaviour is not None:
        return []
    if one.name == "overview" and one.body is not None:
        return [(account, balance, ledger) for account, balance, ledger in one.body.get("accounts", [])]
    cells = [line.split(",") for line in one.lines]
    return [(account, int(balance), int(ledger)) for account, balance, ledger in cells]


def _reports(sent: Sequence[Sent]) -> int:
    return sum(bool(_statements(one)) for one in sent)


def _torn(sent: Sequence[Sent]) -> Iterator[str]:
    for one in sent:
        found = _statements(one)
        for account, balance, ledger in found:
            if balance != OPENING + ledger:
                yield f"{one.id}: {account} had {money(balance)}, its ledger said {money(OPENING + ledger)}"
        if one.name == "report" and not one.hangs_up and len(found) != len(ACCOUNTS):
            yield f"{one.id}: a report of {len(found)} accounts instead of {len(ACCOUNTS)}"


def _receipts(books: Books) -> Iterator[str]:
    for id in sorted(books.receipts - books.payments.keys()):
        yield f"{id} has a receipt, and is not saved"
    for id in sorted(books.payments.keys() - books.receipts):
        yield f"{id} is saved, and has no receipt"


def _jobs(books: Books, sent: Sequence[Sent]) -> Iterator[str]:
    for one in sent:
        if one.name not in ("job", "broken-job"):
            continue
        state = books.jobs.get(one.id)
        if (state is not None) is not (one.status == 202):
            yield f"{one.id}: asking for the job was answered {one.status}, and its state is {state}"
        elif state == "waiting":
            yield f"{one.id}: nobody has done the job"
        elif one.name == "job" and (state == "done") is not (one.id in books.payments):
            yield f"{one.id}: the job is {state}, and its payment is {'' if one.id in books.payments else 'not '}saved"


def _held(held: Mapping[str, int]) -> Iterator[str]:
    for name, count in held.items():
        if count:
            yield f"{count} connections of the pool {name!r} were never given back"


def _caught(
    misbehaviour: Misbehaviour, sent: Sequence[Sent], answers: Mapping[str, Answer], findings: Sequence[Found]
) -> Caught:
    made = [one for one in sent if one.misbehaviour is misbehaviour]
    if misbehaviour.guard:
        told = [fact for fact in findings if fact.guard == misbehaviour.guard and _is_about(misbehaviour, fact)]
        example, line = next(((f.message, lines[-1]) for f in told if (lines := _lines(misbehaviour, f))), ("", ""))
        count = len(made) if misbehaviour.once and told else min(len(told), len(made))
        return _row(misbehaviour, made, count, example, line)
    caught = [one for one in made if (a := answers.get(one.id)) is not None and _right(one, a, misbehaviour.by)]
    first = answers[caught[0].id] if caught else Answer("", "")
    return _row(misbehaviour, made, len(caught), first.message, first.line)


def _row(misbehaviour: Misbehaviour, made: Sequence[Sent], caught: int, example: str, line: str) -> Caught:
    return Caught(misbehaviour.number, misbehaviour.mistake, misbehaviour.by, len(made), caught, example, line)


def _is_about(misbehaviour: Misbehaviour, fact: Found) -> bool:
    """Whether a finding is about one of this mistake's requests."""
    if getattr(fact.database, "name", "") == DRY:  # which serves nobody else
        return True  # and whoever held its connection may have given it back in the meantime
    return bool(_lines(misbehaviour, fact))


def _lines(misbehaviour: Misbehaviour, fact: Found) -> list[str]:
    """The lines of this mistake's handler that a finding names."""
    return [line for line in named_lines(fact.message) if int(line.rpartition(":")[2]) in misbehaviour.lines]


def _right(one: Sent, answer: Answer, name: str) -> bool:
    """Whether a mistake was caught by its name; where the response had not started, the client was told, too."""
    told = one.body.get("error") if one.body is not None else None
    late = one.misbehaviour is not None and one.misbehaviour.late
    return name in answer.errors and (late or told == name)
