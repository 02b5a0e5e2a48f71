"""A small bank: book a CSV of payments from several threads or tasks, then prove that the books are right.

Read it from the bottom up: `main` picks the form, `book_all` (or `abook_all`) fans out over batches of lines, each
line is booked in a transaction of its own by `book`, and `audit` checks the outcome against the CSV.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, BigInteger, Engine, ForeignKey, String, func, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dbscope import Database, DBScopeError, Scope, current_scope, scope

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from dbscope import AsyncDatabase

ACCOUNTS = [f"A{number:02}" for number in range(1, 21)]
OPENING = 1_000_00  # cents, on each account
HEADER = "id,payer,payee,amount"
BATCH = 50  # lines

HELP = f"""\
Books a CSV of payments from several threads (or asyncio tasks), each payment
in a transaction of its own, and then audits the books: every good line booked
once, no bad line at all, every balance right to the cent.

The bank has the accounts {ACCOUNTS[0]} to {ACCOUNTS[-1]}, with 1000.00 on each.
The CSV is UTF-8, one payment per line:

    {HEADER}
    P-0001,A03,A17,12.50

A payment that would overdraw its payer, a second one with the same id, and a
line that makes no sense are rejected, with line number and reason."""

EXAMPLES = """\
examples:
  a CSV of its own, on a SQLite file in a temporary folder:
    bank.py
  the same with asyncio tasks:
    bank.py --async --tasks 8
  your payments, kept, and audited again later:
    bank.py --csv payments.csv --database-url sqlite:///bank.db
    bank.py --csv payments.csv --database-url sqlite:///bank.db --audit-only
  on a server:
    bank.py --database-url postgresql+psycopg://user:password@host/database

exit status: 0 if the audit holds, 1 if it fails, 2 if the bank could not run.
NO_COLOR turns colours off."""


# -- what is stored ----------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "bank_accounts"

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    opening: Mapped[int] = mapped_column(BigInteger)  # cents, as all amounts
    balance: Mapped[int] = mapped_column(BigInteger)
    entries: Mapped[int]  # how many the ledger has for this account


class Payment(Base):
    __tablename__ = "bank_payments"

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    line: Mapped[int] = mapped_column(unique=True)
    payer: Mapped[str] = mapped_column(ForeignKey(Account.id))
    payee: Mapped[str] = mapped_column(ForeignKey(Account.id))
    amount: Mapped[int] = mapped_column(BigInteger)


class Entry(Base):
    """The ledger: what a payment did to an account. Numbered without gaps, so that the audit can replay it."""

    __tablename__ = "bank_entries"

    account: Mapped[str] = mapped_column(ForeignKey(Account.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    payment: Mapped[str] = mapped_column(ForeignKey(Payment.id))
    amount: Mapped[int] = mapped_column(BigInteger)
    balance: Mapped[int] = mapped_column(BigInteger)  # after it


class Rejection(Base):
    __tablename__ = "bank_rejections"

    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    reason: Mapped[str]
    after: Mapped[int | None]  # of an overdrawn payment: the payer's last entry when it was refused


# -- the CSV -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the CSV as it stands there."""

    number: int
    raw: bytes


@dataclass(frozen=True)
class Order:
    """A line that makes sense."""

    line: int
    id: str
    payer: str
    payee: str
    amount: int


class Rejected(Exception):
    """Why a line is not booked."""

    def __init__(self, reason: str, after: int | None = None) -> None:
        super().__init__(reason)
        self.after = after


class CannotRun(Exception):
    """What the user has to know, and nothing else."""


OVERDRAWN = "overdrawn"
DUPLICATE = "duplicate id"


def read_lines(path: Path) -> list[Line]:
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise CannotRun(f"{path} cannot be read: {error.strerror}") from None
    lines = [Line(number, text.rstrip(b"\r")) for number, text in enumerate(raw.split(b"\n"), 1)]
    if not lines[-1].raw:
        lines.pop()  # the file ends with a newline
    if not lines or lines[0].raw.strip() != HEADER.encode():
        raise CannotRun(f"{path}: the first line has to be {HEADER}")
    return lines[1:]


