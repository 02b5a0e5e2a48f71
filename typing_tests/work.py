"""Scopes, transactions, decorators, hooks and fan-outs keep the types of what they are given."""

from contextlib import AsyncExitStack, ExitStack
from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from dbscope import AsyncDatabase, Database, Loop, Scope, aend_scope, begin_scope, current_scope, end_scope, scope


class Audited(Session):
    """A session class of the user's."""


db = Database("sqlite://")
audited = Database("sqlite://", session_class=Audited)
adb = AsyncDatabase("sqlite+aiosqlite://")


# Scopes: one class, entered in either colour.


def scopes() -> None:
    """`with` yields the scope."""
    with scope("report") as work, scope():
        assert_type(work, Scope)
        assert_type(work.ended, bool)
    with scope("import", commit="on-success") as work:
        assert_type(work.finish(veto=True), None)
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
