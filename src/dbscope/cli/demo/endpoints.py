"""The bank's endpoints, as they should be written: in threads and on the loop, twice the same."""

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from dbscope.cli.demo.books import ACCOUNTS, FIRST_PAGE, Job, Order, PrinterOnFire, book, lock, page, statement, take
from dbscope.cli.demo.web import Endpoint, Reply, Request

if TYPE_CHECKING:
    from dbscope.cli.demo.bank import Bank

__all__ = ["ENDPOINTS", "ajob", "job"]

__dbscope_user_code__ = True  # errors name the lines of these functions, as they would a user's

PAGE = 4  # accounts


def pay(bank: "Bank", request: Request) -> Reply:
    """A deposit, a withdrawal or a transfer: one transaction, and the receipt after its commit."""
    order = Order.read(request.id, request.arguments)
    with bank.db.transaction() as session:
        book(session, order)
        bank.db.on_commit(bank.receipts.put, order.id)
    return Reply(201, {"booked": order.id})


async def apay(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    order = Order.read(request.id, request.arguments)
    async with bank.adb.transaction() as session:
        await session.run_sync(book, order)
        bank.adb.on_commit(bank.receipts.put, order.id)
    return Reply(201, {"booked": order.id})


def half_way(bank: "Bank", request: Request) -> Reply:
    """Fails when the payer's money is taken, and nobody has it: nothing of that may stay."""
    order = Order.read(request.id, request.arguments)
    with bank.db.transaction() as session:
        take(session, lock(session, order), order)
        raise PrinterOnFire


async def ahalf_way(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    order = Order.read(request.id, request.arguments)
    async with bank.adb.transaction() as session:
        await session.run_sync(lambda sync: take(sync, lock(sync, order), order))
        raise PrinterOnFire


def report(bank: "Bank", request: Request) -> Reply:
    """All accounts, as a stream: it outlives the request's scope, and opens one for each page."""

    def lines() -> Iterator[str]:
        after = FIRST_PAGE
        while found := read(after):
            yield from (f"{account},{balance},{ledger}\n" for account, balance, ledger in found)
            after = found[-1][0]

    def read(after: str) -> list[tuple[str, int, int]]:
        with bank.db.reader() as session:
            return page(session, after, PAGE)

    return Reply(stream=lines())


async def areport(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""

    async def lines() -> AsyncIterator[str]:
        after = FIRST_PAGE
        while found := await read(after):
            for account, balance, ledger in found:
                yield f"{account},{balance},{ledger}\n"
            after = found[-1][0]

    async def read(after: str) -> list[tuple[str, int, int]]:
        async with bank.adb.reader() as session:
            return await session.run_sync(page, after, PAGE)

    return Reply(stream=lines())


def overview(bank: "Bank", request: Request) -> Reply:
    """Some accounts, looked up side by side, each in a scope of its own."""

    def look_up(account: str) -> tuple[str, int, int]:
        with bank.db.reader() as session:
            return statement(session, account)

    return Reply(body={"accounts": bank.db.fan_out(look_up, ACCOUNTS[:PAGE], name="overview", limit=2)})


async def aoverview(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""

    async def look_up(account: str) -> tuple[str, int, int]:
        async with bank.adb.reader() as session:
            return await session.run_sync(statement, account)

    return Reply(body={"accounts": await bank.adb.fan_out(look_up, ACCOUNTS[:PAGE], name="overview", limit=2)})


def _job(request: Request, broken: bool) -> Job:
    order = Order.read(request.id, request.arguments)
    return Job(id=order.id, payee=order.payee, amount=order.amount, broken=broken)


def job(bank: "Bank", request: Request, *, broken: bool = False) -> Reply:
    """A standing order: left to the job handler, which is woken when the job can be seen."""
    with bank.db.transaction() as session:
        session.add(_job(request, broken))
        bank.db.on_commit(bank.jobs.loop.wake)
    return Reply(202, {"job": request.id})


async def ajob(bank: "Bank", request: Request, *, broken: bool = False) -> Reply:
    """The same on the loop."""
    async with bank.adb.transaction() as session:
        session.add(_job(request, broken))
        bank.adb.on_commit(bank.jobs.loop.wake)
    return Reply(202, {"job": request.id})


ENDPOINTS = (
    Endpoint("pay", pay, apay),
    Endpoint("half-way", half_way, ahalf_way),
    Endpoint("report", report, areport),
    Endpoint("overview", overview, aoverview),
    Endpoint("job", job, ajob),
)