def parse(line: Line) -> Order:
    """What a line orders.

    Raises:
        Rejected: it makes no sense.
    """
    try:
        text = line.raw.decode()
    except UnicodeDecodeError:
        raise Rejected("not UTF-8") from None
    try:
        cells = [cell.strip() for cell in next(csv.reader([text], strict=True), [])]
    except csv.Error as error:
        raise Rejected(f"not CSV: {error}") from None
    if len(cells) != 4 or not all(cells):
        filled = sum(map(bool, cells))
        raise Rejected("a field is missing" if filled < 4 else f"{len(cells)} fields instead of 4")
    id, payer, payee, amount = cells
    if not re.fullmatch(r"[A-Za-z0-9-]{1,20}", id):
        raise Rejected("bad id")
    for account in (payer, payee):
        if account not in ACCOUNTS:
            raise Rejected("unknown account")
    if payer == payee:
        raise Rejected("payer and payee are one")
    if re.fullmatch(r"-[0-9.]+", amount):
        raise Rejected("negative amount")
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{2})?", amount):
        raise Rejected("bad amount")
    whole, _, cents = amount.partition(".")
    order = Order(line.number, id, payer, payee, int(whole) * 100 + int(cents or 0))
    if order.amount == 0:
        raise Rejected("amount is zero")
    return order


def invent(seed: int, count: int) -> Iterator[bytes]:
    """Lines of a CSV, most of them good, the same for the same seed."""
    dice = random.Random(seed)
    ids: list[str] = []
    for number in range(1, count + 1):
        id, (payer, payee) = f"P-{number:05}", dice.sample(ACCOUNTS, 2)
        amount = f"{dice.randint(1, 150)}.{dice.randint(0, 99):02}"
        bad = dice.random()
        if bad < 0.02 and ids:
            id = dice.choice(ids)
        elif bad < 0.03:
            amount = dice.choice(["12,50", "twelve", "1e3", "12.5.0", "NaN", "0x10", "\u0661\u0662"])
        elif bad < 0.04:
            amount = f"-{amount}"
        elif bad < 0.05:
            payee = dice.choice(["A99", "a01", "B01", "Zo\u00eb"])
        elif bad < 0.06:
            payee = dice.choice(["", payer])
        elif bad < 0.07:
            amount = "0.00"
        elif bad < 0.09:
            amount = str(dice.randint(30_000, 900_000_000_000))  # more than all the money there is
        text = f'{id},{payer},{payee},"{amount}"'.encode()
        if 0.09 <= bad < 0.10:
            text = dice.choice([text.replace(payee.encode(), b"\xff\xfe"), text.rpartition(b",")[0], text[:-1], b""])
        else:
            ids.append(id)
        yield text


# -- booking -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is going on outside of the database."""

    total: int
    receipts: list[str] = field(default_factory=list)  # appended to by on_commit hooks; append() is atomic
    scopes: list[Scope] = field(default_factory=list)
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    show: bool = field(default_factory=lambda: sys.stderr.isatty())

    def progress(self, lines: int) -> None:
        with self.lock:
            self.done += lines
            if self.show:
                end = "\r" if self.done < self.total else "\r\033[K"
                print(f"{self.done} of {self.total} lines", end=end, file=sys.stderr, flush=True)


