"""Handlers that misbehave on purpose: each loses data or connections with sessions that are written by hand.

Read one and ask: what
would the client be told, and what would be in the database? The audit asks the same.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dbscope import (
    ConfigurationError,
    FanOutError,
    NoScopeError,
    NotTheOwnerError,
    OverlapError,
    RollbackOnlyError,
    ScopeEndedError,
    ScopeMisuseError,
    SelfBlockedError,
    TransactionInProgress,
    UncommittedWritesError,
)
from dbscope.cli.demo.books import ACCOUNTS, Account, Entry, Order, Payment, Refused, book, give, lock, statement, take
from dbscope.cli.demo.endpoints import ajob, job
from dbscope.cli.demo.web import Async, Behind, Endpoint, Reply, Request, Sync

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from dbscope.cli.demo.bank import Bank

__all__ = ["BUDGET", "MISBEHAVIOURS", "Misbehaviour"]

__dbscope_user_code__ = True  # errors name the lines of these functions, as they would a user's

SLOW = 0.05  # seconds that a partner's answer may take
BUDGET = 0.5  # seconds that a transaction may be idle here, instead of five: the demo is short
THINKING = 3 * BUDGET


@dataclass(frozen=True)
class Misbehaviour:
    """A mistake, and what has to come of it."""

    number: int  # of the failure: docs/demo.md lists them
    name: str  # of the endpoint
    mistake: str  # in a few words
    caught: type[Exception] | None  # what has to be raised, at the request or later; None where a guard sees it
    in_thread: Sync | None = None
    on_loop: Async | None = None
    behind: Behind = "a scope"
    late: bool = False  # the response has started by then
    guard: str = ""  # which has to name it, if one has
    once: bool = False  # the guard tells of each line once

    @property
    def by(self) -> str:
        """By what it is caught."""
        return self.guard or getattr(self.caught, "__name__", "")

    @property
    def lines(self) -> set[int]:
        """Those of the handler, in this file."""
        handlers = [handler for handler in (self.in_thread, self.on_loop) if handler is not None]
        found = [inspect.getsourcelines(handler) for handler in handlers]
        return {first + number for source, first in found for number in range(len(source))}

    @property
    def endpoint(self) -> Endpoint:
        """The handler, for the service."""
        return Endpoint(self.name, self.in_thread, self.on_loop, self.behind)


def order_of(request: Request) -> Order:
    """The payment that the request asks for."""
    return Order.read(request.id, request.arguments)


def payment_of(request: Request) -> Payment:
    """A row for it, without the bookkeeping."""
    order = order_of(request)
    return Payment(id=order.id, payer=order.payer, payee=order.payee, amount=order.amount)


# -- 1: a pool whose connections somebody holds -------------------------------------------------------------------


def dry(bank: "Bank", request: Request) -> Reply:
    """Holds the pool's only connection, and has a thread look something up, which needs one, too."""

    def look_up() -> list[str]:
        with bank.dry.reader() as session:
            return [*session.scalars(select(Account.id))]

    with bank.dry.reader() as session, ThreadPoolExecutor(1, thread_name_prefix="look-up") as threads:
        session.scalars(select(Account.balance)).all()
        return Reply(body={"accounts": threads.submit(look_up).result()})


# -- 3: a stream on the request's session ------------------------------------------------------------------------


def stream_on(bank: "Bank", request: Request) -> Reply:
    """The connection would be held for as long as the client cares to read."""
    session = bank.db.session()

    def lines() -> Iterator[str]:
        yield "account,balance\n"
        for account in session.scalars(select(Account)):
            yield f"{account.id},{account.balance}\n"

    return Reply(stream=lines())


