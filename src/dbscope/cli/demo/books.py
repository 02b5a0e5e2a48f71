"""The bank's books: accounts, payments, and a ledger that says what each payment did to which account.

Written against the sync `Session`; the async endpoints call it by `AsyncSession.run_sync`. Amounts are cents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Select, String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

__dbscope_user_code__ = True  # errors name the lines of these functions, as they would a user's

RESERVE = "A00"  # pays for the mistakes, and nothing else: one must not be refused for want of money before it is made
ACCOUNTS = (RESERVE, *(f"A{number:02}" for number in range(1, 13)))
OPENING = 1_000_00
FIRST_PAGE = ""


class Base(DeclarativeBase):
    """The tables of the demo; all their names begin with `dbscope_demo_`."""


class Account(Base):
    """What somebody has."""

    __tablename__ = "dbscope_demo_account"

    id: Mapped[str] = mapped_column(String(8), primary_key=True)
    balance: Mapped[int] = mapped_column(BigInteger)


class Payment(Base):
    """A deposit (without a payer), a withdrawal (without a payee) or a transfer; its id is the request's."""

    __tablename__ = "dbscope_demo_payment"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    payer: Mapped[str | None] = mapped_column(ForeignKey(Account.id))
    payee: Mapped[str | None] = mapped_column(ForeignKey(Account.id))
    amount: Mapped[int] = mapped_column(BigInteger)


class Entry(Base):
    """The ledger. That its payment exists is checked by the server when the transaction commits, not before."""

    __tablename__ = "dbscope_demo_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    payment: Mapped[str] = mapped_column(ForeignKey(Payment.id, deferrable=True, initially="DEFERRED"))
    account: Mapped[str] = mapped_column(ForeignKey(Account.id))
    amount: Mapped[int] = mapped_column(BigInteger)


class Receipt(Base):
    """That a payment is booked, as the payer was told: written after the commit, by the worker pool."""

    __tablename__ = "dbscope_demo_receipt"

    payment: Mapped[str] = mapped_column(ForeignKey(Payment.id), primary_key=True)


class Job(Base):
    """Work for the job handler: its id is that of the request that asked for it, and of the payment that it books."""

    __tablename__ = "dbscope_demo_job"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    payee: Mapped[str] = mapped_column(ForeignKey(Account.id))
    amount: Mapped[int] = mapped_column(BigInteger)
    broken: Mapped[bool]
    state: Mapped[str] = mapped_column(String(80), default="waiting")


class Refused(Exception):
    """The bank says no: the exception rolls the transaction back, and the client is told with status 409."""


class PrinterOnFire(Exception):
    """What a handler fails with half-way."""


@dataclass(frozen=True)
class Order:
    """A payment as a client asks for it."""

    id: str
    payer: str | None
    payee: str | None
    amount: int

    @classmethod
    def read(cls, id: str, arguments: Mapping[str, str]) -> "Order":
        """The order in a request's query string."""
        return cls(id, arguments.get("payer"), arguments.get("payee"), int(arguments["amount"]))

    @property
    def moves(self) -> dict[str, int]:
        """What it does to which account."""
        return {account: sign * self.amount for sign, account in ((-1, self.payer), (1, self.payee)) if account}


def open_accounts(session: Session) -> None:
    """Give every account its opening balance."""
    session.add_all(Account(id=id, balance=OPENING) for id in ACCOUNTS)


def book(session: Session, order: Order) -> None:
    """Move the money, inside of the caller's transaction.

    Raises:
        Refused: the payer has not enough.
    """
    accounts = lock(session, order)
    take(session, accounts, order)
    give(session, accounts, order)


def lock(session: Session, order: Order) -> dict[str, Account]:
    """The order's accounts, locked until the transaction ends: in one order everywhere, or two transfers would wait
    for each other; and loaded again, for a balance from before the lock would undo somebody else's payment."""
    wanted = select(Account).where(Account.id.in_([*order.moves])).order_by(Account.id)
    wanted = wanted.with_for_update(key_share=True)
    return {found.id: found for found in session.scalars(wanted, execution_options={"populate_existing": True})}


def take(session: Session, accounts: Mapping[str, Account], order: Order) -> None:
    """The first half: note the payment, and take the money from the payer."""
    session.add(Payment(id=order.id, payer=order.payer, payee=order.payee, amount=order.amount))
    session.flush()
    if order.payer is not None:
        if accounts[order.payer].balance < order.amount:
            raise Refused(f"{order.payer} has not enough")
        _post(session, accounts[order.payer], order.id, -order.amount)


def give(session: Session, accounts: Mapping[str, Account], order: Order) -> None:
    """The second half: give the money to the payee."""
    if order.payee is not None:
        _post(session, accounts[order.payee], order.id, order.amount)


def _post(session: Session, account: Account, payment: str, amount: int) -> None:
    account.balance += amount
    session.add(Entry(payment=payment, account=account.id, amount=amount))
    session.flush()


def page(session: Session, after: str, size: int) -> list[tuple[str, int, int]]:
    """The next accounts after one, each with its balance and the sum of its ledger: one statement, one snapshot."""
    wanted = _statement().where(Account.id > after).order_by(Account.id).limit(size)
    return [(id, balance, int(ledger)) for id, balance, ledger in session.execute(wanted).all()]


def statement(session: Session, id: str) -> tuple[str, int, int]:
    """One account, with its balance and the sum of its ledger."""
    id, balance, ledger = session.execute(_statement().where(Account.id == id)).one()
    return id, balance, int(ledger)


def _statement() -> "Select[Any]":
    ledger = select(func.coalesce(func.sum(Entry.amount), 0)).where(Entry.account == Account.id).scalar_subquery()
    return select(Account.id, Account.balance, ledger)