def book(session: Session, order: Order) -> None:
    """Move the money, inside of the caller's transaction.

    Raises:
        Rejected: it must not be moved; the exception rolls the transaction back.
    """
    # Both rows are locked until the commit (SQLite has the whole file's write lock already), in one order everywhere:
    # two payments between the same accounts in opposite directions would otherwise wait for each other. What the
    # session has loaded before is loaded again: a balance from before the lock would undo somebody's payment.
    ids = sorted((order.payer, order.payee))
    locked = select(Account).where(Account.id.in_(ids)).order_by(Account.id).with_for_update()
    found = session.scalars(locked, execution_options={"populate_existing": True})
    accounts = {account.id: account for account in found}
    payer = accounts[order.payer]
    if session.get(Payment, order.id) is not None:
        raise Rejected(DUPLICATE)
    if payer.balance < order.amount:
        raise Rejected(OVERDRAWN, after=payer.entries)
    session.add(Payment(id=order.id, line=order.line, payer=order.payer, payee=order.payee, amount=order.amount))
    try:
        session.flush()
    except IntegrityError:  # by another worker, between the look and the insert: PostgreSQL locks the accounts only
        raise Rejected(DUPLICATE) from None
    for account, amount in ((payer, -order.amount), (accounts[order.payee], order.amount)):
        account.balance += amount
        account.entries += 1
        entry = Entry(account=account.id, number=account.entries, payment=order.id, amount=amount)
        entry.balance = account.balance
        session.add(entry)


def reject(session: Session, line: Line, rejected: Rejected) -> None:
    session.add(Rejection(line=line.number, reason=str(rejected), after=rejected.after))


def title(batch: Sequence[Line]) -> str:
    return f"lines {batch[0].number} to {batch[-1].number}"


def batches(lines: Sequence[Line]) -> list[Sequence[Line]]:
    return [lines[start : start + BATCH] for start in range(0, len(lines), BATCH)]


def book_all(db: Database[Session], lines: Sequence[Line], workers: int, run: Run) -> None:
    """Book every line, from threads."""

    def book_batch(batch: Sequence[Line]) -> None:
        with scope(title(batch)) as work:
            run.scopes.append(work)
            for line in batch:
                try:
                    order = parse(line)
                    with db.transaction() as session:
                        book(session, order)
                        db.on_commit(run.receipts.append, order.id)
                except Rejected as rejected:
                    with db.transaction() as session:
                        reject(session, line, rejected)
        run.progress(len(batch))

    db.fan_out(book_batch, batches(lines), name="bank", limit=workers)


# -- the audit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One promise, and what breaks it."""

    promise: str
    faults: list[str]


@dataclass(frozen=True)
class Books:
    """What the audit found."""

    booked: int
    moved: int
    rejections: dict[int, str]
    checks: list[Check]

    @property
    def hold(self) -> bool:
        return not any(check.faults for check in self.checks)


