"""Scopes, transactions, decorators, hooks and fan-outs keep the types of what they are given."""

from contextlib import AsyncExitStack, ExitStack
from datetime import timedelta
from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from dbscope import (
    AsyncDatabase,
    AttemptFailed,
    CommitOutcomeUnknown,
    Conflict,
    Database,
    Loop,
    Retry,
    Scope,
    aend_scope,
    begin_scope,
    current_scope,
    end_scope,
    scope,
)
from dbscope.transaction import Transaction


class Audited(Session):
    """A session class of the user's."""


db = Database("sqlite://")
audited = Database("sqlite://", session_class=Audited)
adb = AsyncDatabase("sqlite+aiosqlite://")


# Scopes: one class, entered in either colour.


@scope(commit="on-success")
def shrink(id: int) -> str:
    """A decorated function keeps its types."""
    return str(id)


def scopes() -> None:
    """`with` yields the scope."""
    with scope("report") as work, scope():
        assert_type(work, Scope)
        assert_type(work.ended, bool)
    with scope("import", commit="on-success") as work:
        assert_type(work.finish(veto=True), None)
    decorated = scope("shrink")(shrink)
    assert_type(decorated(7), str)
    assert_type(current_scope(), Scope | None)
    assert_type(begin_scope(17, commit="on-success"), Scope)
    assert_type(end_scope(17), None)
    with ExitStack() as stack:
        assert_type(stack.enter_context(scope()), Scope)


async def ascopes() -> None:
    """So does `async with`."""
    async with scope("report") as work:
        assert_type(work, Scope)
        await work.afinish()
    await aend_scope(17)


scope(17)  # type: ignore[arg-type]
scope("x", commit=True)  # type: ignore[arg-type]


# Blocks yield the session of their database.


def blocks() -> None:
    """Sync."""
    with db.transaction() as session:
        assert_type(session, Session)
    with db.transaction(nested=True) as session, db.transaction(new=True) as other:
        assert_type((session, other), tuple[Session, Session])
    with audited.reader() as mine:
        assert_type(mine, Audited)
    with ExitStack() as stack:
        assert_type(stack.enter_context(audited.transaction()), Audited)
    with db.transaction(kind="mandatory", durable=False, no_rollback_for=(KeyError, ValueError)) as session:
        assert_type(session, Session)
    with db.transaction(isolation="SERIALIZABLE", read_only=True, deferrable=True, timeout=5) as session:
        assert_type(session, Session)
    with audited.transaction(lock_timeout=0.5, statement_timeout=timedelta(seconds=2)) as mine:
        assert_type(mine, Audited)
    with audited.reader(autocommit=True) as mine:
        assert_type(mine, Audited)
    db.transaction(kind="reader")  # type: ignore[arg-type]
    db.transaction(isolation="serializable")  # type: ignore[arg-type]
    db.transaction(timeout="5s")  # type: ignore[arg-type]
    db.reader(True)  # type: ignore[call-arg]
    db.transaction(isolate=True)  # type: ignore[call-arg]
    db.transaction(no_rollback_for=KeyboardInterrupt)  # type: ignore[arg-type]
    db.set_rollback_only()
    db.doom("why")
    with adb.transaction() as _:  # type: ignore[attr-defined]
        pass


async def ablocks() -> None:
    """Async."""
    async with adb.transaction() as session, adb.reader() as reading:
        assert_type((session, reading), tuple[AsyncSession, AsyncSession])
    async with AsyncExitStack() as stack:
        assert_type(await stack.enter_async_context(adb.transaction()), AsyncSession)
    async with db.transaction() as _:  # type: ignore[attr-defined]
        pass


def a_block_may_be_left_early() -> int:
    """No block swallows an exception, so nothing is missing after a `return` inside of one."""
    with db.transaction():
        return 1


# Decorators keep the signature.


@db.transactional
def pay(cents: int, *, note: str = "") -> str:
    """Bare."""
    return note * cents


@db.transactional(nested=True)
def pay_part(cents: int) -> int:
    """With options."""
    return cents


@adb.transactional
async def apay(cents: int) -> str:
    """Async."""
    return str(cents)


class Bank:
    @db.transactional
    def pay(self, cents: int) -> int:
        """A method."""
        return cents


async def calls() -> None:
    """What the decorated ones take and give."""
    assert_type(pay(1, note="x"), str)
    assert_type(pay_part(1), int)
    assert_type(await apay(1), str)
    assert_type(Bank().pay(1), int)
    pay("1")  # type: ignore[arg-type]
    pay(1, remark="x")  # type: ignore[call-arg]


# Retries keep the signature, too; `run` takes what its function takes.


@db.transactional(retry=3)
def pay_again(cents: int, *, note: str = "") -> str:
    """A number."""
    return note * cents


def watch(fact: AttemptFailed) -> None:
    """What a listener is told."""
    assert_type((fact.work, fact.attempt, fact.pause, fact.elapsed), tuple[str, int, float, float])
    assert_type(fact.conflict, Conflict)
    assert_type(fact.error, Exception)


@adb.transactional(retry=Retry(5, budget=2.0, on=(ValueError, KeyError), on_retry=watch))
async def apay_again(cents: int) -> str:
    """A policy."""
    return str(cents)


async def retries() -> None:
    """Sync and async."""
    assert_type(pay_again(1, note="x"), str)
    assert_type(await apay_again(1), str)
    assert_type(db.run(shout, "a"), bytes)
    assert_type(db.run(shout, "a", retry=Retry(on=lambda error: bool(error.args))), bytes)
    assert_type(db.run(lambda: 1, retry=5), int)
    assert_type(await adb.run(ashout, "a", retry=5), bytes)
    db.run(shout, 1)  # type: ignore[arg-type]
    db.run(shout)  # type: ignore[arg-type]
    await adb.run(shout, "a")  # type: ignore[arg-type]
    db.transactional(retry="3")  # type: ignore[call-overload]
    Retry(3, 0.5)  # type: ignore[call-arg]


# Fan-outs.


def shout(word: str) -> bytes:
    """A part."""
    return word.encode()


async def ashout(word: str) -> bytes:
    """An async part."""
    return word.encode()


async def fan_outs() -> None:
    """Items in, results out."""
    assert_type(db.fan_out(shout, ["a"]), list[bytes])
    assert_type(await adb.fan_out(ashout, ["a"], limit=2), list[bytes])
    db.fan_out(shout, [1])  # type: ignore[arg-type]


# Hooks and loops.


async def hooks() -> None:
    """Functions, with their arguments after them."""
    assert_type(db.on_commit(shout, "a"), None)
    assert_type(db.on_rollback(shout, word="a"), None)
    await adb.on_commit(ashout, "a")
    assert_type(adb.on_rollback(ashout, "a"), None)


loop = Loop(lambda: None, interval=1.0, commit="on-success")
assert_type(loop.run(), None)
assert_type(loop.passes, int)

# Commits whose answer may be lost.


def outcomes() -> None:
    """The option takes two words; an error tells the transaction's id, where it has one."""
    assert_type(db.transaction(outcome="resolve"), Transaction[Session])
    assert_type(Database("sqlite://", outcome="resolve"), Database[Session])
    db.transaction(outcome="ask")  # type: ignore[arg-type]

    @db.transactional(outcome="raise")
    def add(amount: int) -> str:
        return str(amount)

    try:
        assert_type(add(1), str)
    except CommitOutcomeUnknown as error:
        assert_type(error.xid, int | None)