async def astream_on(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    session = bank.adb.session()

    async def lines() -> AsyncIterator[str]:
        yield "account,balance\n"
        for account in await session.scalars(select(Account)):
            yield f"{account.id},{account.balance}\n"

    return Reply(stream=lines())


# -- 4: a transaction that waits for somebody else ----------------------------------------------------------------


def idle(bank: "Bank", request: Request) -> Reply:
    """Keeps its transaction open while a slow partner thinks."""
    with bank.db.reader() as session:
        found = session.scalars(select(Account.id)).all()
        time.sleep(THINKING)  # the partner
    return Reply(body={"accounts": [*found]})


async def aidle(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    async with bank.adb.reader() as session:
        found = (await session.scalars(select(Account.id))).all()
        await asyncio.sleep(THINKING)  # the partner
    return Reply(body={"accounts": [*found]})


# -- 5: a commit that fails after the handler --------------------------------------------------------------------


def bad_commit(bank: "Bank", request: Request) -> Reply:
    """The server checks the entry's payment at the COMMIT, and there is none: the client must not be told 201."""
    order = order_of(request)
    bank.db.session.add(Entry(payment=order.id, account=ACCOUNTS[0], amount=order.amount))
    bank.db.session.flush()
    return Reply(201, {"booked": order.id})


async def abad_commit(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    order = order_of(request)
    bank.adb.session.add(Entry(payment=order.id, account=ACCOUNTS[0], amount=order.amount))
    await bank.adb.session.flush()
    return Reply(201, {"booked": order.id})


# -- 6: a task that is cancelled in the middle -------------------------------------------------------------------


async def cancelled(bank: "Bank", request: Request) -> Reply:
    """Gives up on a slow partner, with the money already moved."""

    async def unit() -> None:
        async with bank.adb.transaction() as session:
            await session.run_sync(book, order_of(request))
            await asyncio.Event().wait()  # the partner

    await asyncio.wait_for(unit(), SLOW)
    return Reply(201, {"booked": request.id})


# -- 7: a session that tasks share -------------------------------------------------------------------------------


async def gathered(bank: "Bank", request: Request) -> Reply:
    """Two queries side by side, on one session."""
    session = bank.adb.session()
    first, second = (select(Account).where(Account.id == id) for id in ACCOUNTS[:2])
    async with asyncio.TaskGroup() as group:
        group.create_task(_all(session, first))
        group.create_task(_all(session, second))
    return Reply(body={"accounts": 2})


async def _all(session: "AsyncSession", query: Any) -> list[Any]:
    return [*(await session.scalars(query)).all()]


async def rolled_back_by_a_sibling(bank: "Bank", request: Request) -> Reply:
    """One task writes and waits, another one rolls back: the first would commit nothing, and say 201."""
    session = bank.adb.session()
    wrote, rolled_back = asyncio.Event(), asyncio.Event()

    async def writer() -> None:
        session.add(payment_of(request))
        await session.flush()
        wrote.set()
        await rolled_back.wait()
        await session.commit()

    async def sibling() -> None:
        await wrote.wait()
        await session.rollback()
        rolled_back.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(writer(), name="writer")
        group.create_task(sibling(), name="sibling")
    return Reply(201, {"booked": request.id})


# -- 8: a session that was never rolled back ---------------------------------------------------------------------


def broken_job(bank: "Bank", request: Request) -> Reply:
    """A job whose pass fails: with one session for all passes, every later one would fail, too."""
    return job(bank, request, broken=True)


async def abroken_job(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    return await ajob(bank, request, broken=True)


# -- 9: work that outlives its request ---------------------------------------------------------------------------


async def background(bank: "Bank", request: Request) -> Reply:
    """Books when the response is through, on the session of the request that is over."""
    session = bank.adb.session()

    async def later() -> None:
        session.add(payment_of(request))
        await session.commit()

    bank.after_response(request.id, later())
    return Reply(202, {"accepted": request.id})


# -- 10, 11: generators that nobody closes -----------------------------------------------------------------------


def get_session(bank: "Bank") -> Iterator[Session]:
    """As a framework's dependency would be written."""
    with bank.scope("get_session"):
        yield bank.db.session()


def pulled_by_hand(bank: "Bank", request: Request) -> Reply:
    """`next()` of a generator that is collected at once: its session is closed before it is used."""
    session = next(iter(get_session(bank)))
    session.add(payment_of(request))
    session.commit()
    return Reply(201, {"booked": request.id})


async def aget_session(bank: "Bank") -> "AsyncIterator[AsyncSession]":
    """As a framework's dependency would be written."""
    async with bank.scope("aget_session"):
        yield bank.adb.session()


async def never_closed(bank: "Bank", request: Request) -> Reply:
    """A bare `async for`: where its body fails, the generator is not closed."""
    async for session in aget_session(bank):
        session.add(payment_of(request))
        await session.flush()
        raise Refused("the body fails")
    return Reply(201, {"booked": request.id})


# -- 18: a read after the commit -----------------------------------------------------------------------------------


def read_after_commit(bank: "Bank", request: Request) -> Reply:
    """The commit has expired what it reads then, and so begins a transaction that nobody ends."""
    session = bank.db.session()
    account = session.get_one(Account, ACCOUNTS[0])
    session.commit()
    return Reply(body={"accounts": [account.id]})


# -- 19: a helper that commits its caller's work -----------------------------------------------------------------


def helper_commits(bank: "Bank", request: Request) -> Reply:
    """A helper, deep down, commits when half of the transfer is done; the other half fails."""
    order = order_of(request)
    with bank.db.transaction() as session:
        accounts = lock(session, order)
        take(session, accounts, order)
        bank.db.session.commit()  # the helper
        raise Refused("the payee's account is closed")


async def helper_says_commit(bank: "Bank", request: Request) -> Reply:
    """The same in SQL, on the loop."""
    order = order_of(request)
    async with bank.adb.transaction() as session:
        await session.run_sync(lambda sync: take(sync, lock(sync, order), order))
        await session.execute(text("COMMIT"))  # the helper
        raise Refused("the payee's account is closed")


def helper_owns(bank: "Bank", request: Request) -> Reply:
    """A helper's block would commit what its caller has written, and may still want to undo."""
    bank.db.session.add(payment_of(request))
    bank.db.session.flush()
    with bank.db.transaction():  # the helper
        pass
    raise Refused("on second thoughts, no")


# -- 20: two connections for one request -------------------------------------------------------------------------


def second_connection(bank: "Bank", request: Request) -> Reply:
    """An independent transaction waits for the row that its own request has locked."""
    order = order_of(request)
    with bank.db.transaction() as session:
        book(session, order)
        with bank.db.transaction(new=True) as other:
            give(other, lock(other, order), order)
    return Reply(201, {"booked": request.id})


async def asecond_connection(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    order = order_of(request)
    async with bank.adb.transaction() as session:
        await session.run_sync(book, order)
        async with bank.adb.transaction(new=True) as other:
            await other.run_sync(lambda sync: give(sync, lock(sync, order), order))
    return Reply(201, {"booked": request.id})


# -- 21: all connections held by those who wait ------------------------------------------------------------------


def everybody_waits(bank: "Bank", request: Request) -> Reply:
    """Holds the pool's only connection, and waits for threads that need one each."""

    def look_up(account: str) -> tuple[str, int, int]:
        with bank.narrow.reader() as session:
            return statement(session, account)

    with bank.narrow.reader() as session:
        statement(session, ACCOUNTS[0])
        found = bank.narrow.fan_out(look_up, ACCOUNTS[1:3], name="everybody waits")
    return Reply(body={"accounts": found})


# -- 22: a thread's session under ASGI ---------------------------------------------------------------------------


async def thread_local(bank: "Bank", request: Request) -> Reply:
    """No scope, and so a session of the thread's: all requests of the loop would share it."""
    bank.db.session.add(payment_of(request))
    bank.db.session.commit()
    return Reply(201, {"booked": request.id})


# -- 27: a session that threads share ----------------------------------------------------------------------------


def shared_by_threads(bank: "Bank", request: Request) -> Reply:
    """A second thread uses the session in the middle of the first one's query."""
    session = bank.db.session()

    def second() -> None:
        session.scalar(select(Account.balance).limit(1))

    with ThreadPoolExecutor(1, thread_name_prefix="second") as threads:
        mine = threading.get_ident()

        def meanwhile(_: object) -> None:
            if threading.get_ident() == mine:
                threads.submit(second).result()

        event.listen(session, "do_orm_execute", meanwhile, once=True)
        session.scalars(select(Account)).all()
    return Reply(body={"accounts": len(ACCOUNTS)})


# -- 28: an error that is swallowed ------------------------------------------------------------------------------


def swallowed(bank: "Bank", request: Request) -> Reply:
    """A helper's insert fails, and the caller goes on as if nothing had happened."""
    order = order_of(request)
    with bank.db.transaction() as session:
        book(session, order)
        try:
            with bank.db.transaction() as joined:  # the helper
                joined.execute(text("INSERT INTO dbscope_demo_account (id, balance) VALUES ('A01', 0)"))
        except IntegrityError:
            pass
    return Reply(201, {"booked": request.id})


async def aswallowed(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    order = order_of(request)
    async with bank.adb.transaction() as session:
        await session.run_sync(book, order)
        try:
            async with bank.adb.transaction() as joined:  # the helper
                await joined.execute(text("INSERT INTO dbscope_demo_account (id, balance) VALUES ('A01', 0)"))
        except IntegrityError:
            pass
    return Reply(201, {"booked": request.id})


# -- 39: an engine for each request ------------------------------------------------------------------------------


def own_engine(bank: "Bank", request: Request) -> Reply:
    """Makes a pool of its own, as every request does here, until the server has no connection left."""
    with bank.doors.another().transaction() as session:
        found = statement(session, ACCOUNTS[0])
    return Reply(body={"accounts": [found]})


# -- 40: a commit that is forgotten ------------------------------------------------------------------------------


def forgotten(bank: "Bank", request: Request) -> Reply:
    """Writes, and says 201; nobody commits."""
    bank.db.session.add(payment_of(request))
    bank.db.session.flush()
    return Reply(201, {"booked": request.id})


async def aforgotten(bank: "Bank", request: Request) -> Reply:
    """The same on the loop."""
    bank.adb.session.add(payment_of(request))
    await bank.adb.session.flush()
    return Reply(201, {"booked": request.id})


# -- 42: a sync session on the loop ------------------------------------------------------------------------------


async def blocks_the_loop(bank: "Bank", request: Request) -> Reply:
    """While its sync session waits, no other request of the loop goes on."""
    with bank.scope("blocks the loop"), bank.db.reader() as session:
        found = statement(session, ACCOUNTS[0])
    return Reply(body={"accounts": [found]})


MISBEHAVIOURS = (
    Misbehaviour(1, "dry", "holds a pool's connections", None, dry, guard="pool_exhausted"),
    Misbehaviour(3, "stream", "streams on a dead session", ScopeEndedError, stream_on, astream_on, late=True),
    Misbehaviour(4, "idle", "waits in a transaction", None, idle, aidle, guard="idle_in_transaction"),
    Misbehaviour(
        *(5, "bad-commit", "fails when it commits", IntegrityError, bad_commit, abad_commit),
        behind="an on-success scope",
    ),
    Misbehaviour(6, "cancelled", "is cancelled in the middle", TimeoutError, on_loop=cancelled),
    Misbehaviour(7, "gathered", "shares a session by gather()", OverlapError, on_loop=gathered),
    Misbehaviour(7, "sibling", "has a sibling roll back", OverlapError, on_loop=rolled_back_by_a_sibling),
    Misbehaviour(8, "broken-job", "breaks a job handler's pass", IntegrityError, broken_job, abroken_job, late=True),
    Misbehaviour(9, "background", "leaves its session to a task", ScopeEndedError, on_loop=background, late=True),
    Misbehaviour(10, "pulled", "pulls a generator by hand", ScopeMisuseError, pulled_by_hand),
    Misbehaviour(11, "never-closed", "never closes its generator", ScopeMisuseError, on_loop=never_closed),
    Misbehaviour(18, "reads-on", "reads after its commit", None, read_after_commit, guard="begun_by_read"),
    Misbehaviour(19, "helper-commits", "has a helper commit", NotTheOwnerError, helper_commits),
    Misbehaviour(19, "helper-says", "has a helper say COMMIT", NotTheOwnerError, on_loop=helper_says_commit),
    Misbehaviour(19, "helper-owns", "has a helper take over", TransactionInProgress, helper_owns),
    Misbehaviour(20, "second", "waits for its own lock", SelfBlockedError, second_connection, asecond_connection),
    Misbehaviour(21, "everybody-waits", "waits for its own threads", FanOutError, everybody_waits),
    Misbehaviour(
        *(22, "thread-local", "uses a thread's session", NoScopeError, None, thread_local),
        behind="nothing",
    ),
    Misbehaviour(27, "threads", "shares it with a thread", OverlapError, shared_by_threads),
    Misbehaviour(28, "swallowed", "swallows a helper's failure", RollbackOnlyError, swallowed, aswallowed),
    Misbehaviour(39, "own-engine", "makes an engine of its own", ConfigurationError, own_engine),
    Misbehaviour(40, "forgotten", "forgets to commit", UncommittedWritesError, forgotten, aforgotten),
    Misbehaviour(42, "blocks", "blocks the loop", None, on_loop=blocks_the_loop, guard="sync_on_loop", once=True),
)