def audit(session: Session, lines: Sequence[Line]) -> Books:
    """Compare what the database holds with what the CSV says, believing neither."""
    accounts = session.scalars(select(Account)).all()
    payments = session.scalars(select(Payment)).all()
    entries = session.scalars(select(Entry).order_by(Entry.account, Entry.number)).all()
    rejections = {rejection.line: rejection for rejection in session.scalars(select(Rejection))}
    by_line = {payment.line: payment for payment in payments}
    by_id = {payment.id: payment for payment in payments}
    orders: dict[int, Order] = {}
    refusals: dict[int, str] = {}
    for line in lines:
        try:
            orders[line.number] = parse(line)
        except Rejected as rejected:
            refusals[line.number] = str(rejected)

    numbers = {line.number for line in lines}
    accounted = [
        *(f"line {n} was neither booked nor rejected" for n in numbers - by_line.keys() - rejections.keys()),
        *(f"line {n} was both booked and rejected" for n in by_line.keys() & rejections.keys()),
        *(f"line {n} is not in the CSV" for n in (by_line.keys() | rejections.keys()) - numbers),
    ]

    good = []
    for payment in payments:
        booked = Order(payment.line, payment.id, payment.payer, payment.payee, payment.amount)
        if payment.line in refusals:
            good.append(f"line {payment.line} was booked in spite of: {refusals[payment.line]}")
        elif payment.line in orders and booked != orders[payment.line]:
            good.append(f"line {payment.line} was booked as {booked}, not as {orders[payment.line]}")

    # The ledger, replayed: balance after each entry of each account.
    replayed = {account.id: [account.opening] for account in accounts}
    chain = []
    per_payment: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for entry in entries:
        history = replayed[entry.account]
        per_payment[entry.payment].append((entry.account, entry.amount))
        if entry.number != len(history):
            chain.append(f"{entry.account}: entry {len(history)} is missing before entry {entry.number}")
        history.append(history[-1] + entry.amount)
        if entry.balance != history[-1]:
            chain.append(f"{entry.account}: entry {entry.number} says {euros(entry.balance)}, not {euros(history[-1])}")
        if history[-1] < 0:
            chain.append(f"{entry.account}: overdrawn by entry {entry.number}, to {euros(history[-1])}")
    balances = []
    for account in accounts:
        total = replayed[account.id][-1]
        if account.balance != total:
            balances.append(f"{account.id}: the balance is {euros(account.balance)}, the ledger says {euros(total)}")
        if account.opening != OPENING:
            balances.append(f"{account.id}: it was opened with {euros(account.opening)}")
    balances += [f"{id}: there is no such account" for id in set(ACCOUNTS) - replayed.keys()]
    had, have = OPENING * len(ACCOUNTS), session.scalar(select(func.sum(Account.balance))) or 0
    if have != had:
        balances.append(f"the bank holds {euros(int(have))}, not {euros(had)}")

    moves = []
    for payment in payments:
        wanted = {(payment.payer, -payment.amount), (payment.payee, payment.amount)}
        found = per_payment.pop(payment.id, [])
        if len(found) != 2 or set(found) != wanted:
            moves.append(f"payment {payment.id} (line {payment.line}) has the entries {found}")
    moves += [f"payment {id} is in the ledger, but was not booked" for id in per_payment]

    wrong = []
    for number, rejection in rejections.items():
        order = orders.get(number)
        first = by_id.get(order.id) if order else None
        if rejection.reason == DUPLICATE:
            right = first is not None and first.line != number
        elif rejection.reason == OVERDRAWN:
            history = replayed[order.payer] if order else []
            after = rejection.after
            right = order is not None and after is not None and after < len(history) and history[after] < order.amount
        else:
            right = refusals.get(number) == rejection.reason
        if not right:
            wrong.append(f"line {number} was rejected without cause: {rejection.reason}")

    checks = [
        Check("each line of the CSV is booked or rejected, once", sorted(accounted)),
        Check("no bad line is booked, and each good one as it stands", good),
        Check("each rejection has its cause", wrong),
        Check("each payment took from its payer what it gave to its payee", moves),
        Check("the ledger has no gap, and no account was ever overdrawn", chain),
        Check("each balance is its ledger's, and no cent came or went", balances),
    ]
    return Books(
        booked=len(payments),
        moved=sum(payment.amount for payment in payments),
        rejections={number: rejection.reason for number, rejection in sorted(rejections.items())},
        checks=checks,
    )


def audit_run(run: Run, books: Books, payments: Iterable[str], engine: Engine) -> None:
    """The same for what goes on outside of the database."""
    receipts, paid = Counter(run.receipts), Counter(payments)
    differing = sorted((receipts - paid) | (paid - receipts))
    books.checks.append(
        Check(
            "each payment has one receipt", [f"{id}: {receipts[id]} receipts, {paid[id]} payments" for id in differing]
        )
    )
    held = engine.pool.checkedout()  # type: ignore[attr-defined]  # every QueuePool has it
    books.checks.append(Check("every connection is back in the pool", [f"{held} are checked out"] if held else []))
    still = [repr(work) for work in (*run.scopes, current_scope()) if work is not None and not work.ended]
    books.checks.append(Check("every scope has ended", still))


def audit_all(db: Database[Session], lines: Sequence[Line]) -> Books:
    with db.reader() as session:
        return audit(session, lines)


# -- the same in async form: what touches the database stays as it is, and is awaited ---------------------------


async def abook_all(db: "AsyncDatabase[AsyncSession]", lines: Sequence[Line], workers: int, run: Run) -> None:
    """Book every line, from tasks."""

    async def book_batch(batch: Sequence[Line]) -> None:
        async with scope(title(batch)) as work:
            run.scopes.append(work)
            for line in batch:
                try:
                    order = parse(line)
                    async with db.transaction() as session:
                        await session.run_sync(book, order)
                        db.on_commit(run.receipts.append, order.id)
                except Rejected as rejected:
                    async with db.transaction() as session:
                        await session.run_sync(reject, line, rejected)
        run.progress(len(batch))

    await db.fan_out(book_batch, batches(lines), name="bank", limit=workers)


async def aaudit_all(db: "AsyncDatabase[AsyncSession]", lines: Sequence[Line]) -> Books:
    async with db.reader() as session:
        return await session.run_sync(audit, lines)


# -- one run -----------------------------------------------------------------------------------------------------


def open_bank(session: Session, reset: bool) -> None:
    """Make the tables, and the accounts with what is on them."""
    connection = session.connection()
    if reset:
        Base.metadata.drop_all(connection)
    elif inspect(connection).has_table(Account.__tablename__):
        raise CannotRun("this database has a bank already. Try --audit-only, or --reset to delete it and start over.")
    Base.metadata.create_all(connection)
    session.add_all(Account(id=id, opening=OPENING, balance=OPENING, entries=0) for id in ACCOUNTS)


def look_for_bank(session: Session) -> None:
    if not inspect(session.connection()).has_table(Account.__tablename__):
        raise CannotRun("there is no bank in this database to audit.")


def run_bank(lines: Sequence[Line], url: URL, arguments: argparse.Namespace) -> Books:
    """Book and audit, from threads."""
    run = Run(len(lines))
    with Database(url, **engine_options(url, arguments.workers)) as db:
        if arguments.audit_only:
            with db.reader() as session:
                look_for_bank(session)
            return audit_all(db, lines)
        with db.transaction() as session:
            open_bank(session, arguments.reset)
        book_all(db, lines, arguments.workers, run)
        with db.reader() as session:
            payments = session.scalars(select(Payment.id)).all()
        books = audit_all(db, lines)
        audit_run(run, books, payments, db.engine)
    return books


async def arun_bank(lines: Sequence[Line], url: URL, arguments: argparse.Namespace) -> Books:
    """Book and audit, from tasks."""
    from dbscope import AsyncDatabase  # here, so that the sync form needs no greenlet

    run = Run(len(lines))
    async with AsyncDatabase(url, **engine_options(url, arguments.workers)) as db:
        if arguments.audit_only:
            async with db.reader() as session:
                await session.run_sync(look_for_bank)
            return await aaudit_all(db, lines)
        async with db.transaction() as session:
            await session.run_sync(open_bank, arguments.reset)
        await abook_all(db, lines, arguments.workers, run)
        async with db.reader() as session:
            payments = (await session.scalars(select(Payment.id))).all()
        books = await aaudit_all(db, lines)
        audit_run(run, books, payments, db.engine.sync_engine)
    return books


def engine_options(url: URL, workers: int) -> dict[str, Any]:
    options: dict[str, Any] = {"pool_size": workers, "max_overflow": 1}
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": 60}  # the workers queue up for the one write lock of the file
    return options


def database_url(given: str | None, folder: Path, is_async: bool) -> URL:
    driver = "sqlite+aiosqlite" if is_async else "sqlite"
    try:
        url = make_url(given) if given else URL.create(driver, database=str(folder / "bank.db"))
    except ArgumentError:
        raise CannotRun("--database-url is not a database URL; it looks like sqlite:///bank.db") from None
    if is_async and url.drivername == "sqlite":
        url = url.set(drivername=driver)
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise CannotRun("a database in memory has one connection, and the bank is about many: name a file.")
    return url


# -- what is printed ---------------------------------------------------------------------------------------------


def euros(cents: int) -> str:
    return f"{'-' if cents < 0 else ''}{abs(cents) // 100}.{abs(cents) % 100:02}"


def report(books: Books, lines: int, seconds: float, verbose: bool) -> Iterator[str]:
    """The outcome for people, line by line."""
    yield f"{lines} lines: {books.booked} booked, {len(books.rejections)} rejected, in {seconds:.1f} s"
    for reason, count in Counter(books.rejections.values()).most_common():
        numbers = [number for number, why in books.rejections.items() if why == reason]
        shown = numbers if verbose else numbers[:5]
        more = ", ..." if len(shown) < count else ""
        yield f"  {count:5}  {reason} (line{'s' if count > 1 else ''} {', '.join(map(str, shown))}{more})"
    yield f"{euros(books.moved)} moved between {len(ACCOUNTS)} accounts"
    yield ""
    for check in books.checks:
        yield f"  {mark(not check.faults)}  {check.promise}"
        shown_faults = check.faults if verbose else check.faults[:5]
        yield from (f"          {fault}" for fault in shown_faults)
        if len(shown_faults) < len(check.faults):
            yield f"          and {len(check.faults) - len(shown_faults)} more (--verbose shows them)"
    yield ""
    yield "The books hold." if books.hold else "The books do NOT hold."


def mark(good: bool) -> str:
    text = "ok    " if good else "FAILED"
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{32 if good else 31}m{text}\033[0m"


def as_json(books: Books, lines: int, seconds: float) -> str:
    return json.dumps(
        {
            "ok": books.hold,
            "lines": lines,
            "booked": books.booked,
            "moved_cents": books.moved,
            "rejected": [{"line": line, "reason": reason} for line, reason in books.rejections.items()],
            "audit": [{"promise": c.promise, "ok": not c.faults, "faults": c.faults} for c in books.checks],
            "seconds": round(seconds, 3),
        },
        indent=2,
    )


def workers(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 64:
        raise argparse.ArgumentTypeError("from 1 to 64")
    return number


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bank.py", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--csv", metavar="FILE", type=Path, help="the payments (default: made up, from --seed)")
    add("--database-url", metavar="URL", help="SQLAlchemy's URL (default: a SQLite file, gone afterwards)")
    add("--async", dest="is_async", action="store_true", help="work in tasks of one event loop instead of threads")
    add("--threads", "--tasks", dest="workers", metavar="N", type=workers, default=4, help="how many (default: 4)")
    add("--seed", metavar="N", type=int, default=1, help="another number makes up another CSV (default: 1)")
    add("--lines", metavar="N", type=int, default=3000, help="how many lines to make up (default: 3000)")
    add("--audit-only", action="store_true", help="book nothing: audit what was booked into this database before")
    add("--reset", action="store_true", help="delete the bank that this database has already")
    add("--json", action="store_true", help="print the outcome as JSON")
    add("--verbose", action="store_true", help="print every rejected line and every fault")
    given = parser.parse_args(arguments)
    if given.audit_only and given.reset:
        parser.error("--audit-only and --reset exclude each other")
    return given


def main(given: Sequence[str] | None = None) -> int:
    arguments = arguments_of(given)
    try:
        with tempfile.TemporaryDirectory(prefix="bank-") as temporary:
            path = arguments.csv or Path(temporary, "payments.csv")
            if arguments.csv is None:
                made_up = [HEADER.encode(), *invent(arguments.seed, arguments.lines)]
                path.write_bytes(b"".join(line + b"\n" for line in made_up))
            lines = read_lines(path)
            url = database_url(arguments.database_url, Path(temporary), arguments.is_async)
            started = time.perf_counter()
            if arguments.is_async:
                books = asyncio.run(arun_bank(lines, url, arguments))
            else:
                books = run_bank(lines, url, arguments)
            seconds = time.perf_counter() - started
    except (CannotRun, DBScopeError, SQLAlchemyError, ImportError, OSError) as error:
        notes = getattr(error, "__notes__", [])
        print("bank.py:", "\n".join([str(error), *notes]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bank.py: interrupted; what was booked stays booked", file=sys.stderr)
        return 130
    if arguments.json:
        print(as_json(books, len(lines), seconds))
    else:
        print("\n".join(report(books, len(lines), seconds, arguments.verbose)))
    return 0 if books.hold else 1


if __name__ == "__main__":
    sys.exit(main())
